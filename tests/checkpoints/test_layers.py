"""Layers and modules from names alone, and configs that are made to speak of other layers."""

from __future__ import annotations

from typing import Any

import pytest

from cl_fast.checkpoints.layers import find_module, find_modules, layer_counts, set_layers


def decoder(stack: str = "model.layers.", layers: int = 3) -> list[str]:
    return [f"{stack}{i}.mlp.experts.{e}.weight" for i in range(layers) for e in range(2)]


@pytest.mark.parametrize(
    "stack",
    [
        "model.layers.",
        "transformer.h.",
        "h.",
        "gpt_neox.layers.",
        "bert.encoder.layer.",
        "transformer.blocks.",
        "model.decoder.layers.",
    ],
)
def test_one_stack(stack: str) -> None:
    pre, post = ["model.embed_tokens.weight", "wpe.weight"], ["norm.weight", "embed_out.weight"]
    [module] = find_modules([*decoder(stack), *pre, *post])
    assert (module.name, module.stack) == ("default", stack)
    assert len(module.layers) == 3
    assert module.layers[1] == (".mlp.experts.0.weight", ".mlp.experts.1.weight")
    assert module.tensor(2, ".x") == f"{stack}2.x"
    assert set(module.pre) == set(pre)
    assert set(module.post) == set(post)
    for word in ("default", "text_decoder", stack.rstrip(".")):
        assert find_module([module], word) is module
    assert find_module([module], "vision_tower") is None


def test_no_layers_and_gaps() -> None:
    [module] = find_modules(["a.weight", "b.embed.weight"])
    assert (module.layers, module.pre, module.post) == ((), ("b.embed.weight",), ("a.weight",))
    [module] = find_modules(["layers.2.a", "layers.0.a"])
    assert module.layers == ((".a",), (), (".a",))
    [module] = find_modules([])
    assert module.layers == ()


def test_several_stacks() -> None:
    names = [
        *decoder("model.language_model.layers."),
        *decoder("model.visual.blocks.", 2),
        *decoder("model.audio_tower.layers.", 1),
        "model.language_model.embed_tokens.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.merger.mlp.0.weight",
        "model.audio_tower.conv1.weight",
        "lm_head.weight",
    ]
    modules = find_modules(names)
    assert [(m.name, len(m.layers)) for m in modules] == [
        ("text_decoder", 3),
        ("vision_tower", 2),
        ("audio_tower", 1),
        ("multi_modal_projector", 0),
    ]
    text, vision, audio, projector = modules
    assert text.post == ("lm_head.weight",)
    assert vision.pre == ("model.visual.patch_embed.proj.weight",)
    assert audio.pre == ("model.audio_tower.conv1.weight",)
    assert projector.post == ("model.visual.merger.mlp.0.weight",)
    assert find_module(modules, "visual") is vision
    assert find_module(modules, "model.visual.blocks") is vision
    every = [
        name
        for m in modules
        for name in (
            *m.pre,
            *m.post,
            *(m.tensor(i, r) for i, one in enumerate(m.layers) for r in one),
        )
    ]
    assert sorted(every) == sorted(names)


def test_encoder_and_decoder() -> None:
    names = [*decoder("encoder.block."), *decoder("decoder.block."), "shared.weight"]
    names += [
        "encoder.final_layer_norm.weight",
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
    ]
    modules = {module.name: module for module in find_modules(names)}
    assert modules.keys() == {"encoder", "decoder", "shared"}
    assert modules["encoder"].post == ("encoder.final_layer_norm.weight",)
    assert modules["shared"].pre == ("shared.weight",)
    assert modules["shared"].post == ("lm_head.weight",)
    config = {"num_layers": 3, "num_decoder_layers": 3}
    assert layer_counts(config, modules["encoder"]) == [(("num_layers",), 3)]
    assert layer_counts(config, modules["decoder"]) == [(("num_decoder_layers",), 3)]


def test_lists_of_layers_follow_them() -> None:
    [module] = find_modules(decoder(layers=4))
    config: dict[str, Any] = {
        "architectures": ["a", "b", "c", "d"],
        "num_hidden_layers": 4,
        "n_layers": 4,
        "layer_types": ["full", "slide", "slide", "slide"],
        "hybrid_override_pattern": "M*M-",
        "mlp_only_layers": [0, 3],
        "eos_token_id": [1, 2, 3, 4],
        "rope_scaling": {"short_factor": [1, 2, 3, 4]},
        "intermediate_size": 4,
        "text_config": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    }
    other = {"layer_types": list("abcd"), "hybrid_override_pattern": "xyzw"}
    other |= {"text_config": {"no_rope_layers": [7, 8, 9, 6]}}
    kept = {key: config[key] for key in ("architectures", "eos_token_id", "rope_scaling")}
    layers = [(dict(config), 3), (dict(config), 0), (other, 1), (other, 2), (dict(config), 3)]
    assert set_layers(config, module, layers, "config.json") == []
    assert config == kept | {
        "num_hidden_layers": 5,
        "n_layers": 5,
        "layer_types": ["slide", "full", "b", "c", "slide"],
        "hybrid_override_pattern": "-Myz-",
        "mlp_only_layers": [0, 1, 4],
        "intermediate_size": 4,
        "text_config": {"num_hidden_layers": 5, "no_rope_layers": [0, 1, 8, 9, 0]},
    }


def test_what_a_config_cannot_say_is_told() -> None:
    [module] = find_modules(decoder(layers=2))
    said = set_layers({}, module, [({}, 0)], "config.json")
    assert said == ["config.json does not tell the number of layers of default; the output has 1"]
    config: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    said = set_layers(config, module, [(dict(config), 0), (None, 1), ({}, 1)], "config.json")
    assert config == {"num_hidden_layers": 3}
    assert "layer_types is left out of config.json" in said[0]
