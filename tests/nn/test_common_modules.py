"""torch's own test inputs for nn.LSTM, run through both layers."""

import copy

import pytest
import torch
from cases import values_and_gradients
from judge import assert_as_accurate_as_torch, stacked
from torch import nn
from torch.testing._internal.common_modules import module_db

import lstm_ext

pytestmark = [
    pytest.mark.devices("cpu", "cuda"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

(INFO,) = [info for info in module_db if info.module_cls is nn.LSTM]


def module_inputs(dtype, training, device="cpu"):
    torch.manual_seed(0)
    inputs = INFO.module_inputs_func(INFO, device=device, dtype=dtype, requires_grad=True, training=training)
    assert len(inputs) >= 32
    return inputs


COUNT = len(module_inputs(torch.float32, True))
DRAWS = 8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("number", range(COUNT))
def test_agrees_with_torch(number, dtype, training, device):
    given = module_inputs(dtype, training, device)[number]
    args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
    # cuDNN has no backward pass in eval mode; there is no dropout in any of these.
    theirs = nn.LSTM(*args, **kwargs, dtype=dtype).train(training or device == "cuda")
    ours = lstm_ext.LSTM(*args, **kwargs, dtype=dtype).train(training)

    assert not given.forward_input.kwargs
    forward = given.forward_input.args
    # These tensors are tiny, down to four numbers: the rounding errors of a single draw say little.
    draws = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        theirs.reset_parameters()
        ours.load_state_dict(theirs.state_dict())
        draws.append(
            (
                values_and_gradients(ours, *forward, seed=seed),
                values_and_gradients(theirs, *forward, seed=seed),
                values_and_gradients(theirs, *forward, seed=seed, dtype=torch.float64),
            )
        )
    assert_as_accurate_as_torch(*(stacked(results) for results in zip(*draws, strict=True)))

    # torch's reference for unbatched input: the batch of one
    output, state = ours(*copy.deepcopy(forward))
    expected, expected_state = given.reference_fn(ours, *forward)
    for a, b in zip((output, *state), (expected, *expected_state), strict=True):
        torch.testing.assert_close(a, b)
