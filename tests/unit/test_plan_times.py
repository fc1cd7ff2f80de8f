"""How long a planned step takes: prices, what overlaps what, what compiled code saves, what is measured on this machine."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from titan import toml, zoo
from titan.cli import main
from titan.config import accumulation
from titan.cores import cores
from titan.dryrun.calibrate import calibrate
from titan.dryrun.cluster import Cluster, Measured, joined, read_cluster, write
from titan.dryrun.pace import paces
from titan.dryrun.plan import plan_job
from titan.dryrun.prices import Prices
from titan.dryrun.step import dry_step
from titan.dryrun.work import COPIES_IN, COPIES_OUT, PRODUCTS, Item, Message, Operation, Span, Wait, fused
from titan.metrics.flops import flops_per_token
from titan.metrics.peaks import measured_flops
from titan.parallel.schedules import table
from titan.parallel.timeline import timeline, unit_cost
from titan.pass_times import measure
from titan.pool import Pool
from titan.rehearsal import with_data
from titan.toml import ConfigError

DEBUG = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")
H100 = read_cluster("h100")


def product(size: int, dtype: str = "bfloat16") -> Operation:
    return Operation("aten.mm", "default", f"{dtype}[{size}]", dtype, 2 * size**3, 6 * size**2, False, False, (print, ()))


def elementwise(name: str, moved: int, reads: dict[int, int], writes: dict[int, int]) -> Operation:
    return Operation(name, "default", str(moved), "bfloat16", 0, moved, False, True, (print, ()), reads, writes)


def message(op: str, size: int, ranks: int = 8, near: int = 8, dimension: str = "dp_shard", posted: bool = False) -> Message:
    return Message(dimension, op, size, ranks, near, posted)


def test_an_operation_takes_its_products_or_its_bytes() -> None:
    prices, gpu = Prices(H100, tf32=False), H100.gpu
    assert prices.operation(product(8192)) == pytest.approx(2 * 8192**3 / (gpu.reach * 989e12))
    assert prices.operation(product(64)) == pytest.approx(6 * 64**2 / (gpu.memory_reach * 3350e9))
    assert prices.operation(product(8192, "float32")) == pytest.approx(2 * 8192**3 / (gpu.reach * 67e12))
    assert Prices(H100, tf32=True).operation(product(8192, "float32")) == pytest.approx(2 * 8192**3 / (gpu.reach * 494.5e12))
    assert prices.operation(product(8192, "float8_e4m3fn")) == pytest.approx(2 * 8192**3 / (gpu.reach * 1979e12))


def test_what_was_measured_counts_and_stands_for_what_is_near() -> None:
    own, other = product(512), product(1024)
    measured = Measured({own.key: [2 * 512**3, 6 * 512**2, 0.5], "aten.mul(x)": [0, 100, 9.0]})
    prices = Prices(replace(H100, measured=measured), tf32=False)
    assert prices.operation(own) == 0.5
    alone = Prices(H100, tf32=False)
    assert prices.operation(other) == pytest.approx(0.5 * alone.operation(other) / alone.operation(own))
    sums = Measured(messages={"all_reduce(2, 100)": [2, 100, 1.0], "all_reduce(2, 300)": [2, 300, 2.0]})
    prices = Prices(replace(H100, measured=sums), tf32=False)
    taken = [prices.sent("all_reduce", size, 2, 2) for size in (10, 100, 200, 300, 600)]
    rest = 300 / (450e9 * H100.links.reach)
    way = prices.way("all_reduce", 2, 2)
    assert taken == pytest.approx([way + 0.1 * (1.0 - way), 1.0, 1.5, 2.0, 2.0 + rest]), "no second start of what is longer"
    assert prices.sent("all_reduce", 0, 2, 2) == pytest.approx(way)
    small = Measured({"aten.mul(bfloat16[4], bfloat16[4])": [0, 24, 2e-6]})
    far = elementwise("aten.mul", 2**26, {}, {})
    assert Prices(replace(H100, measured=small), tf32=False).operation(far) < 1e-4
    narrow = Measured({"aten.mm(bfloat16[512, 512], bfloat16[512, 512])": [2 * 512**3, 6 * 512**2, 1.0]})
    assert Prices(replace(H100, measured=narrow), tf32=False).operation(product(512, "float32")) < 1e-3
    assert prices.sent("all_reduce", 300, 4, 4) == Prices(H100, tf32=False).sent("all_reduce", 300, 4, 4)


def test_a_message_takes_its_way_and_its_bytes() -> None:
    prices = Prices(H100, tf32=False)
    size = 8 * 2**30
    near = prices.message(message("all_gather", size))
    assert near == pytest.approx(7 * 1e-6 + size * 7 / 8 / (450e9 * H100.links.reach))
    far = prices.message(message("all_gather", size, ranks=16, near=8))
    assert far == pytest.approx((13 + 2 * 5) * 1e-6 + size * 15 / 16 / 8 / (50e9 * H100.links.reach))
    assert prices.message(message("all_reduce", size)) == pytest.approx(2 * near, rel=1e-3)
    tiny = prices.message(message("all_reduce", 24, ranks=1024, near=8))
    assert tiny == pytest.approx(2 * (3 * 1 + 7 * 5) * 1e-6, rel=1e-3), "up and down a tree"
    assert prices.message(message("send", 2**30, ranks=16, near=8)) == pytest.approx(5e-6 + 2**30 / 40e9)
    assert prices.message(message("send", 0, ranks=4, near=1)) == pytest.approx(5e-6)
    assert prices.message(message("recv", size)) == prices.message(message("all_gather", size, ranks=1, near=1)) == 0


def priced(seconds: dict[str, float], cluster: Cluster, sums: float = 1.0) -> Prices:
    """Operations by what they are called, each message a second or `sums`."""
    prices = Prices(replace(cluster, gpu=replace(cluster.gpu, launch_microseconds=0)), tf32=False)
    prices.operation = lambda operation: seconds.get(operation.name, 0.0)  # type: ignore[method-assign]
    prices.message = lambda message: 0.0 if message.op == "recv" else sums  # type: ignore[method-assign]
    return prices


def one(name: str) -> Operation:
    return replace(product(2), name=name)


def blocks(count: int) -> list[Item]:
    """FSDP's: weights are gathered, a block computes."""
    found: list[Item] = []
    for _ in range(count):
        found += [one(COPIES_IN), message("all_gather", 1), one(COPIES_OUT), one("aten.mm")]
    return found


