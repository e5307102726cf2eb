"""Every error a user can meet. Leaf file: standard library only, importable from any layer.

A message has three sentences: what happened (with the numbers), why it matters, what to do. Under it come the
graph node with the user's own source line, or the rank, peer, slot and epochs of a runtime error.
"""

from __future__ import annotations

import re
from typing import Any

_FIELDS = ("what", "why", "fix", "node", "source", "rank", "world_size", "peer", "slot", "epoch", "seen_epoch")
_WORD = re.compile(
    r"(?!(?:pip|torch|torchrun|sfcompile|gloo|safetensors|diffusers|numpy|triton)\b)(?:a|[a-z]{2,})(?=[ ,;])"
)
"""A word that begins a sentence with a small letter, and is no name that is written so."""
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)[^\n]*(?:\n\s+(?P<text>[^\n]+))?')


class StreamFusionError(RuntimeError):
    """Base of all our errors.

    Args:
        what: what happened, with the numbers.
        why: why that cannot work.
        fix: what the user can do about it.
        node: the graph node (an fx node or its name) that the error is about. If it carries a stack trace and
            `source` is not given, the user's source line is taken from it.
        source: the user's source line, e.g. "dit.py:88: x = self.proj(x)".
        rank, world_size: the rank that raises, and how many there are.
        peer: the other rank of a transfer.
        slot: index in the signal array that was waited for.
        epoch: the epoch that was waited for.
        seen_epoch: the epoch that the slot held when we gave up.

    Attributes:
        on_every_rank: every rank raises it at the same point of a compile, so that none waits for another: what was
            compiled before goes on running.
    """

    on_every_rank = False

    def __init__(
        self,
        what: str,
        why: str = "",
        fix: str = "",
        node: object = None,
        source: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        peer: int | None = None,
        slot: int | str | None = None,
        epoch: int | None = None,
        seen_epoch: int | None = None,
    ) -> None:
        self.what = what
        self.why = why
        self.fix = fix
        self.node = None if node is None else str(node)
        self.source = source if source is not None else source_line(getattr(node, "stack_trace", None))
        self.rank = rank
        self.world_size = world_size
        self.peer = peer
        self.slot = slot
        self.epoch = epoch
        self.seen_epoch = seen_epoch
        super().__init__(self._render())

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call cls(*self.args), that is cls(rendered text): the fields would be lost between ranks.
        return _rebuild, (type(self), {name: getattr(self, name) for name in _FIELDS})

    def _render(self) -> str:
        text = " ".join([_sentence(self.what), *(_capital(_sentence(part)) for part in (self.why, self.fix) if part)])
        if self.rank is not None:
            where = f"{self.rank}" if self.world_size is None else f"{self.rank}/{self.world_size}"
            text = f"[rank {where}] {text}"
        wire = [
            f"{name} {value}"
            for name, value in (
                ("peer rank", self.peer),
                ("slot", self.slot),
                ("wanted epoch", self.epoch),
                ("seen epoch", self.seen_epoch),
            )
            if value is not None
        ]
        lines = [text]
        if wire:
            lines.append("  " + ", ".join(wire))
        if self.node is not None:
            lines.append(f"  at node `{self.node}`")
        if self.source is not None:
            lines.append(f"  in {self.source}")
        return "\n".join(lines)


class OptionError(StreamFusionError):
    """An option of the backend, or an argument of the command line, has an unknown name or a bad value."""


class MeshError(StreamFusionError):
    """The mesh does not fit the number of ranks."""


class TopologyError(StreamFusionError):
    """The topology cannot be read, or does not fit the ranks that run."""


class TrainingGraphError(StreamFusionError):
    """The graph needs gradients; only inference is supported."""


class RankMismatchError(StreamFusionError):
    """Ranks disagree about the program: other graphs, shapes or options."""


class RuntimeTimeoutError(StreamFusionError):
    """A wait on a peer took longer than `timeout_s`."""


class PeerDiedError(StreamFusionError):
    """A peer process has gone while we waited for it."""


class PeerFailedError(StreamFusionError):
    """Another rank failed first and said so."""


class HeapError(StreamFusionError):
    """The symmetric heap cannot be made, is too small, or differs between ranks."""


class WeightsError(StreamFusionError):
    """The ranks of a machine cannot hold one copy of their weights, or files of weights do not fit a model."""


class NotShardedError(StreamFusionError):
    """`strict=True` and part of the model stays replicated."""


class NumericsError(StreamFusionError):
    """`verify` found results that differ from those of one process."""


class UnsupportedError(StreamFusionError):
    """Something this version does not do yet, refused rather than done wrongly."""


class InternalError(StreamFusionError):
    """A mistake of ours, caught before it could give a wrong answer."""


class ScheduleError(InternalError):
    """A schedule breaks a rule that makes it safe to run; found by the checker."""


class RuleError(StreamFusionError):
    """An op rule is wrong: what it computes on shards is not the shard of what the op computes."""


class CodegenError(StreamFusionError):
    """A kernel could not be generated, written, compiled or loaded."""


class LaunchError(StreamFusionError):
    """Local ranks could not be started."""


class PackageError(StreamFusionError):
    """A package of `sfcompile.export` cannot be written, or is not one that can run here."""


class InputError(StreamFusionError):
    """A loaded package is called with other inputs than the model was exported with."""


def source_line(stack_trace: str | None) -> str | None:
    """The innermost frame of a stack trace outside of torch as "file:line: text"; None where there is no frame."""
    frames = list(_FRAME.finditer(stack_trace or ""))
    frames = [frame for frame in frames if "/torch/" not in frame["file"]] or frames  # torch's own layers say nothing
    if not frames:
        return None
    frame = frames[-1]
    text = frame["text"]
    return f"{frame['file']}:{frame['line']}" + (f": {text.strip()}" if text else "")


def _sentence(part: str) -> str:
    part = part.strip()
    return part if part.endswith((".", "!", "?", ":")) else part + "."


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:] if _WORD.match(sentence) else sentence


def _rebuild(cls: type[StreamFusionError], fields: dict[str, Any]) -> StreamFusionError:
    return cls(**fields)
