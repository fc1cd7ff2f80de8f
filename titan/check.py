"""What goes with what: one list of rules over the whole config, each with the sentence that its refusal shows.

A rule is a function (config, world_size) -> None, or a Problem: the key to change and what to write instead. Rules run
before any rank starts; tests run them too. Without a world size, as in `titan config` on a laptop, the rules that need one hold
their tongue. What one field alone may hold is the field's own Check, in `titan.config`. The plan's rules are in
`titan.check_plan`, those of number formats in `titan.check_precision`. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from glob import escape, glob, has_magic
from itertools import pairwise
from pathlib import Path

from titan import check_plan as plan
from titan import check_precision as precision
from titan.check_plan import Problem, either, nearest_path
from titan.config import Config, Data
from titan.data.corpora import HUGGING_FACE, SUFFIXES
from titan.metrics.trackers import missing_packages

BUILTIN_DATA = ("builtin:topics", "builtin:stdlib")
BYTES_VOCABULARY = 257
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
SMALLEST_TRAINED = 300
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def problems(config: Config, world_size: int | None = None, elsewhere: bool = False) -> list[Problem]:
    """Every rule's refusal, in the order of the list below. elsewhere: but for rules on what this machine has."""
    found = (rule(config, world_size) for rule in RULES if not (elsewhere and rule in OF_THIS_MACHINE))
    return [problem for problem in found if problem is not None]


def schedule_fits_the_run(config: Config, world: int | None) -> Problem | None:
    schedule, steps = config.schedule, config.training.steps
    if schedule.warmup_steps > steps:
        return Problem(
            "schedule.warmup_steps", f"{schedule.warmup_steps} is more than training.steps = {steps}; write at most {steps}"
        )
    if schedule.name != "wsd" and schedule.decay_steps:
        return Problem(
            "schedule.decay_steps", f"only wsd has a decay phase of its own; {schedule.name} does not use it: leave it out"
        )
    left = steps - schedule.warmup_steps
    if schedule.decay_steps > left:
        return Problem("schedule.decay_steps", f"{schedule.decay_steps} is more than the {left} steps after the warm-up")
    return None


def sequence_fits_the_model(config: Config, world: int | None) -> Problem | None:
    most, asked = getattr(config.model.config, "context_length", None), config.training.seq_len
    if most is None or asked <= most:
        return None
    said = f"{asked} tokens are more than the {most} that the model is meant for"
    return Problem("training.seq_len", f"{said}; shorten it, or raise model.context_length")


def inductor_finds_a_compiler(config: Config, world: int | None) -> Problem | None:
    inductor = config.compile.enable and config.compile.backend == "inductor"
    kernels = config.kernels.in_triton
    if world is None or not (inductor or kernels):
        return None
    from titan.launch import visible_gpus

    # On a GPU Triton compiles what starts a kernel, in C; on a CPU the kernels themselves are C++.
    cpu = ("clang++",) if sys.platform == "darwin" else ("g++",)
    gpus = visible_gpus(os.environ)
    variable, names = ("CC", ("gcc", "clang")) if gpus else ("CXX", cpu)
    if variable in os.environ or any(shutil.which(name) for name in names) or not (inductor or gpus):
        return None
    said = f"needs a compiler, and this machine has no {either(names)} and names none in {variable}; install {names[0]}"
    if inductor:
        return Problem("compile.backend", f'inductor {said}, or write "aot_eager", with the kernels that PyTorch has')
    return Problem(f"kernels.{kernels[0]}", f'Triton {said}, or write "torch"')


def trackers_are_installed(config: Config, world: int | None) -> Problem | None:
    for name in missing_packages(config.metrics.trackers):
        return Problem("metrics.trackers", f"{name} is not installed: pip install {PACKAGES[name]}")
    return None


