"""Make the README's lists of figures from the committed JSON of bench.py, bench_quick.py, bench_contract.py and
bench_torchrl.py.

    python benchmarks/report_readme.py [--document README.md]

Without --document the lists go to standard output; with it, each replaces what stands between its two markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import harness
from report import replace_block
from report_bench import GOALS, ratios_of

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = {
    "avx512": "cpu_epyc_zen5_2_cores.json",
    "avx2": "cpu_epyc_zen3_2_cores.json",
    "contract": "contract_epyc_zen5_2_cores.json",
    "contract_amx": "contract_xeon_amx_2_cores.json",
    "torchrl": "torchrl_cpu.json",
    "suite": "suite_epyc_zen5_2_cores.json",
    "suite_amx": "suite_xeon_amx_2_cores.json",
}
PEERS = ("torch", "onnxruntime", "openvino")
LARGE = 256  # hidden units from which the layer gains little without a matrix unit, with a batch


def linked(record: str) -> str:
    return f"[record](benchmarks/results/{RECORDS[record]})"


def span(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}× to {max(ratios):.2f}×"


def of_batches(record: dict, group: str, least: int) -> str:
    """The ratios of the cases with a batch and so many hidden units at least."""
    return span(
        [
            r["ratio"]
            for r in record["results"]
            if r["group"] == group and r["hidden_size"] >= least and r["batch"] > 1
        ]
    )


def beside_peers(suite: dict) -> str:
    """Inference of the suite: our layer over torch's, and the frozen one over the best of all peers."""
    cases = [
        {name: side["median"] for name, side in r["sides"].items()}
        for r in suite["results"]
        if r["group"] == "inference"
    ]
    shapes = {r["case"] for r in suite["results"] if r["group"] == "inference"}
    ours = [medians["torch"] / medians["ours"] for medians in cases]
    frozen = [min(medians[name] for name in PEERS) / medians["frozen"] for medians in cases]
    return (
        f"- **Inference** of {len(shapes)} shapes from one step to B 512, with 1 and 2 threads: "
        f"**{harness.geometric_mean(ours):.2f}×** as fast as torch in the geometric mean, {min(ours):.2f}× in the "
        f"worst; frozen, **{harness.geometric_mean(frozen):.2f}×** as fast as the best of torch, ONNX Runtime and "
        f"OpenVINO, {min(frozen):.2f}× in the worst. `make bench`, {linked('suite')}"
    )


def on_matrix_units(suite: dict) -> str:
    """float32 with at least 16 rows and 128 units, and bfloat16, over torch's layer."""
    float32, half = (
        [[ratio for threads in (1, 2) for ratio in ratios_of(suite, goal, threads)] for goal in goals]
        for goals in (GOALS[:2], GOALS[2:4])
    )

    def mean_and_worst(ratios: list[float]) -> str:
        return f"**{harness.geometric_mean(ratios):.2f}×** ({min(ratios):.2f}× in the worst case)"

    return (
        f"- **Matrix units** (AMX): float32 with B >= 16 and H >= 128, {len(float32[0])} cases, is "
        f"{mean_and_worst(float32[0])} as fast as torch in inference and {mean_and_worst(float32[1])} in training, "
        f"with an error below that of float32 arithmetic; bfloat16, {len(half[0])} cases, is "
        f"{mean_and_worst(half[0])} as fast as torch's bfloat16 in inference and {mean_and_worst(half[1])} in "
        f"training. `make bench`, {linked('suite_amx')}"
    )


