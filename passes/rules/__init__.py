"""How each family of ops behaves on shards: one file for one family.

Start in rule.py: the table RULES and the three questions that a rule answers. view.py is the shortest example.
Importing this package registers all of them; an op without a rule is never guessed, it is computed whole.

May import: the leaves, runtime/program, runtime/rank (what hidden calls are) and passes/graph.
"""

from __future__ import annotations

from sfcompile.passes.rules import (
    attention,
    conv,
    index,
    linked,
    lookup,
    norm,
    pad,
    per_head,
    reduce,
    resample,
    scan,
    unfold,
    view,
)

__all__ = [
    "attention", "conv", "index", "linked", "lookup", "norm", "pad", "per_head", "reduce", "resample", "scan",
    "unfold", "view",
]  # fmt: skip
