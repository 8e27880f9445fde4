"""LoRA adapters as inputs of merges: read, refused, put on a base, merged, verified."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_cases
import merge_cases as cases
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_fast.checkpoints.adapters import read_adapter
from cl_fast.cli import main
from cl_fast.errors import CheckpointError, Interrupted, OutputError, RecipeError
from cl_fast.merging import describe, execute, make_plan, parse_recipe
from cl_fast.merging.adapters import Adapted
from cl_fast.merging.verify import verify

UP = "model.layers.{}.mlp.up_proj"
EMBED = "model.embed_tokens"
OUT, IN, ROWS, WIDTH = 30, 41, 50, 16
LINEAR = {UP.format(0): (OUT, IN), UP.format(1): (OUT, IN)}
SHAPES = {
    "model.embed_tokens.weight": (ROWS, WIDTH),
    "model.layers.0.mlp.up_proj.weight": (OUT, IN),
    "model.layers.0.input_layernorm.weight": (7,),
    "model.layers.1.mlp.up_proj.weight": (OUT, IN),
    "model.layers.1.input_layernorm.weight": (1,),
    "model.norm.weight": (WIDTH,),
}
METHODS = ("task_arithmetic", "ties", "ties paper", "dare_ties")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family of checkpoints and adapters on its base: plain, and with all that there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "SHAPES", SHAPES)
        root = cases.family(tmp_path_factory.mktemp("adapters") / "inputs")
    adapter_cases.write(root / "plain", adapter_cases.factors(LINEAR, 4), alpha=6)
    rich = adapter_cases.factors({UP.format(1): (OUT, IN)}, 4, seed=1)
    rich |= adapter_cases.factors({UP.format(0): (OUT, IN)}, 2, seed=2)
    rich |= adapter_cases.factors({EMBED: (WIDTH, ROWS)}, 4, seed=3)
    adapter_cases.write(
        root / "rich", rich, embeddings=(EMBED,), use_rslora=True, alpha=3,
        rank_pattern={"layers.0.mlp.up_proj": 2}, alpha_pattern={"embed_tokens": 5},
        more={"model.norm.weight": torch.linspace(0, 1, WIDTH).bfloat16()},
        modules_to_save=["norm"], dtype=torch.bfloat16,
    )  # fmt: skip
    return root


def on_base(root: Path, adapter: str) -> dict[str, Tensor]:
    """What the adapter makes of the base, in float64, from the formula of PEFT's papers."""
    state = {name: value.double() for name, value in cases.load(root / "base").items()}
    config = json.loads((root / adapter / "adapter_config.json").read_text())
    for name, value in load_file(root / adapter / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix(adapter_cases.PREFIX).partition(".lora_")
        if not part:
            state[module] = value.double()
            continue
        if "A" not in part:
            continue
        embedding = "embedding" in part
        a = value.double()
        b = load_file(root / adapter / "adapter_model.safetensors")[
            name.replace("lora_embedding_A", "lora_embedding_B").replace("lora_A", "lora_B")
        ].double()
        alpha = 5.0 if embedding else float(config["lora_alpha"])
        rank = a.shape[0]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        delta = scale * (b @ a)
        state[f"{module}.weight"] += delta.T if embedding else delta
    return state


def as_checkpoint(root: Path, adapter: str, folder: Path) -> Path:
    """The base with an adapter on it as a checkpoint, adapted weights in float32."""
    state, base = cases.load(root / "base"), cases.load(root / "base")
    for name, exact in on_base(root, adapter).items():
        if state[name].is_floating_point() and not torch.equal(exact, base[name].double()):
            state[name] = exact.bfloat16() if "norm" in name else exact.float()
    return cases.save(folder, state)


def recipe(root: Path, method: str, *models: str, **changes: Any) -> dict[str, Any]:
    name, own, everywhere = cases.METHODS[method]
    content: dict[str, Any] = {
        "merge_method": name,
        "base_model": str(root / "base"),
        "models": [
            {"model": str(root / model), "parameters": {"weight": 1 / k, **own}}
            for k, model in enumerate(models, 1)
        ],
    }
    if everywhere:
        content["parameters"] = dict(everywhere)
    return content | changes


def run(content: dict[str, Any], output: Path, **options: Any) -> Path:
    plan = make_plan(parse_recipe(content), output, out_shard_size=2000)
    return execute(plan, **options).output


ALONE: dict[str, Any] = {"merge_method": "task_arithmetic", "parameters": {}}


# An adapter alone.


@pytest.mark.parametrize("adapter", ["plain", "rich"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_alone_is_put_on_its_base_with_one_rounding(
    made: Path, tmp_path: Path, backend: str, adapter: str, dtype: str
) -> None:
    content = recipe(made, "task_arithmetic", adapter, **ALONE, out_dtype=dtype)
    out = run(content, tmp_path / "out", backend=backend)
    written, base = cases.load(out), cases.load(made / "base")
    for name, exact in on_base(made, adapter).items():
        if not base[name].is_floating_point():
            assert torch.equal(written[name], base[name])
            continue
        nearest = exact.float().to(getattr(torch, dtype))  # float32 first, as everywhere
        assert torch.equal(written[name], nearest), name
    entries = json.loads((out / "cl_fast_merge.json").read_text())["inputs"]
    assert [entry["role"] for entry in entries] == ["base", "adapter"]
    report = verify(out, sample=None, backend=backend)
    assert (report.problems, report.notes, report.inputs) == ([], [], 2)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_makes_the_same_of_it(tmp_path: Path, kind: str) -> None:
    """Within the roundings of PEFT's own dtype, and closer to float64 than PEFT."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    import tiny_models
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if kind == "llama":
        model, targets = tiny_models.llama(), ["q_proj", "down_proj", "embed_tokens"]
        more: dict[str, Any] = {"modules_to_save": ["lm_head"], "use_rslora": True}
    else:
        sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 67, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
        targets, more = ["c_attn", "c_proj"], {"bias": "lora_only", "lora_bias": False}
        more["fan_in_fan_out"] = True
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = cases.load(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False,
        rank_pattern={r"layers\.1\..*q_proj": 2, r".*h\.0\.attn\.c_proj": 3}, **more,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for value in adapted.parameters():
                if value.requires_grad:
                    value.add_(0.05 * torch.randn(value.shape).to(value.dtype))
        adapted.save_pretrained(tmp_path / "lora")
        exact = {}
        for module, layer in adapted.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                embedding = "default" in layer.lora_embedding_A
                kind = "lora_embedding_" if embedding else "lora_"
                a, b = (getattr(layer, kind + part)["default"] for part in "AB")
                a, b = (a, b) if embedding else (a.weight, b.weight)
                delta = layer.scaling["default"] * (b.detach().double() @ a.detach().double())
                exact[module] = delta.T if embedding or layer.fan_in_fan_out else delta
        merged = adapted.merge_and_unload().state_dict()
    out = run(recipe(tmp_path, "task_arithmetic", "lora", **ALONE), tmp_path / "out")
    ours = cases.load(out)
    worst = {"ours": 0.0, "theirs": 0.0}
    for name, value in ours.items():
        delta = exact.get(name.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(value, merged[name]), name
            continue
        wanted = base[name].double() + delta
        for who, found in (("ours", value), ("theirs", merged[name])):
            worst[who] += float((found.double() - wanted).square().sum())
        ulp = 2.0**-8 * torch.maximum(wanted.abs(), delta.abs())
        assert ((value.double() - merged[name].double()).abs() <= 4 * ulp + 1e-6).all(), name
        assert not torch.equal(value, base[name])
    assert 0 < worst["ours"] < worst["theirs"]


# In merges.


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_merged_as_the_checkpoint_that_it_makes(
    made: Path, tmp_path: Path, method: str, backend: str
) -> None:
    whole = as_checkpoint(made, "rich", tmp_path / "rich")
    content = recipe(made, method, "rich", "one", "plain")
    out = run(content, tmp_path / "out", backend=backend)
    other = "eager" if backend == "native" else None
    again = run(content, tmp_path / "again", backend=other, threads=2)
    assert cases.raw(again) == cases.raw(out)
    content["models"][0]["model"] = str(whole)
    wanted = run(content, tmp_path / "wanted", backend=backend)
    assert cases.raw(out) == cases.raw(wanted)
    if method == "ties":
        report = verify(out, sample=None, backend=backend)
        assert (report.problems, report.inputs) == ([], 4)


def test_a_base_with_its_adapter_is_a_model_for_any_method(
    made: Path, tmp_path: Path, backend: str
) -> None:
    pair = f"{made / 'base'}+{made / 'rich'}"
    content: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": pair}, {"model": str(made / "one")}],
        "parameters": {"weight": 1.0},
    }
    out = run(content, tmp_path / "out", backend=backend)
    applied = run(recipe(made, "task_arithmetic", "rich", **ALONE), tmp_path / "rich")
    assert (out / "tokenizer.json").exists()
    assert verify(out, sample=None, backend=backend).problems == []
    content["models"][0]["model"] = str(applied)
    assert cases.raw(out) == cases.raw(run(content, tmp_path / "wanted", backend=backend))
    as_base = recipe(made, "ties", "one", base_model=pair)
    out = run(as_base, tmp_path / "on", backend=backend)
    assert verify(out, sample=None, backend=backend).problems == []
    as_base["base_model"] = str(applied)
    assert cases.raw(out) == cases.raw(run(as_base, tmp_path / "on2", backend=backend))
    with pytest.raises(RecipeError, match="lies inside the input"):
        make_plan(parse_recipe(content | {"models": [{"model": pair}]}), made / "rich" / "out")


# What the engine promises.


def test_an_interrupted_run_goes_on_and_another_adapter_does_not(
    made: Path, tmp_path: Path, backend: str
) -> None:
    folder = tmp_path / "rich"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((made / "rich" / name).read_bytes())
    content = recipe(made, "ties paper", str(folder), "one")
    whole = run(content, tmp_path / "whole" / "out", backend=backend)
    out = tmp_path / "out"

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(content, out, backend=backend, progress=stop)
    config = folder / "adapter_config.json"
    before = config.read_text()
    config.write_text(before.replace('"lora_alpha": 3', '"lora_alpha": 4'))
    with pytest.raises(OutputError, match=r"adapter_config.json differs; --restart"):
        run(content, out, backend=backend, resume=True)
    config.write_text(before)
    with pytest.raises(OutputError, match=r"adapter_config.json differs"):
        run(content, out, backend=backend, resume=True)  # a later time of change
    fresh = tmp_path / "fresh"
    with pytest.raises(Interrupted):
        run(content, fresh, backend=backend, progress=stop)
    plan = make_plan(parse_recipe(content), fresh, out_shard_size=2000)
    assert execute(plan, backend=backend, resume=True).resumed > 0
    assert cases.raw(fresh) == cases.raw(whole)


def test_verify_finds_an_adapter_that_was_changed(made: Path, tmp_path: Path) -> None:
    adapter = adapter_cases.write(tmp_path / "a", adapter_cases.factors(LINEAR, 2))
    out = run(recipe(made, "task_arithmetic", str(adapter), **ALONE), tmp_path / "out")
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    for sample in (0, 8):
        report = verify(out, sample=sample)
        assert len(report.problems) == 1
        assert "its data differ from those that were merged" in report.problems[0]
    data[-5] ^= 1
    weights.write_bytes(data)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert "the header of adapter_config.json differs" in verify(out).problems[0]
    weights.unlink()
    assert "no adapter_model.safetensors" in verify(out).problems[0]


def test_the_plan_says_what_an_adapter_is_and_loads_no_torch(made: Path, tmp_path: Path) -> None:
    content = recipe(made, "ties", "rich", "one")
    plan = make_plan(parse_recipe(content), tmp_path / "out", threads=1)
    text = "\n".join(describe(plan))
    assert "rich: LoRA adapter (ranks 2 to 4 on 3 modules, 1 whole tensor)" in text
    source = next(s for t in plan.tensors for s in [t.terms[0].source] if isinstance(s, Adapted))
    assert plan.memory > source.memory > 3 * source.nbytes
    (tmp_path / "recipe.yml").write_text(json.dumps(content))
    code = (
        "import sys\n"
        "from cl_fast.merging import describe, load_recipe, make_plan\n"
        "describe(make_plan(load_recipe(sys.argv[1]), sys.argv[2]))\n"
        "print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yml"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_base_that_it_names_is_compared(made: Path, tmp_path: Path) -> None:
    made_of = adapter_cases.factors(LINEAR, 2)
    named = adapter_cases.write(tmp_path / "a", made_of, base_model_name_or_path=str(made / "one"))
    plan = make_plan(parse_recipe(recipe(made, "ties", str(named))), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"for another base: it was trained on .*one"):
        execute(plan)
    assert not (tmp_path / "out").exists()
    adapter_cases.write(tmp_path / "a", made_of, base_model_name_or_path=str(made / "base"))
    run(recipe(made, "ties", str(named)), tmp_path / "out")
    adapter_cases.write(tmp_path / "a", made_of, base_model_name_or_path="org/some-model")
    plan = make_plan(parse_recipe(recipe(made, "ties", str(named))), tmp_path / "out2")
    assert any("trained on 'org/some-model'" in note for note in plan.notes)


def test_a_relative_base_that_it_names_is_compared(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    made_of = adapter_cases.factors(LINEAR, 2)
    named = adapter_cases.write(tmp_path / "a", made_of, base_model_name_or_path="one")
    with pytest.raises(CheckpointError, match=r"for another base: it was trained on one "):
        run(recipe(made, "ties", str(named)), tmp_path / "out")
    asked = ["adapter", "info", str(named), "--base", "base"]
    assert main(asked) == 1
    assert "for another base" in capsys.readouterr().err
    adapter_cases.write(tmp_path / "a", made_of, base_model_name_or_path="./base")
    run(recipe(made, "ties", str(named)), tmp_path / "out")
    assert main(asked) == 0
    assert "fits     base" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for unknown in ("org/some-model", str(tmp_path / "empty")):
        adapter_cases.write(tmp_path / "a", made_of, base_model_name_or_path=unknown)
        assert main(asked) == 0
        said = capsys.readouterr().out
        assert f"note: {named} says that it was trained on {unknown!r}" in said
        assert "shapes fit base" in said
        assert "fits     base" not in said


# Bad input.


def plain(**config: Any) -> Callable[[Path], Path]:
    return lambda folder: adapter_cases.write(folder, adapter_cases.factors(LINEAR, 2), **config)


def with_tensor(name: str, value: Tensor, **config: Any) -> Callable[[Path], Path]:
    return plain(more={name: value}, **config)


def without(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        plain()(folder)
        (folder / name).unlink()
        return folder

    return build


def pickle(folder: Path) -> Path:
    without("adapter_model.safetensors")(folder)
    (folder / "adapter_model.bin").write_bytes(b"x")
    return folder


def of_shape(shapes: dict[str, tuple[int, int]], **more: Any) -> Callable[[Path], Path]:
    return lambda folder: adapter_cases.write(folder, adapter_cases.factors(shapes, 2), **more)


def nan(folder: Path) -> Path:
    made = adapter_cases.factors(LINEAR, 2)
    made[UP.format(0)][0][0, 0] = float("nan")
    return adapter_cases.write(folder, made)


BAD: list[Any] = [
    pytest.param(plain(peft_type="IA3"), "peft_type is 'IA3'", id="another tuner"),
    pytest.param(plain(use_dora=True), "use_dora is set: DoRA", id="dora"),
    pytest.param(
        with_tensor(f"{UP.format(0)}.lora_magnitude_vector", torch.ones(3)),
        "belongs to a variant", id="dora without its setting",
    ),
    pytest.param(plain(init_lora_weights="pissa_niter_4"), "changed the base", id="pissa"),
    pytest.param(plain(init_lora_weights="loftq"), "is 'loftq'", id="loftq"),
    pytest.param(plain(target_parameters=["x"]), "on parameters of experts", id="experts"),
    pytest.param(plain(new_trick=3), "'new_trick' is not known here", id="unknown setting"),
    pytest.param(plain(r=3), "has the rank 2, adapter_config.json says 3", id="rank"),
    pytest.param(plain(r=0), "r: must be a whole number", id="rank 0"),
    pytest.param(plain(lora_alpha="x"), "lora_alpha: must be a number", id="alpha"),
    pytest.param(plain(rank_pattern={"(": 3}), "no regular expression", id="pattern"),
    pytest.param(without("adapter_model.safetensors"), "no adapter_model", id="no weights"),
    pytest.param(pickle, "is a pickle", id="pickle"),
    pytest.param(of_shape({UP.format(5): (3, 4)}), "does not have.*another base", id="missing"),
    pytest.param(of_shape({UP.format(0): (OUT, IN - 1)}), "another base", id="shape"),
    pytest.param(
        of_shape({UP.format(0): (IN - 1, OUT)}), r"as a weight of \[40, 30\]", id="shape 2"
    ),
    pytest.param(
        of_shape({EMBED: (WIDTH, ROWS - 1)}, embeddings=(EMBED,)), "another base", id="vocabulary"
    ),
    pytest.param(
        with_tensor("model.norm.weight", torch.ones(17)), "replaces 'model.norm.weight'", id="saved"
    ),
    pytest.param(with_tensor("lm_head.weight", torch.ones(3)), "does not have", id="saved 2"),
    pytest.param(
        with_tensor(f"{UP.format(0)}.lora_B.bias", torch.ones(OUT)), "adds to", id="no such bias"
    ),
    pytest.param(nan, "hold NaN or infinity", id="nan"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "words"), BAD)
def test_what_cannot_be_merged_is_refused(
    made: Path, tmp_path: Path, build: Callable[[Path], Path], words: str
) -> None:
    adapter = build(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=words):
        run(recipe(made, "ties", str(adapter)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_an_adapter_cannot_stand(made: Path, tmp_path: Path) -> None:
    linear = recipe(made, "ties", "plain", "one") | {"merge_method": "linear"}
    linear.pop("base_model")
    for entry in linear["models"]:
        entry["parameters"] = {"weight": 1}
    words = r"models\[0\].model.*a LoRA adapter.*has none; write .*BASE\+.*plain, or use task"
    with pytest.raises(RecipeError, match=words):
        make_plan(parse_recipe(linear), tmp_path / "out")
    content = recipe(made, "ties", "one", base_model=str(made / "plain"))
    with pytest.raises(RecipeError, match=r"base_model.*a LoRA adapter"):
        make_plan(parse_recipe(content), tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")
    content = recipe(made, "ties", "one")
    content["models"][0]["model"] = f"{made / 'base'}+{made / 'one'}"
    with pytest.raises(CheckpointError, match="is no folder of an adapter"):
        make_plan(parse_recipe(content), tmp_path / "out")


def test_slices_give_an_adapter_one_base(made: Path, tmp_path: Path) -> None:
    """Two slices of the adapter on its base are the adapter; slices of two bases are refused."""

    def sliced(*bases: str) -> dict[str, Any]:
        return {
            "merge_method": "task_arithmetic",
            "slices": [
                {
                    "base_model": str(made / base),
                    "sources": [
                        {"model": str(made / "plain"), "layer_range": [i, i + 1]},
                        {"model": str(made / base), "layer_range": [i, i + 1]},
                    ],
                    "parameters": {"weight": 1.0},
                }
                for i, base in enumerate(bases)
            ],
        }

    out = run(sliced("base", "base"), tmp_path / "out")
    written, exact, base = cases.load(out), on_base(made, "plain"), cases.load(made / "base")
    for name in LINEAR:
        value = written[f"{name}.weight"]
        assert torch.equal(value, exact[f"{name}.weight"].float().bfloat16())
        assert not torch.equal(value, base[f"{name}.weight"])
    assert verify(out, sample=None).problems == []
    with pytest.raises(RecipeError, match="have different bases; write it as BASE"):
        make_plan(parse_recipe(sliced("base", "one")), tmp_path / "no")
