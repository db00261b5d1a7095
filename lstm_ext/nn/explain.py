"""Explains which kernels would compute a layer on a device, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..call import cuda_choice
from ..layer import cuda_kernels, route
from ..native import config, loader
from ..options import OPTIONS
from .recurrent import RecurrentLayer


class Explanation(str):
    """The answer of :func:`explain`."""

    data: dict[str, Any]


def explain(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Says in words which kernels would compute a layer for an input of this shape, and why. Nothing is computed.

    Args:
        module: an LSTM, a GRU or a cell of these, of torch or of this package.
        input_shape: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I); of a cell (B, I) or (I).
        device: one of torch's ("cpu", "cuda:1", "mps"), or the name of a GPU that is not here: A100, A30, A10,
            RTX 3090, L4, RTX 4090, H100, H200, B200, RTX 5090. None is the device of the parameters. Nothing has been
            measured on a GPU that is not here.
        dtype: float32, float64, bfloat16 or float16. None is the dtype of the parameters.

    Returns:
        a string, with the attribute ``data``: a dict. ``module``, ``device``, ``dtype`` and ``training`` say what was
        asked. ``layers`` is a list with a dict for each layer: ``kernel``, ``summary``, ``reasons``, and what the
        planner of the backend says. For a GPU, ``facts`` has what the planner knows of it, in the units of
        csrc/cuda/gpu_plan.h.

    Raises:
        TypeError: ``module`` is no such layer.
        ValueError: another argument does not fit.
    """
    data = _data(module, input_shape, device, dtype)
    lines = [
        f"{data['module']}, input {tuple(input_shape)}, {data['dtype']}, on {data['device']}"
        f"{', in training' if data['training'] else ', in inference'}:"
    ]
    for layer in data["layers"]:
        lines.append(f"  layer {layer['layer']}: {layer['summary']}")
        lines += [f"    {reason}" for reason in layer["reasons"]]
    explanation = Explanation("\n".join(lines))
    explanation.data = data
    return explanation


