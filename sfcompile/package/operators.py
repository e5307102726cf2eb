"""Which operators a package may call, and with what: everything else that torch can do is out of its reach.

A package is data from anywhere, so the rule is a list of what is allowed, in this order:

* ours: the operators with which ranks talk to each other (runtime/rank/ops.py), none that runs Python;
* ATen's *functional* ones: by their schema they write to nothing, return tensors only and take nothing but tensors,
  numbers and names of dtypes; a text only where :data:`TEXTS` lists what it may say; a private one only if
  :data:`PRIVATE` names it, as the capture does write it; and none that :data:`DENIED` gives a reason against;
* those of a library that the caller of ``sfcompile.load`` names, if they too are functional.

The exporter asks the same questions, so that what it writes can be loaded.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

import sfcompile.runtime.rank.ops as rank_ops  # registers torch.ops.streamfusion
from sfcompile.errors import PackageError
from sfcompile.package.limits import LIST, NAME, is_key, shown
from sfcompile.torch_private import OpOverload

GETITEM = "getitem"
OURS = frozenset(rank_ops.COMMUNICATION) - {rank_ops.PUT_FUSED}
"""Computing puts are of GPU ranks, and no package runs there."""

TEXTS: Mapping[str, tuple[str, ...]] = {
    "approximate": ("none", "tanh"),
    "rounding_mode": ("trunc", "floor"),
    "indexing": ("ij", "xy"),
    "mode": ("constant", "reflect", "replicate", "circular", "reduced", "complete", "r"),
    "reduce": ("sum", "prod", "mean", "amax", "amin", "add", "multiply"),
    "norm": ("forward", "backward", "ortho"),
    "padding": ("same", "valid"),
    "ord": ("fro", "nuc"),
    "interpolation": ("linear", "lower", "higher", "midpoint", "nearest"),
    "side": ("left", "right"),
    "UPLO": ("L", "U"),
}
"""What a text argument of that name may say; ``einsum``'s equation is letters, dots and commas."""
_EQUATION = re.compile(r"[A-Za-z., >-]{1,256}")

PRIVATE = frozenset(
    "__and__ __or__ __xor__ __lshift__ __rshift__ _adaptive_avg_pool2d _adaptive_avg_pool3d _aminmax _cdist_forward "
    "_conj _conj_physical _convolution _convolution_mode _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _fused_rms_norm "
    "_grouped_mm _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _log_softmax _logcumsumexp "
    "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training _neg_view _pad_circular _pad_enum "
    "_prelu_kernel _reshape_copy _safe_softmax _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _trilinear _unsafe_view "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d".split()
)
"""Names with a leading underscore that captured graphs do hold, each with checks of its own in torch."""

DENIED: Mapping[str, str] = {
    r"from_file|set|set_data|data|lift|pin_memory|record_stream|resize.*|copy_sparse.*|flatten_dense.*|unflatten_dense.*":
        "it reaches files, storages or streams",
    r"as_strided.*|slice_inverse": "it says itself where in memory it reads",
    r"fbgemm_.*|quantize.*|quantized_.*|q_.*|int_repr|dequantize|choose_qparams.*|fake_quantize.*|empty_quantized":
        "its operands hold addresses, or what its kernels trust without a check",
    r"lu_solve|linalg_lu_solve|linalg_ldl_solve|lu_unpack|histogram(dd)?|histc|bincount":
        "its kernels use what they are given as places in memory",
    r"cudnn_.*|miopen_.*|mkldnn_.*|mps_.*|to_mkldnn.*|thnn_.*|slow_conv.*|conv_depthwise3d|conv_tbc|.*overrideable":
        "it is one library's inner step, which others check for",
    r".*sparse.*|coalesce|c?(col|row)w?_?indices(_copy)?|crow_indices(_copy)?|indices(_copy)?|values(_copy)?|hspmm|smm|"
    r"sspaddmm|to_dense|nested_.*|to_padded_tensor": "tensors of packages are dense",
    r".*backward.*|.*_jvp|batch_norm_(elemt|stats|gather.*|update.*)|embedding_(bag|renorm)|ctc_loss|segment_reduce|"
    r"fractional_.*|max_unpool.*|rrelu_with_noise.*|multi_?label.*|multi_margin.*|nll_loss.*":
        "it belongs to training, where inputs are not checked as much",
}  # fmt: skip
_DENIED = [(re.compile(pattern), why) for pattern, why in DENIED.items()]

_TENSORS = ("Tensor", "List[Tensor]")
_NUMBERS = (int, float, bool, complex)
_PLAIN = re.compile(r"Tensor|int|float|bool|number|ScalarType|Layout|Device|MemoryFormat|Generator|str")


@cache
def operator_of(name: str, libraries: tuple[str, ...] = ()) -> Any:
    """The operator of a name such as "aten.add.Tensor"; ``operator.getitem`` for "getitem".

    Args:
        libraries: other namespaces of torch.ops whose functional operators are allowed too.

    Raises:
        PackageError: torch has none of that name here, or a package may not call it.
    """
    if name == GETITEM:
        return operator.getitem
    op = _registered(name)
    if not isinstance(op, OpOverload):
        raise PackageError(
            f"operator {shown(name)} is not registered in this process",
            "the package calls it; operators outside ATen come from a library that must be imported first",
            "import the library that defines it before sfcompile.load, or export with this version of torch",
        )
    why = reason_against(op, libraries)
    if why:
        raise PackageError(
            f"operator {name} may not be called by a package: {why}",
            "a package calls functional operators of ATen, and of libraries that you name",
            "if you trust the package and the library: sfcompile.load(path, libraries=(...,))",
        )
    return op


