"""A tagger of ragged text: which kind of token does each character of a line of Python belong to?

The text is Python's own standard library, and `tokenize` gives the tags, so nothing is downloaded. A batch holds lines
of different lengths as one PackedSequence, and the layer computes nothing for padding. The run ends with the accuracy
on files that were not seen in training, beside that of the most frequent tag of each character, and with a picture of
some lines in the colours of their predicted tags.
"""

from __future__ import annotations

import argparse
import keyword
import random
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from shown import picture
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_ext

TAGS = ["space", "keyword", "name", "number", "string", "comment", "operator"]
COLORS = ["white", "#aa3377", "#222222", "#228833", "#4477aa", "#999999", "#cc6622"]
LONGEST = 100
CHARACTERS = 128  # ASCII

Line = tuple[str, list[int]]


def tag_of(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    kinds = {
        tokenize.NUMBER: "number",
        tokenize.STRING: "string",
        tokenize.COMMENT: "comment",
        tokenize.OP: "operator",
    }
    return kinds.get(token.type)


def tagged_lines(path: Path) -> list[Line]:
    """The lines of a file with the tag of each character; without those of which a token takes several lines."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    texts: dict[int, str] = {}
    tags: dict[int, list[int]] = {}
    left_out = set()
    for token in tokens:
        (first, begin), (last, end) = token.start, token.end
        if first != last:
            left_out |= set(range(first, last + 1))
            continue
        if first not in texts:
            texts[first] = token.line.split("\n")[0]
            tags[first] = [0] * len(texts[first])
        tag = tag_of(token)
        if tag is not None:
            tags[first][begin:end] = [TAGS.index(tag)] * (end - begin)
        elif token.type not in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            left_out.add(first)
    return [
        (texts[n], tags[n])
        for n in sorted(set(texts) - left_out)
        if texts[n].strip() and texts[n].isascii() and len(texts[n]) <= LONGEST
    ]


def load_lines(files: int, seed: int = 0) -> tuple[list[Line], list[Line]]:
    """Lines to train on, and lines of other files to test with."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in library.glob("*.py") if path.stat().st_size > 5000)
    random.Random(seed).shuffle(paths)
    lines = [tagged_lines(path) for path in paths[:files]]
    test = max(1, files // 5)
    return [x for part in lines[test:] for x in part], [x for part in lines[:test] for x in part]


def pack(lines: list[Line]) -> tuple[PackedSequence, PackedSequence]:
    characters = [torch.tensor([ord(c) for c in text]) for text, _ in lines]
    tags = [torch.tensor(tags) for _, tags in lines]
    return pack_sequence(characters, enforce_sorted=False), pack_sequence(tags, enforce_sorted=False)


class Tagger(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 24)
        self.lstm = lstm_ext.LSTM(24, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, len(TAGS))

    def forward(self, characters: PackedSequence) -> Tensor:
        """Scores for each character, in the packed order."""
        output, _ = self.lstm(characters._replace(data=self.embed(characters.data)))
        return self.head(output.data)


def accuracy(model: Tagger, lines: list[Line]) -> float:
    right = count = 0
    with torch.no_grad():
        for i in range(0, len(lines), 256):
            characters, tags = pack(lines[i : i + 256])
            right += (model(characters).argmax(-1) == tags.data).sum().item()
            count += tags.data.numel()
    return right / count


def accuracy_by_character(train: list[Line], test: list[Line]) -> float:
    """Of the tag that a character most often has, whatever stands around it."""
    counts: dict[str, Counter] = {}
    for text, tags in train:
        for character, tag in zip(text, tags, strict=True):
            counts.setdefault(character, Counter())[tag] += 1
    usual = {character: c.most_common(1)[0][0] for character, c in counts.items()}
    pairs = [pair for text, tags in test for pair in zip(text, tags, strict=True)]
    return sum(usual.get(character) == tag for character, tag in pairs) / len(pairs)


def draw(plt: Any, model: Tagger, lines: list[Line]) -> Any:
    rows = [line for line in lines if 30 <= len(line[0]) <= 80 and len(set(line[1])) >= 5]
    rows = random.Random(1).sample(rows, min(14, len(rows)))
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(rows) + 0.7), layout="constrained")
    for y, (text, tags) in enumerate(rows):
        with torch.no_grad():
            predicted = model(pack([(text, tags)])[0]).argmax(-1).tolist()
        for x, (character, tag, right) in enumerate(zip(text, predicted, tags, strict=True)):
            if character != " ":
                # A space that is predicted here would be white.
                axis.text(
                    x, -y, character, color=COLORS[tag or 2], family="monospace", fontsize=9, ha="center"
                )
            if tag != right:
                axis.axvspan(
                    x - 0.5,
                    x + 0.5,
                    *[(len(rows) - y + d) / (len(rows) + 1) for d in (-0.2, 0.6)],
                    color="#ffdd88",
                )
    axis.set(xlim=(-1, 80), ylim=(-len(rows), 1))
    axis.axis("off")
    for n, (tag, color) in enumerate(zip(TAGS[1:], COLORS[1:], strict=True)):
        axis.text(
            1 + 11 * n, 0.9, tag, color=color, family="monospace", fontsize=9, weight="bold", va="center"
        )
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=60, help="how many files of the standard library")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64, help="lines a step")
    parser.add_argument("--quick", action="store_true", help="a few files and steps")
    output = Path(__file__).parent / "output" / "tagger.png"
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args()
    if options.quick:
        options.files, options.steps = 8, 60

    torch.manual_seed(0)
    train, test = load_lines(options.files)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    draws = random.Random(0)
    lengths = [len(text) for text, _ in train]
    print(
        f"{len(train)} lines to train on, of {min(lengths)} to {max(lengths)} characters; {len(test)} to test with"
    )
    padded = held = 0
    begin = time.perf_counter()
    for step in range(1, options.steps + 1):
        batch = draws.sample(train, options.batch)
        characters, tags = pack(batch)
        held += tags.data.numel()
        padded += options.batch * len(tags.batch_sizes)
        loss = F.cross_entropy(model(characters), tags.data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, options.steps // 6) == 0:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)
    print(
        f"trained in {time.perf_counter() - begin:.1f} s; "
        f"the batches hold {held / padded:.0%} of the characters of padded ones"
    )

    ours, usual = accuracy(model, test), accuracy_by_character(train, test)
    print(f"accuracy on other files: {ours:.1%}; of each character's most frequent tag: {usual:.1%}")
    picture(options.output, draw, model, test, dpi=80)
    if ours <= usual:
        print("error: the tagger is no better than a table of characters", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
