"""Compiled blocks: the same numbers, one graph for all of them, with recompute and casts, and plain outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from titan import toml
from titan.check import problems
from titan.config import Compile, Kernels, Recompute
from titan.dropout import Noise, replace_dropouts
from titan.models.llama3.config import Config
from titan.models.llama3.model import Transformer
from titan.parallel.compile import compile_blocks
from titan.parallel.recompute import recompute
from titan.precision.mixed import compute_in

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
EAGER = Compile(enable=True, backend="aot_eager")
SIZES = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 64}
LAYERS = 9  # more than the compiler would make versions of one function


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(config: Compile, again: Recompute, narrow: bool, breaks: bool = False) -> tuple[Transformer, Noise]:
    """A Llama with dropouts; breaks: with attention that the compiler cannot trace."""
    torch.manual_seed(0)
    model, noise = Transformer(Config(n_layers=LAYERS, **SIZES)), Noise(1)  # type: ignore[arg-type]
    model.init_weights()
    for name in [f"layers.{i}.attention.o" for i in range(LAYERS)]:
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), nn.Dropout(0.2)))
    if breaks:
        for i in range(LAYERS):
            core = model.get_submodule(f"layers.{i}.attention.core")
            core.forward = torch.compiler.disable(core.forward)
    replace_dropouts(model, noise)
    blocks = list(model.layers.values())
    if narrow:
        compute_in([*blocks, model], torch.bfloat16)
    if again.mode == "selective":
        recompute(blocks, again, noise)
        compile_blocks(blocks, config)
    else:
        compile_blocks(blocks, config)
        recompute(blocks, again, noise)
    return model, noise


def train(model: Transformer, noise: Noise) -> list[Tensor]:
    """Losses and gradients of two steps."""
    found = []
    for step in range(2):
        tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(step))
        with noise.at(step, torch.arange(2), torch.arange(16)):
            loss = model(tokens[:, :-1], labels=tokens[:, 1:])
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize(
    ("narrow", "breaks"), [(False, False), (True, False), (True, True)], ids=["float32", "bfloat16", "broken"]
)
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_blocks_compute_the_same(mode: str, narrow: bool, breaks: bool) -> None:
    again = Recompute(mode=mode)  # type: ignore[arg-type]
    wanted = train(*make(Compile(), again, narrow, breaks))
    model, noise = make(EAGER, again, narrow, breaks)
    found = train(model, noise)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    graphs = counters["stats"]["unique_graphs"]
    if not breaks:
        assert graphs == 1, "each block was compiled anew"
    elif mode != "selective":
        assert 1 < graphs < LAYERS, "what stands before and after attention was not compiled once"


def test_only_training_is_compiled() -> None:
    model, _ = make(EAGER, Recompute(), narrow=False)
    plain, _ = make(Compile(), Recompute(), narrow=False)
    with torch.no_grad():
        for length in (1, 7, 16):
            tokens = torch.randint(64, (2, length))
            assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    assert not counters["stats"]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"^compile\.backend: .*'aot_eagr'; did you mean 'aot_eager'\?"):
        compile_blocks([nn.Identity()], Compile(enable=True, backend="aot_eagr"))
    with pytest.raises(ValueError, match=r"there are aot_eager,.* inductor"):
        compile_blocks([nn.Identity()], Compile(enable=True, backend="qqq"))
    compile_blocks([nn.Identity()], Compile(enable=False, backend="qqq"))


def test_inductor_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = toml.load(DEBUG, ["--compile.enable=true"])
    (problem,) = problems(config, 1)
    assert problem.key == "compile.backend"
    assert "g++" in problem.sentence or "clang++" in problem.sentence
    assert problems(config) == [], "where the config is only looked at there may be none"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "no gcc or clang and names none in CC" in problems(config, 1)[0].sentence
    assert problems(replace(config, compile=EAGER), 1) == []
    fused = replace(config, compile=EAGER, kernels=Kernels(rope="triton"))
    (problem,) = problems(fused, 1)
    assert problem.key == "kernels.rope"
    assert 'install gcc, or write "torch"' in problem.sentence
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert problems(fused, 1) == [], "a CPU runs the plain lines"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("CC", "/opt/cc")
    assert problems(config, 1) == problems(fused, 1) == []
