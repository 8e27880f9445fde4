"""Old and new data in an exact ratio: counts by hand, in fractions, at every prefix."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from fractions import Fraction
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, Subset

from cl_fast.training import mixing
from cl_fast.training.mixing import Mixture, mix


class Numbered(torch.utils.data.Dataset):
    """Samples that tell where they are from."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {"from": self.name, "at": index}


def places(mixture: Mixture) -> list[tuple[str, int]]:
    return [mixture.source(i) for i in range(len(mixture))]


def deviations(mixture: Mixture, upto: int) -> dict[str, Fraction]:
    """The largest |count - ratio n| of each source over all prefixes, by counting."""
    whole = math.lcm(*(ratio.denominator for ratio in mixture.ratios.values()))
    parts = {name: int(ratio * whole) for name, ratio in mixture.ratios.items()}
    seen, worst = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
    for n in range(upto):
        seen[mixture.source(n)[0]] += whole
        for name, part in parts.items():
            worst[name] = max(worst[name], abs(seen[name] - part * (n + 1)))
    return {name: Fraction(off, whole) for name, off in worst.items()}


# The ratio.


@pytest.mark.parametrize("ratio", [0.05, 0.25, 1 / 3, 0.999, 0.5, 0.0123, Fraction(1, 10**7)])
def test_the_ratio_is_exact_at_every_prefix(ratio: Any) -> None:
    mixture = mix(Numbered("new", 50), Numbered("old", 13), ratio, length=10_000)
    assert mixture.ratios["old"] == Fraction(ratio).limit_denominator(10**8)
    for name, off in deviations(mixture, 10_000).items():
        assert off < 1, name


@settings(max_examples=15)
@given(
    shares=st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(lambda x: sum(x) > 0),
    rest=st.integers(1, 200),
    equal=st.booleans(),
)
def test_several_sources_keep_theirs(shares: list[int], rest: int, equal: bool) -> None:
    if equal:
        shares = [max(shares)] * len(shares)
    whole = sum(shares) + rest
    ratios = [Fraction(share, whole) for share in shares]
    olds = tuple(Numbered(f"old{i}", 5 + i) for i in range(len(shares)))
    mixture = mix(Numbered("new", 7), olds, ratios, length=1000)
    read = [share for share in shares if share]
    for name, off in deviations(mixture, 1000).items():
        assert off < 1, name
        if len(set(read)) > 1:
            assert off <= 1 - Fraction(1, 2 * len(read)), name


def test_one_ratio_is_shared_evenly_or_by_size() -> None:
    olds = {"a": Numbered("a", 30), "b": Numbered("b", 10)}
    even = mix(Numbered("new", 100), olds, 0.4, length=1000)
    assert even.counts(1000) == {"new": 600, "a": 200, "b": 200}
    assert even.ratios == {"new": Fraction(3, 5), "a": Fraction(1, 5), "b": Fraction(1, 5)}
    pool = mix(Numbered("new", 100), olds, 0.4, split="size", length=1000)
    assert pool.counts(1000) == {"new": 600, "old": 400}
    seen = Counter(pool[i]["from"] for i in range(1000))
    assert seen == {"new": 600, "a": 300, "b": 100}  # ten whole epochs of the pool


def test_a_ratio_of_0_reads_new_data_only() -> None:
    for old in (Numbered("old", 3), [], None):
        mixture = mix(Numbered("new", 20), old, 0, shuffle=False)
        assert places(mixture) == [("new", i) for i in range(20)]


# The order.


def test_epochs_are_whole_and_differ() -> None:
    mixture = mix(Numbered("new", 40), Numbered("old", 6), 0.25, length=400)
    orders: dict[str, list[int]] = {"new": [], "old": []}
    for name, at in places(mixture):
        orders[name].append(at)
    for name, size in (("new", 40), ("old", 6)):
        epochs = [orders[name][i : i + size] for i in range(0, len(orders[name]), size)]
        whole = [epoch for epoch in epochs if len(epoch) == size]
        assert all(sorted(epoch) == list(range(size)) for epoch in whole)
        assert len(set(map(tuple, whole))) > len(whole) // 2 > 1


def test_own_order_from_the_start() -> None:
    mixture = mix(Numbered("new", 40), Numbered("old", 6), 0.2, length=100, shuffle_old=False)
    old = [at for name, at in places(mixture) if name == "old"]
    new = [at for name, at in places(mixture) if name == "new"]
    assert old == [i % 6 for i in range(20)]
    assert new[:40] != sorted(new[:40])
    assert sorted(new[:40]) == list(range(40))
    plain = mix(Numbered("new", 40), Numbered("old", 6), 0.2, shuffle=False, length=9)
    assert places(plain) == [("new", i) for i in range(4)] + [("old", 0)] + [
        ("new", i) for i in range(4, 8)
    ]


