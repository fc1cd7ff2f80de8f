"""The same model trained by titan, by a hand-written PyTorch loop (FSDP2 on several ranks) and by the Hugging Face Trainer.

    python benchmarks/throughput.py [--processes 1 2] [--dtypes float32 bfloat16] [--pairs 12] [--rounds 2] [--threads 2]

Llama with 12,194,688 parameters (width 384, 6 layers, 6 heads, feed-forward 1,024, vocabulary 2,048, untied), 8 x 256 tokens
a step, on this machine's CPU. Contestants are started together and take turns, a step each, in an order that moves on by one
every time, so that a machine whose speed drifts slows all alike. A turn is the whole loop from a step's start to the next:
data, step, what it logs. They have the same threads: --threads shared out among the processes.

    titan, titan compiled       `titan.train` as it is, every step logged; on several ranks FSDP2
    titan replicated            compiled, with parallel.dp_replicate on several ranks, as DDP does
    loop, loop compiled         the same model class, AdamW, clipping; bfloat16 by autocast, on several ranks by FSDP2's policy
    trainer                     transformers' Trainer with its own Llama; on several ranks DDP (pip install accelerate)

Printed, as medians over the steps of all rounds: tokens/s, CPU seconds a step (all processes), their peak memory together, and
the share of this machine's matmul peak (the fastest of some products of large matrices with the same threads, measured
before) that the model's FLOP take. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {"dim": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "ffn_dim": 1024, "vocab_size": 2048}
SEQ_LEN, BATCH, SEED, WARM_UP = 256, 8, 1, 6
CONTESTANTS = ("titan", "titan compiled", "titan replicated", "loop", "loop compiled", "trainer")


def samples(data: str, rank: int, world: int) -> Iterator[Any]:
    """This rank's sequences of each step: int64 [BATCH / world, SEQ_LEN + 1]."""
    import numpy as np
    import torch

    tokens = np.memmap(next(Path(data).glob("train-*.tokens")), dtype=np.uint16, mode="r", offset=4096)
    random = np.random.default_rng(SEED)
    while True:
        starts = random.integers(0, 400_000, BATCH)[rank::world]
        yield torch.from_numpy(np.stack([tokens[s : s + SEQ_LEN + 1] for s in starts]).astype(np.int64))


def hand_written(data: str, steps: int, dtype: str, compiled: bool) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    from titan.models.llama3.config import Config
    from titan.models.llama3.model import Transformer

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = Transformer(Config(**SHAPE))
    torch.manual_seed(SEED)
    model.init_weights()
    narrow = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if compiled:
        for block in model.layers.values():
            block.compile()
    if world > 1:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*model.layers.values(), model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    decay, rest = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    batches = samples(data, rank, world)
    for step in range(steps):
        wait_for_turn()
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16" and world == 1):
            loss = model(batch[:, :-1], labels=batch[:, 1:]) / (BATCH * SEQ_LEN)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if world > 1:
            dist.all_reduce(total)
        print(f"step {step} loss {total.item()}", file=sys.stderr)
    wait_for_turn()


