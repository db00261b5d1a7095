"""``lstm_ext.LSTM``: the drop-in for ``torch.nn.LSTM``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload

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
    LSTMExtras,
    PackedLayout,
)
from ..call.run import run, zero_states
from ..layer import route
from ..layer.activations import activation_text
from ..layer.layer_call import LayerOptions
from ..layer.tracing import is_jit_tracing, leaf_of_graph
from ..native import loader
from ..options import (
    OPTIONS,
    CellParameters,
    HasOptions,
    LayerArguments,
    described,
    signature_of,
    unexpected_argument,
)
from .mistakes import batched_states, check_arguments, unpack_hx
from .scripted import ScriptedLSTM, prepare_to_compile, refuse_scripting
from .tools import KnownToTools, typed_like

# Bound now, because users may replace it by our class.
_torch_class = nn.LSTM
_torch_forward = nn.LSTM.forward
_NO_TRACE = (
    "torch.jit.trace and the older ONNX exporter take lstm_ext.LSTM as torch.nn.LSTM, and so without what that does "
    "not have (options of the layer, further arguments, step()): use torch.export, or lstm_ext.onnx for ONNX"
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Sequences = TypeVar("_Sequences", Tensor, PackedSequence)
_States = tuple[Tensor, Tensor]


class LSTM(HasOptions, KnownToTools, ScriptedLSTM):
    """A stack of LSTM layers, with the interface, parameters and initial weights of :class:`torch.nn.LSTM`.

    :mod:`lstm_ext.reference` has the equations. T steps, B sequences, L layers, D = 2 if bidirectional else 1, H hidden
    units, P the projection's size, or H without one. Example::

        lstm = lstm_ext.LSTM(10, 20, num_layers=2)
        x = torch.randn(5, 3, 10)                      # T = 5, B = 3, I = 10
        output, (h, c) = lstm(x)                       # (5, 3, 20), and (2, 3, 20) each
        output, (h, c) = lstm(x, (h, c), lengths=[5, 2, 4])
        y, (h, c) = lstm.step(torch.randn(3, 10))      # one step: (3, 20)

    Args:
        input_size: the number of features of the input, I.
        hidden_size: the number of hidden units, H.
        num_layers: how many layers there are, L.
        bias: whether to add ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are (B, T, features) instead of (T, B, features). States and unbatched
            input are the same in both cases.
        dropout: probability of zeroing an element between two layers, in training mode. On the CPU the masks
            are those that ``torch.nn.LSTM`` draws from the same seed.
        bidirectional: whether each layer also reads time backwards.
        proj_size: if positive, h is projected to this size (https://arxiv.org/abs/1402.1128).
        device, dtype: those of the parameters.
        {options}

    :mod:`lstm_ext.reference` has the equations of the options and of the arguments of :meth:`forward` after ``hx``,
    with sources. All options run on the kernels wherever the plain layer does, alone and together. But ``layer_norm``
    goes with neither ``peephole`` nor ``coupled_gates``, and ``forget_bias`` not with ``coupled_gates``.

    Parameters are named, shaped and ordered as in ``torch.nn.LSTM``: ``weight_ih_l{k} (4H, I or D * P)``,
    ``weight_hh_l{k} (4H, P)``, ``bias_ih_l{k} (4H)``, ``bias_hh_l{k} (4H)``, ``weight_hr_l{k} (P, H)``, and
    the same with ``_reverse``; the gates' rows are in the order i, f, g, o. Every call reads them by attribute,
    so ``torch.func.functional_call``, ``weight_norm`` and parametrizations work as on any other module. With
    ``layer_norm``, each layer and direction also has ``ln_gain_ih_l{k} (4H)``, ``ln_gain_hh_l{k} (4H)`` and
    ``ln_gain_c_l{k} (H)``, initially 1, and, if ``bias``, ``ln_bias_c_l{k} (H)``, initially 0. With ``peephole``, it
    has ``weight_ci_l{k}``, ``weight_cf_l{k}`` and ``weight_co_l{k}``, (H) each, initially 0.

    Raises:
        TypeError, ValueError: the same as ``torch.nn.LSTM``, with its texts; also for an invalid value of the other
            arguments, for options that exclude each other, and for ``forget_bias`` with ``bias=False``.
    """

    # The frozen weights of a FrozenLSTM, see `call.arguments.Stack`.
    _frozen: Sequence[LayerOptions] = ()
    _native_options: list[Any] | None = None  # these in the extension's form

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[LayerArguments],
    ) -> None:
        for name in options.keys() - OPTIONS.keys():
            raise unexpected_argument("LSTM.__init__()", name, _SIGNATURE.parameters)
        # Called by name: in a subclass of torch's layer too, the next class would be torch.nn.LSTM.
        nn.RNNBase.__init__(
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
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
        """Initialise all parameters, as ``torch.nn.LSTM`` does, then those that the options set."""
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

    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: Literal[False] = False,
        return_gates: Literal[False] = False,
    ) -> tuple[_Sequences, _States]: ...
    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: Literal[True],
        return_gates: bool = False,
    ) -> tuple[_Sequences, _States, LSTMExtras]: ...
    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: Literal[True],
    ) -> tuple[_Sequences, _States, LSTMExtras]: ...
    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[_Sequences, _States] | tuple[_Sequences, _States, LSTMExtras]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: Tensor | PackedSequence | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> Any:
        """Run the layers on whole sequences.

        Args:
            input: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) without a batch. T >= 1, B >= 0.
                It has the dtype and device of the parameters, except under autocast. Or a ``PackedSequence``, whose
                ``data`` is (N, I); nothing is computed for padding. Or a nested tensor of the jagged layout, (B, j, I)
                whatever ``batch_first`` says: nothing is padded, and a sequence may be empty. The lengths are read on
                the host.
            hx: ``(h_0, c_0)``, a tuple or list, of shapes (L * D, B, P) and (L * D, B, H), without the B for
                unbatched input; None for zeros. The order of the batch is that before packing.
            lengths: how many steps of each sequence count: a list of B integers or an integer tensor (B,), on any
                device, in any order, from 0 to T; for unbatched input a number. The output of the steps that do not
                count is 0. The final state is that of the last step that counts, or that of ``hx`` if none does.
                The reverse direction begins with the last step that counts. Numbers on the host are checked. Numbers
                on a GPU are not read by the host, nor are those that a compiler or ``vmap`` does not know. They are
                clamped to [0, T] instead.
            resets: (T, B) in the layout of the input, optionally with a last axis of 1; bool, or 0 and 1 in a
                floating-point dtype; on the device of the input. For a ``PackedSequence``, a ``PackedSequence`` of the
                same batch sizes and order; for a nested tensor one of the same lengths. Where true, the state is
                replaced before the step is computed, and no gradient crosses. Both directions are cut there, so the
                steps before never meet the steps after.
            reset_state: ``(h, c)`` in the shapes of ``hx``: the state that a reset puts in place. It gets gradients.
                None for zeros. Each direction has its own rows of it.
            mask: bool, (T, B) in the layout of the input, optionally with a last axis of 1, on any device. True in the
                steps that count. Another step keeps the state, in both directions, as in Keras. Its output is 0, where
                Keras repeats the output before it. So padding may be at the end, where the mask says the same as
                ``lengths``, at the beginning, and anywhere between. Resets in it count for the next step that does.
                Not together with ``lengths``.
            return_cell_states, return_gates: whether to return c_t, and i, f, g, o, of every layer and step.

        Returns:
            ``(output, (h_n, c_n))``: output is the last layer's h of every step, (T, B, D * P) in the layout of the
            input, or a ``PackedSequence`` of the same batch sizes and order, or a nested tensor of the same lengths;
            h_n and c_n are the states after the last step of each sequence, in the shapes of ``hx``. If
            ``return_cell_states`` or ``return_gates`` is True, there is a third element, :class:`lstm_ext.LSTMExtras`.

        Raises:
            ValueError: the rank of the input is wrong, or its dtype is not that of the parameters; batch sizes or
                indices of a ``PackedSequence`` make no sense; a nested tensor is not jagged, or is so in another axis
                than time; an argument after ``hx`` has a wrong shape, dtype, device
                or number, or two of them exclude each other.
            RuntimeError: another size, device or dtype, or the rank of packed data, is wrong; the sequence is empty;
                ``torch.jit`` traces the layer; a transform or compiler does not support the call.
            TypeError: ``input`` is neither a Tensor nor a PackedSequence, ``hx`` is not two Tensors, batch sizes are
                not integers, or an argument after ``hx`` has a wrong type.
        """
        call_options = None
        if (
            lengths is not None
            or resets is not None
            or reset_state is not None
            or mask is not None
            or return_cell_states is not False
            or return_gates is not False
        ):
            call_options = CallOptions(lengths, resets, reset_state, mask, return_cell_states, return_gates)
        if isinstance(input, Tensor):
            rank = input.dim()
            if input.is_nested:
                layout: Layout = JaggedLayout(input)
            elif rank == 3:
                layout = BATCH_FIRST if self.batch_first else TIME_FIRST
            elif rank == 2:
                layout = UNBATCHED
            else:
                raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {rank}D instead")
        elif isinstance(input, PackedSequence):
            if input.data.dim() != 2:
                raise RuntimeError(f"input must have 2 dimensions, got {input.data.dim()}")
            layout = PackedLayout(input, hx)
        elif isinstance(input, torch.fx.Proxy):
            return leaf_of_graph(
                self,
                input,
                (input,) if hx is None else (input, hx),
                call_options.given() if call_options else {},
            )
        else:
            raise TypeError(
                f"LSTM: expected input to be a Tensor or PackedSequence, got {type(input).__name__}"
            )
        return self._run(input, hx, layout, call_options)

    if TYPE_CHECKING:

        @typed_like(forward)
        def __call__(self) -> None: ...

    def step(
        self, x_t: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute one time step, for streaming.

        T calls of ``step``, each with the state of the call before, equal one call of ``forward`` on the T steps,
        within rounding.

        Args:
            x_t: (B, I), or (I,) without a batch; dtype and device as the input of :meth:`forward`.
            hx: ``(h, c)`` as in :meth:`forward`: (L, B, P) and (L, B, H), without the B for unbatched input;
                None for zeros.

        Returns:
            ``(y_t, (h, c))``: the last layer's h, (B, P) or (P,), and the states to pass to the next call.

        Raises:
            RuntimeError: the layer is bidirectional (its reverse direction needs the steps that follow), or it
                is in training mode with dropout, recurrent_dropout, weight_dropout or zoneout.
            TypeError, ValueError, RuntimeError: as :meth:`forward`.

        To begin a new sequence in some rows, replace their states in ``hx`` before the call, as ``resets`` does.

        FSDP2 (``fully_shard``) gathers parameters in hooks of ``forward``. To use ``step`` under it, call
        ``torch.distributed.fsdp.register_fsdp_forward_method(module, "step")`` once.
        """
        if self.bidirectional:
            raise RuntimeError(
                "LSTM.step: not available for a bidirectional layer: its reverse direction needs the future"
            )
        if self.training:
            if self.dropout > 0:
                self._refuse_random_step("dropout")
            for name in self._requested or ():
                if OPTIONS[name].random:
                    self._refuse_random_step(name)
        if not isinstance(x_t, Tensor):
            raise TypeError(f"LSTM.step: expected x_t to be a Tensor, got {type(x_t).__name__}")
        rank = x_t.dim()
        if rank == 2:
            return self._run(x_t, hx, STEP)
        if rank == 1:
            return self._run(x_t, hx, UNBATCHED_STEP)
        raise ValueError(f"LSTM.step: Expected x_t to be 1D or 2D, got {rank}D instead")

    def _refuse_random_step(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"LSTM.step: not available in training mode with {name} > 0: call eval() first, "
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
        state_shapes = (sets, batch, self.proj_size or H), (sets, batch, H)
        if hx is None:
            h0 = c0 = None
            if layout.batch_sizes is not None and torch.compiler.is_compiling():
                h0, c0 = zero_states(x, state_shapes)
        else:
            h0, c0 = unpack_hx(hx)
            rank = layout.state_rank
            if rank == 2 or (rank == 3 and (h0.dim() != 3 or c0.dim() != 3)):
                h0, c0 = batched_states(h0, c0, rank, layout.is_step)
        check_arguments(self, x, h0, c0, weights[0][0], state_shapes)
        options = None
        if requested:
            for layer_weights in weights:
                route.refuse_none(layer_weights)
            options = request(
                self, self._requested, self._cell_weights(), x, layout, state_shapes, call_options
            )
        return run(self, route.lstm_layer, weights, x, h0, c0, layout, options)

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
                    raise TypeError(f"LSTM: {name} is None, expected a Tensor")
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
                f"LSTM: num_layers is {self.num_layers}, but the module was made with {len(layers)} layers"
            )
        if layers[0][0] is None:
            raise TypeError("LSTM: weight_ih_l0 is None, expected a Tensor")
        return layers

    def _traced(self, input: Any, hx: Any, layout: Layout, call_options: CallOptions | None) -> Any:
        """In a trace of ``torch.jit.trace`` or of the older ONNX exporter the layer is torch's, which both support."""
        if layout.is_step or call_options is not None or self._given:
            raise RuntimeError(_NO_TRACE)
        return _torch_forward(self, input, hx)  # type: ignore[call-overload]

    def _stands_in_for(self) -> type[nn.Module]:
        return _torch_class

    def _refuse_replacement(self) -> None:
        if self._given:
            raise TypeError(
                f"lstm_ext.LSTM: it has what torch.nn.LSTM does not have: {', '.join(self._given)}; no other "
                "layer can take its place"
            )

    def __prepare_scriptable__(self) -> LSTM:
        # torch.jit.script calls this hook before it compiles a module or a module inside one. The result stays in the
        # user's model, so it is the layer itself.
        refuse_scripting(self, LSTM, list(self._given))
        prepare_to_compile(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_layer_names", "_requested"):
            state.pop(name, None)
        return state

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in d.items() if name != "_given"})
        self._set_options(d.get("_given", {}))
        self._layer_names = self._group_names()


LSTM.__doc__ = described(LSTM.__doc__)
_SIGNATURE = LSTM.__init__.__signature__ = signature_of(LSTM.__init__, LayerArguments)  # type: ignore[attr-defined]


def activations_of(module: LSTM) -> str:
    """The functions of its cells, see `layer.activations`."""
    return activation_text(module.gate_activation, module.cell_activation)


def runs_without_kernels(module: LSTM) -> bool:
    """Whether torch's own operator computes this layer, or, with options, the equations: there are no kernels."""
    weight = module._parameters.get(module._all_weights[0][0])
    if weight is None or module._frozen:
        return False
    return not route.has_operators(weight.device) and not loader.wants_equations()
