"""`titan profile`: every moment of a step belongs to one kind: on made-up traces, random nesting, and a real step."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import record_function

from titan.cli import main
from titan.config import Profiling
from titan.metrics.profile import BATCH, KINDS, STEP, read, shares, union, within
from titan.profiling import Profiler
from titan.ranks import Ranks


def event(name: str, begin: float, end: float, cat: str = "cpu_op", tid: int = 1, args: Any = None) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": end - begin, "tid": tid, "args": args or {}}


def seconds(events: list[dict[str, Any]]) -> dict[str, int]:
    """Microseconds by kind, those that are not 0."""
    found = shares(events)
    assert sum(found.kinds.values()) == pytest.approx(found.seconds)
    return {kind: round(value * 1e6) for kind, value in (found.kinds | {"hidden": found.hidden}).items() if value}


def test_on_a_cpu_the_innermost_operation_counts_and_a_purpose_covers_what_is_inside() -> None:
    events = [
        event(STEP, 0, 1000, "user_annotation"),
        event(BATCH, 0, 50, "user_annotation"),
        event("aten::linear", 100, 300),
        event("aten::t", 100, 110),
        event("aten::mm", 120, 280),
        event("aten::mul", 300, 340),
        event("_LinearCrossEntropyBackward", 400, 500),
        event("aten::mm", 410, 490),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 500, 560),
        event("aten::_fused_adamw_", 600, 620),
        event("c10d::allreduce_", 700, 800),
        event("gloo:all_reduce", 320, 420, "user_annotation", tid=2),
        event("gloo:all_reduce", 710, 790, "user_annotation", tid=2),
        event("aten::mm", 1500, 1600),  # after the step
    ]
    assert seconds(events) == {
        "matmul": 10 + 160 + 20,
        "pointwise": 10 + 40,
        "loss": 100,
        "attention": 60,
        "optimizer": 20,
        "communication": 60 + 80,
        "hidden": 20 + 20,
        "data": 50,
        "idle": 1000 - 190 - 50 - 100 - 60 - 20 - 140 - 50,
    }


def test_on_a_gpu_kernels_count_by_where_they_were_launched() -> None:
    events = [
        event(STEP, 0, 1000, "user_annotation"),
        event("_LinearCrossEntropy", 10, 60, args={"External id": 1}),
        event("aten::mm", 20, 50, args={"External id": 2}),
        event("aten::mm", 70, 80, args={"External id": 3}),
        event("nvjet_tst_128x256", 100, 300, "kernel", 7, args={"External id": 2}),
        event("sm90_xmma_gemm_bf16", 300, 500, "kernel", 7, args={"External id": 3}),
        event("triton_poi_fused_mul_silu_0", 500, 550, "kernel", 7),
        event("flash_fwd_kernel", 550, 600, "kernel", 7),
        event("ncclDevKernel_AllGather_RING_LL", 400, 700, "kernel", 9),
        event("Memcpy HtoD", 800, 810, "gpu_memcpy", 7),
    ]
    assert seconds(events) == {
        "loss": 200,
        "matmul": 200,
        "pointwise": 60,
        "attention": 50,
        "communication": 100,
        "hidden": 200,
        "idle": 390,
    }


@pytest.mark.parametrize("seed", range(5))
def test_however_operations_nest_a_step_is_shared_out_whole(seed: int) -> None:
    draw, events = random.Random(seed), [event(STEP, 0, 10_000, "user_annotation")]
    names = ["aten::mm", "aten::add", "flash", "CrossEntropy", "aten::_fused_adamw_", "c10d::x"]

    def inside(begin: float, end: float, depth: int, tid: int) -> None:
        at = begin
        while depth and at < end - 1:
            at += draw.uniform(0, (end - begin) / 3)
            until = min(end, at + draw.uniform(0, (end - begin) / 2))
            if until > at:
                events.append(event(draw.choice(names), at, until, tid=tid))
                inside(at, until, depth - 1, tid)
            at = until

    inside(-500, 10_500, 4, 1)
    inside(2_000, 3_000, 3, 5)
    events += [event("gloo:send", at := draw.uniform(0, 10_000), at + 300, "user_annotation", tid=8) for _ in range(9)]
    draw.shuffle(events)
    found = seconds(events)
    assert all(value > 0 for value in found.values())


def test_unions_and_what_is_in_both() -> None:
    draw = random.Random(0)
    for _ in range(50):
        one, two = ([(b := draw.randint(0, 60), b + draw.randint(0, 9)) for _ in range(6)] for _ in range(2))
        moments = [{t for begin, end in spans for t in range(begin, end)} for spans in (one, two)]
        assert {t for begin, end in union(one) for t in range(int(begin), int(end))} == moments[0]
        both = within(union(one), union(two))
        assert [t for begin, end in both for t in range(int(begin), int(end))] == sorted(moments[0] & moments[1])


def test_a_real_step_is_written_read_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler(Profiling(start=2, steps=2), tmp_path, Ranks(0, 1, torch.device("cpu")))
    a = torch.randn(600, 600)
    for step in range(1, 5):
        profiler.before(step)
        with record_function(BATCH):
            pass
        for _ in range(20):
            a @ a
        F.cross_entropy(a, torch.arange(600))
        profiler.after(step)
    profiler.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step-00000002-rank-0.json.gz"
    found = shares(read(path))
    assert found.steps == 2
    assert found.kinds["matmul"] > 0.5 * found.seconds
    assert 0 < found.kinds["loss"] < 0.2 * found.seconds
    picture = tmp_path / "step.svg"
    assert main(["profile", str(tmp_path), "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{kind} " in said for kind in KINDS)
    assert "matmul: " in picture.read_text()


def test_a_step_that_does_not_end_is_written_as_far_as_it_went(tmp_path: Path) -> None:
    profiler = Profiler(Profiling(start=1, steps=9), tmp_path, Ranks(0, 1, torch.device("cpu")))
    profiler.before(1)
    torch.ones(3).sum()
    profiler.after(1)
    profiler.close()
    assert shares(read(tmp_path / "profile" / "step-00000001-rank-0.json.gz")).steps == 1


def test_bad_input_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, cut = tmp_path / "other.json.gz", tmp_path / "cut.json.gz"
    with gzip.open(other, "wt") as file:
        json.dump({"traceEvents": [event("aten::mm", 0, 1)]}, file)
    cut.write_bytes(other.read_bytes()[:20])
    for words, said in (
        ([str(tmp_path)], "--profiling.start=10"),
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(other)], "no step is in the trace"),
        ([str(cut)], "is no trace"),
        ([str(other), "--out", "x.png"], ".svg"),
    ):
        assert main(["profile", *words]) == 2
        assert said in capsys.readouterr().err
