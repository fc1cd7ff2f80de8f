"""The cores of this machine that are ours."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores that this process may use: of a cluster's node, what the job was given. macOS cannot tell, and says all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
