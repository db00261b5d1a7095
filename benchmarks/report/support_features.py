"""The rows of the support table: each feature as a module and its arguments, and what it must give, in float64.

What it must give is computed by `lstm_ext.reference`, layer by layer, in float64 on the CPU. Random masks are drawn
here, as docs/options.md says that the layer draws them, and given to the equations as numbers. All values are multiples
of 1/64 below 2 in size, which all dtypes hold exactly: only what the layer itself rounds makes a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from lstm_ext import reference
from lstm_ext.layer.activations import activation_text
from lstm_ext.layer.layer_call import LayerOptions

# At import, so that nothing that is planted or counted in the package gets here.
_layer_of_equations = reference.lstm_layer

T, B, I, H = 5, 3, 3, 4
PROJECTION = 3
SEED = 7
SAMPLES = 2  # of what vmap maps over
# For each sample. Packed data have the first; no sequence of them is empty.
LENGTHS = ([3, 5, 2], [4, 1, 0])
RESETS = (
    [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]],
    [[1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]],
)
EVERYTHING = {
    "num_layers": 2,
    "bidirectional": True,
    "proj_size": PROJECTION,
    "dropout": 0.5,
    "recurrent_dropout": 0.5,
    "zoneout": (0.2, 0.3),
    "layer_norm": True,
    "forget_bias": 1.0,
}
IN_ALL_CALLS = ("lengths", "resets", "reset_state", "return_cell_states", "return_gates")


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        title: in the table.
        options: of the constructor.
        call: the arguments of the call, by name.
        form: how the layer is called: "forward", "packed", "step", or "cell" for an LSTMCell.
        training: the mode of the module; False where this is what the row is about.
    """

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    call: tuple[str, ...] = ()
    form: str = "forward"
    training: bool = True

    @property
    def layers(self) -> int:
        return self.options.get("num_layers", 1)

    @property
    def directions(self) -> int:
        return 2 if self.options.get("bidirectional") else 1

    @property
    def state(self) -> int:
        return self.options.get("proj_size", 0) or H

    @property
    def zoneout(self) -> tuple[float, float]:
        rate = self.options.get("zoneout", 0.0)
        return rate if isinstance(rate, tuple) else (rate, 0.0)


FEATURES: dict[str, Feature] = {
    "plain": Feature("dense input"),
    "packed": Feature("`PackedSequence`", form="packed"),
    "bidirectional": Feature("`bidirectional`", {"bidirectional": True}),
    "projection": Feature("`proj_size`", {"proj_size": PROJECTION}),
    "layers": Feature("several layers, `dropout`", {"num_layers": 2, "dropout": 0.5}),
    "step": Feature("`step()`", {"num_layers": 2}, form="step"),
    "cell": Feature("`LSTMCell`", form="cell"),
    "lengths": Feature("`lengths`", call=("lengths",)),
    "mask": Feature("`mask`", call=("mask",)),
    "resets": Feature("`resets`", call=("resets",)),
    "reset_state": Feature("`reset_state`", call=("resets", "reset_state")),
    "return_cell_states": Feature("`return_cell_states`", call=("return_cell_states",)),
    "return_gates": Feature("`return_gates`", call=("return_gates",)),
    "recurrent_dropout": Feature("`recurrent_dropout`", {"recurrent_dropout": 0.5}),
    "weight_dropout": Feature("`weight_dropout`", {"weight_dropout": 0.5}),
    "zoneout": Feature("`zoneout`", {"zoneout": (0.2, 0.3)}),
    "zoneout_eval": Feature("`zoneout`, evaluation", {"zoneout": (0.2, 0.3)}, training=False),
    "layer_norm": Feature("`layer_norm`", {"layer_norm": True}),
    "peephole": Feature("`peephole`", {"peephole": True}),
    "cell_clip": Feature("`cell_clip`", {"cell_clip": 0.3}),
    "coupled_gates": Feature("`coupled_gates`", {"coupled_gates": True}),
    "activations": Feature(
        "`gate_activation`, `cell_activation`",
        {"gate_activation": "hard_sigmoid", "cell_activation": "softsign"},
    ),
    "preactivation_clip": Feature("`preactivation_clip`", {"preactivation_clip": 0.4}),
    "forget_bias": Feature("`forget_bias`", {"forget_bias": 1.0}),
    "recompute": Feature("`recompute`", {"recompute": True}),
    "packed_extras": Feature(
        "`PackedSequence`, `resets`, `layer_norm`", {"layer_norm": True}, ("resets",), form="packed"
    ),
    "all": Feature("all but `recompute` together", EVERYTHING, IN_ALL_CALLS),
    "all_recompute": Feature("all together", EVERYTHING | {"recompute": True}, IN_ALL_CALLS),
}


