"""Plans at random: degrees, schedule, method, split, masks, shapes of model and batch, all from a seed that a failure prints.

Five of them, always the same; with --slow 200.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from plans import CONFIG

from titan.commands.verify import planned
from titan.config import Config
from titan.pool import Pool
from titan.toml import ConfigError
from titan.verify import Verifier

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


@pytest.fixture(scope="module")
def verifier(pool: Pool) -> Verifier:
    return Verifier(pool, steps=3)


@pytest.mark.parametrize("seed", [pytest.param(i, marks=() if i < 5 else pytest.mark.slow) for i in range(200)])
def test_a_random_plan_computes_what_one_process_computes(verifier: Verifier, short_documents: Path, seed: int) -> None:
    plan, words, config = drawn(random.Random(seed), short_documents)
    found = verifier.compare(config)
    figures = f"loss {found.loss:.1e}, norm {found.norm:.1e}, gradient {found.gradient:.1e} ({found.worst})"
    print(f"\n{seed}: {plan}  {' '.join(words)}: {figures}")
    assert found.holds, f"{plan} {words}: {figures}"


def drawn(draw: random.Random, data: Path) -> tuple[str, list[str], Config]:
    """The first random plan that check.py has nothing against, most of what it refuses being batches that do not divide."""
    while True:
        plan, words = ",".join(random_plan(draw)), random_shapes(draw)
        try:
            return plan, words, planned(plan, [CONFIG, f"--data.path={data}", "--data.tokenizer=bytes", *words])
        except ConfigError:
            continue


def random_plan(draw: random.Random) -> list[str]:
    degrees = dict.fromkeys(("dp_replicate", "dp_shard", "tp", "cp", "pp"), 1)
    for prime in draw.choice(([], [2], [3], [2, 2], [2, 3], [2, 2, 2], [5])):
        degrees[draw.choice(list(degrees))] *= prime
    keys = [f"{name}={degree}" for name, degree in degrees.items() if degree > 1]
    keys.append(f"cp_method={draw.choice(('ring', 'allgather', 'ulysses'))}")
    keys.append(f"reshard_after_forward={draw.choice(('auto', 'always', 'never'))}")
    keys.append(f"pp_schedule={draw.choice(SCHEDULES)}")
    if degrees["pp"] > 1 and draw.random() < 0.3:
        keys += ["pp_schedule=Interleaved1F1B", f"pp_stages_per_rank={draw.choice((2, 3))}"]
    if degrees["pp"] > 1 and draw.random() < 0.3:
        keys += [f"pp_split={draw.choice(('[1,5]', '[4,2]', '[1,2,3]', '[2,1,1,2]', '[1,2,1,2]'))}"]
    if degrees["tp"] > 1:
        keys.append(f"async_tp={draw.choice(('true', 'false'))}")
    keys.append(f"recompute.mode={draw.choice(('none', 'none', 'full', 'block', 'selective'))}")
    keys.append(f"data.document_mask={draw.choice(('true', 'false'))}")
    return keys


def random_shapes(draw: random.Random) -> list[str]:
    heads = draw.choice((1, 2, 3, 4, 6, 8))
    # A norm over two channels leaves their signs. What gradient there is behind it is rounding: in one process, too, float32
    # is up to 8e-4 away from float64 there.
    width = draw.choice((2, 4, 6, 10) if heads > 1 else (4, 6, 10))
    micro = draw.choice((1, 1, 2, 3))
    model = [
        f"--model.n_layers={draw.choice((2, 3, 4, 6))}",
        f"--model.n_heads={heads}",
        f"--model.dim={heads * width}",
        f"--model.ffn_dim={draw.randint(8, 90)}",
        f"--model.vocab_size={draw.randint(257, 300)}",
        f"--model.tied_embeddings={draw.choice(('true', 'false'))}",
    ]
    if draw.random() < 0.5:
        model += ["--model.name=gpt2", f"--model.dropout={draw.choice((0, 0.2))}"]
    else:
        model += [f"--model.n_kv_heads={draw.choice([n for n in range(1, heads + 1) if heads % n == 0])}"]
    return [
        *model,
        f"--training.seed={draw.randint(0, 2**62)}",
        f"--training.seq_len={draw.choice((12, 16, 20, 24, 30, 36, 40, 48))}",
        f"--training.micro_batch_size={micro}",
        f"--training.global_batch_size={micro * draw.randint(1, 12)}",
        "--schedule.warmup_steps=5",
    ]