def test_seeds_differ_and_repeat() -> None:
    def order(seed: int) -> list[tuple[str, int]]:
        return places(mix(Numbered("new", 40), Numbered("old", 40), 0.5, seed=seed))

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("ratio", [0, 0.05, 0.3, Fraction(2, 3)])
def test_lengths(ratio: Any, epochs: int) -> None:
    new, old = Numbered("new", 41), Numbered("old", 9)
    every = mix(new, old, ratio, epochs=epochs)
    counts = every.counts(len(every))
    assert counts["new"] == 41 * epochs
    assert every.counts(len(every) - 1)["new"] == 41 * epochs - 1, "it ends with the last new one"
    same = mix(new, old, ratio, epochs=epochs, length="compute-equivalent")
    assert len(same) == 41 * epochs
    assert places(same) == places(every)[: len(same)]
    assert len(mix(new, old, ratio, length=17)) == 17


def test_a_sample_is_the_same_however_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_BLOCK", 32)
    olds = {"a": Numbered("a", 30), "b": Numbered("b", 11)}
    for ratio in (0.3, {"a": 0.3, "b": 0.1}):
        straight = mix(Numbered("new", 500), olds, ratio)
        rows = [straight[i] for i in range(len(straight))]
        fresh = mix(Numbered("new", 500), olds, ratio)
        shuffled = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(0)).tolist()
        assert [fresh[i] for i in shuffled] == [rows[i] for i in shuffled]
        assert fresh.__getitems__(shuffled[:40]) == [rows[i] for i in shuffled[:40]]
        assert fresh.__getitems__([3, 1, -1]) == [rows[3], rows[1], rows[-1]]
        assert fresh.__getitems__([]) == []
        for start in range(0, 300, 7):
            assert fresh.__getitems__(list(range(start, start + 7))) == rows[start : start + 7]
        again = pickle.loads(pickle.dumps(fresh))
        assert [again[i] for i in range(100)] == rows[:100]
        counted = Counter(row["from"] for row in rows[:77])
        assert {k: v for k, v in fresh.counts(77).items() if v} == counted


def test_loaders_read_it_with_and_without_workers() -> None:
    mixture = mix(Numbered("new", 50), Numbered("old", 9), 0.2)
    expected = [at for _, at in places(mixture)]
    for workers in (0, 2):
        loader = DataLoader(mixture, batch_size=8, num_workers=workers)
        assert [int(i) for batch in loader for i in batch["at"]] == expected


# Parts.


@pytest.mark.parametrize("ratio", [0.5, 0.05, 0.7, {"a": 0.3, "b": 0.1}])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_whole(ratio: Any, world: int) -> None:
    olds = {"a": Numbered("a", 30), "b": Numbered("b", 11)}
    old = olds if isinstance(ratio, dict) else olds["a"]
    whole = mix(Numbered("new", 103), old, ratio)
    order, shards = places(whole), [whole.shard(rank, world) for rank in range(world)]
    read = [places(shard) for shard in shards]
    rounds = len(whole) // world
    part = 1 - whole.ratios["new"]
    for n in range(1, rounds + 1):
        # All of them together have read a prefix of the whole.
        now = sorted(mine[n - 1] for mine in read)
        assert now == sorted(order[(n - 1) * world : n * world])
        for mine, shard in zip(read, shards, strict=True):
            old_ones = sum(name != "new" for name, _ in mine[:n])
            assert abs(old_ones - part * n) < 1
            assert shard.counts(n)["new"] == n - old_ones
            for name in whole.names[1:]:
                assert shard.counts(n)[name] == sum(x == name for x, _ in mine[:n])
    assert sorted(x for mine in read for x in mine) == sorted(order)
    assert {len(mine) for mine in read} <= {rounds, rounds + 1}
    assert {len(whole.shard(rank, world, drop_last=True)) for rank in range(world)} == {rounds}


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_skip_is_where_a_run_goes_on(unit: Any) -> None:
    lengths = {"new": [1 + i % 5 for i in range(90)], "old": [3] * 20}
    given = lengths if unit == "tokens" else None
    whole = mix(Numbered("new", 90), Numbered("old", 20), 0.3, unit=unit, lengths=given)
    order = places(whole)
    for n in range(0, len(whole) + 1, 11):
        rest = whole.skip(n)
        assert places(rest) == order[n:]
        counts = rest.counts(len(rest))
        assert {k: v for k, v in counts.items() if v} == Counter(name for name, _ in order[n:])
    shard = whole.shard(1, 3)
    assert places(shard.skip(4)) == places(shard)[4:]
    assert places(whole.skip(5).skip(6)) == order[11:]


