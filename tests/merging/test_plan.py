"""Plans: what is read and written where, and every misfit of the inputs told before the work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import CONFIG, TINY, TOKENIZER, size_of, write_checkpoint, write_file

from cl_fast.checkpoints import read_header
from cl_fast.errors import CheckpointError, ClFastError, RecipeError
from cl_fast.merging.description import describe
from cl_fast.merging.matching import natural_key
from cl_fast.merging.plan import Plan, make_plan, term_names
from cl_fast.merging.recipe import load_recipe, parse_recipe
from cl_fast.ops.streams import stream_key

Tensors = dict[str, tuple[str, tuple[int, ...]]]


class World:
    """A base and two finetuned checkpoints in a folder, and a recipe over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("base", "a", "b"):
            write_checkpoint(root / name)

    def recipe(self, method: str = "task_arithmetic", **changes: Any) -> dict[str, Any]:
        content: dict[str, Any] = {
            "merge_method": method,
            "base_model": str(self.root / "base"),
            "models": [{"model": str(self.root / "a")}, {"model": str(self.root / "b")}],
        }
        if method == "linear":
            del content["base_model"]
        content.update(changes)
        return content

    def plan(self, method: str = "task_arithmetic", /, **changes: Any) -> Plan:
        options = {k: changes.pop(k) for k in ("out_shard_size", "seed") if k in changes}
        output = changes.pop("output", self.root / "merged")
        if "own_seed" in changes:
            changes["seed"] = changes.pop("own_seed")
        return make_plan(parse_recipe(self.recipe(method, **changes)), output, **options)

    def write(self, name: str, tensors: Tensors | None = None, **options: Any) -> Path:
        for path in (self.root / name).glob("*"):
            path.unlink()
        return write_checkpoint(self.root / name, tensors, **options)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# What a plan holds.


def test_sources_point_at_the_bytes(world: World) -> None:
    world.write("a", shards=3)
    plan = world.plan("ties", parameters={"density": 0.5})
    assert plan.has_base
    assert plan.models == ("a", "b")
    assert [c.path.name for c in plan.inputs] == ["base", "a", "b"]
    assert [t.name for t in plan.tensors] == sorted(TINY, key=natural_key)
    for tensor in plan.tensors:
        dtype, shape = TINY[tensor.name]
        assert (tensor.dtype, tensor.shape, tensor.kind) == (dtype, shape, "combine")
        assert tensor.nbytes == size_of(dtype, shape)
        assert [term.model for term in tensor.terms] == ["a", "b"]
        assert tensor.base is not None
        for source in (tensor.base, *(term.source for term in tensor.terms)):
            info = read_header(source.path).tensors[tensor.name]
            assert (source.offset, source.nbytes) == (info.offset, info.nbytes)
            assert source.dtype == info.dtype
    assert {Path(t.terms[0].source.path).name for t in plan.tensors} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    assert plan.tensors[0].policy == plan.recipe.policy
    assert not plan.output.exists()


def test_linear_has_no_base(world: World) -> None:
    plan = world.plan("linear")
    assert not plan.has_base
    assert plan.donor.path.name == "a"
    assert all(tensor.base is None and len(tensor.terms) == 2 for tensor in plan.tensors)
    named = world.plan("linear", base_model=str(world.root / "b"))
    assert named.donor.path.name == "b"
    assert named.models == ("a", "b")


def test_the_output_files_are_readable_safetensors(world: World) -> None:
    plan = world.plan(out_shard_size=100)
    assert len(plan.shards) > 1
    assert plan.index is not None
    seen: list[str] = []
    for number, shard in enumerate(plan.shards):
        path = world.root / shard.filename
        with path.open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
        header = read_header(path)
        assert len(shard.header) % 64 == 0
        assert header.metadata == {"format": "pt"}
        for i in shard.tensors:
            tensor = plan.tensors[i]
            assert tensor.shard == number
            info = header.tensors[tensor.name]
            assert (info.dtype, info.shape) == (tensor.dtype, tensor.shape)
            assert (info.offset, info.nbytes) == (tensor.offset, tensor.nbytes)
            assert plan.index["weight_map"][tensor.name] == shard.filename
            seen.append(tensor.name)
        weights = sum(plan.tensors[i].nbytes for i in shard.tensors)
        assert weights <= 100 or len(shard.tensors) == 1
    assert seen == [t.name for t in plan.tensors]
    assert plan.index["metadata"] == {
        "total_parameters": sum(t.numel for t in plan.tensors),
        "total_size": sum(t.nbytes for t in plan.tensors),
    }
    count = len(plan.shards)
    assert plan.shards[0].filename == f"model-00001-of-{count:05d}.safetensors"


