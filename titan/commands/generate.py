"""titan generate FOLDER "prompt" ["prompt" ...] [options]

Lets a trained model go on from a text. FOLDER is a committed step, a run's folder (its newest step), or a Hugging Face
folder. One prompt appears as it is written, several are done together. A prompt of - is read from the standard input.

  titan generate outputs/debug "The with statement"
  titan generate outputs/stdlib/checkpoints/step-00001000 "def main(" "import "
  titan generate Llama-3.2-1B "The capital of France is" --temperature 0

  --tokens N           to add to each prompt, or fewer where the document ends
                       (128)
  --temperature T      below 1 is more careful, 0 takes the likeliest (0.8)
  --top-p P            draw among the likeliest tokens that have this much
                       probability together (0.95)
  --seed N             another seed, another text (1)
  --device cpu|cuda    default: the GPU where there is one
  --dtype float32|bfloat16
                       default: bfloat16 on a GPU, float32 on a CPU
"""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from titan.arguments import Parser
from titan.terminal import showable
from titan.toml import ConfigError

LONG_PROMPT = 4096

if TYPE_CHECKING:
    from titan.checkpoint.load import Loaded
    from titan.generate import Draw


def run(words: list[str]) -> int:
    """Load, generate, print."""
    parser = Parser("generate")
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    asked = parser.parse_args(words)
    if asked.tokens < 1:
        parser.error(f"--tokens {asked.tokens}: expected 1 or more")
    if asked.temperature < 0 or not asked.temperature < float("inf"):
        parser.error(f"--temperature {asked.temperature}: expected a number, 0 or more")
    if not 0 < asked.top_p <= 1:
        parser.error(f"--top-p {asked.top_p}: expected a number above 0, up to 1")
    if not 0 <= asked.seed < 2**63:
        parser.error(f"--seed {asked.seed}: expected a whole number from 0 to 2**63 - 1")
    prompts = [read_prompt(number, prompt) for number, prompt in enumerate(asked.prompts, 1)]

    import torch

    from titan.checkpoint.load import load_model
    from titan.checkpoint.manifest import CheckpointError
    from titan.generate import Draw

    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, asked.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    try:
        loaded = load_model(asked.folder, device, dtype)
        encoded = [loaded.tokenizer.encode(prompt).tolist() for prompt in prompts]
    except (CheckpointError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if (longest := max(map(len, encoded))) > LONG_PROMPT:
        print(f"titan: reading {longest:,} tokens first", file=sys.stderr)
    most = getattr(loaded.model.config, "context_length", 1 + longest + asked.tokens)
    if (room := most - 1 - longest) < asked.tokens:
        said = f"a prompt of {longest:,} tokens leaves room for {max(0, room):,} of the {most:,} that the model is meant for"
        raise ConfigError(f"command line: --tokens {asked.tokens}: {said}; ask for fewer, or shorten the prompt")
    write(loaded, prompts, encoded, asked.tokens, Draw(asked.temperature, asked.top_p, asked.seed, loaded.tokenizer.vocab_size))
    return 0


def read_prompt(number: int, word: str) -> str:
    """The text of a prompt; of the standard input for "-". ConfigError where it is not UTF-8."""
    text = sys.stdin.buffer.read() if word == "-" else os.fsencode(word)
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"command line: prompt {number} is not UTF-8 text ({error})") from None


def write(loaded: Loaded, prompts: list[str], encoded: list[list[int]], tokens: int, draw: Draw) -> None:
    """Print the prompts with what follows; a single one as it comes."""
    from titan.generate import continued, generate

    rows: list[list[int]] = [[] for _ in prompts]
    end, shown = loaded.tokenizer.document_end, 0
    if len(prompts) == 1:
        print(showable(prompts[0], sys.stdout), end="", flush=True)
    capacity = 1 + max(map(len, encoded)) + tokens
    columns = generate(loaded.model, loaded.core, [[loaded.start, *prompt] for prompt in encoded], capacity, draw)
    for column in islice(columns, tokens):
        for row, token in zip(rows, column, strict=True):
            row.append(token)
        if all(end in row for row in rows):
            break
        if len(prompts) == 1:
            text = continued(loaded.tokenizer, encoded[0], rows[0]).rstrip("\ufffd")  # a character may need another token yet
            print(showable(text[shown:], sys.stdout), end="", flush=True)
            shown = max(shown, len(text))
    texts = [continued(loaded.tokenizer, prompt, row) for prompt, row in zip(encoded, rows, strict=True)]
    if len(prompts) == 1:
        print(showable(texts[0][shown:], sys.stdout))
        return
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        print(f"--- {number}\n{showable(prompt + text, sys.stdout)}\n")
