"""What a job saves and how it goes on: the newest whole step wins, with everything in it.

Tensors (weights, and the optimizer's states by parameter name) go through `titan.checkpoint.storage`; everything else is in
state.json: the step, the position in the data as one integer, and what the run must keep to have the same future. The
schedule is a function of the step and dropout one of (seed, step, place), so there is nothing of them to save, and no random
state. config.toml is the config that it was saved under, to tell what has changed since.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from titan import toml
from titan.build import Parts
from titan.checkpoint.about import About, read_about, refuse_another_model, write_about
from titan.checkpoint.commit import begin, commit, sweep
from titan.checkpoint.copy import copy_step
from titan.checkpoint.find import newest_whole, what_is_wrong
from titan.checkpoint.index import tensor_names
from titan.checkpoint.manifest import CheckpointError, read_json, write_json
from titan.checkpoint.retention import STATE, prune
from titan.checkpoint.saving import Write
from titan.checkpoint.staging import Staging
from titan.checkpoint.storage import load_tensors, save_tensors
from titan.config import Config
from titan.data.mixture import PERIOD
from titan.data.tokenizer import Tokenizer
from titan.fields import ACCEPTABLE
from titan.layout import Block, block
from titan.optim import state_tensors
from titan.ranks import Ranks, on_first, same_outcome, say
from titan.terminal import warn
from titan.toml import ConfigError
from titan.toml_diff import changes

CONFIG = "config.toml"


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    samples: int = 0
    """Global samples consumed: the next one's index."""
    tokens: int = 0
    """Positions trained on."""


