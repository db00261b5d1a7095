"""Cases that see memory, other threads or the way: as memory.py of the translator."""

from __future__ import annotations

import random
from collections.abc import Sequence

from simt.ptx_cases.case import (
    FORMATS,
    LANES,
    Bits,
    f32,
    fails,
    instruction,
    kernel,
    pair,
    s64,
    u64,
)

RANDOM = random.Random(6)

# ---- memory


def little(start: int, count: int = 4) -> int:
    """What `in`, whose bytes are 0, 1, 2 and so on, holds at `start`."""
    return int.from_bytes(bytes(range(start, start + count)), "little")


kernel("ld_v4", "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%d39+16]; cvt.u64.u32 %d0, %r3;", u64(little(24)))
kernel("ld_v2_u64", "ld.global.v2.u64 {%d1, %d0}, [%d39+32];", u64(little(40, 8)))
kernel("ld_v4_u8", "ld.global.v4.u8 {%h1, %h2, %h3, %h4}, [%d39+8]; cvt.u64.u16 %d0, %h2;", u64(9))
kernel(
    "ld_negative_offset",
    "add.s64 %d1, %d39, 8; ld.global.u32 %r1, [%d1+-4]; cvt.u64.u32 %d0, %r1;",
    u64(little(4)),
)
kernel("ld_s8", "ld.global.s8 %r1, [%d39+200]; cvt.s64.s32 %d0, %r1;", s64(200 - 256))
kernel("ld_u8", "ld.global.u8 %r1, [%d39+200]; cvt.s64.s32 %d0, %r1;", s64(200))
kernel("ld_s16", "ld.global.s16 %r1, [%d39+200]; cvt.s64.s32 %d0, %r1;", s64(little(200, 2) - 65536))
kernel("ld_relaxed", "ld.relaxed.sys.u64 %d0, [%d39+8];", u64(little(8, 8)))
kernel(
    "ld_relaxed_v4",
    "ld.relaxed.gpu.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d39+16]; mov.b64 %d0, {%r2, %r4};",
    u64(little(20) | little(28) << 32),
)
kernel("ld_relaxed_v2", "ld.relaxed.sys.global.v2.u64 {%d1, %d0}, [%d39+32];", u64(little(40, 8)))
kernel("ld_volatile", "ld.volatile.global.u32 %r1, [%d39+4]; cvt.u64.u32 %d0, %r1;", u64(little(4)))
kernel(
    "ld_cache", "ld.global.L1::no_allocate.L2::128B.u32 %r1, [%d39+4]; cvt.u64.u32 %d0, %r1;", u64(little(4))
)
kernel(
    "st_relaxed",
    "mov.b64 %d1, 77; st.relaxed.gpu.global.u64 [%d38], %d1; ld.global.u64 %d0, [%d38];",
    u64(77),
)
kernel(
    "st_v2",
    "mov.b32 %r1, 1; mov.b32 %r2, 2; st.global.v2.b32 [%d38], {%r1, %r2}; ld.global.u64 %d0, [%d38];",
    u64(1 | 2 << 32),
)
kernel(
    "st_relaxed_v4",  # by every other thread, over its neighbour's slot too
    """and.b32 %r1, %r39, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra ODD; mov.b32 %r1, 1; mov.b32 %r2, 2; mov.b32 %r3, 3;
    mov.b32 %r4, 4; st.relaxed.gpu.global.v4.b32 [%d38], {%r1, %r2, %r3, %r4}; ODD: bar.warp.sync -1;
    ld.global.u64 %d0, [%d38];""",
    [u64((3 | 4 << 32) if lane % 2 else (1 | 2 << 32)) for lane in LANES],
)
kernel("st_u8", "mov.b32 %r1, 0x1234; st.global.u8 [%d38+1], %r1; ld.global.u64 %d0, [%d38];", u64(0x3400))


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


def atomic(text: str, before: int, after: int) -> None:
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
atomic("atom.relaxed.gpu.global.add.u32 %r1, [%d38], 5;", 7, 12)
atomic("red.relaxed.gpu.global.add.u32 [%d38], 5;", 7, 12)
atomic("red.add.s32 [%d38], -5;", 7, 2)
atomic("atom.global.exch.b32 %r1, [%d38], 6;", 3, 6)
atomic("atom.global.add.f32 %r1, [%d38], 0f40000000;", f32(1.5).value, f32(3.5).value)
kernel(
    "atom_add_u64", "mov.b64 %d1, 5; atom.global.add.u64 %d2, [%d38], %d1; ld.global.u64 %d0, [%d38];", u64(5)
)

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
    """cp.async.cg.shared.global [%r11], [%d39], 16; cp.async.commit_group;
    cp.async.cg.shared.global [%r11+512], [%d39+16], 16; cp.async.commit_group; cp.async.wait_group 1;
    ld.shared.u32 %r1, [%r11]; cp.async.wait_group 0; ld.shared.u32 %r2, [%r11+516]; mov.b64 %d0, {%r1, %r2};""",
    u64(little(0) | little(20) << 32),
)

# ---- dependent launches

kernel(
    "dependent_launch",
    "griddepcontrol.wait; griddepcontrol.launch_dependents; cvt.u64.u32 %d0, %r39;",
    [u64(lane) for lane in LANES],
)

