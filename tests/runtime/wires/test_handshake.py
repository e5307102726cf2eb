"""Two sides of a handshake without a network: who has the key, and what a recorded or changed word is worth."""

from __future__ import annotations

import pytest

from sfcompile.runtime.wires import handshake
from sfcompile.runtime.wires.handshake import NONCE_BYTES, PROOF_BYTES, StrangerError, answer, call, make_key

KEY = make_key(b"t" * 32, b"s" * 16)


def talk(
    callers: bytes = KEY, listeners: bytes = KEY, rank: int = 5, wanted: int = 2, listener: int = 2
) -> tuple[list[bytes], list[int]]:
    """What goes over the connection, in order, and whom the sides found (the caller's peer, the listener's)."""
    caller, guest = call(callers, rank, wanted), answer(listeners, listener)
    hello, _ = next(caller)
    next(guest)
    proof, _ = guest.send(hello)
    back, _ = caller.send(proof)
    welcome, _ = guest.send(back)
    found = []
    for side, word in ((guest, None), (caller, welcome)):
        with pytest.raises(StopIteration) as done:
            side.send(word)  # type: ignore[arg-type]
        found.append(done.value.value)
    return [hello, proof, back, welcome], found[::-1]


def test_ranks_with_one_key_find_each_other() -> None:
    assert talk()[1] == [2, 5]


def test_neither_key_nor_token_goes_over_the_connection() -> None:
    words = b"".join(talk()[0])
    assert KEY not in words and b"t" * 8 not in words and b"s" * 8 not in words


def test_the_key_depends_on_token_and_secret() -> None:
    keys = {make_key(token, secret) for token in (b"a" * 32, b"b" * 32) for secret in (None, b"c" * 16, b"d" * 16)}
    assert len(keys) == 6


def test_the_caller_finds_out_first_that_the_listener_has_another_key() -> None:
    with pytest.raises(StrangerError, match="rank 2's address has not the key"):
        talk(listeners=make_key(b"t" * 32, b"x" * 16))


def test_the_listener_wants_a_proof_of_the_key() -> None:
    """A caller that goes on whatever it hears, and one that gives the listener's own proof back."""
    for prove in (lambda proof: b"\0" * PROOF_BYTES, lambda proof: proof):
        guest = answer(KEY, 2)
        next(guest)
        said, _ = guest.send(next(call(KEY, 5, 2))[0])
        with pytest.raises(StrangerError, match="a caller of rank 2 has not the key"):
            guest.send(prove(said[NONCE_BYTES:]))


def test_nothing_is_said_to_who_wants_another_rank_or_speaks_another_language() -> None:
    hello = next(call(KEY, 5, 2))[0]
    for listener, words in ((3, hello), (2, b"GET / HTTP/1.1\r\n".ljust(len(hello), b" "))):
        guest = answer(KEY, listener)
        next(guest)
        with pytest.raises(StrangerError):
            guest.send(words)


def test_a_recorded_handshake_is_worth_nothing() -> None:
    """To either side, whole or in part: nonces of both are fresh."""
    hello, proof, back, welcome = talk()[0]
    guest = answer(KEY, 2)
    next(guest)
    fresh, _ = guest.send(hello)
    assert fresh[:NONCE_BYTES] != proof[:NONCE_BYTES]
    with pytest.raises(StrangerError):
        guest.send(back)
    caller = call(KEY, 5, 2)
    next(caller)
    with pytest.raises(StrangerError):
        caller.send(proof)
    caller, guest = call(KEY, 5, 2), answer(KEY, 2)  # the old end behind a fresh beginning
    next(guest)
    caller.send(guest.send(next(caller)[0])[0])
    with pytest.raises(StrangerError):
        caller.send(welcome)


def test_a_proof_is_of_one_pair_of_ranks_and_of_one_side() -> None:
    """What a real caller proves to one rank does not pass as another rank's call."""
    guest = answer(KEY, 2)
    next(guest)
    caller = call(KEY, 5, 2)
    hello, _ = next(caller)
    forged = hello.replace((5).to_bytes(4, "little"), (6).to_bytes(4, "little"), 1)
    assert forged != hello
    proof, _ = guest.send(forged)
    with pytest.raises(StrangerError):
        caller.send(proof)  # the listener has signed rank 6's hello


@pytest.mark.parametrize("step", range(4))
def test_every_changed_bit_ends_the_handshake(step: int) -> None:
    caller, guest = call(KEY, 5, 2), answer(KEY, 2)
    next(guest)
    sides = [guest, caller, guest, caller]
    word = next(caller)[0]
    with pytest.raises(StrangerError):  # a changed hello is found by the caller: it was signed as it came
        for i, side in enumerate(sides):
            if i == step:
                word = word[:-1] + bytes([word[-1] ^ 1])
            word = side.send(word)[0]


def test_ranks_show_each_other_that_they_have_one_key() -> None:
    other = make_key(b"t" * 32, b"x" * 16)
    assert len({handshake.rank_proof(key, rank) for key in (KEY, other) for rank in range(3)}) == 6


def test_the_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(handshake.SECRET, raising=False)
    assert handshake.given_secret() is None
    monkeypatch.setenv(handshake.SECRET, "")
    assert handshake.given_secret() is None
    monkeypatch.setenv(handshake.SECRET, "0123456789abcdef")
    assert handshake.given_secret() == b"0123456789abcdef"
