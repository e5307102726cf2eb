"""How ranks reach each other, and the text of a kernel that does: rows put to a destination, signals raised, slots
awaited.

The algorithms (attend.py, moves.py, chunks.py) say what happens; how it is written for each reach stands here and
nowhere else. A destination is *near* if its segment is mapped into this process, *far* if only NVSHMEM gets there:

            rows are written to         what raises the signal
    near    the slot itself             a store of the signal, with release
    far     the staging area here       the put that carries the chunk as a whole

In a "peer" kernel all destinations are near, in an "nvshmem" kernel all are far, and a "mixed" kernel asks the column
``net`` of its tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sfcompile.codegen.kernels.text import (
    HEAP,
    TAG_BITS,
    Lines,
    columns,
    entry_name,
    heap_of,
    line_of,
    prologue,
)
from sfcompile.runtime.wires.symmetric_heap import NUM_BANKS, PLACE

_SCALARS = (
    "rank", "num_puts", "num_collects", "num_slots", "num_receivers", "num_ranks", "batch", "nbytes", "word_at",
    "epoch_awaited", "epoch_told", "tag_bits", "tag", "dst", "slot",
)  # fmt: skip
"""Arguments that no kernel is specialised to: their values change from rank to rank."""
_COUNTS = ("num_puts", "num_receivers", "num_collects", "num_slots", "num_ranks")
"""Those that say how much there is to do."""


def reach_of(machine_of: Sequence[int]) -> str:
    """How the ranks of some machines reach each other: "peer", "nvshmem" or "mixed"."""
    machines = len(set(machine_of))
    return "peer" if machines == 1 else "nvshmem" if machines == len(machine_of) else "mixed"


class KernelText(Lines):
    """Lines of a kernel of some reach.

    Args:
        reach: "peer", "nvshmem" or "mixed".
        group: who calls NVSHMEM together, see :func:`put_signal`.
    """

    def __init__(self, reach: str, group: str = "block") -> None:
        super().__init__()
        self.reach, self._group = reach, group

    @contextmanager
    def kernel(self, name: str, arguments: Sequence[str]) -> Iterator[None]:
        """A kernel's head and its first lines; what is added inside is its body."""
        scalars = ", ".join(f'"{argument}"' for argument in arguments if argument in _SCALARS)
        self(f"@triton.jit(do_not_specialize=[{scalars}])")
        with self.block(f"def {entry_name(name, self.reach)}({', '.join(arguments)}):"):
            self("program = tl.program_id(0)", "programs = tl.num_programs(0)", *prologue())
            self.stop_if_broken(*(name for name in arguments if name in _COUNTS))
            yield

    def stop_if_broken(self, *counts: str) -> None:
        """Leave nothing to do if a wait of this rank has given up: what would be sent is nothing that anyone wants."""
        self("going = unbroken(place_ptr)", *(f"{count} *= going" for count in counts))

    def read(self, row: str, table: tuple[str, ...]) -> None:
        """Load every column of a table's row into a variable of its name; ``net`` where somebody asks for it."""
        self(*columns(row, table, {name: name for name in table if name != "net" or self.reach == "mixed"}))

    def fork(self, near: Sequence[str], far: Sequence[str], if_near: str = "", revise: bool = False) -> None:
        """Lines for near destinations, or for far ones, or both and the test between them.

        Args:
            if_near: a test for near ones, whose lines then come first; "": the far ones come first.
            revise: let the second lines stand before the test, and the first ones change what they did (no else).
        """
        if self.reach != "mixed":
            self(*(near if self.reach == "peer" else far))
            return
        test, first, second = (if_near, near, far) if if_near else ("net != 0", far, near)
        if revise:
            self(*second)
        with self.block(f"if {test}:"):
            self(*first)
        if not revise:
            with self.block("else:"):
                self(*second)

    def target(self, slot_at: str, heap: str = "", if_near: str = "", revise: bool = False) -> None:
        """Set ``target``: where this rank writes what goes to ``slot_at`` (bytes in the bank) of ``dst``.

        Args:
            heap: the address of the destination's segment, if it has been loaded.
        """
        slot = f"target = {heap or heap_of('dst')} + bank_at + {slot_at}"
        self.fork([slot], ["target = bank + staging"], if_near, revise)

    def announce(self, slot: str, slot_at: str, heap: str = "", if_near: str = "") -> None:
        """Tell ``dst`` that its slot is filled; far away the staged chunk of ``nbytes`` goes with it."""
        far = self.put_signal("bank + staging", slot_at, self.signal_at(slot))
        with self.block("if unbroken(place_ptr) != 0:"):
            self.fork([self.near_signal(slot, heap)], far, if_near)

    def near_signal(self, slot: str, heap: str = "") -> str:
        """The line that raises the signal of a slot of ``dst``, which is near."""
        return f"raise_signal({heap or heap_of('dst')} + {self.signal_at(slot)}, signal)"

    @staticmethod
    def signal_at(slot: str) -> str:
        """Bytes from a segment's start to the signal of a slot."""
        return f"signals_at + {line_of(slot)}"

    def put_signal(self, source: str, slot_at: str, signal_at: str) -> list[str]:
        """Lines that put a chunk of ``nbytes`` to a slot of ``dst``, which is far, with its signal."""
        return put_signal("dst", source, f"bank_at + {slot_at}", "nbytes", signal_at, "signal", self._group)

    def wait(self, slot: str) -> None:
        """Wait until a slot of this rank is filled, by whatever call: a site's last kernel looks at the tags."""
        self.wait_word(f"signals + {line_of(slot)}", f"(epoch << {TAG_BITS})", slot)

    def check_tags(self) -> None:
        """In a site's last kernel: everything that comes to ``slots_ptr`` is there, and is of this call.

        Not all of it has been waited for: a kernel does not wait for what no query of this rank sees, or attends to
        when it has none. Such a chunk may be late, and this rank's credit follows: it would fall upon what comes next.
        """
        with self.block("if program == 0:"):
            self(f"status = tl.load(place_ptr + {PLACE.index('status')})", "s = 0")
            with self.block("while s < num_slots:"):
                self("arrived = tl.load(slots_ptr + s)")
                self.wait("arrived")
                self(f"note_stranger(signals + {line_of('arrived')}, signal, status)", "s += 1")

    def wait_for_credits(self) -> None:
        """Wait until the bank is free on every rank of ``receivers_ptr`` (numbers of the job); else put nothing."""
        self(
            f"before = epoch - {NUM_BANKS}",
            f"credits = heap + tl.load(place_ptr + {PLACE.index('credits_at')})",
            "r = 0",
        )
        with self.block("while r < num_receivers:"):
            self("receiver = tl.load(receivers_ptr + r)", f"credit = credits + {line_of('receiver')}")
            self.wait_word("credit", "before", "-1 - receiver")
            self("r += 1")
        self.stop_if_broken("num_puts")  # whoever has not given credit still reads the bank

    def wait_word(self, address: str, value: str, reported: str) -> None:
        """Wait until a word of this rank's segment holds a value or a greater one, or give up and report.

        Args:
            reported: what a report calls it: the slot, or -1 - rank for a credit.
        """
        self(f"wait_word({address}, {value}, place_ptr, {reported})")


def put_signal(
    dst: str, source: str, to_at: str, nbytes: str, signal_at: str, value: str, group: str = "block"
) -> list[str]:
    """Lines that put bytes from an address to ``to_at`` in a rank's segment by NVSHMEM, then raise a signal there.

    Args:
        group: "block": all threads of the program come here; "warp": those of some warps, of which the first one puts.
            NVSHMEM waits for all of a group, and where warps have work of their own not all of a program's come. Either
            way one thread hands the put over.
    """
    columns_of = {name: f"tl.load(heaps_ptr + {len(HEAP)} * {dst} + {i})" for i, name in enumerate(HEAP)}
    put = [
        f"putmem_signal_nbi_{group}(",
        f"    named + {to_at}, {source}, {nbytes},",
        f"    named + {signal_at}, {value}, SIGNAL_SET, pe,",
        ")",
    ]
    if group == "warp":
        put = ["if first_warp() != 0:", *(f"    {line}" for line in put)]
    return [f"pe = {columns_of['pe']}.to(tl.int32)", f"named = {columns_of['name']}", *put]
