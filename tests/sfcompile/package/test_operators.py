"""Which operators a package may call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import Library

from sfcompile.errors import PackageError
from sfcompile.package.calls import Ref
from sfcompile.package.operators import OURS, PRIVATE, check_arguments, operator_of


@pytest.mark.parametrize(
    "name",
    [
        "aten.linear.default", "aten.scaled_dot_product_attention.default", "aten._to_copy.default", "getitem",
        "aten.gelu.default", "aten.einsum.default", "aten.div.Tensor_mode", "aten.fft_fft.default", "aten.topk.default",
        "streamfusion.put_q.default", "streamfusion.attend.default", "streamfusion.exchange_finish.default",
    ],
)  # fmt: skip
def test_what_exports_hold_is_allowed(name: str) -> None:
    assert str(operator_of(name)).endswith(name.removeprefix("getitem"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("aten.from_file.default", "text filename|reaches files"),
        ("aten.fill_.Scalar", "writes"),
        ("aten.add.out", "writes"),
        ("aten.set_.source_Storage", "writes"),
        ("aten.set.source_Storage", "source is no tensor"),
        ("aten.resize.default", "reaches files, storages"),
        ("aten.as_strided.default", "where in memory"),
        ("aten.fbgemm_linear_fp16_weight.default", "hold addresses"),
        ("aten._foobar.default", "private"),
        ("aten._stack.default", "private"),  # of no tensors: SIGSEGV
        ("aten._weight_norm.default", "private"),  # of a 0-dim tensor: SIGFPE
        ("aten._test_string_default.default", "private"),
        ("aten.item.default", "no tensor"),
        ("aten.lu_solve.default", "places in memory"),
        ("aten.to_sparse.default", "dense"),
        ("inductor._reinterpret_tensor.default", "'inductor' is not a library"),
        ("prims.convert_element_type.default", "'prims' is not a library"),
        ("streamfusion.opaque.default", "'streamfusion' is not a library"),
        ("streamfusion.put_fused.default", "'streamfusion' is not a library"),
        ("aten.add", "not registered"),
        ("aten.add.Tensor.x", "not registered"),
        ("aten.add.__call__", "not registered"),
        ("load_library.x.y", "not registered"),
        ("no.such.thing", "not registered"),
        (None, "not registered"),
    ],
)
def test_everything_else_is_not(name: str, why: str) -> None:
    with pytest.raises(PackageError, match=why):
        operator_of(name)


def test_the_private_ones_exist_and_are_functional() -> None:
    for name in PRIVATE:
        packet = getattr(torch.ops.aten, name)
        overloads = [f"aten.{name}.{overload}" for overload in packet.overloads() if "out" not in overload]
        assert any(_allowed(name) for name in overloads), name


def _allowed(name: str) -> bool:
    try:
        return operator_of(name) is not None
    except PackageError:
        return False


def test_no_operator_that_writes_or_takes_a_text_slips_through() -> None:
    allowed = 0
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if not _allowed(f"{namespace}.{packet}.{overload or 'default'}"):
            continue
        allowed += 1
        schema = operator_of(f"{namespace}.{packet}.{overload or 'default'}")._schema
        assert namespace in ("aten", "streamfusion") and "!" not in str(schema), schema
        assert not any(word in str(schema) for word in ("Storage", "Stream", "__torch__", "Dimname", "Dict")), schema
        if namespace == "streamfusion":
            assert operator_of(f"{namespace}.{packet}.default") in OURS
    assert allowed > 500


def test_libraries_that_the_caller_names() -> None:
    library = Library("sfpackagetest", "DEF")
    library.define("twice(Tensor x, str how) -> Tensor")
    library.define("grow(Tensor(a!) x) -> Tensor(a!)")
    with pytest.raises(PackageError, match="is not a library that the caller named"):
        operator_of("sfpackagetest.twice.default")
    assert operator_of("sfpackagetest.twice.default", ("sfpackagetest",)) is torch.ops.sfpackagetest.twice.default
    with pytest.raises(PackageError, match="writes"):
        operator_of("sfpackagetest.grow.default", ("sfpackagetest",))
    with pytest.raises(PackageError, match="not a library"):
        operator_of("streamfusion.opaque.default", ("streamfusion",))


X = Ref(0)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("aten.add.Tensor", (X, 1), {"alpha": 2}),
        ("aten.cat.default", ([X, X], -1), {}),
        ("aten.index.Tensor", (X, [None, X]), {}),
        ("aten.sum.dim_IntList", (X, 0), {"dtype": None}),
        ("aten.gelu.default", (X,), {"approximate": "tanh"}),
        ("aten.einsum.default", ("b i d, b j d -> b i j", [X, X]), {}),
        ("aten.zeros.default", ([2, 3],), {"device": torch.device("cpu")}),
        ("getitem", (X, 1), {}),
    ],
)
def test_arguments_that_fit(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check_arguments(operator_of(name), args, kwargs, Ref)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("aten.add.Tensor", (X,), {}),
        ("aten.add.Tensor", (X, 1, 2), {}),
        ("aten.add.Tensor", (X, 1), {"other": 1}),
        ("aten.add.Tensor", (X, 1), {"**{}": 1}),
        ("aten.add.Tensor", (X, "1"), {}),
        ("aten.add.Tensor", (X, [X]), {}),
        ("aten.cat.default", (X, 1.0), {}),
        ("aten.cat.default", ([X, None],), {}),
        ("aten.sum.dim_IntList", (X, [0.5]), {}),
        ("aten.sum.dim_IntList", (X, 0), {"dtype": "float32"}),
        ("aten.sum.dim_IntList", (X, 0, 1), {}),
        ("aten.gelu.default", (X,), {"approximate": "evil"}),
        ("aten.einsum.default", ("__import__('os')", [X]), {}),
        ("aten.zeros.default", ([2, X],), {}),
        ("aten.zeros.default", ([2, 3],), {"device": torch.device("cuda")}),
        ("aten.zeros.default", ([2, 3],), {"layout": torch.sparse_coo}),
        ("streamfusion.put_q.default", (X, X, "a'b", 0), {}),
        ("getitem", (X, -1), {}),
        ("getitem", (X, "a"), {}),
        ("getitem", ([X], 0), {}),
    ],
)
def test_arguments_that_do_not_fit(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(PackageError, match="does not fit it"):
        check_arguments(operator_of(name), args, kwargs, Ref)
