"""titan export hf FOLDER OUT_DIR [--dtype float32|bfloat16] [--max-shard-gb 5]

Writes a checkpoint's model as a Hugging Face folder: config, weights in safetensors, tokenizer, generation config.
transformers' AutoModelForCausalLM and AutoTokenizer load it as it is, and whatever reads such folders. FOLDER is a committed
step, or a run's folder (its newest step).

  titan export hf outputs/debug debug-hf
  titan export hf outputs/mine/checkpoints/step-00010000 mine-hf --dtype bfloat16    half the size

  --dtype          float32 (the default) is to the bit what was trained; bfloat16 rounds
  --max-shard-gb   the largest weights file, in gigabytes; more files where the model is larger

It takes a few hundred megabytes of memory, whatever the model's size, and no GPU. OUT_DIR must not be there yet; it
appears when it is whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

from titan.arguments import Parser, require_new
from titan.status import Exit
from titan.toml import ConfigError

ACTIONS = ("hf",)
AFTER = """to use it:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("{out}")
  tokenizer = AutoTokenizer.from_pretrained("{out}")
  print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=40)[0]))"""


def run(words: list[str]) -> int:
    """Export, and say what was written and how it is used."""
    parser = Parser("export hf")
    parser.add_argument("format", choices=ACTIONS)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-shard-gb", type=float, default=5.0)
    given = parser.parse_args(words)
    if not 0 < given.max_shard_gb < float("inf"):
        raise ConfigError(f"command line: --max-shard-gb is {given.max_shard_gb:g}, expected a number above 0")
    step = _step(given.folder)
    require_new(given.out)
    if step != given.folder:
        print(f"export: {step}", flush=True)

    import torch

    from titan.checkpoint.convert import export_hf
    from titan.checkpoint.manifest import CheckpointError
    from titan.progress import size_words

    try:
        about = export_hf(step, given.out, getattr(torch, given.dtype), print, int(given.max_shard_gb * 1e9))
    except (CheckpointError, ValueError, OSError) as error:
        print(f"titan: {error}", file=sys.stderr)
        return Exit.FAILED
    size = sum(path.stat().st_size for path in given.out.iterdir())
    print(f"wrote {given.out}: {about.model} in {given.dtype}, {size_words(size)}\n{AFTER.format(out=given.out)}")
    return Exit.FINISHED


def _step(folder: Path) -> Path:
    """The committed step that a folder is or stands for; ConfigError where there is none."""
    from titan.checkpoint.commit import step_of
    from titan.checkpoint.manifest import MANIFEST, CheckpointError

    try:
        step = step_of(folder)
    except CheckpointError as error:
        raise ConfigError(f"command line: {error}; give one such as outputs/debug") from None
    if not (step / MANIFEST).is_file():
        raise ConfigError(f"command line: {folder} is a Hugging Face folder already, not a checkpoint")
    return step