def _registered(name: Any) -> Any:
    """What torch.ops has under a name of three parts: namespace, operator, overload. Nothing is called."""
    parts = name.split(".") if isinstance(name, str) and len(name) < NAME else ()
    if len(parts) != 3 or not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", part) for part in parts):
        return None
    entry: Any = torch.ops
    for part in parts:
        entry = getattr(entry, part, None)
    return entry


def reason_against(op: OpOverload, libraries: Sequence[str] = ()) -> str:
    """Why a package may not call an operator; empty if it may."""
    if op in OURS:
        return ""
    namespace, name = op.namespace, op._schema.name.split("::")[1]
    foreign = namespace in libraries and namespace not in ("aten", "streamfusion")
    if namespace != "aten" and not foreign:
        return f"{namespace!r} is not a library that the caller named"
    arguments, returns = op._schema.arguments, op._schema.returns
    if any(entry.alias_info is not None and entry.alias_info.is_write for entry in (*arguments, *returns)):
        return "it writes to its operands"
    if not returns or any(str(entry.real_type) not in _TENSORS for entry in returns):
        return "it returns something that is no tensor"
    odd = [entry.name for entry in arguments if not _plain(str(entry.real_type))]
    if odd:
        return f"its argument {odd[0]} is no tensor, number or name"
    if foreign:
        return ""
    if name.startswith("_") and name not in PRIVATE:
        return "it is private to torch, and no capture writes it"
    texts = [entry.name for entry in arguments if "str" in str(entry.real_type)]
    if any(text not in TEXTS and (name, text) != ("einsum", "equation") for text in texts):
        return f"its text {texts[0]} may say anything"
    return next((why for pattern, why in _DENIED if pattern.fullmatch(name)), "")


def _plain(kind: str) -> bool:
    inner = re.sub(r"(Optional|List)\[|\]", "", kind)
    return _PLAIN.fullmatch(inner) is not None


# ---------------------------------------------------------------------- arguments


def check_arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], is_node: Any) -> None:
    """
    Args:
        is_node: the class that stands for another call's result among the arguments.

    Raises:
        PackageError: too many, too few, an unknown name, or a value of another kind than the schema says.
    """
    if op is operator.getitem:
        if len(args) != 2 or kwargs or not isinstance(args[0], is_node) or type(args[1]) is not int or args[1] < 0:
            raise _unfit(op, "it takes a result and a number")
        return
    schema = op._schema.arguments
    positional = [entry for entry in schema if not entry.kwarg_only]
    if len(args) > len(positional):
        raise _unfit(op, f"{len(args)} arguments for at most {len(positional)}")
    arguments = {entry.name: value for entry, value in zip(positional, args, strict=False)}
    by_name = {entry.name: entry for entry in schema}
    for name, value in kwargs.items():
        if name not in by_name or name in arguments:
            raise _unfit(op, f"argument {shown(name)} is unknown or given twice")
        arguments[name] = value
    for entry in schema:
        if entry.name not in arguments:
            if not entry.has_default_value():
                raise _unfit(op, f"argument {entry.name} is missing")
        elif not _fits(arguments[entry.name], str(entry.real_type), entry, op, is_node):
            kind = str(entry.real_type)
            raise _unfit(op, f"argument {entry.name} is a {kind}, and {shown(arguments[entry.name])} is none")


def _unfit(op: Any, what: str) -> PackageError:
    return PackageError(
        f"a call of {op} does not fit it: {what}", "the package was changed by hand", "export the model again"
    )


def _fits(value: Any, kind: str, entry: Any, op: Any, is_node: Any) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[9:-1], entry, op, is_node)
    if kind.startswith("List["):
        if isinstance(value, (list, tuple)):
            return len(value) <= LIST and all(_fits(each, kind[5:-1], entry, op, is_node) for each in value)
        # A number where a list of known length stands is that number in every place; a result may be a list itself.
        return isinstance(value, is_node) if "Tensor" in kind else _fits(value, kind[5:-1], entry, op, is_node)
    if kind == "Tensor":  # torch takes a number there too
        return isinstance(value, is_node) or type(value) in _NUMBERS
    if kind == "str":
        return isinstance(value, str) and _says(value, entry.name, op)
    if kind == "int":
        return type(value) is int
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "float":
        return type(value) in (int, float)
    if kind == "number":
        return type(value) in _NUMBERS
    if kind == "Device":
        return isinstance(value, torch.device) and value.type == "cpu"
    if kind == "Layout":
        return value is torch.strided
    kinds = {"ScalarType": torch.dtype, "MemoryFormat": torch.memory_format}
    return kind in kinds and isinstance(value, kinds[kind])  # a generator has no form here


def _says(value: str, name: str, op: Any) -> bool:
    if op in OURS:
        return is_key(value)
    if op.namespace != "aten":
        return len(value) <= NAME
    return value in TEXTS.get(name, ()) or (name == "equation" and _EQUATION.fullmatch(value) is not None)
