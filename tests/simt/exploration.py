"""Explores every state of a model, breadth first, so that what leads to a fault is as short as can be."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from typing import NamedTuple, Protocol


class Fault(Exception):
    """What must not happen, and can."""


class Model(Protocol):
    def start(self) -> Hashable: ...

    def events(self, state: Hashable) -> Iterator[tuple[tuple, Hashable]]:
        """All that may happen next, in words, and the states after it. Raises Fault."""

    def is_over(self, state: Hashable) -> bool:
        """Whether it is right that nothing happens any more. Raises Fault."""


class Found(NamedTuple):
    states: int
    fault: str = ""
    trace: tuple[str, ...] = ()  # the events that lead to the fault


def explore(model: Model) -> Found:
    start = model.start()
    origins: dict[Hashable, Hashable] = {start: None}  # from which state each was come to first
    todo = deque([start])
    while todo:
        state = todo.popleft()
        try:
            continues = False
            for _, after in model.events(state):
                continues = True
                if after not in origins:
                    origins[after] = state
                    todo.append(after)
            if not model.is_over(state) and not continues:
                raise Fault("nobody can go on")
        except Fault as fault:
            return Found(len(origins), str(fault), _trace(model, origins, state))
    return Found(len(origins))


def _trace(model: Model, origins: dict[Hashable, Hashable], state: Hashable) -> tuple[str, ...]:
    events: list[str] = []
    while (origin := origins[state]) is not None:
        words = next(words for words, after in model.events(origin) if after == state)
        events.append(" ".join(map(str, words)))
        state = origin
    return tuple(reversed(events))
