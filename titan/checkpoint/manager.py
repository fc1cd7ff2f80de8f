"""What a job saves and how it goes on: the newest committed step wins, with everything in it.

Tensors (weights, and the optimizer's states by parameter name) go through `titan.checkpoint.storage`; everything else is in
state.json: the step, the position in the data as one integer, and what the run must keep to have the same future. The
schedule is a function of the step and dropout one of (seed, step, place), so there is nothing of them to save.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from titan.build import Parts
from titan.checkpoint.about import About, read_about, refuse_another_model, write_about
from titan.checkpoint.commit import CheckpointError, begin, commit, newest, read_json, read_manifest, sweep, verify, write_json
from titan.checkpoint.index import tensor_names
from titan.checkpoint.storage import load_tensors, save_tensors
from titan.config import Config
from titan.data.tokenizer import Tokenizer
from titan.layout import Block, block
from titan.optim import state_tensors
from titan.ranks import Ranks, on_first, same_outcome
from titan.toml import ConfigError

STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    samples: int = 0
    """Global samples consumed: the next one's index."""
    tokens: int = 0
    """Positions trained on."""


class Manager:
    """Saves and loads the checkpoints of one run."""

    def __init__(
        self, output: Path, ranks: Ranks, parts: Parts, identity: dict[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        """identity: JSON facts that a resume must find unchanged (model, data, seed): else it is another run."""
        self.root = output / "checkpoints"
        self.ranks = ranks
        self.parts = parts
        self.identity = identity
        self.tokenizer = tokenizer
        self.about = About(
            config.model.name,
            config.model.config,
            next(iter(tokenizer.files), "bytes"),
            tokenizer.fingerprint,
            tokenizer.document_end,
        )
        # Plans and barriers go between hosts, on a group of their own, so that a save can go on beside training.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.job.timeout_seconds))

    def resume(self, load: str = "") -> Progress:
        """Load the newest step of this run and return its progress; without one, take weights alone from `load`, if given."""
        folder, state = on_first(self.ranks, self._find)
        if folder is not None:
            self._load(self._tensors(), folder)
            self._start_documents_as(on_first(self.ranks, lambda: read_about(folder)))
            return Progress(**state["progress"])
        if load:
            on_first(self.ranks, lambda: verify(Path(load)))
            self._start_documents_as(on_first(self.ranks, lambda: self._of_this_model(Path(load))))
            self._load(self._placed(weights(self.parts.model)), Path(load))
        return Progress()

    def save(self, progress: Progress) -> Path:
        """Write and commit a step; returns its folder once it is on disk. An error is raised on every rank."""
        root, rank = self.root, self.ranks.rank
        with same_outcome(self.ranks):
            temp = begin(root, progress.step, rank, lambda: dist.barrier(group=self.group))
        save_tensors(self._tensors(), temp, self.group)
        return on_first(self.ranks, lambda: self._commit(temp, progress))

    def _find(self) -> tuple[Path | None, dict[str, Any]]:
        """On rank 0: clear up after a crash, and look for the step to go on from."""
        sweep(self.root)
        folder = newest(self.root)
        for path in sorted(self.root.glob("step-*")):
            if folder is None or path.name > folder.name:
                _refuse_to_rewind(path, folder)
        if folder is None:
            return None, {}
        verify(folder)
        state = read_json(folder / STATE)
        self._refuse_another_run(folder, state)
        return folder, state

    def _of_this_model(self, folder: Path) -> About:
        return refuse_another_model(folder, self.about.model, self.about.config, self.about.fingerprint)

    def _start_documents_as(self, there: About) -> None:
        """The token before a document's first comes with the weights: an imported model may have one of its own."""
        self.about = replace(self.about, document_start=there.document_start)

    def _commit(self, temp: Path, progress: Progress) -> Path:
        write_about(temp, self.about, self.tokenizer.files)
        write_json(temp / STATE, {"progress": asdict(progress), "identity": self.identity})
        return commit(temp)

    def _tensors(self) -> dict[str, Tensor | Block]:
        tensors = weights(self.parts.model) | state_tensors(self.parts.model, self.parts.optimizer)
        return self._placed(tensors)

    def _placed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor | Block]:
        """Tensors by their names in a checkpoint, those that tensor parallelism has cut with their place in the whole."""
        cuts = {name: self.parts.cuts.get(name.split(".", 1 if name.startswith("model.") else 2)[-1]) for name in tensors}
        return {name: tensor if cuts[name] is None else block(tensor, cuts[name]) for name, tensor in tensors.items()}

    def _load(self, tensors: dict[str, Tensor | Block], folder: Path) -> None:
        stored = on_first(self.ranks, lambda: tensor_names(folder))
        known = {f"model.{name}" for name, _ in self.parts.whole.named_parameters()}
        extra = sorted(name for name in stored if name.startswith("model.") and name not in known)
        if extra:
            raise CheckpointError(f"{folder} holds weights that this model has no place for: {', '.join(extra[:5])}")
        load_tensors(tensors, folder, self.group)

    def _refuse_another_run(self, folder: Path, state: dict[str, Any]) -> None:
        saved = state.get("identity", {})
        changed = [
            f"{key} is {_short(saved.get(key))} there, {_short(value)} here"
            for key, value in self.identity.items()
            if saved.get(key) != value
        ]
        if changed:
            fits = f"put it back, or name a new folder (--job.output=...); --checkpoint.load={folder} takes the weights along"
            raise ConfigError(f"job.output: {folder} belongs to another run: {'; '.join(changed)}; {fits}")


def _short(value: object) -> object:
    """A fingerprint by its first digits; anything else as it is."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def _refuse_to_rewind(path: Path, folder: Path | None) -> None:
    """A newer step that cannot be read must not silently cost the steps since an older one."""
    try:
        read_manifest(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Move {path} away to go on from {folder or 'step 0'}") from error


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters under the names that they have in a checkpoint. A tied weight has one name, the embedding's."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
