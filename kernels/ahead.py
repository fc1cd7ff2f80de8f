"""Compile Triton kernels for a GPU that is not there.

Triton compiles a kernel when it is first launched, for the GPU at hand, for the types of its arguments, for which of them
are 1 or divisible by 16, and for its constants. All of that can be had without a GPU: whoever launches kernels does so here on
tensors of the meta device, which have shapes and no memory; a stand-in for the GPU's driver says what chip it is; and the
launch ends with the finished machine code (a cubin), from the assembler that Triton brings along. Operations of PyTorch's own
stay what they are, and the kernels' operations do on these tensors what they do on a GPU's. So a model that runs here has just
the kernels compiled that it would launch there, and no second list of them says so.

    with compiled_for(90) as cubins:
        rms_norm(torch.empty(4096, 8192, device="meta"), torch.empty(8192, device="meta"), 1e-5)

A cubin says what a program takes of a multiprocessor: registers for each thread, of which there are 255 at most and 65,536 in
all, so that few registers let more programs run side by side; and shared memory, of which too much can not be launched at all,
which the compiler does not say.

Chips: sm_80 is an A100, sm_90 an H100 or H200, sm_100 a B200. Source for shared memory: NVIDIA's CUDA C++ Programming Guide,
"Technical specifications per compute capability".
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Compute capability -> bytes that a program can have."""


class Cubin(NamedTuple):
    """A kernel's machine code, and what a program takes."""

    kernel: str
    """Its module and function."""
    arguments: dict[str, str]
    """The types, or values, that it was compiled for."""
    warps: int
    registers: int
    """For each thread."""
    stack: int
    """Bytes of each thread's own memory: what did not fit into registers, above all."""
    shared: int
    """Bytes of shared memory."""


class _Chip:
    """As much of a GPU's driver as a compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept for each device

    def get_current_stream(self, device: int) -> int:
        return 0


class _AsOnGpu(TorchDispatchMode):
    """Operations of the kernels' do on meta tensors what they would on a GPU's."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "titan" and function.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA):
            return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Cubin]]:
    """In the block, a launch compiles for a chip and runs nothing; the list gets each different cubin once.

    Raises RuntimeError in a process that interprets kernels (TRITON_INTERPRET), and ValueError for a kernel with more shared
    memory than the chip has.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted here, and none is compiled")
    seen: set[str] = set()
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = run(self, *arguments, grid=grid, warmup=True, **options)
        if made.hash in seen:
            return
        seen.add(made.hash)
        cubin = _cubin(f"{self.__module__.rpartition('.')[2]}.{self.__name__}", made)
        if cubin.shared > SHARED_MEMORY[capability]:
            said = f"{cubin.shared:,} bytes of shared memory, and sm_{capability} has {SHARED_MEMORY[capability]:,}"
            raise ValueError(f"a program of {cubin.kernel}({cubin.arguments}) takes {said}")
        cubins.append(cubin)

    cubins: list[Cubin] = []
    JITFunction.run = compile_only  # type: ignore[method-assign]
    driver.set_active(_Chip(capability))
    try:
        with _AsOnGpu():
            yield cubins
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = active


def _cubin(kernel: str, made: Any) -> Cubin:
    source, metadata = made.src, made.metadata
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    arguments = {name: str(constants.get(name, kind)) for name, kind in source.signature.items()}
    registers, stack = _resources(made.asm["cubin"])
    return Cubin(kernel, arguments, metadata.num_warps, registers, stack, metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, of each thread, as NVIDIA's cuobjdump reads them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{word}:(\d+)", said) for word in ("REG", "STACK"))
    assert registers is not None, said
    assert stack is not None, said
    return int(registers[1]), int(stack[1])
