"""The former home of :class:`lstm_ext.LSTMCell`: pickled models name it."""

from .nn.cell import LSTMCell

__all__ = ["LSTMCell"]


def __dir__() -> list[str]:
    return __all__
