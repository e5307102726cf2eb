"""A rank as a program of its own, which imports everything itself: ``python -m torture.programs START``."""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    from torture.job import Start, run_rank

    facts = json.loads(sys.argv[1])
    run_rank(Start(**(facts | {"args": tuple(facts["args"])})))
