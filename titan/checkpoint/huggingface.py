"""What is in a Hugging Face folder, and weights from there or from a committed step into a model, block by block.

    config.json                      what the model is, in transformers' words
    model.safetensors                its weights, or, past a size, model-00001-of-00002.safetensors, ... and
    model.safetensors.index.json     which file holds which tensor
    tokenizer.json, tokenizer.model  what its numbers stand for

Such a folder comes from outside: no pickle is read, no code that it brings is run, a name in its index is a file's in it. What
titan cannot express is refused, by the model's own hf.py, which also has the names. One of their tensors is one of ours, or
several joined along their outputs (GPT-2's q, k and v), perhaps transposed; on disk that is a matter of strides (blocks.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from titan import zoo
from titan.checkpoint.about import About, read_about
from titan.checkpoint.blocks import Stored, joined, open_file, open_folder
from titan.checkpoint.manifest import MANIFEST, CheckpointError, is_plain_name, read_json, verify
from titan.data.tokenizer import FILES, load_tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_hf(folder: Path) -> tuple[About, str]:
    """What a Hugging Face folder is, and what `load_tokenizer` takes for its tokenizer.

    CheckpointError where it is no model that titan has.
    """
    path = folder / CONFIG
    if not path.is_file():
        hint = ": it is a titan checkpoint already" if (folder / MANIFEST).is_file() else ""
        raise CheckpointError(f"{folder} holds no {CONFIG}, so it is not a Hugging Face model folder{hint}")
    raw = read_json(path)
    name, hf = _model(raw, path)
    try:
        config = hf.from_hf(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    tokenizer_file = next((file for file in FILES if (folder / file).is_file()), None)
    if tokenizer_file is None:
        raise CheckpointError(
            f"{folder} holds neither {' nor '.join(FILES)}: without its tokenizer nobody knows what the model's numbers "
            "stand for. Put the tokenizer's files beside the weights, as they were published"
        )
    tokenizer = load_tokenizer(str(folder / tokenizer_file))
    if tokenizer.vocab_size > config.vocab_size:
        said = f"vocab_size is {config.vocab_size}, fewer than the {tokenizer.vocab_size} tokens of {folder / tokenizer_file}"
        raise CheckpointError(f"{path}: {said}; they do not belong together")
    start = raw.get("bos_token_id")
    if start is None:
        start = tokenizer.document_end
    if type(start) is not int or not 0 <= start < config.vocab_size:
        raise CheckpointError(f"{path}: bos_token_id is {start!r}, expected one token of the {config.vocab_size}")
    return About(name, config, tokenizer_file, tokenizer.fingerprint, start), str(folder / tokenizer_file)


def open_hf(folder: Path) -> tuple[About, dict[str, Stored]]:
    """`read_hf`'s About, and the weights on disk by our names. CheckpointError where they are not just that model's."""
    about, _ = read_hf(folder)
    hf = zoo.hugging_face(about.model)
    assert hf is not None
    names, shapes = hf.tensor_names(about.config), _shapes(about)
    known = {*names.values(), *hf.copies(about.config)}
    found = _full_names(_open_weights(folder, hf.IGNORED), known, hf.BASE)
    copies = {extra: names[ours] for extra, ours in hf.copies(about.config).items() if extra in found and names[ours] in found}
    parts = _parts(hf, about)
    expected = {part.theirs: part.shape(shapes) for part in parts}
    _require(folder, {key: tensor for key, tensor in found.items() if key not in copies}, expected)
    for extra, original in copies.items():
        if not _equal(found[extra], found[original]):
            raise CheckpointError(f"{folder}: the config ties the embeddings, but {extra} is there and differs from {original}")
    return about, {ours: tensor for part in parts for ours, tensor in part.split(found[part.theirs], shapes).items()}


def _any_match(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _full_names(found: Mapping[str, Stored], known: set[str], base: str) -> dict[str, Stored]:
    """The tensors by their full names, which the folder of a model that was saved without its head leaves the base out of."""
    lacking = {name for name in found if name not in known and base + name in known and base + name not in found}
    return {base + name if name in lacking else name: tensor for name, tensor in found.items()}


def _model(raw: Mapping[str, Any], path: Path) -> tuple[str, ModuleType]:
    known = {name: hf for name in zoo.names() if (hf := zoo.hugging_face(name)) is not None}
    for name, hf in known.items():
        if raw.get("model_type") == hf.MODEL_TYPE:
            return name, hf
    types = ", ".join(hf.MODEL_TYPE for hf in known.values())
    raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}; titan has a model for {types}")


def _open_weights(folder: Path, ignored: Iterable[str]) -> dict[str, Stored]:
    """The tensors of the folder's safetensors files by their names, but for those that globs say to ignore."""
    if (folder / WEIGHTS).is_file():
        tensors = open_file(folder / WEIGHTS)
    elif (folder / WEIGHTS_INDEX).is_file():
        path = folder / WEIGHTS_INDEX
        places = read_json(path).get("weight_map")
        if not isinstance(places, dict) or not all(map(is_plain_name, places.values())):
            raise CheckpointError(f"{path}: weight_map is not tensors to plain file names in this folder; do not trust it")
        files = {file: open_file(folder / file) for file in sorted(set(places.values()))}
        lost = [name for name, file in places.items() if name not in files[file]]
        if lost:
            raise CheckpointError(f"{folder / places[lost[0]]}: {lost[0]} should be in it by {path.name}; fetch the file again")
        tensors = {name: files[file][name] for name, file in places.items()}
    elif any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder} holds its weights as pytorch_model.bin, a pickle, which can run code when it is read. Take the folder's "
            "safetensors version, or let transformers write one: model.save_pretrained(...)"
        )
    else:
        raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    tensors = {name: tensor for name, tensor in tensors.items() if not _any_match(ignored, name)}
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{folder}: {name} is {tensor.dtype}: quantised, or no weight; take the unquantised folder")
    return tensors


