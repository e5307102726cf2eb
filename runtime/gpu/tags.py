"""Whether all chunks that came to a GPU were of this rank's calls.

Kernels wait for the epoch alone; a site's last kernel compares what came with the call's own signal and notes one that
differs in a word on the device. The host does not wait for that word. At the end of a call, on its stream, the word is
copied to where the host reads it when it likes, and an assertion on the device then stops the stream: whoever reads the
call's result gets an error, and who makes another call learns from the host's copy what it was.
"""

from __future__ import annotations

import torch

from sfcompile.errors import RankMismatchError
from sfcompile.runtime.wires.transport import TAG_BITS, out_of_step
from sfcompile.torch_private import assert_on_device


class TagStatus:
    """The word on the device, and the host's copy of it.

    Attributes:
        word: int64 [1]: a signal of another call that came; 0: none has.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._on_gpu = rank, device.type == "cuda"
        self.word = torch.zeros(1, dtype=torch.int64, device=device)
        self._known = torch.zeros(1, dtype=torch.int64, pin_memory=self._on_gpu)

    def end_call(self) -> None:
        """After a call's last kernel, on its stream.

        Raises:
            RankMismatchError: the host knows already that a chunk of another call has come.
        """
        self._known.copy_(self.word, non_blocking=True)
        if self._on_gpu:
            # After the copy: when the assertion has stopped the stream, the host's copy says why.
            assert_on_device(self.word == 0, "streamfusion: a chunk of another call came: ranks are out of step")
        error = self.error()
        if error is not None:
            raise error

    def error(self) -> RankMismatchError | None:
        """What the host knows by now."""
        seen = int(self._known)
        if not seen:
            return None
        what = f"rank {self._rank} got a chunk of another call than it is in"
        return out_of_step(what, self._rank, epoch=seen >> TAG_BITS)
