"""How Llama 3 may be cut."""

from __future__ import annotations

from titan.sharding import Sharding

SHARDING = Sharding(block="layers.*", before=("embedding",))
