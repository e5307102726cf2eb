"""What is left of a rank in a process that was forked from it: nothing that may be used.

The child has copies of the rank's descriptors and objects, but none of its threads, and the other ranks do not know
it. Said once over the copied connection to the store, a word of the child's would be taken for an answer to the
parent; a lock that a thread of the parent held stays locked. So the child forgets everything, but destroys nothing:
torch's destructors join threads that are not there.
"""

from __future__ import annotations

import os
from typing import Any

from sfcompile.errors import UnsupportedError


class Forked:
    """Stands in the child for everything that the rank held: whatever is asked of it is an error at once."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def error(self) -> UnsupportedError:
        """What every use says."""
        return UnsupportedError(
            f"process {os.getpid()} was forked from process {os.getppid()}, which is rank {self._rank}, and uses the "
            "rank's models",
            "the other ranks know the parent only: its connections and memory are not the child's",
            "call compiled models in the parent; start workers that need none of it with fork, others with spawn",
        )

    def __getattr__(self, name: str) -> Any:
        raise self.error()
