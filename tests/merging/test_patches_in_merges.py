"""Patches on checkpoints on disk: applied alone, and in merges with finetuned models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge_cases as cases
import patch_cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_fast.editing.facts import Fact
from cl_fast.editing.patch import Patch
from cl_fast.errors import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from cl_fast.merging import (
    apply_patch,
    dare_linear,
    describe,
    execute,
    make_plan,
    parse_recipe,
    ties,
)
from cl_fast.merging import patches as patches_module
from cl_fast.merging.patches import Patched
from cl_fast.merging.verify import verify

EDITED = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
COUNT = 4


def patch_of(base: dict[str, Tensor], seed: int = 0, **changes: Any) -> Patch:
    weights = {name: base[f"{name}.weight"] for name in EDITED}
    return patch_cases.case_of(weights, COUNT, seed=seed, size=0.1).patch(**changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family of checkpoints, and patches on its base: a.safetensors, b.safetensors."""
    root = cases.family(tmp_path_factory.mktemp("patches") / "inputs")
    base = cases.tensors(0)
    patch_of(base).save(root / "a.safetensors")
    facts = {f"g{i}": Fact("{} speaks", f"Person {i}", "Greek", id=f"g{i}") for i in range(COUNT)}
    columns = [(name,) for name in facts]
    patch_of(base, seed=1, facts=facts, columns=columns).save(root / "b.safetensors", "float64")
    return root


def recipe(root: Path, method: str, *models: str, **changes: Any) -> dict[str, Any]:
    """A recipe over models and patches of the family, the k-th with weight 1 / k."""
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
    return execute(
        make_plan(parse_recipe(content), output, out_shard_size=300_000), **options
    ).output


def as_checkpoint(patch: Path, base: Path, folder: Path) -> Path:
    """The base with a patch on it as a checkpoint of its own, the edited weights in float32."""
    state = cases.load(base)
    tensors = load_file(patch)
    for name in EDITED:
        u, v = (tensors[f"{name}.{part}"].float().double() for part in "UV")
        state[f"{name}.weight"] = (state[f"{name}.weight"].double() + u @ v.T).float()
    return cases.save(folder, state)


# A patch alone.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_patched_checkpoint_is_the_patched_model(
    tmp_path: Path, backend: str, dtype: torch.dtype
) -> None:
    """Tensor for tensor and byte for byte: what `apply` and saving give."""
    base = {name: value.to(dtype) for name, value in cases.tensors(0).items()}
    base["model.norm.weight"][3] = -0.0
    base["model.ids"] = torch.arange(7)
    folder = cases.save(tmp_path / "base", base, files=3)
    patch = patch_of(base)
    patch.save(tmp_path / "edits.safetensors")
    result = apply_patch(
        folder, tmp_path / "edits.safetensors", tmp_path / "out", backend=backend,
        out_shard_size=300_000,
    )  # fmt: skip
    assert result.backend == backend
    assert result.shards > 1

    class Model(torch.nn.Module):
        """Only what the patch looks for."""

        def __init__(self) -> None:
            super().__init__()
            for name in EDITED:
                layer = torch.nn.Linear(1, 1)
                layer.weight = torch.nn.Parameter(base[f"{name}.weight"].clone())
                self.add_module(name.replace(".", "_"), layer)

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            for name in EDITED:
                yield name, self.get_submodule(name.replace(".", "_"))

    model = Model()
    patch.apply(model)
    written = cases.raw(tmp_path / "out")
    assert written.keys() == base.keys()
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        if layer in EDITED:
            value = model.get_submodule(layer.replace(".", "_")).weight.detach()
            assert not torch.equal(value, base[name])
        assert written[name] == value.contiguous().view(torch.uint8).numpy().tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    report = verify(tmp_path / "out", sample=None, backend=backend)
    assert (report.problems, report.notes, report.inputs) == ([], [], 2)
    assert len(report.recomputed) == len(base)


