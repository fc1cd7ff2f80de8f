"""titan checkpoint list OUTPUT, titan checkpoint verify FOLDER

What a run has saved, and whether it still holds what was written.

  titan checkpoint list outputs/debug                                     every step, its size, its validation loss
  titan checkpoint verify outputs/debug                                   reads the newest step, byte for byte
  titan checkpoint verify outputs/debug/checkpoints/step-00000050         reads this one

OUTPUT is a run's folder; FOLDER a committed step, or a run's folder. Neither changes anything, and no code runs that
a checkpoint brings along: it is tensors and JSON. verify compares each file with the SHA-256 that was noted while it
was written, the digest that sha256sum prints. It exits with 1 where one differs, and names the file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from titan.arguments import Parser
from titan.checkpoint.commit import REASON, committed_steps, damaged_folders, folders, step_folder, step_of
from titan.checkpoint.manifest import MANIFEST, CheckpointError, DamagedError, check_sizes, read_json, read_manifest, verify
from titan.checkpoint.retention import STATE, best_step, validation_loss
from titan.progress import ProgressBar, size_words
from titan.status import Exit
from titan.terminal import plural
from titan.toml import ConfigError

ACTIONS = ("list", "verify")


def run(words: list[str]) -> int:
    """List a run's steps, or verify one."""
    parser = Parser("checkpoint")
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    given = parser.parse_args(words)
    if not given.folder.is_dir():
        raise ConfigError(f"command line: {given.folder} is not a folder")
    return _list(given.folder) if given.action == "list" else _verify(given.folder)


def _list(output: Path) -> int:
    root = output / "checkpoints" if (output / "checkpoints").is_dir() else output
    found, aside = folders(root), damaged_folders(root)
    if not found and not aside:
        raise ConfigError(f"command line: {output} holds no checkpoints; give a run's folder, such as outputs/debug")
    steps = committed_steps(root)
    best = best_step(root, steps)
    print(f"{root}\n{'step':>12}  {'saved':16}  {'tokens':>15}  {'validation':>10}  {'size':>10}")
    for folder in found:
        try:
            manifest = check_sizes(folder)
            tokens = int(read_json(folder / STATE)["progress"]["tokens"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            print(f"{folder.name:>12}  not whole: {error}")
            continue
        loss = validation_loss(folder)
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / MANIFEST).stat().st_mtime))
        size = size_words(sum(written.bytes for written in manifest.files.values()))
        marks = ["newest"] * (manifest.step == steps[-1]) + ["best"] * (manifest.step == best)
        shown = "" if loss is None else f"{loss:.4f}"
        print(f"{manifest.step:12,}  {saved}  {tokens:15,}  {shown:>10}  {size:>10}  {', '.join(marks)}".rstrip())
    for folder in aside:
        reason = (folder / REASON).read_text().strip() if (folder / REASON).is_file() else "no reason was left"
        print(f"{folder.name}: {reason}")
    return Exit.FINISHED


def _verify(folder: Path) -> int:
    try:
        step = step_of(folder)
        if not (step / MANIFEST).is_file():
            raise ConfigError(f"command line: {folder} is a Hugging Face folder, which has no checksums")
        total = sum(written.bytes for written in read_manifest(step).files.values())
        bar = ProgressBar(total, f"verify {step.name}", print)
        try:
            manifest = verify(step, bar.add)
        finally:
            bar.close()
    except DamagedError as error:
        print(f"titan: {error}", file=sys.stderr)
        return Exit.FAILED
    except CheckpointError as error:
        raise ConfigError(f"command line: {error}") from None
    except OSError as error:
        print(f"titan: {folder} cannot be read: {error}", file=sys.stderr)
        return Exit.FAILED
    if step_folder(step.parent, manifest.step).name != step.name and step.name.startswith("step-"):
        print(f"titan: {step} holds step {manifest.step}", file=sys.stderr)
        return Exit.FAILED
    print(f"{step}: whole, {plural(len(manifest.files), 'file')}, {size_words(total)}, every byte as it was written")
    return Exit.FINISHED
