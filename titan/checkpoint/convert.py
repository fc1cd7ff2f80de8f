"""A checkpoint written as a Hugging Face folder, and a Hugging Face folder written as a checkpoint to start from.

Names and shapes are the model's hf.py's. Tensors go through memory in runs of rows, so that a model of any size takes a few
hundred megabytes. The result appears under its name in one rename: whole, or not at all.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from titan import zoo
from titan.checkpoint import index
from titan.checkpoint.about import About, tokenizer_spec, write_about
from titan.checkpoint.blocks import Kind, Stored, write_blocks
from titan.checkpoint.commit import seal
from titan.checkpoint.huggingface import CONFIG, WEIGHTS, WEIGHTS_INDEX, as_theirs, open_hf, open_step
from titan.checkpoint.manifest import CheckpointError, Written, write_json
from titan.data.tokenizer import load_tokenizer
from titan.data.tokenizer_json import hf_tokenizer_files
from titan.files import fsync, temporary_folder
from titan.progress import ProgressBar, size_words
from titan.terminal import plural

GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000

Report = Callable[[str], None]


def export_hf(step: Path, out: Path, dtype: torch.dtype, report: Report, shard_bytes: int = SHARD_BYTES) -> About:
    """Write a committed step's model as the Hugging Face folder `out`, in files of `shard_bytes` at most where tensors allow.

    `report` gets lines for people. CheckpointError where the step cannot be trusted, `out` is there already or the disk
    refuses: nothing is then at `out`.
    """
    about, tensors = open_step(step)
    hf = zoo.hugging_face(about.model)
    if hf is None:
        raise CheckpointError(
            f"{step} is a {about.model}, which has no Hugging Face names: there is no models/{about.model}/hf.py"
        )
    tokenizer = load_tokenizer(tokenizer_spec(step, about))
    theirs = as_theirs(hf, about, tensors)
    sizes = {name: math.prod(tensor.shape) * dtype.itemsize for name, tensor in theirs.items()}
    special = {"bos_token_id": about.document_start, "eos_token_id": tokenizer.document_end}
    with _new_folder(out, sum(sizes.values())) as temp:
        shards = split(sizes, shard_bytes)
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        files = files if len(shards) > 1 else [WEIGHTS]
        _write_files(temp, dict(zip(files, shards, strict=True)), theirs, dtype, "export", report)
        if len(shards) > 1:
            places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            write_json(temp / WEIGHTS_INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})
        # transformers 5 calls it dtype, and reads the older word too.
        write_json(temp / CONFIG, hf.to_hf(about.config) | special | {"torch_dtype": str(dtype).removeprefix("torch.")})
        write_json(temp / GENERATION, special)
        for name, content in hf_tokenizer_files(tokenizer, about.document_start).items():
            (temp / name).write_bytes(content)
        for path in temp.iterdir():
            fsync(path)
        fsync(temp)
        os.rename(temp, out)
        fsync(out.parent)
    return about


def import_hf(folder: Path, out: Path, report: Report, shard_bytes: int = SHARD_BYTES) -> About:
    """Write a Hugging Face folder's model as the committed folder `out`, float32, at step 0: what checkpoint.load takes.

    CheckpointError where the folder is no model that titan has, or not a whole one, or `out` is there already: nothing is
    then at `out`.
    """
    about, tensors = open_hf(folder)
    tokenizer = load_tokenizer(tokenizer_spec(folder, about))
    ours = {f"model.{name}": tensor for name, tensor in tensors.items()}
    sizes = {name: math.prod(tensor.shape) * torch.float32.itemsize for name, tensor in ours.items()}
    keys = {name: f"{name}@{','.join('0' for _ in tensor.shape)}" for name, tensor in ours.items()}
    with _new_folder(out, sum(sizes.values())) as temp:
        shards = {f"shard-{i:05d}.safetensors": names for i, names in enumerate(split(sizes, shard_bytes))}
        held = {file: [keys[name] for name in names] for file, names in shards.items()}
        by_key = {keys[name]: tensor for name, tensor in ours.items()}
        written = _write_files(temp, held, by_key, torch.float32, "import", report)
        entries = {}
        for file, name in ((file, name) for file, names in shards.items() for name in names):
            shape = ours[name].shape
            chunk = {"offsets": [0] * len(shape), "shape": shape, "file": file, "key": keys[name]}
            entries[name] = {"dtype": index.NAMES[torch.float32], "shape": shape, "chunks": [chunk]}
        files = {file: {"bytes": held.bytes} for file, held in written.items()}
        write_json(temp / index.INDEX, {"format": index.FORMAT, "version": index.VERSION, "files": files, "tensors": entries})
        about = replace(about, tokenizer=next(iter(tokenizer.files), "bytes"))
        write_about(temp, about, tokenizer.files)
        seal(temp, out, 0, written)
    return about


# Files


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in runs of at most `limit` bytes together, in order. A tensor is never cut: a larger one has a run of its own."""
    runs: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not runs or size > room:
            runs.append([])
            room = limit
        runs[-1].append(name)
        room -= size
    return runs


def _write_files(
    folder: Path, files: Mapping[str, list[str]], tensors: Mapping[str, Stored], dtype: torch.dtype, what: str, report: Report
) -> dict[str, Written]:
    """Write tensors, in this dtype, into files (name -> tensors); returns what these hold."""
    total = sum(math.prod(tensors[name].shape) for names in files.values() for name in names) * dtype.itemsize
    report(f"{what}: {size_words(total)} in {str(dtype).removeprefix('torch.')}, {plural(len(files), 'file')}")
    progress = ProgressBar(total, what, report)

    def convert(block: Tensor) -> Tensor:
        progress.add(block.numel() * dtype.itemsize)
        return block.to(dtype)

    def write(file: str, names: list[str]) -> Written:
        entries: dict[str, Kind] = {name: (dtype, tensors[name].shape) for name in names}
        return write_blocks(folder / file, entries, lambda name: map(convert, tensors[name].blocks()), {"format": "pt"})

    try:
        return {file: write(file, names) for file, names in files.items()}
    finally:
        progress.close()


@contextmanager
def _new_folder(out: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `out` with room for `size` bytes, to be renamed to it."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out} is there already, and is left as it is: name another folder, or move it away")
    try:
        with temporary_folder(out) as temp:
            free = shutil.disk_usage(temp).free
            if free < size:
                raise CheckpointError(f"{out.parent}: {size_words(size)} are needed, {size_words(free)} are free")
            yield temp
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from error