# ---- control

kernel(
    "loop",
    """mov.b32 %r1, 0; mov.u32 %r2, %r39; AGAIN: setp.eq.u32 %p1, %r2, 0; @%p1 bra.uni DONE; add.u32 %r1, %r1, %r2;
    sub.u32 %r2, %r2, 1; bra AGAIN; DONE: cvt.u64.u32 %d0, %r1;""",
    [u64(lane * (lane + 1) // 2) for lane in LANES],
)
kernel(
    "scopes",
    """mov.b32 %r1, 0; { .reg .b32 %r1; .reg .pred p; mov.b32 %r1, 5; setp.eq.u32 p, %r39, 0; @p bra DONE;
    mov.b32 %r1, 6; DONE: cvt.u64.u32 %d0, %r1; } { .reg .pred p; setp.eq.u32 p, %r39, 1; @!p bra DONE;
    mov.b64 %d0, 7; DONE: } cvt.u64.u32 %d1, %r1; add.s64 %d0, %d0, %d1;""",
    [u64({0: 5, 1: 7}.get(lane, 6)) for lane in LANES],
)

# ---- warps


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
kernel("vote_any", f"{PREDICATE} vote.sync.any.pred %p2, %p1, -1; selp.u64 %d0, 1, 0, %p2;", u64(1))
kernel("vote_all", f"{PREDICATE} vote.sync.all.pred %p2, !%p1, -1; selp.u64 %d0, 1, 0, %p2;", u64(0))
kernel(
    "vote_of_some",
    """setp.gt.u32 %p1, %r39, 15; @%p1 bra ABOVE; vote.sync.any.pred %p2, %p1, 65535; bra END; ABOVE:
    vote.sync.any.pred %p2, %p1, -65536; END: selp.u64 %d0, 1, 0, %p2;""",
    [u64(lane >= 16) for lane in LANES],
)
with_shared(
    "bar_warp",
    """st.shared.u32 [%r11], %r39; bar.warp.sync -1; xor.b32 %r1, %r11, 16; ld.shared.u32 %r2, [%r1];
    cvt.u64.u32 %d0, %r2;""",
    [u64(lane ^ 1) for lane in LANES],
)

# ---- tensor cores

# Row r of matrix m, of eight 16-bit numbers, starts at 16 * (8 * m + r) and holds 100 m + 10 r + column.
FILL_MATRICES = """shr.u32 %r1, %r39, 3; mul.lo.u32 %r1, %r1, 100; and.b32 %r2, %r39, 7; mad.lo.u32 %r1, %r2, 10, %r1;
    mov.b32 %r3, 0; FILL: add.u32 %r4, %r1, %r3; mad.lo.u32 %r5, %r3, 2, %r11; st.shared.u16 [%r5], %r4;
    add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 8; @%p1 bra FILL; bar.sync 0;"""


def matrix_element(matrix: int, lane: int, half: int, transposed: bool) -> int:
    row, column = lane // 4, 2 * (lane % 4) + half
    if transposed:
        row, column = column, row
    return 100 * matrix + 10 * row + column


for trans in ("", ".trans"):
    for matrix in range(4):
        with_shared(
            f"ldmatrix_x4{trans.replace('.', '_')}_{matrix}",
            f"""{FILL_MATRICES} ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r11];
            cvt.u64.u32 %d0, %r{20 + matrix};""",
            [
                u64(sum(matrix_element(matrix, lane, half, bool(trans)) << 16 * half for half in (0, 1)))
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
        text += (
            f"{{{', '.join(operands[:4])}}}, {{{', '.join(operands[4:6])}}}, {{{', '.join(operands[6:])}}};"
        )
        text = text.replace("$10", "%r10")
        instruction(text, [f32(row[n]) for row in outputs], *inputs, name=f"mma_{kind}_{n}")

# ---- fences, the way out, clocks

kernel(
    "fences",
    """st.global.u64 [%d38], 3; membar.gl; fence.acq_rel.gpu; fence.sc.sys;
    ld.global.u64 %d0, [%d38];""",
    u64(3),
)
kernel("exit", "st.global.u64 [%d38], 4; exit; mov.b64 %d0, 5;", u64(4))
kernel(
    "clocks",
    "mov.u64 %d1, %globaltimer; mov.u64 %d2, %globaltimer; setp.ge.u64 %p1, %d2, %d1; selp.u64 %d0, 1, 0, %p1;",
    u64(1),
)

# ---- what has to be found

fails(
    "misaligned_vector",
    "ld.global.v2.u32 {%r1, %r2}, [%d39+4]; mov.b64 %d0, 0;",
    "8 bytes that is not aligned",
)
fails(
    "misaligned_relaxed_vector",
    "ld.relaxed.gpu.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d39+8]; mov.b64 %d0, 0;",
    "16 bytes that is not aligned",
)
fails(
    "uncommitted_copy",
    "cp.async.cg.shared.global [dynamic_bytes], [%d39], 16; mov.b64 %d0, 0;",
    "has not committed",
)
fails(
    "diverging_barrier",
    "setp.eq.u32 %p1, %r39, 3; @%p1 bra OTHER; bar.sync 0; bra END; OTHER: mov.b64 %d0, 0; END:",
    "wait in __syncthreads",
)
