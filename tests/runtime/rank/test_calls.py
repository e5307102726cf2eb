"""Names of calls: what makes two calls different, and that threads take turns."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.rank.calls import SAMPLES, Call, Calls, fingerprint
from sfcompile.runtime.wires.transport import TAG_BITS, word_of


def test_every_part_of_a_call_is_in_its_tag() -> None:
    call = Call("program", 3, 7)
    others = [Call("other", 3, 7), Call("program", 4, 7), Call("program", 3, 8)]
    assert len({call.tag(0), call.tag(1), *(other.tag(0) for other in others)}) == 5
    assert call.tag(0) == Call("program", 3, 7).tag(0) < 2**TAG_BITS


def test_a_signal_word_grows_with_the_epoch() -> None:
    words = [word_of(epoch, tag) for epoch, tag in ((1, 2**TAG_BITS - 1), (2, 0), (3, 5), (4, 5))]
    assert words == sorted(words) and [word >> TAG_BITS for word in words] == [1, 2, 3, 4]


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_have_one_fingerprint_however_they_lie(dtype: torch.dtype) -> None:
    value = torch.randn(2, 3, 50).abs().mul(3).to(dtype)
    assert fingerprint([value]) == fingerprint([value.mT.contiguous().mT]) == fingerprint([value.clone()])
    assert fingerprint([value, value]) != fingerprint([value])


def test_values_that_are_conjugated_or_negated_when_they_are_read() -> None:
    value = torch.randn(3, 50, dtype=torch.complex64)
    for lazy in (value.conj(), value.conj().imag, value[:, 3:].conj().imag):
        assert fingerprint([lazy]) == fingerprint([lazy.resolve_conj().resolve_neg()])


def test_a_fingerprint_is_read_where_the_values_are() -> None:
    value = torch.randn(3, 53)
    with torch.device("meta"):
        mark = fingerprint([value])
    assert mark == fingerprint([value])


def test_other_noise_another_step_and_another_shape_are_seen() -> None:
    noise, step = torch.randn(1, 4096, 64), torch.tensor([0.3])
    mark = fingerprint([noise, step])
    assert mark != fingerprint([torch.randn_like(noise), step]) and mark != fingerprint([noise, step + 1e-6])
    assert mark != fingerprint([noise.view(1, 64, 4096), step])
    small = torch.zeros(SAMPLES)
    for i in range(SAMPLES):  # of a small tensor every element counts
        one = small.clone()
        one[i] = 1
        assert fingerprint([one]) != fingerprint([small])
    assert fingerprint([torch.zeros(0, 3)]) != fingerprint([torch.zeros(3, 0)])


def test_calls_of_threads_queue_and_are_counted() -> None:
    calls, seen, inside = Calls(), [], []

    def work() -> None:
        with calls.under_way("p", 0) as call:
            inside.append(call)
            time.sleep(0.01)
            assert inside == [call] and calls.current is call
            inside.clear()
            seen.append(call.number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 2, 3, 4] and calls.current is None
    calls.restart(9)
    with pytest.raises(ValueError), calls.under_way("p", 0) as call:
        raise ValueError(call.number)
    assert calls.count == 10 and calls.current is None


def test_a_call_inside_a_call_is_refused() -> None:
    """Of an operator that calls a compiled model, say: the thread would wait for itself, without a limit."""
    calls = Calls()
    with calls.under_way("p", 0) as call:
        for again in (lambda: calls.under_way("q", 0).__enter__(), lambda: calls.turn):
            with pytest.raises(UnsupportedError, match="inside a call of a compiled model"):
                again()
        assert calls.current is call and calls.count == 1
    with calls.turn, pytest.raises(ValueError):
        raise ValueError
    with calls.under_way("q", 0) as call:
        assert call.number == 2