def test_far_places_cost_what_near_ones_cost() -> None:
    far = 10**11
    mixture = mix(Numbered("new", 1 << 40), Numbered("old", 1 << 40), 0.05, length=10**12)
    assert mixture.counts(far) == {"new": far * 19 // 20, "old": far // 20}
    assert mixture.source(19)[0] == "old"
    assert mixture.source(far + 19)[0] == "old"
    assert mixture[far + 19]["at"] == mixture.skip(far)[19]["at"]


# Tokens.


@settings(max_examples=25)
@given(
    new=st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any),
    olds=st.lists(
        st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any), min_size=1, max_size=3
    ),
    shares=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    length=st.sampled_from(["all-new", "compute-equivalent", 50]),
)
def test_tokens_are_in_the_ratio_within_one_sample(
    new: list[int], olds: list[list[int]], shares: list[int], length: Any
) -> None:
    ratios = [Fraction(share, 80) for share in shares[: len(olds)]]
    counted = {"new": new, **{f"old{i}": x for i, x in enumerate(olds)}}
    sets = {name: Numbered(name, len(x)) for name, x in counted.items()}
    mixture = mix(
        sets["new"],
        tuple(sets[f"old{i}"] for i in range(len(olds))),
        ratios,
        unit="tokens",
        lengths=counted,
        length=length,
    )
    longest, tokens = max(map(max, counted.values())), Counter[str]()
    order, together = places(mixture), sum(ratios)
    for name, at in order:
        tokens[name] += counted[name][at]
        everything = sum(tokens.values())
        old = everything - tokens["new"]
        assert abs(old - together * everything) < longest
        for i, ratio in enumerate(ratios):
            ahead = tokens[f"old{i}"] - ratio * everything
            assert -ratio / together * len(olds) * longest < ahead < longest
    if length == "all-new":
        assert sorted(at for name, at in order if name == "new") == list(range(len(new)))
    if length == "compute-equivalent":
        assert sum(new) - longest < sum(tokens.values()) <= sum(new)
    if length == 50:
        assert len(order) == 50


def test_an_old_sample_comes_when_old_data_is_in_debt() -> None:
    """The rule of two counters, step by step."""
    new, old = [7, 1, 4, 9, 2, 2, 8], [3, 6, 5]
    given = {"new": new, "old": old}
    ratio = Fraction(3, 10)
    sets = Numbered("new", 7), Numbered("old", 3)
    mixture = mix(*sets, ratio, unit="tokens", shuffle=False, lengths=given)
    expected, i, j, a, b = [], 0, 0, 0, 0
    while i < len(new):
        if ratio * (a + b) > b:
            expected.append(("old", j % 3))
            b, j = b + old[j % 3], j + 1
        else:
            expected.append(("new", i))
            a, i = a + new[i], i + 1
    assert places(mixture) == expected


def test_where_lengths_come_from() -> None:
    rows = [{"input_ids": list(range(1 + i % 7)), "n": 1 + i % 7} for i in range(40)]
    more = [{"input_ids": list(range(9)), "n": 9} for _ in range(10)]
    expected = places(
        mix(
            rows,
            more,
            0.3,
            unit="tokens",
            lengths={"new": [r["n"] for r in rows], "old": [r["n"] for r in more]},
        )
    )
    tables = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(more)
    for sources in ((rows, more), tables):
        for how in (None, "n", lambda row: len(row["input_ids"])):
            assert places(mix(*sources, 0.3, unit="tokens", lengths=how)) == expected
    pool = mix(rows, {"a": more[:4], "b": more[4:]}, 0.3, unit="tokens", split="size")
    assert places(pool) == expected


# Hosts.


def test_datasets_as_sources_and_as_a_result() -> None:
    new = datasets.Dataset.from_dict({"at": list(range(50)), "from": ["new"] * 50})
    olds = {
        name: datasets.Dataset.from_dict({"at": list(range(9)), "from": [name] * 9})
        for name in ("a", "b")
    }
    for split in ("even", "size"):
        mixture = mix(new, olds, 0.2, split=split)
        assert mixture.column_names == ["at", "from"]
        rows = [mixture[i] for i in range(len(mixture))]
        assert mixture.__getitems__(list(range(len(mixture)))) == rows
        assert list(mixture.to_dataset()) == rows
    plain = mix(Numbered("new", 50), {n: Numbered(n, 9) for n in olds}, 0.2)
    assert [plain[i] for i in range(20)] == [mix(new, olds, 0.2)[i] for i in range(20)]
    with pytest.raises(TypeError, match="'new' is Numbered"):
        plain.to_dataset()


