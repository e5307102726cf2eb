"""Mistakes made in kernels on purpose, and whether the machine sees them.

Most are edits of a kernel's PTX, as a compiler's or an author's mistake would leave it; some of its generated source;
one is another order of launches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_ranks import Job, make_site

from ptx.ranks import AttentionRanks
from ptx.text import PtxError

Edit = Callable[[str, str], str]


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Attributes:
        name: what is wrong.
        arch: the architecture whose kernels have it.
        net: between ranks that reach each other by NVSHMEM only.
        fetch: how the kernel's tiles come into shared memory (KernelSpec).
        masks: what hides keys in the job, and its tokens (job_of).
        ptx, source: edits ``(kernel's name, text) -> text``.
        order: of a rank's launches.
    """

    name: str
    arch: int = 80
    net: bool = False
    fetch: str = "threads"
    masks: tuple[tuple[str, Any], ...] = ()
    ptx: Edit | None = None
    source: Edit | None = None
    order: Callable[[list[str]], list[str]] | None = None


def job_of(arch: int, net: bool = False, dtype: torch.dtype = torch.float16, **changes: Any) -> Job:
    """A small attention: two ranks, uneven tokens, several tiles and blocks, bank 0 used three times."""
    if changes.get("fetch") == "tma":
        changes = {"block_m": 128, "block_n": 64, "warps": 4, "stages": 2, "epochs": 2} | changes
    tiles = (
        {"block_m": 32, "block_n": 32, "warps": 4, "stages": 2}
        if arch < 90
        else {"block_m": 64, "block_n": 32, "warps": 4, "stages": 3}
    )
    site = make_site(
        changes.pop("tokens", [72, 88]), 2, heads=2, head_dim=64, dtype=dtype, causal=changes.pop("causal", False)
    )
    shape = (2, 1, 2, 1) if net else (1, 2, 2, 1)
    rest = {"epochs": changes.pop("epochs", 3), "mask": changes.pop("mask", "none")}
    return Job("torus" if net else "usp", *shape, site, net=net, **rest, options=tiles | changes)


def caught(mutant: Mutant | None, arch: int = 80, seeds: int = 1, tolerance: float = 2e-3) -> tuple[str, float]:
    """How a mutant shows itself ("" if it does not), and the seconds that it took.

    Args:
        mutant: None is the kernel as it is.
        seeds: worlds to try.
    """
    start = time.monotonic()
    arch, net = (mutant.arch, mutant.net) if mutant else (arch, False)
    changes = {"change": mutant.ptx, "edit": mutant.source, "order": mutant.order} if mutant else {}
    said = ""
    for seed in range(seeds):
        job = job_of(arch, net, **({"fetch": "tma", **dict(mutant.masks)} if mutant and mutant.fetch == "tma" else {}))
        ranks = AttentionRanks(job, arch, seed, **changes)  # type: ignore[arg-type]
        try:
            error = ranks.run()
            said = "" if error < tolerance else f"wrong: error {error:.2g}"
        except PtxError as problem:
            said = f"{type(problem).__name__}: {problem}"
        if ranks.world.memory.races:
            said = f"{len(ranks.world.memory.races)} races, {min(ranks.world.races())}; {said}"
        if said:
            break
    return said, time.monotonic() - start


def edited(kernel: str, old: str, new: str, count: int = 0) -> Edit:
    """Replace a pattern in a kernel whose name begins so; the pattern must be there.

    Raises:
        AssertionError: it is not: the mutant would mean nothing.
    """

    def edit(name: str, text: str) -> str:
        if not name.startswith(kernel):
            return text
        changed, times = re.subn(old, new, text, count=count, flags=re.MULTILINE)
        assert times, f"{old} is not in kernel {name}"
        return changed

    return edit


def between(kernel: str, first: str, last: str, old: str, new: str) -> Edit:
    """:func:`edited` in the stretch from the last ``first`` before the first ``last``."""

    def edit(name: str, text: str) -> str:
        if not name.startswith(kernel):
            return text
        end = re.search(last, text)
        assert end is not None, f"{last} is not in kernel {name}"
        start = [match.end() for match in re.finditer(first, text[: end.start()])][-1]
        changed, times = re.subn(old, new, text[start : end.start()])
        assert times, f"no {old} before {last} in kernel {name}"
        return text[:start] + changed + text[end.start() :]

    return edit


def _signal_first(name: str, source: str) -> str:
    """The put kernel raises each signal before it copies."""
    if name != "put":
        return source
    line = re.search(r"^ +(raise_signal\(.*\))$", source[source.index("def put(") :], re.MULTILINE)
    assert line is not None
    return re.sub(
        r"^( +)(target = tl\.load.*)$",
        lambda found: f"{found[1]}{found[2]}\n{found[1]}{line[1]}",
        source,
        flags=re.MULTILINE,
    )


