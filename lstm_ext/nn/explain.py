"""Explains which kernels would compute a layer on a device, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..call import measured
from ..layer import first_use, route
from ..native import config, cuda, loader
from ..options import OPTIONS
from .lstm import LSTM

__all__ = ["explain"]

_OUTCOMES = tuple(f"{kernel}_outcome" for kernel in config.TRIED_CUDA_KERNELS)


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
        module: an ``LSTM`` or ``LSTMCell``, of torch or of this package.
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
        TypeError: ``module`` is no LSTM.
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
    if extension is None:
        name, facts = _device_of_torch(parameter.device if device is None else device), None
    else:
        name, facts = _device(extension, parameter.device if device is None else device, dtype)
    data: dict[str, Any] = {
        "module": f"{type(module).__name__}({module.input_size}, {module.hidden_size})",
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "training": module.training,
        "layers": [],
    }
    if facts is not None:
        data["facts"] = {
            name: fact for name, fact in facts.items() if name not in ("problem", "choices", *_OUTCOMES)
        }
    directions = 2 if getattr(module, "bidirectional", False) else 1
    hidden_size: Any = module.hidden_size
    output = directions * (getattr(module, "proj_size", 0) or hidden_size)
    for layer in range(getattr(module, "num_layers", 1)):
        sizes: dict[str, Any] = {
            "steps": steps,
            "batch": batch,
            "input_size": output if layer else module.input_size,
            "hidden_size": hidden_size,
        }
        if extension is None:
            of_layer = _without_kernels(module, str(loader.status().reason))
        elif facts is None and name != "cpu":
            of_layer = _without_kernels(module, f"there are no kernels for {name}")
        elif facts is None:
            of_layer = _on_cpu(extension, module, sizes, dtype)
        else:
            of_layer = _on_cuda(extension, module, sizes, dtype, directions, facts)
        data["layers"].append({"layer": layer, **sizes, **of_layer})
    return data


def _steps_and_batch(module: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    is_cell = isinstance(module, nn.RNNCellBase)
    is_layer = isinstance(module, nn.RNNBase) and module.mode == "LSTM"
    if not is_layer and not (
        is_cell and getattr(module, "weight_ih", torch.empty(0)).shape[:1] == (4 * module.hidden_size,)
    ):
        raise TypeError(f"module: expected an LSTM or LSTMCell, got {type(module).__name__}")
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


def _device_of_torch(device: str | torch.device) -> str:
    """The name of a device where there is no extension, which knows those of cards."""
    try:
        return str(torch.device(device))
    except RuntimeError:
        raise ValueError(
            f"device: expected a device of torch, got {device!r}; cards have names where the extension is loaded, and "
            f"it is not: {loader.status().reason}"
        ) from None


def _device(
    extension: Any, device: str | torch.device, dtype: torch.dtype
) -> tuple[str, dict[str, Any] | None]:
    """The device's name, and the facts that a GPU's planner needs."""
    known = {facts["name"]: facts for facts in extension.cuda_devices()}
    if device in known:
        return str(device), known[str(device)]
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device: expected a device of torch or one of {', '.join(known)}, got {device!r}"
        ) from None
    if found.type == "meta":
        raise ValueError("device: expected one that computes, got meta")
    if found.type != "cuda":
        return str(found), None
    if not torch.cuda.is_available():
        raise ValueError(f"device: {found}: torch finds no GPU here; name one of {', '.join(known)}")
    index = torch.cuda.current_device() if found.index is None else found.index
    found = torch.device("cuda", index)
    return f"{found}, {torch.cuda.get_device_name(found)}", {
        **extension.cuda_facts(index),
        "problem": cuda.problem(index) or (None if first_use.is_known_right(found) else first_use.NOT_RIGHT),
        "choices": measured.recorded(found),
        **{
            f"{kernel}_outcome": first_use.outcome(found, kernel, dtype)
            for kernel in config.TRIED_CUDA_KERNELS
        },
    }


def _is_measured(module: nn.Module) -> bool:
    """Whether torch's operator or a kernel computes plain calls, whichever was faster."""
    return _has_no_options(module) and not cuda.is_requested()


def _has_no_options(module: nn.Module) -> bool:
    """Whether torch's operator computes it. A layer of torch stands for what `convert` makes of it."""
    return not isinstance(module, LSTM) or not (module._frozen or module._requested)


