"""Every config in train_configs/ loads, fits the launch that its first lines name, and builds its model on meta."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from titan import toml, zoo
from titan.check import problems
from titan.checkpoint.commit import seal
from titan.config import Compile, degrees
from titan.parallel.apply import parallelize
from titan.parallel.mesh import Mesh

DOCS = Path(__file__).parents[2] / "docs"
CONFIGS = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
CONTINUED = next(path for path in CONFIGS if path.stem == "continue_llama3_8b")


def head_of(path: Path) -> str:
    """The comment that a config begins with, after the line that editors read."""
    lines = path.read_text().splitlines(keepends=True)
    assert lines[0] == "#:schema ../docs/config.schema.json\n"
    return "".join(line[1:] for line in lines[1 : next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def imported(folder: Path) -> Path:
    """A committed folder such as `titan import hf` leaves, but for the weights."""
    temp = folder / ".imported.tmp"
    temp.mkdir()
    (temp / "tokenizer.json").write_text("{}")
    return seal(temp, folder / "imported", 0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_what_its_first_lines_say(path: Path, tmp_path: Path) -> None:
    there = imported(tmp_path) if path == CONTINUED else None
    config = toml.load(path, [f"--checkpoint.load={there}", f"--data.tokenizer={there}"] if there else [])
    head = head_of(path)
    command = re.search(r"\./run_train\.sh\s|titan train |sbatch --nodes=(\d+) --gpus-per-node=8 slurm/train\.sbatch ", head)
    assert command, "no launch command"
    assert f"train_configs/{path.name}" in head
    tokens = config.training.global_batch_size * config.training.seq_len
    assert f"{config.training.global_batch_size} x {config.training.seq_len:,} = {tokens:,}" in head
    gpus = re.search(r"GPUs: (?:none|(\d+) x (\d+) GB)", head)
    assert gpus, "no line that says how many GPUs"
    world = int(gpus[1] or 2)
    assert command[1] is None or int(command[1]) * 8 == world
    assert problems(config, world) == []
    with torch.device("meta"):
        model = zoo.make(config.model.name, replace(config.model.config, n_layers=2))
    table = zoo.sharding(config.model.name, replace(config.model.config, n_layers=2))
    eager = replace(config, compile=Compile())  # no compiler has the meta device
    model = parallelize(model, table, Mesh(), None, eager, torch.device("meta")).model
    out = model(torch.zeros(1, 8, dtype=torch.long, device="meta"), labels=torch.zeros(1, 8, dtype=torch.long, device="meta"))
    assert out.shape == ()
    # What a head says of memory: float32 weights, gradients and Adam's two moments, sharded, and what else there is.
    said = re.search(r"(\d+) GB of weights, gradients and Adam states", head)
    if said:
        parameters = size(model) + (config.model.config.n_layers - 2) * size(model.get_submodule("layers.0"))
        states = 16 * parameters / degrees(config.parallel, world).dp_shard / 1e9
        assert abs(int(said[1]) - states) < 1
        others = re.findall(r"(\d+) GB (?:of activations|at the loss|of gathered)", head.replace("\n", ""))
        assert len(others) > 1
        assert states + sum(map(int, others)) < int(gpus[2])


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_continued_pretraining_asks_for_the_import_first() -> None:
    config = toml.load(CONTINUED, ["--checkpoint.load=nowhere", "--data.tokenizer=nowhere"])
    assert [problem.key for problem in problems(config, 32)] == ["data.tokenizer", "checkpoint.load"]
    config = toml.load(CONTINUED)
    assert f"titan import hf /data/Llama-3.1-8B {config.checkpoint.load}\n" in head_of(CONTINUED)
    assert config.data.tokenizer == config.checkpoint.load
    original = toml.load(CONTINUED.with_name("llama3_8b.toml"))
    assert config.model == original.model
    assert config.optimizer.lr < original.optimizer.lr, "re-warmed to a fraction of the original peak"


def test_debug_serves_the_whole_grid_of_plans() -> None:
    config = toml.load(CONFIGS[0].with_name("debug.toml"))
    assert (config.training.seq_len, config.training.global_batch_size) == (256, 16)
    model = config.model.config
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (8, 8, 4)
    assert all(width % 16 == 0 for width in (model.dim, model.ffn_dim, model.vocab_size, model.head_dim * model.n_kv_heads))


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", (DOCS / "data.md").read_text(), re.DOTALL))
def test_the_tables_that_docs_show_are_configs(block: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(block)
    config = toml.load(file, ["--training.steps=10000"])
    assert {problem.key for problem in problems(config)} <= {"data.path", "data.sources", "data.tokenizer"}, "but for the files"
