"""The rules of `[precision]` and `[kernels]`: what `titan.check` lists of it. How a rule works is said there. No torch."""

from __future__ import annotations

from titan import zoo
from titan.check_plan import Problem, words_of
from titan.config import Config, degrees
from titan.precision.float8_layers import UNIT, float8_layers
from titan.sharding import BY_OUTPUT, key_of

WIDEST_NORM = 16384
"""`titan.kernels.rms_norm_triton.WIDEST`, which needs torch."""


def float8_has_layers(config: Config, world: int | None) -> Problem | None:
    table = zoo.sharding(config.model.name, config.model.config)
    try:
        found = float8_layers(table, config.precision)
    except ValueError as error:
        return Problem("precision.float8_skip", str(error))
    if found or config.precision.float8 == "none":
        return None
    said = "no linear layer is left that would compute in Float8"
    return Problem("precision.float8", f'{said}; write "none", or leave out fewer by float8_skip and float8_min_width')


def float8_widths_are_whole_units(config: Config, world: int | None) -> Problem | None:
    for name, widths in _layers(config).items():
        for what, width, ranks in zip(("outputs", "inputs"), widths, _sharing(config, name), strict=True):
            if width % (UNIT * ranks):
                shared = f" for {ranks} ranks" if ranks > 1 else ""
                said = f"{name} has {width} {what}{shared}, and Float8 takes multiples of {UNIT * ranks}"
                return Problem("precision.float8", f"{said}; change the width, or name the layer in precision.float8_skip")
    return None


def float8_tokens_are_whole_units(config: Config, world: int | None) -> Problem | None:
    training, plan = config.training, config.parallel
    words, layers = words_of(config), _layers(config)
    on_a_part = plan.tp > 1 and any(words.get(name) == "seq" for name in layers)
    tokens = training.micro_batch_size * training.seq_len // (plan.cp * (plan.tp if on_a_part else 1))
    if tokens % UNIT == 0 or not layers:
        return None
    said = f"a rank's micro batch has {tokens} tokens, and Float8 takes multiples of {UNIT}, since weights' gradients are sums"
    return Problem("training.micro_batch_size", f"{said} over tokens; choose another, or another training.seq_len")


def float8_weights_stay_with_their_ranks(config: Config, world: int | None) -> Problem | None:
    if config.precision.float8 != "tensorwise":
        return None
    if config.offload.states:
        said = "weights that travel in Float8 are cast where they lie, on the device"
        return Problem("offload.states", f'{said}; write precision.float8 = "rowwise", or leave this out')
    plan = config.parallel
    shards = degrees(plan, world).dp_shard * plan.cp if world is not None else 1
    if shards > 1 and plan.reshard_after_forward.isdecimal():
        said = "PyTorch keeps no such copy of weights that travel in Float8"
        return Problem("parallel.reshard_after_forward", f'{said}; write "always" or "never", or precision.float8 = "rowwise"')
    return None


def kernels_have_a_place(config: Config, world: int | None) -> Problem | None:
    table = zoo.sharding(config.model.name, config.model.config)
    found = {key_of(kernel) for kernel in table.kernels.values()}
    for kernel, what in (("rms_norm", "RMSNorm"), ("rope", "rotary positions"), ("swiglu", "SwiGLU")):
        if getattr(config.kernels, kernel) == "triton" and kernel not in found:
            return Problem(f"kernels.{kernel}", f'{config.model.name} has no {what}; write "torch"')
    if config.kernels.rms_norm == "triton" and table.width > WIDEST_NORM:
        said = f"a token has {table.width:,} numbers, and {WIDEST_NORM:,} fit into a GPU's registers"
        return Problem("kernels.rms_norm", f'{said}; write "torch", or make model.dim smaller')
    if config.kernels.float8_cast == "triton" and config.precision.float8 == "none":
        return Problem("kernels.float8_cast", 'nothing is computed in Float8; write "torch", or choose a precision.float8')
    return None


def _layers(config: Config) -> dict[str, tuple[int, int]]:
    """The Float8 layers; none where another rule refuses them."""
    try:
        return float8_layers(zoo.sharding(config.model.name, config.model.config), config.precision)
    except ValueError:
        return {}


def _sharing(config: Config, name: str) -> tuple[int, int]:
    """How many ranks share a layer's outputs and its inputs."""
    word, tp = words_of(config).get(name), config.parallel.tp
    if word == "kv":
        return min(tp, zoo.sharding(config.model.name, config.model.config).kv_heads), 1
    return (tp if word in BY_OUTPUT else 1), (tp if word == "row" else 1)