def _choice(
    module: Any, sizes: dict[str, int], dtype: torch.dtype, choices: dict[str, measured.Choice]
) -> measured.Choice | None:
    """The measurement of plain calls of this layer, if there is one."""
    shape = measured.class_of(
        dtype,
        module.hidden_size,
        getattr(module, "proj_size", 0),
        getattr(module, "num_layers", 0),
        getattr(module, "bidirectional", False),
        module.training,
        sizes["batch"],
        sizes["steps"],
        packed=False,
    )
    return choices.get(shape.key)


def _options(module: nn.Module) -> list[str]:
    """Those that change a call."""
    return list(module._requested or ()) if isinstance(module, LSTM) else []


def _without_kernels(module: nn.Module, reason: str) -> dict[str, Any]:
    options = _options(module)
    if loader.wants_equations() or options:
        reasons = [f"torch's operator has no {', '.join(options)}"] if options else []
        return {"kernel": None, "summary": "the equations in plain PyTorch", "reasons": [reason, *reasons]}
    calls = "" if isinstance(module, nn.RNNCellBase) else ", one call for all layers"
    summary = f"torch's own operator{calls}"
    return {"kernel": None, "summary": summary, "reasons": [reason]}


def _on_cuda(
    extension: Any,
    module: Any,
    sizes: dict[str, int],
    dtype: torch.dtype,
    directions: int,
    facts: dict[str, Any],
) -> dict[str, Any]:
    facts = dict(facts)
    problem, choices = facts.pop("problem", None), facts.pop("choices", {})  # none of a card that is not here
    outcomes = {name: facts.pop(name, None) for name in _OUTCOMES}
    if problem:
        return _without_kernels(module, problem)
    calls = "" if isinstance(module, nn.RNNCellBase) else ", one call for all layers"
    by_torch = {"kernel": "torch", "summary": f"torch's own operator{calls}"}
    choice, is_measured = None, _is_measured(module)
    if is_measured:
        if getattr(module, "dropout", 0) and module.training and module.num_layers > 1:
            return {**by_torch, "reasons": ["it draws the masks of the dropout between layers"]}
        choice = _choice(module, sizes, dtype, choices)
        if choice is not None and not choice.ours:
            return {**by_torch, "reasons": [str(choice)]}

    def plan_of(backward: bool) -> dict[str, Any]:
        return extension.cuda_plan(
            device=facts,
            **sizes,
            directions=directions,
            dtype=str(dtype).removeprefix("torch."),
            tf32=dtype == torch.float32 and measured.allows_tf32(),
            projected=bool(getattr(module, "proj_size", 0)),
            normalised=bool(getattr(module, "layer_norm", False)),
            cell_options=any(OPTIONS[name].cell for name in _options(module)),
            backward=backward,
            options=bool(getattr(module, "zoneout", None) or getattr(module, "recurrent_dropout", 0)),
            kernel=config.requested_cuda_kernel(),
            measured="" if choice is None else choice.backward if backward else choice.forward,
            **outcomes,
        )

    plan = plan_of(backward=False)
    if plan["problem"]:
        return {**plan, "kernel": None, "summary": f"nothing: {plan['problem']}"}
    if plan["kernel"] == "step":
        summary = (
            f"step: each time step is one kernel of {plan['blocks']} blocks, {plan['rows_of_block']} rows and 16 "
            "units a block"
        )
    elif plan["kernel"] == "persistent":
        of = plan["persistent"]
        summary = f"persistent: all time steps of a chunk are one kernel of {of['blocks']} blocks, " + (
            f"in {of['groups']} groups that have all hidden units of their rows"
            if of["exchange"] == "mailbox"
            else "each with all hidden units of 8 rows"
        )
    else:
        products, kernels = plan["products"], plan["launches"] - plan["products"]
        summary = (
            f"stepwise: each time step is {'a product' if products == 1 else f'{products} products'} of cuBLAS and "
            f"{'a kernel' if kernels == 1 else f'{kernels} kernels'}"
        )
        if directions == 2:
            summary += ", both directions together"
    reasons = list(plan["reasons"])
    if choice is not None:
        reasons.append(str(choice))
    if module.training:
        backward = plan_of(backward=True)
        plan["backward"] = backward
        reasons.append(f"backward, {backward['kernel']}: {backward['reasons'][0]}")
    if is_measured and choice is None:
        by_torch["summary"] += ", until it is measured on this device"
        measures = "the first eager call measures it and the kernels, and then the faster one computes"
        return {**plan, **by_torch, "reasons": [measures, f"of the kernels, {summary}", *reasons]}
    return {**plan, "summary": summary, "reasons": reasons}


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
    is_cell = isinstance(module, nn.RNNCellBase)
    return not is_cell and not module.bidirectional and not module.proj_size and _has_no_options(module)
