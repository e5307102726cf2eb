"""Writes the kernels that move whole chunks as bytes (send, receive), give credits (release), or only wait or tell."""

from __future__ import annotations

from dataclasses import dataclass

from sfcompile.codegen.kernels.reach import KernelText, put_signal
from sfcompile.codegen.kernels.text import columns, heap_of, line_of, module
from sfcompile.runtime.wires.symmetric_heap import PLACE

SEND = ("dst", "slot", "from_at", "to_at", "nbytes", "net", "staging")
RECEIVE = ("slot", "at", "to_at", "nbytes")
"""Columns of the tables. ``from_at`` and RECEIVE's ``to_at`` are bytes in the local buffer, multiples of 16; all
other places are bytes in the bank. Chunks are moved in words of 4 bytes: slots and buffers have room for a whole last
word."""


@dataclass(frozen=True)
class ChunkSpec:
    """What the kernels of this file are specialised to; see KernelSpec."""

    reach: str = "peer"


def chunk_arguments(name: str) -> tuple[str, ...]:
    """Arguments of "send", "receive", "release", "wait" or "tell", in order."""
    return {
        "send": ("x_ptr", "heaps_ptr", "place_ptr", "sends_ptr", "receivers_ptr", "counters_ptr", "rank",
                 "num_puts", "num_receivers"),
        "receive": ("x_ptr", "heaps_ptr", "place_ptr", "receives_ptr", "slots_ptr", "rank", "num_collects",
                    "num_slots"),
        "release": ("heaps_ptr", "place_ptr", "rank", "num_ranks"),
        "wait": ("heaps_ptr", "place_ptr", "rank", "word_at", "epoch_awaited", "tag_bits", "slot"),
        "tell": ("heaps_ptr", "place_ptr", "rank", "dst", "word_at", "epoch_told", "tag_bits", "tag"),
    }[name]  # fmt: skip


def send_source(spec: ChunkSpec) -> str:
    """The module of ``send``: chunks of a local buffer go into the slots of other ranks, each with its signal."""
    out = KernelText(spec.reach)
    with out.kernel("send", chunk_arguments("send")):
        out.wait_for_credits()
        out("x = x_ptr.to(tl.int64)", "p = 0")
        with out.block("while p < num_puts:"):
            out(f"chunk = sends_ptr + p * {len(SEND)}", *columns("chunk", SEND, {name: name for name in SEND}))
            out.target("to_at", if_near="net == 0", revise=True)
            out("copy_words(target, x + from_at, (nbytes + 3) // 4, program, programs, 1024)")
            with out.block("if last_of(counters_ptr + slot, programs):"):
                out.announce("slot", "to_at", if_near="net == 0")
            out("p += 1")
    return module("Sends chunks of a buffer.", out.text)


def receive_source(spec: ChunkSpec) -> str:
    """The module of ``receive``: wait for each chunk and copy it into a local buffer, which no bank's turn moves."""
    out = KernelText(spec.reach)
    with out.kernel("receive", chunk_arguments("receive")):
        out("x = x_ptr.to(tl.int64)", "c = 0")
        with out.block("while c < num_collects:"):
            out(f"chunk = receives_ptr + c * {len(RECEIVE)}")
            out.read("chunk", RECEIVE)
            out.wait("slot")
            out("copy_words(x + to_at, bank + at, (nbytes + 3) // 4, program, programs, 1024)", "c += 1")
        out.check_tags()
    return module("Brings chunks home into a buffer.", out.text)


def release_source(spec: ChunkSpec) -> str:
    """The module of ``release``: tell every rank that this one has read the epoch and all before it.

    It is launched after the kernels that read; a launch sees the end of those before it on its stream. ``heaps_ptr``
    lists the ranks of the job here, not of a mesh, and ``rank`` is this rank's number in the job.
    """
    # A rank gives credit to all, itself included, and itself it reaches by a store.
    out = KernelText("peer" if spec.reach == "peer" else "mixed")
    with out.kernel("release", chunk_arguments("release")):
        out(f"credit = tl.load(place_ptr + {PLACE.index('credits_at')}) + {line_of('rank.to(tl.int64)')}")
        out(f"scratch = tl.load(place_ptr + {PLACE.index('scratch_at')})")
        out("other = program")
        with out.block("while other < num_ranks:"):
            out(f"to = {heap_of('other')}")
            # By NVSHMEM a signal travels with data: 16 bytes of scratch that nobody reads.
            put = put_signal("other", "heap + scratch", "scratch + 16", "16", "credit", "epoch")
            out.fork(["raise_signal(to + credit, epoch)"], put, if_near="to != 0")
            out("other += programs")
    return module("Gives credits.", out.text)


def wait_source() -> str:
    """The module of ``wait``: what follows on the stream comes after a word of this rank's segment, or finds that the
    wait gave up.

    ``tag_bits`` are those below the epoch in the word: TAG_BITS for a slot's signal, 0 for a credit.
    """
    out = KernelText("peer")
    with out.kernel("wait", chunk_arguments("wait")):
        out.wait_word("heap + word_at", "(epoch_awaited.to(tl.int64) << tag_bits)", "slot")
    return module("Waits for a word.", out.text)


def tell_source() -> str:
    """The module of ``tell``: a word of another rank's segment, which is near, is published after all that the stream
    held before: the launch sees the end of it, and the release passes it on. Nothing if a wait of this rank gave up.
    """
    out = KernelText("peer")
    with out.kernel("tell", chunk_arguments("tell")):
        with out.block("if going != 0:"):
            value = "(epoch_told.to(tl.int64) << tag_bits) + tag"
            out(f"raise_signal({heap_of('dst')} + word_at, {value})")
    return module("Tells a word.", out.text)
