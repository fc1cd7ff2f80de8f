"""Conversations as data: of a sample only what the assistant says is a label."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts import TEMPLATE, silent, write_chats, write_rows

from titan.config import Config, Data, Source, Training
from titan.data.chat import ChatError, load_chat
from titan.data.inspect import sample, summary
from titan.data.prepare import prepare
from titan.data.shards import TokenShard
from titan.data.splits import open_splits
from titan.data.tokenizer import BytesTokenizer


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_only_the_assistants_turns_of_a_chat_are_labels(tmp_path: Path, packing: Any) -> None:
    chats = write_chats(tmp_path / "chats")
    write_rows(tmp_path / "rows", 8)
    sources = [
        Source("chat", str(tmp_path / "chats" / "chat.jsonl"), content="chat", weight=1.0),
        Source("text", str(tmp_path / "rows"), weight=1.0),
    ]
    data = Data(
        sources=sources,
        cache=str(tmp_path / "cache"),
        chat_template=str(tmp_path / "chats" / "template.jinja"),
        packing=packing,
        document_mask=True,
    )
    folders = [prepare(source, data, silent) for source in sources]
    prepared = Data(**{**vars(data), "sources": [Source(s.name, str(f)) for s, f in zip(sources, folders, strict=True)]})
    splits = open_splits(prepared, BytesTokenizer(), Training(seq_len=512), validate=True)
    read: dict[str, list[int]] = {"chat": [], "text": []}
    for name, windows in zip(splits.train.names, splits.train.windows, strict=True):
        for window in range(windows.count):
            arrays = windows.read(window, "")
            labels = arrays["labels"]
            read[name] += labels[labels >= 0].tolist()
            if packing == "contiguous":
                following = windows.datasets[0].read(window * 512 + 1, 512)
                assert (labels == np.where(labels >= 0, following, -100)).all()
    decode = BytesTokenizer().decode
    said = decode(read["chat"])
    assert "question" not in said
    assert "user" not in said
    assert said.count("</assistant>\n") > 0.8 * 0.95 * sum(len(chat) // 2 for chat in chats), "95% are for training"
    some = {turn["content"] for chat in chats for turn in chat if turn["role"] == "assistant"}
    assert set(said.split("</assistant>\n")[1:-1]) <= some | {one[i:] for one in some for i in range(len(one))}
    shown = sample(splits.train, BytesTokenizer(), next(i for i in range(99) if splits.train.place(i)[0] == 0))
    for text in (text for text in shown if text):
        marked = re.findall(r"<assistant>(\[\[)?(.*?)</assistant>(\s*\]\])?", text, re.DOTALL)
        assert all(begin and end for begin, _, end in marked[1:-1]), text
        assert not re.search(r"\[\[[^\]]*<user>", text)
    lines = "\n".join(summary(splits.train.windows[0], splits.train.datasets[0], Config()))
    assert re.search(r"counted     [34]\d\.\d% of the tokens", lines)
    assert splits.tokens_per_byte is None
    assert len(read["text"]) > 0.5 * splits.train.windows[1].count * 512, "of texts everything counts"


def test_bad_chats(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": "hello"},
        {"text": "hello"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    template = str(tmp_path / "t.jinja")
    data = Data(cache=str(tmp_path / "cache"), chat_template=template, validation_share=0, on_bad="skip")
    folder = prepare(Source(path=str(file), content="chat"), data, silent)
    assert len((folder / "left_out.txt").read_text().splitlines()) == 3
    assert TokenShard(folder / "train-00000.tokens").documents == 1
    with pytest.raises(ChatError):
        load_chat(template, BytesTokenizer()).encode(rows[0])
    with pytest.raises(ValueError, match=r"^data\.chat_template: "):
        prepare(Source(path=str(file), content="chat"), Data(cache=str(tmp_path / "cache")), silent)
