"""How a recipe names a model: texts, and mergekit's mappings for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_fast.merging.recipe import parse_recipe
from cl_fast.merging.references import reference_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("models/one", "models/one"),
        (Path("models/one"), "models/one"),
        ({"path": "org/name"}, "org/name"),
        ({"path": "org/name", "revision": "v2"}, "org/name@v2"),
        ({"model": "models/one"}, "models/one"),
        ({"model": "models/one", "lora": None, "override_architecture": None}, "models/one"),
        ({"model": {"path": "org/name", "revision": None}}, "org/name"),
        ({"model": "models/one", "lora": "adapters/x"}, "models/one+adapters/x"),
        (
            {"model": {"path": "a/b", "revision": "r"}, "lora": {"path": "c/d", "revision": "s"}},
            "a/b@r+c/d@s",
        ),
    ],
)
def test_the_text_of_a_reference(value: Any, text: str) -> None:
    assert reference_text(value) == text


def test_mappings_stand_wherever_a_model_does() -> None:
    one, base = {"model": {"path": "m/one"}}, {"path": "m/base", "revision": "main"}
    recipe = parse_recipe(
        {
            "merge_method": "ties",
            "base_model": base,
            "tokenizer_source": one,
            "slices": [
                {"sources": [{"model": one, "layer_range": [0, 1]}], "base_model": {"path": "m/b"}}
            ],
        }
    )
    assert recipe.base_model == "m/base@main"
    assert recipe.tokenizer_reference == "m/one"
    [part] = recipe.parts
    assert part.entries[0].model == "m/one"
    assert part.base is not None
    assert part.base.model == "m/b"
