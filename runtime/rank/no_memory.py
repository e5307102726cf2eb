"""The storage of a tensor that looks whole and holds nothing: it says so to who reads or writes it.

A wrapper tensor has a storage of torch's at address zero, by default of the size of the whole. What goes through the
tensor meets its class; what asks for the storage and reads it, writes to it or makes it smaller would reach address
zero, and the system ends the process. So the storage is of no bytes (torch_private.py), and gets a class too, in which
all of that is an error with words. Compilers, which ask which tensors have a storage in common, go on as before; what
reaches for the address below Python gets torch's own error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from sfcompile.torch_private import plain_storage, refuse_address

OF_MEMORY = tuple(
    name
    for name in (
        "data_ptr",
        "const_data_ptr",
        "numpy",
        "tolist",
        "storage",
        "__dlpack__",
        "share_memory_",
        "apply_",
        "map_",
        "map2_",
    )  # fmt: skip
    if hasattr(torch.Tensor, name)
)
"""Methods of tensors that reach into their memory and pass no dispatch."""

Why = Callable[[str], Exception]
"""Of the name of a method the error for who calls it."""

_ANSWERED = frozenset({
    "device", "element_size", "filename", "get_device", "is_cuda", "is_hpu", "is_shared", "is_sparse", "is_sparse_csr",
    "nbytes", "resizable", "size", "untyped",
})  # fmt: skip
"""What can be said of a storage that holds nothing. What torch keeps books with bears an underscore, and stays too."""
_ALSO_REFUSED = frozenset({
    "__getitem__", "__setitem__", "__iter__", "__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "_byteswap",
    "_set_from_file", "_share_cuda_", "_share_fd_cpu_", "_share_filename_cpu_", "_to", "_write_file",
})  # fmt: skip


class NoMemory(torch.UntypedStorage):
    """A storage that nobody may look into.

    Attributes:
        why: makes the error.
    """

    why: Why

    def __repr__(self) -> str:
        return "NoMemory()"

    def resize_(self, size: int) -> NoMemory:
        """Compilers make a storage as small as it is already."""
        if size != self.nbytes():
            raise self.why("untyped_storage().resize_")
        return self

    __str__ = __repr__


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(storage: NoMemory, *args: Any, **kwargs: Any) -> NoReturn:
        raise storage.why(f"untyped_storage().{name}")

    return refuse


for _name in dir(torch.UntypedStorage):
    if _name in _ALSO_REFUSED or not (_name.startswith("_") or _name in {"resize_", *_ANSWERED}):
        setattr(NoMemory, _name, _refused(_name))


def without_memory(tensor: torch.Tensor, why: Why) -> None:
    """Say of a wrapper tensor, to who reaches past its class, that it has no memory."""
    refuse_address(tensor)
    storage: Any = plain_storage(tensor)
    storage.__class__ = NoMemory
    storage.why = why
