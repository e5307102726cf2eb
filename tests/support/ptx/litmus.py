"""Small kernels in PTX, and worlds of a few GPUs that run them: for the machine's own tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.world import World


def kernel(body: str, params: int = 2, threads: int = 32, name: str = "k") -> str:
    """PTX of a kernel whose parameters are addresses, in %rd0, %rd1, ...; other registers are free to use."""
    head = ",\n".join(f".param .u64 {name}_param_{i}" for i in range(params))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [{name}_param_{i}];" for i in range(params))
    return (
        f".visible .entry {name}(\n{head}\n)\n.reqntid {threads}\n{{\n.reg .pred %p<10>;\n.reg .b16 %rs<20>;\n"
        f".reg .b32 %r<100>;\n.reg .b64 %rd<50>;\n{loads}\n{body}\nret;\n}}\n"
    )


def run(
    bodies: Sequence[str], arrays: Sequence[np.ndarray], seed: int = 0, threads: int = 32, grid: int = 1,
    gpus: bool = True, together: float = 0.5, shared_bytes: int = 4096,
) -> World:  # fmt: skip
    """Kernels at the same time, each on a GPU of its own (or all on one), with the arrays as parameters.

    Each array must be of a multiple of 4 bytes.
    """
    world = World(seed, together)
    for array in arrays:
        world.memory.add(array.ctypes.data, array.nbytes, "an array", array)
    for gpu, body in enumerate(bodies):
        text = body if body.startswith(".visible") else kernel(body, len(arrays), threads)
        stream = world.stream(gpu if gpus else 0)
        world.launch(stream, world.code(text), grid, [array.ctypes.data for array in arrays], shared_bytes)
    world.run()
    return world


def kinds(world: World) -> set[str]:
    """Kinds of the races that were seen."""
    return {race.kind for race in world.memory.races}