CPU = replace(H100, gpu=replace(H100.gpu, asynchronous=False))


def test_gathers_hide_behind_the_block_before() -> None:
    (pace,) = paces([Span(0, blocks(5))], priced({"aten.mm": 3.0}, H100))
    assert pace.seconds == 1 + 5 * 3
    assert pace.spent["waiting for dp_shard"] == 1
    (pace,) = paces([Span(0, blocks(5))], priced({"aten.mm": 0.25}, H100))
    assert pace.seconds == pytest.approx(5 + 0.25), "messages one after the other, and the last block"
    (pace,) = paces([Span(0, blocks(5))], priced({"aten.mm": 3.0}, CPU))
    assert pace.seconds == 5 * 1 + 5 * 3


def test_a_micro_batch_waits_for_its_last_sum() -> None:
    """And the next one's first gather begins then."""
    items: list[Item] = [*blocks(2), one("fsdp.chunk_cat"), message("reduce_scatter", 1)]
    both = paces([Span(0, items), Span(1, items)], priced({"aten.mm": 3.0}, H100))
    assert [pace.seconds for pace in both] == [1 + 2 * 3 + 1] * 2


def test_sums_hide_behind_the_next_block_s_backward() -> None:
    items: list[Item] = []
    for _ in range(4):
        items += [one("aten.mm"), one("fsdp.chunk_cat"), message("reduce_scatter", 1)]
    for compute, total in ((3.0, 4 * 3 + 1), (0.25, 4 * 1 + 0.25)):
        (pace,) = paces([Span("passes", items)], priced({"aten.mm": compute}, H100))
        assert pace.seconds == pytest.approx(total)


