"""Who reaches into a storage that holds nothing gets an error with words; address zero would end the process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sfcompile.errors import WeightsError
from sfcompile.runtime.rank.no_memory import NoMemory, without_memory
from sfcompile.torch_private import no_torch_function, wrapper_tensor


class Looks(torch.Tensor):
    """A wrapper of which no op can be computed."""

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(func))


def looks() -> torch.Tensor:
    tensor: torch.Tensor = wrapper_tensor(Looks, (7, 5), torch.empty(0))
    without_memory(tensor, lambda name: WeightsError(f"{name} is asked for", "it has none", "take another"))
    return tensor


def test_what_compilers_ask_is_answered() -> None:
    tensor = looks()
    storage = tensor.untyped_storage()
    assert isinstance(storage, NoMemory) and str(storage) == repr(storage) == "NoMemory()"
    assert storage.nbytes() == storage.size() == len(storage) == 0 and storage.resize_(0) is storage
    assert storage._cdata == tensor.untyped_storage()._cdata != looks().untyped_storage()._cdata
    assert tensor._typed_storage()._cdata == storage._cdata and not tensor.is_shared()


def test_it_says_so_as_long_as_the_tensor_lives() -> None:
    tensor = looks()  # nobody holds the Python object of its storage
    with pytest.raises(WeightsError):
        tensor.untyped_storage().fill_(0)
    assert isinstance(torch.Tensor.untyped_storage(tensor), NoMemory)


INTO: dict[str, Callable[[Any], Any]] = {
    "copy": lambda s: s.copy_(torch.UntypedStorage(140)),
    "to another": lambda s: torch.UntypedStorage(140).copy_(s),
    "fill": lambda s: s.fill_(1),
    "read": lambda s: s[3],
    "write": lambda s: s.__setitem__(3, 1),
    "all": list,
    "list": lambda s: s.tolist(),
    "larger": lambda s: s.resize_(1 << 20),
    "clone": lambda s: s.clone(),
    "address": lambda s: s.data_ptr(),
    "shared": lambda s: s.share_memory_(),
    "cast": lambda s: s.float(),
    "moved": lambda s: s.cpu(),
    "pickle": pickle.dumps,
    "as a typed one": lambda s: torch.TypedStorage(wrap_storage=s, dtype=torch.float32, _internal=True).clone(),
}


@pytest.mark.parametrize("name", INTO)
def test_to_look_into_it_is_refused(name: str) -> None:
    tensor = looks()
    with pytest.raises((WeightsError, RuntimeError, TypeError)) as refused:
        INTO[name](tensor.untyped_storage())
    if name != "to another":
        assert isinstance(refused.value, WeightsError) and "untyped_storage()." in str(refused.value)


BELOW: dict[str, Callable[[torch.Tensor], Any]] = {
    "address": torch.Tensor.data_ptr,
    "numpy": torch.Tensor.numpy,
    "list": torch.Tensor.tolist,
    "in a plain tensor": lambda t: torch.empty(0).set_(t.untyped_storage()).numpy().sum(),  # type: ignore[call-overload]
    "array": np.asarray,
    "dlpack": torch.utils.dlpack.to_dlpack,
    "each": lambda t: torch.Tensor.apply_(t, lambda x: x),
    "typed": lambda t: t._typed_storage().fill_(0),
}


@pytest.mark.parametrize("name", BELOW)
def test_to_reach_for_the_address_is_torchs_error(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
        BELOW[name](looks())
