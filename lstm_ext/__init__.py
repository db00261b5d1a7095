"""A faster drop-in for ``torch.nn.LSTM``.

``lstm_ext.LSTM`` has the interface, the parameters and the random numbers of ``torch.nn.LSTM``. Importing
this package compiles nothing; the compiled kernels are looked for when the first layer runs.
"""

from __future__ import annotations

from . import _backend, functional, reference
from ._build_config import VERSION as __version__
from ._convert import convert, from_torch, revert, to_torch
from ._extras import LSTMExtras
from ._gates import from_gates
from .cell import LSTMCell
from .modules import LSTM

# An extension that was built ahead of time for another torch: say so now, not in the first call.
_backend.check()

__all__ = [
    "LSTM",
    "LSTMCell",
    "LSTMExtras",
    "__version__",
    "convert",
    "from_gates",
    "from_torch",
    "functional",
    "reference",
    "revert",
    "to_torch",
]
