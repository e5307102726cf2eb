"""Turns PTX into Python functions over numpy arrays: one for each straight stretch, an array a register.

A stretch ends where a label stands, where code branches, and around every instruction through which threads see each
other in an order (barriers, atomics, fences, polls): these are the points between which the world may switch to other
warps. Between them plain loads and stores are checked for races, so their interleaving does not matter: where it
would, a race is reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx import arithmetic, values
from ptx.clocks import ASYNC, ASYNC_GLOBAL
from ptx.text import Entry, PtxError, Statement, inner

STOP = -2
"""What a stretch returns if its threads must not go on now; else the next stretch, or SPLIT."""
SPLIT = -3
"""Threads of the gang went different ways."""
DONE = -1

_ORDERED = re.compile(
    r"^(bar|barrier|atom|red|fence|membar|wgmma|call|mbarrier|ret|exit|nanosleep|tensormap|cp\.async\.(commit|wait|bulk)"
    r"|(ld|st)\.\S*(relaxed|acquire|release|volatile))"
)


@dataclass
class Stretch:
    """Statements from ``first`` to before ``last`` and the function that runs them.

    Attributes:
        ordered: through it threads see each other in an order.
        uses: registers that are computed with; ``moves`` those only copied: (to, from).
    """

    first: int
    last: int
    ordered: bool
    uses: frozenset[str]
    moves: tuple[tuple[str, str], ...]
    run: Callable[[Any], int] = field(repr=False, default=lambda gang: STOP)
    source: str = field(repr=False, default="")


@dataclass(frozen=True)
class Code:
    """A kernel ready to run.

    Attributes:
        first: number of its first statement among all kernels of the process; races name statements by number.
        narrow: bytes of the smallest store, 4 at most.
    """

    entry: Entry
    stretches: tuple[Stretch, ...]
    first: int
    narrow: int


PLACES: list[tuple[str, Statement]] = []
"""Kernel and statement of every number."""


def compile_entry(entry: Entry) -> Code:
    """Functions for all stretches.

    Raises:
        PtxError: an instruction that the machine does not know.
    """
    first = len(PLACES)
    PLACES.extend((entry.name, statement) for statement in entry.statements)
    starts = _starts(entry)
    number = {start: i for i, start in enumerate(starts)}
    stops = [*starts[1:], len(entry.statements)]
    bodies = [_Body(entry, number, first, start, stop) for start, stop in zip(starts, stops, strict=True)]
    escaping = set().union(*(body.needed | body.kept for body in bodies))
    stretches = []
    for i, body in enumerate(bodies):
        ordered = any(_ORDERED.match(statement.op) for statement in entry.statements[body.start : body.stop])
        source = body.source(escaping, i + 1)
        scope: dict[str, Any] = {**body.constants, **_GLOBALS}
        exec(compile(source, f"<{entry.name} stretch {i}>", "exec"), scope)
        part = entry.statements[body.start : body.stop]
        uses, moves = _uses(part)
        stretches.append(Stretch(body.start, body.stop, ordered, uses, moves, scope["run"], source))
    widths = [
        int(w) // 8
        for s in entry.statements
        if s.op.startswith("st.") and "param" not in s.op
        for w in re.findall(r"\.[subf](8|16)$", s.op)
    ]
    return Code(entry, tuple(stretches), first, min([4, *widths]))


def _uses(part: tuple[Statement, ...]) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    uses: set[str] = set()
    moves: list[tuple[str, str]] = []
    for s in part:
        if s.op.startswith("mov.") and s.args[1].startswith("%"):
            moves.append((s.args[0], s.args[1]))
        elif not s.op.startswith("wgmma"):
            reads = s.args if s.op.startswith(("st", "red", "bra")) else s.args[1:]
            uses |= {register for arg in reads for register in re.findall(r"%[a-z]+\d+", arg)}
    return frozenset(uses), tuple(moves)


def _starts(entry: Entry) -> list[int]:
    """Where stretches begin."""
    starts = {0, *(at for at in entry.labels.values() if at < len(entry.statements))}
    for i, statement in enumerate(entry.statements):
        if statement.op.startswith("st.param"):  # a call and its arguments stay together
            if not entry.statements[i - 1].op.startswith("st.param"):
                starts.add(i)
        elif _ORDERED.match(statement.op):
            starts |= {i + 1} if statement.op.startswith("call") else {i, i + 1}
        elif statement.op.startswith(("bra", "brx")):
            starts.add(i + 1)
    return sorted(start for start in starts if start < len(entry.statements))


_GLOBALS: dict[str, Any] = {
    "np": np,
    "V": values,
    "STOP": STOP,
    "DONE": DONE,
    "U2": np.uint16,
    "U4": np.uint32,
    "U8": np.uint64,
}
_GLOBALS |= {"I2": np.int16, "I4": np.int32, "I8": np.int64, "F4": np.float32, "F8": np.float64, "B": np.bool_}
_GLOBALS |= {"U1": np.uint8, "I1": np.int8, "F2": np.float16}


class _Body(arithmetic.Operands):
    """The function of one stretch."""

    def __init__(self, entry: Entry, number: dict[int, int], first: int, start: int, stop: int) -> None:
        super().__init__(entry.registers, entry.params)
        self.entry, self.stretch_of, self.first, self.start, self.stop = entry, number, first, start, stop
        self.kept: set[str] = set()
        self.end = ""
        for i in range(start, stop):
            self._statement(entry.statements[i], first + i)

    def source(self, escaping: set[str], following: int) -> str:
        """The function's text; only registers that another stretch reads are written back."""
        loads = [f"{self.local(name)} = {self._place(name)}" for name in sorted(self.needed)]
        stores = [f"{self._place(name)} = {self.local(name)}" for name in sorted(self.written & escaping)]
        end = self.end or f"return {following if self.stop < len(self.entry.statements) else DONE}"
        lines = ["L = g.lanes", *loads, *self.lines, *stores, end.replace("NEXT", str(following))]
        return "def run(g):\n" + "\n".join(f"    {line}" for line in lines) + "\n"

    def _place(self, name: str) -> str:
        prefix, index = re.fullmatch(r"%([a-z]+)(\d+)", name).groups()  # type: ignore[union-attr]
        return f"g.bank_{prefix}[{index}][L]"

    def _statement(self, s: Statement, at: int) -> None:
        self.guard = s.pred
        self.mask = "None"
        if s.pred:
            self.mask = f"~{self.read(s.pred, 'pred')}" if s.negated else self.read(s.pred, "pred")
        base = s.op.split(".")[0]
        if base == "bra":
            target = (
                self.stretch_of[self.entry.labels[s.args[0]]]
                if self.entry.labels[s.args[0]] < len(self.entry.statements)
                else DONE
            )
            self.end = f"return g.branch({self.mask}, {target}, NEXT)" if s.pred else f"return {target}"
        elif base == "brx":
            labels = self.entry.tables[s.args[1]]
            numbers = [self.stretch_of[self.entry.labels[label]] for label in labels]
            self.end = f"return g.branch_by({self.array(s.args[0], 'u32')}, {numbers})"
        elif base in ("ret", "exit"):
            self.end = f"return g.branch({self.mask}, DONE, NEXT)" if s.pred else "return DONE"
        elif base in ("bar", "barrier"):
            self.end = f"return g.barrier({self.value_of(s.args[0]) if s.args else 0}, NEXT, {at})"
            if s.pred or len(s.args) > 1 or "arrive" in s.op or "red" in s.op:
                if not (s.op.startswith("bar.warp") or len(s.args) > 1):
                    raise PtxError(f"the machine does not know {s}")
            if s.op.startswith("bar.warp"):
                self.end = "return g.warp_barrier(NEXT)"
            elif len(s.args) > 1:
                self.end = f"return g.barrier({self.value_of(s.args[0])}, NEXT, {at}, {self.value_of(s.args[1])})"
        elif base in (
            "ld",
            "st",
            "atom",
            "red",
            "cp",
            "ldmatrix",
            "stmatrix",
            "fence",
            "membar",
            "wgmma",
            "call",
            "nanosleep",
            "st_async",
        ):
            self._memory(base, s, at)
        elif base == "mma":
            self._product(s)
        elif base in ("mbarrier", "tensormap", "elect", "setmaxnreg"):
            self._asynchronous(base, s, at)
        else:
            if not self.calculate(s):
                raise PtxError(f"the machine does not know {s}")

    # ------------------------------------------------------------------ memory

    def address(self, operand: str) -> str:
        """int64 addresses of ``[register + offset]``; of shared memory from the start of the program's own."""
        place, _, offset = operand.strip("[] ").partition("+")
        place = place.strip()
        step = int(offset.strip(), 0) if offset.strip() else 0
        if place == "global_smem":
            return f"g.full(I8, {step})"
        kind = "s64" if self.bits_of(place) == 64 else "u32"
        text = f"{self.read(place, kind)}" + ("" if kind == "s64" else ".astype(I8)")
        return f"({text} + {step})" if step else text

    def _memory(self, base: str, s: Statement, at: int) -> None:
        op, mods = s.op, s.op.split(".")
        space = "shared" if "shared" in op.split(".", 1)[1] and base not in ("cp",) else "global"
        if base in ("ld", "st") and "param" in mods:
            self._parameter(base, s)
        elif base in ("ld", "st") and _ORDERED.match(op):
            width = _width(op)
            regs = inner(s.args[0] if base == "ld" else s.args[1])
            sem = next(m for m in mods if m in ("relaxed", "acquire", "release", "volatile"))
            scope = next((m for m in mods if m in ("cta", "gpu", "sys", "cluster")), "sys")
            where = self.address(s.args[1] if base == "ld" else s.args[0])
            if base == "ld":
                if len(regs) != 1:
                    raise PtxError(f"the machine does not know {s}")
                self.write(
                    regs[0],
                    f"u{width * 8}",
                    f"g.strong_load('{space}', {where}, {width}, '{sem}', '{scope}', {self.mask}, {at})",
                )
            else:
                data = ", ".join(self.read(reg, f"u{width * 8}") for reg in regs)
                self.lines.append(
                    f"g.strong_store('{space}', {where}, {width}, ({data},), '{sem}', '{scope}', {self.mask}, {at})"
                )
            self.end = "return g.pause(NEXT)"
        elif base == "ld":
            width, regs = _width(op), inner(s.args[0])
            names = [f"t{i}" for i in range(len(regs))]
            self.lines.append(
                f"{', '.join(names)}, = g.load("
                f"'{space}', {self.address(s.args[1])}, {width}, {len(regs)}, {self.mask}, {at})"
            )
            signed = mods[-1][0] == "s"
            for name, reg in zip(names, regs, strict=True):
                bits = self.bits_of(reg)
                text = (
                    name
                    if bits == width * 8
                    else f"{name}.view(I{width}).astype(I{bits // 8}).view(U{bits // 8})"
                    if signed
                    else f"{name}.astype(U{bits // 8})"
                )
                self.write(reg, f"u{bits}", text)
        elif base == "st":
            width, regs = _width(op), inner(s.args[1])
            data = ", ".join(self.read(reg, f"u{width * 8}") for reg in regs)
            self.lines.append(f"g.store('{space}', {self.address(s.args[0])}, {width}, ({data},), {self.mask}, {at})")
        elif base in ("atom", "red"):
            self._atomic(base, s, at, space)
        elif base == "cp":
            self._copy(s, at)
        elif base in ("ldmatrix", "stmatrix"):
            self._matrix(base, s, at)
        elif base in ("fence", "membar"):
            if "tensormap" in op:
                self.lines.append(f"g.acquire_map({self.address(s.args[0])}, {self.mask}, {at})")
            elif "proxy" in op:
                planes = (ASYNC,) if "shared" in op else (ASYNC_GLOBAL,) if "global" in op else (ASYNC, ASYNC_GLOBAL)
                self.lines.append(f"g.proxy_fence({planes})")
            else:
                scope = {"gl": "gpu"}.get(mods[-1], mods[-1])
                self.lines.append(f"g.fence('{scope}')")
        elif base == "nanosleep":
            self.end = "return g.pause(NEXT)"
        elif base == "wgmma":
            self._warpgroup(s, at)
        elif base == "call":
            name, params = (s.args[1], s.args[2]) if s.args[0].startswith("(") else (s.args[0], s.args[1])
            given = ", ".join(f"c_{param}" for param in inner("{" + params.strip("()") + "}"))
            self.end = f"return g.call('{name}', ({given},), {at}, NEXT)"

    def _parameter(self, base: str, s: Statement) -> None:
        width = _width(s.op)
        if base == "ld":
            name, _, offset = s.args[1].strip("[] ").partition("+")
            if name.strip() in dict(self.params):
                self.write(s.args[0], f"u{width * 8}", f"g.full(U{width}, g.parameter('{name.strip()}', {width}))")
            elif self.used_later(s.args[0]):
                raise PtxError(f"the machine gives nothing back from calls: {s}")
        else:
            kind = f"u{width * 8}"
            name = s.args[0].strip("[] ").partition("+")[0].strip()
            self.lines.append(f"c_{name} = {self.array(s.args[1], kind)}")

    def used_later(self, register: str) -> bool:
        """Whether any statement reads a register."""
        return any(register in arg for s in self.entry.statements for arg in s.args[1:])

    def _atomic(self, base: str, s: Statement, at: int, space: str) -> None:
        mods = s.op.split(".")
        sem = next((m for m in mods if m in ("relaxed", "acquire", "release", "acq_rel")), "relaxed")
        scope = next((m for m in mods[1:] if m in ("cta", "gpu", "sys", "cluster")), "gpu")
        action = next(m for m in mods[1:] if m in ("add", "exch", "max", "min", "cas", "or", "and", "xor", "inc"))
        width = _width(s.op)
        target, rest = (s.args[0], s.args[1:]) if base == "atom" else ("_", s.args)
        signed = mods[-1][0] == "s"
        data = ", ".join(self.array(value, f"u{width * 8}") for value in rest[1:])
        self.write(
            target,
            f"u{width * 8}",
            f"g.atomic('{space}', {self.address(rest[0])}, {width}, '{action}', ({data},), {signed}, "
            f"'{sem}', '{scope}', {self.mask}, {at})",
        )
        self.end = "return g.pause(NEXT)"

    def _copy(self, s: Statement, at: int) -> None:
        if s.op.startswith(("cp.async.ca", "cp.async.cg")):
            size = int(s.args[2], 0)
            kept = self.array(s.args[3], "u32") if len(s.args) > 3 else "None"
            self.lines.append(
                f"g.copy_async({self.address(s.args[0])}, {self.address(s.args[1])}, {size}, {kept}, {self.mask}, {at})"
            )
        elif s.op.startswith("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier"):
            place, _, rest = s.args[1].strip("[]").partition(",")
            where = ", ".join(self.array(x, "s32") for x in inner(rest.strip()))
            target, barrier = self.address(s.args[0]), self.address(s.args[2])
            self.lines.append(
                f"g.copy_tensor({target}, {self.address(place)}, ({where},), {barrier}, {self.mask}, {at})"
            )
        elif re.match(r"cp\.async\.bulk\.(commit_group|wait_group\.read)$", s.op):
            pass  # of copies out of shared memory, of which there are none
        elif s.op.startswith("cp.async.commit"):
            self.lines.append("g.commit_copies()")
        elif s.op.startswith("cp.async.wait"):
            self.lines.append(f"g.wait_copies({int(s.args[0], 0) if s.args else 0})")
        else:
            raise PtxError(f"the machine does not know {s}")

    def _asynchronous(self, base: str, s: Statement, at: int) -> None:
        """What belongs to tensor copies (tensor_copies.py)."""
        mods = s.op.split(".")
        if base == "setmaxnreg":  # registers are as many as the text names
            return
        if base == "elect":
            leader, _, chosen = s.args[0].partition("|")
            self.write(leader, "b32", "g.full(U4, 0)")
            self.write(chosen, "pred", "g.lane_numbers == 0")
        elif base == "tensormap" and mods[1] == "replace":
            place = f"{self.address(s.args[0])}, '{mods[3]}'"
            which, value = (s.args[1], s.args[2]) if len(s.args) > 2 else ("0", s.args[1])
            kind = "u64" if mods[-1] == "b64" else "u32"
            self.lines.append(f"g.set_map({place}, {int(which, 0)}, {self.array(value, kind)}, {self.mask})")
        elif base == "tensormap" and mods[1] == "cp_fenceproxy":
            self.lines.append(f"g.publish_map({self.address(s.args[0])}, {self.address(s.args[1])}, {self.mask}, {at})")
        elif base == "mbarrier" and mods[1] == "init":
            self.lines.append(f"g.init_barrier({self.address(s.args[0])}, {self.array(s.args[1], 'u32')}, {self.mask})")
        elif base == "mbarrier" and mods[1] == "arrive":
            given = self.array(s.args[2], "u32") if len(s.args) > 2 else "g.full(U4, 1)"
            expects = mods[2] == "expect_tx"
            self.lines.append(f"g.arrive({self.address(s.args[1])}, {given}, {expects}, {self.mask}, {at})")
        elif base == "mbarrier" and mods[1] == "try_wait" and "parity" in mods:
            self.write(s.args[0], "pred", "g.full(B, True)")
            self.end = f"return g.await_phase({self.address(s.args[1])}, {self.array(s.args[2], 'u32')}, NEXT)"
        else:
            raise PtxError(f"the machine does not know {s}")

    def _matrix(self, base: str, s: Statement, at: int) -> None:
        trans = "trans" in s.op
        if base == "ldmatrix":
            regs = inner(s.args[0])
            names = [f"t{i}" for i in range(len(regs))]
            self.lines.append(
                f"{', '.join(names)}, = g.load_matrix({self.address(s.args[1])}, {len(regs)}, {trans}, {at})"
            )
            for name, reg in zip(names, regs, strict=True):
                self.write(reg, "u32", name)
        else:
            data = ", ".join(self.array(reg, "u32") for reg in inner(s.args[1]))
            self.lines.append(f"g.store_matrix({self.address(s.args[0])}, ({data},), {trans}, {at})")

    # ------------------------------------------------------------------ products

    def _product(self, s: Statement) -> None:
        kind = s.op.split(".")[-2]
        shape = next(part for part in s.op.split(".") if re.fullmatch(r"m\d+n\d+k\d+", part))
        d, a, b, c = (inner(operand) for operand in s.args)
        names = [f"t{i}" for i in range(len(d))]
        text = ", ".join(f"({', '.join(self.array(reg, 'u32') for reg in group)},)" for group in (a, b))
        added = ", ".join(self.array(reg, "f32") for reg in c)
        self.lines.append(f"{', '.join(names)}, = g.product('{shape}', '{kind}', {text}, ({added},))")
        for name, reg in zip(names, d, strict=True):
            self.write(reg, "f32", name)

    def _warpgroup(self, s: Statement, at: int) -> None:
        part = s.op.split(".")[1]
        if part == "fence":
            self.end = "return g.group_fence(NEXT)"
        elif part == "commit_group":
            self.lines.append("g.commit_products()")
        elif part == "wait_group":
            self.lines.append(f"g.wait_products({int(s.args[0], 0)})")
        elif part == "mma_async":
            mods = s.op.split(".")
            shape, kind = next(m for m in mods if re.fullmatch(r"m64n\d+k\d+", m)), mods[-1]
            d, plain = inner(s.args[0]), s.args[1].startswith("%")
            a = (
                f"({self.array(s.args[1], 'u64')},)"
                if plain
                else f"({', '.join(self.array(reg, 'u32') for reg in inner(s.args[1]))},)"
            )
            add = "True" if s.args[3] == "1" else "False" if s.args[3] == "0" else self.read(s.args[3], "pred")
            flips = [int(x, 0) for x in s.args[6:]]
            flip_a, flip_b = (flips + [0, 0])[:2] if plain else (0, (flips + [0])[0])
            numbers = [self.register_number(reg) for reg in d]
            prefix = re.fullmatch(r"%([a-z]+)\d+", d[0])[1]  # type: ignore[index]
            self.kept |= set(d)
            self.end = (
                f"return g.group_product("
                f"'{shape}', '{kind}', '{prefix}', {numbers}, {a}, {self.array(s.args[2], 'u64')}, "
                f"{add}, {flip_a}, {flip_b}, {at}, NEXT)"
            )
        else:
            raise PtxError(f"the machine does not know {s}")


def _width(op: str) -> int:
    return int(re.findall(r"\.[subf](8|16|32|64)\b", op)[-1]) // 8
