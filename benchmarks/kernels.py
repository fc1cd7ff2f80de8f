"""Each kernel against PyTorch's operations, those compiled, and Liger's kernels: forward and backward, on one GPU.

    python benchmarks/kernels.py [--kernels rms_norm rope ..] [--tokens 8192] [--width 4096] [--heads 32] [--ffn 14336]
                                 [--words 128256] [--dtype bfloat16] [--toy]

One size a call: Llama 3 8B's with 8,192 tokens unless another is given. With --toy, and where there is no GPU, sizes are tiny,
so that the script is known to work: on a CPU titan's kernels are their plain lines, and Liger's cannot run. Ways take turns, so
that a GPU that slows down does so for all; a time is the median of the rounds, each as many calls as take 20 ms. Printed, as
Markdown:

    ms             a forward and a backward pass
    GB/s           what has to be read and written at least, each tensor once, over that time: near the memory's bandwidth is as
                   fast as it goes. Not for the loss, which is mostly products
    MB             most memory at once beyond inputs and what comes out
    off            the largest relative error, as a norm, of a result or gradient; against the plain way on float64 inputs,
                   where the rotation and the loss compute in float32 all the same

Liger is compared where it is installed: pip install --no-deps liger-kernel.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan.kernels.float8_cast import cast_both, scaled
from titan.kernels.linear_cross_entropy import linear_cross_entropy
from titan.kernels.rms_norm import add_rms_norm, rms_norm
from titan.kernels.rope import rope
from titan.kernels.swiglu import swiglu
from titan.models.llama3.model import Rotation, SummedCrossEntropy, SwiGLU

Way = Callable[..., Any]
EPS, ROUNDS, CHUNK = 1e-5, 7, 2**24
TOY = {"tokens": 64, "width": 128, "heads": 4, "ffn": 352, "words": 512}


class Case(NamedTuple):
    """A function of tensors, several ways."""

    inputs: list[Tensor]
    ways: dict[str, Way]
    moved: int = 0
    """Bytes that have to be read and written."""
    backward: bool = True


def norm_case(g: argparse.Namespace) -> Case:
    x, w = normal(g, g.tokens, g.width), normal(g, g.width)
    plain = lambda x, w: F.rms_norm(x, (g.width,), w, EPS)  # noqa: E731
    ways = with_compiled(plain) | {"titan": lambda x, w: rms_norm(x, w, EPS)}
    if liger := liger_op("rms_norm", "LigerRMSNormFunction"):
        ways["liger"] = lambda x, w: liger(x, w, EPS, 0.0, "llama", False)
    return Case([x, w], ways, 5 * size(x))  # x, y; x, dy, dx


def add_norm_case(g: argparse.Namespace) -> Case:
    x, branch, w = normal(g, g.tokens, g.width), normal(g, g.tokens, g.width), normal(g, g.width)

    def plain(x: Tensor, branch: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = x + branch
        return h, F.rms_norm(h, (g.width,), w, EPS)

    ways = with_compiled(plain) | {"titan": lambda x, branch, w: add_rms_norm(x, branch, w, EPS)}
    if liger := liger_op("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"):
        ways["liger"] = lambda x, branch, w: liger(x, branch, w, EPS)[::-1]
    return Case([x, branch, w], ways, 8 * size(x))  # x, branch, h, y; h, dy, dh, dx


def rope_case(g: argparse.Namespace) -> Case:
    """Of the queries; Liger's turns keys in the same call, of which it gets one head."""
    q = normal(g, 1, g.tokens, g.heads, g.width // g.heads)
    wavelengths = 1e4 ** torch.linspace(0, 1, q.shape[-1] // 2, device=q.device)
    angle = torch.arange(g.tokens, device=q.device)[:, None, None] / wavelengths
    cos, sin = angle.cos(), angle.sin()
    ways = with_compiled(lambda q: Rotation()(q, cos, sin)) | {"titan": lambda q: rope(q, cos, sin)}
    if liger := liger_op("rope", "LigerRopeFunction"):
        key = q[:, :, :1].transpose(1, 2).contiguous()
        wide_cos, wide_sin = (torch.cat((t, t), -1)[None, :, 0].to(q.dtype) for t in (cos, sin))
        ways["liger"] = lambda q: liger(q.transpose(1, 2), key, wide_cos, wide_sin)[0].transpose(1, 2)
    return Case([q], ways, 4 * size(q))


def swiglu_case(g: argparse.Namespace) -> Case:
    gate, up = normal(g, g.tokens, g.ffn), normal(g, g.tokens, g.ffn)
    ways = with_compiled(lambda gate, up: SwiGLU()(gate, up)) | {"titan": swiglu}
    if liger := liger_op("swiglu", "LigerSiLUMulFunction"):
        ways["liger"] = liger
    return Case([gate, up], ways, 8 * size(gate))  # gate, up, y; dy, gate, up, d_gate, d_up


def loss_case(g: argparse.Namespace) -> Case:
    h, w = normal(g, g.tokens, g.width), normal(g, g.words, g.width) * 0.02
    labels = torch.randint(0, g.words, (g.tokens,), device=h.device)
    ways: dict[str, Way] = {"eager": lambda h, w: SummedCrossEntropy()(h, w, labels)}
    ways["titan, plain"] = lambda h, w: linear_cross_entropy(h, w, labels, most=CHUNK)
    ways["titan"] = lambda h, w: linear_cross_entropy(h, w, labels, most=CHUNK, fused=True)
    if liger := liger_op("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):
        ways["liger"] = lambda h, w: liger(h, w, labels, None, None, -100, 0.0, 0.0, "sum")[0]
    return Case([h, w], ways)


def cast_case(by_row: bool) -> Callable[[argparse.Namespace], Case]:
    """Of a gradient, both ways; e5m2 tensorwise, as there."""

    def case(g: argparse.Namespace) -> Case:
        dy, kind = normal(g, g.tokens, g.width), torch.float8_e4m3fn if by_row else torch.float8_e5m2
        plain = lambda dy: (*scaled(dy, kind, by_row), *scaled(dy.t(), kind, by_row))  # noqa: E731
        kernel = lambda dy: tuple(t for operand in cast_both(dy, kind, by_row) for t in operand)  # noqa: E731
        return Case([dy], with_compiled(plain) | {"titan": kernel}, 2 * size(dy) + 2 * dy.numel(), backward=False)

    return case


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "rms_norm": norm_case,
    "add_rms_norm": add_norm_case,
    "rope": rope_case,
    "swiglu": swiglu_case,
    "linear_cross_entropy": loss_case,
    "float8_cast tensorwise": cast_case(False),
    "float8_cast rowwise": cast_case(True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=list(CASES), choices=list(CASES))
    for name, value in (("tokens", 8192), ("width", 4096), ("heads", 32), ("ffn", 14336), ("words", 128_256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if given.toy or not on_gpu:
        vars(given).update(TOY)
    given.device = "cuda" if on_gpu else "cpu"
    versions = [f"torch {torch.__version__}", f"triton {__import__('triton').__version__ if find_spec('triton') else 'none'}"]
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}, {', '.join(versions)}, {given.dtype}, {time.strftime('%Y-%m-%d')}: `python {shlex.join(sys.argv)}`\n")
    print("| kernel | way | ms | GB/s | MB | off |\n|---|---|---|---|---|---|", flush=True)
    for name in given.kernels:
        torch.manual_seed(0)
        torch._dynamo.reset()
        for way, cells in measure(CASES[name](given)).items():
            print(f"| {name} | {way} | {cells} |", flush=True)


def measure(case: Case) -> dict[str, str]:
    """Each way's cells. One that fails says why."""
    calls, cells, runs = 1, dict[str, str](), dict[str, Callable[[], Any]]()
    wanted = results(case, next(iter(case.ways.values())), torch.float64) if case.backward else None
    for name, way in case.ways.items():
        try:
            off = distance(results(case, way), wanted) if wanted is not None else "-"
            runs[name] = ready(case, way)
            memory = peak(runs[name])
            cells[name] = f"{memory} | {off}"
            calls = max(calls, min(1000, round(0.02 / max(1e-6, seconds(runs[name], 1)))))
        except Exception as error:  # a row says so, the others go on
            said = str(error).strip().splitlines() or [type(error).__name__]
            runs.pop(name, None)
            cells[name] = f"{said[-1][:80]} | - | - | -"
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            taken[name].append(seconds(run, calls))
    for name, times in taken.items():
        median = statistics.median(times)
        rate = f"{case.moved / median / 1e9:,.0f}" if case.moved else "-"
        cells[name] = f"{median * 1e3:.3f} | {rate} | {cells[name]}"
    return cells


def results(case: Case, way: Way, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What comes out, and the inputs' gradients, along the same random directions for every way."""
    inputs = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in case.inputs]  # Liger's write into them
    out = way(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    return [*out, *torch.autograd.grad(out, inputs, directions(out))]


def directions(out: list[Tensor]) -> list[Tensor]:
    random = torch.Generator(out[0].device).manual_seed(1)
    return [torch.randn(o.shape, device=o.device, generator=random).to(o.dtype) if o.dim() else torch.ones_like(o) for o in out]


def distance(found: list[Tensor], wanted: list[Tensor]) -> str:
    off = torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)])
    return f"{off.max().item():.1e}"


def ready(case: Case, way: Way) -> Callable[[], Any]:
    """A forward and, where there is one, a backward pass."""
    if not case.backward:
        return lambda: way(*case.inputs)
    inputs = [t.detach().clone().requires_grad_() for t in case.inputs]
    out = way(*inputs)
    along = directions(list(out) if isinstance(out, tuple) else [out])
    return lambda: torch.autograd.grad(way(*inputs), inputs, along)


def seconds(run: Callable[[], Any], calls: int) -> float:
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - began) / calls


def peak(run: Callable[[], Any]) -> str:
    run()
    wait()
    if not torch.cuda.is_available():
        return "-"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    wait()
    kept = torch.cuda.memory_allocated() - before  # results and gradients, but for those in another tensor's place
    del out
    return f"{(torch.cuda.max_memory_allocated() - before - kept) / 1e6:,.0f}"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def with_compiled(plain: Way) -> dict[str, Way]:
    return {"eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def liger_op(module: str, name: str) -> Any:
    """One of Liger's functions, or None where it is not installed."""
    if find_spec("liger_kernel") is None:
        return None
    from importlib import import_module

    return getattr(import_module(f"liger_kernel.ops.{module}"), name).apply


def normal(g: argparse.Namespace, *shape: int) -> Tensor:
    return torch.randn(shape, device=g.device).to(getattr(torch, g.dtype))


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
