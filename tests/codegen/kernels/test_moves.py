"""Small kernels in the interpreter: cut and copy, wait and bring home."""

from __future__ import annotations

import ast

import pytest
import torch
from deadline import Deadline
from row_forms import forms, traced
from watched import UNWATCHED, Watch

from sfcompile.codegen.kernels.moves import (
    MoveSpec,
    collect_source,
    move_arguments,
    put_source,
)
from sfcompile.codegen.kernels.tables import COLLECT, PUT
from sfcompile.codegen.rows.elements import DTYPES
from sfcompile.codegen.rows.row_ops import compile_rows
from sfcompile.codegen.toolchain.interpreter import interpreting
from sfcompile.codegen.toolchain.loader import load_source
from sfcompile.runtime.program.formats import BF16, FP8, decode, encode, form, travel_bytes
from sfcompile.runtime.wires.symmetric_heap import HeapSize, local_segment
from sfcompile.runtime.wires.transport import word_of

SIZE = HeapSize(2, 4096, 2)


@pytest.mark.parametrize("width", [24, 32, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_comes_home(width: int, dtype: torch.dtype) -> None:
    """Heads 1 to 3 of rows 2 to 7 go from rank 0 into slot 1 of rank 1 and come home there, bit by bit."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    segments = [local_segment(SIZE) for _ in range(2)]
    heaps = torch.tensor([(s.address, i, segments[0].address) for i, s in enumerate(segments)])
    watch = Watch()
    place = torch.tensor(SIZE.place(1, word_of(1, 5), watch.watched))
    x = torch.randn(2, 4, 9, width).to(dtype)
    nbytes = 2 * 2 * 5 * width * dtype.itemsize
    row = dict(zip(PUT, (1, 1, 256, 1, 2, 2, 5, 0, 0, nbytes), strict=True))
    puts = torch.tensor([[row[name] for name in PUT]])
    spec = MoveSpec(name, width, lines=4)
    put = load_source(put_source(spec), True).put
    collect = load_source(collect_source(spec), True).collect
    receivers, counters = torch.tensor([1]), torch.zeros(2, dtype=torch.int32)
    out = torch.zeros(2, 4, 9, width, dtype=dtype)
    home = torch.tensor([[dict(zip(COLLECT, (1, 256, 1, 2, 2, 5), strict=True))[name] for name in COLLECT]])
    with interpreting(Deadline(5.0)):
        put[(3,)](x, *x.stride()[:3], heaps, place, puts, receivers, counters, 0, 1, 1, 2)
        assert segments[1].signals[1].tolist() == [0, word_of(1, 5)] and counters.tolist() == [0, 0]
        for tag, noted in ((5, 0), (6, word_of(1, 5))):  # a chunk of call 5, seen by ranks in call 5 and in call 6
            place[1] = word_of(1, tag)
            collect[(3,)](out, *out.stride()[:3], heaps, place, home, torch.tensor([1]), 1, 1, 1, 2)
            assert watch.status["stranger"] == noted
    assert torch.equal(out[:, 1:3, 2:7], x[:, 1:3, 2:7])
    assert not out[:, 0].any() and not out[:, :, :2].any()


@pytest.mark.parametrize(
    ("written", "width", "dtype"),
    [(FP8, 24, torch.float32), (FP8, 32, torch.bfloat16), (FP8, 6, torch.float16), (BF16, 40, torch.float32)],
)
def test_what_is_put_travels_as_the_hosts_bytes(written: str, width: int, dtype: torch.dtype) -> None:
    """The same heads and rows: encoded in the slot of rank 1, as they are in rank 0's own bank, decoded at home."""
    segments = [local_segment(HeapSize(2, 8192, 2)) for _ in range(2)]
    size = segments[0].size
    heaps = torch.tensor([(s.address, i, segments[0].address) for i, s in enumerate(segments)])
    place = torch.tensor(size.place(1, word_of(1, 5), UNWATCHED.watched))
    x = torch.randn(2, 4, 9, width).to(dtype)
    sent = x[:, 1:3, 2:7]
    shape, kind = form(written, (2, 2, 5, width), dtype)
    nbytes = travel_bytes(written, 2 * 2 * 5, width, dtype)
    puts = torch.tensor([(1, 1, 256, 1, 2, 2, 5, 0, 0, nbytes), (-1, -1, 4096, 1, 2, 2, 5, 0, 0, sent.nbytes)])
    spec = MoveSpec(DTYPES[dtype], width, lines=4, written=written)
    put, collect = load_source(put_source(spec), True).put, load_source(collect_source(spec), True).collect
    out = torch.zeros(2, 4, 9, width, dtype=dtype)
    counters, home = torch.zeros(2, dtype=torch.int32), torch.tensor([(1, 256, 1, 2, 2, 5)])
    with interpreting(Deadline(5.0)):
        put[(3,)](x, *x.stride()[:3], heaps, place, puts, torch.tensor([1]), counters, 0, 2, 1, 2)
        collect[(3,)](out, *out.stride()[:3], heaps, place, home, torch.tensor([1]), 1, 1, 1, 2)
    arrived = segments[1].chunk(1, 256, shape, kind)
    assert torch.equal(arrived, encode(sent, written))
    assert torch.equal(segments[0].chunk(1, 4096, (2, 2, 5, width), dtype), sent)
    assert torch.equal(out[:, 1:3, 2:7], decode(arrived, written, (2, 2, 5, width), dtype))
    assert not out[:, 0].any() and not out[:, :, :2].any()


def test_a_bank_that_was_not_read_is_not_overwritten() -> None:
    """Epoch 3 uses the bank of epoch 1: without credit for it the put must wait."""
    segment = local_segment(SIZE)
    heaps = torch.tensor([(segment.address, 0, segment.address)])
    place = torch.tensor(SIZE.place(3, word_of(3, 0), UNWATCHED.watched))
    put = load_source(put_source(MoveSpec("fp32", 32)), True).put
    given = (
        heaps,
        place,
        torch.zeros(0, len(PUT), dtype=torch.int64),
        torch.tensor([1]),
        torch.zeros(2).int(),
        0,
        0,
        1,
        1,
    )
    x = torch.zeros(1, 1, 1, 32)
    with interpreting(Deadline(0.2)), pytest.raises(Exception, match="did not arrive") as caught:
        put[(1,)](x, *x.stride()[:3], *given)
    assert caught.value is not None
    credit = torch.frombuffer(segment._buffer, dtype=torch.int64)[SIZE.credits_at // 8 + 8]
    credit.fill_(1)
    with interpreting(Deadline(0.2)):
        put[(1,)](x, *x.stride()[:3], *given)


def test_a_put_without_credit_gives_up_and_leaves_the_bank_alone() -> None:
    """The receiver still reads the bank: neither a chunk nor a signal may go there, now or later."""
    segments = [local_segment(SIZE) for _ in range(2)]
    heaps = torch.tensor([(s.address, i, segments[0].address) for i, s in enumerate(segments)])
    watch = Watch(limit_s=0.05)
    put = load_source(put_source(MoveSpec("fp32", 32)), True).put
    x = torch.ones(1, 1, 4, 32)
    row = dict(zip(PUT, (1, 1, 256, 0, 1, 0, 4, 0, 0, 4 * 128), strict=True))
    puts, counters = torch.tensor([[row[name] for name in PUT]]), torch.zeros(2).int()
    with interpreting(Deadline(20.0)):
        for epoch in (3, 2):  # epoch 2 has credit, but this rank is broken by then
            place = torch.tensor(SIZE.place(epoch, word_of(epoch, 0), watch.watched, 6))
            put[(2,)](x, *x.stride()[:3], heaps, place, puts, torch.tensor([1]), counters, 0, 1, 1, 1)
    told = watch.status
    assert told["gave_up"] and (told["site"], told["slot"], told["wanted"], told["seen"]) == (6, -2, 1, 0)
    assert not segments[1].signals.any() and not segments[1]._bytes[SIZE.banks_at :].any()


@pytest.mark.parametrize("late", [True, False])
def test_a_chunk_that_does_not_come_ends_a_collect(late: bool) -> None:
    """Because its time is up, or because the host says so, in well under its time."""
    segment, watch = local_segment(SIZE), Watch(limit_s=0.05 if late else 600.0)
    watch.abort.fill_(0 if late else 1)
    heaps = torch.tensor([(segment.address, 0, segment.address)])
    place = torch.tensor(SIZE.place(1, word_of(1, 5), watch.watched, 4))
    collect = load_source(collect_source(MoveSpec("fp32", 32)), True).collect
    out = torch.zeros(1, 1, 4, 32)
    home = torch.tensor([[dict(zip(COLLECT, (1, 256, 0, 1, 0, 4), strict=True))[name] for name in COLLECT]])
    with interpreting(Deadline(20.0)):
        collect[(2,)](out, *out.stride()[:3], heaps, place, home, torch.tensor([1]), 0, 1, 1, 1)
    told = watch.status
    assert told["gave_up"] and (told["site"], told["slot"], told["wanted"], told["seen"]) == (4, 1, word_of(1, 0), 0)


@pytest.mark.parametrize("reach", ["peer", "nvshmem", "mixed"])
def test_every_text_is_code_with_the_arguments_that_it_names(reach: str) -> None:
    spec = MoveSpec("fp16", 64, reach)
    for name, source in (("put", put_source(spec)), ("collect", collect_source(spec))):
        tree = ast.parse(source)
        kernel = tree.body[-1]
        assert isinstance(kernel, ast.FunctionDef) and kernel.name.startswith(name)
        assert [entry.arg for entry in kernel.args.args] == list(move_arguments(name))
    gm, root = traced(*forms(width=64)["pairs"])
    rows, _ = compile_rows(root, frozenset(node for node in gm.graph.nodes if node.op == "call_function"))
    (*_, fused) = ast.parse(put_source(spec, rows)).body
    assert isinstance(fused, ast.FunctionDef)
    assert [entry.arg for entry in fused.args.args] == list(move_arguments("put", rows))
    assert not any(entry.arg.startswith("x_") for entry in fused.args.args)
