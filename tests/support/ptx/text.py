"""Reads PTX text: a kernel's parameters, registers, statements and labels."""

from __future__ import annotations

import re
from dataclasses import dataclass


class PtxError(Exception):
    """PTX that cannot be run, or that did what no kernel may do."""


@dataclass(frozen=True)
class Statement:
    """One instruction.

    Attributes:
        op: with all its dots, ``ld.global.sys.acquire.b64``.
        pred: the register that guards it, "" if none; ``negated`` is ``@!``.
        line: of the source that the kernel was compiled from; 0 if it is not said.
    """

    op: str
    args: tuple[str, ...]
    pred: str
    negated: bool
    line: int

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.pred} " if self.pred else ""
        return f"{guard}{self.op} {', '.join(self.args)} (source line {self.line})"


@dataclass(frozen=True)
class Entry:
    """One kernel.

    Attributes:
        params: name and bytes of each, in order.
        threads: of a program.
        labels: name to index of the statement that follows.
        registers: prefix of a register's name to its bits (1 is a predicate); ``counts`` to how many there are.
        tables: labels that an indexed branch goes to, by the table's name.
    """

    name: str
    params: tuple[tuple[str, int], ...]
    threads: int
    statements: tuple[Statement, ...]
    labels: dict[str, int]
    registers: dict[str, int]
    counts: dict[str, int]
    tables: dict[str, list[str]]


class _Scopes:
    """Names between braces: registers get numbers of their own, labels a suffix."""

    def __init__(self, registers: dict[str, int], counts: dict[str, int]) -> None:
        self._registers, self._counts = registers, counts
        self._open: list[tuple[int, dict[str, str]]] = []
        self._scopes = 0

    def turn(self, brace: str) -> None:
        """One begins or ends."""
        if brace == "}":
            self._open.pop()
        else:
            self._scopes += 1
            self._open.append((self._scopes, {}))

    def renamed(self, code: str) -> str:
        """A line with the names that it means; what it declares is known from then on."""
        if not self._open:
            return code
        number, names = self._open[-1]
        declared = re.fullmatch(r"\.reg\s+\.[a-z]*?(pred|8|16|32|64)\s+([\w, ]+);", code)
        if declared:
            bits = _BITS[declared[1]]
            prefix = {1: "zp", 8: "zb", 16: "zs", 32: "zr", 64: "zd"}[bits]
            for name in declared[2].split(","):
                self._registers[prefix] = bits
                self._counts[prefix] = self._counts.get(prefix, 0) + 1
                names[name.strip()] = f"%{prefix}{self._counts[prefix] - 1}"
            return ""
        if re.fullmatch(r"[A-Za-z]\w*:", code):
            return f"{code[:-1]}__{number}:"
        code = re.sub(r"\b(bra(?:\.uni)?\s+)([A-Za-z]\w*);", rf"\1\2__{number};", code)
        for name, register in names.items():
            code = re.sub(rf"(?<![%\w]){name}\b", register, code)
        return code


_STATEMENT = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_BITS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}


def read_entry(text: str, name: str = "") -> Entry:
    """The kernel of a PTX text.

    Args:
        name: of the kernel; "" is the first.

    Raises:
        PtxError: no such kernel, or a line that is no PTX.
    """
    found = re.search(rf"\.visible \.entry ({re.escape(name) if name else '[^(]+'})\(", text)
    if found is None:
        raise PtxError(f"there is no kernel {name or ''} in the text")
    head, _, rest = text[found.start() :].partition("{")
    params = tuple(
        (param, int(bits) // 8) for bits, param in re.findall(r"\.param \.[a-z](\d+)[^\n]*?(\w+_param_\d+)", head)
    )
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", head)
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    registers: dict[str, int] = {}
    counts: dict[str, int] = {}
    tables: dict[str, list[str]] = {}
    last_label = ""
    line, depth, pending, table = 0, 1, "", ""
    scopes = _Scopes(registers, counts)
    for raw in rest.splitlines():
        code = raw.split("//")[0].strip()
        depth += code.count("{") - code.count("}")
        if depth == 0:
            break
        if code in ("{", "}"):
            scopes.turn(code)
        if code in ("", "{", "}"):
            continue
        if table:  # where an indexed branch goes
            tables[table] += [label.strip() for label in code.strip(";").split(",") if label.strip()]
            table = "" if code.endswith(";") else table
            continue
        code = scopes.renamed(code)
        if not code:
            continue
        if pending:
            code = f"{pending} {code}"
        if code.startswith(".loc"):
            numbers = code.split()
            line = int(numbers[2]) or line
            continue
        if code.startswith(".reg"):
            for bits, prefix, count in re.findall(r"\.[a-z]*?(pred|8|16|32|64)\s+%(\w+?)<(\d+)>", code):
                registers[prefix], counts[prefix] = _BITS[bits], int(count)
            continue
        if code.startswith(".branchtargets"):
            table = last_label
            tables[table] = []
            continue
        if code.startswith("."):
            continue
        if code.endswith(":"):
            last_label = code[:-1]
            labels[last_label] = len(statements)
            continue
        if not code.endswith(";"):
            pending = code
            continue
        pending = ""
        for part in code.split(";"):
            if part.strip():
                statements.append(_statement(part.strip(), line))
    return Entry(
        found[1], params, int(threads[1]) if threads else 128, tuple(statements), labels, registers, counts, tables
    )


def _statement(code: str, line: int) -> Statement:
    parts = _STATEMENT.match(code)
    if parts is None:
        raise PtxError(f"no PTX statement: {code!r}")
    return Statement(parts[3], split_list(parts[4]), parts[2] or "", parts[1] == "!", line)


def split_list(text: str) -> tuple[str, ...]:
    """Operands between commas, brackets kept together."""
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            items.append(text[start:i].strip())
            start = i + 1
    items.append(text[start:].strip())
    return tuple(item for item in items if item)


def inner(operand: str) -> tuple[str, ...]:
    """Registers of ``{a, b}``; of a plain operand itself."""
    return split_list(operand[1:-1]) if operand.startswith("{") else (operand,)
