"""Text from a model: one token at a time, each drawn from what the model says of the next.

A token's keys and values do not change when later tokens come, so they are kept (the KV cache) and each new token costs one
forward pass over itself alone: S passes of 1 token instead of 1 + 2 + ... + S. The model knows nothing of this. Its attention
cores, q, k, v in and values out, are replaced for the while by cores that remember.

Prompts of different lengths go together: padded at their ends, where causal attention lets no earlier token look, and each
row writes its next token over its padding.

Drawing: logits over a temperature, softmax, then from the smallest set of likeliest tokens that holds `top_p` of
the probability (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751). Each row has random numbers of its own: what a
prompt gives does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan.data.tokenizer import Tokenizer
from titan.sharding import matching, replace_module

PREFILL = 512  # prompt tokens that go through the model at once, which bounds their logits


@dataclass
class Place:
    """Where the tokens at hand stand, worked out once for all cores, without waiting for the device."""

    capacity: int
    """Tokens of the longest row when it is done."""
    positions: Tensor = field(init=False)
    """int64 [batch, new tokens]"""
    seen: Tensor = field(init=False)
    """bool [batch, 1, new tokens, keys so far]: which keys each may attend to."""

    def move(self, positions: Tensor, end: int) -> None:
        """On to these positions; `end` is one past the largest."""
        self.positions = positions
        self.seen = (torch.arange(end, device=positions.device) <= positions[:, :, None])[:, None]


class RememberingCore(nn.Module):
    """Causal attention over all tokens so far. q, k, v: [batch, new tokens, heads, head_dim]; returns q's shape."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        assert document_ids is None, "a prompt is one document"
        if self.keys is None or self.values is None:
            self.keys = k.new_zeros(len(k), self.place.capacity, *k.shape[2:])
            self.values = torch.zeros_like(self.keys)
        at, seen = self.place.positions, self.place.seen
        rows = torch.arange(len(at), device=at.device)[:, None]
        self.keys[rows, at], self.values[rows, at] = k, v
        so_far = seen.shape[-1]
        q, k, v = (x.transpose(1, 2) for x in (q, self.keys[:, :so_far], self.values[:, :so_far]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


@contextmanager
def remembering(model: nn.Module, core: str, place: Place) -> Iterator[None]:
    """The model with its attention cores (a glob of module names) replaced, for a while."""
    modules = dict(model.named_modules())
    replaced = {name: modules[name] for name in matching(core, modules)}
    try:
        for name in replaced:
            replace_module(model, name, RememberingCore(place))
        yield
    finally:
        for name, module in replaced.items():
            replace_module(model, name, module)


@dataclass(frozen=True)
class Draw:
    """How a token is chosen. vocab_size: tokens that the tokenizer knows; a model may have more rows."""

    temperature: float
    top_p: float
    seed: int
    vocab_size: int

    def generators(self, rows: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.seed) for _ in range(rows)]

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """A token for each row of logits, [batch, vocabulary]."""
        logits = logits[:, : self.vocab_size].float().cpu().nan_to_num()  # what a model that has diverged says is noise
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        below = logits - logits.amax(-1, keepdim=True)  # at most 0: no temperature makes it infinite
        shares, tokens = (below / self.temperature).softmax(-1).sort(-1, descending=True)
        shares[shares.cumsum(-1) - shares >= self.top_p] = 0
        picks = [torch.multinomial(row, 1, generator=own) for row, own in zip(shares, generators, strict=True)]
        return tokens.gather(-1, torch.stack(picks))[:, 0].tolist()


@torch.no_grad()
def generate(
    model: nn.Module,
    core: str,
    prompts: list[list[int]],
    capacity: int,
    draw: Draw,
    device: torch.device | None = None,
) -> Iterator[list[int]]:
    """For ever the next token of each prompt, up to `capacity` tokens with the longest prompt. No prompt may be empty.

    model: whole, or sharded over ranks that all call this alike. core: glob of its attention cores. device: where it
    computes, if not where its parameters lie. Close the iterator, or use it up: until then the model remembers.
    """
    device = device or next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    place = Place(capacity)
    generators = draw.generators(len(prompts))
    last: Tensor | None = None  # each row's logits after its last token
    with remembering(model, core, place):
        for begin in range(0, longest, PREFILL):
            part = padded[:, begin : begin + PREFILL]
            place.move(torch.arange(begin, begin + part.shape[1], device=device).expand_as(part), begin + part.shape[1])
            logits = model(part, positions=place.positions)
            ends = (lengths - 1 - begin).clamp(0, part.shape[1] - 1)
            here = logits[torch.arange(len(prompts), device=device), ends]
            last = here if last is None else torch.where((lengths > begin)[:, None], here, last)
            del logits
        for at in range(capacity - longest):
            assert last is not None
            chosen = draw.choose(last, generators)
            yield chosen
            if at + 1 < capacity - longest:
                place.move((lengths + at)[:, None], longest + at + 1)
                last = model(torch.tensor(chosen, device=device)[:, None], positions=place.positions)[:, -1]


def continuations(
    model: nn.Module,
    core: str,
    tokenizer: Tokenizer,
    start: int,
    prompts: list[str],
    tokens: int,
    draw: Draw,
    device: torch.device | None = None,
) -> list[str]:
    """Each prompt's continuation by `tokens` tokens, or up to the end of the document. Ranks stay in step: none stops early.

    model: in eval mode. start: the token before a document's first. device: as in `generate`.
    """
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    capacity = 1 + max(map(len, encoded)) + tokens
    columns = list(islice(generate(model, core, [[start, *prompt] for prompt in encoded], capacity, draw, device), tokens))
    return [continued(tokenizer, prompt, list(row)) for prompt, row in zip(encoded, zip(*columns, strict=True), strict=True)]


def continued(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of the tokens up to the document's end, as what follows the prompt: a decoder may drop a text's first space."""
    return tokenizer.decode([*prompt, *until(tokens, tokenizer.document_end)])[len(tokenizer.decode(prompt)) :]


def until(tokens: list[int], end: int) -> list[int]:
    """The tokens before the first `end`."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