def test_one_file_has_no_index(world: World) -> None:
    plan = world.plan()
    assert [shard.filename for shard in plan.shards] == ["model.safetensors"]
    assert plan.index is None


def test_wider_types_come_first_so_that_every_tensor_is_aligned(world: World) -> None:
    tensors: Tensors = {
        "a": ("BF16", (3,)),
        "b": ("F32", (5,)),
        "c": ("U8", (3,)),
        "d": ("I64", ()),
    }
    for name in ("base", "a", "b"):
        world.write(name, tensors)
    plan = world.plan()
    assert [t.name for t in plan.tensors] == ["a", "b", "c", "d"]
    assert [plan.tensors[i].name for i in plan.shards[0].tensors] == ["d", "b", "a", "c"]
    sizes = {"BF16": 2, "F32": 4, "U8": 1, "I64": 8}
    assert all(t.offset % sizes[t.dtype] == 0 for t in plan.tensors)


def test_natural_order() -> None:
    names = ["a.10.b", "a.2.b", "a.2", "a.02.b", "b", "a.2.b1", "a.x", "a." + "9" * 5000]
    assert sorted(names, key=natural_key) == sorted(set(names), key=natural_key)
    assert sorted(["l.10", "l.9", "l.1", "l.x"], key=natural_key) == ["l.1", "l.9", "l.10", "l.x"]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), unique=True))
def test_natural_order_is_total(names: list[str]) -> None:
    assert sorted(names, key=natural_key) == sorted(sorted(names), key=natural_key)


def test_integers_are_copied(world: World) -> None:
    tensors = TINY | {"pos": ("I64", (3,)), "mask": ("BOOL", (3,)), "empty": ("BF16", (0, 4))}
    for name in ("base", "a", "b"):
        world.write(name, tensors)
    plan = world.plan(out_dtype="float32")
    kinds = {t.name: (t.kind, t.dtype) for t in plan.tensors}
    assert kinds["pos"] == ("copy", "I64")
    assert kinds["mask"] == ("copy", "BOOL")
    assert kinds["empty"] == ("copy", "F32")
    assert kinds["model.norm.weight"] == ("combine", "F32")


# Names and keys of the random stream.


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (["x/a", "y/b/"], ("a", "b")),
        (["x/a", "y/a", "b"], ("x/a", "y/a", "b")),
        (["x/a/", "x/a", "b"], ("a", "a#2", "b")),
        (["x/a", "x/a", "y/a", "x/a"], ("x/a", "x/a#2", "y/a", "x/a#3")),
        ([".", "..", "/"], (".", "..", "/")),
        (["a.safetensors"], ("a.safetensors",)),
    ],
)
def test_term_names(references: list[str], names: tuple[str, ...]) -> None:
    assert term_names(references) == names


def test_keys_follow_seed_model_and_tensor(world: World) -> None:
    density = {"parameters": {"density": 0.5}}
    plan = world.plan("dare_ties", **density)
    assert plan.seed == 0
    for tensor in plan.tensors:
        for term in tensor.terms:
            assert term.key == stream_key(0, term.model, tensor.name)
    assert world.plan("dare_ties", own_seed=5, **density).seed == 5
    assert world.plan("dare_ties", own_seed=5, seed=6, **density).seed == 6
    other = world.plan("dare_ties", seed=6, **density)
    assert other.tensors[0].terms[0].key == stream_key(6, "a", other.tensors[0].name)
    swapped = world.plan("dare_ties", models=list(reversed(world.recipe()["models"])), **density)
    assert swapped.tensors[0].terms[1].key == plan.tensors[0].terms[0].key
    assert world.plan("ties", **density).seed is None
    assert world.plan("ties", **density).tensors[0].terms[0].key == 0


