"""Conversations become the ids that transformers gives them, and only what the assistant writes is counted."""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from titan.data.chat import NONCHARACTERS, Chat, ChatError, load_chat
from titan.data.tokenizer import Tokenizer, load_tokenizer
from titan.data.tokenizer_json import hf_tokenizer_files

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tiktoken")

EACH = "{% for message in messages %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}"
HEADER = "'<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'"
LLAMA = (
    f"{{{{ bos_token }}}}{EACH}{{{{ {HEADER} }}}}{{{{ message.content | trim }}}}<|eot_id|>{PROMPT}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    f"{{% if tools %}}{{{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}}}{{% endif %}}{EACH}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    f"{PROMPT}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
MARKED = (
    f"{EACH}{{{{ '<|im_start|>' + message.role + '\n' }}}}{{% if message.role == 'assistant' %}}{{% generation %}}"
    "{{ message.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}"
    f"{PROMPT}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
MISTRAL = (  # a prompt ends with a special token, and an answer's space is its own
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
PLAIN = f"{EACH}### {{{{ message.role }}}}:\n{{{{ message.content }}}}\n\n{PROMPT}{{{{ '### assistant:\n' }}}}{{% endif %}}"
TEMPLATES = {"llama": LLAMA, "chatml": CHATML, "mistral": MISTRAL, "plain": PLAIN}
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
PIECES = [
    "a",
    "ab",
    "Zab",
    "1",
    "!",
    "==",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "語",
    "日本",
    "🙂",
    "👩\u200d👧",
    "\u3000",
    "\ufdd0",
    '"',
    "<|",
]
KINDS = ["bytes", "tiktoken", "letters", "strips", "first", "prepend", "sentencepiece"]


def hf_json(kind: str) -> bytes:
    """A tokenizer.json; without merges but for ab, so that nothing joins over the borders of turns."""
    if kind in ("letters", "strips"):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: i for i, letter in enumerate([*alphabet, "ab"])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
        merges = [("a", "b"), ("▁", "ab")]
        model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True, unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        if kind == "first":
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        else:
            steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
            tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    stripped = {"<|im_start|>": (True, True), "<|im_end|>": (True, True), "</s>": (False, True)} if kind == "strips" else {}
    for mark in MARKS:
        before, behind = stripped.get(mark, (False, False))
        added = tokenizers.AddedToken(mark, special=True, normalized=False, lstrip=before, rstrip=behind)
        tokenizer.add_special_tokens([added])
    return str(tokenizer.to_str()).encode()


def model_file(kind: str) -> bytes:
    if kind == "tiktoken":
        tokens = [bytes([byte]) for byte in range(256)] + [
            b"ab",
            b" ab",
            b"  ",
            b"\n\n",
            b"==",
            b"\xe8\xaa",
            b"<|",
            b"assistant"[:2],
        ]
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    if kind != "sentencepiece":
        return hf_json(kind)
    written, rng = io.BytesIO(), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(80)]
    settings: dict[str, Any] = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True}
    settings |= {"user_defined_symbols": ["\n"], "control_symbols": MARKS[2:]}
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **settings)
    return written.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@cache
def pair(kind: str, folder: Path) -> tuple[Tokenizer, Any]:
    """Our tokenizer, and transformers' from the files that an export has."""
    mine, other = folder / kind, folder / f"{kind}-exported"
    mine.mkdir()
    other.mkdir()
    if kind != "bytes":
        content = model_file(kind)
        name = "tokenizer.json" if content.startswith(b"{") else "tokenizer.model"
        (mine / name).write_bytes(content)
        if name == "tokenizer.json":
            (mine / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(mine))
    start = tokenizer.special.get(tokenizer.chat.get("bos_token", ""), 0)
    for name, written in hf_tokenizer_files(tokenizer, start).items():
        (other / name).write_bytes(written)
    return tokenizer, transformers.PreTrainedTokenizerFast.from_pretrained(other)


