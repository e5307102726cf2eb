"""The phases of a site's program, in the order of the graph; the ops of runtime/rank/ops.py have the same names."""

from __future__ import annotations

PUTS = {"q": "put_q", "k": "put_k", "v": "put_v"}
"""The phase that sends a tensor of an attention."""
TENSORS = {phase: name for name, phase in PUTS.items()}
"""The tensor that such a phase sends."""
ATTEND = "attend"
COLLECT = "collect"
EXCHANGE_START = "exchange_start"
EXCHANGE_FINISH = "exchange_finish"
EXCHANGE_LINEAR = "exchange_linear"
"""An op that is ``exchange_finish`` of a weight and a product with it (runtime/rank/ops.py)."""

ATTENTION = (*PUTS.values(), ATTEND, COLLECT)
"""The phases of an attention."""
EXCHANGE = (EXCHANGE_START, EXCHANGE_FINISH)
"""The phases of an exchange."""

STARTS = (*PUTS.values(), EXCHANGE_START)
"""Phases that send this rank's own tensors and wait for nothing."""
JOINS = (ATTEND, EXCHANGE_FINISH)
"""Phases that wait for the puts of their site to have read what they send."""
ENDS = (COLLECT, EXCHANGE_FINISH, EXCHANGE_LINEAR)
"""Phases, or ops, that end a site's epoch on this rank."""