def _equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors on disk are equal to the bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a.blocks(), b.blocks(), strict=True))


# Their tensors and ours


@dataclass(frozen=True)
class Part:
    """One of their tensors, and what it is of ours: these joined along their rows (a matrix's outputs), then transposed."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of theirs, given those of ours."""
        joint = (sum(shapes[name][0] for name in self.ours), *shapes[self.ours[0]][1:])
        return joint[::-1] if self.transposed else joint

    def join(self, tensors: Mapping[str, Stored]) -> Stored:
        """Theirs, from ours."""
        joint = joined([tensors[name] for name in self.ours])
        return joint.transposed() if self.transposed else joint

    def split(self, theirs: Stored, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
        """Ours, from theirs."""
        joint = theirs.transposed() if self.transposed else theirs
        ends = list(accumulate(shapes[name][0] for name in self.ours))
        return {name: joint.cut(end - shapes[name][0], end) for name, end in zip(self.ours, ends, strict=True)}


def _parts(hf: ModuleType, about: About) -> list[Part]:
    """Their tensors, in the order of ours."""
    together: dict[str, list[str]] = {}
    for ours, theirs in hf.tensor_names(about.config).items():
        together.setdefault(theirs, []).append(ours)
    return [Part(theirs, tuple(ours), _any_match(hf.TRANSPOSED, theirs)) for theirs, ours in together.items()]


def as_theirs(hf: ModuleType, about: About, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """A model's tensors on disk under their names and in their shapes, given ours."""
    return {part.theirs: part.join(tensors) for part in _parts(hf, about)}


# From a committed step


def open_step(folder: Path) -> tuple[About, dict[str, Stored]]:
    """What a committed folder is, and its weights on disk by name."""
    verify(folder)
    about = read_about(folder)
    tensors = {n.removeprefix("model."): tensor for n, tensor in open_folder(folder).items() if n.startswith("model.")}
    _require(folder, tensors, _shapes(about))
    return about, tensors


# Into a model


def load_hf_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model's parameters, in place and in their own dtype, from a Hugging Face folder.

    CheckpointError, before any is touched, where the folder holds another model.
    """
    _fill(model, folder, open_hf(folder)[1])


def load_step_weights(model: nn.Module, folder: Path) -> None:
    """The same from a committed step's folder."""
    _fill(model, folder, open_step(folder)[1])


def _fill(model: nn.Module, folder: Path, tensors: Mapping[str, Stored]) -> None:
    parameters = dict(model.named_parameters())
    _require(folder, tensors, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        row = 0
        for block in tensors[name].blocks():
            parameter.detach()[row : row + len(block)].copy_(block)
            row += len(block)


def _shapes(about: About) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = zoo.make(about.model, about.config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _require(folder: Path, tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Exactly these names in exactly these shapes."""
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in shapes]
    wrong += [
        f"{name} is {tensor.shape}, expected {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{folder} does not hold the model that its config describes: {'; '.join(wrong[:5])}{more}")
