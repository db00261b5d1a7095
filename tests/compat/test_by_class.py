"""What looks for ``torch.nn.LSTM`` with isinstance: initialisers, wrap policies of FSDP, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from before_after import assert_same, check_accuracy, check_state_dicts, converted, with_gradients
from torch import Tensor, nn

import lstm_ext

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


def check_initialiser(model: nn.Module, count: int, initialise: Callable[[nn.Module], None]) -> None:
    """It draws the same weights for ours, and leaves none of an LSTM as it was."""
    for lstm in [m for m in model.modules() if isinstance(m, (nn.LSTM, nn.LSTMCell))]:
        for parameter in lstm.parameters():
            nn.init.constant_(parameter, 3)
    ours = converted(model, count)
    for one in (model, ours):
        torch.manual_seed(1)
        with torch.no_grad():
            initialise(one)
    assert_same(ours, model, rtol=0, atol=0)
    assert [n for n, p in ours.named_parameters() if (p == 3).all()] == []


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True)
        self.cell = nn.LSTMCell(16, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.cell(self.lstm(self.embedding(tokens))[0][:, -1])[0])


TOKENS = torch.arange(10).reshape(2, 5) % 7


# ---- transformers


def encodec() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16}
    config = transformers.EncodecConfig(upsampling_ratios=[2, 2], num_lstm_layers=2, **sizes)
    return transformers.EncodecModel(config).eval()


def test_transformers_initialises():
    check_initialiser(encodec(), 2, lambda model: model.apply(model._init_weights))


def test_transformers_computes_saves_and_loads(tmp_path):
    model = encodec()
    waves = torch.sin(torch.arange(320) * 0.1)[None, None]

    def run(model: nn.Module) -> dict[str, Tensor]:
        codes = model.encoder(waves.to(next(model.parameters()).dtype))
        return with_gradients(model, {"codes": codes, "waves": model.decoder(codes)})

    check_accuracy(model, run, count=2)
    check_state_dicts(model, count=2)
    ours = converted(model, 2)
    ours.save_pretrained(tmp_path)
    assert_same(type(ours).from_pretrained(tmp_path), model, rtol=0, atol=0)


# ---- kraken


def recognizer() -> nn.Module:
    vgsl = pytest.importorskip("kraken.lib.vgsl")
    torch.manual_seed(0)
    return vgsl.TorchVGSLModel(vgsl="[1,12,0,1 Cr3,3,4 Mp2,2 S1(1x0)1,3 Lbx8 Do0.1,2 Lfx6 O1c5]").eval()


def test_kraken_initialises():
    check_initialiser(recognizer(), 2, lambda model: model.init_weights())


def test_kraken_recognizes():
    model = recognizer()
    lines = torch.rand(2, 1, 12, 30, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([30, 20])

    def run(model: nn.Module) -> dict[str, Tensor]:
        output, _ = model.nn(lines.to(next(model.parameters()).dtype), lengths)
        return with_gradients(model, {"output": output})

    check_accuracy(model, run, count=2)
    check_state_dicts(model, count=2)


# ---- espnet


@pytest.mark.parametrize("init", ["chainer", "xavier_uniform", "kaiming_normal"])
def test_espnet_initialises(init):
    initialize = pytest.importorskip("espnet2.torch_utils.initialize").initialize
    check_initialiser(Layers(), 2, lambda model: initialize(model, init))


# ---- torch's own


def test_a_wrap_policy_of_fsdp_wraps_our_layers(tmp_path):
    from torch.distributed import fsdp
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = Layers()
    ours = converted(model, 2)
    expected = torch.autograd.grad(model(TOKENS).square().sum(), list(model.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = fsdp.FullyShardedDataParallel(
            ours,
            auto_wrap_policy=ModuleWrapPolicy({nn.LSTM, nn.LSTMCell}),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
        assert isinstance(wrapped.lstm, fsdp.FullyShardedDataParallel)
        assert isinstance(wrapped.cell, fsdp.FullyShardedDataParallel)
        assert not isinstance(wrapped.out, fsdp.FullyShardedDataParallel)
        output = wrapped(TOKENS)
        torch.testing.assert_close(output, model(TOKENS))
        output.square().sum().backward()
        for parameter, gradient in zip(wrapped.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad.reshape(gradient.shape), gradient)
    finally:
        torch.distributed.destroy_process_group()


def test_activation_checkpointing_finds_our_layers():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as checkpointing

    model = Layers()
    ours = converted(model, 2)
    checkpointing.apply_activation_checkpointing(ours, check_fn=lambda module: isinstance(module, nn.LSTM))
    assert isinstance(ours.lstm, checkpointing.CheckpointWrapper)
    assert isinstance(ours.lstm._checkpoint_wrapped_module, lstm_ext.LSTM)
    results = []
    for one in (model, ours):
        output = one(TOKENS)
        output.square().sum().backward()
        results.append([output, *[p.grad for p in one.parameters()]])
    torch.testing.assert_close(results[1], results[0])


# ---- PyTorch Geometric


GRAPH = {
    "x": torch.randn(7, 6, generator=torch.Generator().manual_seed(2)),
    "index": torch.tensor([0, 0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("kind", ["LSTMAggregation", "Set2Set"])
def test_aggregations_of_geometric(kind):
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    torch.manual_seed(0)
    model = aggr.LSTMAggregation(6, 8) if kind == "LSTMAggregation" else aggr.Set2Set(6, 3)

    def run(model: nn.Module) -> dict[str, Tensor]:
        x = GRAPH["x"].to(next(model.parameters()).dtype)
        return with_gradients(model, {"output": model(x, GRAPH["index"])})

    check_accuracy(model, run)
    check_state_dicts(model)
    check_initialiser(model, 1, lambda model: model.reset_parameters())


def test_a_graph_network_of_geometric():
    """With SAGE's aggregation over neighbours, and jumping knowledge over layers."""
    networks = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    model = networks.GraphSAGE(6, 8, 2, aggr="lstm", jk="lstm")
    edges = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 2]])

    def run(model: nn.Module) -> dict[str, Tensor]:
        x = GRAPH["x"].to(next(model.parameters()).dtype)
        results = with_gradients(model, {"output": model(x, edges)})
        # A softmax takes away what this one adds: its gradient is 0 but for rounding.
        del results["gradient of jk.att.bias"]
        return results

    check_accuracy(model, run, count=3)
    check_initialiser(model, 3, lambda model: model.reset_parameters())
