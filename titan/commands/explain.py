"""titan explain CONFIG [--out PAGE.html] [--world-size N] [--cluster NAME] [--plan PLAN] [--table.key=value ...]

A plan told as a lesson, on one page that a browser shows without a network, on a phone, on a desk or printed: who holds what,
how each parameter is cut, what lies in memory, what travels over which link, and where a step's time goes. It is the dry run of
`titan plan`, and behind every number stands its formula with the figures filled in.

  --out PAGE.html  where to (CONFIG's name with .html, in this folder)
  --world-size N   GPUs of the whole job (as few as the plan needs)
  --cluster NAME   a100, h100, h200, b200, or a .toml file like those in
                   train_configs/clusters (h100)
  --plan PLAN      keys of [parallel], or any table.key, with their values and
                   commas between: tp=8,pp=4,dp_shard=-1. Without it: CONFIG's
                   own plan

  titan explain train_configs/debug.toml --plan pp=2,tp=2,dp_shard=2
  titan explain train_configs/llama3_8b.toml --world-size 64 --out 8b.html
  titan explain train_configs/gpt2_124m.toml --cluster a100

Formulas are evaluated as they are shown. Where there is none (activations, seconds of operations), the page says that the dry
run found the number. What planned memory and times leave out: `titan plan --help`.
"""

from __future__ import annotations

from pathlib import Path

from titan.arguments import Parser, blame, read_config
from titan.check import problems
from titan.commands.plan import plan_with_bar
from titan.commands.verify import with_plan
from titan.config import least_ranks
from titan.dryrun.cluster import read_cluster
from titan.files import write_atomically
from titan.status import Exit
from titan.toml import ConfigError


def run(words: list[str]) -> int:
    """Plan, explain, write."""
    parser = Parser("explain")
    parser.add_argument("--plan", default="")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--cluster", default="h100")
    parser.add_argument("--out", type=Path)
    given, rest = parser.parse_with_config(words)
    if given.world_size is not None and given.world_size < 1:
        parser.error("--world-size is a whole number, 1 or more")
    cluster = read_cluster(given.cluster)
    own = with_plan(given.plan, rest) if given.plan else rest
    config = read_config(own)
    out = given.out or Path(f"{Path(config.source).stem}.html")
    require_page(out)
    world = given.world_size or least_ranks(config.parallel)
    if wrong := problems(config, world, elsewhere=True):
        raise ConfigError("\n".join(blame(config, own, f"{problem.key}: {problem.sentence}") for problem in wrong))

    from titan.explaining.page import page

    try:
        written = page(config, plan_with_bar(config, world, cluster), cluster)
    except ValueError as error:  # a word that only PyTorch can judge
        raise ConfigError(f"{config.source}: {error}") from error
    write_atomically(out, written)
    print(f"written: {out}")
    return Exit.FINISHED


def require_page(out: Path) -> None:
    """ConfigError where no page can be written there."""
    if out.suffix not in (".html", ".htm"):
        raise ConfigError(f"command line: --out {out}: what is written is HTML; name it {out.with_suffix('.html')}")
    if not out.parent.is_dir():
        raise ConfigError(f"command line: --out {out}: there is no folder {out.parent}")