def test_an_explicit_seed_without_randomness_is_told(world: World) -> None:
    plan = world.plan("ties", seed=3)
    assert any("seed has no effect" in note for note in plan.notes)


# Numbers.


def numbers(plan: Plan, k: int = 0) -> dict[str, float]:
    return {t.name.removeprefix("model."): t.terms[k].weight for t in plan.tensors}


def test_gradients_run_over_the_layers(world: World) -> None:
    plan = world.plan(parameters={"weight": [1, 2]})
    assert numbers(plan) == {
        "embed_tokens.weight": 1.0,
        "layers.0.input_layernorm.weight": 1.0,
        "layers.0.mlp.up_proj.weight": 1.0,
        "layers.0.self_attn.q_proj.weight": 1.0,
        "layers.1.input_layernorm.weight": 2.0,
        "layers.1.mlp.up_proj.weight": 2.0,
        "layers.1.self_attn.q_proj.weight": 2.0,
        "norm.weight": 1.0,
    }


@pytest.mark.parametrize(
    "style", ["model.layers.{}.w", "h.{}.w", "x.blocks.{}.w", "enc.layer.{}.w"]
)
@pytest.mark.parametrize("said", [None, 5])
def test_layer_names_and_counts(world: World, style: str, said: int | None) -> None:
    tensors: Tensors = {style.format(i): ("F32", (2,)) for i in range(3)} | {"w": ("F32", (2,))}
    for name in ("base", "a", "b"):
        world.write(name, tensors, config={"num_hidden_layers": said} if said else {})
    plan = world.plan(parameters={"weight": [0, 1]})
    depth = [t.terms[0].weight for t in plan.tensors if t.name != "w"]
    assert depth == ([0.0, 0.25, 0.5] if said else [0.0, 0.5, 1.0])


def test_one_layer_is_the_last_and_more_than_said_are_clamped(world: World) -> None:
    tensors: Tensors = {"layers.0.w": ("F32", (2,)), "v.layers.0.w": ("F32", ())}
    for name in ("base", "a", "b"):
        world.write(name, tensors, config=None)
    assert set(numbers(world.plan(parameters={"weight": [0, 1]})).values()) == {1.0}
    for name in ("base", "a", "b"):
        world.write(name, {f"layers.{i}.w": ("F32", (2,)) for i in range(4)}, config={"n_layer": 3})
    assert list(numbers(world.plan(parameters={"weight": [0, 1]})).values()) == [0, 0.5, 1, 1]


def test_filters_and_precedence(world: World) -> None:
    models = world.recipe()["models"]
    models[0]["parameters"] = {"weight": [{"filter": "mlp", "value": 7}]}
    everywhere = [{"filter": "layers.1.", "value": 2}, {"value": 3}]
    plan = world.plan(models=models, parameters={"weight": everywhere, "lambda": [0.5, 1.5]})
    first, second = numbers(plan, 0), numbers(plan, 1)
    assert first["layers.1.mlp.up_proj.weight"] == 7
    assert second["layers.1.mlp.up_proj.weight"] == 2
    assert first["layers.1.input_layernorm.weight"] == 2
    assert first["norm.weight"] == 3
    assert {t.name: t.lam for t in plan.tensors}["model.layers.1.mlp.up_proj.weight"] == 1.5


def test_a_density_without_default_keeps_all_of_the_rest(world: World) -> None:
    plan = world.plan("ties", parameters={"density": [{"filter": "mlp", "value": 0.5}]})
    assert {t.terms[0].density for t in plan.tensors if "mlp" in t.name} == {0.5}
    assert {t.terms[0].density for t in plan.tensors if "mlp" not in t.name} == {1.0}


