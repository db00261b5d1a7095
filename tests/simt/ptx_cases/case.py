"""What a case is, and how one is written down."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

LANES = range(32)


class Bits(NamedTuple):
    width: int
    value: int


def integer(width: int) -> Callable[[int], Bits]:
    return lambda x: Bits(width, x % (1 << width))


b16, b32, b64 = integer(16), integer(32), integer(64)
s16 = u16 = b16
s32 = u32 = b32
s64 = u64 = b64


def pred(x: bool) -> Bits:
    return Bits(1, int(x))


def f32(x: float) -> Bits:
    return Bits(32, struct.unpack("<I", struct.pack("<f", x))[0])


def f64(x: float) -> Bits:
    return Bits(64, struct.unpack("<Q", struct.pack("<d", x))[0])


def f16(x: float) -> Bits:
    return Bits(16, struct.unpack("<H", struct.pack("<e", x))[0])


def bf16(x: float) -> Bits:
    bits = f32(x).value
    assert bits & 0xFFFF == 0 or math.isnan(x), f"{x} is not a bfloat16"
    return Bits(16, bits >> 16)


def pair(low: Bits, high: Bits) -> Bits:
    return Bits(32, low.value | high.value << 16)


@dataclass(frozen=True)
class Format:
    """Of floating-point numbers."""

    digits: int
    min_exponent: int
    encode: Callable[[float], Bits]

    def rounded(self, x: Fraction, mode: str = "rn") -> float:
        """Exact, unlike anything that passes through a float on the way; overflow does not occur here."""
        if x == 0:
            return 0.0
        exponent = self.min_exponent
        while abs(x) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        unit = Fraction(2) ** (exponent - self.digits + 1)
        floor = math.floor(x / unit)
        rest = x / unit - floor
        up = {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1),
            "rna": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0),
            "rz": x < 0 and rest > 0,
            "rm": False,
            "rp": rest > 0,
        }[mode]
        return float((floor + up) * unit)


FORMATS = {
    "f16": Format(11, -14, f16),
    "bf16": Format(8, -126, bf16),
    "tf32": Format(11, -126, f32),
    "f32": Format(24, -126, f32),
}

Input = Bits | Sequence[Bits]  # the same for all lanes, or one each


@dataclass
class Case:
    name: str
    body: str
    expected: list[int] | str  # results, or part of the error
    tables: dict[str, Sequence[Bits]] = field(default_factory=dict)
    declarations: str = ""

    def ptx(self) -> str:
        tables = [
            f".const .align 8 .b{bits[0].width} {self.name}_{name}[{len(bits)}] = "
            f"{{{', '.join(str(b.value) for b in bits)}}};"
            for name, bits in self.tables.items()
        ]
        body = self.body.replace("@NAME@", self.name)
        return "\n".join(
            [
                *tables,
                f".visible .entry {self.name}(.param .u64 {self.name}_out, .param .u64 {self.name}_in)",
                "{",
                "  .reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %d<40>;",
                f"  {self.declarations}",
                f"  ld.param.u64 %d38, [{self.name}_out];",
                f"  ld.param.u64 %d39, [{self.name}_in];",
                "  mov.u32 %r39, %tid.x; mul.wide.u32 %d37, %r39, 8; add.s64 %d38, %d38, %d37;",
                *(f"  {line.strip()}" for line in body.strip().splitlines()),
                "  ret;",
                "}",
            ]
        )


CASES: list[Case] = []


def lanes(expected: Bits | Sequence[Bits]) -> list[int]:
    return [expected.value] * 32 if isinstance(expected, Bits) else [e.value for e in expected]


def kernel(
    name: str,
    body: str,
    expected: Bits | Sequence[Bits] | str,
    declarations: str = "",
    **tables: Sequence[Bits],
) -> None:
    """A whole body: it leaves its result in %d0."""
    wanted = expected if isinstance(expected, str) else lanes(expected)
    CASES.append(Case(name, f"{body}\n st.global.u64 [%d38], %d0;", wanted, tables, declarations))


_REGISTER = {1: "%p{}", 16: "%h{}", 32: "%r{}", 64: "%d{}"}


def instruction(text: str, expected: Bits | Sequence[Bits], *inputs: Input, name: str = "") -> None:
    """One instruction: $0 is its result, $1 and so on are its inputs."""
    lines, tables = [], {}
    for n, value in enumerate(inputs, 1):
        width = value.width if isinstance(value, Bits) else value[0].width
        register = _REGISTER[width].format(n)
        if isinstance(value, Bits):
            literal = f"setp.ne.u32 {register}, {value.value}, 0;" if width == 1 else ""
            lines.append(literal or f"mov.b{width} {register}, {value.value:#x};")
        else:
            tables[f"t{n}"] = value
            lines += [
                f"mov.u64 %d30, @NAME@_t{n};",
                f"mul.wide.u32 %d31, %r39, {width // 8};",
                "add.s64 %d30, %d30, %d31;",
                f"ld.const.b{width} {register}, [%d30];",
            ]
        text = text.replace(f"${n}", register)
    width = (expected if isinstance(expected, Bits) else expected[0]).width
    lines.append(text.replace("$0", _REGISTER[width].format(0)))
    lines.append(
        {
            1: "selp.u64 %d0, 1, 0, %p0;",
            16: "cvt.u64.u16 %d0, %h0;",
            32: "cvt.u64.u32 %d0, %r0;",
            64: "",
        }[width]
    )
    if not name:
        name = text.split()[0].rstrip(";").replace(".", "_").replace("::", "_")
    taken = sum(case.name == name or case.name.startswith(f"{name}__") for case in CASES)
    kernel(f"{name}__{taken}" if taken else name, "\n".join(lines), expected, **tables)


def fails(name: str, body: str, message: str, declarations: str = "") -> None:
    kernel(name, body, message, declarations)


def module(cases: Sequence[Case]) -> str:
    head = ".version 8.6\n.target sm_90\n.address_size 64\n.extern .shared .align 128 .b8 dynamic_bytes[];\n"
    return head + "\n".join(case.ptx() for case in cases) + "\n"
