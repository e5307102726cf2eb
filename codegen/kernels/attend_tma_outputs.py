"""How outputs go home in the kernel for Hopper (attend_tma.py): stored to a peer's slot, or put by a program apart.

Where the destination is reached by load and store a warpgroup stores its rows into the slot, and the last one to come
raises the signal. Else the rows go to the staging area, and one program of the launch, the *sender*, puts a chunk as a
whole, with its signal, as soon as all have come:

    warpgroups: rows -> staging area -> barrier of the warpgroup -> add to the chunk's arrival counter
    sender:     chunk by chunk, in the order of the units: poll the counter -> NVSHMEM's put with signal

NVSHMEM's put for a program would wait for all of its threads, which never meet here; there is one for a warp too. But
in a warpgroup its code costs the loop over blocks: lanes go different ways in it, and the assembler then trusts no warp
of the kernel's loops to be together (5 % more instructions, and spills at head size 128). In a warp of its own it
spills, for that has few registers. Before the warps part there are enough, so there it is, in a program that does not
attend: one of as many as the GPU has multiprocessors.

**Order.** A row's way to the network card, and why each step sees the one before:

    a thread's stores -> barrier of its warpgroup -> the add, by one thread (acq_rel, system)
                      -> the last warpgroup's add, which reads what all others' adds wrote
                      -> the sender's poll (acquire, system), by its first thread, reads the last add
                      -> barrier of four warps -> NVSHMEM's put, handed over by the first thread of the first of them

Each add releases what its thread has seen, not only what its warpgroup stored, so all rows happen before the last one
and before the put. No tensor copy reads the staged rows, so no proxy fence belongs here. Data before its signal is
NVSHMEM's promise of a put with signal. The staging area is used again in the epoch after next, whose put kernels have
waited for the credits of all ranks, so of all who got something out of it: a put that has not read its source cannot
have raised the signal behind which they read. A chunk without rows is not put: nobody would wait for its signal. The
sender sets the counter back: nobody adds to it again in this launch, and the next one follows on the stream.

**No wait without end.** The sender waits for programs of its own launch, which the GPU holds together (the launch is
cooperative), and they wait for peers only, not for it. One whose wait gave up goes on and counts too; but one that
begins after that does nothing and counts nothing, so the sender looks at each poll whether any wait has given up. Then
it sends nothing, as nobody of this rank does from there on.
"""

from __future__ import annotations

from sfcompile.codegen.kernels.reach import KernelText
from sfcompile.codegen.kernels.spec import KernelSpec
from sfcompile.codegen.kernels.tables import QUERY, UNIT
from sfcompile.codegen.kernels.text import columns, heap_of, prologue


def again() -> list[str]:
    """Where things lie, read again."""
    return [line for line in prologue() if not line.startswith("bank = ")]


def push(out: KernelText, spec: KernelSpec, consumers: int) -> None:
    """A warpgroup's rows go home, or to where the sender puts them from."""
    wanted = ["out_at", "out_slot"]
    wanted += ["staging"] if spec.reach != "peer" else []
    wanted += ["net"] if spec.reach == "mixed" else []
    out(*columns("query", QUERY, {name: name for name in wanted}), *again())
    if spec.reach != "nvshmem":
        out(f"to = {heap_of('dst')}")
    out.target("out_at", heap="to", revise=True)
    out(
        f"target_ptr = gl.multiple_of(target.to(gl.pointer_type({spec.element})), 16)",
        "target_ptr += (bh * rows).to(gl.int64) * D",
        "gl.store(target_ptr + row[:, None] * D + wide_col[None, :], o, mask=inside)",
    )
    near = [
        f"if last_of(counters_ptr + out_slot, {consumers} * tiles):",
        "    if unbroken(place_ptr) != 0:",
        f"        {out.near_signal('out_slot', 'to')}",
    ]
    out.fork(near, ["come(counters_ptr + out_slot)"])


def send_outputs(out: KernelText, spec: KernelSpec, consumers: int) -> None:
    """The sender: outputs of each unit that ends a chunk of queries for another machine, as soon as they are there."""
    out("u = 0")
    with out.block("while u < num_units:"):
        out(f"unit = units_ptr + u * {len(UNIT)}", f"query = queries_ptr + tl.load(unit) * {len(QUERY)}")
        out(*columns("unit", UNIT, {"done": "done"}), *columns("query", QUERY, {"dst": "dst", "net": "net"}))
        with out.block("if (done != 0) & (dst >= 0) & (net != 0):"):
            wanted = ("rows", "out_at", "out_slot", "staging", "nbytes")
            out(*columns("query", QUERY, {name: name for name in wanted}))
            out(
                "tiles = (rows + BM - 1) // BM * batch * heads",
                f"wait_for_all(counters_ptr + out_slot, {consumers} * tiles, place_ptr)",
            )
            with out.block("if unbroken(place_ptr) != 0:"):
                out(*out.put_signal("bank + staging", "out_at", out.signal_at("out_slot")))
        out("u += 1")
