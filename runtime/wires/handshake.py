"""How two ranks prove to each other over a new connection that they are of one job, without saying what they know.

All ranks of a job have one key. Over the connection go (caller: who connected)

    caller     hello: "sfcompile links 1", its rank, the rank it wants, a nonce
    listener   a nonce, and HMAC(key, "listener" + everything that was said)
    caller     HMAC(key, "caller" + everything that was said)
    listener   HMAC(key, "welcome" + everything that was said)

Each side has proved the key when the other has checked its HMAC-SHA256. The nonces are 32 random bytes of either side,
fresh for every connection: an HMAC that was heard on another connection fits no other. The words before what was said
differ by side and step, and the hello names both ranks: no rank's proof can be given back to it as another's.
The listener says nothing that depends on the key before it has read a hello for its own rank, and nothing afterwards to
a caller that proves nothing.

The key is made of the job's token and of the secret that the user may have given to every rank (SFCOMPILE_SECRET). The
token travels through the job's store; the secret does not travel. With a secret, who reads the store cannot make the
key. What goes over a connection later is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct
from collections.abc import Generator

SECRET = "SFCOMPILE_SECRET"
"""Environment variable: a secret of the job, the same on every rank."""
SECRET_BYTES = 16
"""A shorter secret is refused: who records a handshake can try short ones one after the other."""
PROOF_BYTES = hashlib.sha256().digest_size
NONCE_BYTES = 32
_MAGIC = b"sfcompile links 1"
_HELLO = struct.Struct(f"<{len(_MAGIC)}sII{NONCE_BYTES}s")

Talk = Generator[tuple[bytes, int], bytes, int]
"""One side of a handshake: yields bytes to send and how many to read then, is sent what was read; returns the peer."""


class StrangerError(ConnectionError):
    """Who is at the other end is not a rank of this job that has its key."""


def given_secret() -> bytes | None:
    """The secret that the user gave this rank; None: none."""
    return os.environb.get(SECRET.encode()) or None


def make_key(token: bytes, secret: bytes | None) -> bytes:
    """The key of a job.

    Args:
        token: of the job, random, from the store.
        secret: what does not travel.
    """
    return hmac.digest(secret or b"", _MAGIC + token, hashlib.sha256)


def rank_proof(key: bytes, rank: int) -> str:
    """What a rank shows through the store, to find out before any connection whether all have one key."""
    return _prove(key, b"rank", struct.pack("<I", rank)).hex()


def call(key: bytes, rank: int, peer: int) -> Talk:
    """The caller's side.

    Raises:
        StrangerError: the listener has another key.
    """
    said = _HELLO.pack(_MAGIC, rank, peer, secrets.token_bytes(NONCE_BYTES))
    answer = yield said, NONCE_BYTES + PROOF_BYTES
    said += answer[:NONCE_BYTES]
    _check(key, b"listener", said, answer[NONCE_BYTES:], f"rank {peer}'s address")
    welcome = yield _prove(key, b"caller", said), PROOF_BYTES
    _check(key, b"welcome", said, welcome, f"rank {peer}'s address")
    return peer


def answer(key: bytes, rank: int) -> Talk:
    """The listener's side.

    Raises:
        StrangerError: the caller has no hello for this rank, or another key.
    """
    said = yield b"", _HELLO.size
    magic, caller, wanted, _ = _HELLO.unpack(said)
    if magic != _MAGIC or wanted != rank:
        raise StrangerError(f"a caller of rank {rank} speaks another language, or wants another rank")
    said += secrets.token_bytes(NONCE_BYTES)
    proof = yield said[_HELLO.size :] + _prove(key, b"listener", said), PROOF_BYTES
    _check(key, b"caller", said, proof, f"a caller of rank {rank}")
    yield _prove(key, b"welcome", said), 0
    return int(caller)


def _prove(key: bytes, step: bytes, said: bytes) -> bytes:
    return hmac.digest(key, step + said, hashlib.sha256)


def _check(key: bytes, step: bytes, said: bytes, proof: bytes, who: str) -> None:
    if not hmac.compare_digest(proof, _prove(key, step, said)):
        raise StrangerError(f"{who} has not the key of this job")
