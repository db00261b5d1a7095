"""States, files and other processes. Copies of models are in test_models.py."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from lstm_models import WithCode
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

import lstm_ext

pytestmark = pytest.mark.devices("cpu", "cuda")

FULL = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _x_is_on_the_device(device, monkeypatch):
    monkeypatch.setitem(globals(), "x", x.to(device))


def test_a_shallow_copy_shares_what_the_module_has():
    module = WithCode(3, 4)
    shallow, (output, _) = copy.copy(module), module(x)
    assert shallow.vocabulary is module.vocabulary and shallow.head is module.head
    assert torch.equal(shallow(x)[0], output)
    with torch.no_grad():
        shallow.weight_hh_l0.zero_()
    assert torch.equal(shallow(x)[0], module(x)[0]) and not torch.equal(module(x)[0], output)
    assert shallow._flat_weights[1] is shallow.weight_hh_l0


def error_of(call):
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


def test_what_torch_refuses_to_copy():
    """weight_norm by hook leaves a computed tensor behind; parametrized modules have no pickled form."""
    errors = []
    for cls in (lstm_ext.LSTM, nn.LSTM):
        module = cls(3, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(module, "weight_hh_l0")
        module(x)
        parametrized = cls(3, 4)
        nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
        errors.append(
            [error_of(lambda m=module: copy.deepcopy(m)), error_of(lambda m=parametrized: pickle.dumps(m))]
        )
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("bias_hh_l0"),
        lambda d: d.update(foo=torch.zeros(1)),
        lambda d: d.update(nn.LSTM(3, 5).state_dict()),
        lambda d: d.update(nn.LSTM(3, 4, proj_size=2).state_dict()),
        lambda d: d.update(nn.LSTM(3, 4, 2, bidirectional=True).state_dict()),
        lambda d: d.update(weight_hh_l0=[1.0]),
    ],
    ids=["missing", "unexpected", "sizes", "projection", "layers", "no tensor"],
)
def test_a_state_dict_that_does_not_fit(change):
    state = nn.LSTM(3, 4).state_dict()
    change(state)
    ours, theirs = lstm_ext.LSTM(3, 4), nn.LSTM(3, 4)
    error = error_of(lambda: ours.load_state_dict(state))
    assert error == error_of(lambda: theirs.load_state_dict(state))
    assert error[0] is RuntimeError


def test_loading_is_seen_by_the_next_call():
    ours, theirs = lstm_ext.LSTM(3, 4, 2), nn.LSTM(3, 4, 2)
    ours(x)
    parameters = list(ours.parameters())
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))  # an optimizer stays valid

    ours.weight_hh_l0.requires_grad_(False)
    other = nn.LSTM(3, 4, 2)
    ours.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(ours(x)[0], other(x)[0])
    assert [p.requires_grad for p in ours.parameters()] == [True, False] + [True] * 6
    assert ours.weight_ih_l0.data_ptr() == other.weight_ih_l0.data_ptr()
    assert ours._flat_weights[0] is ours.weight_ih_l0


def test_load_without_pickle(tmp_path, device):
    """weights_only for the state, also mapped from the file; a module only if its class is said to be safe."""
    module = lstm_ext.LSTM(3, 4, **FULL)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    for options in ({}, {"mmap": True}, {"map_location": device}):
        other = lstm_ext.LSTM(3, 4, **FULL, device="meta")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, **options), assign=True)
        assert torch.equal(other(x)[0], module(x)[0])

    torch.save(module, tmp_path / "module.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"lstm_ext\..*LSTM"):
        torch.load(tmp_path / "module.pt", weights_only=True)
    with torch.serialization.safe_globals([lstm_ext.LSTM]):
        other = torch.load(tmp_path / "module.pt", weights_only=True)
    assert torch.equal(other(x)[0], module(x)[0])


@pytest.mark.parametrize("way", ["swap", "overwrite"])
def test_other_ways_of_conversion(way):
    """torch.__future__: parameters are swapped with, or replaced by, their converted selves."""
    switch = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
    module = lstm_ext.LSTM(3, 4, 2)
    before = list(module.parameters())
    with torch.no_grad():  # what a graph holds cannot be swapped
        expected = module(x)[0]
    switch(True)
    try:
        module.double()
        output = module(x.double())[0]
    finally:
        switch(False)
    torch.testing.assert_close(output, expected.double())
    same = [a is b for a, b in zip(module.parameters(), before, strict=True)]
    assert same == [way == "swap"] * 8
    assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))


def work_on(module, results):
    """In another process: what the module computes, then new weights for everyone who shares them."""
    torch.set_num_threads(1)
    results.put(module(x)[0].detach().numpy())
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.125)
    results.put("done")


@pytest.mark.devices("cpu")
def test_a_second_process_shares_the_weights():
    context = torch.multiprocessing.get_context("spawn")
    module = lstm_ext.LSTM(3, 4, 2).share_memory()
    expected = module(x)[0]
    results = context.Queue()
    process = context.Process(target=work_on, args=(module, results), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
    theirs = torch.from_numpy(results.get())
    assert results.get() == "done"
    torch.testing.assert_close(theirs, expected)
    assert all((p == 0.125).all() for p in module.parameters())
    output = module(x)[0]
    assert not torch.allclose(output, expected)
    torch.testing.assert_close(output, lstm_ext.revert(copy.copy(module))(x)[0])


class Encoded(Dataset):
    """Each sample is the output of an LSTM, as in feature extraction."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(x[: i + 1].repeat(20, 1, 1))[0]


@pytest.mark.devices("cpu")
def test_workers_of_a_data_loader():
    """They are forks of a process whose threads have run kernels."""
    module = lstm_ext.LSTM(3, 128)
    dataset = Encoded(module)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = pad_sequence([dataset[i] for i in range(4)])
        loader = DataLoader(
            dataset, 4, num_workers=1, collate_fn=pad_sequence, multiprocessing_context="fork"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of fork in a process with threads
            (batch,) = loader
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(batch, expected)
