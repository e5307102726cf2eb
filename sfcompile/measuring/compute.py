"""How fast a rank computes, in a few short runs, and how much of the time it has a core for that.

Ranks that share cores compute by turns of some milliseconds. What one does in a stretch of such a length is luck; what
it does in a second of a core's time is not, and neither is its part of the time over many turns. Both are measured in
one run without a break, in which all ranks compute, and a rank's rate is their product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfcompile.runtime.rank.attention_aten import attend

WINDOW_S = 0.01
"""A rate is taken over stretches of this length."""
WINDOWS = 2
_LEAST_S = 1.5e-3
"""A call that takes less is made larger: its start must not count."""
Run = Callable[[], object]


@dataclass(frozen=True)
class OwnCompute:
    """One rank's own numbers.

    Attributes:
        rates: constants of a topology by name, a second, in each of WINDOWS stretches, the same on all ranks: of a
            core's time where a rank on a CPU computes in one thread, else of the clock's.
        turns: part of the time in which that thread had a core; 1 where the clock counts.
        launch_s: seconds of a call with next to nothing in it, on a CPU.
    """

    rates: dict[str, list[float]]
    turns: float
    launch_s: float | None


def compute_rates(
    device: torch.device, dtype: torch.dtype, synchronize: Callable[[], object], meet: Callable[[], object]
) -> OwnCompute:
    """Collective: this rank's numbers, while all ranks do the same.

    Args:
        synchronize: waits for the device.
        meet: returns on all ranks at about the same time.
    """
    bench = _Windows(device, dtype, synchronize)
    kinds = {
        "flops_per_s": bench.sized(bench.matmul),
        "attention_flops_per_s": bench.sized(bench.attention),
        "memory_bytes_per_s": bench.sized(bench.pointwise),
    }
    launch_s = None if device.type == "cuda" else bench.launch_s()
    meet()
    rates = {name: [amount * bench.calls_per_s(run) for _ in range(WINDOWS)] for name, (run, amount) in kinds.items()}
    return OwnCompute(rates, bench.turns, launch_s)


class _Windows:
    def __init__(self, device: torch.device, dtype: torch.dtype, synchronize: Callable[[], object]) -> None:
        self._device, self._dtype, self._synchronize = device, dtype, synchronize
        self._on_gpu = device.type == "cuda"
        self._by_core = not self._on_gpu and torch.get_num_threads() == 1
        self._clock_s = self._core_s = 0.0
        # A generator of its own: the numbers that the user's program draws stay what they were.
        self._generator = torch.Generator(device).manual_seed(0)

    @property
    def turns(self) -> float:
        """Part of all stretches so far in which this thread had a core."""
        return min(self._core_s / self._clock_s, 1.0) if self._by_core and self._clock_s else 1.0

    def sized(self, work: Callable[[int], tuple[Run, float]]) -> tuple[Run, float]:
        """A call that takes long enough to be timed, and how much it does: ``work`` makes them for a scale."""
        scale = 16 if self._on_gpu else 1
        while True:
            run, amount = work(scale)
            run()  # the first call of a kind sets things up
            if self._timed(run) >= _LEAST_S or scale >= 64:
                return run, amount
            scale *= 4

    def _timed(self, run: Run) -> float:
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - start

    def calls_per_s(self, run: Run) -> float:
        """Whole calls in one stretch."""
        calls, start, began = 0, time.perf_counter(), time.thread_time()
        while True:
            run()
            self._synchronize()
            calls += 1
            took = time.perf_counter() - start
            if took >= WINDOW_S:
                break
        core_s = time.thread_time() - began
        self._clock_s += took
        self._core_s += core_s
        return calls / max(core_s if self._by_core else took, 1e-9)

    def _random(self, *shape: int) -> torch.Tensor:
        drawn = torch.rand(shape, generator=self._generator, device=self._device, dtype=torch.float32)
        return (drawn - 0.5).to(self._dtype)

    def matmul(self, scale: int) -> tuple[Run, float]:
        """Rows times a square matrix; FLOPs."""
        side = 4096 if self._on_gpu else 1024
        a, b = self._random(64 * scale, side), self._random(side, side)
        return lambda: a @ b, 2.0 * 64 * scale * side * side

    def attention(self, scale: int) -> tuple[Run, float]:
        """Eight heads of 64; FLOPs."""
        keys = 4096 if self._on_gpu else 1024
        q, k = self._random(1, 8, 64 * scale, 64), self._random(1, 8, keys, 64)
        return lambda: attend(q, k, k, None, 0.125), 4.0 * 8 * 64 * scale * keys * 64

    def pointwise(self, scale: int) -> tuple[Run, float]:
        """A product, a GELU and a norm over 2 MiB in fp32, or as many of them; bytes moved."""
        b = self._random(512 * scale, 1024)
        c = b.clone()

        def run() -> torch.Tensor:
            return torch.nn.functional.layer_norm(torch.nn.functional.gelu(b * c, approximate="tanh"), (1024,))

        return run, (3.0 + 2.0 + 2.0) * b.nbytes

    def launch_s(self) -> float:
        """Seconds of an attention call with next to nothing in it."""
        q, k = self._random(1, 8, 8, 64), self._random(1, 8, 64, 64)
        attend(q, k, k, None, 0.125)
        return statistics.median(self._timed(lambda: attend(q, k, k, None, 0.125)) for _ in range(20))