def faster(records: dict[str, dict]) -> str:
    """What the layer gains: one line for each use."""
    quick = records["avx512"]
    summary = {line["group"]: line for line in quick["summary"]}
    steps = [r["ratio"] for r in quick["results"] if r["group"] == "step"]
    training, memory = summary["training"], summary["memory"]
    packed = [r for r in records["contract"]["results"] if r["group"] == "packed"]
    ragged = [r["over_torch"] for r in packed]
    resets = records["torchrl"]["results"]
    over_torch = [r["over_torch"]["ratio"] for r in resets]
    over_cut = [r["over_pad"]["ratio"] for r in resets]
    with_unit = records["contract_amx"]["results"]
    contract = records["contract"]["results"]
    cells = [r["over_torch"] for r in contract if r["group"] == "cell"]
    rollouts = [r for r in contract if r["group"] == "rollout"]
    learning = [r for r in rollouts if r["training"]]
    frozen = [r for r in with_unit if r["group"] == "frozen"]
    streams = [r for r in frozen if r["shape"].startswith("stream")]
    large = [r for r in streams if r["shape"] in ("stream-H512", "stream-H1024")]
    busy = [r for r in contract if r["group"] == "busy" and r["threads"] == 2]

    def longer(side: str, neighbours: int) -> str:
        return span([r[f"{side}_beside_{neighbours}"] for r in busy])

    return "\n".join(
        [
            f"- **Ragged batches**: a `PackedSequence` with {packed[0]['share_of_rows']:.0%} of the padded rows runs "
            f"**{span(ragged)}** as fast as in torch. `python benchmarks/bench_contract.py --only packed`, "
            f"{linked('contract')}",
            f"- **Recurrent policies**, 1 to 32 environments: a loop over the steps is "
            f"**{span([r['over_torch'] for r in rollouts])}** as fast with this layer in the place of torch's, acting "
            f"and learning; learning by one call with `resets` "
            f"**{span([r['resets_over_torch'] for r in learning])}**. "
            f"`python benchmarks/bench_contract.py --only rollout`, {linked('contract')}",
            f"- **Resets** inside a sequence (recurrent policies), in TorchRL's `LSTMModule`: one call with `resets` "
            f"is **{span(over_torch)}** as fast as torch's layer, which needs the rows cut at each reset, and "
            f"{span(over_cut)} as fast as this layer on cut rows. `python benchmarks/bench_torchrl.py`, "
            f"{linked('torchrl')}",
            f"- **One step** with carried state, batch 1, H 128: **{span(steps)}** as fast, by a call or by `step()`. "
            f"`make bench-quick`, {linked('avx512')}",
            f"- **Frozen** for inference, one step at a time, H 16 to 1024: "
            f"**{span([r['as_they_are_over_torch'] for r in streams])}** as fast as torch; with int8 weights "
            f"{span([r['int8_over_ours'] for r in large])} as fast as this layer at H 512 and 1024. "
            f"`python benchmarks/bench_contract.py --only frozen`, {linked('contract_amx')}",
            on_matrix_units(records["suite_amx"]),
            f"- **Training step**: **{training['geometric_mean']:.2f}×** as fast in the geometric mean of "
            f"{training['cases']} cases, {training['worst']:.2f}× in the worst. `make bench-quick`, {linked('avx512')}",
            beside_peers(records["suite"]),
            f"- **LSTMCell**: {len(cells)} cases of B 1 to 64 and H 64 to 1024, with and without gradients: "
            f"**{harness.geometric_mean(cells):.2f}×** in the geometric mean, {min(cells):.2f}× in the worst. "
            f"`python benchmarks/bench_contract.py --only cell`, {linked('contract')}",
            f"- **Memory**: the peak of a training step is **{memory['geometric_mean']:.2f}** of torch's in the mean, "
            f"{memory['worst']:.2f} in the worst of {memory['cases']} cases. `make bench-quick`, {linked('avx512')}",
            f"- **A busy host**: with two threads on two cores, one of which another program keeps busy, a call takes "
            f"{longer('ours', 1)} as long as on an idle one, and torch's {longer('torch', 1)}; beside two such "
            f"programs {longer('ours', 2)}, and torch's {longer('torch', 2)}. "
            f"`python benchmarks/bench_contract.py --only busy`, {linked('contract')}",
        ]
    )


def not_faster(records: dict[str, dict]) -> str:
    """Where the layer gains nothing, or loses."""

    lines = [
        f"{of_batches(records[record], 'inference', LARGE)} in inference and "
        f"{of_batches(records[record], 'training', LARGE)} in training with {name} ({linked(record)})"
        for record, name in (("avx512", "AVX-512"), ("avx2", "AVX2"))
    ]
    without = [r["bfloat16_over_torch"] for r in records["contract"]["results"] if r["group"] == "16-bit"]
    return "\n".join(
        [
            f"- **H >= {LARGE} with a batch, without matrix units**: about as fast as torch, {'; '.join(lines)}.",
            f"- **bfloat16** without matrix units: {span(without)} of torch's speed on a processor with bfloat16 "
            f"instructions ({linked('contract')}).",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--document", type=Path, help="replace what is between the markers of this file")
    options = parser.parse_args(arguments)
    records = {name: json.loads((RESULTS / file).read_text()) for name, file in RECORDS.items()}
    for name, lines_of in (("faster", faster), ("not-faster", not_faster)):
        lines = lines_of(records)
        if options.document:
            replace_block(options.document, name, lines)
        else:
            print(lines, end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
