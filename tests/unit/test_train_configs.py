"""Every config in train_configs/ loads, fits the launch that its first lines name, and builds its model on meta."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from titan import toml, zoo
from titan.check import problems
from titan.parallel.apply import parallelize

CONFIGS = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_what_its_first_lines_say(path: Path) -> None:
    config = toml.load(path)
    head = "".join(line[1:] for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "titan train " in head or "./run_train.sh" in head, "no launch command"
    tokens = config.training.global_batch_size * config.training.seq_len
    assert f"{config.training.global_batch_size} x {config.training.seq_len:,} = {tokens:,}" in head
    gpus = re.search(r"GPUs: (none|\d+)", head)
    assert gpus, "no line that says how many GPUs"
    world = 2 if gpus[1] == "none" else int(gpus[1])
    assert problems(config, world) == []
    with torch.device("meta"):
        model = zoo.make(config.model.name, config.model.config)
    parallelize(model, zoo.sharding(config.model.name, config.model.config), None, config.precision)
    out = model(torch.zeros(1, 8, dtype=torch.long, device="meta"), labels=torch.zeros(1, 8, dtype=torch.long, device="meta"))
    assert out.shape == ()


def test_debug_serves_the_whole_grid_of_plans() -> None:
    config = toml.load(CONFIGS[0].with_name("debug.toml"))
    assert (config.training.seq_len, config.training.global_batch_size) == (256, 16)
    model = config.model.config
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (8, 8, 4)
    assert all(width % 16 == 0 for width in (model.dim, model.ffn_dim, model.vocab_size, model.head_dim * model.n_kv_heads))