def _early(names: list[str]) -> list[str]:
    return ["put", "release", *[name for name in names if name not in ("put", "release")]]


def _masker(old: str, new: str) -> Edit:
    """:func:`edited` in the warp that reads the mask."""

    def edit(name: str, source: str) -> str:
        if name != "attend":
            return source
        start = source.index("def masker(")
        end = source.index("@gluon.jit", start)
        return source[:start] + edited("", old, new)("", source[start:end]) + source[end:]

    return edit


def _moved(kernel: str, line: str, before: str) -> Edit:
    """A line of the source moves before the first one that begins so."""

    def edit(name: str, source: str) -> str:
        if name != kernel:
            return source
        moved, anchor = (re.search(rf"^ +{text}.*\n", source, re.MULTILINE) for text in (line, before))
        assert moved is not None and anchor is not None and anchor.start() < moved.start()
        without = source[: moved.start()] + source[moved.end() :]
        return without[: anchor.start()] + moved[0] + without[anchor.start() :]

    return edit


_ACQUIRE, _RELAXED = r"ld\.global\.sys\.acquire", "ld.global.sys.relaxed"
_RELEASE = r"atom\.global\.sys\.release\.exch"
_BAR = r"bar\.sync\s+0;"
_GROUP_BAR = r"bar\.sync\s+[02], 128;"
_WAIT, _LAX = r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 7"
_WAIT_WGMMA, _LAX_WGMMA = r"wgmma\.wait_group\.sync\.aligned\s+0", "wgmma.wait_group.sync.aligned 2"
_COUNT = r"acq_rel\.add"
_FENCE = r"fence\.proxy\.async\.global;"
_FIRST_CHUNK = "if (tile == start) & (j == first_key):"
_FREE = r"mbarrier\.wait\(v_empty.*"
_LANDED = r"mbarrier\.wait\(v_full\.index\(before\), before_parity\)"
_GIVEN_BACK = r"bar\.sync\s+[02], 128;((?:\s|//[^\n]*\n|\.loc[^\n]*\n)*@%p\d+ mbarrier\.arrive\.shared)"
_WAIT_SCORES = r"wgmma\.wait_group\.sync\.aligned\s+1"


_ANNOUNCED, _WORD = r"mbarrier\.arrive\(k_full", r"masked\.index\(stage\)\.load"
_LATER, _OTHER_WORD = "left <= partial", "masked.index((n + 1) % STAGES).load"
_OTHER_BANK = "named + bank_at + (1 - epoch % 2 * 2) * tl.load(place_ptr + 3) + out_at"
_CAUSAL, _KEYS = ((entry, ("tokens", [150, 72])) for entry in (("causal", True), ("mask", "key")))


def _tma(name: str, **edits: Any) -> Mutant:
    """Of the kernel that fetches by tensor copies."""
    return Mutant(name, 90, fetch="tma", **edits)


def _net(name: str, **edits: Any) -> Mutant:
    """Of the same where ranks reach each other by NVSHMEM only: it sends outputs home."""
    return Mutant(name, 90, net=True, fetch="tma", **edits)