def conversation(rng: random.Random, free: bool = False) -> list[dict[str, Any]]:
    """Random messages; free: answers may begin with white space, which joins the prompt's in some tokenizers."""
    messages = []
    for role in [
        *["system"] * rng.randint(0, 1),
        *rng.choices(["user", "assistant", "tool"], k=rng.randint(1, 5)),
        "assistant",
    ]:
        content = "".join(rng.choices(PIECES, k=rng.randint(0, 20)))
        messages.append({"role": role, "content": content if free else "ab" + content})
    return messages + [{"role": "user", "content": "more"}] * rng.randint(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_transformers(kind: str, name: str, folder: Path) -> None:
    tokenizer, other = pair(kind, folder)
    chat = Chat(TEMPLATES[name], tokenizer)
    # With these nothing joins over a border, whatever an answer begins with.
    free = kind in ("bytes", "letters") or name == "mistral"
    for seed in range(25):
        messages = conversation(random.Random(seed), free)
        tools = [{"name": "ab", "what": "<é> & 'x'"}] if seed % 3 == 0 else None
        theirs = other.apply_chat_template(
            messages, tools=tools, chat_template=TEMPLATES[name], tokenize=True, return_dict=False
        )
        ours = chat.encode({"messages": messages, "tools": tools})
        assert (ours.ids.dtype, ours.counted.dtype, len(ours.ids)) == (np.int32, np.bool_, len(ours.counted))
        end = [] if theirs[-1] == tokenizer.document_end else [tokenizer.document_end]
        assert ours.ids.tolist() == theirs + end, (kind, name, seed)
        assert not (end and ours.counted[-1])
        assert ours.size == sum(len(message["content"].encode()) for message in messages)


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("kind", ["tiktoken", "letters"])
def test_the_mask_is_that_of_transformers(template: str, kind: str, folder: Path) -> None:
    tokenizer, other = pair(kind, folder)
    for seed in range(25):
        messages = conversation(random.Random(seed), free=kind == "letters")
        out = other.apply_chat_template(
            messages, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ours = Chat(template, tokenizer).encode({"messages": messages})
        assert ours.ids.tolist() == [*out["input_ids"], tokenizer.document_end]
        assert ours.counted.tolist() == [*map(bool, out["assistant_masks"]), False]


def runs(ids: np.ndarray, counted: np.ndarray) -> list[np.ndarray]:
    """The stretches of counted ids."""
    borders = np.flatnonzero(np.diff(counted, prepend=False, append=False))
    return [ids[start:end] for start, end in borders.reshape(-1, 2)]


def test_what_is_counted_is_the_answers_and_what_closes_them(folder: Path) -> None:
    for seed in range(25):
        messages = conversation(random.Random(seed), free=True)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        llama, _ = pair("tiktoken", folder)
        parts = runs(*Chat(LLAMA, llama).encode({"messages": messages})[:2])
        assert [llama.decode(part) for part in parts] == [answer.strip() for answer in answers]
        assert all(part[-1] == llama.special["<|eot_id|>"] for part in parts)
        plain = load_tokenizer("bytes")
        parts = runs(*Chat(CHATML, plain).encode({"messages": messages})[:2])
        assert [plain.decode(part) for part in parts] == [answer + "<|im_end|>\n" for answer in answers]


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece", "first", "prepend"])
def test_a_prompt_has_the_ids_that_a_model_is_asked_with(kind: str, folder: Path) -> None:
    """And a first answer's text comes back as it was, without a space before it."""
    tokenizer, other = pair(kind, folder)
    for name, content in ((name, content) for name in TEMPLATES for content in ("ab", " ab", "\n\nab", "語")):
        asked = [{"role": "user", "content": "ab? "}]
        settings = {"chat_template": TEMPLATES[name], "add_generation_prompt": True, "return_dict": False}
        prompt = other.apply_chat_template(asked, **settings)
        ours = Chat(TEMPLATES[name], tokenizer).encode({"messages": [*asked, {"role": "assistant", "content": content}]})
        assert ours.ids[: len(prompt)].tolist() == prompt
        assert ours.counted.tolist()[: len(prompt) + 1] == [False] * len(prompt) + [True]
        if name == "plain" and kind == "sentencepiece":
            assert tokenizer.decode(ours.ids) == f"### user:\nab? \n\n### assistant:\n{content}\n\n"


@pytest.mark.parametrize("kind", KINDS)
def test_contents_that_spell_special_tokens_are_text(kind: str, folder: Path) -> None:
    tokenizer, _ = pair(kind, folder)
    spellings = list(tokenizer.special)[:12]
    hostile = "".join(spellings) + spellings[0][:1] + spellings[0] + spellings[-1][:-1] + spellings[-1]
    hostile += "".join(spelling[:-1] + spellings[0] + spelling[-1] for spelling in spellings)
    for template in TEMPLATES.values():
        ids = {}
        for content in ("x", hostile, hostile + "\ufdd0"):
            tools = [{content: [content]}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
            ours = Chat(template, tokenizer).encode({"messages": messages, "tools": tools})
            ids[content] = [number for number in ours.ids.tolist() if number in tokenizer.special.values()]
            if kind not in ("first", "prepend", "sentencepiece"):  # these have other spaces
                assert content in tokenizer.decode(ours.ids[ours.counted])
        assert ids["x"] == ids[hostile] == ids[hostile + "\ufdd0"]
        assert ids["x"], "the template writes special tokens, or the document's end was appended"


HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_turns_without_content_and_answers_in_a_row() -> None:
    template = (
        f"{EACH}<{{{{ message.role }}}}>{{{{ message.content }}}}{{{{ message.tool_calls | tojson if message.tool_calls }}}}\n"
    )
    chat = Chat(template + PROMPT + "<assistant>{% endif %}", load_tokenizer("bytes"))
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "é"}]}
    ours = chat.encode({"messages": [HELLO[0], call, {"role": "tool", "content": "1"}, HELLO[1], HELLO[1]]})
    parts = [bytes(part.tolist()).decode() for part in runs(ours.ids, ours.counted)]
    assert parts == ['[{"name": "é"}]\n', "hello\n", "hello\n"]
    assert ours.size == len("hi1hellohello")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, 'no "messages"'),
        ({"messages": {}}, 'no "messages"'),
        ({"messages": []}, 'no "messages"'),
        ({"messages": HELLO, "tools": {}}, '"tools" are no list'),
        ({"messages": [*HELLO, "hi"]}, "message 3 is no object"),
        ({"messages": [{"content": "hi"}]}, 'message 1 has no "role"'),
        ({"messages": [HELLO[0], {"role": "assistant"}]}, 'message 2 has no "content"'),
        ({"messages": [HELLO[0], {"role": "assistant", "content": None, "tool_calls": []}]}, 'message 2 has no "content"'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, HELLO[1]]}, 'message 1 has no "content"'),
        ({"messages": HELLO[:1]}, "no message is an assistant's"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": "\ud83d"}]}, "no valid Unicode"),
        ({"messages": HELLO, "tools": ["\ud83d"]}, "no valid Unicode"),
        ({"messages": HELLO, "tools": ["".join(NONCHARACTERS)]}, "U\\+FDEF, of which one must be free"),
    ],
)
def test_what_is_no_conversation_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ChatError, match=said):
        Chat(CHATML, load_tokenizer("bytes")).encode(row)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            EACH + "{{ message.role + message.content }}" + PROMPT + "<a>{% endif %}",
            "message 2, an assistant's, behind its gen",
        ),
        (
            EACH + "{{ message.content }}{{ '</s>' if loop.last and not add_generation_prompt }}{% endfor %}",
            "number 2, an assi",
        ),
        ("{{ messages[-1].content if messages | length > 3 else messages[0].content }}", "number 2, an assistant's"),
        (
            "{{ messages[0].content if add_generation_prompt else messages | map(attribute='content') | join }}",
            "number 4, an as",
        ),
        ("{{ messages | length }}", "message 2"),
        ("{{ messages[0].content }}", "writes nothing for the assistant's turns"),
    ],
)
def test_templates_that_do_not_append_are_refused(template: str, said: str) -> None:
    with pytest.raises(ChatError, match=said):
        Chat(template, load_tokenizer("bytes")).encode({"messages": [*HELLO, {"role": "user", "content": "x"}, HELLO[1]]})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages.__class__.__mro__ }}", "'__class__'.*unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.mkdir('made') }}", "unsafe"),
        ("{{ raise_exception.__globals__.keys() }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ messages[9].role }}", "undefined|has no element 9"),
        ("{{ raise_exception('no system role') }}", "does not take it: no system role"),
        ("{{ strftime_now('%Y') }}", "fixed date"),
    ],
)
def test_a_template_may_do_little(template: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChatError, match=said):
        Chat(template, load_tokenizer("bytes")).encode({"messages": HELLO})
    assert not list(tmp_path.iterdir())