def test_lists_of_samples_and_of_datasets() -> None:
    samples = [{"from": "old", "at": i} for i in range(4)]
    assert mix(Numbered("new", 9), samples, 0.1).names == ("new", "old")
    two = [Numbered("a", 3), Subset(Numbered("b", 9), [1, 2])]
    assert mix(Numbered("new", 9), two, 0.1).names == ("new", "old0", "old1")
    assert mix(Numbered("new", 9), (samples, samples), 0.1).names == ("new", "old0", "old1")


def test_another_mixture_is_named() -> None:
    def made(**changes: Any) -> Mixture:
        given = {"ratio": 0.2, "seed": 1, **changes}
        return mix(
            Numbered("new", 9),
            Numbered("old", changes.pop("old", 4)),
            **{k: v for k, v in given.items() if k != "old"},
        )

    state = made().state_dict()
    made().load_state_dict(pickle.loads(pickle.dumps(state)))
    for change, key in (
        ({"seed": 2}, "seed"),
        ({"ratio": 0.3}, "ratios"),
        ({"old": 5}, "sizes"),
        ({"shuffle_old": False}, "shuffled"),
        ({"length": 7}, "length"),
    ):
        with pytest.raises(ValueError, match=f"^{'length' if key == 'ratios' else key} of"):
            made(**change).load_state_dict(state)


# Bad input.