def _data(
    module: nn.Module,
    input_shape: Sequence[int],
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    steps, batch = _steps_and_batch(module, tuple(input_shape))
    parameter = next(module.parameters())
    dtype = parameter.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    extension = loader.extension()
    name, facts, found = _device(extension, parameter.device if device is None else device, dtype)
    data: dict[str, Any] = {
        "module": f"{type(module).__name__}({module.input_size}, {module.hidden_size})",
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "training": module.training,
        "layers": [],
    }
    if facts is not None:
        data["facts"] = facts
    hidden_size: Any = module.hidden_size
    output = (1 + getattr(module, "bidirectional", False)) * (getattr(module, "proj_size", 0) or hidden_size)
    for layer in range(getattr(module, "num_layers", 1)):
        sizes: dict[str, Any] = {
            "steps": steps,
            "batch": batch,
            "input_size": output if layer else module.input_size,
            "hidden_size": hidden_size,
        }
        if extension is None:
            of_layer = _without_kernels(module, str(loader.status().reason))
        elif name != "cpu" and (facts is None or _is_gru(module)):
            of_layer = _without_kernels(
                module, f"there are no kernels {'of a GRU ' * _is_gru(module)}for {name}"
            )
        elif facts is None:
            of_layer = _on_cpu(extension, module, sizes, dtype)
        else:
            of_layer = _on_cuda(extension, module, sizes, dtype, facts, found)
        data["layers"].append({"layer": layer, **sizes, **of_layer})
    return data


def _steps_and_batch(module: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    is_cell = isinstance(module, nn.RNNCellBase)
    is_layer = isinstance(module, nn.RNNBase) and module.mode in ("LSTM", "GRU")
    if not is_layer and not (is_cell and _gates(module) in (3, 4)):
        raise TypeError(f"module: expected an LSTM, a GRU or a cell of these, got {type(module).__name__}")
    wanted = "(B, I) or (I)" if is_cell else "(T, B, I), (B, T, I) with batch_first, or (T, I)"
    if len(shape) not in ((1, 2) if is_cell else (2, 3)) or min(shape) < 1 or shape[-1] != module.input_size:
        raise ValueError(
            f"input_shape: expected {wanted} with I = {module.input_size} and sizes of at least 1, got {shape}"
        )
    if is_cell:
        return 1, shape[0] if len(shape) == 2 else 1
    if len(shape) == 2:
        return shape[0], 1
    return (shape[1], shape[0]) if module.batch_first else (shape[0], shape[1])


def _gates(cell: Any) -> float:
    return getattr(cell, "weight_ih", torch.empty(0)).size(0) / (cell.hidden_size or 1)


def _is_gru(module: Any) -> bool:
    return _gates(module) == 3 if isinstance(module, nn.RNNCellBase) else module.mode == "GRU"


def _device(
    extension: Any, device: str | torch.device, dtype: torch.dtype
) -> tuple[str, dict[str, Any] | None, dict[str, Any]]:
    """The device's name, the facts that a GPU's planner needs, and what was found out on a GPU that is here."""
    known = {} if extension is None else {facts["name"]: facts for facts in extension.cuda_devices()}
    if device in known:
        return str(device), known[str(device)], {}
    try:
        found = torch.device(device)
    except RuntimeError:
        reason = f"cards have names where the extension is loaded, and it is not: {loader.status().reason}"
        cards, why = (f" or one of {', '.join(known)}", "") if known else ("", f"; {reason}")
        raise ValueError(f"device: expected a device of torch{cards}, got {device!r}{why}") from None
    if found.type == "meta" and known:
        raise ValueError("device: expected one that computes, got meta")
    if found.type != "cuda" or not known:
        return str(found), None, {}
    if not torch.cuda.is_available():
        raise ValueError(f"device: {found}: torch finds no GPU here; name one of {', '.join(known)}")
    index = torch.cuda.current_device() if found.index is None else found.index
    found = torch.device("cuda", index)
    outcomes = {name: cuda_kernels.outcome(found, name, dtype) for name in config.TRIED_CUDA_KERNELS}
    here = {
        "choices": cuda_choice.recorded(found),
        "outcomes": outcomes,
        "problem": cuda_kernels.why_not(index),
    }
    return f"{found}, {torch.cuda.get_device_name(found)}", extension.cuda_facts(index), here


def _has_no_options(module: nn.Module) -> bool:
    """Whether torch's operator computes it. A layer of torch stands for what `convert` makes of it."""
    return not isinstance(module, RecurrentLayer) or not (module._frozen or module._requested)


def _options(module: nn.Module) -> list[str]:
    """Those that change a call."""
    return list(module._requested or ()) if isinstance(module, RecurrentLayer) else []


def _by_torch(module: nn.Module) -> dict[str, Any]:
    calls = "" if isinstance(module, nn.RNNCellBase) else ", one call for all layers"
    return {"kernel": None, "summary": f"torch's own operator{calls}"}


def _without_kernels(module: nn.Module, reason: str) -> dict[str, Any]:
    options = _options(module)
    if loader.wants_equations() or options:
        reasons = [f"torch's operator has no {', '.join(options)}"] if options else []
        return {"kernel": None, "summary": "the equations in plain PyTorch", "reasons": [reason, *reasons]}
    return {**_by_torch(module), "reasons": [reason]}


def _on_cuda(
    extension: Any,
    module: Any,
    sizes: dict[str, int],
    dtype: torch.dtype,
    facts: dict[str, Any],
    found: dict[str, Any],
) -> dict[str, Any]:
    if found.get("problem"):
        return _without_kernels(module, found["problem"])
    num_layers = getattr(module, "num_layers", 0)
    of_layer = (module.hidden_size, getattr(module, "proj_size", 0), num_layers)
    mode = (getattr(module, "bidirectional", False), module.training, False)
    shape = cuda_choice.class_of(dtype, *of_layer, *mode, batch=sizes["batch"], steps=sizes["steps"])
    # Nothing is known of a card that is not here.
    choice, outcomes = found.get("choices", {}).get(shape.key), found.get("outcomes", {})
    draws_masks = num_layers > 1 and bool(module.dropout) and module.training
    ours, why = cuda_choice.way(draws_masks, lambda: choice) if _has_no_options(module) else (True, "")
    taken = choice if isinstance(why, cuda_choice.Choice) else None

    def plan_of(kernel: str, backward: bool = False) -> dict[str, Any]:
        return extension.cuda_plan(
            **{**shape.layer, **sizes},
            device=facts,
            normalised=bool(getattr(module, "layer_norm", False)),
            cell_options=any(OPTIONS[name].cell for name in _options(module)),
            backward=backward,
            options=bool(getattr(module, "zoneout", None) or getattr(module, "recurrent_dropout", 0)),
            kernel=kernel,
            measured="" if taken is None else taken.kernel,
            **{f"{name}_outcome": was_right for name, was_right in outcomes.items()},
        )

    request = config.requested_cuda_kernel()
    plan = plan_of(request)
    if module.training:
        plan["backward"] = plan_of(request, backward=True)
    if not ours:
        by_torch = {**plan, **_by_torch(module), "kernel": "torch", "reasons": [str(why)]}
        if why == cuda_choice.NOT_MEASURED:
            by_torch["summary"] += ", until it is measured on this device"
            for kernel in (*reversed(config.TRIED_CUDA_KERNELS), "stepwise"):
                passes = [plan_of(kernel), *([plan_of(kernel, backward=True)] if module.training else [])]
                by_torch["reasons"].append(_candidate(kernel, passes, outcomes.get(kernel) is False))
        return by_torch
    if plan["problem"]:
        return {**plan, "kernel": None, "summary": f"nothing: {plan['problem']}", "reasons": []}
    reasons = [*plan["reasons"], *([] if taken is None else [str(taken)])]
    if module.training:
        reasons.append(f"backward, {plan['backward']['kernel']}: {plan['backward']['reasons'][0]}")
    return {**plan, "summary": f"{plan['kernel']}: {_described(plan)}", "reasons": reasons}


def _candidate(kernel: str, passes: list[dict[str, Any]], was_wrong: bool) -> str:
    """Whether a kernel can run. ``passes``: its plans, forward and perhaps backward."""
    if was_wrong:
        return f"{kernel} is not taken: it was wrong on this device"
    problems = [
        {"persistent": p["persistent"]["problem"], "step": p["step_problem"]}.get(kernel) for p in passes
    ]
    if problems[0]:
        return f"{kernel} cannot run: {problems[0]}"
    backward = f"; backward it cannot: {problems[-1]}" if problems[-1] else ""
    return f"{kernel} can run: {_described(passes[0])}{backward}"


def _described(plan: dict[str, Any]) -> str:
    """How the kernel of a plan computes a time step."""
    if plan["kernel"] == "step":
        return (
            f"each time step is one kernel of {plan['blocks']} blocks, {plan['rows_of_block']} rows and 16 units a "
            "block"
        )
    if plan["kernel"] == "persistent":
        of = plan["persistent"]
        return (
            f"all time steps of a chunk are one kernel of {of['blocks']} blocks, in {of['groups']} groups that have "
            f"all hidden units of their rows, {of['rows']} rows at once"
        )
    products, kernels = plan["products"], plan["launches"] - plan["products"]
    return (
        f"each time step is {'a product' if products == 1 else f'{products} products'} of cuBLAS and "
        f"{'a kernel' if kernels == 1 else f'{kernels} kernels'}"
    )


def _on_cpu(extension: Any, module: nn.Module, sizes: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    threads = torch.get_num_threads()
    plan = extension.cpu_plan(
        **sizes,
        proj_size=getattr(module, "proj_size", 0),
        threads=threads,
        save=module.training,
        float64=dtype == torch.float64,
        bf16_parts={torch.float16: 2, torch.bfloat16: 1}.get(dtype, 3),
    )
    rows, units = plan["forward_batch_groups"], plan["forward_hidden_groups"]
    workers = rows * units
    reasons = [
        f"{workers} of {threads} threads"
        + (f": {rows} share the batch" if rows > 1 else "")
        + (f", {units} share the hidden units and meet once a step" if units > 1 else ""),
        _how_weights_are_read(module, plan),
    ]
    if plan["recurrent_bf16_parts"]:
        reasons.append(
            f"products run on the tile engine, each operand as {plan['recurrent_bf16_parts']} bfloat16 numbers"
        )
    capability = extension.cpu_capability()
    if _is_plain(module):
        for row in route.torch_is_faster(dtype, sizes["steps"], sizes["batch"], sizes["hidden_size"]):
            if row.training == module.training:
                return {
                    **plan,
                    "kernel": "torch",
                    "summary": "torch's own operator, if gradients are requested: one call for the whole stack",
                    "reasons": [f"it is faster than the kernels here, by {' and '.join(row.records)}"],
                }
    return {
        **plan,
        "kernel": capability,
        "summary": f"{capability}: one call of the CPU kernels for all time steps",
        "reasons": reasons,
    }


def _how_weights_are_read(module: Any, plan: dict[str, Any]) -> str:
    if getattr(module, "_frozen", ()):
        rounded = {torch.bfloat16: ", in bfloat16", torch.int8: ", in int8"}.get(module.frozen_weights, "")
        return f"weights were packed when the layer was frozen{rounded}"
    if plan["pack"]:
        return "weights are copied in the order in which they are read, once a call"
    return "weights are read as they are: each is used too seldom to be copied"


def _is_plain(module: Any) -> bool:
    """Whether it is a layer that `route.prefers_torch` may give to torch's operator."""
    if isinstance(module, nn.RNNCellBase) or module.mode == "GRU":
        return False
    return not module.bidirectional and not module.proj_size and _has_no_options(module)
