"""The plan's rules: what cannot work gets its sentence, what that says to write instead is accepted, as is all the rest."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import combinations, product
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from titan import check_plan, check_precision, toml
from titan.check import RULES, problems
from titan.config import Config, degrees
from titan.parallel.schedules import STAGES

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"  # 8 blocks, 8 heads, 4 for keys and values; 256 tokens

BROKEN = [
    # (rule, ranks, command line, key, what the sentence must hold, command line that it asks for)
    (
        "degrees_make_up_the_world",
        4,
        "parallel.pp=3",
        "parallel",
        ["pp 3 x dp_replicate 1 x dp_shard -1 do not", "4 ranks"],
        "parallel.pp=4",
    ),
    (
        "batch_divides",
        8,
        "parallel.tp=2 training.global_batch_size=18",
        "training.global_batch_size",
        ["18 sequences", "4 data-parallel ranks", "nearest that are: 16 or 32"],
        "training.global_batch_size=32",
    ),
    (
        "heads_are_shared_evenly",
        3,
        "parallel.tp=3 training.seq_len=240",
        "parallel.tp",
        ["3 ranks cannot share 8 query heads and 4 key and value heads", "can: 2 or 4"],
        "parallel.tp=1 training.micro_batch_size=1 training.global_batch_size=15",
    ),
    ("heads_are_shared_evenly", 16, "parallel.tp=16", "parallel.tp", ["8 query heads", "can: 8"], "parallel.tp=8"),
    (
        "heads_are_shared_evenly",
        4,
        "model.n_heads=12 model.dim=96 model.n_kv_heads=6 parallel.tp=4",
        "parallel.tp",
        ["12 query heads and 6 key and value heads", "can: 3 or 6"],
        "parallel.tp=2",
    ),
    (
        "widths_reach_every_rank",
        4,
        "parallel.tp=4 model.ffn_dim=3",
        "parallel.tp",
        ["ffn_dim = 3", "at most 3"],
        "parallel.tp=2",
    ),
    (
        "widths_reach_every_rank",
        2,
        "parallel.tp=2 model.vocab_size=1 data.tokenizer=LICENSE",
        "parallel.tp",
        ["vocab_size = 1", "at most 1"],
        "parallel.tp=1",
    ),
    (
        "sequence_is_shared_evenly",
        4,
        "parallel.cp=2 training.seq_len=254",
        "training.seq_len",
        ["cp = 2 (two pieces a rank) cannot cut 254 tokens", "a multiple of 4: 252 or 256"],
        "training.seq_len=252",
    ),
    (
        "sequence_is_shared_evenly",
        4,
        "parallel.tp=4 training.seq_len=2",
        "training.seq_len",
        ["tp = 4 cannot cut 2 tokens evenly", "a multiple of 4: 4"],
        "training.seq_len=4",
    ),
    (
        "sequence_is_shared_evenly",
        8,
        "parallel.cp=2 parallel.tp=4 training.seq_len=252",
        "training.seq_len",
        ["and tp = 4 cannot", "a multiple of 8: 248 or 256"],
        "training.seq_len=248",
    ),
    (
        "ulysses_has_heads_for_every_rank",
        16,
        "parallel.cp=4 parallel.tp=4 parallel.cp_method=ulysses",
        "parallel.cp_method",
        ["2 query heads evenly among cp = 4 (of 8, cut by tp = 4)", '"ring" or "allgather"'],
        "parallel.cp_method=ring",
    ),
    ("schedule_exists", 2, "parallel.pp_schedule=1f1b", "parallel.pp_schedule", ["mean '1F1B'?"], "parallel.pp_schedule=1F1B"),
    (
        "schedule_exists",
        2,
        "parallel.pp_schedule=xy",
        "parallel.pp_schedule",
        [*STAGES, ".csv"],
        "parallel.pp_schedule=DualPipeV",
    ),
    (
        "schedule_exists",
        2,
        "parallel.pp_schedule=nowhere.csv",
        "parallel.pp_schedule",
        ["does not exist"],
        "parallel.pp_schedule=GPipe",
    ),
    (
        "schedule_takes_the_stages",
        2,
        "parallel.pp=2 parallel.pp_schedule=GPipe parallel.pp_stages_per_rank=2",
        "parallel.pp_stages_per_rank",
        ["GPipe has 1 stage a rank, not 2", "Interleaved1F1B"],
        "parallel.pp_schedule=Interleaved1F1B",
    ),
    (
        "schedule_takes_the_stages",
        2,
        "parallel.pp=2 parallel.pp_schedule=ZBVZeroBubble parallel.pp_stages_per_rank=3",
        "parallel.pp_stages_per_rank",
        ["ZBVZeroBubble has 2 stages a rank, not 3"],
        "parallel.pp_stages_per_rank=2",
    ),
    (
        "schedule_takes_the_micro_batches",
        4,
        "parallel.pp=4 parallel.pp_schedule=DualPipeV",
        "training.micro_batch_size",
        ["8 micro batches", "not 4", "lower it, or raise training.global_batch_size"],
        "training.micro_batch_size=2",
    ),
    (
        "stages_have_blocks",
        4,
        "parallel.pp=4 parallel.pp_schedule=Interleaved1F1B parallel.pp_stages_per_rank=3",
        "parallel.pp",
        ["12 stages need a block each, and the model has 8"],
        "parallel.pp_stages_per_rank=2",
    ),
    (
        "split_shares_out_the_blocks",
        2,
        "parallel.pp=2 parallel.pp_split=[3,4]",
        "parallel.pp_split",
        ["[3, 4] does not share out 8 blocks to 2 stages", "such as [4, 4]"],
        "parallel.pp_split=[3,5]",
    ),
    (
        "split_shares_out_the_blocks",
        2,
        "parallel.pp=2 parallel.pp_split=[4,4] parallel.pp_schedule=Interleaved1F1B",
        "parallel.pp_split",
        ["4 numbers", "add up to 8", "[2, 2, 2, 2]"],
        "parallel.pp_split=[]",
    ),
    (
        "what_selective_keeps_stays",
        2,
        "parallel.dp_shard=2 offload.activations=true recompute.mode=selective",
        "offload.activations",
        ["keeps results by itself", '"full" or "none"'],
        "recompute.mode=full",
    ),
    *(
        (
            "zero_bubble_is_not_compiled",
            2,
            f"parallel.pp=2 parallel.pp_schedule={name} compile.enable=true",
            "compile.enable",
            [name, '"1F1B" or "Interleaved1F1B"'],
            "parallel.pp_schedule=Interleaved1F1B",
        )
        for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    ),
    (
        "reshard_divides_the_shards",
        8,
        "parallel.reshard_after_forward=3 training.micro_batch_size=2",
        "parallel.reshard_after_forward",
        ['"3" has to divide the 8 ranks', 'write "2" or "4"'],
        "parallel.reshard_after_forward=2",
    ),
    (
        "reshard_divides_the_shards",
        4,
        "parallel.reshard_after_forward=4 parallel.cp=2",
        "parallel.reshard_after_forward",
        ["and be less", 'write "2"'],
        "parallel.reshard_after_forward=2",
    ),
    (
        "reshard_divides_the_shards",
        2,
        "parallel.reshard_after_forward=2",
        "parallel.reshard_after_forward",
        ['write "auto"'],
        "parallel.reshard_after_forward=auto",
    ),
    (
        "float8_has_layers",
        1,
        "precision.float8=rowwise precision.float8_min_width=512",
        "precision.float8",
        ["no linear layer is left", 'write "none"'],
        "precision.float8_min_width=64",
    ),
    (
        "float8_has_layers",
        1,
        'precision.float8=rowwise precision.float8_skip=["layers.*.ffn"]',
        "precision.float8_skip",
        ["'layers.*.ffn' matches no linear layer", "layers.0.attention.q"],
        'precision.float8_skip=["layers.*.ffn.*"]',
    ),
    (
        "float8_widths_are_whole_units",
        4,
        "precision.float8=tensorwise parallel.tp=4",
        "precision.float8",
        ["layers.0.ffn.gate has 352 outputs for 4 ranks", "multiples of 64"],
        'precision.float8_skip=["layers.*.ffn.*"]',
    ),
    (
        "float8_widths_are_whole_units",
        1,
        "precision.float8=tensorwise model.ffn_dim=40",
        "precision.float8",
        ["layers.0.ffn.gate has 40 outputs, and", "multiples of 16"],
        "model.ffn_dim=48",
    ),
    (
        "float8_tokens_are_whole_units",
        1,
        "precision.float8=tensorwise training.seq_len=30",
        "training.micro_batch_size",
        ["a rank's micro batch has 120 tokens", "multiples of 16"],
        "training.micro_batch_size=8",
    ),
    (
        "kernels_have_a_place",
        1,
        "model.name=gpt2 kernels.swiglu=triton",
        "kernels.swiglu",
        ["gpt2 has no SwiGLU"],
        "kernels.swiglu=torch",
    ),
    (
        "kernels_have_a_place",
        1,
        "kernels.rms_norm=triton model.dim=20480",
        "kernels.rms_norm",
        ["a token has 20,480 numbers", "16,384"],
        "kernels.rms_norm=torch",
    ),
    (
        "kernels_have_a_place",
        1,
        "kernels.float8_cast=triton",
        "kernels.float8_cast",
        ["nothing is computed in Float8"],
        "precision.float8=rowwise",
    ),
    (
        "float8_weights_stay_with_their_ranks",
        2,
        "precision.float8=tensorwise offload.states=true",
        "offload.states",
        ["cast where they lie", 'precision.float8 = "rowwise"'],
        "precision.float8=rowwise",
    ),
    (
        "float8_weights_stay_with_their_ranks",
        4,
        "precision.float8=tensorwise parallel.reshard_after_forward=2",
        "parallel.reshard_after_forward",
        ["no such copy", '"always"'],
        "precision.float8=rowwise",
    ),
]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(DEBUG.parents[1])


def read(words: str = "", **parallel: Any) -> Config:
    """debug.toml with overrides, and with fields of [parallel] put in by hand."""
    config = toml.load(DEBUG, [f"--{word}" for word in words.split()])
    return replace(config, parallel=replace(config.parallel, **parallel))


@pytest.mark.parametrize(("rule", "ranks", "words", "key", "said", "instead"), BROKEN, ids=[f"{c[0]}-{c[2]}" for c in BROKEN])
def test_what_cannot_work_is_refused_and_what_is_written_instead_works(
    rule: str, ranks: int, words: str, key: str, said: list[str], instead: str
) -> None:
    config = read(words)
    (problem,) = problems(config, ranks)
    assert problem == (getattr(check_plan, rule, None) or getattr(check_precision, rule))(config, ranks)
    assert problem.key == key
    for part in said:
        assert part in problem.sentence
    assert len(problem.sentence) < 250
    assert problems(read(f"{words} {instead}"), ranks) == []


def test_every_rule_of_the_plan_and_of_precision_is_listed_and_has_a_case() -> None:
    modules = check_plan, check_precision
    rules = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__annotations__.get("return") == "Problem | None"
    }
    assert rules == {case[0] for case in BROKEN} | {"sharding_words_fit"}
    assert rules == {rule.__name__ for rule in RULES if rule.__module__ in {module.__name__ for module in modules}}


@pytest.mark.parametrize(
    ("sharding", "said"),
    [
        ({"layers.*.fnn": "seq"}, "'layers.*.fnn' matches no module"),
        ({"layers.*.ffn": "cols"}, "no style 'cols'"),
        ({"layers.*.ffn": "seq"}, "'layers.0.ffn.gate' cannot be 'col'"),
        (
            {"layers.3.attention*": "seq", "layers.3.attention.*": "seq"},
            "'layers.3.attention' cannot be 'seq': attention needs",
        ),
        (
            {"layers.*.attention.k": "col"},
            "'layers.0.attention.k' cannot be 'col': attention needs whole sequences and whole heads",
        ),
    ],
)
def test_words_that_do_not_fit_are_refused(sharding: dict[str, str], said: str) -> None:
    for tp in (1, 2):
        (problem,) = problems(read(sharding=sharding, tp=tp), 2)
        assert problem.key == "parallel.sharding"
        assert said in problem.sentence


@pytest.mark.parametrize(
    ("words", "key", "said", "instead"),
    [
        ("checkpoint.keep_best=true checkpoint.keep_last=1 validation.interval=0", "keep_best", "loss", "keep_best=false"),
        ("checkpoint.keep_best=true", "keep_best", "keep_last = 0 keeps every step", "keep_last=3"),
        ("checkpoint.keep_every=100", "keep_every", "keep_last = 0 keeps every step", "keep_last=3"),
        ("checkpoint.copy_to=/backup", "copy_to", "no URL", "copy_to=file:///backup"),
        ("checkpoint.copy_to=nowhere://x", "copy_to", "Protocol not known: nowhere", "copy_to="),
        ("checkpoint.when_busy=skip", "when_busy", "async_save = true", "async_save=true"),
        ("profiling.start=100 profiling.steps=2", "start", "step 101", "start=99"),
        ("profiling.start=9 profiling.ranks=[0,2]", "ranks", "no rank 2: the ranks are 0 to 1", "ranks=[1]"),
        ("profiling.start=9 profiling.memory=true", "memory", "titan draw memory", "memory=false"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(words: str, key: str, said: str, instead: str) -> None:
    given, table = [f"--{word}" for word in words.split()], words.split(".")[0]
    (problem,) = problems(toml.load(DEBUG, given), 2)
    assert problem.key == f"{table}.{key}"
    assert said in problem.sentence
    assert problems(toml.load(DEBUG, [*given, f"--{table}.{instead}"]), 2) == []


def test_words_decide_what_has_to_be_shared_evenly() -> None:
    whole = {"embedding": "scatter", "head": "seq", "layers.*.ffn": "seq", "layers.*.ffn.*": "seq"}
    words = "model.vocab_size=3 model.ffn_dim=3 data.tokenizer=LICENSE"
    assert [p.key for p in problems(read(words, tp=4), 4)] == ["parallel.tp"]
    assert problems(read(words, tp=4, sharding=whole), 4) == []


@pytest.mark.parametrize("model", ["llama3", "gpt2"])
def test_debug_serves_every_degree_alone_and_in_pairs(model: str) -> None:
    base = read(f"model.name={model}")
    plans: list[dict[str, Any]] = [{axis: n} for axis in ("tp", "cp", "pp") for n in (2, 4)]
    plans += [
        dict(zip(pair, n, strict=True)) for pair in combinations(("tp", "cp", "pp"), 2) for n in product((2, 4), repeat=2)
    ]
    for plan in plans:
        for method, schedule in (("ring", "1F1B"), ("allgather", "InterleavedZeroBubble"), ("ulysses", "ZBVZeroBubble")):
            if method == "ulysses" and plan.get("tp", 1) * plan.get("cp", 1) > 8:
                continue
            changes = plan | {"cp_method": method, "pp_schedule": schedule}
            config = replace(base, parallel=replace(base.parallel, **changes))
            for data_parallel in (1, 2):
                world = prod(plan.values()) * data_parallel
                assert problems(config, world) == [], (plan, world)
                assert degrees(config.parallel, world).dp_shard == data_parallel


def test_a_dimension_that_is_off_refuses_nothing() -> None:
    words = "parallel.cp_method=ulysses parallel.pp_stages_per_rank=3 parallel.pp_split=[1,2,3] compile.enable=true"
    config = read(
        f"{words} parallel.pp_schedule=ZBVZeroBubble parallel.reshard_after_forward=8", sharding={"embedding": "scatter"}
    )
    assert problems(config, 1) == []


@pytest.mark.parametrize("seed", range(20))
def test_plans_that_are_named_make_up_the_world(seed: int) -> None:
    draw = random.Random(seed)
    world = draw.choice([1, 2, 6, 8, 12, 64, 96, 512])
    asked: dict[str, Any] = {axis: draw.choice([1, 1, 2, 3, 4, 8]) for axis in check_plan.AXES}
    asked[draw.choice(["dp_shard", "dp_replicate"])] = -1
    problem = check_plan.degrees_make_up_the_world(config := read(**asked), world)
    others = prod(n for n in asked.values() if n != -1)
    assert (problem is None) == (world % others == 0), (asked, world)
    if problem is None:
        return
    found = [dict(re.findall(r"(\w+) = (\d+)", plan)) for plan in problem.sentence.rpartition("these do: ")[2].split("; ")]
    assert 1 <= len(found) <= 3
    plans = [asked | {axis: int(n) for axis, n in plan.items()} for plan in found]
    for plan in plans:
        changed = replace(config, parallel=replace(config.parallel, **plan))
        assert check_plan.degrees_make_up_the_world(changed, world) is None, (asked, world, plan)
    if world % prod(asked[axis] for axis in ("tp", "cp", "pp")) == 0:
        assert all(plans[0][axis] == asked[axis] for axis in ("tp", "cp", "pp")), (asked, world, plans)


def test_a_schedule_from_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    config = read(f"parallel.pp=2 parallel.pp_schedule={path} training.micro_batch_size=8")
    assert problems(config) == problems(config, 2) == []
    (problem,) = problems(read(f"parallel.pp=2 parallel.pp_schedule={path}"), 2)
    assert problem.key == "parallel.pp_schedule"
    assert f"{path}: " in problem.sentence
    (problem,) = problems(replace(config, model=replace(config.model, config=replace(config.model.config, n_layers=1))), 2)
    assert (problem.key, problem.sentence.split(",")[0]) == ("parallel.pp", "2 stages need a block each")
    path.write_text("0F0,0F1,0I0,0W0,0B1\n1F0,1B0,1F1,1B1\n")
    config = replace(config, compile=replace(config.compile, enable=True))
    assert [p.key for p in problems(config, 2)] == ["compile.enable"]
    (problem,) = problems(replace(config, parallel=replace(config.parallel, pp_schedule=str(tmp_path / "min.csv"))), 2)
    assert f"did you mean '{path}'?" in problem.sentence