@pytest.mark.parametrize(
    ("method", "values", "words"),
    [
        ("ties", {"weight": [{"filter": "mpl", "value": 1}, {"value": 2}]}, "did you mean 'mlp'?"),
        ("ties", {"weight": [{"filter": "zzzz", "value": 1}, {"value": 2}]}, "parts of names such"),
        (
            "ties",
            {
                "weight": [
                    {"filter": "mlp", "value": 1},
                    {"filter": "mlp.up", "value": 2},
                    {"value": 1},
                ]
            },
            "parameters.weight[1]: the filter 'mlp.up' has no effect",
        ),
        ("ties", {"weight": [{"filter": "mlp", "value": 1}]}, "no filter matches tensor"),
        ("linear", {"weight": 0}, "sum to 0"),
        ("linear", {"weight": [{"filter": "mlp", "value": 0}, {"value": 1}]}, "mlp.up_proj"),
        ("dare_ties", {"density": 1e-12}, "keeps nothing"),
        ("ties", {"density": [0.2, 0.3], "trim_scope": "model"}, "one density for the whole model"),
    ],
)
def test_settings_without_effect(
    world: World, method: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        world.plan(method, parameters=values)
    assert words in str(caught.value)


def test_a_global_value_that_every_model_overrides(world: World) -> None:
    models = [{**m, "parameters": {"weight": 1}} for m in world.recipe()["models"]]
    with pytest.raises(RecipeError, match=r"^parameters\.weight: has no effect"):
        world.plan(models=models, parameters={"weight": 2})


def test_a_gradient_without_layers(world: World) -> None:
    for name in ("base", "a", "b"):
        world.write(name, {"w": ("F32", (2,))})
    with pytest.raises(RecipeError, match="a gradient runs over layers"):
        world.plan(parameters={"weight": [0, 1]})


def test_zero_weights_cancel_only_where_they_are_divided_by(world: World) -> None:
    world.plan("linear", parameters={"weight": 0, "normalize": False})
    world.plan("linear", parameters={"weight": 0, "divisor": "count"})
    plan = world.plan(parameters={"weight": 0, "normalize": True})
    assert sum("is 0 in every tensor" in note for note in plan.notes) == 2


def test_density_one_is_planned_as_no_trim(world: World) -> None:
    plan = world.plan("ties", parameters={"density": 1, "variant": "paper"})
    assert plan.tensors[0].policy.sparsify == "none"
    assert plan.tensors[0].policy.trim_scope == "tensor"
    assert plan.passes == 1
    assert plan.model_keep == ()
    assert not any("density" in note for note in plan.notes)
    told = world.plan("ties").notes
    assert sum("no density is given" in note for note in told) == 2


def test_model_scope_counts_over_the_model(world: World) -> None:
    total = sum(size_of(*entry) // 2 for entry in TINY.values())
    models = world.recipe()["models"]
    models[1]["parameters"] = {"density": 1.0}
    plan = world.plan("ties", models=models, parameters={"density": 0.25, "variant": "paper"})
    assert plan.model_keep == (int(0.25 * total) + 1, total)
    assert plan.passes == 2
    floor = world.plan(
        "ties", parameters={"density": 0.25, "variant": "peft", "trim_scope": "model"}
    )
    assert floor.model_keep == (int(0.25 * total),) * 2
    assert floor.tensors[0].policy.trim_ties == "all"


# Types.


def with_dtype(dtype: str) -> Tensors:
    return {name: (dtype, shape) for name, (_, shape) in TINY.items()}


@pytest.mark.parametrize(
    ("stored", "said", "out"),
    [
        (("BF16", "BF16", "BF16"), {}, "BF16"),
        (("F32", "BF16", "F16"), {}, "F32"),
        (("BF16", "F32", "F8_E4M3"), {}, "BF16"),
        (("BF16", "F32", "F32"), {"dtype": "float32"}, "F32"),
        (("BF16", "F32", "F32"), {"dtype": "float32", "out_dtype": "float16"}, "F16"),
        (("F8_E4M3", "F8_E5M2", "BF16"), {"out_dtype": "bfloat16"}, "BF16"),
    ],
)
def test_output_type(world: World, stored: tuple[str, ...], said: dict[str, str], out: str) -> None:
    for name, dtype in zip(("base", "a", "b"), stored, strict=True):
        world.write(name, with_dtype(dtype))
    plan = world.plan(**said)
    assert {t.dtype for t in plan.tensors} == {out}
    config = next(file for file in plan.sidecars if file.name == "config.json")
    if out == "BF16":
        assert config.content is None
    else:
        word = {"F32": "float32", "F16": "float16"}[out]
        assert json.loads(config.content or b"")["torch_dtype"] == word


def test_mixed_output_types_are_told(world: World) -> None:
    mixed = TINY | {"model.norm.weight": ("F32", (4,))}
    world.write("base", mixed)
    plan = world.plan()
    assert any("BF16, F32" in note for note in plan.notes)
    assert next(f for f in plan.sidecars if f.name == "config.json").content is None


def test_dtype_without_effect_is_told(world: World) -> None:
    assert any("float32 here" in n for n in world.plan(dtype="bfloat16", out_dtype="float32").notes)
    assert not world.plan(dtype="bfloat16").notes
    assert any("int8_mask" in n for n in world.plan(parameters={"int8_mask": True}).notes)


# Inputs that do not fit.


def without(*names: str) -> Tensors:
    return {name: entry for name, entry in TINY.items() if name not in names}


def renamed(old: str, new: str) -> Tensors:
    return {name.replace(old, new): entry for name, entry in TINY.items()}


NORM = "model.norm.weight"
HEAD: Tensors = {"lm_head.weight": ("BF16", (10, 4))}

MISFITS = [
    pytest.param(without(NORM), f"1 missing ({NORM})", id="missing"),
    pytest.param(TINY | {"x": ("BF16", (3,))}, "1 extra (x)", id="extra"),
    pytest.param(
        {f"z{i}": ("BF16", (3,)) for i in range(9)},
        "8 missing (model.embed_tokens.weight, model.layers.0.input_layernorm.weight, "
        "model.layers.0.mlp.up_proj.weight, model.layers.0.self_attn.q_proj.weight, "
        "model.layers.1.input_layernorm.weight, and 3 more) and 9 extra (z0, z1, z2, z3, z4, "
        "and 4 more)",
        id="all differ",
    ),
    pytest.param(renamed("model.", ""), "In 8 names it lacks the prefix 'model.'", id="no prefix"),
    pytest.param(
        renamed("model.", "base_model.model.model."),
        "adds the prefix 'base_model.model.'",
        id="more",
    ),
    pytest.param(renamed("norm.weight", "norms.weight"), "is called", id="renamed"),
    pytest.param(TINY | {"l0.lora_A.weight": ("BF16", (3,))}, "unmerged LoRA", id="lora"),
    pytest.param(TINY | {NORM: ("BF16", (5,))}, "has shape [4] in", id="shape"),
    pytest.param(TINY | {NORM: ("BF16", (2, 2))}, "has shape [4] in", id="shape same size"),
    pytest.param(TINY | {NORM: ("F64", (4,))}, "float64", id="f64"),
    pytest.param(TINY | {NORM: ("I32", (4,))}, "is BF16 in", id="integer beside float"),
    pytest.param(TINY | {NORM: ("F8_E8M0", (4,))}, "quantised", id="scale type"),
]


@pytest.mark.parametrize(("tensors", "words"), MISFITS)
@pytest.mark.parametrize("who", ["a", "b"])
def test_misfits(world: World, tensors: Tensors, words: str, who: str) -> None:
    world.write(who, tensors)
    with pytest.raises(CheckpointError) as caught:
        world.plan()
    assert words in str(caught.value)
    assert str(world.root / who) in str(caught.value)
    with pytest.raises(CheckpointError):
        world.plan("linear")


def test_float64_and_scales_in_the_base(world: World) -> None:
    world.write("base", with_dtype("F64"))
    with pytest.raises(CheckpointError, match="float64"):
        world.plan()
    world.write("base", with_dtype("F8_E4M3"))
    with pytest.raises(RecipeError, match=r"^out_dtype: is needed"):
        world.plan()


def test_vocabularies_that_differ(world: World) -> None:
    larger = {"model": {"vocab": {f"t{i}": i for i in range(12)}}}
    world.write(
        "a",
        TINY | {"model.embed_tokens.weight": ("BF16", (12, 4))},
        config={**CONFIG, "vocab_size": 12},
        tokenizer=larger,
    )
    with pytest.raises(CheckpointError) as caught:
        world.plan()
    for words in (
        "'model.embed_tokens.weight' has 10 rows",
        "and 12 in",
        f"10 tokens in {world.root / 'base' / 'tokenizer.json'}, vocab_size 10",
        f"12 tokens in {world.root / 'a' / 'tokenizer.json'}, vocab_size 12",
        "tokenizer_source: union",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("base", "tuned", "fits"),
    [
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}, True),
        ({}, {"tie_word_embeddings": True}, True),
        ({}, {}, True),  # the base has no head and says nothing: its class ties
        ({"tie_word_embeddings": True}, {}, False),  # saying nothing, its class does not tie
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, False),
        ({}, {"model_type": "other"}, False),
    ],
)
def test_tied_heads(world: World, base: dict[str, Any], tuned: dict[str, Any], fits: bool) -> None:
    world.write("base", config={**CONFIG, **base})
    world.write("a", TINY | HEAD, config={**CONFIG, **tuned})
    world.write("b", config={**CONFIG, **base})
    if not fits:
        with pytest.raises(CheckpointError, match="output head"):
            world.plan()
        return
    plan = world.plan()
    assert "lm_head.weight" not in {t.name for t in plan.tensors}
    assert any("tied to the embeddings" in note for note in plan.notes)