def test_what_is_posted_is_waited_for_later() -> None:
    """A ring's hop, while a block of attention is computed."""
    hop = message("send", 1, dimension="cp", posted=True)
    items: list[Item] = [hop, one("aten.mm"), Wait(hop), one("aten.mm")]
    for cluster, compute, total in ((H100, 3.0, 6.0), (H100, 0.25, 1.25), (CPU, 3.0, 7.0)):
        (pace,) = paces([Span("passes", items)], priced({"aten.mm": compute}, cluster))
        assert pace.seconds == pytest.approx(total)
    (pace,) = paces([Span("passes", [message("all_to_all", 1, dimension="tp"), *items])], priced({"aten.mm": 3.0}, H100))
    assert pace.spent["waiting for tp"] == 1


def test_a_device_waits_for_a_slow_host() -> None:
    slow = replace(H100, gpu=replace(H100.gpu, launch_microseconds=10))
    items: list[Item] = [elementwise("aten.mul", 1, {}, {})] * 1000
    (pace,) = paces([Span(0, items)], Prices(slow, tf32=False))
    assert pace.seconds == pytest.approx(0.01, rel=0.01)
    assert pace.spent["starting operations"] > 0.99 * pace.seconds


def test_compiled_code_moves_what_goes_in_and_out() -> None:
    """Storage 1 comes from before, 2 and 3 are made, 3 is used later."""
    double = elementwise("aten.mul", 200, {1: 100}, {2: 100})
    again = elementwise("aten.mul", 200, {2: 100}, {3: 100})
    use = replace(product(16), reads={3: 100})
    (span,) = fused([Span(0, [double, again, use])])
    joined, kept = span.items
    assert isinstance(joined, Operation)
    assert joined.moved == 200
    assert kept is use
    view = replace(elementwise("aten.view", 0, {1: 100}, {1: 100}), free=True)
    (span,) = fused([Span(0, [view, double, again, use])])
    assert span.items[0].moved == 200, "a view makes nothing"  # type: ignore[union-attr]
    large = elementwise("aten.mul", 2000, {3: 1000}, {4: 1000})
    runs = [i for i in fused([Span(0, [double, again, use, large, large, use])])[0].items if i is not use]
    small, big = (Prices(H100, tf32=False).operation(i) for i in runs if isinstance(i, Operation))
    assert small != big, "as many operations, and not as much to move"
    (span,) = fused([Span("norm", [double, again])])
    assert span.items == [double, again], "outside of the passes nothing is compiled"
    a, _ = fused([Span(0, [double, again]), Span(1, [use])])
    assert a.items[0].moved == 200, "also what a later pass uses"  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(3))
def test_a_step_s_products_are_the_formula_s(seed: int) -> None:
    draw = random.Random(seed)
    words = [f"--training.seq_len={draw.choice((32, 64))}", f"--model.n_layers={draw.randint(1, 3)}"]
    words += ["--data.tokenizer=bytes", f"--training.micro_batch_size={draw.choice((4, 8, 16))}"]
    config = toml.load(DEBUG, words)
    work = dry_step(config, 0, 1).work
    done = sum(i.flops for span in work for i in span.items if isinstance(i, Operation) and i.name in PRODUCTS)
    with torch.device("meta"):
        model = zoo.make(config.model.name, config.model.config)
    tokens = 16 * config.training.seq_len
    assert done == flops_per_token(model, config.training.seq_len).matrices * tokens
    assert [span.where for span in work if type(span.where) is int] == list(range(accumulation(config.training, 1)))


def test_more_micro_batches_take_as_much_time_each() -> None:
    """Those between the first and the last are alike, also where no step of them was taken; cutting the batch takes longer."""
    words = ["--data.tokenizer=bytes", "--training.seq_len=32", "--parallel.dp_shard=2", "--training.micro_batch_size=1"]
    words.append("--model.n_layers=2")
    configs = [toml.load(DEBUG, [*words, f"--training.global_batch_size={n}"]) for n in (6, 8, 16)]
    planned = [plan_job(config, 2, H100).time.seconds for config in configs]
    taken = [sum(pace.seconds for pace in paces(dry_step(config, 0, 2).work, Prices(H100, tf32=False))) for config in configs]
    assert planned == pytest.approx(taken, rel=5e-3)


