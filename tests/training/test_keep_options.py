"""The options of every keep, with which a run is resumed: they tell whatever changes results."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import llama
from torch import nn

import cl_fast.training
from cl_fast.losses import TeacherCache
from cl_fast.training import Keep

ROWS = [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}]
BATCH = {"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.ones(1, 3).long()}
OTHER = nn.Linear(1, 1)


def collated(examples: Any) -> Any:
    return examples


# What each is made with, and the changes of one argument (or of those that go together) that
# change results.
KEEPS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "AdapterPerTask": (
        {},
        [{"bottleneck": 8}, {"activation": "gelu"}, {"seed": 1}, {"dtype": torch.bfloat16}],
    ),
    "Anchor": (
        {"weight": 1.0, "fisher": "batch"},
        [
            {"weight": 2.0}, {"fisher": "none"}, {"labels": "model"}, {"sequences": 9},
            {"decay": 0.5}, {"center": "latest"}, {"pull": "decoupled"}, {"seed": 1},
            {"pull": "decoupled", "learning_rate": lambda: 0.1}, {"dtype": torch.float64},
        ],
    ),
    "Balance": (
        {},
        [
            {"weight": 0.2}, {"delta": 0.2}, {"column": "kind"}, {"form": "paper"},
            {"mask_padding": True},
        ],
    ),
    "KLPenalty": (
        {"weight": 0.1},
        [{"weight": 0.2}, {"estimator": "k1"}, {"reference": OTHER}],
    ),
    "KLToBase": (
        {"batches": BATCH},
        [
            {"batches": [BATCH, BATCH]}, {"kinds": ["k1"]}, {"reference": OTHER}, {"every": 3},
            {"max_new_tokens": 4}, {"seed": 1},
        ],
    ),
    "LoraTasks": ({}, [{"adapter": "a"}, {"start": "previous"}, {"seed": 1}]),
    "Orthogonal": (
        {"form": "squared"},
        [{"form": "l1"}, {"weight": 0.3}, {"past": "keep"}, {"adapter": "a"}, {"seed": 1}],
    ),
    "PreferenceReplay": ({"ratio": 0.2}, [{"ratio": 0.3}, {"size": 4}, {"seed": 1}]),
    "PretrainingLoss": (
        {"dataset": ROWS},
        [
            {"dataset": ROWS[:1]}, {"weight": 0.5}, {"batch_size": 2}, {"seed": 1},
            {"collate": collated},
        ],
    ),
    "Project": (
        {},
        [
            {"protect": "weights"}, {"energy": 0.9}, {"rank": 3}, {"layers": "mlp"},
            {"others": "train"}, {"target": "lora_A"}, {"target": "lora_A", "adapter": "a"},
            {"tokens": 5}, {"moments": torch.float32},
        ],
    ),
    "Replay": (
        {"ratio": 0.2},
        [
            {"ratio": 0.3}, {"unit": "tokens"}, {"seed": 1}, {"memory": 3, "policy": "balanced"},
            {"memory": 3, "policy": "reservoir"}, {"split": "size"}, {"length": 4}, {"epochs": 2},
            {"shuffle": False}, {"shuffle_old": False}, {"unit": "tokens", "lengths": "input_ids"},
            {"old": {"before": ROWS}},
        ],
    ),
    "SelfDistill": (
        {"prompts": ROWS},
        [
            {"prompts": ROWS[:1]}, {"prompts": lambda model, task: ROWS}, {"teacher": "base"},
            {"teacher": "ema"}, {"teacher": "cache"}, {"prompts": None, "on": "inputs"},
            {"batch_size": 2}, {"average": "tokens"}, {"weight": 0.5}, {"kind": "jsd"},
            {"beta": 0.3}, {"skew": 0.3}, {"temperature": 2.0}, {"teacher_temperature": 2.0},
            {"temperature_squared": True}, {"tail": "none"}, {"decay": 0.9}, {"seed": 1},
            {"dtype": torch.bfloat16}, {"prompts": None, "on": "inputs", "tokens": "all"},
        ],
    ),
}  # fmt: skip

# Not in options: how the same sum is split.
SAME_RESULTS = {("SelfDistill", "chunk_tokens")}


def exported() -> list[type[Keep]]:
    named = [getattr(cl_fast.training, name) for name in cl_fast.training.__all__]
    return [x for x in named if inspect.isclass(x) and issubclass(x, Keep) and x is not Keep]


def options(make: Callable[..., Keep], given: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint has them."""
    found = make(**given).options()
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    folder = tmp_path_factory.mktemp("cache")
    return TeacherCache.build(llama(), ROWS, path=folder / "cache", k=4, progress=False)


@pytest.mark.parametrize("make", exported(), ids=lambda x: x.__name__)
def test_options_tell_each_argument_that_changes_results(
    make: type[Keep], cache: TeacherCache
) -> None:
    assert make.__name__ in KEEPS, f"say which arguments of {make.__name__} change results"
    given, changes = KEEPS[make.__name__]
    arguments = set(inspect.signature(make).parameters)
    varied = {name for change in changes for name in change}
    same = {name for keep, name in SAME_RESULTS if keep == make.__name__}
    assert varied | same == arguments
    seen = [options(make, given)]
    assert seen[0] == options(make, given)
    for change in changes:
        if change.get("teacher") == "cache":
            change = {"teacher": cache}
        found = options(make, {**given, **change})
        assert found not in seen, change
        seen.append(found)
