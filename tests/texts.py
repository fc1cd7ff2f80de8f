"""Small corpora for tests of preparing, and what came of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from titan.data.shards import TokenShard
from titan.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


WORDS = ["the", "of", "and", "to", "in", "é", "語", "😀", "is", "that\n", "for", "it", "as", "was", "with", "be", "by"]


def silent(line: str) -> None:
    pass


def write_rows(folder: Path, seed: int, files: int = 3, rows: int = 400) -> list[str]:
    """JSONL files, and all of their texts."""
    draw, texts = random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        own = [" ".join(draw.choices(WORDS, k=draw.randint(0, 60))) for _ in range(rows)]
        (folder / f"{number}.jsonl").write_text(
            "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(own))
        )
        texts += own
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def texts_in(folder: Path, split: str) -> list[str]:
    tokenizer, texts = load_tokenizer("bytes"), []
    for path in sorted(folder.glob(f"{split}-*.tokens")):
        shard = TokenShard(path)
        shard.verify()
        texts += [tokenizer.decode(ids) for ids in np.split(shard.tokens, shard.ends[:-1].astype(int))]
    return texts


BAD = {
    3: (b'{"text": "caf\xe9"}', "is not UTF-8"),
    5: (b'{"text": "half', "is no JSON"),
    8: (b'{"content": "other"}', "has no 'text'; it has 'content'"),
    9: (b'{"text": 7}', "has a int as 'text', not a string"),
    11: (b'["text"]', "holds a list, not an object"),
    12: (rb'{"text": "\ud800"}', "cannot be made into tokens"),
    14: (b'{"text": "' + b"x" * 5_000_000 + b'", }', "is no JSON"),  # known to be bad when most of it is written
}


def write_bad(folder: Path) -> list[str]:
    folder.mkdir()
    good = [f"document {i}" for i in range(600)]
    lines = [json.dumps({"text": text}).encode() for text in good]
    lines[400:400] = [b""] * 12_000  # blank lines count, too, also at the end of a piece
    for number in sorted(BAD):
        lines.insert(12_500 + number, BAD[number][0])
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    return good


TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def write_chats(folder: Path, count: int = 200) -> list[list[dict[str, str]]]:
    draw, chats = random.Random(7), []
    for i in range(count):
        turns = []
        for k in range(draw.randint(1, 3)):
            turns += [
                {"role": "user", "content": f"question {i}.{k}"},
                {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=5))},
            ]
        chats.append(turns)
    folder.mkdir()
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    (folder / "template.jinja").write_text(TEMPLATE)
    return chats