class Called(nn.Module):
    """The feature's layer, with tensors for arguments and a tuple of tensors for a result."""

    def __init__(self, feature: Feature, names: Sequence[str]) -> None:
        super().__init__()
        self.form, self.names = feature.form, tuple(names)
        self.flags = tuple([name for name in feature.call if name.startswith("return_")])
        if feature.form == "cell":
            self.layer: Any = lstm_ext.LSTMCell(I, H, **feature.options)
        else:
            self.layer = lstm_ext.LSTM(I, H, **feature.options)
        self.train(feature.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        x, h, c = given["input"], given["h0"], given["c0"]
        if self.form in ("step", "cell"):
            outputs = []
            for t in range(x.size(0)):
                if self.form == "cell":
                    h, c = self.layer(x[t], (h, c))
                    y = h
                else:
                    y, (h, c) = self.layer.step(x[t], (h, c))
                outputs.append(y)
            return torch.stack(outputs), h, c
        call: dict[str, Any] = {name: given[name] for name in ("lengths", "mask", "resets") if name in given}
        call |= dict.fromkeys(self.flags, True)
        if "reset_h" in given:
            call["reset_state"] = given["reset_h"], given["reset_c"]
        if self.form == "packed":
            order = given["batch_sizes"], given["sorted_indices"], given["unsorted_indices"]
            x = PackedSequence(x, *order)
            if "resets" in call:
                call["resets"] = PackedSequence(call["resets"], *order)
        y, states, *extras = self.layer(x, (h, c), **call)
        y = y.data if isinstance(y, PackedSequence) else y
        return y, *states, *[e for group in extras for e in group if e is not None]


class LayerMasks(NamedTuple):
    """The random masks of one layer: dropout (T, B, D * P) of its input, recurrent (D, B, P), zoneout (D, T, B, .), and
    those of each direction's ``weight_hh``."""

    dropout: Tensor | None
    recurrent: Tensor | None
    zoneout: tuple[Tensor | float, Tensor | float]
    weights: list[Tensor]


class Problem:
    """A feature with numbers for all its tensors, in float64 on the CPU.

    Attributes:
        parameters: by name, as in `Called`.
        samples: for each sample of a vmap the arguments by name; everything else uses the first.
        cotangents: for each result, with which gradients begin.
        tangents: for each parameter and floating-point argument, the direction of other derivatives.
    """

    def __init__(self, feature: Feature) -> None:
        self.feature = feature
        # Of 24 draws, one in which the second derivatives of layer normalisation lose little: of so few numbers, some
        # lie so close together in others that float32 keeps four digits, in any order of operations.
        generator = torch.Generator().manual_seed(13)

        def draw(shape: Sequence[int], scale: float = 1.0) -> Tensor:
            x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale
            return (x * 64).round().clamp(-127, 127) / 64

        self.samples = [self._arguments(sample, draw) for sample in range(SAMPLES)]
        self.names = tuple(self.samples[0])
        layer = Called(feature, self.names)
        self.parameters = {}
        for name, p in layer.named_parameters():
            around = 1.0 if "gain" in name else 0.0
            self.parameters[name] = draw(p.shape, 0.2 if around else 0.5) + around
            if feature.options.get("forget_bias") is not None and ".bias_" in name:
                # What the constructor set is part of the feature: the equations get it from here.
                self.parameters[name][H : 2 * H] = (
                    feature.options["forget_bias"] if "bias_ih" in name else 0.0
                )
        self.floats = tuple([n for n in self.names if self.samples[0][n].is_floating_point()])
        leaves = {**self.parameters, **{name: self.samples[0][name] for name in self.floats}}
        self.tangents = {name: draw(x.shape) for name, x in leaves.items()}
        self.cotangents = [draw(y.shape) for y in self.results(self.leaves(), 0, self.masks(torch.float64))]

    def _arguments(self, sample: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        feature = self.feature
        sets = () if feature.form == "cell" else (feature.layers * feature.directions,)
        lengths = torch.tensor(LENGTHS[sample])
        arguments = {
            "input": draw((T, B, I)),
            "h0": draw((*sets, B, feature.state)),
            "c0": draw((*sets, B, H)),
        }
        if "reset_state" in feature.call:
            arguments |= {"reset_h": draw((*sets, B, feature.state)), "reset_c": draw((*sets, B, H))}
        if "lengths" in feature.call:
            arguments["lengths"] = lengths
        if "mask" in feature.call:
            arguments["mask"] = torch.arange(T).unsqueeze(1) < lengths
        if "resets" in feature.call:
            arguments["resets"] = torch.tensor(RESETS[sample], dtype=torch.bool)
        if feature.form == "packed":
            lengths = torch.tensor(LENGTHS[0])
            packed = pack_padded_sequence(arguments["input"], lengths, enforce_sorted=False)
            arguments["input"] = packed.data
            if "resets" in arguments:
                arguments["resets"] = pack_padded_sequence(
                    arguments["resets"], lengths, enforce_sorted=False
                ).data
            arguments |= {
                "batch_sizes": packed.batch_sizes,
                "sorted_indices": packed.sorted_indices,
                "unsorted_indices": packed.unsorted_indices,
            }
        return arguments

    def leaves(self, sample: int = 0) -> dict[str, Tensor]:
        """The parameters and the floating-point arguments."""
        return {**self.parameters, **{name: self.samples[sample][name] for name in self.floats}}

    def module(self, dtype: torch.dtype, device: str) -> Called:
        """With the parameters of the problem, except those that the constructor sets."""
        module = Called(self.feature, self.names)
        initial = {name: p.detach().clone() for name, p in module.named_parameters()}
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(self.parameters[name])
                if self.feature.options.get("forget_bias") is not None and ".bias_" in name:
                    p[H : 2 * H] = initial[name][H : 2 * H]
        return module.to(device, dtype)

    def arguments(self, dtype: torch.dtype, device: str, sample: int = 0) -> list[Tensor]:
        """Those of the module, in its dtype: copies. What PackedSequence holds on the CPU stays there."""
        arguments = []
        for name, x in self.samples[sample].items():
            to = "cpu" if name == "batch_sizes" else device
            arguments.append(x.to(to, dtype if x.is_floating_point() else x.dtype, copy=True))
        return arguments

    # ---- what it must give

    def masks(self, dtype: torch.dtype, device: str = "cpu", packed: bool = False) -> list[LayerMasks]:
        """Those that the module draws after `torch.manual_seed(SEED)`.

        Args:
            dtype: of the input of the layers.
            packed: whether rows are computed for the steps that count only, so that masks are drawn for these.
        """
        feature = self.feature
        if not feature.training:
            return self.evaluation_masks()
        torch.manual_seed(SEED)
        order, rows = torch.arange(B), None
        given = self.samples[0]
        if packed and ("lengths" in given or "mask" in given):
            lengths = given["lengths"] if "lengths" in given else given["mask"].sum(0)
            order = torch.sort(lengths, descending=True).indices[: int((lengths > 0).sum())]
            places = torch.arange(T * B).view(T, B)[:, order]
            rows = pack_padded_sequence(places, lengths[order]).data
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

        def by_step(draw: Callable[[tuple[int, ...]], Tensor], sets: tuple[int, ...], size: int) -> Tensor:
            """(*sets, T, B, size): drawn for all steps, or for those that count."""
            if feature.form == "packed":
                return draw((*sets, len(given["input"]), size)).cpu()
            if rows is None:
                return draw((*sets, T, B, size)).cpu()
            drawn = draw((*sets, len(rows), size)).cpu()
            full = torch.zeros(*sets, T * B, size, dtype=drawn.dtype)
            full[..., rows, :] = drawn
            return full.unflatten(-2, (T, B))

        def dropped(p: float, dtype: torch.dtype) -> Callable[[tuple[int, ...]], Tensor]:
            return lambda shape: F.dropout(torch.ones(shape, dtype=dtype, device=device), p)

        def kept(p: float) -> Callable[[tuple[int, ...]], Tensor]:
            return lambda shape: torch.rand(shape, device=device) < p

        layers = []
        for k in range(feature.layers):
            dropout = recurrent = None
            if k > 0 and feature.options.get("dropout"):
                size = feature.directions * feature.state
                dropout = by_step(dropped(feature.options["dropout"], dtype), (), size).double()
            weights = []
            if feature.options.get("weight_dropout"):
                draw = dropped(feature.options["weight_dropout"], wide)
                weights = [draw((4 * H, feature.state)).double().cpu() for _ in range(feature.directions)]
            if feature.options.get("recurrent_dropout"):
                recurrent = torch.ones(feature.directions, B, feature.state, dtype=torch.float64)
                draw = dropped(feature.options["recurrent_dropout"], wide)
                recurrent[:, order] = draw((feature.directions, len(order), feature.state)).double().cpu()
            zoneout = [
                by_step(kept(rate), (feature.directions,), size) if rate else 0.0
                for rate, size in zip(feature.zoneout, (feature.state, H), strict=True)
            ]
            layers.append(LayerMasks(dropout, recurrent, (zoneout[0], zoneout[1]), weights))
        return layers

    def evaluation_masks(self) -> list[LayerMasks]:
        return [LayerMasks(None, None, self.feature.zoneout, [])] * self.feature.layers

    def results(
        self, leaves: Mapping[str, Tensor], sample: int, masks: Sequence[LayerMasks]
    ) -> tuple[Tensor, ...]:
        """The equations on ``leaves``, in the order in which `Called` gives its results."""
        feature = self.feature
        given = {**self.samples[sample], **{name: leaves[name] for name in self.floats}}
        parameters = {name.removeprefix("layer."): leaves[name] for name in self.parameters}
        if feature.form == "cell":
            parameters = {f"{name}_l0": p for name, p in parameters.items()}
        x = given["input"]
        states = [given[name] for name in ("h0", "c0", "reset_h", "reset_c") if name in given]
        if feature.form == "cell":
            states = [s.unsqueeze(0) for s in states]
        if feature.form == "packed":
            states = [s.index_select(1, given["sorted_indices"]) for s in states]
        lengths = given.get("lengths")
        if "mask" in given:
            lengths = given["mask"].sum(0)
        resets = given.get("resets")
        if resets is not None and lengths is not None:
            resets = resets & (torch.arange(T).unsqueeze(1) < lengths)
        suffixes = ["", "_reverse"][: feature.directions]
        weight_names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        weight_names += ["weight_hr"] if feature.state != H else []
        norm_names = ["ln_gain_ih", "ln_gain_hh", "ln_gain_c", "ln_bias_c"]
        per_layer: list[list[Tensor]] = []
        for k in range(feature.layers):
            if masks[k].dropout is not None:
                x = x * masks[k].dropout
            own = slice(k * feature.directions, (k + 1) * feature.directions)
            h0, c0, *reset_state = [s[own] for s in states]
            norm, peephole = [], []
            if feature.options.get("layer_norm"):
                norm = [parameters[f"{n}_l{k}{suffix}"] for suffix in suffixes for n in norm_names]
            if feature.options.get("peephole"):
                peephole = [parameters[f"weight_c{n}_l{k}{suffix}"] for suffix in suffixes for n in "ifo"]
            reset_h, reset_c = reset_state or (None, None)
            zoneout = dict(zip("hc", masks[k].zoneout, strict=True))
            options = LayerOptions(
                resets=resets,
                reset_h=reset_h,
                reset_c=reset_c,
                lengths=lengths,
                recurrent_mask=masks[k].recurrent,
                **{f"keep_{s}": z for s, z in zoneout.items() if isinstance(z, Tensor)},
                **{f"zoneout_{s}": z for s, z in zoneout.items() if not isinstance(z, Tensor)},
                norm=tuple(norm),
                peephole=tuple(peephole),
                cell_clip=feature.options.get("cell_clip", 0),
                coupled_gates=feature.options.get("coupled_gates", False),
                activations=activation_text(
                    feature.options.get("gate_activation", "sigmoid"),
                    feature.options.get("cell_activation", "tanh"),
                ),
                preactivation_clip=feature.options.get("preactivation_clip", 0),
                return_cell_states="return_cell_states" in feature.call,
                return_gates="return_gates" in feature.call,
            )
            weights = [parameters[f"{n}_l{k}{suffix}"] for suffix in suffixes for n in weight_names]
            for d, mask in enumerate(masks[k].weights):
                place = d * len(weight_names) + weight_names.index("weight_hh")
                weights[place] = weights[place] * mask
            x, *others = _layer_of_equations(
                x, h0, c0, weights, given.get("batch_sizes"), True, feature.directions == 2, options
            )
            per_layer.append([o for o in others if o is not None])
        joined = [torch.cat(parts) for parts in zip(*per_layer, strict=True)]
        if feature.form == "packed":
            joined[:2] = [s.index_select(1, given["unsorted_indices"]) for s in joined[:2]]
        if feature.form == "cell":
            joined = [s.squeeze(0) for s in joined]
        return x, *joined

    def gradients(
        self, leaves: Mapping[str, Tensor], sample: int, masks: Sequence[LayerMasks]
    ) -> list[Tensor]:
        """Of all leaves, in their order, for the cotangents."""
        own = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        results = self.results(own, sample, masks)
        return list(
            torch.autograd.grad(
                results, list(own.values()), self.cotangents, allow_unused=True, materialize_grads=True
            )
        )

    def slope(self, function: Callable[..., Sequence[Tensor]], masks: Sequence[LayerMasks]) -> list[Tensor]:
        """The derivative of ``results`` or ``gradients`` along the tangents, from differences."""
        step = 2.0**-20
        sides = [
            function({name: x + s * self.tangents[name] for name, x in self.leaves().items()}, 0, masks)
            for s in (step, -step)
        ]
        return [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
