"""Plants one wrong line in each kernel file, one after the other, and says whether a test of `make test` sees it.

    python tests/tools/planted.py              # all of them: `make planted`, about an hour on two cores
    python tests/tools/planted.py cell.h tile  # the faults of the files whose names contain one of these
    python tests/tools/planted.py --check      # only that each file has a fault and that each fault still has its line

The faults are planted in a copy of the tree, in build/planted, which is built again after each: of a header of the CPU
kernels only for AVX2, since a fault is the same for each instruction set. The exit code is 1 if a fault survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "planted"
FOLDERS = ("cpu", "cuda", "library")  # below csrc/, each file of which has a fault
TIMEOUT = 1200  # seconds for the tests of a fault

CPU = (
    "tests/cpu/test_kernels.py",
    "tests/cpu/test_options_kernels.py",
    "tests/call/test_packed.py",
    "tests/matrix/test_matrix.py",
)
ENGINE = ("tests/cpu/test_tile_engine.py",)
EMULATED = ("tests/simt/test_stepwise.py",)
LIBRARY = ("tests/native_library/test_library.py",)
DAMAGE = ("tests/native_library/test_damage.py", "-k", "not sanitized")
ON_AARCH64 = ("tests/cpu/test_aarch64.py",)


@dataclass(frozen=True)
class Fault:
    right: str  # what is there, once
    wrong: str  # what is put in its place
    tests: tuple[str, ...] = CPU
    every_set: bool = False  # needs kernels of all instruction sets


FAULTS: dict[str, Fault] = {
    "cpu/backward.h": Fault(
        "load_lanes<T>(pass_.h_rows[n] + k, lanes) * load_lanes<T>(mask + k, lanes)",
        "load_lanes<T>(pass_.h_rows[n] + k, lanes)",
    ),
    "cpu/backward_state.h": Fault(": grads.dc_before, lanes)", ": grad, lanes)"),
    "cpu/backward_steps.h": Fault(
        "if (grad_final.data) v = v + load_lanes", "if (grad_final.data) v = v - load_lanes"
    ),
    "cpu/barrier.h": Fault("__ATOMIC_ACQ_REL) == workers)", "__ATOMIC_ACQ_REL) == 1)"),
    "cpu/int8_product.h": Fault("128 * row.sums[d]", "127 * row.sums[d]", ENGINE),
    "cpu/capability.cpp": Fault(
        'current().store(require(name, "set_cpu_capability"), std::memory_order_relaxed);',
        'require(name, "set_cpu_capability");',
        every_set=True,
    ),
    "cpu/cell.h": Fault("i_terms.value(g_terms.denominator * inverse)", "i_terms.value(i_terms.denominator * inverse)"),
    "cpu/chunk_gradients.h": Fault("begin + (reverse ? 1 : -1);", "begin + (reverse ? 1 : 0);"),
    "cpu/column_product.h": Fault("before = load_lanes<T>(partial(row + r) + at, lanes);", "before = S::zero();"),
    "cpu/cost.h": Fault(
        "{{25'000, 8}, {50'000, 20}", "{{25'000, 9}, {50'000, 20}", ("tests/nn/test_streaming.py", "-k", "soon")
    ),
    "cpu/cost.cpp": Fault(
        "return first(kRowMajorOfTwo);", "return first(kRowMajorOfOne);", ("tests/nn/test_streaming.py", "-k", "soon")
    ),
    "cpu/layout.cpp": Fault(
        "plan.grad_preactivations = layout.reserve(buffer_rows * plan.gate_stride);",
        "plan.grad_preactivations = layout.reserve(plan.chunk_rows * plan.gate_stride);",
    ),
    "cpu/frozen.h": Fault("data + plan.bias), plan.bf16_parts};", "data + plan.bias + 64), plan.bf16_parts};", LIBRARY),
    "cpu/forward.h": Fault(
        "(pass_.steps.rows_before(t) + b) * H, H, params.c_n", "pass_.steps.rows_before(t) * H, H, params.c_n"
    ),
    "cpu/forward_state.h": Fault(
        "accumulate_rows(tile, a, panel, kLanes, shape.hidden_size);",
        "accumulate_rows(tile, a, panel, kLanes, shape.hidden_size - 1);",
    ),
    "cpu/forward_steps.h": Fault("int64_t h_size = h.data ? P : 0;", "int64_t h_size = h.data ? P - 1 : 0;"),
    "cpu/gate_weight.h": Fault("count, out + gate * width,", "count, out + gate * n,"),
    "cpu/gate_product.h": Fault(": T(0)) + (weights.bias_hh", ": T(0)) - (weights.bias_hh"),
    "cpu/gates.h": Fault(
        "load_lanes<T>(at + i * hidden_size, lanes)", "load_lanes<T>(at + (3 - i) * hidden_size, lanes)"
    ),
    "cpu/isa.h": Fault("#define LSTM_EXT_ISA avx2", "#define LSTM_EXT_ISA avx", every_set=True),
    "cpu/kernel_set.h": Fault("kKernels{Simd<T>::kLanes, ", "kKernels{Simd<T>::kLanes / 2, "),
    "cpu/kernels.h": Fault(
        "  int64_t lanes;        // T values in a SIMD register\n"
        "  int64_t tile_rows;    // batch rows of a register tile\n",
        "  int64_t tile_rows;\n  int64_t lanes;\n",
    ),
    "cpu/kernels_avx2_f32.cpp": Fault("kernels_avx2_f32, ", "kernels_none, ", every_set=True),
    "cpu/kernels_avx2_f64.cpp": Fault("kernels_avx2_f64, ", "kernels_none, ", every_set=True),
    "cpu/kernels_avx512_f32.cpp": Fault("kernels_avx512_f32, ", "kernels_none, ", every_set=True),
    "cpu/kernels_avx512_f64.cpp": Fault("kernels_avx512_f64, ", "kernels_none, ", every_set=True),
    "cpu/kernels_neon_f32.cpp": Fault("kernels_neon_f32, ", "kernels_none, ", ON_AARCH64),
    "cpu/kernels_neon_f64.cpp": Fault("kernels_neon_f64, ", "kernels_none, ", ON_AARCH64),
    "cpu/simd_neon.h": Fault("return vfmaq_f32(c, a, b);", "return vfmaq_f32(a, c, b);", ON_AARCH64),
    "cpu/layer_norm.h": Fault(
        "sum_of_lanes<T>(factor[r]) / number;", "sum_of_lanes<T>(factor[r]) / (number - S::set1(T(1)));"
    ),
    "cpu/tile_engine.h": Fault("kHasTileEngine<float> = true;", "kHasTileEngine<float> = false;", ENGINE),
    "cpu/bf16_product.h": Fault("kRight[] = {2, 1, 1, 0, 0, 0};", "kRight[] = {2, 0, 1, 0, 0, 0};", ENGINE),
    "cpu/bf16_split.h": Fault("a = a - reinterpret_cast<", "a = a + reinterpret_cast<", ENGINE),
    "cpu/outer_products.h": Fault("total = total + block;", "total = block;"),
    "cpu/pack.h": Fault(
        "i < lanes ? load_lanes<T>(source + i * count + k, depth)",
        "i < lanes ? load_lanes<T>(source + i * count, depth)",
    ),
    "cpu/pass.h": Fault("= smaller(steps.rows_at(t), steps.rows_at(before));", "= steps.rows_at(t);"),
    "cpu/plan.cpp": Fault("!params.grad_input.data && directions_at_once(", "directions_at_once("),
    "cpu/plan.h": Fault("normalised() ? 14 :", "normalised() ? 13 :"),
    "cpu/range.h": Fault("return (a + b - 1) / b;", "return a / b;"),
    "cpu/recompute.h": Fault("Range{0, 4 * H}, bias_);", "Range{0, 3 * H}, bias_);"),
    "cpu/row_major.h": Fault("return load_first<T>(p, rest);", "return load_first<T>(p, rest - 1);"),
    "cpu/rows.h": Fault(
        "return rows > first ? divide_up(rows - first, stride) : 0;",
        "return rows > first ? (rows - first) / stride : 0;",
    ),
    "cpu/simd.h": Fault("_mm256_maskload_ps(p, mask(n))", "_mm256_maskload_ps(p, mask(n - 1))"),
    "cpu/tile.h": Fault("{ return a[r]; }, b, 0);", "{ return a[0]; }, b, 0);"),
    "cpu/vector_math.h": Fault("1.0 / 720,     1.0 / 5040,", "1.0 / 720,     1.0 / 5050,"),
    "cpu/wait_limit.cpp": Fault(
        "if (wait.seconds < limit().seconds) return;",
        "if (wait.seconds > limit().seconds) return;",
        ("tests/tools/test_conftest.py", "-k", "hangs"),
    ),
    "cuda/cell.cuh": Fault("result.before += past;", "result.before -= past;", EMULATED),
    "cuda/cell_math.cuh": Fault("return 1 - value * value;", "return 1 + value * value;", EMULATED),
    "cuda/layer_norm.cuh": Fault(
        "mean_c[0] /= static_cast<A>(H);\n  A factor_c", "mean_c[0] /= static_cast<A>(H - 1);\n  A factor_c", EMULATED
    ),
    "cuda/numeric.cuh": Fault(
        "float widen(__nv_bfloat16 value) { return to_float(value); }",
        "float widen(__nv_bfloat16 value) { return -to_float(value); }",
        EMULATED,
    ),
    "cuda/platform.h": Fault(
        "++tries_ % 256 == 0",
        "++tries_ % 255 == 0",
        ("tests/simt/test_emulator.py", "-k", "primitives"),
    ),
    "cuda/ptx.h": Fault(
        '"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1,',
        '"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%1, %0,',
        ("tests/simt/test_ptx_route.py", "-k", "wrappers_do_the_same"),
    ),
    "cuda/reduction.cuh": Fault("half > 0; half /= 2", "half > 1; half /= 2", EMULATED),
    "cuda/state.cuh": Fault("return b < rows.next_count;", "return b + 1 < rows.next_count;", EMULATED),
    "cuda/gpu_plan.cpp": Fault(
        "outcome == Outcome::kRight) return", "outcome != Outcome::kWrong) return", ("tests/cuda/test_gpu_plan.py",)
    ),
    "cuda/gpu_plan.h": Fault(
        "return (hidden_size + kStepUnits - 1) / kStepUnits;", "return hidden_size / kStepUnits;", EMULATED
    ),
    "cuda/persistent.h": Fault("kSentinel = 0xffffffffu", "kSentinel = 0xfffffffeu", EMULATED),
    "cuda/persistent_backward.cuh": Fault("tile * 16 + row;", "tile * 16 + row % 8;", EMULATED),
    "cuda/persistent_bf16.cu": Fault("LSTM_EXT_PERSISTENT(__nv_bfloat16)", "LSTM_EXT_PERSISTENT(float)", EMULATED),
    "cuda/persistent_chunk.cuh": Fault("n > 0 ? c.batch : 0", "c.batch", EMULATED),
    "cuda/persistent_f16.cu": Fault("LSTM_EXT_PERSISTENT(__half)", "LSTM_EXT_PERSISTENT(float)", EMULATED),
    "cuda/persistent_f32.cu": Fault("LSTM_EXT_PERSISTENT(float)", "LSTM_EXT_PERSISTENT(__half)", EMULATED),
    "cuda/persistent_forward.cuh": Fault("tile % 2 * 2 + row / 8", "tile % 2 * 2 + 1 - row / 8", EMULATED),
    "cuda/persistent_launch.cuh": Fault("args.sides[0].cell.rows.options;", "false;", EMULATED),
    "cuda/step.h": Fault(
        "  int64_t row_count;\n  int64_t depth;\n", "  int64_t depth;\n  int64_t row_count;\n", EMULATED
    ),
    "cuda/step_backward.cuh": Fault(
        "(row / kStepUnits * H + unit) * args.weight_stride", "(row / kStepUnits * H) * args.weight_stride", EMULATED
    ),
    "cuda/step_bf16.cu": Fault("LSTM_EXT_STEP(__nv_bfloat16)", "LSTM_EXT_STEP(float)", EMULATED),
    "cuda/step_f16.cu": Fault("LSTM_EXT_STEP(__half)", "LSTM_EXT_STEP(float)", EMULATED),
    "cuda/step_f32.cu": Fault("LSTM_EXT_STEP(float)", "LSTM_EXT_STEP(__half)", EMULATED),
    "cuda/step_forward.cuh": Fault("row % 16 / 8, row / 32 * 8", "row % 16 / 8 ^ 1, row / 32 * 8", EMULATED),
    "cuda/step_launch.cuh": Fault("static_cast<unsigned>(args.count)", "1u", EMULATED),
    "cuda/step_tiles.cuh": Fault("column_ + kPieceNumbers <= length_", "column_ <= length_", EMULATED),
    "cuda/stepwise.h": Fault(
        "  const T* c0;                                    // (B, H)\n"
        "  const T* reset_c;                               // (B, H)\n",
        "  const T* reset_c;\n  const T* c0;\n",
        EMULATED,
    ),
    "cuda/stepwise_bf16.cu": Fault("LSTM_EXT_STEPWISE(__nv_bfloat16)", "LSTM_EXT_STEPWISE(float)", EMULATED),
    "cuda/stepwise_f16.cu": Fault("LSTM_EXT_STEPWISE(__half)", "LSTM_EXT_STEPWISE(float)", EMULATED),
    "cuda/stepwise_f32.cu": Fault("LSTM_EXT_STEPWISE(float)", "LSTM_EXT_STEPWISE(double)", EMULATED),
    "cuda/stepwise_f64.cu": Fault("LSTM_EXT_STEPWISE(double)", "LSTM_EXT_STEPWISE(float)", EMULATED),
    "cuda/stepwise_launch.cuh": Fault(
        "SumOfRows<A, A>{parts, columns, parts,", "SumOfRows<A, A>{parts - 1, columns, parts,", EMULATED
    ),
    # What both backends share.
    "contract/cell.h": Fault("(gate == kG ? Math::number(1) - value", "(gate == kG ? Math::number(1) + value"),
    "contract/activation.h": Fault(
        "case Function::kTanh: return one - value * value;", "case Function::kTanh: return one - value;"
    ),
    "library/lstm_ext.h": Fault(
        "  int32_t num_layers;     /* L */\n  int32_t directions;     /* D, 1 or 2 */\n",
        "  int32_t directions;\n  int32_t num_layers;\n",
        LIBRARY,
    ),
    "library/memory.h": Fault("(sizeof(T)) + kAlignment - 1) / kAlignment", "(sizeof(T))) / kAlignment", LIBRARY),
    "library/model.cpp": Fault("file.has(kIsCoupled);", "false;", LIBRARY),
    "library/model.h": Fault("[layer * header.directions + d]", "[layer + d]", LIBRARY),
    "library/stream.cpp": Fault("params.shape.reverse = d == 1;", "params.shape.reverse = false;", LIBRARY),
    "library/weights_file.cpp": Fault("if (!is_share(h.name))", "if (false)", DAMAGE),
    "library/weights_file.h": Fault(
        "kHasPeepholes = 4,\n  kHasLayerNorm = 8,", "kHasPeepholes = 8,\n  kHasLayerNorm = 4,", DAMAGE
    ),
    "contract/layer.h": Fault("return keep != nullptr || share != 0;", "return keep != nullptr;"),
    "contract/params.h": Fault("#define CELL_FLAG(name) || name", "#define CELL_FLAG(name)"),
    "contract/steps.h": Fault("const int64_t cut = shape_.reverse ? t + 1 : t;", "const int64_t cut = t;"),
    "contract/transition.h": Fault("(Math::number(share), previous - fresh", "(Math::number(share), previous"),
}  # fmt: skip

# Tests that need the kernels of all sets.
OF_EVERY_SET = ("tests/cpu/test_kernels.py::test_no_newer_instructions_outside_the_sets",)
# The names of tests of sets that the copy for one instruction set does not have.
NAMES = {"avx512": ("amx", "avx512_bf16", "avx512")}


def problems(csrc: Path = ROOT / "csrc") -> list[str]:
    """Files without a fault, and faults without their line."""
    found = [
        f"csrc/{path.relative_to(csrc)} has no fault in tests/tools/planted.py"
        for folder in FOLDERS
        for path in sorted((csrc / folder).rglob("*"))
        if path.is_file() and str(path.relative_to(csrc)) not in FAULTS
    ]
    for name, fault in FAULTS.items():
        if not (csrc / name).is_file():
            found.append(f"csrc/{name} is not there any more")
        elif (times := (csrc / name).read_text().count(fault.right)) != 1:
            found.append(f"csrc/{name} has {fault.right!r} {times} times, and not once")
        elif fault.right == fault.wrong:
            found.append(f"csrc/{name}: the fault changes nothing")
    return found


def run(
    command: Sequence[str], folder: Path, log: Path, seconds: float | None = None, **variables: str
) -> int:
    """The exit code; 124 after so many seconds. `variables` are of the environment."""
    # pytest-xdist's variables of a test that calls this would make its child one of its workers.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "LSTM_EXT_"))}
    environment |= variables
    with log.open("a") as file:
        print("$", *command, file=file, flush=True)
        try:
            done = subprocess.run(
                command, cwd=folder, stdout=file, stderr=file, env=environment, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            print(f"ended after {seconds} seconds", file=file)
            return 124
    return done.returncode


class Copy:
    """A copy of the tree with a build of its own: of all instruction sets, or of AVX2 and those of `also`."""

    def __init__(self, name: str, every_set: bool, also: Sequence[str] = ()) -> None:
        self.folder, self.log = WORK / name, WORK / f"{name}.log"
        shutil.rmtree(self.folder / "csrc", ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        for file in filter(None, listed.split("\0")):
            source, target = ROOT / file, self.folder / file
            if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        self.sets = "" if every_set else ",".join(("avx2", *also))
        if not every_set:
            left_out = [name for set_, names in NAMES.items() if set_ not in also for name in names]
            skips = self.folder / "tests" / "expected_skips.txt"
            lines = [f"*[*{name}*  # not in this build\n*[{name}*  # the same\n" for name in left_out]
            skips.write_text(skips.read_text() + "".join(lines))
        self.log.unlink(missing_ok=True)
        self.without = () if every_set else OF_EVERY_SET
        self.sound: set[tuple[str, ...]] = set()

    def build(self) -> bool:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return run(command, self.folder, self.log, LSTM_EXT_CPU_SETS=self.sets) == 0

    def test(self, tests: Sequence[str]) -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "worksteal", *tests]
        command += ["-m", "not full", "-p", "no:cacheprovider"]
        command += [f"--deselect={test}" for test in self.without]
        return run(command, self.folder, self.log, TIMEOUT)

    def begin(self, tests: tuple[str, ...]) -> str | None:
        """Without a fault the tests pass. The reason if they do not."""
        if tests not in self.sound:
            if not self.build():
                return f"the copy does not build: {self.log}"
            if self.test(tests) != 0:
                return f"{' '.join(tests)} fail without a fault: {self.log}"
            self.sound.add(tests)
        return None

    def verdict(self, name: str, fault: Fault) -> str:
        """found, survives, or why neither can be said."""
        if reason := self.begin(fault.tests):
            return reason
        path = self.folder / "csrc" / name
        text = path.read_text()
        path.write_text(text.replace(fault.right, fault.wrong))
        try:
            # The emulator builds its own module, within the tests.
            emulated = fault.tests[0].startswith("tests/simt/")
            if not emulated and not self.build():
                return f"does not compile: {self.log}"
            return "survives" if self.test(fault.tests) == 0 else "found"
        finally:
            path.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="a part of a file's name")
    parser.add_argument("--check", action="store_true", help="plant nothing")
    options = parser.parse_args(arguments)
    if found := problems():
        print(*found, sep="\n")
        return 1
    if options.check:
        return 0
    chosen = {
        name: fault
        for name, fault in FAULTS.items()
        if not options.files or any(part in name for part in options.files)
    }
    WORK.mkdir(parents=True, exist_ok=True)
    copies: dict[bool, Copy] = {}
    failed = False
    for name, fault in sorted(chosen.items(), key=lambda item: item[1].every_set):
        start = time.monotonic()
        # A fault of the CUDA kernels needs no CPU kernels, and leaves them as they are.
        every_set = fault.every_set
        if every_set not in copies:
            copies[every_set] = Copy("every_set" if every_set else "avx2", every_set)
        verdict = copies[every_set].verdict(name, fault)
        failed |= verdict != "found"
        print(f"{name}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
