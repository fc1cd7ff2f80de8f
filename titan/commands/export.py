"""titan export hf STEP_DIR OUT_DIR [--dtype float32|bfloat16] [--max-shard-gb 5]

Writes a checkpoint's model as a Hugging Face folder: config, weights in safetensors, tokenizer, generation config.
transformers' AutoModelForCausalLM and AutoTokenizer load it as it is, and whatever reads such folders.

  titan export hf outputs/debug/checkpoints/step-00000100 debug-hf
  titan export hf outputs/mine/checkpoints/step-00010000 mine-hf --dtype bfloat16    half the size

  --dtype          float32 (the default) is to the bit what was trained; bfloat16 rounds
  --max-shard-gb   the largest weights file, in gigabytes; more files where the model is larger

It takes a few hundred megabytes of memory, whatever the model's size, and no GPU. OUT_DIR must not be there yet; it
appears when it is whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

from titan.arguments import Parser
from titan.status import Exit
from titan.toml import ConfigError

AFTER = """to use it:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained("{out}")
  tokenizer = AutoTokenizer.from_pretrained("{out}")
  print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=40)[0]))"""


def run(words: list[str]) -> int:
    """Export, and say what was written and how it is used."""
    parser = Parser("export hf")
    parser.add_argument("format", choices=["hf"])
    parser.add_argument("step", metavar="STEP_DIR", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-shard-gb", type=float, default=5.0)
    given = parser.parse_args(words)
    if not 0 < given.max_shard_gb < float("inf"):
        raise ConfigError(f"command line: --max-shard-gb is {given.max_shard_gb:g}, expected a number above 0")
    _check_step(given.step)

    import torch

    from titan.checkpoint.commit import CheckpointError
    from titan.checkpoint.convert import export_hf
    from titan.progress import size_words

    try:
        about = export_hf(given.step, given.out, getattr(torch, given.dtype), print, int(given.max_shard_gb * 1e9))
    except (CheckpointError, ValueError, OSError) as error:
        print(f"titan: {error}", file=sys.stderr)
        return Exit.FAILED
    size = sum(path.stat().st_size for path in given.out.iterdir())
    print(f"wrote {given.out}: {about.model} in {given.dtype}, {size_words(size)}\n{AFTER.format(out=given.out)}")
    return Exit.FINISHED


def _check_step(folder: Path) -> None:
    """ConfigError, with the step that was meant, unless this is a committed step's folder."""
    from titan.checkpoint.commit import MANIFEST, newest

    if (folder / MANIFEST).is_file():
        return
    meant = newest(folder / "checkpoints") or newest(folder)
    hint = f"; did you mean {str(meant)!r}?" if meant else ", such as outputs/debug/checkpoints/step-00000100"
    raise ConfigError(f"command line: {str(folder)!r} is not a committed step's folder{hint}")
