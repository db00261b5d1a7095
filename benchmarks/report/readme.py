"""The README's lists of figures and its picture, from the records of several benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import harness
from records import ratio

from .suite import GOALS, ratios_of
from .text import span

RECORDS = {
    "avx512": "cpu_epyc_zen5_2_cores.json",
    "avx2": "cpu_epyc_zen3_2_cores.json",
    "contract": "contract_epyc_zen5_2_cores.json",
    "contract_amx": "contract_xeon_amx_2_cores.json",
    "busy": "contract_busy_xeon_avx512_2_cores.json",
    "frozen": "contract_frozen_xeon_avx512_2_cores.json",
    "torchrl": "torchrl_cpu.json",
    "suite": "suite_epyc_zen5_2_cores.json",
    "suite_amx": "suite_xeon_amx_2_cores.json",
}
PEERS = ("torch", "onnxruntime", "openvino")
LARGE = 256  # hidden units from which the layer gains little without a matrix unit, with a batch


def linked(record: str) -> str:
    """A link whose text is the processor."""
    text = "Xeon" if "xeon" in RECORDS[record] else "EPYC"
    return f"[{text}](benchmarks/results/{RECORDS[record]})"


def over_torch(result: dict) -> float:
    """Of one case of bench_quick.py or of bench.py."""
    return ratio(result, "ours") if "sides" in result else result["ratio"]


def of_batches(record: dict, group: str, least: int) -> str:
    """The ratios of the cases with a batch and so many hidden units at least."""
    return span(
        [
            over_torch(r)
            for r in record["results"]
            if r["group"] == group and r["hidden_size"] >= least and r["batch"] > 1
        ]
    )


class Gain(NamedTuple):
    """One line of the list and, where it has ratios, one row of the picture."""

    title: str
    text: str  # goes on where the title ends
    record: str
    row: str = ""  # the label in the picture
    ratios: Sequence[float] = ()  # time of torch's layer over ours, a case each


def mean_and_worst(ratios: Sequence[float]) -> str:
    return f"**{harness.geometric_mean(ratios):.2f}×** in the geometric mean, {min(ratios):.2f}× in the worst case"


def of_group(record: dict, group: str, field: str = "over_torch") -> list[float]:
    return [r[field] for r in record["results"] if r["group"] == group]


def beside_peers(suite: dict) -> Gain:
    """Inference of the suite: our layer over torch's, and the frozen one over the best of all peers."""
    results = [r for r in suite["results"] if r["group"] == "inference"]
    cases = [{name: side["median"] for name, side in r["sides"].items()} for r in results]
    ours = [over_torch(r) for r in results]
    frozen = [min(medians[name] for name in PEERS) / medians["frozen"] for medians in cases]
    return Gain(
        "Inference",
        f" of {len({r['case'] for r in results})} shapes from one step to B 512, with AVX-512: {mean_and_worst(ours)}; "
        f"frozen, over the best of torch, ONNX Runtime and OpenVINO: {mean_and_worst(frozen)}.",
        "suite",
        "inference, AVX-512",
        ours,
    )


def on_matrix_units(suite: dict) -> list[Gain]:
    """bfloat16, and float32 with at least 16 rows and 128 units, over torch's layer in the same dtype."""
    float32, half = (
        [[ratio for threads in (1, 2) for ratio in ratios_of(suite, goal, threads)] for goal in goals]
        for goals in (GOALS[:2], GOALS[2:4])
    )
    return [
        Gain(
            "bfloat16",
            f" on a processor with matrix units (AMX), over torch's bfloat16, {len(half[0])} cases: "
            f"{mean_and_worst(half[0])}; training {mean_and_worst(half[1])}.",
            "suite_amx",
            "bfloat16, AMX",
            half[0] + half[1],
        ),
        Gain(
            "float32 on matrix units",
            f", with B >= 16 and H >= 128 and an error below that of float32 arithmetic: {mean_and_worst(float32[0])}; "
            f"training {mean_and_worst(float32[1])}.",
            "suite_amx",
            "float32, AMX, B >= 16, H >= 128",
            float32[0] + float32[1],
        ),
    ]


