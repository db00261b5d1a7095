"""The base of LSTM and GRU: options, parameters, the way of a call, steps and pickles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..call.arguments import CallOptions, any_requested, request
from ..call.layout import (
    BATCH_FIRST,
    STEP,
    TIME_FIRST,
    UNBATCHED,
    UNBATCHED_STEP,
    JaggedLayout,
    Layout,
    PackedLayout,
)
from ..call.run import run, zero_states
from ..layer import route
from ..layer.layer_call import LayerOptions
from ..layer.tracing import is_jit_tracing, leaf_of_graph
from ..native import loader
from ..options import OPTIONS, CellParameters, HasOptions
from .mistakes import batched_states, check_arguments, unpack_hx
from .tools import KnownToTools

_NO_TRACE = (
    "torch.jit.trace and the older ONNX exporter take lstm_ext.{0} as torch.nn.{0}, and so without what that does "
    "not have (options of the layer, further arguments, step()): use torch.export, or lstm_ext.onnx for ONNX"
)


class RecurrentLayer(HasOptions, KnownToTools, nn.RNNBase):
    """The base of `lstm_ext.LSTM` and `lstm_ext.GRU`. ``mode`` is "LSTM" or "GRU", as in torch's layers."""

    # The frozen weights of a FrozenLSTM, see `call.arguments.Stack`.
    _frozen: Sequence[LayerOptions] = ()
    _native_options: list[Any] | None = None  # these in the extension's form

    def _construct(self, arguments: Sequence[Any], options: Any, device: Any, dtype: Any) -> None:
        """The constructor: ``arguments`` are those of ``torch.nn.RNNBase``; then the options, and their parameters."""
        # Called by name: in a subclass of torch's layer too, the next class would be torch's layer.
        nn.RNNBase.__init__(self, *arguments, device=device, dtype=dtype)  # type: ignore[misc]
        if options:
            self._set_options(options)
        for name, size, _ in self._cell_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self._layer_names = self._group_names()
        self._reset_options()

    def _names_of(self, parameters: CellParameters) -> list[list[str]]:
        """The names of parameters of the cells, one list per layer."""
        suffixes = ["", "_reverse"] if self.bidirectional else [""]
        kinds = parameters.kinds(self.bias)
        return [
            [f"{parameters.prefix}{kind}_l{k}{suffix}" for suffix in suffixes for kind in kinds]
            for k in range(self.num_layers)
        ]

    def _cell_parameters(self) -> list[tuple[str, int, float]]:
        """The names, sizes and initial values of the parameters of the cells that the options add."""
        found = []
        for option in self._given:
            parameters = OPTIONS[option].parameters
            if parameters is None:
                continue
            for names in self._names_of(parameters):
                for name, kind in zip(names, itertools.cycle(parameters.kinds(self.bias)), strict=False):
                    size = parameters.sizes[kind] * self.hidden_size
                    found.append((name, size, 0.0 if kind.startswith("bias") else parameters.initial))
        return found

    def _refuse_late(self, name: str) -> None:
        parameters = OPTIONS[name].parameters
        if (
            "_layer_names" in self.__dict__
            and parameters
            and self._names_of(parameters)[0][0] not in self._parameters
        ):
            raise ValueError(
                f"{name}: expected from the beginning, since it adds parameters: make a new layer"
            )

    def reset_parameters(self) -> None:
        """Initialise all parameters, as torch's layer does, then those that the options set."""
        super().reset_parameters()
        if "_layer_names" in self.__dict__:  # the constructor has come so far
            self._reset_options()

    def _reset_options(self) -> None:
        for name, _, initial in self._cell_parameters():
            nn.init.constant_(getattr(self, name), initial)
        if self.forget_bias is not None:
            gate = slice(self.hidden_size, 2 * self.hidden_size)
            with torch.no_grad():
                for name in [name for names in self._layer_names for name in names]:
                    if name.startswith("bias_"):
                        bias = getattr(self, name)
                        bias[gate] = self.forget_bias if name.startswith("bias_ih") else 0.0

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text + "".join([f", {name}={value}" for name, value in self._given.items()])

    def _group_names(self) -> tuple[tuple[str, ...], ...]:
        """The names of the parameters, one tuple per layer."""
        sets = self._all_weights
        if self.bidirectional:
            return tuple((*sets[k], *sets[k + 1]) for k in range(0, len(sets), 2))
        return tuple(tuple(names) for names in sets)

    def flatten_parameters(self) -> None:
        """Same as torch's on a GPU, where torch's operator may compute the layer; the kernels read any parameters."""
        weight = self._parameters.get(self._all_weights[0][0])
        if weight is not None and weight.is_cuda:
            super().flatten_parameters()

    def _forward(self, input: Any, hx: Any, call_options: CallOptions | None) -> Any:
        if isinstance(input, Tensor):
            rank = input.dim()
            if input.is_nested:
                layout: Layout = JaggedLayout(input)
            elif rank == 3:
                layout = BATCH_FIRST if self.batch_first else TIME_FIRST
            elif rank == 2:
                layout = UNBATCHED
            else:
                raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {rank}D instead")
        elif isinstance(input, PackedSequence):
            if input.data.dim() != 2:
                raise RuntimeError(f"input must have 2 dimensions, got {input.data.dim()}")
            layout = PackedLayout(input, (hx,) if self.gru else hx)
        elif isinstance(input, torch.fx.Proxy):
            return leaf_of_graph(
                self,
                input,
                (input,) if hx is None else (input, hx),
                call_options.given() if call_options else {},
            )
        else:
            raise TypeError(
                f"{self.mode}: expected input to be a Tensor or PackedSequence, got {type(input).__name__}"
            )
        return self._run(input, hx, layout, call_options)

    def _step(self, x_t: Any, hx: Any) -> Any:
        if self.bidirectional:
            raise RuntimeError(
                f"{self.mode}.step: not available for a bidirectional layer: its reverse direction needs the future"
            )
        if self.training:
            if self.dropout > 0:
                self._refuse_random_step("dropout")
            for name in self._requested or ():
                if OPTIONS[name].random:
                    self._refuse_random_step(name)
        if not isinstance(x_t, Tensor):
            raise TypeError(f"{self.mode}.step: expected x_t to be a Tensor, got {type(x_t).__name__}")
        rank = x_t.dim()
        if rank == 2:
            return self._run(x_t, hx, STEP)
        if rank == 1:
            return self._run(x_t, hx, UNBATCHED_STEP)
        raise ValueError(f"{self.mode}.step: Expected x_t to be 1D or 2D, got {rank}D instead")

    def _refuse_random_step(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"{self.mode}.step: not available in training mode with {name} > 0: call eval() first, "
            "or forward on whole sequences"
        )

    def _run(
        self,
        input: Any,
        hx: Any,
        layout: Layout,
        call_options: CallOptions | None = None,
    ) -> Any:
        """Check and compute. `route.plain_layers` is the short path: a step takes microseconds."""
        if is_jit_tracing():
            return self._traced(input, hx, layout, call_options)
        weights = self._weights_by_layer()
        requested = any_requested(self._requested, call_options)
        if not requested and layout.code >= 0:
            results = route.plain_layers(self, weights, input, hx, layout.code)
            if results is not None:
                return results
        x = layout.rows(input)
        H = self.hidden_size
        batch = x.size(1) if layout.batch_sizes is None else layout.batch(x)
        sets = 2 * self.num_layers if self.bidirectional else self.num_layers
        state_shapes: Any = ((sets, batch, self.proj_size or H), (sets, batch, H))[: 1 if self.gru else 2]
        h0: Tensor | None
        c0: Tensor | None
        if hx is None:
            h0 = c0 = None
            if layout.batch_sizes is not None and torch.compiler.is_compiling():
                h0, c0 = (*zero_states(x, state_shapes), None)[:2]
        else:
            h0, c0 = unpack_hx(self, hx)
            rank = layout.state_rank
            if rank == 2 or (rank == 3 and (h0.dim() != 3 or (c0 is not None and c0.dim() != 3))):
                h0, c0 = batched_states(self, h0, c0, rank, layout.is_step)
        check_arguments(self, x, h0, c0, weights[0][0], state_shapes)
        options = None
        if requested or self.gru:
            for layer_weights in weights:
                route.refuse_none(layer_weights)
            options = request(
                self, self._requested, self._cell_weights(), x, layout, state_shapes, call_options
            )
        results = run(self, route.lstm_layer, weights, x, h0, c0, layout, options)
        return (results[0], results[1][0]) if self.gru else results

    def _cell_weights(self) -> dict[str, Sequence[Sequence[Tensor]]]:
        """The present parameters of the cells, by the field of `LayerOptions`, one list per layer."""
        found: dict[str, Sequence[Sequence[Tensor]]] = {}
        for option in self._requested or ():
            parameters = OPTIONS[option].parameters
            if parameters is None:
                continue
            names = self._names_of(parameters)
            for name in [name for layer in names for name in layer]:
                if getattr(self, name) is None:
                    raise TypeError(f"{self.mode}: {name} is None, expected a Tensor")
            found[parameters.field] = [[getattr(self, name) for name in layer] for layer in names]
        return found

    def _weights_by_layer(self) -> list[list[Tensor]]:
        """The present weights, one list per layer; the same as ``getattr`` returns, but faster.

        ``_flat_weights`` does not work here: functional_call, weight_norm and parametrizations leave it stale.
        """
        own = self.__dict__
        parameters = own["_parameters"]
        layers = []
        for names in self._layer_names:
            layer = []
            for name in names:
                # Like getattr, an instance attribute comes before a parameter. A parametrized weight is a property of
                # the class and is not in _parameters.
                if name in own or name not in parameters:
                    layer.append(getattr(self, name))
                else:
                    layer.append(parameters[name])
            layers.append(layer)
        if len(layers) != self.num_layers:
            raise RuntimeError(
                f"{self.mode}: num_layers is {self.num_layers}, but the module was made with {len(layers)} layers"
            )
        if layers[0][0] is None:
            raise TypeError(f"{self.mode}: weight_ih_l0 is None, expected a Tensor")
        return layers

    def _traced(self, input: Any, hx: Any, layout: Layout, call_options: CallOptions | None) -> Any:
        """In a trace of ``torch.jit.trace`` or of the older ONNX exporter the layer is torch's, which both support."""
        if layout.is_step or call_options is not None or self._given:
            raise RuntimeError(_NO_TRACE.format(self.mode))
        return self._by_torch(input, hx)

    def _by_torch(self, input: Any, hx: Any) -> Any:
        """The results by ``forward`` of torch's layer."""
        raise NotImplementedError

    def _refuse_replacement(self) -> None:
        if self._given:
            raise TypeError(
                f"lstm_ext.{self.mode}: it has what torch.nn.{self.mode} does not have: {', '.join(self._given)}; no "
                "other layer can take its place"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_layer_names", "_requested"):
            state.pop(name, None)
        return state

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in d.items() if name != "_given"})
        self._set_options(d.get("_given", {}))
        self._layer_names = self._group_names()


def runs_without_kernels(module: RecurrentLayer) -> bool:
    """Whether torch's own operator computes this layer, or, with options, the equations: there are no kernels."""
    weight = module._parameters.get(module._all_weights[0][0])
    if weight is None or module._frozen:
        return False
    has_kernels = route.has_gru if module.gru else route.has_operators
    return not has_kernels(weight.device) and not loader.wants_equations()
