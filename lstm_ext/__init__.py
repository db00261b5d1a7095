"""A faster drop-in for ``torch.nn.LSTM``.

``lstm_ext.LSTM`` has the interface, the parameters and the random numbers of ``torch.nn.LSTM``. Importing this package
loads the kernels that were built ahead of time. It compiles nothing, and nor does a call: without kernels that fit,
torch's own operator computes, and ``python -m lstm_ext.build`` builds them.
"""

from __future__ import annotations

from . import functional, reference
from . import onnx as onnx
from .call.cuda_choice import tune
from .call.layout import LSTMExtras
from .layer.cuda_kernels import check_waits as check_cuda_waits
from .native import loader
from .native.config import VERSION as __version__
from .native.loader import release_memory
from .nn.cell import LSTMCell
from .nn.convert import convert, report, revert
from .nn.explain import explain
from .nn.from_frameworks import (
    from_haste,
    from_jax,
    from_keras,
    from_mlx,
    from_tensorflow,
    from_torch_ao,
    to_keras,
)
from .nn.from_gates import from_gates
from .nn.from_onnx import from_onnx
from .nn.frozen import FrozenGRU, FrozenLSTM, FrozenTorchGRU, FrozenTorchLSTM, freeze, unfreeze
from .nn.gru import GRU, GRUCell
from .nn.keras import patch_keras
from .nn.lstm import LSTM
from .nn.registered import register
from .nn.torch_layers import TorchGRU, TorchGRUCell, TorchLSTM, TorchLSTMCell, patch

loader.load_built()

__all__ = [
    "GRU",
    "LSTM",
    "FrozenGRU",
    "FrozenLSTM",
    "FrozenTorchGRU",
    "FrozenTorchLSTM",
    "GRUCell",
    "LSTMCell",
    "LSTMExtras",
    "TorchGRU",
    "TorchGRUCell",
    "TorchLSTM",
    "TorchLSTMCell",
    "__version__",
    "check_cuda_waits",
    "convert",
    "explain",
    "freeze",
    "from_gates",
    "from_haste",
    "from_jax",
    "from_keras",
    "from_mlx",
    "from_onnx",
    "from_tensorflow",
    "from_torch_ao",
    "functional",
    "patch",
    "patch_keras",
    "reference",
    "register",
    "release_memory",
    "report",
    "revert",
    "to_keras",
    "tune",
    "unfreeze",
]

_SUBMODULES = ("info", "onnx", "ops", "selftest")  # public ones, which may not be loaded yet


def __dir__() -> list[str]:
    return [*__all__, *[name for name in _SUBMODULES if name in globals()]]
