"""tokenizer.json: any of our tokenizers as the files that Hugging Face's libraries load, without code and other packages.

The format is https://huggingface.co/docs/tokenizers: a text passes a normalizer, a pre-tokenizer that cuts it into words, a
model that gives each word's tokens, and ids pass a decoder on the way back. Bytes and tiktoken ranks are byte-level byte
pair encodings: vocabularies are of text there, so each byte is written as a visible character, after GPT-2
(Radford et al. 2019). Ranks name no merges, so each way to cut a token in two tokens is one: whatever pair
meets, its concatenation's rank says when it merges. Sentencepiece models are more work: `sentencepiece_json`.

The special tokens are those whose spelling transformers takes out of a text unless told split_special_tokens=True; with that,
ids are equal to ours. Nothing is put before a text.
"""

from __future__ import annotations

import json
from typing import Any

from titan.data.tokenizer import DOCUMENT_END, BytesTokenizer, Tokenizer


def hf_tokenizer_files(tokenizer: Tokenizer, start: int) -> dict[str, bytes]:
    """The files, name -> contents, from which `transformers.AutoTokenizer` makes a tokenizer with the same ids.

    start: the token before a document's first, which becomes its bos_token: a model knows no other.
    A tokenizer that came as a tokenizer.json is given back as it came. ValueError, with what to do, for a sentencepiece model
    that no tokenizer.json can mirror.
    """
    if "tokenizer.json" in tokenizer.files:
        return tokenizer.files
    names = {}
    if isinstance(tokenizer, BytesTokenizer):
        file, names["eos_token"] = bytes_json(), DOCUMENT_END
    elif ranks := getattr(tokenizer, "ranks", None):
        file, names = tiktoken_json(ranks), tokenizer.chat
    else:
        from titan.data.sentencepiece_json import sentencepiece_json

        file, names = sentencepiece_json(tokenizer.files["tokenizer.model"])
    special = {token["id"]: {"bos_token": token["content"]} for token in file["added_tokens"]}
    names = {key: name for key, name in names.items() if key != "bos_token"} | special.get(start, {})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids, which Llama refuses
        **names,
    }
    return {
        "tokenizer.json": json.dumps(file, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }


def whole(model: dict[str, Any], added: list[dict[str, Any]], **steps: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json: the model, the added tokens, and the steps before and after."""
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **unused, "added_tokens": added, **steps, "model": model}


def added_token(number: int, content: str, *, special: bool, normalized: bool = False) -> dict[str, Any]:
    """A token that is found in the text before all else. normalized: in the text that the normalizer has made."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": number, "content": content, **plain, "normalized": normalized, "special": special}


def bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    """A byte pair encoding: `merges` in order of their application. Written as strings, which every release reads."""
    unset = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **unset, **flags, **settings, "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]}


def byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where it is visible in Latin-1, else the next from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def bytes_json() -> dict[str, Any]:
    """The tokenizer.json of `bytes`."""
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    end = added_token(256, DOCUMENT_END, special=True)
    return whole(bpe(vocab, []), [end], pre_tokenizer=_byte_level(False), decoder=_byte_level(True))


def tiktoken_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The tokenizer.json of tiktoken ranks with Llama 3's words and special tokens."""
    from titan.data.tokenizer_tiktoken import PATTERN, SPECIALS

    alphabet = byte_alphabet()
    names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    # ignore_merges: a word that is a token is that token, whether or not merges lead to it.
    model = bpe({names[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    words = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return whole(
        model,
        [added_token(len(ranks) + i, name, special=True) for i, name in enumerate(SPECIALS)],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [words, _byte_level(False)]},
        decoder=_byte_level(True),
    )
