"""How Llama 3 may be cut. No torch."""

from __future__ import annotations

from titan.sharding import Sharding

from .config import Config


def sharding(config: Config) -> Sharding:
    """The table. A tied embedding's weight is used once more after the blocks, so it is not done with before them."""
    return Sharding(block="layers.*", core="layers.*.attention.core", before=() if config.tied_embeddings else ("embedding",))