def trainer(data: str, steps: int, dtype: str) -> None:
    import transformers

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:  # the Trainer would make a process group
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name)

    class Turns(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn(rank)

    config = transformers.LlamaConfig(
        hidden_size=SHAPE["dim"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        num_key_value_heads=SHAPE["n_kv_heads"],
        intermediate_size=SHAPE["ffn_dim"],
        vocab_size=SHAPE["vocab_size"],
        tie_word_embeddings=False,
    )
    rows = [row[:SEQ_LEN] for _, batch in zip(range(steps + 2), samples(data, 0, 1), strict=False) for row in batch]
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            max_steps=steps + 2,
            per_device_train_batch_size=BATCH // world,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=dtype == "bfloat16",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = transformers.LlamaForCausalLM(config)
        data_set: Any = [{"input_ids": row, "labels": row} for row in rows]
        transformers.Trainer(model=model, args=arguments, train_dataset=data_set, callbacks=[Turns()]).train()


def titan_run(data: str, steps: int, dtype: str, compiled: bool, replicated: bool) -> None:
    """It asks whether to stop once a step: that is its turn."""
    import titan.train

    world = int(os.environ["WORLD_SIZE"])
    if world == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name)

    class TurnTakingStop(titan.train.Stop):
        def wanted(self) -> bool:
            wait_for_turn()
            return super().wanted()

    titan.train.Stop = TurnTakingStop  # type: ignore[misc]
    output = os.environ["THROUGHPUT_OUTPUT"]
    words = [f"--model.{key}={value}" for key, value in SHAPE.items()]
    words += [f"--data.path={data}", f"--job.output={output}", f"--precision.param={dtype}", "--metrics.interval=1"]
    words += [f"--training.steps={steps + 2}", f"--training.seq_len={SEQ_LEN}", f"--training.global_batch_size={BATCH}"]
    words += [f"--training.micro_batch_size={BATCH // world}", "--validation.interval=0", "--schedule.warmup_steps=1"]
    words += ["--checkpoint.interval=0", "--data.tokenizer=bytes", "--sample.prompts=[]"]
    words += ["--compile.enable=true"] if compiled else []
    words += [f"--parallel.dp_replicate={world}", "--parallel.dp_shard=1"] if replicated else []
    code = titan.train.run([str(Path(__file__).parents[1] / "train_configs" / "debug.toml"), *words])
    assert code == 0, code


def wait_for_turn(rank: int | None = None) -> None:
    """Note what was used so far; rank 0: tell the parent that a step is done, and wait for its word. The others wait for
    rank 0, in their collectives."""
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    note = Path(f"{os.environ['THROUGHPUT_OUTPUT']}-{rank}.used")
    note.with_suffix(".new").write_text(f"{time.process_time()} {peak}")
    note.with_suffix(".new").replace(note)
    if rank != 0:
        return
    sys.__stdout__.write("TURN\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]
    if not sys.stdin.readline():
        os._exit(0)


class Runner:
    """A contestant's processes."""

    def __init__(self, name: str, data: str, steps: int, dtype: str, processes: int, threads: int, folder: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.output = str(Path(folder) / name.replace(" ", "-"))
        self.log = Path(folder) / f"{name.replace(' ', '-')}.log"
        environment = {
            **os.environ,
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(max(1, threads // processes)),
            "THROUGHPUT_OUTPUT": self.output,
        }
        command = [sys.executable, __file__, "--child", name, "--data", data, "--steps", str(steps), "--dtypes", dtype]
        self.name = name
        with open(self.log, "a") as log:
            self.processes = [
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=log,
                    text=True,
                )
                for rank in range(processes)
            ]
        self._until_done()

    def turn(self) -> float:
        """Let it take a step; the seconds that took."""
        assert self.processes[0].stdin is not None
        started = time.perf_counter()
        self.processes[0].stdin.write("go\n")
        self.processes[0].stdin.flush()
        self._until_done()
        return time.perf_counter() - started

    def used(self) -> tuple[float, float]:
        """CPU seconds so far, and the peak memory in bytes, of all processes together, as each noted them at its last step."""
        noted = [Path(f"{self.output}-{rank}.used").read_text().split() for rank in range(len(self.processes))]
        return sum(float(cpu) for cpu, _ in noted), sum(float(peak) for _, peak in noted)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _until_done(self) -> None:
        assert self.processes[0].stdout is not None
        for line in self.processes[0].stdout:
            if line.startswith("TURN"):
                return
        self.close()
        raise RuntimeError(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}")


def matmul_peak(dtype: str, threads: int) -> float:
    """FLOP/s of the fastest product of large matrices with so many threads."""
    import torch

    torch.set_num_threads(threads)
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        for _ in range(8):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def compare(data: str, dtype: str, processes: int, options: argparse.Namespace) -> None:
    """Rounds of one setting, and its table."""
    contestants = [name for name in options.only if processes > 1 or name != "titan replicated"]
    from titan.metrics.flops import flops_per_token
    from titan.models.llama3.config import Config
    from titan.models.llama3.model import Transformer

    flops = flops_per_token(Transformer(Config(**SHAPE)), SEQ_LEN).total * SEQ_LEN * BATCH
    peak = matmul_peak(dtype, options.threads)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    memory: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            steps = options.pairs + WARM_UP
            runners = [Runner(name, data, steps, dtype, processes, options.threads, folder) for name in contestants]
            try:
                for step in range(steps):
                    if step == WARM_UP:
                        before = {runner.name: runner.used()[0] for runner in runners}
                    first = step % len(runners)
                    for runner in runners[first:] + runners[:first]:
                        took = runner.turn()
                        if step >= WARM_UP:
                            seconds[runner.name].append(took)
                for runner in runners:
                    total, peak_memory = runner.used()
                    cpu[runner.name].append((total - before[runner.name]) / options.pairs)
                    memory[runner.name].append(peak_memory)
            finally:
                for runner in runners:
                    runner.close()
    print(f"\n{dtype}, {processes} process(es), {options.threads} threads in all; matmul peak {peak / 1e9:,.0f} GFLOP/s")
    print(f"{'':15} {'tokens/s':>9} {'CPU s/step':>11} {'peak MB':>8} {'of matmul peak':>15}")
    for name in contestants:
        step_seconds = statistics.median(seconds[name])
        print(
            f"{name:15} {SEQ_LEN * BATCH / step_seconds:9,.0f} {statistics.median(cpu[name]):11.2f} "
            f"{statistics.median(memory[name]) / 1e6:8,.0f} {flops / step_seconds / peak:15.0%}"
        )
    others = [name for name in contestants if not name.startswith("titan")]
    ours = [name for name in contestants if name.startswith("titan")]
    if others and ours:
        best, leanest = (min(others, key=lambda n: statistics.median(of[n])) for of in (seconds, memory))  # type: ignore[index]
        for name in ours:
            speed = statistics.median(seconds[best]) / statistics.median(seconds[name])
            lean = statistics.median(memory[name]) / statistics.median(memory[leanest])
            print(f"{name}: {speed:.2f} of the best other's speed ({best}), {lean:.2f} of the least other memory ({leanest})")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=12, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=2, help="times that all are started anew")
    parser.add_argument("--threads", type=int, default=2, help="of a contestant, over all its processes")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        given = options.data, options.steps, options.dtypes[0]
        if options.child == "trainer":
            trainer(*given)
        elif options.child.startswith("titan"):
            titan_run(*given, compiled=options.child != "titan", replicated=options.child == "titan replicated")
        else:
            hand_written(*given, compiled=options.child == "loop compiled")
        return

    from titan.config import Data, Source
    from titan.data.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        data = str(prepare(Source(path="builtin:topics"), Data(cache=folder), print))
        for processes in options.processes:
            for dtype in options.dtypes:
                compare(data, dtype, processes, options)


if __name__ == "__main__":
    main()
