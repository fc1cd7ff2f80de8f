"""A run's data, put together: each source prepared, opened and cut into windows, all of them mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from titan.config import Data, Source, Training
from titan.data.dataset import TokenDataset
from titan.data.foreign import Unsaid
from titan.data.formats import token_files
from titan.data.mixture import Mixture, Samples, Stage
from titan.data.prepare import ALL, TRAIN, PieceShare, prepare
from titan.data.tokenizer import Tokenizer, load_tokenizer
from titan.data.windows import Joined, Windows, windows


def prepared_tokenizer(data: Data) -> Tokenizer:
    """The tokenizer of what `prepare_sources` returned."""
    trained = data.tokenizer.startswith(TRAIN)
    return load_tokenizer(str(Path(data.path) / "tokenizer.model") if trained else data.tokenizer)


@dataclass(frozen=True)
class Splits:
    """A run's data."""

    train: Samples
    validation: Samples | None
    """All sources' held-out samples."""
    tokens_per_byte: float | None
    """Of the held-out text; None where it is not known, or where not all of it counts."""


def prepare_sources(
    data: Data, report: Callable[[str], None], workers: int | None = None, share: PieceShare = ALL
) -> Data:
    """The same with each source's tokens as its path; what is still text is prepared. Arguments and errors as `prepare`."""

    def folder(source: Source) -> str:
        try:
            return str(prepare(source, data, report, workers, share))
        except ValueError as error:
            key, _, why = str(error).partition(": ")
            if data.sources and key in ("data.path", "data.column", "data.content"):
                about = "" if key == "data.path" else f"{key.removeprefix('data.')}: "
                raise ValueError(f"data.sources: {source.name}: {about}{why}") from error
            raise

    if not data.sources:
        return replace(data, path=folder(*data.all_sources))
    return replace(data, sources=[replace(source, path=folder(source)) for source in data.sources])


def open_splits(data: Data, tokenizer: Tokenizer, training: Training, validate: bool) -> Splits:
    """What `prepare_sources` returned as samples; each source has one, at least, in each split that is asked for.

    Packs them, where the config wants that and it has not been done. Raises ValueError, naming the key to change.
    """
    unsaid = Unsaid(tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.document_end, data.dtype)

    def opened(split: str) -> dict[str, Windows]:
        paths = {source.name: Path(source.path) for source in data.all_sources}
        return {name: _open_split(path, split, data, unsaid, training.seq_len) for name, path in paths.items()}

    for source in data.all_sources if validate else ():
        _require_held_out(Path(source.path))
    firsts = [0, *(step * training.global_batch_size for step in data.stages)]
    weights = zip(*((source.weight, *source.later_weights) for source in data.all_sources), strict=True)
    mixture = Mixture([Stage(first, stage) for first, stage in zip(firsts, weights, strict=True)])
    train = Samples(opened("train"), training.seed, mixture)
    _require_within_epochs(train, data, training)
    if not validate:
        return Splits(train, None, None)
    parts = opened("validation")
    # Shuffled, since documents lie in the order of their names; by one seed, since runs are to be compared.
    held_out = Samples(parts if len(parts) == 1 else {"all": Joined(list(parts.values()))}, seed=0)
    sizes = [None if split.masked else split.bytes for split in held_out.datasets]
    known = sum(size for size in sizes if size is not None)
    return Splits(train, held_out, None if None in sizes else sum(split.tokens for split in held_out.datasets) / known)


def _open_split(folder: Path, split: str, data: Data, unsaid: Unsaid, seq_len: int) -> Windows:
    opened = TokenDataset(folder, split, unsaid, data.validation_share)
    try:
        return windows(opened, data, seq_len)
    except OSError as error:
        raise ValueError(f"data.cache: {data.cache} cannot be written ({error}); name a folder that can") from error


def _require_held_out(folder: Path) -> None:
    if token_files(folder)[0].suffix == ".tokens" and not any(folder.glob("validation-*.tokens")):
        raise ValueError(
            f"validation.interval: {folder} holds nothing to validate on (of one document nothing is held out);"
            " give two documents or more, or set --validation.interval=0"
        )


def _require_within_epochs(train: Samples, data: Data, training: Training) -> None:
    read = train.mixture.done(training.steps * training.global_batch_size)
    for source, samples, cut in zip(data.all_sources, read, train.windows, strict=True):
        epochs = samples / cut.count
        if source.max_epochs and epochs > source.max_epochs:
            said = f"{source.name} would be read {epochs:.2f} times, and its max_epochs is {source.max_epochs:g}"
            raise ValueError(f"data.sources: in {training.steps} steps {said}; give it less weight or train fewer steps")
