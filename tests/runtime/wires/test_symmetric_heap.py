"""Segments: layout, words, notices."""

from __future__ import annotations

import torch

from sfcompile.runtime.wires.symmetric_heap import (
    LINE_BYTES,
    NUM_BANKS,
    HeapSize,
    local_segment,
    view_at,
)

SIZE = HeapSize(num_slots=5, bank_bytes=4096)


def test_words_and_banks_do_not_overlap() -> None:
    segment = local_segment(SIZE)
    for bank in range(NUM_BANKS):
        segment.chunk(bank, 0, (1024,), torch.float32).fill_(bank + 1)
    assert segment.done == 0 and segment.aborted is None and not segment.signals.any()
    segment.done = 7
    segment.signals[:] = 9
    segment.abort("x" * 10_000)
    assert segment.done == 7 and (segment.signals == 9).all()
    for bank in range(NUM_BANKS):
        assert (segment.chunk(bank, 0, (1024,), torch.float32) == bank + 1).all()


def test_each_signal_has_a_cache_line_of_its_own() -> None:
    assert all(stride >= 64 for stride in local_segment(SIZE).signals.strides)


def test_chunks_are_views() -> None:
    segment = local_segment(SIZE)
    segment.chunk(1, 128, (2, 3), torch.bfloat16).fill_(2.0)
    assert segment.chunk(1, 128, (6,), torch.bfloat16).tolist() == [2.0] * 6
    assert segment.chunk(0, 64, (2, 0, 4), torch.float32).shape == (2, 0, 4)


def test_the_first_notice_stays() -> None:
    segment = local_segment(SIZE)
    segment.abort("rank 3: out of memory \N{EM DASH} see its log")
    segment.abort("rank 1: rank 3 has gone")
    assert segment.aborted == "rank 3: out of memory \N{EM DASH} see its log"


def test_the_last_word_lies_beside_the_notice() -> None:
    segment = local_segment(SIZE)
    assert segment.left is None
    segment.leave("y" * 10_000)
    assert segment.aborted is None and not segment.signals.any() and segment.done == 0
    segment.abort("x" * 10_000)
    assert set(segment.left or "") == {"y"} and set(segment.aborted or "") == {"x"}
    assert len(segment.left or "") >= 500 and len(segment.aborted or "") >= 2000


def test_sizes_grow() -> None:
    other = HeapSize(9, 64)
    assert not SIZE.holds(other) and SIZE.holds(HeapSize(5, 64))
    assert SIZE.grown(other) == HeapSize(9, 4096)


def test_words_of_different_ranks_lie_on_lines_of_their_own() -> None:
    size = HeapSize(num_slots=3, bank_bytes=128, num_credits=2)
    words = [size.signal_at(bank, slot) for bank in range(NUM_BANKS) for slot in range(3)]
    words += [size.credit_at(rank) for rank in range(2)]
    assert words == [size.signals_at + LINE_BYTES * i for i in range(8)]
    assert words[-1] + LINE_BYTES == size.banks_at


def test_a_view_lies_where_it_should() -> None:
    memory = torch.arange(32, dtype=torch.uint8)
    assert view_at(memory, 8, (2, 3), torch.uint8).tolist() == [[8, 9, 10], [11, 12, 13]]
    view_at(memory, 16, (2,), torch.int64).zero_()
    assert memory.tolist() == [*range(16), *[0] * 16]
    assert view_at(memory, 0, (0, 4), torch.float32).shape == (0, 4)
