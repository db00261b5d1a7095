"""convert and revert on whole models, in the styles in which models hold their LSTMs."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from lstm_models import MODELS, Tagger
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_ext


# Our classes that are torch's to isinstance.
class Subclasses:
    LSTM, LSTMCell = lstm_ext.TorchLSTM, lstm_ext.TorchLSTMCell


to_plain = functools.partial(lstm_ext.convert, as_subclass=False)
WAYS = {
    "convert": (lstm_ext.convert, nn, Subclasses),
    "convert, plain": (to_plain, nn, lstm_ext),
    "revert": (lstm_ext.revert, Subclasses, nn),
    "revert, plain": (lstm_ext.revert, lstm_ext, nn),
}
BACK = {nn: lstm_ext.revert, lstm_ext: to_plain, Subclasses: lstm_ext.convert}


@pytest.fixture(params=WAYS)
def way(request):
    """The function, the package it starts from, and the package it leads to."""
    return WAYS[request.param]


def snapshot(model):
    """All that a model is, apart from the classes of its modules."""
    return {
        name: (
            id(module),
            {key: id(value) for key, value in vars(module).items() if not key.startswith(PRIVATE)},
            {
                key: {name: id(value) for name, value in vars(module).get(key, {}).items()}
                for key in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
            },
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


PRIVATE = ("_layer_names", "_flat_weight")


def lstm_classes(model):
    return {
        name: type(m)
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, (nn.RNNBase, nn.RNNCellBase))
    }


def run(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: oneDNN knows no projections
        torch.manual_seed(1)
        output = model(x)
        output.square().sum().backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return output.detach(), grads


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model_class", MODELS)
def test_models(way, model_class, training):
    function, source, target = way
    model = model_class(source).double().train(training)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    output, grads = run(model, x)
    before, classes = snapshot(model), lstm_classes(model)
    state_dict = model.state_dict(keep_vars=True)

    rng = torch.get_rng_state()
    assert function(model) is model
    assert torch.equal(torch.get_rng_state(), rng)
    assert snapshot(model) == before
    assert lstm_classes(model) == {
        name: nn.GRU if cls is nn.GRU else getattr(target, cls.__name__) for name, cls in classes.items()
    }
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state_dict)
    assert all(after[name] is state_dict[name] for name in after)
    function(model)  # again: nothing left to do
    assert snapshot(model) == before

    new_output, new_grads = run(model, x)
    torch.testing.assert_close(new_output, output, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(new_grads, grads, rtol=1e-10, atol=1e-11)
    BACK[source](model)
    assert lstm_classes(model) == classes
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {
        name: vars(m).keys() for name, m in model_class(source).named_modules()
    }
    torch.testing.assert_close(run(model, x), (output, grads), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["convert", "convert, plain"])
@pytest.mark.parametrize("model_class", MODELS)
def test_a_converted_model_is_one_that_was_built_so(model_class, kind):
    function, source, target = WAYS[kind]
    torch.manual_seed(3)
    converted = function(model_class(source).eval())
    torch.manual_seed(3)
    built = model_class(target).eval()
    assert repr(converted) == repr(built)
    for ours, theirs in zip(converted.modules(), built.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    x = torch.randn(3, 5, 6)
    assert torch.equal(converted(x), built(x))


def test_training_goes_on(way):
    """The optimizer keeps its parameters and its moments."""
    function, source, _ = way
    models = [Tagger(source).double()]
    models.append(copy.deepcopy(models[0]))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    losses = []
    for k, model in enumerate(models):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for step in range(6):
            if k and step == 3:
                function(model)
            loss = model(x).square().sum()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[5] < losses[0]
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-9)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_a_root_that_is_an_lstm(way, name):
    function, source, target = way
    module = getattr(source, name)(3, 4, bias=False).eval()
    next(module.parameters()).requires_grad_(False)
    assert function(module) is module
    assert type(module) is getattr(target, name)
    assert not module.training
    assert [p.requires_grad for p in module.parameters()] == [False, True]
    theirs = getattr(source, name)(3, 4, bias=False)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(module(x), theirs(x))
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(clone) is type(module)
        assert torch.equal(clone(x)[0], module(x)[0])


def test_a_model_without_lstms(way):
    function, _, target = way
    model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3), nn.GRUCell(3, 3), target.LSTM(3, 3))
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    assert function(model) is model
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == classes


def test_hooks_of_every_kind(way):
    function, source, _ = way
    model = nn.Sequential(source.LSTM(3, 4))
    (lstm,) = model
    seen = []

    def note(name):
        return lambda module, *args, **kwargs: seen.append((name, module))

    handles = [
        lstm.register_forward_pre_hook(note("pre")),
        lstm.register_forward_hook(note("forward")),
        lstm.register_full_backward_pre_hook(note("backward pre")),
        lstm.register_full_backward_hook(note("backward")),
        lstm.register_state_dict_pre_hook(note("state_dict pre")),
        lstm.register_load_state_dict_pre_hook(note("load pre")),  # refers to its module by a weak reference
        lstm.register_load_state_dict_post_hook(note("load post")),
        lstm.weight_hh_l0.register_hook(lambda grad: seen.append(("grad", lstm))),
        lstm.weight_hh_l0.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", lstm))),
    ]
    lstm._register_state_dict_hook(note("state_dict"))
    function(model)

    def use():
        lstm(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
        model.load_state_dict(model.state_dict())

    use()
    assert sorted(name for name, _ in seen) == sorted(
        ["pre", "forward", "backward pre", "grad", "accumulated", "backward"]
        + ["state_dict pre", "state_dict", "load pre", "load post"]
    )
    assert all(module is lstm for _, module in seen)
    for handle in handles:
        handle.remove()
    seen.clear()
    use()
    assert seen == [("state_dict", lstm)]


def test_attributes_and_buffers(way):
    function, source, target = way
    model = nn.Sequential(source.LSTM(3, 4), source.LSTMCell(3, 4))
    for module in model:
        module.tag = ["mine"]
        module.register_buffer("calls", torch.zeros(1))
        module.register_buffer("scratch", torch.zeros(1), persistent=False)
        module.adapter = nn.Linear(2, 2)
        module.lora = nn.Parameter(torch.ones(2))
    before = snapshot(model)
    function(model)
    assert snapshot(model) == before
    assert list(model.state_dict())[4:8] == ["0.lora", "0.calls", "0.adapter.weight", "0.adapter.bias"]
    assert [type(m) for m in model] == [target.LSTM, target.LSTMCell]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_device(way, dtype, device):
    function, source, target = way
    model = nn.Sequential(source.LSTM(3, 4, dtype=dtype, device=device))
    function(model)
    assert type(model[0]) is target.LSTM
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, device)}
    output, _ = model(torch.zeros(5, 2, 3, dtype=dtype, device=device))
    assert output.dtype == dtype
    assert output.device.type == device
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    assert model.float()(torch.zeros(5, 2, 3))[0].dtype == torch.float32


# Weights that are computed


def weight_norm_by_hook(module, name):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module, name)


COMPUTED = {
    "weight_norm by hook": weight_norm_by_hook,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm by hook": lambda m, name: nn.utils.spectral_norm(m, name),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda m, name: prune.l1_unstructured(m, name, 0.5),
}


@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_computed_weights(way, name, computed):
    function, source, target = way
    module = getattr(source, name)(3, 4, dtype=torch.float64)
    weight = "weight_hh_l0" if name == "LSTM" else "weight_hh"
    COMPUTED[computed](module, weight)
    model = nn.Sequential(module).eval()
    x = torch.randn(2, 3, dtype=torch.float64)

    def outputs():
        output, _ = model(x)
        output.sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return output, grads

    expected = outputs()
    before, parameters = type(module), list(model.named_parameters())
    function(model)
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    if parametrize.is_parametrized(module):
        assert type(module).__name__ == before.__name__
        assert parametrize.type_before_parametrizations(module) is getattr(target, name)
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    else:
        assert type(module) is getattr(target, name)
    torch.testing.assert_close(outputs(), expected, rtol=1e-11, atol=1e-12)

    with torch.no_grad():  # and it goes on being computed
        for _, p in parameters:
            p.mul_(1.5).add_(0.1)
    again = outputs()
    assert not torch.equal(again[0], expected[0])
    BACK[source](model)
    torch.testing.assert_close(outputs(), again, rtol=1e-11, atol=1e-12)

    function(model)
    if "hook" in computed:
        remove = nn.utils.remove_weight_norm if "weight" in computed else nn.utils.remove_spectral_norm
        remove(module, weight)
    elif computed == "pruning":
        prune.remove(module, weight)
    else:
        parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(target, name)
    torch.testing.assert_close(model(x)[0], again[0], rtol=1e-11, atol=1e-12)


# What is refused


class Peephole(nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return 2 * output, state


class OurPeephole(lstm_ext.LSTM):
    forward = Peephole.forward


class Attentive(nn.LSTMCell):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


def parametrized_subclass():
    module = Peephole(3, 4)
    parametrizations.weight_norm(module, "weight_hh_l0")
    return module


def replaced_forward(module):
    """As accelerate's hooks do."""
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)
    return module


