"""A package that is ready to run: its inputs are compared with the signature, and its result takes the model's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sfcompile.capture.randomness import generator_state, set_generator_state, state_mark
from sfcompile.errors import InputError, PackageError, StreamFusionError
from sfcompile.package.call import Signature, restore
from sfcompile.runtime.rank.session import Session
from sfcompile.shared_inputs import SharedInputs
from sfcompile.torch_private import autocast_off

_CPU = torch.device("cpu")


class LoadedModel:
    """A package that is ready to run: call it as the model was called at the export.

    Attributes:
        manifest: what the package says of itself (JSON): versions, ranks, mesh, signature, members with their hashes.
        plan: the plan as text.
        run: the local graph: its placeholders' values to its outputs.
        session: of this rank; None: one rank.
        name: of the package, the same on every rank: calls are told apart by it.
        shared: gives every rank rank 0's inputs; None: ranks use their own.
        draws: whether the graph draws random numbers.
    """

    run: Callable[..., Any]
    session: Session | None = None
    name: str = "package"
    shared: SharedInputs | None = None
    draws: bool = False

    def __init__(self, manifest: Mapping[str, Any], plan: str, weights: Mapping[str, torch.Tensor]) -> None:
        self.manifest = manifest
        self.plan = plan
        self._signature = Signature(manifest["signature"])
        self._result = manifest["result"]
        self._strides = [tuple(facts["stride"]) for facts in manifest["signature"]["tensors"]]
        self._slots = [
            (place, source) for place, (kind, source) in enumerate(manifest["placeholders"]) if kind == "input"
        ]
        self._values: list[Any] = [
            weights[source] if kind == "weight" else None for kind, source in manifest["placeholders"]
        ]
        self._written: list[int] = manifest["written"]
        self._kept = [place for place in self._written if self._values[place] is not None]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on inputs of the exported shapes. Collective: all ranks call with equal inputs and get all outputs.

        Dataclasses and named tuples of the result come as :class:`sfcompile.package.call.Record`.

        Raises:
            InputError: other shapes, dtypes, constants or arguments than at the export.
            PackageError: an operator of the graph raised; its node is named, and the other ranks are told.
            RankMismatchError: another rank makes another call, or has other inputs.
        """
        tensors = self._signature.tensors(args, kwargs)
        outputs = self._run(tensors)
        kept = len(outputs) - len(self._written)
        for place, value in zip(self._written, outputs[kept:], strict=True):
            target = dict(self._slots).get(place)
            (self._values[place] if target is None else tensors[target]).copy_(value)
        return restore(self._result, [*outputs[:kept], *tensors])

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """The graph's outputs; whatever it raises is told to the other ranks, which wait for what it would send."""
        values = self._placed(inputs)
        with autocast_off():  # the casts of autocast stand in the graph
            if self.session is None:
                return _outputs(self.run, values)
            mine = [*inputs, *self.beside(whole=self.shared is not None)]
            with self.session.call(self.name, mine if self.manifest["inputs"] == "checked" else []):
                if self.shared is not None:
                    values = self._placed_by_rank0(self.shared.share(self.session, mine), len(inputs))
                return _outputs(self.run, values)

    def beside(self, whole: bool) -> list[torch.Tensor]:
        """What a call reads beside its inputs and must be the same on every rank: buffers that calls write to, for what
        one leaves there the next one reads; the generator's state (if not ``whole``: its mark), if the graph draws."""
        state = [generator_state(_CPU) if whole else state_mark(_CPU)] if self.draws else []
        return [*(self._values[place] for place in self._kept), *state]

    def _placed_by_rank0(self, shared: Sequence[torch.Tensor], inputs: int) -> list[Any]:
        """As :meth:`_placed`, with rank 0's buffers and state too; ``shared``: its inputs, then its :meth:`beside`."""
        values = self._placed(shared[:inputs])
        for place, value in zip(self._kept, shared[inputs:], strict=False):
            values[place] = value
        if self.draws:
            set_generator_state(_CPU, shared[-1])
        return values

    def _placed(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """What the graph is called with: weights, and inputs laid out as at the export."""
        values = list(self._values)
        for place, source in self._slots:
            values[place] = _laid_out(inputs[source], self._strides[source], f"input {source}")
        return values

    def __repr__(self) -> str:
        return f"LoadedModel({self.manifest['model']}, {self.manifest['ranks']} ranks: {self.manifest['plan']})"


def _outputs(run: Callable[..., Any], values: Sequence[torch.Tensor]) -> list[Any]:
    try:
        return list(run(*values))
    except StreamFusionError:
        raise
    except Exception as error:
        raise PackageError(
            f"the compiled graph of the package failed ({type(error).__name__}: {str(error)[:500]})",
            "it does not fit the inputs, or this machine has too little memory",
            "load it with inner='eager' to see the node that fails",
        ) from error


def _laid_out(tensor: torch.Tensor, strides: Sequence[int], name: str) -> torch.Tensor:
    try:
        return with_strides(tensor, strides)
    except RuntimeError as error:
        raise InputError(
            f"{name} has strides {list(tensor.stride())}, and at the export it had {list(strides)}",
            f"it cannot be copied to those ({str(error).splitlines()[0]})",
            "lay it out as at the export, or export once more with these inputs",
        ) from error


def with_strides(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The tensor with the strides that its graph was compiled for; itself if it has them."""
    same = all(n < 2 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))
    if same:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