def test_a_head_that_only_the_finetuned_lacks(world: World) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    for name in ("base", "b"):
        world.write(name, TINY | HEAD, config=tied)
    world.write("a", config=tied)
    assert "lm_head.weight" not in {t.name for t in world.plan().tensors}
    for name in ("base", "a", "b"):
        world.write(name, TINY | HEAD, config=tied)
    assert "lm_head.weight" in {t.name for t in world.plan().tensors}


def test_constant_buffers_of_some_models(world: World) -> None:
    world.write("a", TINY | {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,))})
    plan = world.plan()
    assert len(plan.tensors) == len(TINY)
    assert any("constant buffers" in note for note in plan.notes)


def test_configs_that_differ_are_told(world: World) -> None:
    world.write("b", config={**CONFIG, "rope_theta": 1e6})
    assert not world.plan().notes
    world.write("base", config={**CONFIG, "rope_theta": 1e4})
    (note,) = world.plan().notes
    assert "rope_theta: 1000000.0, the output takes 10000.0" in note


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:20]), "beyond the end"),
        (lambda p: p.write_bytes(b""), "too short"),
        (lambda p: p.unlink(), "no weights"),
        (lambda p: p.with_name("config.json").write_text("{"), "config.json"),
        (
            lambda p: p.with_name("config.json").write_text('{"quantization_config": {"b": 4}}'),
            "quantised",
        ),
    ],
)
def test_damaged_inputs(world: World, damage: Callable[[Path], Any], words: str) -> None:
    damage(world.root / "b" / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        world.plan()
    assert not (world.root / "merged").exists()


def test_absent_inputs_name_their_key(world: World) -> None:
    for key, changes in (
        ("base_model", {"base_model": str(world.root / "c")}),
        ("models[0].model", {"models": [{"model": str(world.root / "c")}]}),
    ):
        with pytest.raises(CheckpointError) as caught:
            world.plan(**changes)
        assert str(caught.value).startswith(key)


def test_a_path_that_would_be_right_beside_the_recipe(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.root / "r.yml"
    path.write_text("merge_method: linear\nmodels: [{model: ./a}]")
    monkeypatch.chdir(world.root)
    assert make_plan(load_recipe(path), world.root / "merged").models == ("a",)
    monkeypatch.chdir(world.root.parent)
    with pytest.raises(CheckpointError, match="start at the working directory"):
        make_plan(load_recipe(path), world.root / "merged")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("a", "is the output folder itself"),
        ("base", "is the output folder itself"),
        ("x/../b", "is the output folder itself"),
        ("link", "is the output folder itself"),
        ("a/merged", "lies inside the input"),
        (".", "lies inside the output folder"),
        ("tok", "is the output folder itself"),
    ],
)
def test_outputs_that_would_touch_inputs(world: World, output: str, words: str) -> None:
    (world.root / "link").symlink_to(world.root / "a")
    with pytest.raises(RecipeError, match=words):
        world.plan(output=world.root / output, tokenizer_source=str(world.root / "tok"))


