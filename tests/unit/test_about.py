"""about.json: a folder tells what its weights are of, and is not believed when that makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from titan.checkpoint.about import About, read_about, refuse_another_model, tokenizer_spec, write_about
from titan.checkpoint.manifest import CheckpointError
from titan.models.llama3.config import Config


def test_what_a_folder_says_of_itself_is_not_trusted(tmp_path: Path) -> None:
    config = Config(dim=32, n_heads=4, n_layers=2, vocab_size=50)
    about = About("llama3", config, "tokenizer.model", "abc", 2)
    write_about(tmp_path, about, {"tokenizer.model": b"model"})
    assert read_about(tmp_path) == about
    assert tokenizer_spec(tmp_path, about) == str(tmp_path / "tokenizer.model")
    assert refuse_another_model(tmp_path, "llama3", replace(config, context_length=64), "abc") == about
    for other, fingerprint, said in (
        (replace(config, rope_theta=9.0), "abc", r"rope_theta is 500000.0 there and 9.0 here; set --model.rope_theta=500000.0"),
        (config, "def", "was trained with the tokenizer abc"),
    ):
        with pytest.raises(CheckpointError, match=said):
            refuse_another_model(tmp_path, "llama3", other, fingerprint)
    whole = json.loads((tmp_path / "about.json").read_text())
    for change in (
        {"model": "os"},
        {"config": {**whole["config"], "n_layers": 2.0}},
        {"config": {**whole["config"], "n_heads": 7}},
        {"config": {"dimension": 3}},
        {"config": None},
        {"tokenizer": "../tokenizer.model"},
        {"tokenizer": None},
        {"document_start": 99999},
        {"document_start": -1},
        {"document_start": "2"},
        {"version": 2},
    ):
        (tmp_path / "about.json").write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match=r"about\.json"):
            read_about(tmp_path)
