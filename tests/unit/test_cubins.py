"""Every kernel that the shipped configs can use, compiled for A100, H100 and B200, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from titan import toml
from titan.cli import main

triton = pytest.importorskip("triton")
from titan.check_precision import WIDEST_NORM  # noqa: E402
from titan.commands.kernels import cubins, table  # noqa: E402
from titan.kernels import ahead, rms_norm, rms_norm_triton  # noqa: E402

CONFIGS = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
SHAPES = [path for path in CONFIGS if not path.stem.startswith("continue_")]  # which has another's


@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize("path", SHAPES, ids=lambda p: p.stem)
def test_a_config_s_kernels_compile(path: Path, chip: int) -> None:
    found = cubins(toml.load(path), chip)
    kernels = {cubin.kernel for cubin in found}
    assert {"linear_cross_entropy_triton._add_block", "linear_cross_entropy_triton._gradient"} <= kernels
    if "gpt2" not in path.stem:
        assert {f"rms_norm_triton._{part}" for part in ("forward", "backward")} <= kernels
        assert {"swiglu_triton._forward", "swiglu_triton._backward", "rope_triton._turn"} <= kernels
    for cubin in found:
        assert 0 < cubin.registers <= 255
        assert cubin.registers * 32 * cubin.warps <= 65536, "a program fits into a multiprocessor"
        assert cubin.stack <= 128, f"{cubin.kernel} spills {cubin.stack} bytes for each thread"


@pytest.mark.parametrize("chip", [89, 120])
def test_smaller_chips(chip: int) -> None:
    path = next(path for path in CONFIGS if path.stem == "llama3_8b")
    assert len(cubins(toml.load(path, ["--precision.float8=rowwise"]), chip)) > 12


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("chip", [90, 100])
@pytest.mark.parametrize("size", ["llama3_8b", "debug"])
def test_casts_to_float8_compile(size: str, chip: int, recipe: str) -> None:
    path = next(path for path in CONFIGS if path.stem == size)
    found = [c for c in cubins(toml.load(path, [f"--precision.float8={recipe}"]), chip) if c.kernel.endswith("._cast")]
    formats = {c.arguments["FORMAT"] for c in found}
    assert formats == ({"fp8e4nv", "fp8e5"} if recipe == "tensorwise" else {"fp8e4nv"})
    assert {c.arguments["BOTH"] for c in found} == {"True", "False"}
    assert {c.arguments["stride_row"] for c in found} >= {"1"}, "a turned operand, too"


def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.empty(4, 300, dtype=dtype, device="meta"), torch.empty(300, dtype=dtype, device="meta"), 1e-5


def test_each_is_listed_once_and_what_it_was_compiled_for() -> None:
    with ahead.compiled_for(90) as found:
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            rms_norm.rms_norm(*arguments(dtype))
    assert [c.arguments["x"] for c in found] == ["*bf16", "*fp32"]
    assert all(c.arguments["BLOCK"] == "512" for c in found)


def test_too_much_shared_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ahead.SHARED_MEMORY, 90, 4000)
    x, weight, _ = arguments(torch.bfloat16)
    with ahead.compiled_for(90):
        rms_norm_triton.forward(x, x, weight, 1e-5)
    with ahead.compiled_for(90), pytest.raises(ValueError, match=r"_backward.* takes [\d,]+ bytes .* and sm_90 has 4,000"):
        rms_norm_triton.backward(x.repeat(1, 16), None, x.repeat(1, 16), x[:, :1].float(), weight.repeat(16))


def test_afterwards_a_launch_is_a_launch_again() -> None:
    with ahead.compiled_for(80):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="active driver"):
            rms_norm_triton.forward(torch.ones(4, 8), None, torch.ones(8), 1e-5)


def test_a_row_that_is_too_wide_says_what_to_use() -> None:
    with pytest.raises(ValueError, match=r'kernels\.rms_norm = "torch"'), ahead.compiled_for(90):
        rms_norm.rms_norm(torch.empty(1, 16_400, device="meta"), torch.empty(16_400, device="meta"), 1e-5)
    assert rms_norm_triton.WIDEST == WIDEST_NORM


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", str(CONFIGS[0].parent / "debug.toml"), "--chip=90", "--precision.float8=rowwise"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rms_norm\.backward fp32 ADD BLOCK=128 +1 +\d+/0/\d+\n", said)
    assert re.search(r"float8_cast\.cast fp32 fp8e4nv BY_ROW BOTH +4 +\d+/\d+/\d+\n", said)
    assert max(map(len, said.splitlines())) <= 100


def test_the_command_needs_no_data_and_says_what_does_not_compile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CONFIGS[0].parent
    assert main(["kernels", str(folder / "continue_llama3_8b.toml"), "--chip=90"]) == 0
    capsys.readouterr()
    assert main(["kernels", str(folder / "debug.toml"), "--model.dim=20000", "--model.n_layers=1", "--chip=90"]) == 1
    assert "titan: a token has 20,000 numbers" in capsys.readouterr().err
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert main(["kernels", str(folder / "debug.toml"), "--chip=90"]) == 1
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_what_differs_in_no_shown_word_has_one_line_with_the_most() -> None:
    few = ahead.Cubin("a_triton._b", {"x": "*bf16", "n": "i32"}, 4, 20, 0, 0)
    many = few._replace(arguments={"x": "*bf16", "n": "1"}, registers=30)
    assert table({80: [many, few], 90: []})[3].split() == ["a.b", "bf16", "4", "30/0/0", "-"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chip=80", "--precision.float8=rowwise"], "multiplies no 8-bit numbers"),
        (["--chip=70"], "invalid choice: 70"),
        (["--precision.float8=rowwise", "--model.ffn_dim=40"], "Float8 takes multiples of 16"),
        (["--kernels.rms_norm=trition"], "did you mean 'triton'"),
    ],
)
def test_what_the_command_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", str(CONFIGS[0].parent / "debug.toml"), *words]) == 2
    assert said in capsys.readouterr().err
