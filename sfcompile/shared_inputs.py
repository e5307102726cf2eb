"""options={"inputs": "rank0"}: rank 0's values of a call's inputs, on every rank, before the step.

The values travel as bytes, one after the other in one buffer, in two exchanges of the runtime: rank 0 gives every rank
an equal stretch of the buffer, then all ranks gather the stretches. So rank 0 sends the bytes once, not once to every
rank, and whatever carries exchanges carries them: shared memory, TCP, gloo, NVSHMEM. Ranks get new tensors, laid out
like their own; the caller's are not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import UnsupportedError
from sfcompile.runtime.program.phases import EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite, align, nbytes
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import Session

NAME = "rank 0's inputs"
_ALIGN = 16
"""Bytes to which a tensor and a stretch are aligned: no dtype is larger, and kernels copy so much at a time."""

Facts = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of an input."""


class SharedInputs:
    """The inputs of one compiled graph that rank 0 gives to all.

    Args:
        name: of the graph, the same on every rank.
        facts: of the inputs, in order; the same on every rank.
        device: where ranks exchange.
    """

    def __init__(self, name: str, facts: Sequence[Facts], num_ranks: int, device: torch.device) -> None:
        self.program = f"inputs-{hashlib.sha256(f'{name}{facts}'.encode()).hexdigest()[:16]}"
        self.facts, self._device = tuple(facts), device
        self._places: list[int] = []
        at = 0
        for shape, dtype in self.facts:
            self._places.append(at)
            at += align(nbytes(shape, dtype), _ALIGN)
        self._total = align(at, _ALIGN * num_ranks)
        share = self._total // num_ranks
        stretches = tuple(((rank * share, share),) for rank in range(num_ranks))
        whole = (((0, self._total),), *((),) * (num_ranks - 1))
        mesh = Mesh(1, num_ranks, tuple(range(num_ranks)))
        sites = (
            ExchangeSite(NAME, (self._total,), torch.uint8, 0, 1, 1, whole, 0, stretches),
            ExchangeSite.gather(NAME, (self._total,), torch.uint8, 0, stretches),
        )
        self.schedules: list[Schedule] = [build_exchange(site, mesh) for site in sites] if self._total else []
        for schedule in self.schedules:
            check(schedule)

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return sum(nbytes(shape, dtype) for shape, dtype in self.facts)

    def seconds(self, topology: Topology) -> float:
        """What the sending is predicted to take, once a call."""
        from sfcompile.codegen.plan.step import price  # loaded packages need no prices

        return sum(price(schedule, topology, 0.0).seconds for schedule in self.schedules)

    def line(self, topology: Topology) -> str:
        """What is sent at every call and what it is predicted to take, for the report."""
        return (
            f"rank 0's, sent to all before the step: {len(self.facts)} tensors, {self.nbytes / 2**20:.2f} MiB, "
            f"{self.seconds(topology) * 1e3:.3f} ms predicted"
        )

    def share(self, session: Session, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Collective, inside a call: rank 0's values, as new tensors with the shapes and strides of ``tensors``.

        Raises:
            UnsupportedError: elements of an input lie on one another in a way that cannot be made anew.
        """
        if not self._total:
            return list(tensors)
        stretch = self._exchange(session, 0, self._packed(session.rank, tensors))
        buffer = self._exchange(session, 1, stretch)
        values = []
        for tensor, (shape, dtype), at in zip(tensors, self.facts, self._places, strict=True):
            value = buffer[at : at + nbytes(shape, dtype)].view(dtype).view(shape)
            values.append(_laid_out(value.to(tensor.device), tensor))
        return values

    def _packed(self, rank: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """What this rank gives: all bytes, or nothing."""
        if rank != 0:
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        buffer = torch.empty(self._total, dtype=torch.uint8, device=self._device)
        for tensor, (shape, dtype), at in zip(tensors, self.facts, self._places, strict=True):
            buffer[at : at + nbytes(shape, dtype)].view(dtype).view(shape).copy_(tensor)
        return buffer

    def _exchange(self, session: Session, index: int, tensor: torch.Tensor) -> torch.Tensor:
        site = self.schedules[index].site
        assert isinstance(site, ExchangeSite)
        session.put(self.program, index, EXCHANGE_START, tensor)
        out = torch.empty(site.wanted_shape(session.rank), dtype=torch.uint8, device=self._device)
        session.receive(self.program, index, out)
        return out


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A contiguous value with the strides of another tensor of its shape."""
    if like.is_contiguous():
        return value
    sizes = [1 if step == 0 else size for size, step in zip(like.shape, like.stride(), strict=True)]
    reach = 1
    for step, size in sorted((step, size) for step, size in zip(like.stride(), sizes, strict=True) if size > 1):
        if step < reach:
            raise UnsupportedError(
                f"an input of shape {list(like.shape)} has strides {list(like.stride())}: its elements lie on one "
                "another",
                "with options={'inputs': 'rank0'} every rank makes a tensor of its own with rank 0's values",
                "give the model x.contiguous()",
            )
        reach = step * (size - 1) + reach
    dense = torch.empty_strided(sizes, like.stride(), dtype=like.dtype, device=like.device)
    dense.copy_(value[tuple(slice(0, size) for size in sizes)])
    return dense.expand(like.shape)
