"""``docs/models.md``: what was tried, from the result files of zoo.py, each with its date.

python benchmarks/zoo.py --page docs/models.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
FILES = ("*-zoo-4-ranks.txt", "*-zoo-convolutional.txt", "*-zoo-some-models.txt")
"""Result files that count: models on four ranks where the planner chooses. Of several with one ending, the newest."""
_ROW = re.compile(r"^(\w+) +(exact|WRONG|FAILED) +(?:([\d.e+-]+) +([\d.]+|nan) +(\d+) +[\d.]+ +(\d+) .*  (\S.*)|.*)$")

HEAD = """# Models that were tried

Made by `python benchmarks/zoo.py --page docs/models.md` from the files in `benchmarks/results`; edit neither by hand.

Every model is tiny and has random weights, and was run on four CPU ranks with `placement="shard"` (all that has a rule
is cut) against one process, on the day that stands beside it; nothing here is newer. *Difference* is the largest, of
the output's scale. *Exact* is a difference of at most 1e-5; a model whose own code computes in bf16 or fp16 somewhere
may flip the last bit there, and is held to 1e-3 or 2e-4 (the rows above 1e-5). *Busiest rank* is its FLOPs in all
graphs over an even share: matrix products, convolutions and attention. *Graphs*: more than one means that Dynamo broke
the model. *Attention* is how the heaviest one ran, if one was cut. That a model is listed says nothing about its speed.
Classes are those of diffusers; a model that is none, or is a part of one, has only the name that it has in
`benchmarks/diffusers_zoo` or in a zoo beside it.
"""


@dataclass(frozen=True)
class Tried:
    """One row of a result file."""

    name: str
    date: str
    verdict: str
    error: float | None = None
    share: float | None = None
    gathers: int | None = None
    graphs: int | None = None
    plan: str = ""

    def cells(self, class_name: str) -> tuple[str, ...]:
        """The row of the page."""
        if self.error is None or self.share is None:
            return (self.name, class_name, self.verdict, "", "", "", "", self.date)
        difference = f"{self.error:.1e}" if self.verdict == "exact" else f"**{self.error:.1e}: wrong**"
        share = "unknown" if self.share != self.share else f"{self.share:.2f}"
        plan = "" if self.plan == "nothing sharded" else self.plan
        return (self.name, class_name, difference, share, str(self.gathers), str(self.graphs), plan, self.date)


def rows(path: Path) -> Iterator[Tried]:
    """The models of a result file, whose name begins with its date."""
    date = path.name[:10]
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _ROW.match(line)
        if match is None:
            continue
        name, verdict, error, share, gathers, graphs, plan = match.groups()
        if error is None:
            yield Tried(name, date, verdict)
        else:
            yield Tried(name, date, verdict, float(error), float(share), int(gathers), int(graphs), plan)


def tried(results: Path = RESULTS) -> list[Tried]:
    """Every model by its newest result, by name."""
    newest: dict[str, Tried] = {}
    for pattern in FILES:
        for path in sorted(results.glob(pattern))[-1:]:
            for row in rows(path):
                if row.name not in newest or newest[row.name].date <= row.date:
                    newest[row.name] = row
    return [newest[name] for name in sorted(newest)]


def page(models: list[Tried], classes: dict[str, str]) -> str:
    """The page's text.

    Args:
        classes: name of a model -> its class, where it is known.
    """
    exact = sum(row.verdict == "exact" for row in models)
    single = [row for row in models if row.graphs == 1 and row.verdict == "exact" and row.share is not None]
    even = sum(row.share <= 1.10 for row in single if row.share is not None)
    head = ("model", "class", "difference", "busiest rank", "gathers", "graphs", "attention", "on")
    table = [head, ("---",) * len(head), *(row.cells(classes.get(row.name, "")) for row in models)]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    summary = (
        f"{exact} of {len(models)} are exact; of the {len(single)} that are one graph, {even} give the busiest rank at "
        "most 1.10 of an even share."
    )
    return f"{HEAD}\n{summary}\n\n" + "\n".join(lines) + "\n"
