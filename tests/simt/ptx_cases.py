"""Kernels of one instruction each, in PTX by hand, with results that do not come from the emulator.

The kernel of a case puts one 64-bit number a thread into `out`. Expected numbers are written down, or follow in exact
arithmetic from what the PTX manual says.
"""

from __future__ import annotations

import math
import random
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
                "  mov.u32 %r39, %tid.x; mov.u32 %r38, %ctaid.x; mad.lo.u32 %r38, %r38, 32, %r39;",
                "  mul.wide.u32 %d37, %r38, 8; add.s64 %d38, %d38, %d37;",
                *(f"  {line.strip()}" for line in body.strip().splitlines()),
                "  ret;",
                "}",
            ]
        )


CASES: list[Case] = []


def lanes(expected: Bits | Sequence[Bits]) -> list[int]:
    return [expected.value] * 32 if isinstance(expected, Bits) else [e.value for e in expected]


def kernel(
    name: str, body: str, expected: Bits | Sequence[Bits] | str, declarations: str = "", **tables: Sequence[Bits]
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


# ---- integers -----------------------------------------------------------------------------------

instruction("add.s32 $0, $1, $2;", s32(-2147483648), s32(2147483647), s32(1))
instruction("add.u64 $0, $1, $2;", u64(1 << 32), u64(0xFFFFFFFF), u64(1))
instruction("add.s16 $0, $1, $2;", s16(-2), s16(5), s16(-7))
instruction("sub.s32 $0, $1, $2;", s32(-3), s32(7), s32(10))
instruction("sub.s64 $0, $1, $2;", s64(-3), s64(7), s64(10))
instruction("mul.lo.s32 $0, $1, $2;", s32(-21), s32(-3), s32(7))
instruction("mul.lo.u16 $0, $1, $2;", u16(0xFFFF * 0xFFFF), u16(0xFFFF), u16(0xFFFF))
instruction("mul.hi.s32 $0, $1, $2;", s32(-1), s32(-3), s32(7))
instruction("mul.hi.u32 $0, $1, $2;", u32(6), u32(-3), u32(7))
instruction("mul.hi.u64 $0, $1, $2;", u64(6), u64(-3), u64(7))
instruction("mul.wide.s32 $0, $1, $2;", s64(-(1 << 33)), s32(-(1 << 31)), s32(4))
instruction("mul.wide.u32 $0, $1, $2;", u64(1 << 33), u32(1 << 31), u32(4))
instruction("mul.wide.s16 $0, $1, $2;", s32(-131072), s16(-32768), s16(4))
instruction("mul.wide.u16 $0, $1, $2;", u32(131072), u16(32768), u16(4))
instruction("mad.lo.s32 $0, $1, $2, $3;", s32(22), s32(3), s32(5), s32(7))
instruction("mad.hi.u32 $0, $1, $2, $3;", u32(13), u32(-3), u32(7), u32(7))
instruction("mad.wide.u32 $0, $1, $2, $3;", u64((1 << 33) + 5), u32(1 << 31), u32(4), u64(5))
instruction("div.s32 $0, $1, $2;", s32(-3), s32(-7), s32(2))
instruction("div.u32 $0, $1, $2;", u32((2**32 - 7) // 2), u32(-7), u32(2))
instruction("rem.s32 $0, $1, $2;", s32(-1), s32(-7), s32(2))
instruction("rem.u64 $0, $1, $2;", u64(3), u64(17), u64(7))
instruction("min.s32 $0, $1, $2;", s32(-1), s32(-1), s32(1))
instruction("min.u32 $0, $1, $2;", u32(1), u32(-1), u32(1))
instruction("max.s64 $0, $1, $2;", s64(1), s64(-1), s64(1))
instruction("max.u16 $0, $1, $2;", u16(-1), u16(-1), u16(1))
instruction("neg.s32 $0, $1;", s32(-5), s32(5))
instruction("abs.s64 $0, $1;", s64(5), s64(-5))
instruction("and.b32 $0, $1, $2;", b32(0b1000), b32(0b1100), b32(0b1010))
instruction("or.b64 $0, $1, $2;", b64(0b1110), b64(0b1100), b64(0b1010))
instruction("xor.b16 $0, $1, $2;", b16(0b0110), b16(0b1100), b16(0b1010))
instruction("not.b32 $0, $1;", b32(0xFFFF00FF), b32(0x0000FF00))
instruction("and.pred $0, $1, $2;", pred(False), pred(True), pred(False))
instruction("xor.pred $0, $1, $2;", pred(True), pred(True), pred(False))
instruction("not.pred $0, $1;", pred(False), pred(True))
instruction("shl.b32 $0, $1, $2;", b32(0x50), b32(5), u32(4))
instruction("shl.b32 $0, $1, $2;", b32(0), b32(5), u32(32))
instruction("shl.b16 $0, $1, $2;", b16(0x8000), b16(3), u32(15))
instruction("shr.u32 $0, $1, $2;", u32(0x0FFFFFFF), u32(-1), u32(4))
instruction("shr.s32 $0, $1, $2;", s32(-2), s32(-8), u32(2))
instruction("shr.s32 $0, $1, $2;", s32(-1), s32(-8), u32(77))
instruction("shr.u64 $0, $1, $2;", u64(0), u64(-8), u32(64))
instruction("shf.l.wrap.b32 $0, $1, $2, $3;", b32(0x34567812), b32(0x12ABCDEF), b32(0x12345678), u32(8))
instruction("shf.l.wrap.b32 $0, $1, $2, $3;", b32(0x34567812), b32(0x12ABCDEF), b32(0x12345678), u32(40))
instruction("shf.r.wrap.b32 $0, $1, $2, $3;", b32(0x7812ABCD), b32(0x12ABCDEF), b32(0x12345678), u32(8))
instruction("shf.l.clamp.b32 $0, $1, $2, $3;", b32(0x12ABCDEF), b32(0x12ABCDEF), b32(0x12345678), u32(40))
instruction("shf.r.clamp.b32 $0, $1, $2, $3;", b32(0x12345678), b32(0x12ABCDEF), b32(0x12345678), u32(40))
instruction("prmt.b32 $0, $1, $2, $3;", b32(0x77553311), b32(0x33221100), b32(0x77665544), b32(0x7531))
instruction("prmt.b32 $0, $1, $2, $3;", b32(0x00FF2200), b32(0x33221100), b32(0x776655C4), b32(0x8C20))
instruction("bfe.u32 $0, $1, $2, $3;", u32(0xBC), u32(0x12ABCDEF), u32(12), u32(8))
instruction("bfe.s32 $0, $1, $2, $3;", s32(-68), s32(0x12ABCDEF), u32(12), u32(8))
instruction("bfe.s32 $0, $1, $2, $3;", s32(-1), s32(-(1 << 31)), u32(31), u32(8))
instruction("bfe.u64 $0, $1, $2, $3;", u64(0x1), u64(1 << 40), u32(40), u32(8))
instruction("bfi.b32 $0, $1, $2, $3, $4;", b32(0x12ABC5EF), b32(0x345), b32(0x12ABCDEF), u32(8), u32(4))
instruction("bfi.b64 $0, $1, $2, $3, $4;", b64(0x0F00000000), b64(0xFFF), b64(0), u32(32), u32(4))
instruction("bmsk.clamp.b32 $0, $1, $2;", b32(0x1F0), b32(4), b32(5))
instruction("lop3.b32 $0, $1, $2, $3, 0x2A;", b32((~0xF0 | ~0xCC) & 0xAA), b32(0xF0), b32(0xCC), b32(0xAA))
instruction("brev.b32 $0, $1;", b32(0x80000001 | 1 << 30), b32(0x80000001 | 1 << 1))
instruction("popc.b32 $0, $1;", u32(5), b32(0x10F))
instruction("popc.b64 $0, $1;", u32(5), b64(0x10F << 30))
instruction("clz.b32 $0, $1;", u32(23), b32(0x10F))
instruction("clz.b64 $0, $1;", u32(64), b64(0))
instruction("bfind.u32 $0, $1;", u32(8), u32(0x10F))
instruction("bfind.s32 $0, $1;", u32(7), s32(-256))
instruction("bfind.u64 $0, $1;", u32(-1), u64(0))

# ---- predicates and choices ---------------------------------------------------------------------

instruction("setp.lt.s32 $0, $1, $2;", pred(True), s32(-1), s32(1))
instruction("setp.lt.u32 $0, $1, $2;", pred(False), u32(-1), u32(1))
instruction("setp.hi.u32 $0, $1, $2;", pred(True), u32(-1), u32(1))
instruction("setp.ls.u32 $0, $1, $2;", pred(True), u32(1), u32(1))
instruction("setp.gt.s64 $0, $1, $2;", pred(True), s64(1 << 40), s64(1))
instruction("setp.le.s16 $0, $1, $2;", pred(True), s16(-1), s16(1))
instruction("setp.ge.and.s32 $0, $1, $2, $3;", pred(False), s32(2), s32(1), pred(False))
instruction("setp.ge.or.s32 $0, $1, $2, $3;", pred(True), s32(0), s32(1), pred(True))
instruction("setp.eq.xor.s32 $0, $1, $2, !$3;", pred(True), s32(1), s32(1), pred(True))
instruction("setp.ne.s32 %p8|$0, $1, $2;", pred(True), s32(1), s32(1), name="setp_second")
instruction("setp.ne.and.s32 %p8|$0, $1, $2, $3;", pred(False), s32(1), s32(1), pred(False), name="setp_second_and")
NAN = math.nan
for relation, ordered, unordered in (
    ("lt", (True, False), True),
    ("ge", (False, True), True),
    ("ne", (True, True), True),
    ("eq", (False, False), True),
):
    instruction(f"setp.{relation}.f32 $0, $1, $2;", pred(ordered[0]), f32(1), f32(2))
    instruction(f"setp.{relation}.f32 $0, $1, $2;", pred(ordered[1]), f32(2), f32(1))
    instruction(f"setp.{relation}.f32 $0, $1, $2;", pred(False), f32(NAN), f32(1))
    instruction(f"setp.{relation}u.f32 $0, $1, $2;", pred(unordered), f32(NAN), f32(1))
    instruction(f"setp.{relation}u.f64 $0, $1, $2;", pred(ordered[0]), f64(1), f64(2))
instruction("setp.num.f32 $0, $1, $2;", pred(False), f32(1), f32(NAN))
instruction("setp.nan.f64 $0, $1, $2;", pred(True), f64(1), f64(NAN))
instruction("setp.lt.f16 $0, $1, $2;", pred(True), f16(-1), f16(0.5))
instruction("setp.gt.bf16 $0, $1, $2;", pred(False), bf16(-1), bf16(0.5))
instruction("setp.eq.ftz.f32 $0, $1, $2;", pred(True), f32(1e-40), f32(0))
instruction("selp.b32 $0, $1, $2, $3;", b32(1), b32(1), b32(2), pred(True))
instruction("selp.f64 $0, $1, $2, $3;", f64(2), f64(1), f64(2), pred(False))
instruction("slct.s32.s32 $0, $1, $2, $3;", s32(1), s32(1), s32(2), s32(0))
instruction("slct.u64.f32 $0, $1, $2, $3;", u64(2), u64(1), u64(2), f32(-1))

# ---- moves --------------------------------------------------------------------------------------

instruction("mov.b64 $0, {$1, $2};", b64(0x2222222211111111), b32(0x11111111), b32(0x22222222), name="mov_pack_64")
instruction("mov.b32 $0, {$1, $2};", b32(0x22221111), b16(0x1111), b16(0x2222), name="mov_pack_32")
instruction("mov.b64 {%r8, $0}, $1;", b32(0x22222222), b64(0x2222222211111111), name="mov_unpack_high")
instruction("mov.b64 {$0, _}, $1;", b32(0x11111111), b64(0x2222222211111111), name="mov_unpack_low")
instruction("mov.b32 {%h8, $0}, $1;", b16(0x2222), b32(0x22221111), name="mov_unpack_32")
instruction("mov.f32 $0, 0f40490FDB;", f32(math.pi), name="mov_literal_f32")
instruction("mov.f64 $0, 0d400921FB54442D18;", f64(math.pi), name="mov_literal_f64")
instruction("mov.u32 $0, %laneid;", [u32(lane) for lane in LANES], name="mov_laneid")
instruction("mov.u32 $0, %ntid.x;", u32(32), name="mov_ntid")
instruction("mov.u32 $0, %lanemask_lt;", [u32((1 << lane) - 1) for lane in LANES], name="mov_lanemask_lt")
instruction("mov.u32 $0, %lanemask_ge;", [u32(-(1 << lane)) for lane in LANES], name="mov_lanemask_ge")

# ---- floating point -----------------------------------------------------------------------------

instruction("add.f32 $0, $1, $2;", f32(3.5), f32(1.25), f32(2.25))
instruction("sub.f32 $0, $1, $2;", f32(-1), f32(1.25), f32(2.25))
instruction("sub.f64 $0, $1, $2;", f64(-1), f64(1.25), f64(2.25))
instruction("mul.f32 $0, $1, $2;", f32(-3), f32(1.5), f32(-2))
instruction("mul.sat.f32 $0, $1, $2;", f32(1), f32(1.5), f32(2))
instruction("mul.sat.f32 $0, $1, $2;", f32(0), f32(NAN), f32(2))
instruction("add.ftz.f32 $0, $1, $2;", f32(0), f32(2e-38), f32(-1.5e-38))
instruction("fma.rn.f32 $0, $1, $2, $3;", f32(13), f32(2), f32(3), f32(7))
instruction("fma.rn.f64 $0, $1, $2, $3;", f64(13), f64(2), f64(3), f64(7))
instruction("fma.rn.f32 $0, $1, $2, $3;", f32(2**-24), f32(1 + 2**-12), f32(1 - 2**-12), f32(-1 + 2**-23))
instruction("div.rn.f32 $0, $1, $2;", f32(0.25), f32(1), f32(4))
instruction("div.rn.f64 $0, $1, $2;", f64(0.25), f64(1), f64(4))
instruction("div.full.f32 $0, $1, $2;", f32(0.25), f32(1), f32(4))
instruction("min.f32 $0, $1, $2;", f32(-1), f32(NAN), f32(-1))
instruction("max.f32 $0, $1, $2;", f32(2), f32(2), f32(-1))
instruction("min.f64 $0, $1, $2;", f64(-0.0), f64(0.0), f64(-0.0))
instruction("neg.f32 $0, $1;", f32(-2), f32(2))
instruction("neg.f16 $0, $1;", f16(-2), f16(2))
instruction("abs.f64 $0, $1;", f64(2), f64(-2))
instruction("abs.bf16 $0, $1;", bf16(2), bf16(-2))
instruction("copysign.f32 $0, $1, $2;", f32(-3), f32(-1), f32(3))
instruction("copysign.f64 $0, $1, $2;", f64(3), f64(1), f64(-3))
instruction("ex2.approx.ftz.f32 $0, $1;", f32(0.125), f32(-3))
instruction("ex2.approx.f32 $0, $1;", f32(2**-130), f32(-130))
instruction("ex2.approx.ftz.f32 $0, $1;", f32(0), f32(-130))
instruction("lg2.approx.f32 $0, $1;", f32(-3), f32(0.125))
instruction("rcp.rn.f32 $0, $1;", f32(0.25), f32(4))
instruction("rcp.approx.ftz.f32 $0, $1;", f32(0.25), f32(4))
instruction("rcp.rn.f64 $0, $1;", f64(0.25), f64(4))
instruction("rcp.approx.ftz.f64 $0, $1;", f64(0.25), f64(4))
instruction("sqrt.rn.f32 $0, $1;", f32(3), f32(9))
instruction("rsqrt.approx.f32 $0, $1;", f32(0.25), f32(16))
instruction("tanh.approx.f32 $0, $1;", f32(struct.unpack("<f", struct.pack("<f", math.tanh(0.5)))[0]), f32(0.5))
instruction("tanh.approx.bf16 $0, $1;", bf16(FORMATS["bf16"].rounded(Fraction(math.tanh(0.5)))), bf16(0.5))
instruction("sin.approx.f32 $0, $1;", f32(0), f32(0))
instruction("cos.approx.f32 $0, $1;", f32(1), f32(0))
instruction("testp.notanumber.f32 $0, $1;", pred(True), f32(NAN))
instruction("testp.finite.f64 $0, $1;", pred(False), f64(math.inf))
instruction("testp.subnormal.f32 $0, $1;", pred(True), f32(1e-40))
instruction("fma.rn.f16 $0, $1, $2, $3;", f16(13), f16(2), f16(3), f16(7))
instruction("sub.f16 $0, $1, $2;", f16(-1), f16(1.25), f16(2.25))
instruction("sub.bf16 $0, $1, $2;", bf16(-1), bf16(1.25), bf16(2.25))
ONES, TWOS = pair(f16(1), f16(4)), pair(f16(2), f16(8))
instruction("sub.f16x2 $0, $1, $2;", pair(f16(-1), f16(-4)), ONES, TWOS)
instruction("fma.rn.f16x2 $0, $1, $2, $3;", pair(f16(3), f16(36)), ONES, TWOS, ONES)
instruction(
    "fma.rn.bf16x2 $0, $1, $2, $3;",
    *(pair(bf16(a), bf16(b)) for a, b in ((3, 36), (1, 4), (2, 8), (1, 4))),
)
instruction("max.bf16x2 $0, $1, $2;", *(pair(bf16(a), bf16(b)) for a, b in ((3, 8), (1, 8), (3, -8))))
instruction("neg.f16x2 $0, $1;", pair(f16(-1), f16(2)), pair(f16(1), f16(-2)))

RANDOM = random.Random(5)


def numbers(kind: str, count: int = 32, low: int = -20, high: int = 14) -> list[Fraction]:
    """Of the format, some of them subnormal in f16."""
    form = FORMATS[kind]
    return [
        Fraction(form.rounded(Fraction(RANDOM.uniform(-1, 1)) * Fraction(2) ** RANDOM.randint(low, high)))
        for _ in range(count)
    ]


def encoded(kind: str, values: Sequence[Fraction], mode: str = "rn") -> list[Bits]:
    form = FORMATS[kind]
    return [form.encode(form.rounded(x, mode)) for x in values]


# Directed rounding and single rounding, against exact arithmetic.
for kind, modes in (("f32", ("rn", "rz", "rm", "rp")), ("f16", ("rn",)), ("bf16", ("rn",))):
    for mode in modes:
        a, b, c = (numbers(kind, low=-6, high=3) for _ in range(3))
        # A difference of many magnitudes, which rounding twice gets wrong.
        c = [x * Fraction(2) ** RANDOM.choice((0, -9, -12) if kind == "f16" else (0, -12, -24)) for x in c]
        c = [Fraction(FORMATS[kind].rounded(x)) for x in c]
        operands = [encoded(kind, x) for x in (a, b, c)]
        sums = encoded(kind, [x + y for x, y in zip(a, c, strict=True)], mode)
        products = encoded(kind, [x * y for x, y in zip(a, b, strict=True)], mode)
        both = encoded(kind, [x * y + z for x, y, z in zip(a, b, c, strict=True)], mode)
        instruction(f"add.{mode}.{kind} $0, $1, $2;", sums, operands[0], operands[2])
        instruction(f"mul.{mode}.{kind} $0, $1, $2;", products, operands[0], operands[1])
        instruction(f"fma.{mode}.{kind} $0, $1, $2, $3;", both, *operands)

# ---- conversions --------------------------------------------------------------------------------

for kind, mode in (("f16", "rn"), ("bf16", "rn"), ("f16", "rz"), ("bf16", "rz"), ("tf32", "rna")):
    values = numbers("f32")
    # Halfway between neighbours.
    values[:4] = [Fraction(1) + Fraction(n, 2 ** FORMATS[kind].digits) for n in (1, 3, -1, 5)]
    sources = [f32(float(x)) for x in values]
    instruction(f"cvt.{mode}.{kind}.f32 $0, $1;", encoded(kind, values, mode), sources)
doubles = [Fraction(RANDOM.uniform(-1, 1)) * Fraction(2) ** RANDOM.randint(-140, 10) for _ in LANES]
for mode in ("rn", "rz", "rm", "rp"):
    instruction(f"cvt.{mode}.f32.f64 $0, $1;", encoded("f32", doubles, mode), [f64(float(x)) for x in doubles])
halves = [Bits(16, RANDOM.randrange(0x7C00) | RANDOM.choice((0, 0x8000))) for _ in LANES]
half_values = [struct.unpack("<e", struct.pack("<H", h.value))[0] for h in halves]
instruction("cvt.f32.f16 $0, $1;", [f32(x) for x in half_values], halves)
instruction("cvt.f64.f16 $0, $1;", [f64(x) for x in half_values], halves)
instruction("cvt.f32.bf16 $0, $1;", f32(-1.5), bf16(-1.5))
instruction("cvt.f64.f32 $0, $1;", f64(-1.5), f32(-1.5))
instruction("cvt.rn.f16.f32 $0, $1;", f16(math.inf), f32(65520))
instruction("cvt.rz.f16.f32 $0, $1;", f16(65504), f32(65535))
instruction("cvt.rn.bf16.f32 $0, $1;", bf16(-math.inf), f32(-3.4e38))
instruction("cvt.rn.f16x2.f32 $0, $1, $2;", pair(f16(2), f16(1)), f32(1), f32(2))
instruction("cvt.rn.bf16x2.f32 $0, $1, $2;", pair(bf16(2), bf16(1)), f32(1), f32(2))
instruction("cvt.rn.relu.bf16x2.f32 $0, $1, $2;", pair(bf16(2), bf16(0)), f32(-1), f32(2))
instruction("cvt.sat.f32.f32 $0, $1;", f32(1), f32(3))
instruction("cvt.ftz.f64.f32 $0, $1;", f64(0), f32(1e-40))
for mode, results in (
    ("rni", (2, 2, -2, -2)),
    ("rzi", (1, 2, -1, -2)),
    ("rmi", (1, 2, -2, -3)),
    ("rpi", (2, 3, -1, -2)),
):
    sources = (1.5, 2.5, -1.5, -2.5)
    instruction(f"cvt.{mode}.s32.f32 $0, $1;", [s32(r) for r in results * 8], [f32(x) for x in sources * 8])
    instruction(f"cvt.{mode}.f32.f32 $0, $1;", [f32(r) for r in results * 8], [f32(x) for x in sources * 8])
    instruction(f"cvt.{mode}.s64.f64 $0, $1;", [s64(r) for r in results * 8], [f64(x) for x in sources * 8])
instruction("cvt.rzi.u32.f32 $0, $1;", u32(0), f32(-3))
instruction("cvt.rzi.s32.f32 $0, $1;", s32(2**31 - 1), f32(1e20))
instruction("cvt.rzi.s32.f32 $0, $1;", s32(0), f32(NAN))
instruction("cvt.rzi.s64.f64 $0, $1;", s64(-(2**63)), f64(NAN))
instruction("cvt.rn.f32.s32 $0, $1;", f32(-16777216), s32(-16777217))
instruction("cvt.rz.f32.u32 $0, $1;", f32(4294967040), u32(-1))
instruction("cvt.rn.f64.s64 $0, $1;", f64(-(2**60)), s64(-(2**60) - 1))
instruction("cvt.rn.f16.s32 $0, $1;", f16(-2048), s32(-2049))
instruction("cvt.s64.s32 $0, $1;", s64(-5), s32(-5))
instruction("cvt.u64.u32 $0, $1;", u64(2**32 - 5), u32(-5))
instruction("cvt.u32.u64 $0, $1;", u32(7), u64((9 << 32) + 7))
instruction("cvt.s32.s8 $0, $1;", s32(-128), b32(0x1280))
instruction("cvt.u32.u8 $0, $1;", u32(0x80), b32(0x1280))
instruction("cvt.sat.s8.s32 $0, $1;", s32(-128), s32(-1000))
instruction("cvt.sat.u16.s32 $0, $1;", u16(0), s32(-1000))
instruction("cvt.u16.u32 $0, $1;", u16(0x5678), u32(0x12345678))

# ---- memory -------------------------------------------------------------------------------------


def little(start: int, count: int = 4) -> int:
    """What `in`, whose bytes are 0, 1, 2 and so on, holds at `start`."""
    return int.from_bytes(bytes(range(start, start + count)), "little")


kernel("ld_v4", "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%d39+16]; cvt.u64.u32 %d0, %r3;", u64(little(24)))
kernel("ld_v2_u64", "ld.global.v2.u64 {%d1, %d0}, [%d39+32];", u64(little(40, 8)))
kernel("ld_v4_u8", "ld.global.v4.u8 {%h1, %h2, %h3, %h4}, [%d39+8]; cvt.u64.u16 %d0, %h2;", u64(9))
kernel("ld_negative_offset", "add.s64 %d1, %d39, 8; ld.global.u32 %r1, [%d1+-4]; cvt.u64.u32 %d0, %r1;", u64(little(4)))
kernel("ld_s8", "ld.global.s8 %r1, [%d39+200]; cvt.s64.s32 %d0, %r1;", s64(200 - 256))
kernel("ld_u8", "ld.global.u8 %r1, [%d39+200]; cvt.s64.s32 %d0, %r1;", s64(200))
kernel("ld_s16", "ld.global.s16 %r1, [%d39+200]; cvt.s64.s32 %d0, %r1;", s64(little(200, 2) - 65536))
kernel("ld_acquire", "ld.acquire.gpu.global.u32 %r1, [%d39+4]; cvt.u64.u32 %d0, %r1;", u64(little(4)))
kernel("ld_relaxed", "ld.relaxed.sys.u64 %d0, [%d39+8];", u64(little(8, 8)))
kernel("ld_volatile", "ld.volatile.global.u32 %r1, [%d39+4]; cvt.u64.u32 %d0, %r1;", u64(little(4)))
kernel("ld_cache", "ld.global.L1::no_allocate.L2::128B.u32 %r1, [%d39+4]; cvt.u64.u32 %d0, %r1;", u64(little(4)))
kernel("st_release", "mov.b64 %d1, 77; st.release.gpu.global.u64 [%d38], %d1; ld.global.u64 %d0, [%d38];", u64(77))
kernel(
    "st_v2",
    "mov.b32 %r1, 1; mov.b32 %r2, 2; st.global.v2.b32 [%d38], {%r1, %r2}; ld.global.u64 %d0, [%d38];",
    u64(1 | 2 << 32),
)
kernel("st_u8", "mov.b32 %r1, 0x1234; st.global.u8 [%d38+1], %r1; ld.global.u64 %d0, [%d38];", u64(0x3400))
SHARED = ".shared .align 16 .b8 @NAME@_s[512];"


def with_shared(
    name: str, body: str, expected: Bits | Sequence[Bits] | str, declarations: str = "", size: int = 1024
) -> None:
    """%r10 is the 32-bit address of %r11, a slot of 16 bytes of the thread's own, within shared memory %r10."""
    setup = f"mov.u32 %r10, {name}_s; shl.b32 %r11, %r39, 4; add.u32 %r11, %r10, %r11;"
    kernel(name, f"{setup}\n{body}", expected, f".shared .align 128 .b8 {name}_s[{size}]; {declarations}")


with_shared(
    "shared_neighbour",
    """st.shared.u32 [%r11+4], %r39; bar.sync 0; xor.b32 %r1, %r39, 1; shl.b32 %r1, %r1, 4;
    add.u32 %r1, %r1, %r10; ld.shared.u32 %r2, [%r1+4]; cvt.u64.u32 %d0, %r2;""",
    [u64(lane ^ 1) for lane in LANES],
)
with_shared(
    "shared_by_symbol",
    """setp.ne.u32 %p1, %r39, 5; @%p1 bra DONE; mov.b32 %r1, 99; st.shared.u32 [shared_by_symbol_s+8], %r1; DONE:
    barrier.cta.sync.aligned 0; ld.shared.u32 %r2, [%r10+8]; cvt.u64.u32 %d0, %r2;""",
    u64(99),
)
with_shared(
    "shared_by_generic_address",
    """cvt.u64.u32 %d1, %r11; cvta.shared.u64 %d2, %d1; st.u32 [%d2], %r39; cvta.to.shared.u64 %d3, %d2;
    cvt.u32.u64 %r1, %d3; ld.shared.u32 %r2, [%r1]; cvt.u64.u32 %d0, %r2;""",
    [u64(lane) for lane in LANES],
)
with_shared(
    "shared_add",
    """setp.ne.u32 %p1, %r39, 0; mov.b32 %r1, 0; @!%p1 st.shared.u32 [%r10], %r1; bar.sync 0;
    red.shared.add.u32 [%r10], %r39; bar.sync 0; ld.shared.u32 %r2, [%r10]; cvt.u64.u32 %d0, %r2;""",
    u64(sum(LANES)),
)
kernel(
    "dynamic_shared_memory",
    """mov.u32 %r1, dynamic_bytes; shl.b32 %r2, %r39, 2; add.u32 %r1, %r1, %r2; st.shared.u32 [%r1], %r39; bar.sync 0;
    ld.shared.u32 %r3, [dynamic_bytes+124]; cvt.u64.u32 %d0, %r3;""",
    u64(31),
)
kernel(
    "local_memory",
    """mov.u64 %d1, @NAME@_depot; cvta.local.u64 %d2, %d1; st.local.u32 [%d1+4], %r39; ld.u32 %r1, [%d2+4];
    ld.local.u32 %r2, [@NAME@_depot+4]; add.u32 %r1, %r1, %r2; cvt.u64.u32 %d0, %r1;""",
    [u64(2 * lane) for lane in LANES],
    ".local .align 8 .b8 local_memory_depot[16];",
)


def atomic(text: str, before: int, after: int, *, width: int = 32) -> None:
    """On the thread's own slot: the old value in the lower half of the result, the new one in the upper half."""
    name = text.split()[0].replace(".", "_")
    old = "mov.b32 %r1, 0;" if text.startswith("red") else ""
    kernel(
        name,
        f"""mov.b32 %r2, {before % 2**32}; st.global.u32 [%d38], %r2; {old} {text}
        ld.global.u32 %r3, [%d38]; mov.b64 %d0, {{%r1, %r3}};""",
        u64((0 if old else before % 2**32) | (after % 2**32) << 32),
    )


atomic("atom.global.add.u32 %r1, [%d38], 5;", 7, 12)
atomic("atom.acq_rel.gpu.global.add.u32 %r1, [%d38], 5;", 7, 12)
atomic("red.release.gpu.global.add.u32 [%d38], 5;", 7, 12)
atomic("red.add.s32 [%d38], -5;", 7, 2)
atomic("atom.global.min.s32 %r1, [%d38], -5;", 7, -5)
atomic("atom.global.max.u32 %r1, [%d38], -5;", 7, -5)
atomic("atom.global.inc.u32 %r1, [%d38], 7;", 7, 0)
atomic("atom.global.dec.u32 %r1, [%d38], 7;", 0, 7)
atomic("atom.global.and.b32 %r1, [%d38], 6;", 3, 2)
atomic("atom.global.or.b32 %r1, [%d38], 6;", 3, 7)
atomic("red.global.xor.b32 [%d38], 6;", 3, 5)
atomic("atom.global.exch.b32 %r1, [%d38], 6;", 3, 6)
atomic("atom.global.cas.b32 %r1, [%d38], 3, 6;", 3, 6)
atomic("atom.relaxed.sys.global.cas.b32 %r1, [%d38], 6, 3;", 3, 3)
atomic("atom.global.add.f32 %r1, [%d38], 0f40000000;", f32(1.5).value, f32(3.5).value)
kernel("atom_add_u64", "mov.b64 %d1, 5; atom.global.add.u64 %d2, [%d38], %d1; ld.global.u64 %d0, [%d38];", u64(5))

with_shared(
    "cp_async_with_zeros",
    """mov.b32 %r1, -1; st.shared.v2.b32 [%r11], {%r1, %r1}; st.shared.v2.b32 [%r11+8], {%r1, %r1};
    mov.b32 %r2, 8; and.b32 %r3, %r39, 7; mul.wide.u32 %d1, %r3, 16; add.s64 %d1, %d39, %d1;
    cp.async.cg.shared.global.L2::128B [%r11], [%d1], 16, %r2; cp.async.commit_group; cp.async.wait_group 0;
    ld.shared.u32 %r4, [%r11+4]; ld.shared.u32 %r5, [%r11+8]; mov.b64 %d0, {%r4, %r5};""",
    [u64(little(16 * (lane % 8) + 4)) for lane in LANES],
)
with_shared(
    "cp_async_groups",
    """cp.async.ca.shared.global [%r11], [%d39], 4; cp.async.commit_group; cp.async.ca.shared.global [%r11+8], [%d39+16], 8;
    cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %r1, [%r11]; cp.async.wait_all;
    ld.shared.u32 %r2, [%r11+12]; mov.b64 %d0, {%r1, %r2};""",
    u64(little(0) | little(20) << 32),
)

# ---- control ------------------------------------------------------------------------------------

kernel(
    "loop",
    """mov.b32 %r1, 0; mov.u32 %r2, %r39; AGAIN: setp.eq.u32 %p1, %r2, 0; @%p1 bra.uni DONE; add.u32 %r1, %r1, %r2;
    sub.u32 %r2, %r2, 1; bra AGAIN; DONE: cvt.u64.u32 %d0, %r1;""",
    [u64(lane * (lane + 1) // 2) for lane in LANES],
)
kernel(
    "jump_table",
    """and.b32 %r1, %r39, 3; TARGETS: .branchtargets T0, T1, T2, T1; brx.idx %r1, TARGETS;
    T0: mov.b64 %d0, 10; bra END; T1: mov.b64 %d0, 11; bra END; T2: mov.b64 %d0, 12; END:""",
    [u64((10, 11, 12, 11)[lane % 4]) for lane in LANES],
)
kernel(
    "scopes",
    """mov.b32 %r1, 0; { .reg .b32 %r1; .reg .pred p; mov.b32 %r1, 5; setp.eq.u32 p, %r39, 0; @p bra DONE;
    mov.b32 %r1, 6; DONE: cvt.u64.u32 %d0, %r1; } { .reg .pred p; setp.eq.u32 p, %r39, 1; @!p bra DONE;
    mov.b64 %d0, 7; DONE: } cvt.u64.u32 %d1, %r1; add.s64 %d0, %d0, %d1;""",
    [u64({0: 5, 1: 7}.get(lane, 6)) for lane in LANES],
)

# ---- warps --------------------------------------------------------------------------------------


def shuffled(mode: str, amount: int, width: int) -> list[tuple[int, bool]]:
    """As __shfl_sync and its kin are documented: the lane read from, and whether it may be read. __shfl_xor_sync may
    read from earlier segments, though not from later ones."""
    results = []
    for lane in LANES:
        first, last = lane & ~(width - 1), lane | (width - 1)
        source = {
            "up": lane - amount,
            "down": lane + amount,
            "bfly": lane ^ amount,
            "idx": first + amount % width,
        }[mode]
        inside = source <= last if mode == "bfly" else first <= source <= last
        results.append((source if inside else lane, inside))
    return results


for mode, amount, width in (
    *(("up", 3, 32), ("up", 5, 8), ("down", 3, 32), ("down", 5, 16), ("bfly", 9, 32), ("bfly", 5, 4)),
    *(("idx", 7, 32), ("idx", 11, 8), ("bfly", 16, 32)),
):
    # The intrinsics' operand c: the segment's mask, and 0 or 31 as its bound.
    bound = (32 - width) << 8 | (0 if mode == "up" else 31)
    kernel(
        f"shfl_{mode}_{amount}_{width}",
        f"""mul.lo.u32 %r1, %r39, 3; shfl.sync.{mode}.b32 %r2|%p1, %r1, {amount}, {bound}, -1;
        selp.u32 %r3, 1, 0, %p1; mov.b64 %d0, {{%r2, %r3}};""",
        [u64(3 * source | inside << 32) for source, inside in shuffled(mode, amount, width)],
    )
PREDICATE = "and.b32 %r1, %r39, 5; setp.eq.u32 %p1, %r1, 4;"
VOTES = sum(1 << lane for lane in LANES if lane & 5 == 4)
kernel("vote_ballot", f"{PREDICATE} vote.sync.ballot.b32 %r2, %p1, -1; cvt.u64.u32 %d0, %r2;", u64(VOTES))
kernel("vote_any", f"{PREDICATE} vote.sync.any.pred %p2, %p1, -1; selp.u64 %d0, 1, 0, %p2;", u64(1))
kernel("vote_all", f"{PREDICATE} vote.sync.all.pred %p2, !%p1, -1; selp.u64 %d0, 1, 0, %p2;", u64(0))
kernel(
    "vote_of_some",
    """setp.gt.u32 %p1, %r39, 15; @%p1 bra ABOVE; vote.sync.ballot.b32 %r2, %p1, 65535; bra END; ABOVE:
    vote.sync.ballot.b32 %r2, %p1, -65536; END: cvt.u64.u32 %d0, %r2;""",
    [u64(0 if lane < 16 else 0xFFFF0000) for lane in LANES],
)
kernel("redux_add", "redux.sync.add.u32 %r1, %r39, -1; cvt.u64.u32 %d0, %r1;", u64(sum(LANES)))
kernel("redux_min", "sub.s32 %r1, 3, %r39; redux.sync.min.s32 %r1, %r1, -1; cvt.s64.s32 %d0, %r1;", s64(-28))
kernel(
    "elect",
    "elect.sync %r1|%p1, -1; selp.u64 %d0, 1, 0, %p1;",
    [u64(lane == 0) for lane in LANES],
)
with_shared(
    "bar_warp",
    """st.shared.u32 [%r11], %r39; bar.warp.sync -1; xor.b32 %r1, %r11, 16; ld.shared.u32 %r2, [%r1];
    cvt.u64.u32 %d0, %r2;""",
    [u64(lane ^ 1) for lane in LANES],
)

# ---- tensor cores -------------------------------------------------------------------------------

# Row r of matrix m, of eight 16-bit numbers, starts at 16 * (8 * m + r) and holds 100 m + 10 r + column.
FILL_MATRICES = """shr.u32 %r1, %r39, 3; mul.lo.u32 %r1, %r1, 100; and.b32 %r2, %r39, 7; mad.lo.u32 %r1, %r2, 10, %r1;
    mov.b32 %r3, 0; FILL: add.u32 %r4, %r1, %r3; mad.lo.u32 %r5, %r3, 2, %r11; st.shared.u16 [%r5], %r4;
    add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 8; @%p1 bra FILL; bar.sync 0;"""


def matrix_element(matrix: int, lane: int, half: int, transposed: bool) -> int:
    row, column = lane // 4, 2 * (lane % 4) + half
    if transposed:
        row, column = column, row
    return 100 * matrix + 10 * row + column


for count in (1, 2, 4):
    for trans in ("", ".trans"):
        registers = ", ".join(f"%r{20 + n}" for n in range(count))
        wanted = count - 1
        with_shared(
            f"ldmatrix_x{count}{trans.replace('.', '_')}",
            f"""{FILL_MATRICES} ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11];
            cvt.u64.u32 %d0, %r{20 + wanted};""",
            [
                u64(sum(matrix_element(wanted, lane, half, bool(trans)) << 16 * half for half in (0, 1)))
                for lane in LANES
            ],
        )


def fragments(kind: str, a, b, c) -> tuple[list[list[Bits]], list[list[float]]]:
    """Registers of a, b and c by lane, and what d holds, by the tables of the PTX manual."""
    depth, packed = (8, 1) if kind == "tf32" else (16, 2)
    encode = FORMATS[kind].encode

    def register(values: Sequence[float]) -> Bits:
        return encode(values[0]) if packed == 1 else pair(encode(values[0]), encode(values[1]))

    inputs: list[list[Bits]] = [[] for _ in range(10)]
    outputs: list[list[float]] = []
    for lane in LANES:
        group, member = lane // 4, lane % 4
        for n in range(4):
            row = group + 8 * (n % 2)
            columns = [member * packed + p + (depth // 2) * (n // 2) for p in range(packed)]
            inputs[n].append(register([a[row][k] for k in columns]))
        for n in range(2):
            rows = [member * packed + p + (depth // 2) * n for p in range(packed)]
            inputs[4 + n].append(register([b[k][group] for k in rows]))
        places = [(group + 8 * (n // 2), 2 * member + n % 2) for n in range(4)]
        for n, (row, column) in enumerate(places):
            inputs[6 + n].append(f32(c[row][column]))
        outputs.append([c[r][s] + sum(a[r][k] * b[k][s] for k in range(depth)) for r, s in places])
    return inputs, outputs


for kind in ("bf16", "f16", "tf32"):
    depth = 8 if kind == "tf32" else 16
    a, b, c = (
        [[RANDOM.randint(-8, 8) / 4 for _ in range(columns)] for _ in range(rows)]
        for rows, columns in ((16, depth), (depth, 8), (16, 8))
    )
    inputs, outputs = fragments(kind, a, b, c)
    operands = [f"${n}" for n in range(1, 11)]
    shape = "m16n8k8" if kind == "tf32" else "m16n8k16"
    for n in range(4):
        d = ["%r20", "%r21", "%r22", "%r23"]
        d[n] = "$0"
        # From the last operand on: $1 is the beginning of $10.
        text = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{{', '.join(d)}}}, "
        text += f"{{{', '.join(operands[:4])}}}, {{{', '.join(operands[4:6])}}}, {{{', '.join(operands[6:])}}};"
        text = text.replace("$10", "%r10")
        instruction(text, [f32(row[n]) for row in outputs], *inputs, name=f"mma_{kind}_{n}")

# ---- clusters -----------------------------------------------------------------------------------

BOTH = range(64)  # threads of the two blocks
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
PEER = "mov.u32 %r20, %cluster_ctarank; xor.b32 %r21, %r20, 1;"

kernel(
    "cluster_registers",
    """mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, %cluster_nctarank; mov.u32 %r3, %clusterid.x;
    mov.u32 %r4, %cluster_ctaid.x; mad.lo.u32 %r1, %r2, 10, %r1; mad.lo.u32 %r1, %r3, 100, %r1;
    mad.lo.u32 %r1, %r4, 1000, %r1; cvt.u64.u32 %d0, %r1;""",
    [u64(20 + 1001 * (thread // 32)) for thread in BOTH],
)
with_shared(
    "cluster_mapa_generic",
    f"""{PEER} st.shared.u32 [%r11], %r38; {SYNC} cvt.u64.u32 %d1, %r11; cvta.shared.u64 %d1, %d1;
    mapa.u64 %d2, %d1, %r21; ld.u32 %r1, [%d2]; cvt.u64.u32 %d0, %r1; {SYNC}""",
    [u64(thread ^ 32) for thread in BOTH],
)
with_shared(
    "cluster_mapa_shared",
    f"""{PEER} mapa.shared::cluster.u32 %r22, %r11, %r21; st.shared::cluster.u32 [%r22], %r38; {SYNC}
    ld.shared.u32 %r1, [%r11]; cvt.u64.u32 %d0, %r1;""",
    [u64(thread ^ 32) for thread in BOTH],
)
with_shared(
    "cluster_mapa_own",
    f"""{PEER} mapa.shared::cluster.u32 %r22, %r11, %r20; st.shared.u32 [%r22], %r38; ld.shared::cluster.u32 %r1, [%r11];
    cvt.u64.u32 %d0, %r1;""",
    [u64(thread) for thread in BOTH],
)
# The barrier lies behind 32 slots.
INIT = f"""setp.ne.u32 %p1, %r39, 0; @!%p1 mbarrier.init.shared::cta.b64 [%r10+512], 1;
    @!%p1 fence.mbarrier_init.release.cluster; {SYNC}"""
WAIT = """WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r10+512], 0; @!%p2 bra WAIT;"""
for values, kind, size in (("%r38", "b32", 4), ("%d25", "b64", 8), ("{%r38, %r24, %r25, %r26}", "v4.b32", 16)):
    with_shared(
        f"cluster_st_async_{size}",
        f"""{PEER} {INIT} @!%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r10+512], {32 * size};
        mul.lo.u32 %r24, %r38, 2; mul.lo.u32 %r25, %r38, 3; mul.lo.u32 %r26, %r38, 5; mov.b64 %d25, {{%r25, %r26}};
        mapa.shared::cluster.u32 %r22, %r11, %r21; mapa.shared::cluster.u32 %r23, %r10, %r21;
        st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.{kind} [%r22], {values}, [%r23+512];
        {WAIT} ld.shared.b{min(size, 8) * 8} %{"r1" if size == 4 else "d0"}, [%r11+{size // 16 * 8}];
        {"cvt.u64.u32 %d0, %r1;" if size == 4 else ""} {SYNC}""",
        [
            u64(peer if size == 4 else 3 * peer | 5 * peer << 32)
            for peer in (thread ^ 32 for thread in BOTH)
        ],
    )
with_shared(
    "cluster_remote_arrival",
    f"""{PEER} {INIT} st.shared.u32 [%r11], %r38; mapa.shared::cluster.u32 %r23, %r10, %r21; bar.sync 0;
    @!%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r23+512]; {WAIT}
    mapa.shared::cluster.u32 %r22, %r11, %r21; ld.shared::cluster.u32 %r1, [%r22]; cvt.u64.u32 %d0, %r1; {SYNC}""",
    [u64(thread ^ 32) for thread in BOTH],
)
with_shared(
    "mbarrier_counts",
    """setp.ne.u32 %p1, %r39, 0; @!%p1 mbarrier.init.shared.b64 [%r10+512], 32; bar.sync 0; st.shared.u32 [%r11], %r39;
    mbarrier.arrive.shared.b64 %d1, [%r10+512];
    WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r10+512], 0, 1000; @!%p2 bra WAIT; xor.b32 %r1, %r11, 48;
    ld.shared.u32 %r2, [%r1]; bar.sync 0; @!%p1 mbarrier.inval.shared.b64 [%r10+512]; bar.sync 0;
    @!%p1 mbarrier.init.shared.b64 [%r10+512], 1; bar.sync 0; mbarrier.test_wait.parity.shared.b64 %p3, [%r10+512], 0;
    selp.u32 %r3, 1, 0, %p3; mov.b64 %d0, {%r2, %r3};""",
    [u64(lane ^ 3) for lane in LANES],
)
kernel("clocks", "mov.u64 %d1, %clock64; mov.u64 %d2, %clock64; setp.ge.u64 %p1, %d2, %d1; selp.u64 %d0, 1, 0, %p1;", u64(1))

# ---- what has to be found -----------------------------------------------------------------------

fails("misaligned_vector", "ld.global.v2.u32 {%r1, %r2}, [%d39+4]; mov.b64 %d0, 0;", "8 bytes that is not aligned")
fails("trapping", "trap; mov.b64 %d0, 0;", "trap")
fails(
    "cluster_peer_by_own_shared",
    f"""{PEER} mov.u32 %r1, cluster_peer_by_own_shared_s; mapa.shared::cluster.u32 %r2, %r1, %r21;
    st.shared.u32 [%r2], %r1; {SYNC} mov.b64 %d0, 0;""",
    "another block's shared memory",
    ".shared .align 4 .b8 cluster_peer_by_own_shared_s[4];",
)
fails(
    "cluster_peer_by_cvta",
    f"""{PEER} mov.u32 %r1, cluster_peer_by_cvta_s; mapa.shared::cluster.u32 %r2, %r1, %r21; cvt.u64.u32 %d1, %r2;
    cvta.shared::cluster.u64 %d1, %d1; cvta.to.shared.u64 %d0, %d1; {SYNC}""",
    "another block's shared memory",
    ".shared .align 4 .b8 cluster_peer_by_cvta_s[4];",
)
fails("uncommitted_copy", "cp.async.ca.shared.global [dynamic_bytes], [%d39], 4; mov.b64 %d0, 0;", "has not committed")
fails(
    "diverging_barrier",
    "setp.eq.u32 %p1, %r39, 3; @%p1 bra OTHER; bar.sync 0; bra END; OTHER: mov.b64 %d0, 0; END:",
    "wait in __syncthreads",
)


def module(cases: Sequence[Case] = CASES) -> str:
    head = ".version 8.6\n.target sm_90\n.address_size 64\n.extern .shared .align 128 .b8 dynamic_bytes[];\n"
    return head + "\n".join(case.ptx() for case in cases) + "\n"
