"""A copy of each committed step in another place: an object store, or whatever fsspec has a URL for.

A cluster's disk is fast, full and not backed up. What is committed there is copied, by the thread that wrote it, every rank
some of its files, the manifest last: a step whose manifest is there is whole. A copy that fails costs nothing but the copy:
that is said, and training goes on; the next step is copied again. Copies are never removed from here.

To go on from one, fetch its folder with the store's own tool; `titan checkpoint verify` checks it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from titan.checkpoint.find import shares
from titan.checkpoint.manifest import MANIFEST, Written, read_manifest
from titan.ranks import Ranks, on_first, same_outcome

ATTEMPTS = 3
PAUSE_SECONDS = 1.0


def copy_step(folder: Path, url: str, ranks: Ranks, group: dist.ProcessGroup) -> None:
    """Copy a committed step to `<url>/<its name>`. Every rank calls it; an error, on all of them, where a file does not go.

    group: one that waits as long as a copy may take.
    """
    files = on_first(ranks, lambda: _begin(folder, url), group)
    mine = [name for name, _ in shares(files, ranks.world)[ranks.rank]]
    for names in (mine, [MANIFEST] if ranks.first else []):
        with same_outcome(ranks, group):
            _put(folder, names, url)


def _begin(folder: Path, url: str) -> dict[str, Written]:
    """What is to be copied. The manifest of an older copy by that name goes first: it would be of other files."""
    import fsspec

    store, base = fsspec.core.url_to_fs(url)
    old = f"{base}/{folder.name}/{MANIFEST}"
    if store.exists(old):
        store.rm(old)
    return read_manifest(folder).files


def _put(folder: Path, names: list[str], url: str) -> None:
    import fsspec

    for name in names:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                files, base = fsspec.core.url_to_fs(url)
                files.makedirs(f"{base}/{folder.name}", exist_ok=True)
                files.put_file(str(folder / name), f"{base}/{folder.name}/{name}")
                break
            except Exception as error:  # of any kind: each store has its own
                if attempt == ATTEMPTS:
                    said = f"{folder / name} cannot be copied to {url} ({type(error).__name__}: {error})"
                    raise RuntimeError(said) from error
                time.sleep(PAUSE_SECONDS * attempt)
