"""Inputs that share memory, by hand and against the bytes that they really cover."""

from __future__ import annotations

import pytest
import torch
from helpers import captured
from hypothesis import given, settings
from hypothesis import strategies as st

from sfcompile.capture.aliases import aliases, joined_outputs, overlap, refuse_overlap, shared_outputs
from sfcompile.errors import UnsupportedError
from sfcompile.torch_private import FakeTensorMode, same_storage

views = st.tuples(st.integers(0, 8), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(0, 3))


@given(views, views)
@settings(max_examples=200, deadline=None)
def test_no_shared_byte_is_missed(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    buffer = torch.arange(40)
    one, two = (buffer.as_strided((n, m), (s, t), at) for at, n, s, m, t in (a, b))
    if set(one.flatten().tolist()) & set(two.flatten().tolist()):
        assert overlap([one, two], [0]) == (0, 1)
    else:
        assert overlap([one, buffer.clone()], [0]) is None


def test_halves_of_one_buffer_do_not_overlap() -> None:
    cache = torch.zeros(2, 3, 4)
    assert overlap([cache[0], cache[1], 7], [0, 1]) is None
    assert overlap([cache[:, :2], cache[:, 1:]], [0]) == (0, 1)
    assert overlap([cache[:, :2], cache[:, 1:]], []) is None
    with FakeTensorMode():
        fake = torch.zeros(6)
        assert overlap([fake[:4], fake[3:]], [1]) == (1, 0)


def test_the_refusal_names_both_inputs() -> None:
    x = torch.zeros(4)
    with pytest.raises(UnsupportedError, match="input 'k_cache' is written to in place.*with input 'window'"):
        refuse_overlap([x, x[1:3]], [0], ["k_cache", "window"])


def test_outputs_that_are_views_of_inputs_are_found_and_made_anew() -> None:
    def step(x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        cache.add_(y)
        return y, cache.t()[2:], x.clone(), x[:, 1:], x.expand(2, 3, 4), x.t().reshape(-1), y[1:]

    x, cache = torch.randn(3, 4), torch.randn(3, 4)
    views = captured(step, x, cache).aliases
    assert [(view.output, view.input) for view in views] == [(1, 1), (3, 0), (4, 0)]
    wide = torch.randn(5, 4)  # the caller's tensors may lie anywhere in their storages
    given = [wide[1:4], cache]
    want = step(*given)
    for view in views:
        got = view.of(given[view.input])
        assert torch.equal(got, want[view.output]) and got.data_ptr() == want[view.output].data_ptr()


def test_what_reads_an_inputs_memory_otherwise_is_no_view_of_it() -> None:
    z, x = torch.randn(3, dtype=torch.complex64), torch.randn(3)
    assert not aliases([z.conj(), torch.view_as_real(z), z.conj().imag, x.view(torch.int32), x.clone(), 3], [z, x])
    assert len(aliases([z.flip(0), x[1:]], [z, x])) == 1


def test_outputs_that_are_views_of_outputs_are_found_and_made_anew() -> None:
    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.sin(x)
        q, k = (x * 3).chunk(2, -1)
        return y[:, 1:3], y, y.t(), y.detach(), q, k, y * 1, x[0], y.view(-1)[3:9]

    x = torch.randn(4, 6)
    facts, want = captured(step, x).facts, step(x)
    assert [(view.output, view.base) for view in facts.shared] == [(2, 1), (3, 1), (0, 1), (8, 1)]
    for base in (want[1].clone(), want[1].t().contiguous().t()):  # as the graph may lay it out
        for view in facts.shared:
            laid = view.based(base)
            laid.add_(0)
            assert same_storage(view.of(laid), laid) and torch.equal(view.of(laid), want[view.output])


@given(st.lists(views, min_size=2, max_size=4))
@settings(max_examples=200, deadline=None)
def test_outputs_that_overlap_are_one_memory_again(cuts: list[tuple[int, ...]]) -> None:
    """Whatever is written to one is seen in the others exactly where it would be without us."""
    buffer = torch.arange(40.0)
    wants = [buffer.as_strided((n, m), (s, t), at) for at, n, s, m, t in cuts]
    values = [want.clone() for want in wants]
    shared = shared_outputs(wants, [])
    for several in joined_outputs(wants, [view.output for view in shared]):
        several.put_together(values)
    for view in shared:
        values[view.base] = view.based(values[view.base])
        values[view.output] = view.of(values[view.base])
    for number, (want, value) in enumerate(zip(wants, values, strict=True)):
        assert torch.equal(value, want)
        want[0, 0] = value[0, 0] = 100.0 + number
    assert all(torch.equal(value, want) for value, want in zip(values, wants, strict=True))


def test_parts_of_one_product_stay_apart() -> None:
    product = torch.randn(2, 50, 96)
    parts = product.split([32, 16, 48], -1)
    assert not joined_outputs([*parts, product[0, :10, :4], product[1]], [3, 4])
    (several,) = joined_outputs([product[:, :30], parts[1], product[:, 20:]], [1])
    assert [place for place, *_ in several.places] == [0, 2] and several.size == product.numel()
