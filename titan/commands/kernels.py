"""titan kernels CONFIG [--chip 80 --chip 90 ...] [--table.key=value ...]

Compiles the Triton kernels that a config's model can use ([kernels]), forward and backward, for GPUs that need not be there:
whether they compile, and how much of a multiprocessor each takes. Registers are for each thread; of a multiprocessor's 65,536
a program takes warps x 32 x registers, so that few let more programs run side by side. Stack is what did not fit into them, in
bytes. Shared memory is in bytes, too, and a kernel that takes more than the chip has is an error. CONFIG's [kernels] do not
matter: all are compiled that the model has a place for, casts to Float8 with a precision.float8.

  --chip N  compute capability: 80 is an A100, 90 an H100 or H200, 100 a B200
            (80, 90 and 100; from 90 on for Float8)

  titan kernels train_configs/llama3_8b.toml
  titan kernels train_configs/llama3_8b.toml --precision.float8=rowwise --chip 90

Needs triton, which every GPU build of PyTorch on Linux brings along.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from titan.arguments import Parser, blame, read_config
from titan.check_precision import float8_has_layers, float8_tokens_are_whole_units, float8_widths_are_whole_units
from titan.config import Config, Kernels
from titan.status import Exit, Failed
from titan.terminal import plural
from titan.toml import ConfigError

if TYPE_CHECKING:
    from titan.kernels.ahead import Cubin

CHIPS = (80, 89, 90, 100, 120)
NEWEST_WITHOUT_FLOAT8 = 80


def run(words: list[str]) -> int:
    """Compile, and print a table."""
    parser = Parser("kernels")
    parser.add_argument("--chip", type=int, action="append", choices=CHIPS)
    given, rest = parser.parse_with_config(words)
    config = read_config(rest)
    for rule in (float8_has_layers, float8_widths_are_whole_units, float8_tokens_are_whole_units):
        if problem := rule(config, None):
            raise ConfigError(blame(config, rest, f"{problem.key}: {problem.sentence}"))
    float8 = config.precision.float8 != "none"
    chips = given.chip or [chip for chip in (80, 90, 100) if not float8 or chip > NEWEST_WITHOUT_FLOAT8]
    if float8 and min(chips) <= NEWEST_WITHOUT_FLOAT8:
        parser.error(f"--chip {min(chips)}: multiplies no 8-bit numbers; leave precision.float8 out, or the chip")
    if find_spec("triton") is None:
        raise Failed("triton is not installed: pip install triton")
    try:
        found = {chip: cubins(config, chip) for chip in chips}
    except (RuntimeError, ValueError) as error:
        raise Failed(str(error)) from error
    print("\n".join(table(found)))
    return Exit.FINISHED


def cubins(config: Config, chip: int) -> list[Cubin]:
    """What a micro batch through the whole model launches, one rank's of a plan that cuts no tensor, compiled for a chip.

    Raises ValueError for what the chip cannot run.
    """
    import torch

    from titan import zoo
    from titan.fused import use_kernels
    from titan.kernels.ahead import compiled_for
    from titan.loss import LinearCrossEntropy
    from titan.precision.float8 import swap
    from titan.precision.float8_layers import float8_layers
    from titan.precision.mixed import compute_in
    from titan.sharding import replace_module

    table, training = zoo.sharding(config.model.name, config.model.config), config.training
    with torch.device("meta"):
        model = zoo.make(config.model.name, config.model.config)
        tokens = torch.empty(training.micro_batch_size, training.seq_len, dtype=torch.int64)
    everything = Kernels("triton", "triton", "triton", "triton", "triton")
    use_kernels(model, table, everything)
    replace_module(model, table.loss, LinearCrossEntropy(config.loss, everything.linear_cross_entropy))
    if config.precision.float8 != "none":
        swap(model, list(float8_layers(table, config.precision)), config.precision.float8, kernel=True)
    compute_in([model], getattr(torch, config.precision.param))
    with compiled_for(chip) as found:
        model(tokens, labels=tokens).backward()
    return found


def table(of_chips: dict[int, list[Cubin]]) -> list[str]:
    """A line for each kernel and what it was compiled for, a column for each chip: registers/stack/shared memory."""
    rows: dict[str, dict[int, Cubin]] = {}
    for chip, found in of_chips.items():
        for cubin in found:
            row = rows.setdefault(_name(cubin), {})
            row[chip] = max(row.get(chip, cubin), cubin, key=lambda c: (c.registers, c.shared))  # of more or less aligned ones
    lead = max(map(len, rows), default=0)
    lines = ["registers (of a thread) / stack (bytes) / shared memory (bytes)", ""]
    lines.append(f"{'kernel':{lead}}  warps" + "".join(f"{f'sm_{chip}':>14}" for chip in of_chips))
    for name, by_chip in rows.items():
        cells = {chip: f"{c.registers}/{c.stack}/{c.shared}" for chip, c in by_chip.items()}
        warps = next(iter(by_chip.values())).warps
        lines.append(f"{name:{lead}}  {warps:5}" + "".join(f"{cells.get(chip, '-'):>14}" for chip in of_chips))
    return [*lines, "", f"compiled: {plural(sum(map(len, of_chips.values())), 'kernel')}"]


def _name(cubin: Cubin) -> str:
    """A kernel with its formats and constants: rms_norm.forward bf16 ADD BLOCK=4096."""
    given = cubin.arguments
    formats = [given[name].removeprefix("*") for name in list(given)[:1]]
    formats += [value for name, value in given.items() if name == "FORMAT"]
    constants = {name: value for name, value in given.items() if name in SHOWN and value != "False"}
    named = [name if value == "True" else f"{name}={value}" for name, value in constants.items()]
    turned = ["turned"] if given.get("stride_row") == "1" else []
    return " ".join([cubin.kernel.replace("_triton._", "."), *formats, *named, *turned])


SHOWN = ("ADD", "BACK", "BY_ROW", "BOTH", "BLOCK")