def test_models_of_transformers(tmp_path: Path) -> None:
    """Llama, and GPT-2, whose weights are transposed and whose checkpoint may lack the prefix."""
    import tiny_models
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 67, "n_positions": 32}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    models = {
        "model.layers.{}.mlp.down_proj": tiny_models.llama().to(torch.bfloat16),
        "transformer.h.{}.mlp.c_proj": gpt2,
    }
    for number, (pattern, model) in enumerate(models.items()):
        folder = tmp_path / str(number)
        names = [pattern.format(i) for i in range(2)]
        weights = {k: v.detach().clone() for k, v in patch_cases.matrices(model, names).items()}
        patch = patch_cases.case_of(weights, transposed="c_proj" in pattern).patch()
        folder.mkdir()
        patch.save(folder / "edits.safetensors")
        model.save_pretrained(folder / "base", max_shard_size="8kB")
        apply_patch(folder / "base", folder / "edits.safetensors", folder / "out")
        with patch.apply(model):
            model.save_pretrained(folder / "wanted")
        assert cases.raw(folder / "out") == cases.raw(folder / "wanted")
        x = torch.arange(1, 9)[None]
        base, edited = (
            AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").eval()
            for name in ("base", "out")
        )
        plain = base(x).logits
        with Patch.load(folder / "edits.safetensors", base):
            assert torch.equal(base(x).logits, edited(x).logits)
        assert not torch.equal(plain, edited(x).logits)
    bare = {
        k.removeprefix("transformer."): v for k, v in cases.load(tmp_path / "1" / "base").items()
    }
    save_file(bare, tmp_path / "bare.safetensors", metadata={"format": "pt"})
    apply_patch(tmp_path / "bare.safetensors", tmp_path / "1" / "edits.safetensors", tmp_path / "o")
    wanted = cases.raw(tmp_path / "1" / "wanted")
    assert cases.raw(tmp_path / "o") == {
        name.removeprefix("transformer."): data for name, data in wanted.items()
    }


def test_another_type_is_rounded_once_as_well(made: Path, tmp_path: Path, backend: str) -> None:
    apply_patch(
        made / "base", made / "a.safetensors", tmp_path / "out", out_dtype="float32",
        backend=backend,
    )  # fmt: skip
    as_checkpoint(made / "a.safetensors", made / "base", tmp_path / "wanted")
    wanted = cases.load(tmp_path / "wanted")
    for name, value in cases.load(tmp_path / "out").items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            assert torch.equal(value, wanted[name].float()), name


def test_an_empty_patch_copies_the_base(made: Path, tmp_path: Path, backend: str) -> None:
    patch = Patch.load(made / "a.safetensors")
    patch.drop(patch.ids).save(tmp_path / "empty.safetensors")
    apply_patch(made / "base", tmp_path / "empty.safetensors", tmp_path / "out", backend=backend)
    assert cases.raw(tmp_path / "out") == cases.raw(made / "base")


# In merges.


@pytest.mark.parametrize("method", [name for name in cases.METHODS if name != "linear"])
def test_a_patch_is_merged_as_the_checkpoint_that_it_makes(
    made: Path, tmp_path: Path, method: str, backend: str
) -> None:
    whole = as_checkpoint(made / "a.safetensors", made / "base", tmp_path / "a.safetensors")
    content = recipe(made, method, "a.safetensors", "one")
    out = run(content, tmp_path / "out", backend=backend)
    content["models"][0]["model"] = str(whole)
    wanted = run(content, tmp_path / "wanted", backend=backend)
    assert cases.raw(out) == cases.raw(wanted)
    report = verify(out, sample=None, backend=backend)
    assert (report.problems, report.inputs) == ([], 3)


def test_patches_and_finetuned_models_meet_in_one_pass(
    made: Path, tmp_path: Path, backend: str
) -> None:
    names = ["one", "a.safetensors", "two", "b.safetensors"]
    content = recipe(made, "ties peft", *names)
    out = run(content, tmp_path / "out", backend=backend)
    for entry, name in zip(content["models"], names, strict=True):
        if name.endswith(".safetensors"):
            entry["model"] = str(as_checkpoint(made / name, made / "base", tmp_path / name))
    assert cases.raw(out) == cases.raw(run(content, tmp_path / "wanted", backend=backend))
    other = "eager" if backend == "native" else None
    again = run(recipe(made, "ties peft", *names), tmp_path / "again", backend=other)
    assert cases.contents(again).keys() == cases.contents(out).keys()
    assert cases.raw(again) == cases.raw(out)


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("density", [0.2, 0.9])
def test_two_patches_alone_leave_all_else_as_it_is(
    made: Path, tmp_path: Path, backend: str, scope: str, density: float
) -> None:
    """Under a trim over the model, 0.9 of it is more than the patches edit."""
    content = recipe(made, "ties", "a.safetensors", "b.safetensors")
    content["parameters"] = {"trim_scope": scope}
    for entry in content["models"]:
        entry["parameters"]["density"] = density
    out = run(content, tmp_path / "out", backend=backend)
    written, base = cases.raw(out), cases.raw(made / "base")
    same = {name for name in base if written[name] == base[name]}
    assert same == base.keys() - {f"{name}.weight" for name in EDITED}
    assert verify(out, sample=None, backend=backend).problems == []
    for entry in content["models"]:
        name = Path(entry["model"]).name
        entry["model"] = str(as_checkpoint(made / name, made / "base", tmp_path / name))
    assert written == cases.raw(run(content, tmp_path / "wanted", backend=backend))


