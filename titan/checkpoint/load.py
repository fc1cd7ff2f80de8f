"""A model to use, in one process: from a committed step, from a run's folder (its newest step), or from Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from titan import zoo
from titan.checkpoint.about import read_about, tokenizer_spec
from titan.checkpoint.commit import step_of
from titan.checkpoint.huggingface import load_hf_weights, load_step_weights, read_hf
from titan.checkpoint.manifest import check_sizes
from titan.data.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Loaded:
    """A model with what it takes to feed it."""

    model: nn.Module
    core: str
    """Glob of its attention cores."""
    tokenizer: Tokenizer
    start: int
    """The token before a document's first."""


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Model and tokenizer from a folder, tensor by tensor. Raises CheckpointError, ValueError or FileNotFoundError."""
    folder = step_of(folder)
    if (folder / "config.json").is_file():
        about, spec = read_hf(folder)
        fill = load_hf_weights
    else:
        check_sizes(folder)  # reading all of it, optimizer states too, would take longer than the rest
        about = read_about(folder)
        spec, fill = tokenizer_spec(folder, about), load_step_weights
    with torch.device("meta"):
        model = zoo.make(about.model, about.config)
    model.to(dtype).to_empty(device=device)
    fill(model, folder)
    core = zoo.sharding(about.model, about.config).core
    return Loaded(model.eval(), core, load_tokenizer(spec), about.document_start)
