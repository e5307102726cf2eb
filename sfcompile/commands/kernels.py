"""``sfcompile kernels``: the generated kernels of a model or of one attention, compiled with no GPU present."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfcompile.commands.checks import check_folder
from sfcompile.commands.models import check_model, predicted
from sfcompile.commands.parsing import add_model_name
from sfcompile.errors import OptionError

if TYPE_CHECKING:
    from sfcompile.runtime.program.sites import AttentionSite
    from sfcompile.runtime.program.topology import Topology

_SHAPE = re.compile(r"(\d+)x(\d+)(?:/(\d+))?x(\d+)x(\d+)")
_LIKE_A_SHAPE = re.compile(r"[\dx/*,. ]*\d[\dx/*,. ]*")
_ARCH = re.compile(r"(?:sm_)?(\d{2,3})a?")


@dataclass(frozen=True)
class Shape:
    """An attention as typed: batch x heads[/K-V heads] x tokens x head size."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; those that choose a model are added by the caller. Needs no torch."""
    parser.description = (
        "Plan a model, or one attention given as BATCHxHEADSxTOKENSxHEAD_DIM (HEADS/KV_HEADS for grouped heads), for a "
        "topology; write every generated kernel's source, PTX and cubin, and a table of registers, spills, shared "
        "memory and the order of waits, puts and matrix products. No GPU is needed."
    )
    add_model_name(parser, "a model's name, or a shape such as 1x24x36864x128")
    parser.add_argument(
        "--arch", action="append", type=arch, help="sm_80, sm_90 or sm_100; may be repeated (default sm_90)"
    )
    parser.add_argument("--causal", action="store_true", help="a causal attention (with a shape)")
    parser.add_argument("--out", type=Path, default=Path("kernels"), help="folder for the files (default kernels)")
    parser.add_argument("--no-link", action="store_true", help="leave NVSHMEM's calls open instead of linking them")


def arch(text: str) -> int:
    """An architecture, for argparse: "sm_90" or "90"."""
    match = _ARCH.fullmatch(text)
    if match is None or int(match[1]) < 80:
        raise argparse.ArgumentTypeError(f"{text!r} is not an architecture of sm_80 or later, such as sm_90")
    return int(match[1])


def shape(text: str) -> Shape | None:
    """A shape as typed, or None if the text is something else.

    Raises:
        OptionError: a size is missing or 0, or K/V heads do not divide the heads.
    """
    match = _SHAPE.fullmatch(text)
    if match is None and _LIKE_A_SHAPE.fullmatch(text):
        raise OptionError(
            f"{text!r} has {len(re.findall('[0-9]+', text))} sizes and is no attention",
            "a shape is BATCHxHEADSxTOKENSxHEAD_DIM, with HEADS/KV_HEADS for grouped heads",
            "for example 1x24x4096x128 or 1x24/8x4096x128",
        )
    if match is None:
        return None
    batch, heads, tokens, head_dim = (int(match[i]) for i in (1, 2, 4, 5))
    kv_heads = int(match[3] or heads)
    if 0 in (batch, heads, kv_heads, tokens, head_dim) or heads % kv_heads:
        raise OptionError(
            f"{text!r} is no attention", "sizes are at least 1 and K/V heads divide heads", "for example 1x24x4096x128"
        )
    return Shape(batch, heads, kv_heads, tokens, head_dim)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code.

    Raises:
        StreamFusionError: no such model, no legal plan, the compiler refuses, a folder that cannot be written.
    """
    from sfcompile.runtime.program.topology import Topology

    topology = Topology.parse(args.topology)
    if not args.model:
        raise OptionError("No model and no shape is named", "", "say for example sfcompile kernels 1x24x4096x128")
    _check_kind(args)
    check_folder(args.out, "--out", create=True)
    from sfcompile.codegen.toolchain.listing import HEAD, line, write_kernels

    for folder, site, kind, where in sites_of(args, topology):
        print(f"{folder}: {site.name}, {kind}")
        schedule = kind.schedule(site, where)
        print(HEAD)
        for row in write_kernels(schedule, where.machine_of, args.arch or [90], args.out / folder, not args.no_link):
            print(line(row), flush=True)
        print(f"wrote {args.out / folder}")
    return 0


def _check_kind(args: argparse.Namespace) -> None:
    """That a model or a shape is named, and nothing is said that would be left unread.

    Raises:
        OptionError: no such model, or an argument of the other kind.
    """
    if shape(args.model) is None:
        check_model(args)
        unread = "--causal" if args.causal else ""
    else:
        unread = "--config" if args.config else ""
    if unread:
        raise OptionError(
            f"{unread} is said of {args.model}",
            "--causal is for a shape: a model says it by itself; --config is for a model",
            "Leave it out",
        )


def sites_of(args: argparse.Namespace, topology: Topology) -> list[tuple[str, AttentionSite, Any, Topology]]:
    """``(folder, site, candidate of the planner, topology)`` of every distinct attention."""
    import torch

    from sfcompile.codegen.plan.choose_plan import plan_site
    from sfcompile.runtime.program.intervals import slice_of
    from sfcompile.runtime.program.sites import AttentionSite

    asked = shape(args.model)
    if asked is not None:
        spans = [slice_of(asked.tokens, topology.num_ranks, rank) for rank in range(topology.num_ranks)]
        places = tuple(((first, last - first),) for first, last in spans)
        site = AttentionSite(
            args.model, asked.batch, asked.heads, asked.kv_heads, asked.head_dim, asked.head_dim,
            getattr(torch, args.dtype), places, places, asked.head_dim**-0.5, args.causal,
        )  # fmt: skip
        return [("attention", site, plan_site(site, topology, schedule=args.schedule).best, topology)]
    args.placement, args.wire, args.weights = "auto", "same", "whole"
    choices = predicted(args).choices
    planned = [(choices.sites[key], choices.plans[key]) for key in choices.counts]
    if not planned:
        raise OptionError(
            f"{args.model} has no attention that is sharded on {args.topology}",
            "kernels are generated for sharded attentions",
            "see sfcompile explain for the reasons",
        )
    return [(f"attention-{i}", site, plan.best, choices.topology) for i, (site, plan) in enumerate(planned, start=1)]