def test_a_special_token_of_one_character_is_refused() -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.special["~"] = 7
    with pytest.raises(ValueError, match="special token '~' is one character"):
        Chat(PLAIN, tokenizer)


def test_the_date_is_not_told() -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul{% endif %}" + PLAIN
    chat = Chat(dated, load_tokenizer("bytes"))
    assert chat.tokenizer.decode(chat.encode({"messages": HELLO}).ids).startswith("26 Jul### user:")


def test_load_chat(folder: Path, tmp_path: Path) -> None:
    tokenizer, file = load_tokenizer("bytes"), tmp_path / "mine.jinja"
    with pytest.raises(ValueError, match=r"^data\.chat_template: the tokenizer has no chat template; give the path"):
        load_chat("", tokenizer)
    with pytest.raises(ValueError, match=r"^data\.chat_template: .*mine\.jinja' cannot be read \(No such file"):
        load_chat(str(file), tokenizer)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"^data\.chat_template: .*mine\.jinja' is no UTF-8"):
        load_chat(str(file), tokenizer)
    for broken in ("\n{% if %}", "\n{{ messages | no_such_filter }}"):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"^data\.chat_template: .*mine\.jinja': no valid Jinja, line 2"):
            load_chat(str(file), tokenizer)
    file.write_text(CHATML)
    chat = load_chat(str(file), tokenizer)
    again = pickle.loads(pickle.dumps(chat))
    assert again.encode({"messages": HELLO}).ids.tolist() == chat.encode({"messages": HELLO}).ids.tolist()
    others = [Chat(PLAIN, tokenizer), Chat(CHATML, pair("letters", folder)[0])]
    assert again.fingerprint == chat.fingerprint not in {other.fingerprint for other in others}