def test_a_file_input_guards_its_folder(world: World) -> None:
    models = [{"model": str(world.root / "a" / "model.safetensors")}]
    with pytest.raises(RecipeError, match="the output folder itself"):
        world.plan(models=models, output=world.root / "a")
    assert world.plan(models=models).models == ("model.safetensors",)


# Files beside the weights.


def test_tokenizer_source(world: World) -> None:
    world.write("b", tokenizer={**TOKENIZER, "added_tokens": []})
    plan = world.plan(tokenizer_source=str(world.root / "b"))
    assert plan.tokenizer_donor == world.root / "b"
    found = {file.name: file.source.parent.name for file in plan.sidecars}
    assert found == {"config.json": "base", "tokenizer.json": "b", "tokenizer_config.json": "b"}
    assert world.plan(tokenizer_source="base").tokenizer_donor == world.root / "base"
    elsewhere = world.root / "tok"
    elsewhere.mkdir()
    (elsewhere / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    assert world.plan(tokenizer_source=str(elsewhere)).tokenizer_donor == elsewhere


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": {"model": {"vocab": {"x": 10}}}}, "no token in common"),
    ],
)
def test_bad_tokenizer_source(world: World, content: Any, words: str) -> None:
    folder = world.root / "tok"
    if content is not None:
        folder.mkdir()
        for name, value in content.items():
            (folder / name).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=words):
        world.plan(tokenizer_source=str(folder))


