"""``torch.ops.streamfusion.library_call``: a Python function of a library, called in a graph as one op.

An attention of a library may be Python around kernels that no trace can enter, or that it would take apart into pieces
of which nobody knows what they do. Such a function stays whole: the graph names it by a key of :data:`CALLS`
(sfcompile/capture/library_functions.py fills it), and whoever runs the op calls the function as the model did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sfcompile.errors import UnsupportedError
from sfcompile.torch_private import AutocastState, autocast_as, functions_transformed

_library = torch.library.Library("streamfusion", "FRAGMENT")


@dataclass(frozen=True)
class LibraryCall:
    """A call of a function as a graph makes it.

    Attributes:
        function: what the model calls.
        arguments: its arguments by name; of a tensor its place among those that the op takes, as a :class:`TensorAt`.
        letters: the dims of the tensors that have some, by place (passes/rules/per_head.py); those of q come first.
        out: of the result, which has the sizes of q and the last one of v.
        around: the autocast state that the model calls it under.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    letters: Mapping[int, str]
    out: str
    around: AutocastState

    @property
    def query(self) -> int:
        """The place of q."""
        return next(iter(self.letters))


@dataclass(frozen=True)
class TensorAt:
    """Stands for a tensor among the arguments of a call."""

    place: int


CALLS: dict[str, LibraryCall] = {}
"""By the key in the graph: the function's name, its arguments that are no tensors, and a number where it is another
function of that name."""


def _run(tensors: list[torch.Tensor], key: str) -> torch.Tensor:
    call = CALLS[key]
    arguments = dict(call.arguments)
    rest = arguments.pop("**", {})
    arguments |= {name: tensors[value.place] for name, value in arguments.items() if isinstance(value, TensorAt)}
    with autocast_as(call.around), functions_transformed():
        out = call.function(**arguments, **rest)
    want = _shape(tensors, call)
    if not isinstance(out, torch.Tensor) or tuple(out.shape) != want or out.dtype != tensors[call.query].dtype:
        what = f"{out.dtype} {list(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise UnsupportedError(
            f"{key} returned {what} where {tensors[call.query].dtype} {list(want)} was expected",
            "an attention gives a tensor of q's dtype and sizes, with v's last one",
            "take what was registered with sfcompile.extend.register_attention_function back",
        )
    return out.clone(memory_format=torch.contiguous_format)


def _shape(tensors: list[torch.Tensor], call: LibraryCall) -> tuple[int, ...]:
    values = [place for place, letters in call.letters.items() if "D" in letters]
    return (*tensors[call.query].shape[:-1], tensors[values[-1]].shape[-1])


def _fake(tensors: list[torch.Tensor], key: str) -> torch.Tensor:
    call = CALLS[key]
    return tensors[call.query].new_empty(_shape(tensors, call))


_library.define("library_call(Tensor[] tensors, str key) -> Tensor")
_library.impl("library_call", _run, "CompositeExplicitAutograd")
torch.library.register_fake("streamfusion::library_call", _fake, lib=_library)
