"""The exchange within a cluster by st.async and mbarriers, as protocol_model.py explores it.

A block has two buffers for h and an mbarrier for each. Each warp of each block sends its part of h_t to all blocks, to
buffer t % 2; a message brings a value and counts itself off at the buffer's mbarrier, both at once, at any time after
it was sent and in any order. In step t a warp waits for the phase of h_{t-1}, reads what all have sent, meets the
other warps of its block, and sends. The first warp arms the mbarrier for h_{t+1}, which comes to the same buffer, as
soon as it has waited. h of the last step is nobody's operand and is not sent, so that no block need wait at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from simt.exploration import Fault

WAITS, AT_BARRIER, SENDS, HAS_LEFT = "waits", "at the barrier", "sends", "has left"


class Warp(NamedTuple):
    step: int
    doing: str


class Inbox(NamedTuple):
    """A buffer and its mbarrier."""

    values: tuple[int, ...]  # by sender: the step whose h it is
    phases: int = 0  # that are complete
    armed: int = 0
    missing: int = 0  # messages of this phase, once it is armed


class Message(NamedTuple):
    receiver: int
    sender: int  # a warp
    step: int


class State(NamedTuple):
    warps: tuple[Warp, ...]
    inboxes: tuple[Inbox, ...]  # of the blocks, one after the other
    messages: frozenset[Message]


def _with(parts: tuple, at: int, part: object) -> tuple:
    return (*parts[:at], part, *parts[at + 1 :])


@dataclass(frozen=True)
class Cluster:
    blocks: int
    warps: int
    steps: int
    plant: str = ""

    def __str__(self) -> str:
        return f"cluster, {self.blocks} blocks of {self.warps} warps, {self.steps} steps"

    def model(self) -> ClusterModel:
        return ClusterModel(self)


class ClusterModel:
    def __init__(self, config: Cluster) -> None:
        self._config, self._plant = config, config.plant
        self._senders = config.blocks * config.warps
        self._buffers = 1 if self._plant == "one buffer" else 2

    def _is_sent(self, step: int) -> bool:
        return step < self._config.steps - (self._plant != "the last step is sent")

    def _inbox(self, block: int, step: int) -> int:
        return block * self._buffers + step % self._buffers

    def _armed(self, inbox: Inbox, step: int) -> Inbox:
        """For the h of a step."""
        if not self._is_sent(step):
            return inbox
        inbox = inbox._replace(armed=inbox.armed + 1, missing=inbox.missing + self._senders)
        if inbox.armed > 1:
            raise Fault("an mbarrier is armed twice in a phase")
        return self._completed(inbox)

    def _completed(self, inbox: Inbox) -> Inbox:
        if inbox.armed == 1 and inbox.missing == 0:
            return inbox._replace(phases=inbox.phases + 1, armed=0)
        return inbox

    def start(self) -> State:
        inboxes = []
        for _ in range(self._config.blocks):
            for step in range(self._buffers):
                inbox = Inbox((-1,) * self._senders)
                inboxes.append(inbox if self._plant == "not armed at first" else self._armed(inbox, step))
        return State((Warp(0, AT_BARRIER),) * self._senders, tuple(inboxes), frozenset())

    def events(self, state: State) -> Iterator[tuple[tuple, State]]:
        for number, warp in enumerate(state.warps):
            yield from self._events_of(state, number, warp)
        for message in state.messages:
            words = ("h of step", message.step, "of warp", message.sender, "comes to block", message.receiver)
            yield words, self._delivered(state, message)

    def _events_of(self, state: State, number: int, warp: Warp) -> Iterator[tuple[tuple, State]]:
        block, config = number // self._config.warps, self._config
        if warp.doing == WAITS:
            step = warp.step - 1
            at = self._inbox(block, step)
            inbox = state.inboxes[at]
            parity = step // self._buffers % 2 ^ (self._plant == "the other parity")
            if inbox.phases % 2 == parity and self._plant != "no wait":
                return
            if any(value != step for value in inbox.values):
                raise Fault(f"warp {number} takes h of steps {list(inbox.values)} for that of step {step}")
            if number % config.warps == 0 and self._plant != "armed once only":
                inbox = self._armed(inbox, step + self._buffers)
            after = State(
                _with(state.warps, number, Warp(warp.step, AT_BARRIER)),
                _with(state.inboxes, at, inbox),
                state.messages,
            )
            yield ("warp", number, "takes h of step", step), after
        elif warp.doing == AT_BARRIER:
            first = block * config.warps
            own = state.warps[first : first + config.warps]
            if number == first and own == (warp,) * config.warps:
                warps = list(state.warps)
                warps[first : first + config.warps] = [Warp(warp.step, SENDS)] * config.warps
                yield (
                    ("block", block, "passes its barrier in step", warp.step),
                    state._replace(warps=tuple(warps)),
                )
        elif warp.doing == SENDS:
            last = warp.step + 1 == config.steps
            after = Warp(warp.step, HAS_LEFT) if last else Warp(warp.step + 1, WAITS)
            messages = state.messages
            if self._is_sent(warp.step):
                messages |= {Message(peer, number, warp.step) for peer in range(config.blocks)}
            yield (
                ("warp", number, "sends h of step", warp.step),
                State(_with(state.warps, number, after), state.inboxes, messages),
            )

    def _delivered(self, state: State, message: Message) -> State:
        first = message.receiver * self._config.warps
        if all([warp.doing == HAS_LEFT for warp in state.warps[first : first + self._config.warps]]):
            raise Fault(f"a message of step {message.step} to block {message.receiver}, which has left")
        at = self._inbox(message.receiver, message.step)
        inbox = state.inboxes[at]
        values = _with(inbox.values, message.sender, message.step)
        inbox = self._completed(inbox._replace(values=values, missing=inbox.missing - 1))
        return State(state.warps, _with(state.inboxes, at, inbox), state.messages - {message})

    def is_over(self, state: State) -> bool:
        return not state.messages and all([warp.doing == HAS_LEFT for warp in state.warps])


CONFIGURATIONS = (
    Cluster(blocks=2, warps=1, steps=6),
    Cluster(blocks=2, warps=2, steps=4),
    Cluster(blocks=3, warps=1, steps=4),
)
# By fault: where it shows, and a part of what is said of it.
_TWO = Cluster(blocks=2, warps=2, steps=4)
PLANTS = {
    "no wait": (_TWO, "takes h of steps"),
    "the other parity": (_TWO, "takes h of steps"),
    "one buffer": (_TWO, "takes h of steps"),
    "not armed at first": (_TWO, "nobody can go on"),
    "armed once only": (_TWO, "nobody can go on"),
    "the last step is sent": (_TWO, "which has left"),
}