# Estimates, fingerprint, text.


def test_bytes_and_passes(world: World) -> None:
    weights = sum(size_of(*entry) for entry in TINY.values())
    assert world.plan().bytes_read == 3 * weights
    assert world.plan("linear").bytes_read == 2 * weights
    for method, passes in (("ties", 2), ("dare_linear", 2), ("dare_ties", 2)):
        plan = world.plan(method, parameters={"density": 0.5})
        assert (plan.passes, plan.bytes_read) == (passes, passes * 3 * weights)
    plan = world.plan("dare_ties", parameters={"density": 0.5, "rescale_by": "keep_rate"})
    assert (plan.passes, plan.bytes_read) == (1, 3 * weights)
    plan = world.plan("ties", parameters={"density": 0.5, "rescale": True})
    assert plan.passes == 3
    assert plan.bytes_written == sum(s.size for s in plan.shards) + sum(
        f.nbytes for f in plan.sidecars
    )


def test_fingerprint(world: World) -> None:
    def of(**changes: Any) -> str:
        return world.plan("dare_ties", **{"parameters": {"density": 0.5}, **changes}).fingerprint

    first = of()
    assert first == of()
    assert first == of(output=world.root / "elsewhere")
    others = [
        of(seed=1),
        of(parameters={"density": 0.25}),
        of(parameters={"density": 0.5, "rescale": False}),
        of(out_dtype="float32"),
        of(out_shard_size=100),
        of(models=list(reversed(world.recipe()["models"]))),
    ]
    write_file(world.root / "a" / "model.safetensors", TINY, bytes(10**6)[: 2 * 10**3])
    world.write("a", TINY | {NORM: ("F32", (4,))})
    others.append(of())
    tokenizer = world.root / "base" / "tokenizer.json"  # copied as it is, and as long as before
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("t", "u", 1))
    others.append(of())
    assert len({first, *others}) == len(others) + 1


