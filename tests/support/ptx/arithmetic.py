"""PTX's arithmetic as text of numpy expressions."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from ptx.text import Statement, inner

_TYPES = {"s": "I", "u": "U", "b": "U", "f": "F"}
_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_PLAIN = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
_FUNCTIONS = {
    "ex2": "np.exp2({})", "lg2": "np.log2({})", "rcp": "(F4(1) / {})", "rsqrt": "(F4(1) / np.sqrt({}))",
    "sqrt": "np.sqrt({})",
    "sin": "np.sin({})", "cos": "np.cos({})", "tanh": "np.tanh({})",
}  # fmt: skip
_SPECIAL = {
    "%tid.x": "g.tid", "%ctaid.x": "g.cta", "%laneid": "g.lane_numbers", "%warpid": "g.warp_in_cta",
}  # fmt: skip
_UNIFORM = {"%ntid.x": "g.threads", "%nctaid.x": "g.programs", "%tid.y": "0", "%tid.z": "0", "%ctaid.y": "0",
            "%ctaid.z": "0",
            "%nctaid.y": "1", "%nctaid.z": "1", "%ntid.y": "1", "%ntid.z": "1", "%globaltimer": "g.time_ns()",
            "%clock64": "g.time_ns()", "%clock": "g.time_ns()", "%smid": "0", "%cluster_ctarank": "0"}  # fmt: skip
PACKED = ("f16", "bf16", "f16x2", "bf16x2", "f32x2")


class Operands:
    """Reads and writes of registers in the text of a stretch.

    Attributes:
        needed: registers read before they are written.
        written: registers written.
        constants: names in the text that are numbers.
    """

    def __init__(self, registers: dict[str, int], params: tuple[tuple[str, int], ...]) -> None:
        self.registers, self.params = registers, params
        self.needed: set[str] = set()
        self.written: set[str] = set()
        self.constants: dict[str, Any] = {}
        self.lines: list[str] = []
        self.guard = ""
        self.mask = "None"

    def bits_of(self, register: str) -> int:
        """Bits of a register, by its name; of a special one 32 or 64."""
        found = re.fullmatch(r"%([a-z]+)\d+", register)
        if found and found[1] in self.registers:
            return self.registers[found[1]]
        return 64 if register in ("%globaltimer", "%clock64") else 32

    def register_number(self, register: str) -> int:
        """Its index in its bank."""
        return int(re.findall(r"\d+$", register)[0])

    def local(self, register: str) -> str:
        """Its variable."""
        return register[1:]

    def value_of(self, operand: str) -> str:
        """An operand that is the same for all threads, as an int."""
        return operand if not operand.startswith("%") else f"int({self.read(operand, 'u32')}[0])"

    def constant(self, value: Any) -> str:
        """A name for a number."""
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    def read(self, operand: str, kind: str) -> str:
        """An operand as an expression of numpy's type for ``kind``: an array, or a scalar for a number."""
        if operand in _SPECIAL:
            return f"{_SPECIAL[operand]}.astype({self.type_of(kind)})"
        if operand in _UNIFORM:
            return f"g.full({self.type_of(kind)}, {_UNIFORM[operand]})"
        if operand.startswith("%"):
            if operand not in self.written:
                self.needed.add(operand)
            bits, name = self.bits_of(operand), self.local(operand)
            if bits == 1:
                return name
            wanted = (
                16
                if kind in ("f16", "bf16")
                else 32
                if kind in ("f16x2", "bf16x2")
                else 64
                if kind == "f32x2"
                else int(kind[1:])
            )
            if wanted != bits:
                name = f"{name}.astype(U{wanted // 8})"
            letter = "U" if kind in PACKED else _TYPES[kind[0]]
            return name if letter == "U" else f"{name}.view({letter}{wanted // 8})"
        if operand == "global_smem":
            return self.constant(self.number_type(kind)(0))
        return self.constant(self.number(operand, kind))

    def array(self, operand: str, kind: str) -> str:
        """The same, always an array."""
        text = self.read(operand, kind)
        return text if operand.startswith("%") else f"g.full({self.type_of(kind)}, {text})"

    def type_of(self, kind: str) -> str:
        """The name of numpy's type in the text."""
        if kind == "pred":
            return "B"
        if kind in PACKED:
            return {"f16": "U2", "bf16": "U2", "f16x2": "U4", "bf16x2": "U4", "f32x2": "U8"}[kind]
        return f"{_TYPES[kind[0]]}{int(kind[1:]) // 8}"

    def number_type(self, kind: str) -> Any:
        """Numpy's type."""
        if kind == "pred":
            return np.bool_
        name = self.type_of(kind)
        return getattr(np, {"U": "uint", "I": "int", "F": "float"}[name[0]] + str(8 * int(name[1:])))

    def number(self, text: str, kind: str) -> Any:
        """A number of a type from its text."""
        scalar = self.number_type(kind)
        if kind == "pred":
            return scalar(int(text, 0) != 0)
        if text.startswith(("0f", "0F")):
            bits = int(text[2:], 16)
            return np.uint32(bits).view(np.float32) if kind == "f32" else scalar(bits)
        if text.startswith(("0d", "0D")):
            return scalar(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
        if kind[0] == "f" and kind not in PACKED:
            return scalar(float(text))
        width = np.dtype(scalar).itemsize
        raw = int(text.rstrip("U"), 0) % (1 << (8 * width))
        return np.array([raw], f"u{width}").view(scalar)[0]

    def write(self, register: str, kind: str, text: str) -> None:
        """Set a register, where the statement's guard holds, to an expression of the type of ``kind``."""
        if register == "_":
            self.lines.append(text)
            return
        bits = self.bits_of(register)
        if bits > 1:
            size = np.dtype(self.number_type(kind)).itemsize
            if bits // 8 != size:
                text = f"({text}).astype({'I' if kind[0] == 's' else 'U'}{bits // 8})"
            if kind not in PACKED and kind[0] in "sf":
                text = f"({text}).view(U{bits // 8})"
        name = self.local(register)
        if self.guard:
            if register not in self.written:
                self.needed.add(register)
            text = f"np.where({self.mask}, {text}, {name})"
        self.lines.append(f"{name} = {text}")
        self.written.add(register)

    # ------------------------------------------------------------------ instructions

    def calculate(self, s: Statement) -> bool:
        """Add an arithmetic statement's lines; False: it is none that is known."""
        base, *mods = s.op.split(".")
        kind = mods[-1] if mods else ""
        args = s.args
        method = getattr(self, f"_{base}", None)
        if method is not None:
            return bool(method(mods, kind, args))
        if kind in PACKED:
            if base not in ("add", "sub", "mul", "fma", "neg", "max", "min", "abs"):
                return False
            operands = ", ".join(self.array(arg, kind) for arg in args[1:])
            self.write(args[0], kind, f"V.packed('{base}', '{kind}', {operands})")
        elif base in _PLAIN:
            self.write(args[0], kind, f"{self.array(args[1], kind)} {_PLAIN[base]} {self.read(args[2], kind)}")
        elif base in _FUNCTIONS:
            self.write(args[0], kind, _FUNCTIONS[base].format(self.array(args[1], kind)))
        elif base in ("min", "max"):
            function = (
                {"min": "np.minimum", "max": "np.maximum"} if kind[0] != "f" else {"min": "np.fmin", "max": "np.fmax"}
            )
            self.write(args[0], kind, f"{function[base]}({self.array(args[1], kind)}, {self.read(args[2], kind)})")
        elif base in ("neg", "abs", "not"):
            sign = {"neg": "-{}", "abs": "np.abs({})", "not": "~{}"}[base]
            self.write(args[0], kind, sign.format(self.array(args[1], kind)))
        elif base == "fma":
            text = ", ".join(self.array(arg, kind) for arg in args[1:])
            self.write(args[0], kind, f"V.fma({text})")
        elif base in ("shl", "shr"):
            self._shift(base, kind, args)
        elif base in ("div", "rem"):
            if kind[0] == "f":
                self.write(args[0], kind, f"{self.array(args[1], kind)} / {self.read(args[2], kind)}")
            else:
                self.write(
                    args[0],
                    kind,
                    f"V.divide({self.array(args[1], kind)}, {self.array(args[2], kind)}, {base == 'rem'})",
                )
        else:
            return False
        return True

    def _mul(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        if kind in PACKED:
            self.write(
                args[0], kind, f"V.packed('mul', '{kind}', {self.array(args[1], kind)}, {self.array(args[2], kind)})"
            )
            return True
        text, kind = self._multiplied(mods, kind, args)
        self.write(args[0], kind, text)
        return True

    def _mad(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        text, kind = self._multiplied(mods, kind, args)
        self.write(args[0], kind, f"{text} + {self.read(args[3], kind)}")
        return True

    def _multiplied(self, mods: list[str], kind: str, args: tuple[str, ...]) -> tuple[str, str]:
        a, b = self.array(args[1], kind), self.read(args[2], kind)
        if "wide" in mods:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            return f"{a}.astype({self.type_of(wide)}) * {self.type_of(wide)}({b})" if not args[2].startswith("%") else (
                f"{a}.astype({self.type_of(wide)}) * {b}.astype({self.type_of(wide)})"
            ), wide
        if "hi" in mods:
            return f"V.high_product({a}, {self.array(args[2], kind)})", kind
        return f"{a} * {b}", kind

    def _shift(self, base: str, kind: str, args: tuple[str, ...]) -> None:
        x = self.array(args[1], kind)
        bits = int(kind[1:])
        if not args[2].startswith("%") and int(args[2], 0) < bits:
            by = self.constant(self.number_type(kind)(int(args[2], 0)))
            self.write(args[0], kind, f"{x} {'<<' if base == 'shl' else '>>'} {by}")
        else:
            self.write(
                args[0],
                kind,
                f"V.{'shift_left' if base == 'shl' else 'shift_right'}({x}, {self.array(args[2], 'u32')})",
            )

    def _bfe(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        at, count, bits = args[2], args[3], int(kind[1:])
        if not at.startswith("%") and not count.startswith("%") and 0 < int(count) <= bits - int(at):
            up, down = bits - int(at) - int(count), bits - int(count)
            scalar = self.number_type(kind)
            text = f"({self.array(args[1], kind)} << {self.constant(scalar(up))}) >> {self.constant(scalar(down))}"
            self.write(args[0], kind, text)
        else:
            self.write(
                args[0],
                kind,
                f"V.extract({self.array(args[1], kind)}, {self.array(at, 'u32')}, {self.array(count, 'u32')})",
            )
        return True

    def _prmt(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        self.write(args[0], "b32", f"V.permute_bytes({', '.join(self.array(arg, 'b32') for arg in args[1:])})")
        return kind == "b32"

    def _lop3(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        self.write(
            args[0], "b32", f"V.logic3({', '.join(self.array(arg, 'b32') for arg in args[1:4])}, {int(args[4], 0)})"
        )
        return True

    def _setp(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        compare = mods[0]
        if compare in ("num", "nan"):
            test = f"(np.isnan({self.array(args[1], kind)}) | np.isnan({self.array(args[2], kind)}))"
            text = f"~{test}" if compare == "num" else test
        else:
            loose = kind[0] == "f" and compare.endswith("u")
            sign = _COMPARE[compare[:-1] if loose else compare]
            a, b = self.array(args[1], kind), self.read(args[2], kind)
            text = f"({a} {sign} {b})"
            if kind[0] == "f" and compare == "ne":
                text = f"({text} & ~np.isnan({a}) & ~np.isnan({b}))"
            elif loose:
                text = f"({text} | np.isnan({a}) | np.isnan({b}))"
        if len(mods) > 2 and mods[1] in ("and", "or", "xor"):
            text = f"{text} {_PLAIN[mods[1]]} {self.read(args[3], 'pred')}"
        first, _, second = args[0].partition("|")
        self.write(first, "pred", text)
        if second:
            self.write(second, "pred", f"~{self.local(first)}")
        return True

    def _selp(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        self.write(
            args[0],
            kind,
            f"np.where({self.read(args[3], 'pred')}, {self.read(args[1], kind)}, {self.read(args[2], kind)})",
        )
        return True

    def _mov(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        target, source = args
        if target.startswith("{"):
            regs = inner(target)
            step = int(kind[1:]) // len(regs)
            self.lines.append(f"t0 = {self.array(source, kind)}.copy()")
            for i, reg in enumerate(regs):
                self.write(
                    reg, f"b{step}", f"(t0 >> {self.constant(self.number_type(kind)(step * i))}).astype(U{step // 8})"
                )
        elif source.startswith("{"):
            regs = inner(source)
            step = int(kind[1:]) // len(regs)
            to, scalar = self.type_of(kind), self.number_type(kind)
            parts = [
                f"({self.array(reg, f'b{step}')}.astype({to}) << {self.constant(scalar(step * i))})"
                for i, reg in enumerate(regs)
            ]
            self.write(target, kind, " | ".join(parts))
        else:
            self.write(target, kind, f"{self.array(source, kind)}.copy()")
        return True

    def _cvta(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        self.write(args[0], kind, f"{self.array(args[1], kind)}.copy()")
        return "shared" not in mods

    def _cvt(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        to, source = mods[-2], mods[-1]
        if to in ("f16x2", "bf16x2") and source == "f32":
            half = to.removesuffix("x2")
            high, low = (f"V.to_halves({self.array(arg, 'f32')}, '{half}').astype(U4)" for arg in args[1:3])
            self.write(args[0], "b32", f"{low} | {high} << U4(16)")
        elif to == "tf32":
            self.write(args[0], "b32", f"V.to_tf32({self.array(args[1], 'f32')})")
        elif to in ("f16", "bf16"):
            value = self.array(args[1], source)
            value = f"V.halves({value}, '{source}')" if source in ("f16", "bf16") else f"{value}.astype(F4)"
            self.write(args[0], to, f"V.to_halves({value}, '{to}')")
        elif source in ("f16", "bf16"):
            value = f"V.halves({self.array(args[1], source)}, '{source}')"
            self.write(args[0], to, value if to == "f32" else f"{value}.astype({self.type_of(to)})")
        elif to[0] in "su" and source[0] == "f":
            rounding = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
            mode = next((rounding[mod] for mod in mods if mod in rounding), "np.rint")
            self.write(args[0], to, f"{mode}({self.array(args[1], source)}).astype({self.type_of(to)})")
        elif "sat" in mods:
            return False
        else:
            self.write(args[0], to, f"{self.array(args[1], source)}.astype({self.type_of(to)})")
        return True

    def _shfl(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        target, _, predicate = args[0].partition("|")
        if predicate or mods[1] not in ("bfly", "idx", "up", "down"):
            return False
        self.write(target, "b32", f"g.shuffle('{mods[1]}', {self.array(args[1], 'b32')}, {self.array(args[2], 'b32')})")
        return int(args[3], 0) in (0, 31)

    def _vote(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        self.write(args[0], "pred" if kind == "pred" else "b32", f"g.vote('{mods[1]}', {self.read(args[1], 'pred')})")
        return mods[0] == "sync"

    def _redux(self, mods: list[str], kind: str, args: tuple[str, ...]) -> bool:
        self.write(args[0], kind, f"g.reduce('{mods[1]}', {self.array(args[1], kind)})")
        return mods[0] == "sync" and mods[1] in ("max", "min", "add", "or", "and")