def test_ranks_without_a_step_of_their_own_part_other_passes() -> None:
    """In DualPipeV a rank parts backward passes that its neighbour does whole."""
    words = ["--data.tokenizer=bytes", "--training.seq_len=32", "--model.n_layers=12", "--training.micro_batch_size=1"]
    words += ["--training.global_batch_size=18", "--parallel.pp=6", "--parallel.pp_schedule=DualPipeV"]
    assert plan_job(toml.load(DEBUG, words), 6, H100).time.bubble > 0


def test_transfers_delay_a_pipeline() -> None:
    orders, owners = table("1F1B", 4, 1, 8)
    end = lambda travel: max(end for _, end in timeline(orders, owners, unit_cost, travel).values())  # noqa: E731
    assert end(0.0) == 33
    assert end(0.5) >= 33 + 6 * 0.5, "through all ranks and back"


def test_a_cluster_s_measurements_are_kept_and_checked(tmp_path: Path) -> None:
    own = replace(H100, measured=Measured({"aten.mm(float32[2, 3], 1)": [12.0, 100.0, 0.25]}, {"send(2, 8)": [2.0, 8.0, 0.5]}))
    write(path := tmp_path / "own.toml", own)
    assert read_cluster(str(path)) == own
    more = replace(H100, measured=Measured({"aten.mm(float32[4, 3], 1)": [24.0, 100.0, 0.5]}))
    assert len(joined(own, more).measured.operations) == 2
    another = replace(more, gpu=replace(more.gpu, name="another"))
    assert joined(own, another) == another, "what was measured on another device says nothing"
    path.write_text(path.read_text().replace("[12, 100, 0.25]", "[12, 100]"))
    with pytest.raises(ConfigError, match="expected three numbers"):
        read_cluster(str(path))


def test_this_machine_is_measured_and_planned_with(tmp_path: Path, pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned passes take about what they take here: within a fifth on a quiet machine, and this one may not be."""
    path = str(tmp_path / "here.toml")
    words = [DEBUG, "--model.n_layers=2", "--data.tokenizer=bytes", "--training.global_batch_size=4"]
    words += ["--training.micro_batch_size=2", "--plan=pp=2", f"--cluster={path}"]
    assert main(["plan", *words, "--calibrate", "--json", f"--out={tmp_path / 'passes.svg'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    cluster = read_cluster(path)
    assert not cluster.gpu.asynchronous
    assert {"send(2, 262144)", "all_reduce(2, 8)"} <= set(cluster.measured.messages)
    assert sum(key.startswith("aten.mm(") for key in cluster.measured.operations) > 10
    assert "planned" in (tmp_path / "passes.svg").read_text()
    spent: dict[str, Any] = found["spent_seconds"]
    assert spent["matrix products"] > 0.2 * found["step_seconds"]
    assert main(["plan", *words, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["step_seconds"] == pytest.approx(found["step_seconds"], rel=0.01), "the file says the same"
    config = with_data(toml.load(DEBUG, [*words[1:5], "--parallel.pp=2"]), lambda line: None)
    times = plan_job(config, 2, cluster).time.times
    for rank, measured in enumerate(pool.run(2, measure, config, 3, pool.group_seconds)):
        planned = sum(end - start for action, (start, end) in times.items() if action in measured.processor)
        assert 0.4 < planned / sum(measured.processor.values()) < 2.5, rank


def test_ranks_that_share_a_core_are_as_much_slower() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = measured_flops(torch.device("cpu"), torch.float32)
    finally:
        torch.set_num_threads(before)
    shared = calibrate([], 2 * cores(), "llama3", threads=1).gpu
    assert "2 ranks a core" in shared.name
    assert 1.2 < alone / (shared.float32_tflops * shared.reach * 1e12) < 3.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calibrate", "--cluster=h100"], "h100 is a data sheet's"),
        (["--calibrate", "--plan=dp_shard=512,training.global_batch_size=512,training.micro_batch_size=1"], "512 ranks cannot"),
        (["--out=x.svg"], "the plan has none: write --plan pp=4"),
        (["--out=x.png", "--plan=pp=2"], "name it x.svg"),
        (["--cluster=local2"], "no cluster 'local2'"),
        (["--calibrate", "--cluster=mine"], "--cluster mine.toml"),
        (["--calibrate", "--cluster=/nowhere/mine.toml"], "there is no folder /nowhere"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEBUG, *words]) == 2
    assert said in capsys.readouterr().err