NEW_ONES, OLD_ONES = Numbered("new", 9), Numbered("old", 4)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield {}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((NEW_ONES, OLD_ONES, 1), {}, ValueError, r"ratio must lie in \[0, 1\).*got 1"),
        ((NEW_ONES, OLD_ONES, -0.1), {}, ValueError, r"ratio must lie in \[0, 1\)"),
        ((NEW_ONES, OLD_ONES, float("nan")), {}, ValueError, r"ratio must lie in \[0, 1\)"),
        ((NEW_ONES, OLD_ONES, True), {}, TypeError, "ratio must be a number"),
        ((NEW_ONES, OLD_ONES, "0.1"), {}, TypeError, "ratio must be a number"),
        ((NEW_ONES, OLD_ONES, 7.3e-7), {}, ValueError, "near no fraction.*fractions.Fraction"),
        ((NEW_ONES, OLD_ONES, [0.1, 0.1]), {}, ValueError, "2 numbers for 1 old"),
        ((NEW_ONES, (OLD_ONES, OLD_ONES), [0.5, 0.5]), {}, ValueError, "sum up to 1.0"),
        ((NEW_ONES, (OLD_ONES, OLD_ONES), [0.5, 1.5]), {}, ValueError, "ratio of 'old1' must lie"),
        ((NEW_ONES, {"a": OLD_ONES}, {"b": 0.1}), {}, ValueError, r"\['b'\], but old has \['a'\]"),
        ((NEW_ONES, {"new": OLD_ONES}, 0.1), {}, ValueError, "names other than 'new'"),
        ((Numbered("new", 0), OLD_ONES, 0.1), {}, ValueError, "new is empty"),
        ((NEW_ONES, Numbered("old", 0), 0.1), {}, ValueError, "old source 'old' is empty"),
        ((NEW_ONES, {"a": OLD_ONES, "b": []}, 0.1), {}, ValueError, "old source 'b' is empty"),
        ((NEW_ONES, {"a": OLD_ONES, "b": []}, 0.1), {"split": "size"}, ValueError, "'b' is empty"),
        ((NEW_ONES, (), 0.1), {}, ValueError, "old is empty: with a ratio above 0"),
        ((NEW_ONES, None, 0.1), {}, ValueError, "old is empty"),
        ((Stream(), OLD_ONES, 0.1), {}, TypeError, "new must be a map-style dataset.*got Stream"),
        ((NEW_ONES, {"a": Stream()}, 0.1), {}, TypeError, "a must be a map-style dataset"),
        (
            (NEW_ONES, [{"from": 1, "text": 2}], 0.1),
            {},
            ValueError,
            r"columns of 'new' and 'old' differ: only 'new' has \['at'\], only 'old' has \['te",
        ),
        ((NEW_ONES, [3, 4], 0.1), {}, ValueError, r"\['at', 'from'\].*'old' are of no columns"),
        ((NEW_ONES, OLD_ONES, 0.1), {"unit": "words"}, ValueError, "unit must be one of"),
        ((NEW_ONES, OLD_ONES, 0.1), {"split": "odd"}, ValueError, "split must be one of"),
        ((NEW_ONES, (OLD_ONES,), [0.1]), {"split": "size"}, ValueError, "split is for one ratio"),
        ((NEW_ONES, OLD_ONES, 0.1), {"length": "new"}, ValueError, "length must be 'all-new'"),
        ((NEW_ONES, OLD_ONES, 0.1), {"length": 0}, ValueError, "length must be at least 1"),
        ((NEW_ONES, OLD_ONES, 0.1), {"length": 1.5}, TypeError, "length must be a number"),
        ((NEW_ONES, OLD_ONES, 0.1), {"length": 5, "epochs": 2}, ValueError, "give one"),
        ((NEW_ONES, OLD_ONES, 0.1), {"epochs": 0}, ValueError, "epochs must be at least 1"),
        ((NEW_ONES, OLD_ONES, 0.1), {"seed": 1.0}, TypeError, "seed must be an int"),
        ((NEW_ONES, OLD_ONES, 0.1), {"shuffle": 1}, TypeError, "shuffle must be True or False"),
        ((NEW_ONES, OLD_ONES, 0.1), {"lengths": "n"}, ValueError, "lengths are for unit='tokens'"),
        ((NEW_ONES, OLD_ONES, 0.1), {"unit": "tokens"}, ValueError, "no 'input_ids' to count"),
        (
            (NEW_ONES, OLD_ONES, 0.1),
            {"unit": "tokens", "lengths": "n"},
            ValueError,
            "'new' has no column 'n'",
        ),
        (
            (NEW_ONES, OLD_ONES, 0.1),
            {"unit": "tokens", "lengths": {"new": [1] * 9}},
            ValueError,
            "lengths has nothing for 'old'",
        ),
        (
            (NEW_ONES, OLD_ONES, 0.1),
            {"unit": "tokens", "lengths": {"new": [1] * 8, "old": [1] * 4}},
            ValueError,
            "lengths of 'new' must be 9 integers",
        ),
        (
            (NEW_ONES, OLD_ONES, 0.1),
            {"unit": "tokens", "lengths": {"new": [1] * 9, "old": [0] * 4}},
            ValueError,
            "lengths of 'old' must not be negative, nor all 0",
        ),
        (
            (Numbered("n", 10**6), (OLD_ONES, OLD_ONES), [0.123457, 0.1]),
            {},
            ValueError,
            "repeat after 1000000 samples.*round them",
        ),
        (
            (Numbered("n", 1 << 60), OLD_ONES, 0.123457),
            {},
            ValueError,
            "too many for the ratio",
        ),
    ],
)
def test_bad_input(arguments: Any, options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mix(*arguments, **options)


def test_bad_places() -> None:
    mixture = mix(NEW_ONES, OLD_ONES, 0.1)
    for wrong in (len(mixture), -len(mixture) - 1):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range"):
            mixture[wrong]
        with pytest.raises(IndexError, match=f"index {wrong} is out of range"):
            mixture.__getitems__([0, wrong])
    with pytest.raises(TypeError):
        mixture[1:3]
    with pytest.raises(ValueError, match=r"n must lie in \[0, 9\]; got 10"):
        mixture.counts(10)
    with pytest.raises(ValueError, match=r"n must lie in \[0, 9\]; got -1"):
        mixture.skip(-1)
    with pytest.raises(ValueError, match="rank must lie in"):
        mixture.shard(2, 2)
    for part in (mixture.skip(2), mixture.shard(0, 2)):
        with pytest.raises(ValueError, match="shard a whole mixture"):
            part.shard(0, 2)


def test_a_batch_of_tables_is_one_call_and_the_same_samples() -> None:
    def table(start: int, count: int) -> datasets.Dataset:
        rows = {"input_ids": [[start + i, i] for i in range(count)]}
        return datasets.Dataset.from_dict(rows).with_format("torch")

    old = {"a": table(1000, 7), "b": table(2000, 9)}
    mixture = mix(table(0, 60), old, 0.25, seed=3)
    assert mixture._table is not None
    batch = mixture.__getitems__(list(range(len(mixture))))
    for i, row in enumerate(batch):
        assert torch.equal(row["input_ids"], mixture[i]["input_ids"])
    # Of another format: still right, source by source.
    mixed = mix(table(0, 60), table(1000, 7).with_format(None), 0.25, seed=3)
    assert mixed._table is None
    assert len(mixed.__getitems__(list(range(40)))) == 40
