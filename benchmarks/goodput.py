"""What is left of the time when ranks keep dying: a run that is killed at random and started again, until it is done.

    python benchmarks/goodput.py [--steps 1000] [--kill 30:60] [--seed 0] [--ranks 2] [--table.key=value ...]

Trains debug.toml's model, once undisturbed and once so that, a random time after each start, SIGKILL takes one rank or the
whole job (printed). Each start is the same command. Goodput is useful step time over all time: useful are the steps that the
finished run consists of, not those that were lost and done again. It is printed with the restarts (from a kill to the next
first step) counted and left out. Then both runs' losses: they must be the same to the last digit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def start(folder: Path, options: argparse.Namespace, words: list[str]) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "titan.cli", "train", str(ROOT / "train_configs" / "debug.toml")]
    arguments += [f"--job.output={folder}", f"--training.steps={options.steps}", "--metrics.interval=1"]
    arguments += ["--parallel.dp_replicate=2", "--training.seq_len=128", "--validation.interval=0", "--sample.prompts=[]"]
    arguments += ["--checkpoint.interval=20", "--checkpoint.async_save=true", "--checkpoint.keep_last=2", *words]
    given = {"NPROC": str(options.ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        environment = os.environ | given
        return subprocess.Popen(arguments, env=environment, cwd=folder.parent, stdout=log, stderr=log, start_new_session=True)


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "titan.train" in line]


def disturbed(folder: Path, options: argparse.Namespace, words: list[str]) -> tuple[float, float, int]:
    """Train to the end through kills: all seconds, those of them from a start to its first step, and how many kills."""
    draw = random.Random(options.seed)
    least, most = (float(word) for word in options.kill.split(":"))
    began, starting, kills = time.time(), 0.0, 0
    while True:
        started = time.time()
        process = start(folder, options, words)
        try:
            code = process.wait(draw.uniform(least, most))
        except subprocess.TimeoutExpired:
            code = None
            ranks = ranks_of(process) if draw.random() < 0.5 else []
            ended = time.time()
            if ranks:
                os.kill(draw.choice(ranks), signal.SIGKILL)
                process.wait(120)
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(120)
            kills += 1
            starting += time.time() - ended
        steps = records(folder)
        new = [record for record in steps if record["time"] > started]
        starting += (new[0]["time"] - new[0]["step_seconds"] if new else time.time()) - started
        if code is not None:
            if code:
                raise SystemExit(f"the job ended with {code}:\n{(folder.parent / f'{folder.name}.log').read_text()[-3000:]}")
            return time.time() - began, starting, kills
        print(f"kill {kills}: {'a rank' if ranks else 'the job'}, after step {steps[-1]['step'] if steps else 0}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--kill", default="30:60", help="a kill this many seconds after each start, drawn anew (least:most)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--ranks", type=int, default=2, help="processes, or GPUs")
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "undisturbed"
        if start(whole, options, words).wait():
            raise SystemExit((Path(name) / "undisturbed.log").read_text()[-3000:])
        seconds, starting, kills = disturbed(Path(name) / "killed", options, words)
        losses = [{r["step"]: r["loss"] for r in records(folder)} for folder in (whole, Path(name) / "killed")]
        useful = sum(record["step_seconds"] for record in records(Path(name) / "killed"))
        print(f"{kills} kills (seed {options.seed}) in {seconds:.0f} s: {starting:.0f} s restarts, {useful:.0f} s useful steps")
        print(f"goodput {useful / seconds:.3f} with restarts, {useful / (seconds - starting):.3f} without them")
        print(f"last loss {losses[1][options.steps]!r}, undisturbed {losses[0][options.steps]!r}")
        different = sum(losses[0].get(step) != losses[1].get(step) for step in range(1, options.steps + 1))
        print(f"losses that differ: {different} of {options.steps}")


if __name__ == "__main__":
    main()
