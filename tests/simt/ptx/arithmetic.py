"""Instructions that compute: registers to registers, within a thread."""

from __future__ import annotations

from simt.ptx.emit import Emitter, Modifiers, handles, is_float
from simt.ptx.parse import WIDTHS, Instruction, Vector

ROUNDINGS = ("rn", "rz", "rm", "rp")
TO_INTEGER = {"rni": "rn", "rzi": "rz", "rmi": "rm", "rpi": "rp"}


def bits(kind: str) -> str:
    """The type of the same width without a sign."""
    return f"b{WIDTHS[kind]}"


def float_call(f: Emitter, m: Modifiers, i: Instruction, function: str, kind: str, template: str) -> str:
    """function<template>(operands), with subnormals flushed and the result clamped to [0, 1] where it says so."""
    ftz, saturate = m.take("ftz"), m.take("sat")
    arguments = [f.value(operand, kind) for operand in i.operands[1:]]
    if ftz:
        arguments = [f"flushed({a})" for a in arguments]
    code = f"{function}<{template}>({', '.join(arguments)})"
    if ftz:
        code = f"flushed({code})"
    if saturate:
        code = f"saturated({code})"
    return f.assign(i.operands[0], kind, code)


@handles("add", "sub", "mul", "fma", "mad")
def sum_or_product(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    count = {"fma": 4, "mad": 4}.get(m.name, 3)
    if len(i.operands) != count:
        raise i.error(f"{count} operands expected")
    if is_float(kind):
        rounding = m.take(*ROUNDINGS, default="rn")
        if rounding != "rn" and kind != "f32":
            raise i.error("directed rounding of something else than f32")
        if kind not in ("f32", "f64"):
            raise i.error(f"not supported for {kind}")
        name = "fma" if m.name == "mad" else m.name
        return float_call(f, m, i, f"float_{name}", kind, f"{kind}, Rounding::{rounding}")
    if m.name in ("add", "sub"):
        return f.assign(i.operands[0], kind, f"integer_{m.name}<{kind}>({f.values(i.operands[1:], kind)})")
    part = m.need("lo", "hi", "wide")
    factors = f.values(i.operands[1:3], kind)
    result = kind[0] + str(2 * WIDTHS[kind]) if part == "wide" else kind
    code = f"product_{part}<{kind}>({factors})"
    if m.name == "mad":
        code = f"integer_add<{result}>({code}, {f.value(i.operands[3], result)})"
    return f.assign(i.operands[0], result, code)


@handles("div", "rem")
def division(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    if is_float(kind):
        m.need("rn")
        return float_call(f, m, i, "quotient", kind, kind)
    return f.assign(i.operands[0], kind, f"integer_{m.name}<{kind}>({f.values(i.operands[1:], kind)})")


@handles("min", "max")
def extreme(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    if is_float(kind):
        raise i.error(f"not supported for {kind}")
    return f.assign(i.operands[0], kind, f"std::{m.name}<{kind}>({f.values(i.operands[1:], kind)})")


@handles("abs", "neg")
def sign(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    if is_float(kind):
        return float_call(f, m, i, f"float_{m.name}", kind, kind)
    if m.name == "abs":
        raise i.error(f"not supported for {kind}")
    return f.assign(i.operands[0], kind, f"integer_neg<{kind}>({f.value(i.operands[1], kind)})")


@handles("ex2", "rcp", "sqrt")
def function(f: Emitter, m: Modifiers, i: Instruction) -> str:
    """The exact function, rounded: the hardware's .approx errs more, by less than a kernel's tolerance."""
    kind = m.type()
    m.need("approx", *(("rn",) if m.name in ("rcp", "sqrt") else ()))
    return float_call(f, m, i, f"float_{m.name}", kind, kind)


@handles("copysign")
def copysign(f: Emitter, m: Modifiers, i: Instruction) -> str:
    """The first operand gives the sign, unlike in C."""
    kind = m.type()
    return f.assign(i.operands[0], kind, f"copysign<{kind}>({f.values(i.operands[1:3], kind)})")


@handles("and", "or", "xor")
def bitwise(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    sign = {"and": "&", "or": "|", "xor": "^"}[m.name]
    a, b = (f.value(operand, kind) for operand in i.operands[1:3])
    return f.assign(i.operands[0], kind, f"{kind}({a} {sign} {b})")


@handles("not")
def complement(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    sign = "!" if kind == "pred" else "~"
    return f.assign(i.operands[0], kind, f"{kind}({sign}{f.value(i.operands[1], kind)})")


@handles("shl", "shr")
def shift(f: Emitter, m: Modifiers, i: Instruction) -> str:
    """An amount beyond the width shifts everything out; in C++ it would be undefined."""
    kind = m.type()
    a, amount = f.value(i.operands[1], kind), f.value(i.operands[2], "u32")
    return f.assign(i.operands[0], kind, f"{m.name}<{kind}>({a}, {amount})")


@handles("prmt")
def permute(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    return f.assign(i.operands[0], kind, f"prmt({f.values(i.operands[1:4], kind)})")


@handles("bfi")
def insert(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    a, b, position, length = i.operands[1:5]
    code = f"bfi<{kind}>({f.values((a, b), kind)}, {f.values((position, length), 'u32')})"
    return f.assign(i.operands[0], kind, code)


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
# Unsigned spellings of the same.
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
UNORDERED = tuple(f"{c}u" for c in COMPARISONS)


@handles("setp")
def compare(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    comparison = m.need(*COMPARISONS, *UNSIGNED, *UNORDERED)
    comparison = UNSIGNED.get(comparison, comparison)
    ftz = m.take("ftz")
    a, b = (f.value(operand, kind) for operand in i.operands[1:3])
    if ftz:
        a, b = f"flushed({a})", f"flushed({b})"
    function = "float_compare" if is_float(kind) else "compare"
    code = f"{function}_{comparison}<{kind}>({a}, {b})"
    return f.assign(i.operands[0], "pred", code)


@handles("selp")
def select(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    yes, no, predicate = i.operands[1:4]
    code = f"{f.value(predicate, 'pred')} ? {f.value(yes, kind)} : {f.value(no, kind)}"
    return f.assign(i.operands[0], kind, code)


@handles("mov")
def move(f: Emitter, m: Modifiers, i: Instruction) -> str:
    """Also packs and unpacks: the first of a vector is the least significant part."""
    kind = m.type()
    target, source = i.operands
    if isinstance(target, Vector):
        part = f"b{WIDTHS[kind] // len(target.parts)}"
        parts = f"const Parts<{part}, {bits(kind)}> q({f.value(source, bits(kind))});"
        return f"{{ {parts} {f.assign_each(target, part, 'q')} }}"
    if isinstance(source, Vector):
        part = f"b{WIDTHS[kind] // len(source.parts)}"
        return f.assign(target, bits(kind), f"packed<{bits(kind)}, {part}>({f.values(source.parts, part)})")
    return f.assign(target, kind, f.value(source, kind))


@handles("cvt")
def convert(f: Emitter, m: Modifiers, i: Instruction) -> str:
    source, target = m.type(), m.type()
    ftz, saturate = m.take("ftz"), m.take("sat")
    a = f.value(i.operands[1], source)
    if ftz and source == "f32":
        a = f"flushed({a})"
    whole = TO_INTEGER.get(m.take(*TO_INTEGER), "")
    if is_float(source) and not is_float(target) and target != "tf32":
        if not whole:
            raise i.error("how to round is missing")
        # Saturates with and without .sat.
        return f.assign(i.operands[0], target, f"to_integer<{target}, Rounding::{whole}>({a})")
    if not is_float(source):
        if is_float(target):
            code = f"from_integer<{target}, Rounding::{m.need(*ROUNDINGS)}>({a})"
            code = f"saturated({code})" if saturate else code
        else:
            if saturate:
                raise i.error("not supported with .sat")
            code = f"static_cast<{target}>({a})"
        return f.assign(i.operands[0], target, code)
    if whole:
        if source != target:
            raise i.error("rounds to an integer of another type")
        code = f"whole<{target}, Rounding::{whole}>({a})"
    else:
        code = f"converted<{target}, Rounding::{m.take(*ROUNDINGS, 'rna', default='rn')}>({a})"
    if ftz and target == "f32":
        code = f"flushed({code})"
    if saturate:
        code = f"saturated({code})"
    return f.assign(i.operands[0], target, code)
