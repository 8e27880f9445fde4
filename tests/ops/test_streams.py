"""The random stream against its published vectors and against docs/random-stream.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_fast.ops import keep_mask, keep_threshold, stream_key, streams

PAGE = Path(__file__).parents[2] / "docs" / "random-stream.md"


def _rows(*heads: str) -> list[list[str]]:
    """The cells of the table of the page whose columns are `heads`."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    at = lines.index(f"| {' | '.join(heads)} |") + 2
    rows = []
    while at < len(lines) and lines[at].startswith("|"):
        rows.append([cell.strip() for cell in lines[at].strip("|").split("|")])
        at += 1
    assert rows
    return rows


# Random123's known-answer file, kat_vectors: philox4x32 10.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter: str, key: str, result: str) -> None:
    assert streams.philox4x32_10(_words(counter), _words(key)) == _words(result)  # type: ignore[arg-type]


def test_page_states_the_known_answers() -> None:
    assert [tuple(row) for row in _rows("counter", "key", "result")] == KNOWN


def test_keys_of_the_page() -> None:
    for seed, model, tensor, key in _rows("seed", "model", "tensor", "key"):
        names = ["" if name == "(empty)" else name for name in (model, tensor)]
        assert f"{stream_key(int(seed), *names):016x}" == key


def test_draws_and_masks_of_the_page() -> None:
    key = int(_rows("seed", "model", "tensor", "key")[0][3], 16)
    for first, draws in _rows("first element", "u of eight elements in a row"):
        got = [streams.uniform32(key, int(first) + i) for i in range(8)]
        assert " ".join(f"{draw:08x}" for draw in got) == draws
    for density, threshold, mask in _rows("density", "T", "mask"):
        t = keep_threshold(float(density))
        assert t == int(threshold)
        assert "".join("01"[keep] for keep in streams.keep_mask(key, 0, 32, t)) == mask
        assert "".join("01"[keep] for keep in keep_mask(key, 32, t).tolist()) == mask


@settings(max_examples=60, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**40) | st.integers(2**36 - 40, 2**36),
    n=st.integers(0, 60),
    threshold=st.integers(0, 2**32) | st.sampled_from([0, 1, 2**24, 2**31, 2**32 - 1, 2**32]),
)
def test_vectorised_mask_is_the_scalar_one(key: int, start: int, n: int, threshold: int) -> None:
    got = keep_mask(key, n, threshold, start=start)
    assert got.tolist() == streams.keep_mask(key, start, n, threshold)


def test_deeper_levels_decide() -> None:
    """Thresholds between two draws that share their leading bytes: 1, 2 and 3 bytes deep."""
    key = stream_key(0, "m", "t")
    draws = [streams.uniform32(key, i) for i in range(4000)]
    for depth in (8, 16, 24):
        seen: dict[int, int] = {}
        for i, draw in enumerate(draws):
            j = seen.setdefault(draw >> (32 - depth), i)
            if draws[j] != draw:
                high = max(draw, draws[j])
                mask = keep_mask(key, 4000, high).tolist()
                assert mask == [d < high for d in draws]
                break
        else:
            assert depth > 16  # 4000 draws seldom share three bytes


def test_mask_does_not_depend_on_where_it_starts() -> None:
    key, threshold = stream_key(3, "a", "b"), keep_threshold(0.37)
    whole = keep_mask(key, 5000, threshold)
    for start in (1, 15, 16, 17, 4999):
        assert torch.equal(keep_mask(key, 5000 - start, threshold, start=start), whole[start:])


def test_keep_rate() -> None:
    key = stream_key(0, "m", "t")
    for density in (0.01, 0.1, 0.5, 0.9):
        kept = keep_mask(key, 1_000_000, keep_threshold(density)).float().mean().item()
        assert abs(kept - density) < 5 * (density * (1 - density) / 1e6) ** 0.5


@pytest.mark.parametrize(
    ("density", "threshold"),
    [(0.0, 0), (1.0, 2**32), (0.5, 2**31), (2.0**-32, 1), (2.0**-34, 0), (1 - 2.0**-40, 2**32)],
)
def test_keep_threshold(density: float, threshold: int) -> None:
    assert keep_threshold(density) == threshold


def test_names_make_different_streams() -> None:
    keys = {stream_key(seed, m, t) for seed in (0, 1) for m in ("a", "b") for t in ("a", "b")}
    assert len(keys) == 8


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((1.0, "m", "t"), TypeError, "seed must be an int"),
        ((True, "m", "t"), TypeError, "seed must be an int"),
        ((0, 3, "t"), TypeError, "model must be a str"),
        ((0, "m", None), TypeError, "tensor must be a str"),
        ((0, "m\0", "t"), ValueError, "model must not hold a NUL"),
    ],
)
def test_bad_names(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        stream_key(*arguments)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_density(density: float) -> None:
    with pytest.raises(ValueError, match="density must be in"):
        keep_threshold(density)