def profiled_steps_come(config: Config, world: int | None) -> Problem | None:
    asked, steps = config.profiling, config.training.steps
    if not asked.start:
        return None
    if asked.start + asked.steps - 1 > steps:
        last = asked.start + asked.steps - 1
        return Problem("profiling.start", f"step {last} is to be looked into, and training.steps is {steps}; start earlier")
    if world is not None and max(asked.ranks) >= world:
        return Problem("profiling.ranks", f"there is no rank {max(asked.ranks)}: the ranks are 0 to {world - 1}")
    if asked.memory and world is not None:
        from titan.launch import visible_gpus

        if not visible_gpus(os.environ):
            said = "is of a GPU's memory, and none is here; `titan draw memory` shows a CPU's"
            return Problem("profiling.memory", f"{said}; leave it out")
    return None


def gradient_norms_have_a_reader(config: Config, world: int | None) -> Problem | None:
    if not config.metrics.gradient_norms or config.metrics.trackers:
        return None
    said = "the norms go to the trackers, and metrics.trackers is empty"
    return Problem("metrics.gradient_norms", f'{said}: name one, such as "tensorboard", or leave this out')


def tokens_fit_the_vocabulary(config: Config, world: int | None) -> Problem | None:
    rows, spec = getattr(config.model.config, "vocab_size", None), config.data.tokenizer
    trained = re.fullmatch("train:([0-9]+)", spec)
    wanted = BYTES_VOCABULARY if spec == "bytes" else int(trained[1]) if trained else 0
    if rows is None or rows >= wanted:
        return None
    return Problem("model.vocab_size", f'{rows} rows are too few for data.tokenizer = "{spec}", which has {wanted} tokens')


def packed_documents_are_apart(config: Config, world: int | None) -> Problem | None:
    if config.data.packing == "contiguous" or config.data.document_mask:
        return None
    said = "best_fit puts documents side by side that have nothing to do with each other"
    return Problem("data.packing", f"{said}: set data.document_mask = true, so that none sees another")


def sources_make_a_mixture(config: Config, world: int | None) -> Problem | None:
    data = config.data
    if not data.sources:
        if data.stages:
            return Problem("data.stages", "there are no [[data.sources]] whose weights change; name them, or leave this out")
        return None
    for key in ("content", "column"):
        if getattr(data, key) != getattr(Data, key):
            return Problem(f"data.{key}", f"each of data.sources has a {key} of its own; write it there")
    if data.path != Data.path:
        return Problem("data.sources", "data.path is set, too; make it one of the sources, or leave one of the two out")
    if data.tokenizer.startswith("train:"):
        said = "each source would train a tokenizer of its own"
        return Problem("data.tokenizer", f"{said}: make one with `titan data train-tokenizer` and name its file")
    names = [source.name for source in data.sources]
    if twice := [name for name in names if names.count(name) > 1]:
        return Problem("data.sources", f"two sources are named {twice[0]!r}; give each a name of its own")
    if any(later <= before for before, later in pairwise(data.stages)):
        return Problem("data.stages", f"{data.stages} do not rise; write the steps in order")
    for source in data.sources:
        if len(source.later_weights) != len(data.stages):
            said = f"{source.name} has {len(source.later_weights)} later_weights for {len(data.stages)} data.stages"
            return Problem("data.sources", f"{said}; write one for each")
    weights = ((source.weight, *source.later_weights) for source in data.sources)
    for number, stage in enumerate(zip(*weights, strict=True), 1):
        if not sum(stage):
            return Problem("data.sources", f"all weights of stage {number} are 0; give a source some")
    return None


def conversations_have_a_template(config: Config, world: int | None) -> Problem | None:
    data = config.data
    if all(source.content != "chat" for source in data.all_sources):
        said = 'no source has content = "chat", so there is nothing to write by it; set that, or leave this out'
        return Problem("data.chat_template", said) if data.chat_template else None
    if data.tokenizer.startswith("train:"):
        said = "conversations need special tokens, and a tokenizer trained on their text has none"
        return Problem("data.tokenizer", f"{said}; give the file of one that has a chat template")
    if data.chat_template and not os.path.isfile(data.chat_template):
        return Problem("data.chat_template", f"{data.chat_template!r} is no file{nearest_path(data.chat_template)}")
    return None


