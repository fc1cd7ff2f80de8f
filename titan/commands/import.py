"""titan import hf HF_DIR OUT_DIR

Writes a Hugging Face folder's model as a checkpoint that training starts from, with its tokenizer: what
checkpoint.load takes. It reads safetensors files, one or many, of a model_type that titan has (llama, gpt2).

  titan import hf Llama-3.2-1B llama-1b
  titan train CONFIG --checkpoint.load=llama-1b --data.tokenizer=llama-1b --model.size=1b

The weights are kept in float32, so OUT_DIR takes twice the space of a folder in bfloat16. It takes a few hundred
megabytes of memory, whatever the model's size, and no GPU. OUT_DIR must not be there yet; it appears when it is whole.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan import zoo
from titan.arguments import Parser, require_new
from titan.status import Exit
from titan.toml import ConfigError

ACTIONS = ("hf",)


def run(words: list[str]) -> int:
    """Import, and say what was written and how training starts from it."""
    parser = Parser("import hf")
    parser.add_argument("format", choices=ACTIONS)
    parser.add_argument("folder", metavar="HF_DIR", type=Path)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    given = parser.parse_args(words)
    if not given.folder.is_dir():
        raise ConfigError(f"command line: {str(given.folder)!r} is not a folder; give the one that holds config.json")
    if not (given.folder / "config.json").is_file():
        ours = (given.folder / "manifest.json").is_file()
        why = "is a checkpoint of titan already: checkpoint.load takes it as it is" if ours else "holds no config.json"
        raise ConfigError(f"command line: {str(given.folder)!r} is not a Hugging Face folder, it {why}")
    require_new(given.out)

    from titan.checkpoint.convert import import_hf
    from titan.checkpoint.manifest import CheckpointError
    from titan.progress import size_words

    try:
        about = import_hf(given.folder, given.out, print)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"titan: {error}", file=sys.stderr)
        return Exit.FAILED
    size = sum(path.stat().st_size for path in given.out.iterdir())
    model = " ".join(model_words(about.model, about.config))
    print(f"wrote {given.out}: {about.model} in float32, {size_words(size)}\nto go on training it:")
    print(f"  titan train CONFIG --checkpoint.load={given.out} --data.tokenizer={given.out} \\\n    {model}")
    return Exit.FINISHED


def model_words(name: str, config: Any) -> list[str]:
    """What says this model on `titan train`'s command line: the nearest size, and each field that differs from it."""
    fields = asdict(config)

    def changed(size: str) -> dict[str, Any]:
        there = asdict(zoo.sizes(name)[size])
        return {field: value for field, value in fields.items() if value != there[field]}

    size = min(zoo.sizes(name), key=lambda size: len(changed(size)))
    values = {field: str(value).lower() if isinstance(value, bool) else repr(value) for field, value in changed(size).items()}
    return [f"--model.name={name}", f"--model.size={size}", *(f"--model.{field}={value}" for field, value in values.items())]
