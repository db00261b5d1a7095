"""The former home of :class:`lstm_ext.LSTM`: pickled models name it."""

from .nn.lstm import LSTM

__all__ = ["LSTM"]


def __dir__() -> list[str]:
    return __all__
