"""What ``dump=DIR`` writes: the numbered graph after each pass, how it changed, and what the pass found.

    DIR/graph-1f0c9a2b/00_captured.txt
                       01_analyse_attention.txt    what it found; "graph as in 00_captured.txt"
                       ...
                       09_rewrite_local.txt        op counts before -> after, and the new graph
                       plan.txt  schedules.txt  kernels/
                       index.html                  from which all of it is read

The folder is named after the captured graph, so that every compile of one model lands in one place and two compiles can
be compared with ``diff -r``. Texts hold no addresses and no times but those of passes, in first lines and in the index.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import fx

from sfcompile.errors import OptionError
from sfcompile.passes.report.dump_index import DumpedPass, index_page


class Dump:
    """Writes one graph's folder as the passes go."""

    def __init__(self, directory: Path, captured: fx.Graph) -> None:
        text = graph_text(captured)
        self._folder = Path(directory) / f"graph-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self._passes = 0
        self._last, self._last_name = text, "00_captured.txt"
        self._counts = count_ops(captured)
        self._known: Mapping[str, str] = {}
        self._index: list[DumpedPass] = []
        self._others: list[str] = []
        self.write(self._last_name, text)

    def after(self, name: str, why: str, seconds: float, graph: fx.Graph, known: Mapping[str, str]) -> None:
        """Write one pass's file.

        Args:
            known: all that is known after it, as text; what was known before in the same words is left out.
        """
        self._passes += 1
        file = f"{self._passes:02d}_{name}.txt"
        lines = [f"# pass {self._passes} {name}, {seconds * 1e3:.1f} ms: {why}"]
        for key, text in known.items():
            if text and self._known.get(key) != text:
                lines += ["", f"# {key}", *text.splitlines()]
        self._known = dict(known)
        text, counts = graph_text(graph), count_ops(graph)
        changes: list[str] = []
        if text == self._last:
            lines += ["", f"# graph as in {self._last_name}"]
        else:
            changes = difference(self._counts, counts)
            lines += ["", *changes, "", text.rstrip()]
            self._last, self._last_name, self._counts = text, file, counts
        self.write(file, "\n".join(lines) + "\n")
        words = [line.lstrip("# ") for line in changes]
        self._index.append(DumpedPass(file, why, seconds, counts.total(), words))
        self._write_index()

    def add(self, name: str, text: str) -> None:
        """Write a file that is no pass's, and list it in the index.

        Raises:
            OptionError: it cannot be written.
        """
        self.write(name, text)
        self._others.append(name)
        self._write_index()

    def _write_index(self) -> None:
        self.write("index.html", index_page(self._folder.name, "00_captured.txt", self._index, self._others))

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all.

        Raises:
            OptionError: the folder or the file cannot be written.
        """
        path = self._folder / name
        half = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with half.open("x", encoding="utf-8") as file:
                    file.write(text)
                half.replace(path)
            except BaseException:
                half.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OptionError(
                f"dump={str(self._folder.parent)!r}: {path} cannot be written ({error})",
                "every rank's graphs are written there",
                "name a folder with room that you may write, or leave dump out",
            ) from error


def graph_text(graph: fx.Graph) -> str:
    """One line for each node: its shape, then the call."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        shape = (
            f"{str(value.dtype).removeprefix('torch.')}{list(map(int, value.shape))}" if hasattr(value, "dtype") else ""
        )
        lines.append(f"{shape:<28} {node.format_node()}")
    return "\n".join(lines) + "\n"


def count_ops(graph: fx.Graph) -> Counter[str]:
    """How often each op is called."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def difference(before: Counter[str], after: Counter[str]) -> list[str]:
    """Node counts before and after, in all and for every op whose count moved, largest change first."""
    moved = {op: after[op] - before[op] for op in {*before, *after} if after[op] != before[op]}
    total, new = before.total(), after.total()
    lines = [f"# calls: {total} -> {new} ({new - total:+d})"]
    for op in sorted(moved, key=lambda op: (-abs(moved[op]), op)):
        lines.append(f"#   {op}: {before[op]} -> {after[op]} ({moved[op]:+d})")
    return lines
