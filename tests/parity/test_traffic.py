"""What travels in a step is what the formulas say, to the byte, on every rank: every dimension, and combinations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plans import CONFIG, small

from titan.cli import main
from titan.commands.trace import differences
from titan.config import Degrees, degrees
from titan.parallel.mesh import make_mesh
from titan.pool import Pool
from titan.tracing import Kind, Recorder, trace
from titan.traffic.shape import Flow

PLANS = (
    "training.micro_batch_size=2",
    "dp_replicate=2",
    "dp_shard=2",
    "dp_shard=4,reshard_after_forward=2",
    "dp_replicate=2,dp_shard=2,precision.param=bfloat16",
    "dp_shard=2,precision.param=bfloat16,precision.reduce=bfloat16",
    "tp=2",
    "tp=4,async_tp=true,recompute.mode=full",
    'tp=2,recompute.mode=full,sharding={"layers.*.ffn"="seq","layers.*.ffn.*"="seq"}',
    'tp=2,pp=2,sharding={"embedding"="scatter"}',
    "cp=2",
    "cp=4,cp_method=allgather,recompute.mode=block,recompute.every=2",
    "cp=4,cp_method=ulysses,recompute.mode=selective",
    "pp=2,pp_schedule=Interleaved1F1B,model.tied_embeddings=true",
    "pp=4,pp_schedule=ZBVZeroBubble",
    "dp_shard=2,pp=2,reshard_after_forward=always",
    "dp_shard=2,pp=2,pp_schedule=DualPipeV,training.micro_batch_size=1",
    "dp_replicate=2,tp=2,pp=2,model.tied_embeddings=true",
    "dp_shard=2,tp=2,cp=2",
    "dp_shard=2,tp=2,precision.float8=tensorwise,model.dim=64,model.ffn_dim=160",
    "dp_replicate=2,dp_shard=3,precision.float8=tensorwise,precision.param=bfloat16,model.dim=64,model.ffn_dim=160,training.global_batch_size=12",
    "dp_shard=2,pp=2,precision.float8=tensorwise,model.dim=64,model.ffn_dim=160",
    "tp=2,cp=2,pp=2,cp_method=ulysses,data.document_mask=true",
)


@pytest.mark.parametrize(("plan", "model"), [(plan, ("llama3", "gpt2")[i % 2]) for i, plan in enumerate(PLANS)])
def test_what_travels_is_what_the_formulas_say(pool: Pool, short_documents: Path, plan: str, model: str) -> None:
    config = small(short_documents, plan, model)
    world = degrees(config.parallel, 1).world
    found = pool.run(world, trace, config, 1, pool.group_seconds)
    for rank, (got, flows) in enumerate(found):
        assert list(differences(got, flows)) == [], f"rank {rank}"
        assert bool(got) == (world > 1)
        dimensions = {kind.dimension for kind in got} - {"all"}
        used = {name for name, degree in vars(degrees(config.parallel, 1)).items() if degree > 1}
        assert all(any(name in dimension for dimension in dimensions) for name in used), "each dimension says something"
        assert ("float8" in plan) == any(kind.dtype == "uint8" for kind in got)


def test_a_difference_is_told() -> None:
    flow = Flow("forward", "tp", "all_reduce", "float32", 2, 800, "what", "formula")
    kind = Kind("forward", "tp", "all_reduce", "float32")
    assert list(differences({kind: (2, 800)}, [flow])) == []
    assert list(differences({kind: (2, 808)}, [flow])) == [
        "forward, tp, all_reduce, float32: 2 messages, 808 bytes; by formula 2, 800"
    ]
    assert len(list(differences({}, [flow]))) == len(list(differences({kind: (1, 4)}, []))) == 1


def test_the_recorder_sees_every_operation_with_its_bytes(pool: Pool) -> None:
    for found in pool.run(2, some_messages):
        assert found == {
            ("forward", "tp", "all_reduce", "float32"): (2, 48),
            ("forward", "tp", "all_gather", "int64"): (1, 64),
            ("forward", "tp", "reduce_scatter", "float32"): (1, 32),
            ("forward", "tp", "all_to_all", "bfloat16"): (1, 12),
            ("hand-over", "pp", "send", "float32"): (1, 20),
            ("hand-over", "pp", "recv", "float32"): (1, 20),
            ("backward", "tp", "all_reduce", "float32"): (1, 12),
        }


def some_messages(rank: int) -> dict[tuple[str, ...], tuple[int, int]]:
    """On a worker: one of each kind."""
    recorder = Recorder(make_mesh("cpu", Degrees(tp=2), 30))
    group = next(iter(recorder.dimensions))
    recorder.dimensions[group] = "tp"
    with recorder.at("forward"):
        dist.all_reduce(torch.ones(3))
        dist.all_reduce(torch.ones(9))
        dist.all_gather_into_tensor(torch.empty(8, dtype=torch.int64), torch.ones(4, dtype=torch.int64))
        dist.reduce_scatter_tensor(torch.empty(4), torch.ones(8))
        dist.all_to_all_single(torch.empty(6, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16))
        x = torch.ones(3, requires_grad=True)
        x.register_hook(lambda grad: dist.all_reduce(grad.clone()))  # type: ignore[arg-type]
        x.sum().backward()
        recorder.dimensions[group] = "pp"
        works = [dist.isend(torch.ones(5), 1 - rank), dist.irecv(torch.empty(5), 1 - rank)]
        for work in works:
            assert work is not None
            work.wait()
    return {tuple(vars(kind).values()): found for kind, found in recorder.traffic(1).items()}


def test_the_command(short_documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [CONFIG, f"--data.path={short_documents}", "--data.tokenizer=bytes", "--model.n_layers=2", "--training.seq_len=32"]
    assert main(["trace", *words, "--plan", "tp=2"]) == 0
    out = capsys.readouterr().out
    assert "A step of tp 2, 4 micro batches, as rank 0 of 2" in out
    assert "M x (gather + row + embed + head) x B s d = 40 x 16,384 x 4 B" in out
    assert out.rstrip().endswith("Measured and by formula: equal on 2 ranks, to the byte.")
    assert main(["trace", *words, "--plan", "tp=2", "--rank", "2"]) == 2
    assert "the plan has ranks 0 to 1" in capsys.readouterr().err
