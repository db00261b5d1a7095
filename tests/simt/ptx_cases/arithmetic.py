"""Cases that compute: integers, choices, moves, floating point, conversions."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from fractions import Fraction

from simt.ptx_cases.case import (
    FORMATS,
    LANES,
    Bits,
    b16,
    b32,
    b64,
    bf16,
    f16,
    f32,
    f64,
    instruction,
    pred,
    s16,
    s32,
    s64,
    u16,
    u32,
    u64,
)

# ---- integers

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
instruction("prmt.b32 $0, $1, $2, $3;", b32(0x77553311), b32(0x33221100), b32(0x77665544), b32(0x7531))
instruction("prmt.b32 $0, $1, $2, $3;", b32(0x00FF2200), b32(0x33221100), b32(0x776655C4), b32(0x8C20))
instruction("bfi.b32 $0, $1, $2, $3, $4;", b32(0x12ABC5EF), b32(0x345), b32(0x12ABCDEF), u32(8), u32(4))
instruction("bfi.b64 $0, $1, $2, $3, $4;", b64(0x0F00000000), b64(0xFFF), b64(0), u32(32), u32(4))

# ---- predicates and choices

instruction("setp.lt.s32 $0, $1, $2;", pred(True), s32(-1), s32(1))
instruction("setp.lt.u32 $0, $1, $2;", pred(False), u32(-1), u32(1))
instruction("setp.hi.u32 $0, $1, $2;", pred(True), u32(-1), u32(1))
instruction("setp.ls.u32 $0, $1, $2;", pred(True), u32(1), u32(1))
instruction("setp.gt.s64 $0, $1, $2;", pred(True), s64(1 << 40), s64(1))
instruction("setp.le.s16 $0, $1, $2;", pred(True), s16(-1), s16(1))
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
instruction("setp.lt.f16 $0, $1, $2;", pred(True), f16(-1), f16(0.5))
instruction("setp.gt.bf16 $0, $1, $2;", pred(False), bf16(-1), bf16(0.5))
instruction("setp.eq.ftz.f32 $0, $1, $2;", pred(True), f32(1e-40), f32(0))
instruction("selp.b32 $0, $1, $2, $3;", b32(1), b32(1), b32(2), pred(True))
instruction("selp.f64 $0, $1, $2, $3;", f64(2), f64(1), f64(2), pred(False))

# ---- moves

instruction(
    "mov.b64 $0, {$1, $2};", b64(0x2222222211111111), b32(0x11111111), b32(0x22222222), name="mov_pack_64"
)
instruction("mov.b32 $0, {$1, $2};", b32(0x22221111), b16(0x1111), b16(0x2222), name="mov_pack_32")
instruction("mov.b64 {%r8, $0}, $1;", b32(0x22222222), b64(0x2222222211111111), name="mov_unpack_high")
instruction("mov.b64 {$0, _}, $1;", b32(0x11111111), b64(0x2222222211111111), name="mov_unpack_low")
instruction("mov.b32 {%h8, $0}, $1;", b16(0x2222), b32(0x22221111), name="mov_unpack_32")
instruction("mov.f32 $0, 0f40490FDB;", f32(math.pi), name="mov_literal_f32")
instruction("mov.f64 $0, 0d400921FB54442D18;", f64(math.pi), name="mov_literal_f64")
instruction("mov.u32 $0, %laneid;", [u32(lane) for lane in LANES], name="mov_laneid")
instruction("mov.u32 $0, %ntid.x;", u32(32), name="mov_ntid")

# ---- floating point

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
instruction("neg.f32 $0, $1;", f32(-2), f32(2))
instruction("abs.f64 $0, $1;", f64(2), f64(-2))
instruction("copysign.f32 $0, $1, $2;", f32(-3), f32(-1), f32(3))
instruction("copysign.f64 $0, $1, $2;", f64(3), f64(1), f64(-3))
instruction("ex2.approx.ftz.f32 $0, $1;", f32(0.125), f32(-3))
instruction("ex2.approx.f32 $0, $1;", f32(2**-130), f32(-130))
instruction("ex2.approx.ftz.f32 $0, $1;", f32(0), f32(-130))
instruction("rcp.rn.f32 $0, $1;", f32(0.25), f32(4))
instruction("rcp.approx.ftz.f32 $0, $1;", f32(0.25), f32(4))
instruction("rcp.rn.f64 $0, $1;", f64(0.25), f64(4))
instruction("rcp.approx.ftz.f64 $0, $1;", f64(0.25), f64(4))
instruction("sqrt.rn.f32 $0, $1;", f32(3), f32(9))

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
for mode in ("rn", "rz", "rm", "rp"):
    a, b, c = (numbers("f32", low=-6, high=3) for _ in range(3))
    # A difference of many magnitudes, which rounding twice gets wrong.
    c = [x * Fraction(2) ** RANDOM.choice((0, -12, -24)) for x in c]
    c = [Fraction(FORMATS["f32"].rounded(x)) for x in c]
    operands = [encoded("f32", x) for x in (a, b, c)]
    sums = encoded("f32", [x + y for x, y in zip(a, c, strict=True)], mode)
    products = encoded("f32", [x * y for x, y in zip(a, b, strict=True)], mode)
    both = encoded("f32", [x * y + z for x, y, z in zip(a, b, c, strict=True)], mode)
    instruction(f"add.{mode}.f32 $0, $1, $2;", sums, operands[0], operands[2])
    instruction(f"mul.{mode}.f32 $0, $1, $2;", products, operands[0], operands[1])
    instruction(f"fma.{mode}.f32 $0, $1, $2, $3;", both, *operands)

# What is lost in a double decides: a tie that is none, a whole number that is not reached.
instruction("add.rm.f32 $0, $1, $2;", f32(1 - 2**-24), f32(1), f32(-(2**-80)))
instruction("add.rp.f32 $0, $1, $2;", f32(1 + 2**-23), f32(1), f32(2**-80))
instruction("add.rz.f32 $0, $1, $2;", f32(-(1 - 2**-24)), f32(-1), f32(2**-80))
instruction("fma.rm.f32 $0, $1, $2, $3;", f32(6 - 2**-21), f32(2), f32(3), f32(-(2**-80)))

# ---- conversions

for kind, mode in (("f16", "rn"), ("bf16", "rn"), ("f16", "rz"), ("bf16", "rz"), ("tf32", "rna")):
    values = numbers("f32")
    # Halfway between neighbours.
    values[:4] = [Fraction(1) + Fraction(n, 2 ** FORMATS[kind].digits) for n in (1, 3, -1, 5)]
    sources = [f32(float(x)) for x in values]
    instruction(f"cvt.{mode}.{kind}.f32 $0, $1;", encoded(kind, values, mode), sources)
doubles = [Fraction(RANDOM.uniform(-1, 1)) * Fraction(2) ** RANDOM.randint(-140, 10) for _ in LANES]
for mode in ("rn", "rz", "rm", "rp"):
    instruction(
        f"cvt.{mode}.f32.f64 $0, $1;", encoded("f32", doubles, mode), [f64(float(x)) for x in doubles]
    )
halves = [Bits(16, RANDOM.randrange(0x7C00) | RANDOM.choice((0, 0x8000))) for _ in LANES]
half_values = [struct.unpack("<e", struct.pack("<H", h.value))[0] for h in halves]
instruction("cvt.f32.f16 $0, $1;", [f32(x) for x in half_values], halves)
instruction("cvt.f64.f16 $0, $1;", [f64(x) for x in half_values], halves)
instruction("cvt.f32.bf16 $0, $1;", f32(-1.5), bf16(-1.5))
instruction("cvt.f64.f32 $0, $1;", f64(-1.5), f32(-1.5))
instruction("cvt.rn.f16.f32 $0, $1;", f16(math.inf), f32(65520))
instruction("cvt.rz.f16.f32 $0, $1;", f16(65504), f32(65535))
instruction("cvt.rn.bf16.f32 $0, $1;", bf16(-math.inf), f32(-3.4e38))
LARGEST = f32((2 - 2**-23) * 2.0**127)
for mode, positive, negative in (
    ("rn", f32(math.inf), f32(-math.inf)),
    ("rz", LARGEST, f32(-(2 - 2**-23) * 2.0**127)),
):
    instruction(f"cvt.{mode}.f32.f64 $0, $1;", positive, f64(1e300))
    instruction(f"cvt.{mode}.f32.f64 $0, $1;", negative, f64(-1e300))
instruction("cvt.rm.f32.f64 $0, $1;", f32(-math.inf), f64(-1e300))
instruction("cvt.rm.f32.f64 $0, $1;", LARGEST, f64(1e300))
instruction("cvt.rp.f32.f64 $0, $1;", f32(math.inf), f64(1e300))
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
instruction("cvt.u16.u32 $0, $1;", u16(0x5678), u32(0x12345678))
