"""The mailbox in global memory, as protocol_model.py explores it.

A workspace of (steps, rows, blocks) pieces of four words is filled with the sentinel before each chunk. In each step a
block takes the pieces of all blocks of the step before, its own too, and then writes its own ones, to places that
nobody has written in this chunk. Memory is weak: each word becomes visible to each block on its own, at any time after
it was written; only that one place does not go back to an older value is relied on.

A block polls one piece after the other. Places are written once and what is visible stays so: in another order, or all
in one try, it would take the same.

A chunk is a launch: when all blocks have left, all that was written is there, and the next one begins by filling the
workspace. Where waits may expire, any try that fails may be the last. Then the block says so in the status word, what
it gives out from there on, its last state too, is NaN, and it leaves; so do, each by its own clock, all who miss its
pieces. The next chunk begins from the last state of all blocks, and computes NaN if any is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from simt.exploration import Fault

WORDS = 4
SENTINEL = "sentinel"
Piece = tuple[object, ...]
EMPTY: Piece = (SENTINEL,) * WORDS

# What a chunk computes with. "stale" is what must not be: the state of an earlier step.
GOOD, NAN, STALE = "good", "NaN", "stale"


def data(kind: str, chunk: int, step: int, row: int, block: int) -> Piece:
    """What a block writes. No two words of good data are alike."""
    if kind == NAN:
        return (NAN,) * WORDS
    return tuple((kind, chunk, step, row, block, word) for word in range(WORDS))


class Launch(NamedTuple):
    """What all blocks share, but for the memory, which follows from how far each block is."""

    chunk: int = 0
    kind: str = GOOD
    status: bool = False


class Block(NamedTuple):
    """It has written so many steps of the chunk. For the next one it is at the `piece`-th of those it needs, of whose
    words it has seen so many versions."""

    written: int = 0
    piece: int = 0
    seen: tuple[int, ...] = ()
    has_left: bool = False


# A launch and its blocks, by numbers that the model gives them: there are few of them, and many states.
State = tuple[int, ...]


@dataclass(frozen=True)
class Mailbox:
    """What is explored."""

    blocks: int
    steps: int
    chunks: int = 1
    rows: int = 1  # of the batch
    tile: int = 2  # rows that a block has room for; those beyond the batch are nobody's
    expiry: bool = False
    plant: str = ""

    def __str__(self) -> str:
        expiry = ", waits may expire" if self.expiry else ""
        return (
            f"mailbox, {self.blocks} blocks, {self.steps} steps, chunks {self.chunks}, "
            f"{self.rows} of {self.tile} rows{expiry}"
        )

    def model(self) -> MailboxModel:
        return MailboxModel(self)


class MailboxModel:
    def __init__(self, config: Mailbox) -> None:
        self._config, self._plant = config, config.plant
        self._parts: list[Launch | Block] = []
        self._numbers: dict[Launch | Block, int] = {}
        self._known: dict[tuple[int, int, int], list[tuple[str, int, int]]] = {}

    def _number(self, part: Launch | Block) -> int:
        number = self._numbers.setdefault(part, len(self._parts))
        if number == len(self._parts):
            self._parts.append(part)
        return number

    # What is where.

    def _rows(self, plant: str) -> int:
        """All rows of a tile run through the code; of those beyond the batch none is polled or written."""
        return self._config.tile if self._plant == plant else self._config.rows

    def _place(self, step: int, row: int, block: int) -> int:
        if self._plant == "places used again":
            step %= 2
        return (step * self._config.rows + row) * self._config.blocks + block

    def _history(self, launch: Launch, place: int, block: int, steps: int) -> list[Piece]:
        """Of a place, which only `block` writes: what it held at first, and what was written in so many steps."""
        pieces = [EMPTY]
        if self._plant == "no memset" and launch.chunk > 0:
            before = launch._replace(chunk=launch.chunk - 1)
            pieces = self._history(before, place, block, self._config.steps)[-1:]
        for step in range(steps):
            for row in range(self._rows("rows beyond the batch are written")):
                piece = data(launch.kind, launch.chunk, step, row, block)
                if self._plant == "data like the sentinel" and (step, block) == (0, 1):
                    piece = (*piece[:2], SENTINEL, *piece[3:])
                lost = self._plant == "a lost store" and (step, row, block) == (0, 0, 1)
                if not lost and self._place(step, row, block) == place:
                    pieces.append(piece)
        return pieces

    def _words(self, launch: Launch, step: int, row: int, owner: int, steps: int) -> list[tuple[object, ...]]:
        """The versions of each word of a piece, and of its flag where there is one."""
        versions = self._history(launch, self._place(step, row, owner), owner, steps)
        words = list(zip(*versions, strict=True))
        if self._plant == "a flag without a fence":
            words.append((SENTINEL, *["set"] * (len(versions) - 1)))
        return words

    # What happens.

    def start(self) -> State:
        return (self._number(Launch()), *[self._number(Block())] * self._config.blocks)

    def events(self, state: State) -> Iterator[tuple[tuple, State]]:
        launch = state[0]
        for at in range(1, len(state)):
            block = self._parts[state[at]]
            owner = block.piece % self._config.blocks  # of the piece that it waits for: all it sees of others
            written = self._parts[state[1 + owner]].written
            key = (launch, state[at], written)
            if key not in self._known:
                self._known[key] = [
                    (what, self._number(after), self._number(launch_after))
                    for what, after, launch_after in self._events_of(
                        self._parts[launch], block, owner, written
                    )
                ]
            for what, after, launch_after in self._known[key]:
                yield ("block", at - 1, what), (launch_after, *state[1:at], after, *state[at + 1 :])
        if self._all_have_ended(state):
            yield from self._next_chunk(state)

    def _events_of(
        self, launch: Launch, block: Block, owner: int, written: int
    ) -> Iterator[tuple[str, Block, Launch]]:
        """What a block may do, where the owner of the piece that it waits for has written so many steps."""
        if self._has_ended(block):
            return
        if block.written == 0 or block.piece == self._config.blocks * self._rows(
            "rows beyond the batch are polled"
        ):
            yield f"writes step {block.written}", Block(block.written + 1), launch
            return
        step, row = block.written - 1, block.piece // self._config.blocks
        name = f"of step {step}, row {row}, of block {owner}"
        another = self._plant == "another step is tested" and step > 0
        words = self._words(launch, step - another, row, owner, written)
        seen = block.seen or (0,) * len(words)
        for word, versions in enumerate(words):
            if seen[word] + 1 < len(versions):
                more = (*seen[:word], seen[word] + 1, *seen[word + 1 :])
                yield f"sees a new word {word} {name}", block._replace(seen=more), launch
        found = [versions[at] for versions, at in zip(words, seen, strict=True)]
        taken = found[:WORDS]
        if another:  # of which the oldest may still be what is visible
            taken = [versions[0] for versions in self._words(launch, step, row, owner, written)]
        if self._is_whole(found):
            self._check(launch, step, row, owner, taken)
            yield f"takes the piece {name}", block._replace(piece=block.piece + 1, seen=()), launch
        elif self._config.expiry:
            if self._plant == "what is there is taken after an expiry":
                self._check(launch, step, row, owner, taken)
            status = self._plant != "the status is not set"
            after = launch._replace(status=launch.status or status)
            yield f"waits too long for the piece {name}", Block(block.written, has_left=True), after

    def _is_whole(self, found: list[object]) -> bool:
        if self._plant in ("one word is tested", "a flag without a fence"):
            return found[-1] != SENTINEL
        return SENTINEL not in found

    def _check(self, launch: Launch, step: int, row: int, owner: int, taken: list[object]) -> None:
        wanted = data(NAN if launch.kind == NAN else GOOD, launch.chunk, step, row, owner)
        if tuple(taken) != wanted:
            piece = f"the piece of step {step}, row {row}, of block {owner}"
            raise Fault(f"for {piece} it takes {taken}, and {list(wanted)} was written")

    # Chunks.

    def _has_ended(self, block: Block) -> bool:
        return block.has_left or block.written == self._config.steps

    def _all_have_ended(self, state: State) -> bool:
        return all([self._has_ended(self._parts[number]) for number in state[1:]])

    def _somebody_gave_up(self, state: State) -> bool:
        return any([self._parts[number].has_left for number in state[1:]])

    def _next_chunk(self, state: State) -> Iterator[tuple[tuple, State]]:
        launch = self._parts[state[0]]
        if launch.chunk + 1 == self._config.chunks:
            return
        kind = launch.kind
        if self._somebody_gave_up(state):
            kind = STALE if self._plant == "the state is kept after an expiry" else NAN
        after = launch._replace(chunk=launch.chunk + 1, kind=kind)
        yield ("chunk", after.chunk, "begins"), (self._number(after), *self.start()[1:])

    def is_over(self, state: State) -> bool:
        if not self._all_have_ended(state):
            return False
        launch = self._parts[state[0]]
        if (launch.kind == NAN or self._somebody_gave_up(state)) and not launch.status:
            raise Fault("NaN is given out, and the status does not say so")
        return launch.chunk + 1 == self._config.chunks


CONFIGURATIONS = (
    Mailbox(blocks=2, steps=4, chunks=2, rows=2, tile=3),
    Mailbox(blocks=2, steps=3, chunks=3, expiry=True),
    Mailbox(blocks=3, steps=2, chunks=2, expiry=True),
    Mailbox(blocks=3, steps=3),
)
# By fault: where it shows, and a part of what is said of it.
_TWO = Mailbox(blocks=2, steps=3, chunks=2)
_TWO_THAT_EXPIRE = Mailbox(blocks=2, steps=3, chunks=2, expiry=True)
PLANTS = {
    "one word is tested": (_TWO, "it takes ['sentinel'"),
    "a flag without a fence": (_TWO, "it takes ['sentinel'"),
    "no memset": (_TWO, "it takes [('good', 0, 0"),
    "places used again": (Mailbox(blocks=2, steps=4), "it takes [('good', 0, 0"),
    "another step is tested": (_TWO, "it takes ['sentinel'"),
    "data like the sentinel": (_TWO, "nobody can go on"),
    "a lost store": (_TWO, "nobody can go on"),
    "rows beyond the batch are polled": (_TWO, "nobody can go on"),
    "rows beyond the batch are written": (_TWO, "it takes [('good', 0, 0, 1"),
    "what is there is taken after an expiry": (_TWO_THAT_EXPIRE, "it takes ['sentinel'"),
    "the status is not set": (_TWO_THAT_EXPIRE, "the status does not say so"),
    "the state is kept after an expiry": (_TWO_THAT_EXPIRE, "it takes [('stale'"),
}
