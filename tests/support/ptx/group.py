"""wgmma: products of a warpgroup that read shared memory by the async proxy and end when they are waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx import tiles
from ptx.clocks import ASYNC
from ptx.emit import STOP
from ptx.memory import IN_FLIGHT
from ptx.text import PtxError

Array = NDArray[Any]
GROUP_SYNC = 998
"""What a lane waits at that waits for its warpgroup."""


@dataclass(frozen=True)
class GroupProduct:
    """A wgmma of one warpgroup that has not been waited for.

    Attributes:
        group: number of the group that it is committed with.
        registers: those that hold its sum, and copies of them.
        reads: pieces of shared memory (memory.py) with the warps and lanes that stand for the readers.
    """

    lanes: Array
    group: int
    registers: set[str]
    reads: list[tuple[Array, Array, Array]]
    at: int


class GroupProducts:
    """What a gang (launch.py) does with warpgroups."""

    launch: Any
    numbers: Array
    cta: Array
    warp: Array
    lanes: Any
    whole: Any
    count: int

    def group_fence(self, following: int) -> int:
        """wgmma.fence orders registers; the machine reads them when the product is issued. Warps of a group that come
        at different times go on together."""
        self.whole()
        if self.count % 128 == 0 and not (self.numbers[::128] % 128).any():
            return following
        launch = self.launch
        launch.pc[self.numbers] = following
        launch.waiting[self.numbers] = GROUP_SYNC
        for first in np.unique(self.numbers // 128) * 128:
            lanes = slice(first, first + 128)
            if (launch.waiting[lanes] == GROUP_SYNC).all():
                launch.waiting[lanes] = -1
        return STOP

    def commit_products(self) -> None:
        """wgmma.commit_group."""
        self.launch.product_group[self.lanes] += 1

    def wait_products(self, most: int) -> None:
        """wgmma.wait_group: sums of all but the ``most`` youngest groups may be used, operands overwritten."""
        launch, left = self.launch, []
        for product in launch.products:
            first = product.lanes[0]
            if first in self.numbers and product.group < launch.product_group[first] - most:
                for pieces, warp, lane in product.reads:
                    launch.memory.note_read(pieces, warp, lane, launch.clocks.now(warp), product.at)
            else:
                left.append(product)
        launch.products = left

    def group_product(
        self, shape: str, kind: str, prefix: str, numbers: list[int], a: tuple[Array, ...], b: Array, add: Any,
        flip_a: int, flip_b: int, at: int, following: int,
    ) -> int:  # fmt: skip
        """wgmma.mma_async of all warpgroups of the gang."""
        self.whole()
        if self.count % 128 or (self.numbers[::128] % 128).any():
            raise PtxError(f"{self.launch.name}: a product of warpgroups is run by {self.count} threads")
        rows, width, depth = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
        bank = self.launch.banks[prefix]
        for first in range(0, self.count, 128):
            part = slice(first, first + 128)
            lanes = self.numbers[part]
            reads: list[tuple[Array, Array, Array]] = []
            if len(a) == 1:
                left = self._operand(int(a[0][first]), rows, depth, kind, bool(flip_a), part, at, reads)
            else:
                left = tiles.group_rows(tuple(x[part] for x in a), kind)
            right = self._operand(int(b[first]), width, depth, kind, bool(flip_b), part, at, reads)
            total = left @ right.T
            if bool(add if isinstance(add, bool) else add[first]):
                total = total + tiles.group_sum([bank[number, lanes] for number in numbers])
            for number, register in zip(numbers, tiles.group_registers(total), strict=True):
                bank[number, lanes] = register
            names = {f"%{prefix}{number}" for number in numbers}
            group = int(self.launch.product_group[lanes[0]])
            self.launch.products.append(GroupProduct(lanes, group, names, reads, at))
        return following

    def _operand(
        self, descriptor: int, extent: int, depth: int, kind: str, flipped: bool, part: slice, at: int,
        reads: list[tuple[Array, Array, Array]],
    ) -> Array:  # fmt: skip
        """An operand in shared memory, read by the async proxy until the product is waited for."""
        size = 2 if kind in ("f16", "bf16") else 4
        chunks = tiles.chunk_addresses(descriptor, extent, depth * size, depth, flipped)
        address = chunks.ravel() + self.launch.shared_at[self.cta[part][0]]
        reader = np.arange(len(address)) % 128
        warp, lane = self.warp[part][reader], reader % 32
        memory = self.launch.memory
        data = memory.load(warp, lane, address, 4, 4, at, ASYNC)
        pieces = memory.locate(address, 16, at)
        memory.note_read(pieces, warp, lane, IN_FLIGHT, at)
        reads.append((pieces, warp, lane))
        return tiles.operand(data.reshape(*chunks.shape, 4), kind, flipped)