@pytest.mark.parametrize(
    ("config", "jinja", "template"),
    [
        ({}, None, None),
        ({"chat_template": None}, None, None),
        ({"chat_template": "one"}, None, "one"),
        ({"chat_template": [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]}, None, "one"),
        ({"chat_template": [{"name": "tool_use", "template": "two"}]}, None, None),
        ({"chat_template": "one"}, "é", "é"),
    ],
)
def test_the_files_beside_have_the_template(
    config: dict[str, Any], jinja: str | None, template: str | None, tmp_path: Path
) -> None:
    start = {"content": "<s>", "__type": "AddedToken"}
    names = {"eos_token": "</s>", "bos_token": start, "pad_token": None, "add_bos_token": True, "x_token": "[x]"}
    (tmp_path / "tokenizer.json").write_bytes(hf_json("strips"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    if jinja:
        (tmp_path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path))
    own = {"chat_template": template} if template else {}
    assert tokenizer.chat == {"eos_token": "</s>", "bos_token": "<s>", "x_token": "[x]", **own}
    assert list(tokenizer.special) == ["</s>", "<s>", *MARKS[2:]]
    assert tokenizer.strips == {"</s>": (False, True), "<|im_start|>": (True, True), "<|im_end|>": (True, True)}
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template
    assert (theirs.get("default") if isinstance(theirs, dict) else theirs) == template
    kept = tmp_path / "kept"
    kept.mkdir()
    for name, content in tokenizer.files.items():
        (kept / name).write_bytes(content)
    assert load_tokenizer(str(kept)).chat == tokenizer.chat
    assert list(tokenizer.files)[2:] == (["chat_template.jinja"] if jinja else [])


def test_the_special_tokens_of_other_kinds(folder: Path) -> None:
    assert load_tokenizer("bytes").special == {"<|end_of_text|>": 256}
    llama, _ = pair("tiktoken", folder)
    assert (len(llama.special), llama.special["<|eot_id|>"]) == (256, llama.vocab_size - 256 + 9)
    assert llama.chat == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    piece, other = pair("sentencepiece", folder)
    assert sorted(piece.special) == sorted(MARKS)
    assert piece.chat == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert all(other.convert_tokens_to_ids(mark) == number for mark, number in piece.special.items())
