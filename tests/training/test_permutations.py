"""Orders that are computed on the fly: bijections, of good spread, as documented."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_fast.training.permutations import Permutation, order_key


def test_a_bijection_for_every_n() -> None:
    for n in range(1, 1001):
        sent = Permutation(n, n % 7).many(np.arange(n))
        assert sent.dtype == np.int64
        assert np.array_equal(np.sort(sent), np.arange(n)), n


@given(n=st.integers(1, 1 << 62), seed=st.integers(0, 1 << 70), data=st.data())
def test_one_many_and_the_inverse_agree(n: int, seed: int, data: st.DataObject) -> None:
    order = Permutation(n, seed)
    few = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    sent = [order[i] for i in few]
    assert all(0 <= x < n for x in sent)
    assert [order.inverse(x) for x in sent] == few
    assert order.many(few).tolist() == sent


def test_no_two_of_many_meet_in_a_large_range() -> None:
    n = 1 << 40
    sent = Permutation(n, 3).many(np.arange(200_000))
    assert len(np.unique(sent)) == 200_000
    # Uniform over the range: the mean of 200,000 has a deviation of n / sqrt(12 * 200,000).
    assert abs(sent.mean() / n - 0.5) < 5 / math.sqrt(12 * 200_000)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17])
def test_every_place_is_equally_likely(n: int) -> None:
    """Chi-square over keys, for each index: (n - 1) degrees of freedom."""
    keys = 2000
    counts = np.zeros((n, n))
    for seed in range(keys):
        counts[np.arange(n), Permutation(n, seed).many(np.arange(n))] += 1
    expected = keys / n
    chi = ((counts - expected) ** 2 / expected).sum(1)
    degrees = n - 1
    assert (chi < degrees + 6 * math.sqrt(2 * degrees) + 8).all(), chi


def test_neighbours_part() -> None:
    n = 100_000
    sent = Permutation(n, 0).many(np.arange(n))
    steps = np.diff(sent)
    # Of a random order one step in n is +1.
    assert (steps == 1).sum() < 12
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 5 / math.sqrt(n)


def test_the_format_does_not_change() -> None:
    """The head of the module, written out once more."""
    n, m = 1000, 32
    digest = hashlib.blake2b(b"5\x00old\x002", digest_size=48, person=b"cl_fast order v1").digest()
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(6)]
    assert tuple(keys) == order_key(5, "old", 2)
    for start in (0, 1, 500, 999):
        x = start
        while True:
            left, right = x // m, x % m
            for k in keys:
                y = (right ^ k) * 0x9E3779B97F4A7C15 % 2**64
                y = (y ^ (y >> 32)) * 0xBF58476D1CE4E5B9 % 2**64
                left, right = right, (left + ((y >> 32) * m >> 32)) % m
            x = left * m + right
            if x < n:
                break
        assert Permutation(n, order_key(5, "old", 2))[start] == x


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"n must lie in \[0, 2\*\*62\]; got -1"):
        Permutation(-1, 0)
    with pytest.raises(ValueError, match="n must lie"):
        Permutation((1 << 62) + 1, 0)
    with pytest.raises(ValueError, match="key must be 6 words"):
        Permutation(3, (1, 2))
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match=r"range\(3\)"):
            Permutation(3, 0)[wrong]
        with pytest.raises(IndexError, match=r"range\(3\)"):
            Permutation(3, 0).inverse(wrong)
        with pytest.raises(IndexError, match=r"range\(3\)"):
            Permutation(3, 0).many([0, wrong])
    assert Permutation(0, 0).many([]).shape == (0,)
