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
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan.data.tokenizer import Tokenizer
from titan.sharding import matching

PREFILL = 512  # prompt tokens that go through the model at once, which bounds their logits


@dataclass
class KeptKeys:
    """Where the tokens at hand stand, told to every core: positions int64 [batch, new tokens]."""

    batch: int
    capacity: int
    positions: Tensor


class RememberingCore(nn.Module):
    """Causal attention over all tokens so far. q, k, v: [batch, new tokens, heads, head_dim]; returns q's shape."""

    def __init__(self, kept: KeptKeys) -> None:
        super().__init__()
        self.kept = kept
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        assert document_ids is None, "a prompt is one document"
        if self.keys is None or self.values is None:
            self.keys = k.new_zeros(self.kept.batch, self.kept.capacity, *k.shape[2:])
            self.values = torch.zeros_like(self.keys)
        at = self.kept.positions
        rows = torch.arange(len(at), device=at.device)[:, None]
        self.keys[rows, at], self.values[rows, at] = k, v
        so_far = int(at.max()) + 1
        seen = torch.arange(so_far, device=at.device) <= at[:, :, None]
        q, k, v = (x.transpose(1, 2) for x in (q, self.keys[:, :so_far], self.values[:, :so_far]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


@contextmanager
def remembering(model: nn.Module, core: str, kept: KeptKeys) -> Iterator[None]:
    """The model with its attention cores (a glob of module names) replaced, for a while."""
    modules = dict(model.named_modules())
    replaced = {name: modules[name] for name in matching(core, modules)}
    try:
        for name in replaced:
            _put(modules, name, RememberingCore(kept))
        yield
    finally:
        for name, module in replaced.items():
            _put(modules, name, module)


def _put(modules: dict[str, nn.Module], name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(modules[parent], own, module)


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
def generate(model: nn.Module, core: str, prompts: list[list[int]], capacity: int, draw: Draw) -> Iterator[list[int]]:
    """For ever the next token of each prompt, up to `capacity` tokens with the longest prompt. No prompt may be empty.

    model: whole, or sharded over ranks that all call this alike. core: glob of its attention cores. Close the iterator, or use
    it up: until then the model remembers.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    kept = KeptKeys(len(prompts), capacity, lengths)
    generators = draw.generators(len(prompts))
    last: Tensor | None = None  # each row's logits after its last token
    with remembering(model, core, kept):
        for begin in range(0, longest, PREFILL):
            part = padded[:, begin : begin + PREFILL]
            kept.positions = torch.arange(begin, begin + part.shape[1], device=device).expand_as(part)
            logits = model(part, positions=kept.positions)
            ends = (lengths - 1 - begin).clamp(0, part.shape[1] - 1)
            here = logits[torch.arange(len(prompts), device=device), ends]
            last = here if last is None else torch.where((lengths > begin)[:, None], here, last)
            del logits
        for at in range(capacity - longest):
            assert last is not None
            chosen = draw.choose(last, generators)
            yield chosen
            if at + 1 < capacity - longest:
                kept.positions = (lengths + at)[:, None]
                last = model(torch.tensor(chosen, device=device)[:, None], positions=kept.positions)[:, -1]


def continuations(
    model: nn.Module, core: str, tokenizer: Tokenizer, start: int, prompts: list[str], tokens: int, draw: Draw
) -> list[str]:
    """Each prompt's continuation by `tokens` tokens, or up to the end of the document. Ranks stay in step: none stops early.

    model: in eval mode. start: the token before a document's first.
    """
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    capacity = 1 + max(map(len, encoded)) + tokens
    columns = list(islice(generate(model, core, [[start, *prompt] for prompt in encoded], capacity, draw), tokens))
    return [continued(tokenizer, prompt, list(row)) for prompt, row in zip(encoded, zip(*columns, strict=True), strict=True)]


def continued(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text of the tokens up to the document's end, as what follows the prompt: a decoder may drop a text's first space."""
    return tokenizer.decode([*prompt, *until(tokens, tokenizer.document_end)])[len(tokenizer.decode(prompt)) :]


def until(tokens: list[int], end: int) -> list[int]:
    """The tokens before the first `end`."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
