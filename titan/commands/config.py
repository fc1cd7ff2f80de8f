"""titan config CONFIG [--table.key=value ...]

Checks a config and prints it as TOML with every default and what each key means. Nothing is started and no torch is loaded,
so it answers at once. What depends on the number of ranks is checked by titan train.

  titan config train_configs/stdlib.toml
  titan config train_configs/stdlib.toml --training.steps=20 > mine.toml
"""

from __future__ import annotations

from titan import toml
from titan.arguments import check_config, read_config


def run(words: list[str]) -> int:
    """Print the resolved config."""
    print(toml.dump(check_config(read_config(words), None, words)), end="")
    return 0
