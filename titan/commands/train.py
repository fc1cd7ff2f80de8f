"""titan train CONFIG [--table.key=value ...]

Checks the config, starts this machine's ranks and trains. The same command again resumes from the newest checkpoint in
job.output, and says so when nothing is left to do. Any key of the TOML can be set on the command line:

  titan train train_configs/debug.toml
  titan train train_configs/debug.toml --training.steps=20 --optimizer.lr=1e-3
  NPROC=4 titan train train_configs/debug.toml    # 4 ranks; default: the GPUs, or
                                                  # on a CPU what the plan needs
  titan train train_configs/debug.toml --parallel.tp=2 --parallel.pp=2
  NNODES=2 RDZV_ENDPOINT=first-node:29400 titan train CONFIG   # on each of two
  srun --ntasks-per-node=1 titan train CONFIG     # all nodes of a SLURM job
  torchrun --nproc-per-node=2 -m titan.train CONFIG

Ctrl-C, SIGTERM, SIGUSR1, a file named stop in job.output, job.max_seconds or SLURM's time limit stop it after the step at hand
with everything saved, and exit code 75; a second Ctrl-C leaves at once. One job at a time works in an output folder. What
the keys mean: titan config CONFIG, or docs/config.md.
"""

from __future__ import annotations

from pathlib import Path

from titan.arguments import blame, check_config, read_config, unwritable
from titan.checkpoint.manifest import CheckpointError
from titan.config import least_ranks
from titan.lock import FILE, lock
from titan.toml import ConfigError


def run(words: list[str]) -> int:
    """Check the config against this launch's world size, then start the ranks."""
    config = read_config(words)  # a mistake in it is answered before anything heavier is loaded

    from titan import launch

    try:
        node = launch.local_world(on_cpu=least_ranks(config.parallel))
    except ValueError as error:
        raise ConfigError(f"environment: {error}") from None
    check_config(config, node.world_size, words)
    if why := unwritable(Path(config.job.output)):
        raise ConfigError(blame(config, words, f"job.output: {why}; name a folder that can be written"))
    if (Path(config.job.output) / FILE).exists() and (held := lock(Path(config.job.output))) is not None:
        held.close()  # rank 0 takes it
    try:
        launch.prepare_data(config, node)
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        raise ConfigError(blame(config, words, str(error))) from None
    return launch.launch(config, words, node)