def gains(records: dict[str, dict]) -> list[Gain]:
    """What the layer gains: one for each use, the most telling first."""
    quick, contract = records["avx512"], records["contract"]
    packed = of_group(contract, "packed")
    share = next(r["share_of_rows"] for r in contract["results"] if r["group"] == "packed")
    rollouts = of_group(contract, "rollout")
    learning = [
        r["resets_over_torch"] for r in contract["results"] if r["group"] == "rollout" and r["training"]
    ]
    resets = [r["over_torch"]["ratio"] for r in records["torchrl"]["results"]]
    cut = [r["over_pad"]["ratio"] for r in records["torchrl"]["results"]]
    steps = of_group(quick, "step", "ratio")
    streams = [
        r
        for r in records["contract_amx"]["results"]
        if r["group"] == "frozen" and r["shape"].startswith("stream")
    ]
    frozen = [r["as_they_are_over_torch"] for r in streams]
    itself = [r["as_they_are_over_ours"] for r in streams]
    int8 = [r["int8_over_ours"] for r in streams if r["shape"] in ("stream-H512", "stream-H1024")]
    training = of_group(quick, "training", "ratio")
    cells = of_group(contract, "cell")
    memory = next(line for line in quick["summary"] if line["group"] == "memory")
    large = [
        r["as_they_are_over_ours"] for r in records["frozen"]["results"] if r["shape"].startswith("freeze")
    ]
    busy = records["busy"]["results"]
    bursts = {name for r in busy for name in r if "_in_" in name}

    def longer(side: str, neighbours: int) -> str:
        return span([r[f"{side}_beside_{neighbours}"] for r in busy])

    def in_bursts(figure: str) -> list[float]:
        return [r[name] for r in busy for name in bursts if name.startswith(f"{figure}_beside_")]

    return [
        Gain(
            "Ragged batches",
            f": a `PackedSequence` that has {share:.0%} of the rows of the padded batch runs **{span(packed)}** as "
            "fast as in torch.",
            "contract",
            "ragged batches",
            packed,
        ),
        Gain(
            "Recurrent policies",
            f", 1 to 32 environments: a loop over the steps is **{span(rollouts)}** as fast with this layer in the "
            f"place of torch's, acting and learning; learning by one call with `resets` **{span(learning)}**.",
            "contract",
            "policies: one call with resets",
            learning,
        ),
        Gain(
            "Resets",
            f" inside a sequence, in TorchRL's `LSTMModule`: one call with `resets` is **{span(resets)}** as fast as "
            f"torch's layer, which needs the rows cut at each reset, and {span(cut)} as fast as this layer on cut "
            "rows.",
            "torchrl",
            "resets in TorchRL's module",
            resets,
        ),
        Gain(
            "One step",
            f" with carried state, batch 1, H 128: **{span(steps)}** as fast, by a call or by `step()`.",
            "avx512",
            "one step",
            steps,
        ),
        Gain(
            "Frozen",
            f" layers compute one step **{span(frozen)}** as fast as torch, H 16 to 1024, and {span(itself)} as fast "
            f"as before freezing; with int8 weights {span(int8)} as fast as before it, H 512 and 1024. Large layers, "
            f"H 256 to 1024 with 1 to 64 rows, {len(large)} cases: {span(large)} as fast as before freezing "
            f"({linked('frozen')}).",
            "contract_amx",
            "one step, frozen",
            frozen,
        ),
        *on_matrix_units(records["suite_amx"]),
        Gain(
            "Training step",
            f" with AVX-512, {len(training)} cases: {mean_and_worst(training)}.",
            "avx512",
            "training step, AVX-512",
            training,
        ),
        beside_peers(records["suite"]),
        Gain(
            "LSTMCell",
            f", {len(cells)} cases of B 1 to 64 and H 64 to 1024, with and without gradients: {mean_and_worst(cells)}; "
            f"with AMX {mean_and_worst(of_group(records['contract_amx'], 'cell'))} "
            f"({linked('contract_amx')}).",
            "contract",
            "LSTMCell, AVX-512",
            cells,
        ),
        Gain(
            "Memory",
            f": the peak of a training step is **{memory['geometric_mean']:.2f}** of torch's in the mean, "
            f"{memory['worst']:.2f} in the worst of {memory['cases']} cases.",
            "avx512",
        ),
        Gain(
            "A busy host",
            f", two threads on two cores. Beside one other program a call takes {longer('ours', 1)} its idle time, "
            f"torch's {longer('torch', 1)}; beside two programs {longer('ours', 2)}, torch's {longer('torch', 2)}. "
            "Beside programs that are busy a fifth or a half of the time, in bursts of 5 to 50 ms, a call keeps "
            f"{harness.geometric_mean(in_bursts('kept')):.2f} times the share of its idle speed that torch's keeps, in "
            f"the geometric mean, and is {span(in_bursts('over_torch'))} as fast as torch's.",
            "busy",
        ),
    ]