MUTANTS = (
    Mutant("acquire of a chunk to relaxed", ptx=edited("attend", _ACQUIRE, _RELAXED)),
    Mutant("acquire of an output to relaxed", ptx=edited("collect", _ACQUIRE, _RELAXED)),
    Mutant("release of a put's signal to relaxed", ptx=edited("put", _RELEASE, "atom.global.sys.relaxed.exch")),
    Mutant("release of a pushed output to relaxed", ptx=edited("attend", _RELEASE, "atom.global.sys.relaxed.exch")),
    Mutant("release of a signal at the scope of one GPU", ptx=edited("put", _RELEASE, "atom.global.gpu.release.exch")),
    Mutant("arrival counter relaxed", ptx=edited("put", r"sys\.acq_rel\.add", "sys.relaxed.add")),
    Mutant("a barrier removed before the arrival counter", ptx=between("put", r"st\.global", _COUNT, _BAR, "")),
    Mutant("a barrier removed after a copy's wait", ptx=edited("attend", rf"({_WAIT};[^;]*?){_BAR}", r"\1")),
    Mutant("wait_group too lax", ptx=edited("attend", _WAIT, _LAX)),
    Mutant("a signal dropped", ptx=edited("put", rf"^.*{_RELEASE}.*$", "")),
    Mutant("a signal before its data", source=_signal_first),
    Mutant("a wrong bank", source=edited("put", r"^( +bank_at = .*)epoch % 2", r"\1(epoch + 1) % 2")),
    Mutant("fence.proxy.async removed", 90, ptx=edited("attend", r"fence\.proxy\.async\.shared::cta;", "")),
    Mutant("wgmma.wait_group too lax", 90, ptx=edited("attend", _WAIT_WGMMA, _LAX_WGMMA)),
    Mutant("cp.async.wait_group too lax before wgmma", 90, ptx=edited("attend", _WAIT, _LAX)),
    _tma("no proxy fence between acquire and tensor copy", ptx=edited("attend", _FENCE, "")),
    _tma("a proxy fence for shared memory only", ptx=edited("attend", _FENCE, "fence.proxy.async.shared::cta;")),
    _tma("the proxy fence before the polls", source=_moved("attend", r"fence_async\(\)", "k_slot = ")),
    _tma("acquire relaxed before a tensor copy", ptx=edited("attend", _ACQUIRE, _RELAXED)),
    _tma("chunks after the first not awaited", source=edited("attend", "if tile == start:", _FIRST_CHUNK)),
    _tma("a tile of the ring filled before it is free", source=edited("attend", _FREE, "pass")),
    _tma("values read before they have landed", source=edited("attend", _LANDED, "pass")),
    _tma("a tile given back by one warp for all", ptx=edited("attend", _GIVEN_BACK, r"\1")),
    _tma("wgmma.wait_group too lax under the softmax", ptx=edited("attend", _WAIT_SCORES, _LAX_WGMMA)),
    _tma("queries stored without a proxy fence", ptx=edited("attend", r"fence\.proxy\.async\.shared::cta;", "")),
    _tma("later keys not compared in a block", masks=_CAUSAL, source=edited("attend", _LATER, "left < partial")),
    _tma("blocks fetched that no query sees", masks=_CAUSAL, source=edited("attend", "at < seen", "at < columns")),
    _tma("a mask written before its place is free", masks=_KEYS, source=_masker(r"mbarrier\.wait\(k_empty.*", "pass")),
    _tma("keys announced before their mask", masks=_KEYS, source=_moved("attend", _ANNOUNCED, r"biases\.")),
    _tma("another block's word of a mask", masks=_KEYS, source=edited("attend", _WORD, _OTHER_WORD)),
    _net("an output put without its signal", source=edited("attend", "signal, SIGNAL_SET", "0, SIGNAL_SET")),
    _net("an output put before its last rows", source=edited("attend", r"out_slot, 2 \* tiles", "out_slot, tiles")),
    _net("arrival counter of outputs relaxed", ptx=edited("attend", r"sys\.acq_rel\.add", "sys.relaxed.add")),
    _net("an output put though nobody has come", source=edited("attend", r"^ +wait_for_all\(.*$", "")),
    _net("the sender's poll relaxed", source=edited("attend", r'0, sem="acquire"', '0, sem="relaxed"')),
    _net("a warpgroup counted before its barrier", ptx=between("attend", r"st\.global", _COUNT, _GROUP_BAR, "")),
    _net("outputs put for all threads of a program", source=edited("attend", "signal_nbi_warp", "signal_nbi_block")),
    _net("arrival counter of outputs not set back", source=edited("attend", r"^ +gl\.atomic_xchg\(counter.*$", "")),
    _net("an output put into the other bank", source=edited("attend", r"named \+ bank_at \+ out_at", _OTHER_BANK)),
    _net("the program that puts outputs attends too", source=edited("attend", r"^ +num_units = 0  # nor.*$", "")),
    _net("no proxy fence before a copy of what came by NVSHMEM", ptx=edited("attend", _FENCE, "")),
    _net("acquire relaxed of what came by NVSHMEM", ptx=edited("attend", _ACQUIRE, _RELAXED)),
)  # fmt: skip
HARMLESS = (Mutant("credit given early", order=_early),)
"""Two ranks that attend in turn need no credit: a rank puts into a bank again only after it has the other's chunks of
the epoch between, and those were put after the bank was read. Where puts run ahead, a bank without credit is seen over
fake GPUs (tests/runtime/gpu/test_symmetric_side.py)."""


def main() -> None:
    """Print the table: every mutant, how it shows itself, seconds."""
    print(f"| mutant | caught by | s |\n|---|---|---|\n| none | {caught(None)[0] or '-'} | |")
    for mutant in (*MUTANTS, *HARMLESS):
        said, seconds = caught(mutant)
        print(
            f"| {mutant.name} (sm_{mutant.arch}) | {said[:160].replace('|', '/') or 'NOT CAUGHT'} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