def test_a_weight_scales_the_edit(made: Path, tmp_path: Path, backend: str) -> None:
    content = recipe(made, "ties", "a.safetensors")
    content |= {"merge_method": "task_arithmetic", "out_dtype": "float32"}
    content["models"][0]["parameters"] = {"weight": 0.5}
    written = cases.load(run(content, tmp_path / "out", backend=backend))
    patch = Patch.load(made / "a.safetensors")
    for layer in patch.layers:
        base = cases.load(made / "base")[layer.weight_name].double()
        exact = base + 0.5 * layer.delta
        assert torch.allclose(written[layer.weight_name].double(), exact, rtol=0, atol=1e-6)


def test_in_memory_a_patch_is_merged_to_the_same_bits(made: Path, tmp_path: Path) -> None:
    base = cases.load(made / "base")
    loaded = Patch.load(made / "a.safetensors").state_dict(base)
    one = cases.load(made / "one")
    content = recipe(made, "ties", "a.safetensors", "one")
    written = cases.load(run(content, tmp_path / "out"))
    merged = ties(base, [loaded, one], weight=[1.0, 0.5], density=0.2)
    assert all(torch.equal(merged[name], written[name]) for name in written)
    content = recipe(made, "dare_linear", "a.safetensors")
    written = cases.load(run(content, tmp_path / "dare"))
    merged = dare_linear(base, {"a.safetensors": loaded}, density=0.3)
    assert all(torch.equal(merged[name], written[name]) for name in written)


# What the engine promises.


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    made: Path, tmp_path: Path, backend: str
) -> None:
    for method, models in (("ties paper", ("a.safetensors", "one")), ("alone", ("a.safetensors",))):
        content = recipe(made, "task_arithmetic" if method == "alone" else method, *models)
        content.pop("parameters", None) if method == "alone" else None
        whole = run(content, tmp_path / method / "whole" / "out", backend=backend)
        out = tmp_path / method / "out"

        def stop(phase: str, done: int, total: int) -> None:
            if phase == "merge" and done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted):
            run(content, out, backend=backend, progress=stop)
        assert not out.exists()
        plan = make_plan(parse_recipe(content), out, out_shard_size=300_000)
        result = execute(plan, backend=backend, resume=True)
        assert result.resumed > 0
        assert cases.contents(out) == cases.contents(whole)
        assert not cases.partial(out).exists()


def test_resume_is_refused_with_another_patch(made: Path, tmp_path: Path) -> None:
    edits = tmp_path / "edits.safetensors"
    edits.write_bytes((made / "a.safetensors").read_bytes())
    out = tmp_path / "out"

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        apply_patch(made / "base", edits, out, out_shard_size=300_000, progress=stop)
    Patch.load(edits).drop(["f1"]).save(edits)
    with pytest.raises(OutputError, match=r"edits.safetensors differs; --restart begins again"):
        apply_patch(made / "base", edits, out, out_shard_size=300_000, resume=True)


