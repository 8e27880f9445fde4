"""Soups: the mean of all, and of those that help, in memory and on disk."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import merge_cases
import pytest
import torch
from torch import Tensor, nn

from cl_fast.errors import CheckpointError, NonFiniteError, OutputError
from cl_fast.merging import greedy_soup, linear, uniform_soup

TARGET = torch.linspace(-1.0, 1.0, 40)


def candidate(bias: float, noise: float, seed: int, dtype: torch.dtype = torch.float32) -> dict:
    g = torch.Generator().manual_seed(seed)
    value = TARGET + bias + noise * torch.randn(40, generator=g)
    return {"w": value.to(dtype), "steps": torch.tensor(3)}


def score(state: Any) -> float:
    """Higher is better: minus the squared distance from a hidden target."""
    if isinstance(state, Path):
        state = merge_cases.load(state)
    return -((state["w"].double() - TARGET.double()) ** 2).mean().item()


def candidates(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    return {
        "left": candidate(-0.2, 0.3, 1, dtype),
        "bad": candidate(2.0, 0.3, 2, dtype),
        "right": candidate(0.25, 0.3, 3, dtype),
        "noisy": candidate(0.0, 0.6, 4, dtype),
        "good": candidate(0.05, 0.2, 5, dtype),
    }


def by_hand(named: dict[str, dict[str, Tensor]], accept_equal: bool = False) -> list[str]:
    order = sorted(named, key=lambda name: -score(named[name]))
    chosen, best = order[:1], score(named[order[0]])
    for name in order[1:]:
        tried = score(linear([named[n] for n in [*chosen, name]]))
        if tried > best or (accept_equal and tried == best):
            chosen, best = [*chosen, name], tried
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_in_memory(dtype: torch.dtype) -> None:
    named = candidates(dtype)
    calls = []

    def evaluate(state: dict[str, Tensor]) -> float:
        calls.append({key: value.clone() for key, value in state.items()})
        return score(state)

    soup = greedy_soup(named, evaluate)
    assert list(soup.chosen) == by_hand(named)
    assert 1 < len(soup.chosen) < 5
    assert "bad" not in soup.chosen
    assert len(calls) == 2 * 5 - 1
    assert soup.scores == {name: score(state) for name, state in named.items()}
    assert [t.name for t in soup.history] == sorted(named, key=lambda n: -soup.scores[n])
    assert [t.name for t in soup.history if t.accepted] == list(soup.chosen)
    assert soup.score == max(t.score for t in soup.history)
    assert soup.score >= max(soup.scores.values())
    # exactly the mean of the chosen, not a rounded running mean
    assert soup.state_dict is not None
    want = linear([named[name] for name in soup.chosen])
    assert all(torch.equal(soup.state_dict[key], want[key]) for key in want)
    assert score(soup.state_dict) == soup.score
    assert soup.path is None


def test_greedy_on_disk_is_greedy_in_memory(tmp_path: Path) -> None:
    named = candidates(torch.bfloat16)
    folders = {name: merge_cases.save(tmp_path / name, state) for name, state in named.items()}
    seen = []

    def evaluate(folder: Path) -> float:
        assert (folder / "config.json").is_file()
        seen.append(folder)
        return score(folder)

    memory = greedy_soup(named, score)
    for given in (folders, list(folders.values())):
        out = tmp_path / f"soup{len(seen)}"
        disk = greedy_soup(given, evaluate, output=out)
        assert disk.chosen == memory.chosen
        assert disk.history == memory.history
        assert disk.path == out
        assert disk.state_dict is None
        loaded = merge_cases.load(out)
        assert memory.state_dict is not None
        assert all(torch.equal(loaded[k], v) for k, v in memory.state_dict.items())
    assert sorted(p.name for p in tmp_path.iterdir() if "trial" in p.name) == []


def test_accept_no_fall_takes_what_changes_nothing() -> None:
    same = candidate(0.1, 0.1, 1)
    copies = {"a": same, "b": {k: v.clone() for k, v in same.items()}}
    assert greedy_soup(copies, score).chosen == ("a",)
    assert greedy_soup(copies, score, accept="no_fall").chosen == ("a", "b")


def test_known_scores_are_not_evaluated_again() -> None:
    named = candidates()
    calls = itertools.count()

    def evaluate(state: dict[str, Tensor]) -> float:
        next(calls)
        return score(state)

    known = {name: score(state) for name, state in named.items()}
    soup = greedy_soup(named, evaluate, scores=known)
    assert next(calls) == len(named) - 1
    assert soup.history == greedy_soup(named, score).history


def test_candidates_are_left_alone() -> None:
    named = candidates()
    before = {name: state["w"].clone() for name, state in named.items()}
    greedy_soup(named, score)
    assert all(torch.equal(before[name], state["w"]) for name, state in named.items())


def test_one_candidate() -> None:
    state = candidate(0.0, 0.1, 1)
    soup = greedy_soup([state], score)
    assert soup.chosen == ("0",)
    assert soup.state_dict is not None
    assert torch.equal(soup.state_dict["w"], state["w"])
    assert soup.state_dict["w"].data_ptr() != state["w"].data_ptr()


def test_modules_and_into() -> None:
    def module(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(4, 3)

    target = module(9)
    soup = greedy_soup(
        [module(1), module(2)], lambda state: -state["weight"].norm().item(), into=target
    )
    assert soup.state_dict is not None
    assert torch.equal(target.weight, soup.state_dict["weight"])
    mean = uniform_soup([module(1), module(2)], into=target)
    assert torch.equal(target.weight, (module(1).weight + module(2).weight) / 2)
    assert isinstance(mean, dict)


def test_uniform_in_memory_and_on_disk(tmp_path: Path) -> None:
    named = candidates(torch.bfloat16)
    want = linear(named)
    got = uniform_soup(named)
    assert isinstance(got, dict)
    folders = [merge_cases.save(tmp_path / name, state) for name, state in named.items()]
    path = uniform_soup(folders, output=tmp_path / "out")
    assert path == tmp_path / "out"
    loaded = merge_cases.load(tmp_path / "out")
    for key in want:
        assert torch.equal(got[key], want[key])
        assert torch.equal(loaded[key], want[key])
    wide = uniform_soup(folders, output=tmp_path / "wide", out_dtype=torch.float32)
    assert merge_cases.load(tmp_path / "wide")["w"].dtype == torch.float32
    assert wide == tmp_path / "wide"


def test_a_failing_evaluation_leaves_no_trial(tmp_path: Path) -> None:
    folders = [
        merge_cases.save(tmp_path / name, state)
        for name, state in candidates(torch.bfloat16).items()
    ]

    def evaluate(folder: Path) -> float:
        if "trial" in folder.name:
            raise RuntimeError("out of memory")
        return score(folder)

    with pytest.raises(RuntimeError, match="out of memory"):
        greedy_soup(folders, evaluate, output=tmp_path / "soup")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(candidates())


ONE = candidate(0.0, 0.1, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"candidates": []}, ValueError, "candidates must hold at least one model"),
        ({"candidates": "folder"}, TypeError, "candidates must be a list or a mapping"),
        ({"candidates": [ONE, "folder"]}, TypeError, "all in memory or all checkpoint folders"),
        ({"candidates": ["a", "b"]}, ValueError, "output must be given for checkpoint folders"),
        ({"output": "out"}, ValueError, "output has no effect for candidates in memory"),
        ({"accept": "always"}, ValueError, "accept must be 'rise' or 'no_fall'; got 'always'"),
        ({"scores": {"x": 1.0}}, ValueError, "scores has 'x', which is none of 0"),
        ({"evaluate": lambda s: "high"}, TypeError, "evaluate must return a number, got str"),
        ({"evaluate": lambda s: float("nan")}, ValueError, "evaluate returned NaN for '0'"),
        ({"candidates": [ONE, {"w": ONE["w"]}]}, CheckpointError, "lacks tensor 'steps'"),
        (
            {"candidates": [{**ONE, "w": ONE["w"] * float("nan")}]},
            NonFiniteError,
            "tensor 'w' of models['0'] holds NaN",
        ),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        greedy_soup(**{"candidates": [ONE], "evaluate": score, **arguments})


def test_bad_folders(tmp_path: Path) -> None:
    folder = merge_cases.save(tmp_path / "a", candidate(0.0, 0.1, 1, torch.bfloat16))
    with pytest.raises(OutputError, match="exists"):
        greedy_soup([folder], score, output=folder)
    with pytest.raises(ValueError, match="into has no effect for checkpoint folders"):
        greedy_soup([folder], score, output=tmp_path / "out", into=nn.Linear(1, 1))
    with pytest.raises(CheckpointError):
        uniform_soup([folder, tmp_path / "absent"], output=tmp_path / "out")