def test_describe(world: World) -> None:
    tensors = TINY | {"pos": ("I64", (3,))}
    for name in ("base", "a", "b"):
        world.write(name, tensors)
    plan = world.plan(
        "dare_ties", parameters={"density": 0.5, "weight": [0, 1], "lambda": 0.3}, seed=9
    )
    text = "\n".join(describe(plan, bandwidth=8e9))
    for words in (
        "dare_ties: deltas, dropped at random, rescaled by l1, sign elected by mass of the "
        "weighted deltas, summed, lambda 0.3",
        f"base     {world.root / 'base'}",
        "weight 0 to 1, density 0.5, random stream 'b'",
        "9 with 151 elements (I64, bfloat16); 1 of them copied unchanged",
        "1 shard, ",
        "config.json, tokenizer.json, tokenizer_config.json",
        "(each input up to twice)",
        "memory   about ",
        "at 8 GB/s",
        "seed     9",
    ):
        assert words in text
    assert "time" not in "\n".join(describe(plan))


@pytest.mark.parametrize("output", ["", "  ", "a\0b"])
def test_outputs_that_are_no_path(world: World, output: str) -> None:
    with pytest.raises(RecipeError, match=r"^output: "):
        world.plan(output=output)


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": ["x"],
            "vocab_size": "10",
            "num_hidden_layers": 2.5,
            "tie_word_embeddings": 1,
        },
        {"text_config": [], "rope_scaling": {"a": [1]}, "quantization_config": {}},
        {"text_config": {"model_type": None}, "torch_dtype": 3},
        {},
    ],
)
def test_any_config(world: World, config: dict[str, Any]) -> None:
    world.write("base", config=config)
    world.write("a", TINY | HEAD, config=config)
    world.write("b", config=CONFIG)
    try:
        world.plan(parameters={"weight": [0, 1]})
    except CheckpointError as error:
        assert "lm_head" in str(error)  # noqa: PT017 (whether it is tied is not the point here)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "5GB"])
def test_bad_shard_size(world: World, size: Any) -> None:
    with pytest.raises(RecipeError, match="out_shard_size"):
        world.plan(out_shard_size=size)


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.5, "3"])
def test_bad_seed(world: World, seed: Any) -> None:
    with pytest.raises(ClFastError, match="seed"):
        world.plan("dare_ties", seed=seed)


def test_inputs_are_not_touched(world: World) -> None:
    def state() -> dict[Path, Any]:
        return {
            p: (p.stat().st_mtime_ns, p.read_bytes()) for p in world.root.rglob("*") if p.is_file()
        }

    before = state()
    world.plan("ties", parameters={"density": 0.5})
    assert state() == before


def huge(layers: int, experts: int) -> Tensors:
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (262_144, 8_200))}
    for i in range(layers):
        for name in ("q", "k", "v", "o"):
            tensors[f"model.layers.{i}.self_attn.{name}_proj.weight"] = ("BF16", (4096, 4096))
        for j in range(experts):
            for name in ("up", "gate", "down"):
                path = f"model.layers.{i}.mlp.experts.{j}.{name}_proj.weight"
                tensors[path] = ("BF16", (1024, 4096))
    return tensors


def test_a_hundred_gigabytes_plan_in_two_seconds(world: World) -> None:
    tensors = huge(layers=48, experts=80)
    assert sum(size_of(*entry) for entry in tensors.values()) > 100e9
    for name in ("base", "a", "b", "c"):
        world.write(name, tensors, shards=24, sparse=True, config={"num_hidden_layers": 48})
    models = [{"model": str(world.root / name)} for name in "abc"]
    recipe = parse_recipe(
        world.recipe(
            "dare_ties", models=models, parameters={"density": 0.2, "weight": [0.1, 0.2, 0.3]}
        )
    )
    start = time.process_time()
    plan = make_plan(recipe, world.root / "merged")
    spent = time.process_time() - start
    assert spent < 2.0
    assert len(plan.tensors) == len(tensors) > 11_000
    assert plan.tensors[0].numel > 2**31
    assert plan.bytes_read > 800e9
    assert plan.memory < 300e6
    start = time.process_time()
    describe(plan, 8e9)
    assert time.process_time() - start < 0.5
