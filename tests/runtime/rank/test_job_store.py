"""The store with limits: answers, silence, loss, signatures, the beating heart."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch.distributed as dist

from sfcompile.errors import OptionError, RankMismatchError
from sfcompile.runtime.rank.job_store import BOUND, JobStore, StoreLostError, check_secret
from sfcompile.runtime.wires.handshake import SECRET


@pytest.fixture
def shared() -> Any:
    return dist.HashStore()


def test_what_it_does(shared: Any) -> None:
    store = JobStore(shared)
    assert store.get("a", 1.0) is None and store.present(["a", "b"], 1.0) == [False, False]
    store.set("a", "1", 1.0)
    assert store.get("a", 1.0) == "1" and store.present(["a", "b"], 1.0) == [True, False]
    assert store.get_all(["a", "b"], 1.0) is None
    assert store.first("b", "mine", 1.0) == "mine" and store.first("b", "late", 1.0) == "mine"
    assert store.get_all(["a", "b"], 1.0) == ["1", "mine"]
    assert [store.add("n", 1, 1.0), store.add("n", 2, 1.0)] == [1, 3]
    store.close()


class Silent:
    """A store whose host is stopped."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.go_on.wait(20.0)
        return False


def test_a_silent_store_holds_nobody() -> None:
    silent = Silent()
    store = JobStore(silent)
    for _ in range(2):  # the second waits behind the first
        with pytest.raises(StoreLostError, match="has not answered for 0.1 s"):
            store.get("a", 0.1)
    silent.go_on.set()


class Gone:
    """A store whose host has ended."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("failed to recv, got 0 bytes\nstack")


def test_a_store_that_has_gone_says_so_in_one_line() -> None:
    with pytest.raises(StoreLostError, match="^failed to recv, got 0 bytes$"):
        JobStore(Gone()).get("a", 5.0)


def test_with_a_secret_only_signed_words_count(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "ours")
    one, other = JobStore(shared), JobStore(shared)
    one.set("a", "text", 1.0)
    assert other.get("a", 1.0) == "text" and other.first("a", "late", 1.0) == "text"
    shared.set("stranger", "text")
    shared.set("moved", shared.get("a"))
    monkeypatch.setenv(SECRET, "another")
    odd = JobStore(shared)
    for store, key in ((one, "stranger"), (one, "moved"), (odd, "a")):
        with pytest.raises(RankMismatchError, match="is not signed"):
            store.get(key, 1.0)


def test_what_was_recorded_elsewhere_is_refused(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one secret: words of another world, and what ranks agreed on in an earlier session with the same names."""
    monkeypatch.setenv(SECRET, "ours")
    before, group = JobStore(shared, "job/0"), JobStore(shared, "ranks-0-1/0")
    before.bind(["a", "b"])
    before.set(f"{BOUND}1.0/0", "an old plan", 1.0)
    before.set("meeting/0.0/0", "an old hello", 1.0)
    now, beside = JobStore(shared, "job/0"), JobStore(shared, "job/0")
    assert now.get("meeting/0.0/0", 1.0) == "an old hello"  # here it says another nonce than its rank
    now.bind(["a", "c"])
    beside.bind(["a", "c"])
    for store, key in ((now, f"{BOUND}1.0/0"), (group, "meeting/0.0/0")):
        with pytest.raises(RankMismatchError, match="is not signed"):
            store.get(key, 1.0)
    now.set(f"{BOUND}1.0/0", "a plan", 1.0)
    assert beside.get(f"{BOUND}1.0/0", 1.0) == "a plan"
    group.set("failed/0", "read before ranks have met", 1.0)
    group.bind(["a", "b"])
    assert group.get("failed/0", 1.0) == "read before ranks have met"


def test_the_heart_beats_until_the_end(shared: Any) -> None:
    store = JobStore(shared)
    store.beat("alive", "me", 0.02)
    first = store.get("alive", 5.0)
    assert first is not None and first.startswith("me ")
    deadline = time.monotonic() + 20.0
    while store.get("alive", 5.0) == first and time.monotonic() < deadline:
        time.sleep(0.01)
    word = store.get("alive", 5.0)
    assert word is not None and int(word.split()[1]) > int(first.split()[1])
    store.close()
    store._thread.join(10.0)
    assert not store._thread.is_alive()


@pytest.mark.parametrize(("secret", "short"), [("", False), ("fifteen bytes..", True), ("0123456789abcdef", False)])
def test_short_secrets_are_refused(monkeypatch: pytest.MonkeyPatch, secret: str, short: bool) -> None:
    monkeypatch.setenv(SECRET, secret)
    with pytest.raises(OptionError, match="has 15 bytes, and 16 at least") if short else nullcontext():
        check_secret()
