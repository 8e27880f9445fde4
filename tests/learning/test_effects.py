"""Replay, distillation and projection keep what a model knew: the claims of the effects table, on
two tasks and one seed, with wide margins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "effects"))

from methods import METHODS, Found
from toy import BASE, Toy, accuracy


@pytest.fixture(scope="module")
def base() -> Any:
    toy = Toy(0)
    return toy, toy.trained_base(steps=350)


def found(name: str, base: Any) -> Found:
    method = next(method for method in METHODS if method.name == name)
    return method.run(*base, steps=80, tasks=2)


@pytest.fixture(scope="module")
def sequential(base: Any) -> Found:
    return found("sequential", base)


@pytest.mark.slow
def test_training_on_forgets(base: Any, sequential: Found) -> None:
    toy, weights = base
    model = toy.model(weights).eval()
    assert min(accuracy(model, toy.every(name)) for name in BASE) > 0.95
    assert sequential.learned > 0.9
    assert sequential.kept < 0.4
    assert sequential.backward < -0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("replay 25 %", 0.9),
        ("self-distillation, old prompts", 0.8),
        ("self-distillation, own prompts", 0.7),
    ],
)
def test_replay_and_distillation_keep(name: str, kept: float, base: Any, sequential: Found) -> None:
    result = found(name, base)
    assert result.kept >= kept
    assert result.backward > sequential.backward + 0.5
    assert result.learned > 0.9


@pytest.mark.slow
def test_projection_off_inputs_keeps_and_learns_less(base: Any, sequential: Found) -> None:
    result = found("projection off inputs (GPM)", base)
    assert result.kept > sequential.kept + 0.4
    assert result.backward > sequential.backward + 0.3
    assert result.learned < sequential.learned


@pytest.mark.slow
def test_a_merge_of_separate_loras_is_scored(base: Any) -> None:
    result = found("separate LoRAs, mean", base)
    assert result.learned > 0.8
    assert result.average < result.learned
    assert torch.isnan(torch.tensor(result.backward))
