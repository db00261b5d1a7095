"""The flags of zoneout's masks: a function of a seed, and as many of them as the probability says."""

from __future__ import annotations

import pytest
import torch
from oracle import split_mix

from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu")


def expected(count: int, probability: float, seed: int) -> torch.Tensor:
    first, *words = [int(w) for w in split_mix(seed, 1 + -(-count // 4))]
    below = int((first >> 11) / 2**53 + probability * 2**16)
    return torch.tensor(
        [(w >> 16 * k) % 2**16 < below for w in words for k in range(4)][:count], dtype=torch.bool
    )


@pytest.mark.parametrize("count", [0, 1, 3, 255, 256, 257, 70003])
@pytest.mark.parametrize("probability", [0.0, 2**-15, 0.1, 0.5, 1.0])
def test_as_documented(count, probability):
    for seed in (0, 1, -1, 2**62 + 12345):
        flags = loader.extension().random_flags([count], probability, seed)
        assert flags.dtype == torch.bool
        assert torch.equal(flags, expected(count, probability, seed))


def test_split_mix_is_the_known_one():
    """The first numbers of seed 1234567, as other implementations give them."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert split_mix(1234567, 5).tolist() == known


def test_the_same_for_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        flags = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            flags.append(loader.extension().random_flags([3, 50, 64, 32], 0.3, 7))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(flags[0], flags[1]) and torch.equal(flags[0], flags[2])


@pytest.mark.parametrize("probability", [2**-16, 0.1, 0.5, 0.9])
def test_share(probability):
    count, seeds = 40_000, 50
    share = sum(
        loader.extension().random_flags([count], probability, seed).double().mean().item()
        for seed in range(seeds)
    )
    deviation = (probability * (1 - probability) / (count * seeds)) ** 0.5 + 2**-16 / seeds**0.5
    assert abs(share / seeds - probability) < 5 * deviation


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_no_probability(probability):
    with pytest.raises(RuntimeError, match=r"expected a probability in \[0, 1\], got"):
        loader.extension().random_flags([3], probability, 0)