def replaced_check(module):
    module.check_forward_args = lambda *args: None
    return module


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(3, 4)
        self.gru = nn.GRU(3, 4)

    def forward(self, x):
        return self.inner(x)[0]


def with_jit(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch
        return function(torch.jit, Scripted().eval())


def quantized(*classes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch
        model = nn.Sequential(*[cls(3, 4) for cls in classes])
        return torch.ao.quantization.quantize_dynamic(model, set(classes), dtype=torch.qint8)


REFUSED = {
    "subclass": (lambda: Peephole(3, 4), "", r"Peephole\): a subclass of torch\.nn\.LSTM,"),
    "subclass of a cell": (lambda: Attentive(3, 4), "", r"Attentive\): a subclass of torch\.nn\.LSTMCell,"),
    "parametrized subclass": (parametrized_subclass, "", r"ParametrizedPeephole\): a subclass of torch\.nn"),
    "forward": (lambda: replaced_forward(nn.LSTM(3, 4)), "", r"nn\.LSTM\): forward is replaced on the inst"),
    "cell's forward": (lambda: replaced_forward(nn.LSTMCell(3, 4)), "", r"LSTMCell\): forward is replaced"),
    "method": (lambda: replaced_check(nn.LSTM(3, 4)), "", r"LSTM\): check_forward_args is replaced"),
    "scripted": (lambda: with_jit(lambda jit, m: jit.script(m)), ".inner", "compiled by torch.jit"),
    "traced": (
        lambda: with_jit(lambda jit, m: jit.trace(m, torch.zeros(5, 2, 3))),
        ".inner",
        "compiled by torch.jit",
    ),
    "frozen": (
        lambda: with_jit(lambda jit, m: jit.freeze(jit.script(m))),
        "",
        "compiled by torch.jit",
    ),
    "quantized": (lambda: quantized(nn.LSTM), ".0", r"LSTM\): a quantized layer"),
    "quantized cell": (lambda: quantized(nn.LSTMCell), ".0", r"LSTMCell\): a quantized layer"),
    "quantizable": (lambda: torch.ao.nn.quantizable.LSTM(3, 4), "", r"LSTM\): a quantized layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_module_and_change_nothing(kind):
    make, inner, reason = REFUSED[kind]
    model = nn.Sequential(nn.LSTM(3, 4), nn.ModuleDict({"odd": make()}), nn.LSTM(3, 4))
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=rf"convert: nothing was changed.*\n  '1\.odd{inner}' \(.*{reason}"):
        lstm_ext.convert(model)
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == classes

    for skip in (["1.odd"], ("1",), {"1", "1.odd"}):
        other = nn.Sequential(nn.LSTM(3, 4), model[1], nn.LSTM(3, 4))
        assert lstm_ext.convert(other, skip=skip) is other
        assert type(other[0]) is type(other[2]) is lstm_ext.TorchLSTM
        assert [type(m) for m in other.modules()][2:-1] == classes[2:-1]


def test_refusals_of_revert():
    for make, reason in (
        (lambda: OurPeephole(3, 4), r"OurPeephole\): a subclass of lstm_ext\.LSTM,"),
        (lambda: replaced_forward(lstm_ext.LSTM(3, 4)), r"LSTM\): forward is replaced"),
        (lambda: replaced_forward(lstm_ext.LSTMCell(3, 4)), r"LSTMCell\): forward is replaced"),
    ):
        model = nn.Sequential(lstm_ext.LSTM(3, 4), make())
        with pytest.raises(TypeError, match=rf"revert: nothing was changed.*\n  '1' \(.*{reason}"):
            lstm_ext.revert(model)
        assert type(model[0]) is lstm_ext.LSTM
        lstm_ext.revert(model, skip=["1"])
        assert type(model[0]) is nn.LSTM


def test_what_is_not_its_business(way):
    """The other package's subclasses, scripted models without an LSTM, GRUs."""
    function, source, target = way
    scripted = with_jit(lambda jit, m: jit.script(m.gru))
    other = OurPeephole(3, 4) if source is nn else Peephole(3, 4)
    model = nn.Sequential(source.LSTM(3, 4), scripted, other)
    function(model)
    assert [type(m) for m in model] == [target.LSTM, type(scripted), type(other)]


def test_every_refusal_is_listed():
    model = nn.ModuleDict({"a": Peephole(3, 4), "b": nn.LSTM(3, 4), "c": nn.Sequential(Attentive(3, 4))})
    with pytest.raises(TypeError) as info:
        lstm_ext.convert(model)
    lines = str(info.value).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["'a'", "'c.0'"]
    with pytest.raises(TypeError, match=r"\n  the model itself \(.*Peephole\)"):
        lstm_ext.convert(model["a"])


def test_skip_goes_by_the_module():
    """One that is used at two places stays one, whatever name it is given."""
    shared = nn.LSTM(3, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared}), "d": nn.LSTM(3, 4)})
    lstm_ext.convert(model, skip=["b.c"])
    assert type(model["a"]) is nn.LSTM
    assert model["b"]["c"] is model["a"]
    assert type(model["d"]) is lstm_ext.TorchLSTM