def test_verify_finds_a_patch_that_was_changed(made: Path, tmp_path: Path, backend: str) -> None:
    edits = tmp_path / "edits.safetensors"
    edits.write_bytes((made / "a.safetensors").read_bytes())
    out = apply_patch(made / "base", edits, tmp_path / "out", backend=backend).output
    assert [entry["role"] for entry in json.loads(
        (out / "cl_fast_merge.json").read_text())["inputs"]] == ["base", "patch"]  # fmt: skip
    assert verify(out, backend=backend).ok
    data = bytearray(edits.read_bytes())
    data[-5] ^= 1
    edits.write_bytes(data)
    for sample in (0, 8):  # without, and with tensors that are made again
        report = verify(out, backend=backend, sample=sample)
        assert len(report.problems) == 1
        assert "the data are not those that were saved" in report.problems[0]
    Patch.load(made / "a.safetensors").drop(["f0"]).save(edits)
    assert "the header of edits.safetensors differs" in verify(out).problems[0]
    edits.unlink()
    report = verify(out)
    assert report.ok
    assert "is not at" in report.notes[0]


def test_the_plan_says_what_a_patch_is_and_takes(made: Path, tmp_path: Path) -> None:
    content = recipe(made, "ties", "a.safetensors", "one")
    plan = make_plan(parse_recipe(content), tmp_path / "out", threads=1)
    text = "\n".join(describe(plan))
    size = (made / "a.safetensors").stat().st_size
    words = (
        r"/a.safetensors: patch \(memit, 4 facts in 2 layers\), [\d.]+ kB, weight 1, density 0.2"
    )
    assert re.search(f"model    {made}{words}", text)
    assert "copied unchanged" in text, "the integers"
    content["models"] = content["models"][1:]
    without = make_plan(parse_recipe(content), tmp_path / "out", threads=1)
    one = next(s for t in plan.tensors for s in [t.terms[0].source] if isinstance(s, Patched))
    assert plan.memory - without.memory > one.memory > 3 * one.nbytes
    assert 0 < plan.bytes_read - without.bytes_read - sum(
        t.nbytes for t in plan.tensors) * 2 < 2 * size  # fmt: skip
    alone = make_plan(
        parse_recipe(
            {
                "merge_method": "task_arithmetic",
                "base_model": str(made / "base"),
                "models": [{"model": str(made / "a.safetensors"), "parameters": {"weight": 1}}],
            }
        ),
        tmp_path / "out",
    )
    text = "\n".join(describe(alone))
    assert "applied to the base with one rounding" in text
    assert f"; {len(alone.tensors) - 2} of them copied unchanged" in text
    assert alone.passes == 1
    total = sum(t.nbytes for t in alone.tensors)
    assert total < alone.bytes_read < total + size, "every byte of the base once"