def faster(records: dict[str, dict]) -> str:
    return "\n".join(f"- **{g.title}**{g.text} {linked(g.record)}" for g in gains(records))


def pictures(records: dict[str, dict]) -> Iterator[tuple[str, Any]]:
    """A row for each gain: its cases, and their geometric mean."""
    from .plots import canvas, dots, rows_of_shapes

    found = [gain for gain in gains(records) if gain.ratios]
    rows = [gain.row for gain in found]
    figure, panels = canvas(1, 1, 0.42 * len(rows) + 1.1)
    axes = panels[0][0]
    means = [harness.geometric_mean(gain.ratios) for gain in found]
    dots(axes, rows, [(g.row, ratio) for g in found for ratio in g.ratios], color="#4477aa", alpha=0.35)
    dots(axes, rows, list(zip(rows, means, strict=True)), color="#223355", marker="D")
    rows_of_shapes([axes], rows, [ratio for gain in found for ratio in gain.ratios])
    for gain, mean in zip(found, means, strict=True):
        place = (max(gain.ratios), rows.index(gain.row))
        axes.annotate(f"{mean:.1f}×", place, (10, 0), textcoords="offset points", va="center", fontsize=12)
    axes.tick_params(labelsize=12)
    axes.set_xlabel("speed over torch.nn.LSTM: each case, and the geometric mean", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(", ".join(f"{row} {mean:.4g}" for row, mean in zip(rows, means, strict=True)))
    yield "gains", figure


def not_faster(records: dict[str, dict]) -> str:
    """Where the layer gains nothing, or loses."""

    lines = [
        f"{of_batches(records[record], 'inference', LARGE)} in inference and "
        f"{of_batches(records[record], 'training', LARGE)} in training with {name} ({linked(record)})"
        for record, name in (("suite", "AVX-512"), ("avx2", "AVX2"))
    ]
    cells = of_group(records["contract_amx"], "cell")
    slower = [ratio for ratio in cells if ratio < 1]
    without = [r["bfloat16_over_torch"] for r in records["contract"]["results"] if r["group"] == "16-bit"]
    return "\n".join(
        [
            f"- **H >= {LARGE} with a batch, without matrix units**: about as fast as torch, {'; '.join(lines)}.",
            f"- **bfloat16** without matrix units: {span(without)} of torch's speed on a processor with bfloat16 "
            f"instructions ({linked('contract')}).",
            f"- **LSTMCell with AMX**: {len(slower)} of {len(cells)} cases {'is' if len(slower) == 1 else 'are'} "
            f"slower than torch's, {min(slower):.2f}× in the worst ({linked('contract_amx')}).",
        ]
    )