def data_exists(config: Config, world: int | None) -> Problem | None:
    key = "data.sources" if config.data.sources else "data.path"
    problems = (_path_exists(key, source.path) for source in config.data.all_sources)
    return next((problem for problem in problems if problem), None)


def _path_exists(key: str, path: str) -> Problem | None:
    if path.startswith("builtin:"):
        if path in BUILTIN_DATA:
            return None
        near = difflib.get_close_matches(path, BUILTIN_DATA, 1)
        return Problem(key, f"no built-in text {path!r}; " + (f"did you mean {near[0]!r}?" if near else either(BUILTIN_DATA)))
    if path.startswith(HUGGING_FACE) or os.path.exists(path) or os.path.exists(path + ".idx"):
        return None
    if has_magic(path):
        return None if glob(path, recursive=True) else Problem(key, f"no file matches {path!r}")
    if os.path.lexists(path):
        return Problem(key, f"{path!r} is a link that leads nowhere")
    known = ", ".join(BUILTIN_DATA)
    hint = nearest_path(path) or f"; a folder of token shards, a .txt, .jsonl or .parquet file, a folder of them, or {known}"
    return Problem(key, f"{path!r} does not exist{hint}")


def tokenizer_exists(config: Config, world: int | None) -> Problem | None:
    spec = config.data.tokenizer
    if spec.startswith("train:"):
        if re.fullmatch("train:[0-9]+", spec) and int(spec[6:]) > SMALLEST_TRAINED:
            return None
        said = f"a vocabulary of more than {SMALLEST_TRAINED} tokens (256 of them are bytes)"
        return Problem("data.tokenizer", f"{spec!r}: after train: stands the number of tokens, {said}, as in train:4096")
    if spec == "bytes" or os.path.isfile(spec):
        return None
    if os.path.isdir(spec):
        if any(os.path.isfile(os.path.join(spec, name)) for name in TOKENIZER_FILES):
            return None
        return Problem("data.tokenizer", f"the folder {spec!r} holds neither {either(TOKENIZER_FILES)}")
    said = f'{spec!r} is neither "bytes" nor "train:4096" nor a tokenizer\'s path that exists'
    return Problem("data.tokenizer", said + nearest_path(spec))


def validation_has_data(config: Config, world: int | None) -> Problem | None:
    if config.validation.interval == 0 or config.data.validation_share > 0:
        return None
    text = [source for source in config.data.all_sources if source.path.endswith(SUFFIXES) or source.path in BUILTIN_DATA]
    if not text:  # a folder may hold files that are held out already
        return None
    return Problem(
        "validation.interval",
        "nothing is held out to validate on: data.validation_share is 0; set it above 0, or the interval to 0",
    )


def checkpoint_to_load_exists(config: Config, world: int | None) -> Problem | None:
    folder = config.checkpoint.load
    if not folder or os.path.isfile(os.path.join(folder, "manifest.json")) or _steps(config.job.output):
        return None
    near = _steps(folder)
    if os.path.isfile(os.path.join(folder, "config.json")):
        return Problem(
            "checkpoint.load", f"{folder!r} is a Hugging Face folder: run `titan import hf {folder} OUT`, then give OUT here"
        )
    hint = (
        f"; did you mean {near[-1]!r}?"
        if near
        else "; expected the folder of a committed step, such as outputs/debug/checkpoints/step-00000100"
    )
    return Problem("checkpoint.load", f"{folder!r} is not a committed checkpoint{hint}")


def output_is_a_folder(config: Config, world: int | None) -> Problem | None:
    path = Path(config.job.output)
    if any(os.path.exists(p) and not os.path.isdir(p) for p in (path, *path.parents)):
        return Problem("job.output", f"{config.job.output!r} runs through a file; name a folder")
    return None