class Manager:
    """What the checkpoints of one run hold."""

    def __init__(
        self, output: Path, ranks: Ranks, parts: Parts, identity: dict[str, Any], config: Config, tokenizer: Tokenizer
    ) -> None:
        """identity: JSON facts by config key that a resume must find unchanged (model, data, seed): else it is another run."""
        self.root = output / "checkpoints"
        self.ranks = ranks
        self.parts = parts
        self.identity = identity
        self.config = config
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
        # Whoever is done with its part of a copy waits for the slowest upload: that may take hours, and must not end the saves.
        self.copying = dist.new_group(backend="gloo", timeout=timedelta(days=2)) if config.checkpoint.copy_to else None
        self.staging = Staging()
        self.before_writing: Callable[[int], None] = lambda step: None
        """Called on each rank as a step's files are about to be written; an error there is the save's."""
        self.counters: Callable[[int], dict[str, float]] = lambda samples: {}
        """What a number of samples comes to, source by source: for people who look into a step."""
        self.losses: list[float] = []
        """Of a run that goes on: the last ones that its guard had accepted."""
        self.was_validated = False
        """Whether the step that it goes on from was."""

    def resume(self, load: str = "") -> Progress:
        """Load the newest whole step of this run and return its progress; without one, take weights alone from `load`."""
        folder = newest_whole(self.root, self.ranks)
        if folder is not None:
            state = on_first(self.ranks, lambda: self._of_this_run(folder))
            self._load(self._tensors(), folder)
            self._start_documents_as(on_first(self.ranks, lambda: read_about(folder)))
            self.losses = [float(loss) for loss in state.get("losses", [])]
            self.was_validated = state.get("validation_loss") is not None
            return Progress(**state["progress"])
        if load:
            reason = what_is_wrong(Path(load), self.ranks)
            if reason is not None:
                raise CheckpointError(f"checkpoint.load: {reason}")
            self._start_documents_as(on_first(self.ranks, lambda: self._of_this_model(Path(load))))
            self._load(self._placed(weights(self.parts.model)), Path(load))
        return Progress()

    def prepare(
        self, progress: Progress, validation_loss: float | None, losses: list[float], copy: bool, hurry: bool = False
    ) -> Write:
        """What writes a step. copy: of the tensors as they are now, so that they may change before it is called.
        losses: the last accepted ones, for the next start's guard. hurry: there is no time for checkpoint.copy_to.

        What it raises it raises on every rank; nothing is then left of the step.
        """
        tensors = self._tensors()
        if copy:
            with same_outcome(self.ranks, self.group):  # one may lack the memory
                tensors = self.staging.copy(tensors)
        if validation_loss is not None and not math.isfinite(validation_loss):
            validation_loss = None  # JSON has no word for it
        state = {"progress": asdict(progress), "identity": self.identity, "validation_loss": validation_loss, "losses": losses}
        state |= {"sources": self.counters(progress.samples)}
        about = self.about

        def write() -> Path:
            try:
                with same_outcome(self.ranks, self.group):
                    temp = begin(self.root, progress.step, self.ranks.rank, lambda: dist.barrier(group=self.group))
                    self.before_writing(progress.step)
                written = save_tensors(tensors, temp, self.group)

                def complete() -> Path:
                    write_about(temp, about, self.tokenizer.files)
                    (temp / CONFIG).write_text(toml.dump(self.config, describe=False))
                    write_json(temp / STATE, state)
                    return commit(temp, written)

                folder = on_first(self.ranks, complete, self.group)
            except Exception:
                if self.ranks.first:
                    sweep(self.root)  # its room may be all there is
                raise
            if self.copying is not None:
                self._copy(folder, self.copying, hurry)
            if self.ranks.first:
                self._prune()
            return folder

        return write

    def _copy(self, folder: Path, group: dist.ProcessGroup, hurry: bool) -> None:
        try:
            if hurry:
                raise RuntimeError("the job is asked to stop, and the copy may take longer than there is time")
            copy_step(folder, self.config.checkpoint.copy_to, self.ranks, group)
        except Exception as error:  # the step itself is safe
            if self.ranks.first:
                warn(f"{folder.name} is saved, but not copied: {error}")

    def _prune(self) -> None:
        try:
            prune(self.root, self.config.checkpoint)
        except OSError as error:
            warn(f"{self.root}: an old step cannot be removed ({error})")

    def _of_this_run(self, folder: Path) -> dict[str, Any]:
        """On rank 0: a step's state, after a look at what has changed since."""
        state = read_json(folder / STATE)
        now = toml.dump(self.config, describe=False)
        self._refuse_another_run(folder, state)
        for line in changes((folder / CONFIG).read_text(encoding="utf-8"), now):
            say(self.ranks, f"changed since {folder.name}: {line}")
        return state

    def _of_this_model(self, folder: Path) -> About:
        return refuse_another_model(folder, self.about.model, self.about.config, self.about.fingerprint)

    def _start_documents_as(self, there: About) -> None:
        """The token before a document's first comes with the weights: an imported model may have one of its own."""
        self.about = replace(self.about, document_start=there.document_start)

    def _tensors(self) -> dict[str, Block]:
        return self._placed(weights(self.parts.model) | state_tensors(self.parts.model, self.parts.optimizer))

    def _placed(self, tensors: dict[str, Tensor]) -> dict[str, Block]:
        """Tensors by their names in a checkpoint, each with its place in the whole."""
        cuts = {name: self.parts.cuts.get(name.split(".", 1 if name.startswith("model.") else 2)[-1]) for name in tensors}
        return {name: block(tensor, cuts[name]) for name, tensor in tensors.items()}

    def _load(self, tensors: dict[str, Block], folder: Path) -> None:
        stored = on_first(self.ranks, lambda: tensor_names(folder))
        known = {f"model.{name}" for name, _ in self.parts.whole.named_parameters()}
        extra = sorted(name for name in stored if name.startswith("model.") and name not in known)
        if extra:
            raise CheckpointError(f"{folder} holds weights that this model has no place for: {', '.join(extra[:5])}")
        load_tensors(tensors, folder, self.group)

    def _refuse_another_run(self, folder: Path, state: dict[str, Any]) -> None:
        samples, accepted = state["progress"]["samples"], self.config.checkpoint.accept_changes
        saved = {"data.packing": "contiguous", "data.sources": [[0, PERIOD]]}  # in steps that are older than these keys
        saved |= state.get("identity", {})

        def so_far(value: Any) -> Any:
            """Of stages, those that have begun: what comes later may still be changed."""
            return [stage for stage in value if stage[0] == 0 or stage[0] < samples] if isinstance(value, list) else value

        here = {key: so_far(value) for key, value in self.identity.items()}
        changed = {key: value for key, value in here.items() if so_far(saved.get(key)) != value and key not in accepted}
        if not changed:
            return
        there = {key: _short(so_far(saved.get(key))) for key in changed}
        said = "; ".join(f"{key} is {there[key]} there, {_short(value)} here" for key, value in changed.items())
        fits = f"put it back, or name a new folder (--job.output=...); --checkpoint.load={folder} takes the weights along"
        if changed.keys() <= set(ACCEPTABLE):
            named = ", ".join(f'"{key}"' for key in changed)
            fits += f"; or go on all the same, on other data than it would have seen: --checkpoint.accept_changes='[{named}]'"
        raise ConfigError(f"job.output: {folder} belongs to another run: {said}; {fits}")


def _short(value: object) -> object:
    """A fingerprint by its first digits; anything else as it is."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters under the names that they have in a checkpoint. A tied weight has one name, the embedding's."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
