"""What runs the attentions of a graph, and why: generated kernels (Triton) or torch's own (ATen)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from sfcompile.codegen.kernels.spec import MAX_HEAD_DIM, cannot_generate
from sfcompile.codegen.rows.elements import DTYPES
from sfcompile.codegen.toolchain.nvshmem_bitcode import release_of
from sfcompile.errors import CodegenError, UnsupportedError
from sfcompile.runtime.program.sites import AttentionSite


def choose_attention(
    asked: str,
    sites: Sequence[AttentionSite],
    device_type: str,
    hindrance: str = "",
    faster: Callable[[], tuple[str, str]] = lambda: ("triton", "puts, waits and attention in one kernel"),
    arch: int = 0,
) -> tuple[str, str]:
    """``("triton" or "aten", reason)`` for all attentions of a graph.

    One answer for the graph: the puts and gathers of generated kernels count epochs on the device, the others on the
    host.

    Args:
        asked: the option ``attention``: "auto", "aten" or "triton".
        device_type: "cuda" or "cpu".
        hindrance: why kernels of these ranks cannot put; "": they can.
        faster: asked where both can run them and neither was asked for (sfcompile/measuring/attention.py).
        arch: 80, 90, ... of the GPU; 0: none, or not known.

    Raises:
        CodegenError: generated kernels were asked for and Triton is not installed, or one that compiles them wrongly.
        UnsupportedError: generated kernels were asked for and cannot run some site.
    """
    if asked == "aten":
        return "aten", "asked for"
    if hindrance and asked == "triton":
        raise UnsupportedError(
            f"attention='triton', and {hindrance}",
            "generated kernels put into the memory of the other ranks themselves",
            "use attention='auto' or 'aten', or make NVSHMEM start (transport='nvshmem' says what it lacks)",
        )
    if hindrance:
        return "aten", hindrance
    reordered = reorders_waits(arch)
    hindrances = [f"attention {site.name}: {cannot_generate(site)}" for site in sites if cannot_generate(site)]
    installed = find_spec("triton") is not None
    if asked == "triton":
        if not installed:
            raise CodegenError(
                "attention='triton' needs Triton, which is not installed",
                "CPU builds of torch do not bring it",
                "pip install 'triton>=3.6', or use attention='aten'",
            )
        if reordered:
            raise CodegenError(
                f"attention='triton', and {reordered}",
                "results could be wrong without a sign",
                "use torch 2.14 or later, which brings Triton 3.8, or attention='auto' or 'aten'",
            )
        if hindrances:
            raise UnsupportedError(
                hindrances[0],
                f"kernels are generated for {', '.join(DTYPES.values())} and head sizes up to {MAX_HEAD_DIM}",
                "use attention='aten' for this model",
            )
        return "triton", "asked for"
    if device_type != "cuda":
        return "aten", "on CPU ranks generated kernels run in Triton's interpreter, which is for checking them"
    if not installed:
        return "aten", "Triton is not installed"
    if reordered or hindrances:
        return "aten", reordered or hindrances[0]
    return faster()


def reorders_waits(arch: int) -> str:
    """Why kernels that the Triton at hand compiles for an architecture are not to be trusted; "" if they are.

    The PTX machine (tests/support/ptx) saw what 3.6 and 3.7 make of the attention kernel for sm_90 read chunks that no
    wait had shown to be there; what they make for sm_80, and 3.8 and later for both, does not.
    """
    try:
        release = version("triton")
    except PackageNotFoundError:
        return ""
    if arch < 90 or release_of(release) >= (3, 8):
        return ""
    return f"Triton {release} compiles kernels for sm_{arch} that read chunks before they have come (3.8 does not)"