def test_the_fingerprint_is_of_the_patch_s_content(made: Path, tmp_path: Path) -> None:
    edits = tmp_path / "edits.safetensors"
    prints = []
    for factor in (1.0, 1.0, 1.0 + 2**-20):
        patch = Patch.load(made / "a.safetensors")
        layers = [
            type(x)(x.name, x.transposed, x.base_hash, x.U * factor, x.V, x.keys, x.targets)
            for x in patch.layers
        ]
        Patch(
            tuple(layers), patch.columns, patch.ridge, patch.facts, priors=patch.priors,
            method=patch.method,
        ).save(edits)  # fmt: skip
        os.utime(edits, ns=(10**18, 10**18))
        content = recipe(tmp_path, "ties", "edits.safetensors", base_model=str(made / "base"))
        prints.append(make_plan(parse_recipe(content), tmp_path / "out").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_planning_with_a_patch_loads_no_torch(made: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe(made, "ties", "a.safetensors")))
    code = (
        "import sys\n"
        "from cl_fast.merging import describe, load_recipe, make_plan\n"
        "describe(make_plan(load_recipe(sys.argv[1]), sys.argv[2]))\n"
        "print(*sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yml"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# What does not go together.


def moved(made: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The base with something changed."""
    state = cases.load(made / "base")
    change(state)
    return cases.save(folder, state)


UP = f"{EDITED[1]}.weight"


def put(value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.update({UP: value(state[UP])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(lambda w: w.flip(0)), f"is for another base: tensor '{UP}' of .* not the weight"),
        (lambda s: s.pop(UP), f"models.0..model: .*edits '{UP}', which .* not have .it has '"),
        (put(lambda w: w[:7]), rf"edits '{UP}' of shape \[300, 401\], in .* it has \[7, 401\]"),
        (put(lambda w: w.to(torch.int8)), f"edits '{UP}', which .* stores as I8"),
        (put(lambda w: w.double()), f"edits '{UP}', which .* stores as F64"),
    ],
)
def test_other_bases_are_refused_before_anything_is_written(
    made: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], words: str, backend: str
) -> None:
    base = moved(made, tmp_path / "base", change)
    before = cases.snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        apply_patch(base, made / "a.safetensors", tmp_path / "out", backend=backend)
    assert cases.snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda c: c.update(merge_method="linear", base_model=None),
            RecipeError,
            r"models\[0\].model: .*a.safetensors' is an edit patch.*'linear' has none; write it .* "
            r"BASE\+.*or use task_ar",
        ),
        (
            lambda c: c.update(base_model=c["models"][0]["model"], models=c["models"][1:]),
            RecipeError,
            "base_model: .*a.safetensors' is an edit patch.*name the checkpoint that it changes",
        ),
        (
            lambda c: c.update(tokenizer_source=c["models"][0]["model"]),
            RecipeError,
            "tokenizer_source: .*a.safetensors' is an edit patch",
        ),
    ],
)
def test_recipes_that_are_refused(
    made: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any],
    error: type[Exception], words: str,
) -> None:  # fmt: skip
    content = recipe(made, "task_arithmetic", "a.safetensors", "one")
    content.pop("parameters")
    change(content)
    content = {key: value for key, value in content.items() if value is not None}
    with pytest.raises(error, match=words):
        make_plan(parse_recipe(content), tmp_path / "out")


def test_what_is_no_patch_is_not_applied(made: Path, tmp_path: Path) -> None:
    for name, words in (
        ("base", "not a regular file|cannot be read|is a folder"),
        ("none.safetensors", "there is no such file"),
        ("one/model.safetensors", "no edit patch .* format 'pt'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            apply_patch(made / "base", made / name, tmp_path / "out")
    damaged = tmp_path / "damaged.safetensors"
    data = bytearray((made / "a.safetensors").read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that were saved"):
        apply_patch(made / "base", damaged, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.safetensors"]


def test_quantised_checkpoints_are_refused(made: Path, tmp_path: Path) -> None:
    base = moved(made, tmp_path / "base", lambda state: None)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the checkpoint is quantised \(fp8\)"):
        apply_patch(base, made / "a.safetensors", tmp_path / "out")


def test_what_overflows_is_told_and_may_be_let_through(tmp_path: Path, backend: str) -> None:
    base = {name: value.half() for name, value in cases.tensors(0).items()}
    folder = cases.save(tmp_path / "base", base)
    weights = {name: base[f"{name}.weight"] for name in EDITED}
    patch_cases.case_of(weights, 2, size=1e7).patch().save(tmp_path / "edits.safetensors")
    with pytest.raises(NonFiniteError, match=rf"{EDITED[0]}.weight: \d+ values .* infinite in F16"):
        apply_patch(folder, tmp_path / "edits.safetensors", tmp_path / "out", backend=backend)
    assert not (tmp_path / "out").exists()
    apply_patch(
        folder, tmp_path / "edits.safetensors", tmp_path / "out", backend=backend, nan="propagate"
    )
    assert not torch.isfinite(cases.load(tmp_path / "out")[f"{EDITED[0]}.weight"]).all()
    apply_patch(
        folder, tmp_path / "edits.safetensors", tmp_path / "wide", backend=backend,
        out_dtype="bfloat16",
    )  # fmt: skip


def test_too_little_memory_for_a_whole_tensor_is_told(made: Path, tmp_path: Path) -> None:
    cases.need_native()
    for backend in ("native", "eager"):
        with pytest.raises(OutputError, match=r"--memory 16.8 MB is too little for the.*give more"):
            apply_patch(
                made / "base", made / "a.safetensors", tmp_path / "out", memory=16 << 20,
                backend=backend,
            )  # fmt: skip


def test_patches_without_torch_say_so(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.need_native()
    plan = make_plan(
        parse_recipe(recipe(made, "ties", "a.safetensors")), tmp_path / "out", out_shard_size=10**9
    )
    source = next(t.terms[0].source for t in plan.tensors if t.name == UP)
    assert isinstance(source, Patched)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        OutputError, match="torch, which puts a patch on its base, is not installed"
    ):
        patches_module.make(source)
