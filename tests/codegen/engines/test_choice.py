"""Generated kernels or torch's: what is taken, and why."""

from __future__ import annotations

import pytest
import torch
from kernel_ranks import make_site

from sfcompile.codegen.engines import choice as kernel_choice
from sfcompile.codegen.engines.choice import choose_attention
from sfcompile.errors import CodegenError, UnsupportedError

SITE = make_site(8, 2)
WIDE = make_site(8, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("asked", "site", "device", "chosen", "why"),
    [
        ("auto", SITE, "cpu", "aten", "interpreter"),
        ("auto", SITE, "cuda", "triton", "one kernel"),
        ("auto", WIDE, "cuda", "aten", "torch.float64"),
        ("auto", make_site(8, 2, head_dim=512), "cuda", "aten", "head sizes 512"),
        ("auto", make_site(8, 2, scale=-1.0), "cuda", "aten", "not positive"),
        ("aten", SITE, "cuda", "aten", "asked for"),
        ("triton", SITE, "cpu", "triton", "asked for"),
    ],
)
def test_choice_and_its_reason(asked: str, site: object, device: str, chosen: str, why: str) -> None:
    found = choose_attention(asked, [SITE, site], device)  # type: ignore[list-item]
    assert found[0] == chosen and why in found[1]


def test_what_was_asked_for_is_refused_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="attention site: dtype torch.float64"):
        choose_attention("triton", [SITE, WIDE], "cpu")
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: None)
    with pytest.raises(CodegenError, match="pip install 'triton"):
        choose_attention("triton", [SITE], "cpu")
    assert choose_attention("auto", [SITE], "cuda") == ("aten", "Triton is not installed")


def test_kernels_that_cannot_put() -> None:
    assert choose_attention("auto", [SITE], "cuda", "no way to them") == ("aten", "no way to them")
    assert choose_attention("aten", [SITE], "cuda", "no way to them") == ("aten", "asked for")
    with pytest.raises(UnsupportedError, match="attention='triton', and no way to them"):
        choose_attention("triton", [SITE], "cuda", "no way to them")


@pytest.mark.parametrize(
    ("release", "arch", "trusted"),
    [("3.7.1", 90, False), ("3.6.0", 100, False), ("3.7.1", 86, True), ("3.8.0", 90, True), ("3.10.0+git", 90, True)],
)
def test_a_triton_that_reorders_waits_is_not_trusted(
    release: str, arch: int, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_choice, "version", lambda name: release)
    chosen, why = choose_attention("auto", [SITE], "cuda", arch=arch)
    assert chosen == ("triton" if trusted else "aten")
    if not trusted:
        assert release in why and f"sm_{arch}" in why
        with pytest.raises(CodegenError, match="Triton 3.8"):
            choose_attention("triton", [SITE], "cuda", arch=arch)
