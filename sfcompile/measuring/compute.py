"""How fast a rank computes, in a few short runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from sfcompile.runtime.rank.attention_aten import attend

WINDOW_S = 0.01
"""A rate is taken over stretches of this length, in which all ranks compute."""
WINDOWS = 2
_LEAST_S = 1.5e-3
"""A call that takes less is made larger: its start must not count."""
Run = Callable[[], object]


def compute_rates(
    device: torch.device, dtype: torch.dtype, synchronize: Callable[[], object], meet: Callable[[], object]
) -> dict[str, list[float]]:
    """Collective: constants of a topology, this rank's own, while all ranks do the same.

    Args:
        synchronize: waits for the device.
        meet: returns on all ranks at about the same time.

    Returns:
        By name, the rate in each of WINDOWS stretches, the same stretches on all ranks; of ``launch_s``, on a CPU,
        seconds, one value.
    """
    bench = _Windows(device, dtype, synchronize, meet)
    return {
        "flops_per_s": bench.rates(bench.matmul),
        "attention_flops_per_s": bench.rates(bench.attention),
        "memory_bytes_per_s": bench.rates(bench.pointwise),
    } | ({} if device.type == "cuda" else {"launch_s": [bench.launch_s()]})


class _Windows:
    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        synchronize: Callable[[], object],
        meet: Callable[[], object],
    ) -> None:
        self._device, self._dtype, self._synchronize, self._meet = device, dtype, synchronize, meet
        self._on_gpu = device.type == "cuda"
        # A generator of its own: the numbers that the user's program draws stay what they were.
        self._generator = torch.Generator(device).manual_seed(0)

    def rates(self, work: Callable[[int], tuple[Run, float]]) -> list[float]:
        """How much a second, by stretch, of what ``work`` makes for a scale: a call, and how much it does."""
        scale = 16 if self._on_gpu else 1
        while True:
            run, amount = work(scale)
            run()  # the first call of a kind sets things up
            took = self._timed(run)
            if took >= _LEAST_S or scale >= 64:
                break
            scale *= 4
        self._meet()
        return [amount * self._calls_per_s(run) for _ in range(WINDOWS)]

    def _timed(self, run: Run) -> float:
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - start

    def _calls_per_s(self, run: Run) -> float:
        """Over whole calls: ranks that share a core have their turns within."""
        calls, start = 0, time.perf_counter()
        while True:
            run()
            self._synchronize()
            calls += 1
            took = time.perf_counter() - start
            if took >= WINDOW_S:
                return calls / took

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
