"""Instructions that see other threads, memory or the way: everything that arithmetic.py is not."""

from __future__ import annotations

from simt.ptx.emit import Emitter, Modifiers, handles
from simt.ptx.parse import Immediate, Instruction, Name, integer

SPACES = ("global", "local", "const", "param", "shared", "shared::cta")
SHARED = ("shared", "shared::cta")
SCOPES = ("cta", "gpu", "sys")
VECTORS = ("v2", "v4")
# Hints about caches: they change no value.
CACHES = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")
EVICTIONS = tuple(f"L{n}::evict_{how}" for n in (1, 2) for how in ("normal", "unchanged", "first", "last"))
EVICTIONS += ("L1::no_allocate",)
PREFETCHES = ("L2::64B", "L2::128B", "L2::256B")
# For messages: where in the source a thread waits.
HERE = "PTX_HERE"


def truth(value: object) -> str:
    return "true" if value else "false"


def take_hints(m: Modifiers) -> None:
    for hints in (CACHES, EVICTIONS, PREFETCHES):
        m.take(*hints)


# Control flow.


@handles("bra")
def branch(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.take("uni")
    return f"goto {i.operands[0].text};"


@handles("ret", "exit")
def leave(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.take("uni")
    return "return;"


# Memory.


def take_order(m: Modifiers) -> str:
    """weak (which is the default), volatile or relaxed, to which a scope belongs."""
    order = m.take("weak", "volatile", "relaxed", default="weak")
    if order == "relaxed":
        m.need(*SCOPES)
    return order


@handles("ld")
def load(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind, space, order = m.type(), m.take(*SPACES), take_order(m)
    non_coherent = m.take("nc")
    take_hints(m)
    count = int(m.take(*VECTORS, default="v1")[1:])
    target, source = i.operands
    if len(f.parts(target)) != count:
        raise i.error("as many registers as the vector has parts expected")
    place = f.address(source, space)
    if order != "weak":
        if count == 1:
            return f.assign(target, kind, f"load_relaxed<{kind}>({place}, {HERE})")
        call = f"load_vector({place}, v, {HERE});"
        return f"{{ {kind} v[{count}]; {call} {f.assign_each(target, kind, 'v')} }}"
    code = f"const {kind}* p = aligned<const {kind}, {count}>({place}, {HERE}); "
    if non_coherent:
        code += f"note_non_coherent(p, {count} * sizeof *p, {HERE}); "
    if space in SHARED:
        code += f"note_shared(p, {count} * sizeof *p, false, {HERE}); "
    return f"{{ {code}{f.assign_each(target, kind, 'p')} }}"


@handles("st")
def store(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind, space, order = m.type(), m.take(*SPACES), take_order(m)
    take_hints(m)
    count = int(m.take(*VECTORS, default="v1")[1:])
    target, source = i.operands
    parts = f.parts(source)
    if len(parts) != count:
        raise i.error("as many registers as the vector has parts expected")
    place = f.address(target, space)
    if order != "weak":
        if count == 1:
            return f"store_relaxed<{kind}>({place}, {f.value(source, kind)}, {HERE});"
        return f"{{ const {kind} v[] = {{{f.values(parts, kind)}}}; store_vector({place}, v, {HERE}); }}"
    stores = " ".join(f"p[{n}] = {f.value(part, kind)};" for n, part in enumerate(parts))
    note = f"note_shared(p, {count} * sizeof *p, true, {HERE}); " if space in SHARED else ""
    return f"{{ {kind}* p = aligned<{kind}, {count}>({place}, {HERE}); {note}{stores} }}"


OPERATIONS = ("add", "exch")


@handles("atom", "red")
def atomic(f: Emitter, m: Modifiers, i: Instruction) -> str:
    kind = m.type()
    space = m.take("global", *SHARED)
    operation = m.need(*OPERATIONS)
    m.take("relaxed"), m.take(*SCOPES)
    m.take("noftz")
    returns = m.name == "atom"
    operands = i.operands[1:] if returns else i.operands
    place = f.address(operands[0], space)
    arguments = f"{place}, {f.values(operands[1:], kind)}, {HERE}"
    code = f"atomic_{operation}<{kind}>({arguments})"
    return f.assign(i.operands[0], kind, code) if returns else f"{code};"


@handles("griddepcontrol")
def dependent_launch(f: Emitter, m: Modifiers, i: Instruction) -> str:
    return f"grid_dependency_wait({HERE});" if m.need("wait", "launch_dependents") == "wait" else ""


@handles("membar", "fence")
def fence(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.take("sc", "acq_rel")
    m.need("gl", *SCOPES)
    return f"fence({HERE});"


@handles("cvta")
def convert_address(f: Emitter, m: Modifiers, i: Instruction) -> str:
    """Generic addresses are the host's; those of the shared window are not."""
    kind, to, space = m.type(), m.take("to"), m.need(*SPACES)
    code = f.value(i.operands[1], kind)
    if space.startswith("shared"):
        code = f"{'generic_to_shared' if to else 'shared_to_generic'}({code}, {HERE})"
    return f.assign(i.operands[0], kind, code)


# Copies in the background.


@handles("cp")
def copy_async(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.need("async")
    if m.take("commit_group"):
        return f"cp_async_commit({HERE});"
    if m.take("wait_group"):
        return f"cp_async_wait({f.value(i.operands[0], 'u32')}, {HERE});"
    m.need("cg"), m.need("shared", "shared::cta"), m.need("global")
    take_hints(m)
    target, source, size, *rest = i.operands
    if not isinstance(size, Immediate) or integer(size.text) != 16:
        raise i.error("a size that the emulator does not copy")
    if rest and not _is_size(f, rest[0]):
        raise i.error("cp.async with a predicate")
    places = f"{f.address(target, 'shared')}, {f.address(source, 'global')}"
    read = f.value(rest[0], "u32") if rest else size.text
    return f"cp_async16({places}, {read}, {HERE});"


def _is_size(f: Emitter, operand) -> bool:
    return isinstance(operand, Immediate) or (
        isinstance(operand, Name) and f.registers.get(operand.text) not in (None, "pred")
    )


# Barriers.


@handles("bar", "barrier")
def barrier(f: Emitter, m: Modifiers, i: Instruction) -> str:
    if m.take("warp"):
        m.need("sync")
        return f"bar_warp_sync({f.value(i.operands[0], 'b32')}, {HERE});"
    m.take("cta")
    m.need("sync")
    m.take("aligned")
    if i.operands != (Immediate("0"),):
        raise i.error("a barrier other than that of the whole block")
    return f"bar_sync({HERE});"


# Warps.


@handles("shfl")
def shuffle(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.need("sync"), m.need("b32")
    mode = m.need("up", "down", "bfly", "idx")
    value, predicate = f.pair(i.operands[0])
    a, b, c, mask = (f.value(operand, "b32") for operand in i.operands[1:5])
    writes = f.assign(value, "b32", "s.value")
    if predicate is not None:
        writes += " " + f.assign(predicate, "pred", "s.in_range")
    return f"{{ const Shuffled s = shfl_{mode}({a}, {b}, {c}, {mask}, {HERE}); {writes} }}"


@handles("vote")
def vote(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.need("sync")
    mode, kind = m.need("all", "any"), m.type()
    predicate, mask = f.value(i.operands[1], "pred"), f.value(i.operands[2], "b32")
    return f.assign(i.operands[0], kind, f"vote_{mode}({predicate}, {mask}, {HERE})")


# Tensor cores.


@handles("ldmatrix")
def ldmatrix(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.need("sync"), m.need("aligned"), m.need("m8n8"), m.need("b16"), m.need("shared", "shared::cta")
    m.need("x4")
    transposed = truth(m.take("trans"))
    if len(f.parts(i.operands[0])) != 4:
        raise i.error("a register for each matrix expected")
    place = f.address(i.operands[1], "shared")
    load = f"ldmatrix_x4({transposed}, q, {place}, {HERE});"
    return f"{{ b32 q[4]; {load} {f.assign_each(i.operands[0], 'b32', 'q')} }}"


# The types of a and b, with the shape that the emulator has for them.
MMA = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}


@handles("mma")
def mma(f: Emitter, m: Modifiers, i: Instruction) -> str:
    m.need("sync"), m.need("aligned"), m.need("row"), m.need("col")
    shape = m.need("m16n8k16", "m16n8k8")
    sum_type, b_type, a_type, result_type = m.type(), m.type(), m.type(), m.type()
    if MMA.get(a_type) != shape or a_type != b_type or (sum_type, result_type) != ("f32", "f32"):
        raise i.error("an mma that the emulator has not")
    d, a, b, c = (f.parts(operand) for operand in i.operands)
    if [len(x) for x in (d, a, b, c)] != [4, 4, 2, 4]:
        raise i.error("the wrong number of registers")
    operands = f"const b32 a[] = {{{f.values(a, 'b32')}}}, b[] = {{{f.values(b, 'b32')}}};"
    sums = f"f32 c[4] = {{{f.values(c, 'f32')}}};"
    call = f"mma<{a_type}>(c, a, b, {HERE});"
    return f"{{ {operands} {sums} {call} {f.assign_each(i.operands[0], 'f32', 'c')} }}"