def samples_have_a_place(config: Config, world: int | None) -> Problem | None:
    if not config.sample.interval or not config.sample.prompts or config.validation.interval:
        return None
    return Problem("sample.interval", "counts validations, and validation.interval is 0; set that, or leave this out")


def what_is_kept_makes_sense(config: Config, world: int | None) -> Problem | None:
    kept = config.checkpoint
    if kept.keep_best and not config.validation.interval:
        said = "is by validation loss, and validation.interval is 0; set that, or leave this out"
        return Problem("checkpoint.keep_best", said)
    for key in ("keep_every", "keep_best"):
        if getattr(kept, key) and not kept.keep_last:
            return Problem(f"checkpoint.{key}", "keep_last = 0 keeps every step anyway; set it, to 3 say, or leave this out")
    return None


def only_saves_beside_training_are_busy(config: Config, world: int | None) -> Problem | None:
    if config.checkpoint.when_busy == "wait" or config.checkpoint.async_save:
        return None
    said = "training waits for each save, so none finds another under way; set checkpoint.async_save = true, or leave this out"
    return Problem("checkpoint.when_busy", said)


def copies_have_a_way(config: Config, world: int | None) -> Problem | None:
    url = config.checkpoint.copy_to
    if not url:
        return None
    from fsspec.registry import get_filesystem_class
    from fsspec.utils import get_protocol

    if "://" not in url:
        return Problem("checkpoint.copy_to", f"{url!r} is no URL; write one such as s3://bucket/run or file:///backup/run")
    try:
        get_filesystem_class(get_protocol(url))
    except (ValueError, ImportError) as error:
        return Problem("checkpoint.copy_to", f"{url!r}: {error}; install what it names, or leave this out")
    return None


RULES = (
    plan.degrees_make_up_the_world,
    plan.batch_divides,
    plan.sharding_words_fit,
    plan.heads_are_shared_evenly,
    plan.widths_reach_every_rank,
    plan.sequence_is_shared_evenly,
    plan.ulysses_has_heads_for_every_rank,
    plan.schedule_exists,
    plan.schedule_takes_the_stages,
    plan.schedule_takes_the_micro_batches,
    plan.stages_have_blocks,
    plan.split_shares_out_the_blocks,
    plan.zero_bubble_is_not_compiled,
    plan.what_selective_keeps_stays,
    plan.reshard_divides_the_shards,
    precision.float8_has_layers,
    precision.float8_widths_are_whole_units,
    precision.float8_tokens_are_whole_units,
    precision.float8_weights_stay_with_their_ranks,
    precision.kernels_have_a_place,
    schedule_fits_the_run,
    sequence_fits_the_model,
    inductor_finds_a_compiler,
    tokens_fit_the_vocabulary,
    packed_documents_are_apart,
    sources_make_a_mixture,
    conversations_have_a_template,
    data_exists,
    tokenizer_exists,
    validation_has_data,
    samples_have_a_place,
    what_is_kept_makes_sense,
    only_saves_beside_training_are_busy,
    copies_have_a_way,
    trackers_are_installed,
    gradient_norms_have_a_reader,
    profiled_steps_come,
    checkpoint_to_load_exists,
    output_is_a_folder,
)
OF_THIS_MACHINE = (
    inductor_finds_a_compiler,
    conversations_have_a_template,
    data_exists,
    tokenizer_exists,
    copies_have_a_way,
    trackers_are_installed,
    profiled_steps_come,
    checkpoint_to_load_exists,
    output_is_a_folder,
)
"""Rules that ask for what is installed here, or look into files."""


def _steps(output: str) -> list[str]:
    """Folders of committed steps in a run's folder, or in its checkpoints/, by name."""
    found = [
        path for inside in ("", "checkpoints") for path in glob(os.path.join(escape(output), inside, "step-*", "manifest.json"))
    ]
    return sorted(os.path.dirname(path) for path in found)