def test_wrong_arguments(way):
    function, source, _ = way
    for wrong in (None, "model", nn.Module, [source.LSTM(3, 4)]):
        with pytest.raises(TypeError, match=f"expected model to be a .*Module, got {type(wrong).__name__}"):
            function(wrong)
    model = nn.Sequential(source.LSTM(3, 4))
    with pytest.raises(ValueError, match="skip: the model has no submodule named 'lstm'"):
        function(model, skip=["lstm"])
    with pytest.raises(TypeError, match="skip to be a sequence of names, got the string '0'"):
        function(model, skip="0")
    assert type(model[0]) is source.LSTM


# Compiled models


@pytest.mark.parametrize("how", ["wrapped", "in place", "inner", "root"])
def test_compiled_models(way, how):
    """The compiled code of before is not used any more."""
    function, source, target = way
    model = nn.Sequential(source.LSTMCell(3, 4))
    cell = model[0]
    used = []
    hook = cell.register_forward_hook(lambda module, args, output: used.append(type(module)))
    if how == "in place":
        model.compile(backend="eager")
        compiled = model
    elif how == "inner":
        model[0] = torch.compile(cell, backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model if how == "wrapped" else cell, backend="eager")
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = compiled(x)
        assert function(compiled) is compiled
        assert type(cell) is target.LSTMCell
        torch.testing.assert_close(compiled(x), expected)
    assert used == [source.LSTMCell, target.LSTMCell]
    hook.remove()
    assert (
        compiled.state_dict().keys()
        == {
            "wrapped": {f"_orig_mod.0.{name}" for name in cell.state_dict()},
            "in place": {f"0.{name}" for name in cell.state_dict()},
            "inner": {f"0._orig_mod.{name}" for name in cell.state_dict()},
            "root": {f"_orig_mod.{name}" for name in cell.state_dict()},
        }[how]
    )


def test_traced_by_fx(way):
    function, source, target = way
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)))
    if source is not nn:
        BACK[source](model)
    x = torch.randn(5, 2, 3)
    expected = model(x)
    function(model)
    assert type(model.get_submodule("1")) is target.LSTM
    torch.testing.assert_close(model(x), expected)


def test_a_converted_model_compiles_as_one_graph():
    """torch.nn.LSTM does not."""
    torch._dynamo.reset()  # as in a process of its own: nn.Sequential.forward may have been given up as too various
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = compiled(x)
        lstm_ext.convert(compiled)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        assert torch._dynamo.explain(model)(x).graph_count == 1
