"""Adapters composed among themselves and extracted from finetunes, against float64 and PEFT."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapter_cases
import merge_cases as cases
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_fast.checkpoints.adapters import read_adapter
from cl_fast.cli import main
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError, RecipeError
from cl_fast.merging import execute, make_plan, parse_recipe
from cl_fast.merging.composing import composing_methods, merge_adapters
from cl_fast.merging.extracting import extract_adapter
from cl_fast.merging.factors import Rank, truncate, truncate_product

Q, EMBED = "model.layers.{}.self_attn.q_proj", "model.embed_tokens"
SHAPES = {Q.format(0): (24, 17), Q.format(1): (24, 17)}
WEIGHTS = [1.0, 0.5, -0.3]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of rank 3; one has a scale of its own, one lacks a module."""
    root = tmp_path_factory.mktemp("three")
    shapes = [SHAPES, SHAPES, {Q.format(0): (24, 17)}]
    more: list[dict[str, Any]] = [{}, {"alpha_pattern": {"1.self_attn.q_proj": 5}}, {}]
    return [
        adapter_cases.write(
            root / f"a{i}", adapter_cases.factors(shapes[i], 3, seed=i), alpha=2 + i, **more[i]
        )
        for i in range(3)
    ]


def deltas(folder: Path) -> dict[str, Tensor]:
    """s B A of every module in float64, read with PEFT's own rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        module = name.removeprefix(adapter_cases.PREFIX).split(".lora_")[0]
        alpha = config["lora_alpha"]
        for pattern, value in config.get("alpha_pattern", {}).items():
            if module.endswith(pattern.removeprefix("^")):
                alpha = value
        found[module] = alpha / a.shape[0] * (b.double() @ a.double())
    return found


def wanted_sum(folders: list[Path], weights: list[float] = WEIGHTS) -> dict[str, Tensor]:
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder).items():
            total[name] += weight * delta
    return total


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_the_sum_is_exact(three: list[Path], tmp_path: Path, method: str) -> None:
    made = merge_adapters(three, tmp_path / "out", weights=WEIGHTS, method=method)
    written = deltas(tmp_path / "out")
    for name, exact in wanted_sum(three).items():
        assert torch.allclose(written[name], exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    assert [module.rank for module in made.modules] == [9, 6]
    assert made.relative < 1e-7
    assert "different modules" in made.notes[0]


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_svd_is_the_best_of_its_rank_and_tells_its_error(
    three: list[Path], tmp_path: Path, rank: int
) -> None:
    made = merge_adapters(three, tmp_path / "out", weights=WEIGHTS, method="svd", rank=rank)
    written = deltas(tmp_path / "out")
    for module in made.modules:
        exact = wanted_sum(three)[module.name]
        sigma = torch.linalg.svdvals(exact)
        least = float(sigma[rank:].square().sum().sqrt())
        error = float((written[module.name] - exact).norm())
        assert error <= least + 1e-6 * float(sigma[0])
        assert abs(module.error - error) <= 1e-9 * float(sigma[0])
        assert module.norm == pytest.approx(float(exact.norm()))
        assert module.rank == min(rank, int((sigma > 1e-12).sum()))


def test_energy_keeps_as_few_directions_as_hold_it(three: list[Path], tmp_path: Path) -> None:
    made = merge_adapters(three, tmp_path / "out", method="svd", energy=0.9, max_rank=7)
    total = wanted_sum(three, [1.0] * 3)
    for module in made.modules:
        shares = torch.linalg.svdvals(total[module.name]).square().cumsum(0)
        needed = int((shares < 0.9 * shares[-1]).sum()) + 1
        assert module.rank == needed
        assert module.relative <= math.sqrt(0.1)
    read_adapter(tmp_path / "out")  # ranks and config agree


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
@pytest.mark.parametrize("transposed", [False, True])
def test_methods_of_elements_are_those_of_a_merge_with_the_base(
    tmp_path: Path, method: str, transposed: bool
) -> None:
    """Also the masks: with a base of zeros the merged weight is the combined delta."""
    name = "transformer.h.0.mlp.c_fc" if transposed else Q.format(0)
    folders = [
        adapter_cases.write(
            tmp_path / f"a{i}", adapter_cases.factors({name: (24, 17)}, 3, seed=i),
            fan_in_fan_out=transposed,
        )
        for i in range(2)
    ]  # fmt: skip
    shape = (17, 24) if transposed else (24, 17)
    cases.save(tmp_path / "base", {f"{name}.weight": torch.zeros(shape)})
    recipe = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(folder), "parameters": {"weight": weight, "density": 0.4}}
            for folder, weight in zip(folders, (1.0, -0.5), strict=True)
        ],
        "parameters": {"lambda": 0.7},
        "seed": 5,
    }
    if method == "ties":
        del recipe["seed"]
    merged = cases.load(execute(make_plan(parse_recipe(recipe), tmp_path / "merged")).output)
    made = merge_adapters(
        folders, tmp_path / "out", weights=[1.0, -0.5], method=method, density=0.4, rank=17,
        lam=0.7, seed=5,
    )  # fmt: skip
    exact = merged[f"{name}.weight"].double()
    found = deltas(tmp_path / "out")[name]
    assert torch.allclose(found.T if transposed else found, exact, rtol=0, atol=1e-6)
    assert made.relative < 1e-6
    small = merge_adapters(
        folders, tmp_path / "small", weights=[1.0, -0.5], method=f"{method}_svd", density=0.4,
        lam=0.7, seed=5,
    )  # fmt: skip
    sigma = torch.linalg.svdvals(exact)
    assert small.modules[0].rank == 3
    assert small.modules[0].error == pytest.approx(float(sigma[3:].norm()), rel=1e-5)


@pytest.mark.parametrize("method", sorted(set(composing_methods()) - {"cat", "linear_factors"}))
def test_every_method_takes_one_adapter_twice(
    three: list[Path], tmp_path: Path, method: str
) -> None:
    """And averages or adds it, as far as nothing is trimmed: a multiple of it is left."""
    dense = ("linear", "svd", "model_stock", "sce")
    given: dict[str, Any] = {} if method in dense else {"density": 1.0}
    merge_adapters([three[0], three[0]], tmp_path / "out", method=method, **given)
    alone, both = deltas(three[0]), deltas(tmp_path / "out")
    for name, exact in alone.items():
        ratio = float((both[name] * exact).sum() / exact.square().sum())
        assert ratio > 0.5
        assert torch.allclose(both[name], ratio * exact, rtol=0, atol=1e-5)
    if method == "sce":
        with pytest.raises(CheckpointError, match="1 of the adapters have no such module"):
            merge_adapters([three[0], three[2]], tmp_path / "no", method=method)


def test_threads_and_order_of_work_change_no_bit(three: list[Path], tmp_path: Path) -> None:
    for name, threads in (("one", 1), ("three", 3)):
        merge_adapters(
            three, tmp_path / name, method="dare_ties", density=0.5, rank=4, threads=threads,
            svd="randomized",
        )  # fmt: skip
    one, other = (cases.contents(tmp_path / name) for name in ("one", "three"))
    assert one == other
    assert not list(tmp_path.glob(".*partial"))


def test_embeddings_and_whole_tensors_come_along(tmp_path: Path) -> None:
    head = torch.randn(5, 4)
    for i in range(2):
        made = adapter_cases.factors({EMBED: (6, 10)}, 2, seed=i)
        adapter_cases.write(
            tmp_path / f"a{i}", made, embeddings=(EMBED,), dtype=torch.bfloat16,
            more={"lm_head.weight": head} if i else {}, modules_to_save=["lm_head"] if i else None,
        )  # fmt: skip
    made = merge_adapters([tmp_path / "a0", tmp_path / "a1"], tmp_path / "out", method="cat")
    assert made.copied == ("lm_head.weight",)
    assert not any("whole tensor" in note for note in made.notes)
    half = merge_adapters([tmp_path / "a0", tmp_path / "a1"], tmp_path / "half", weights=0.5)
    assert "weights have no effect on them" in half.notes[-1]
    adapter = read_adapter(tmp_path / "out")
    assert adapter.modules[EMBED].embedding
    assert adapter.modules[EMBED].a.dtype == "BF16"
    assert adapter.config["modules_to_save"] == ["lm_head"]
    exact = sum(deltas(tmp_path / f"a{i}")[EMBED] for i in range(2))
    assert torch.allclose(deltas(tmp_path / "out")[EMBED], exact, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_truncation_of_dense_matrices(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 30, generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 30, generator=g, dtype=torch.float64))
    sigma = 0.8 ** torch.arange(30, dtype=torch.float64)
    delta = (u * sigma) @ v.T
    for svd in ("exact", "randomized"):
        b, a = truncate(delta, Rank(8), svd, name="x")  # type: ignore[arg-type]
        assert float((delta - b @ a).norm()) <= float(sigma[8:].norm()) * (1 + 1e-5)
    b, a = truncate(torch.zeros(shape), Rank(8))
    assert torch.equal(b @ a, torch.zeros(shape, dtype=torch.float64))
    b, a = truncate_product(u * sigma, v.T.float(), Rank(energy=0.5))
    assert b.shape[1] == int((sigma.square().cumsum(0) < 0.5 * sigma.square().sum()).sum()) + 1


# PEFT.


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama on disk with two adapters a and b, and PEFT's model with both."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    import tiny_models

    root = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    model = tiny_models.llama()
    model.save_pretrained(root / "base")
    configs = [
        peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"],
                        init_lora_weights=False) for alpha in (4, 2)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = peft.get_peft_model(model, configs[0], "a")
        both.add_adapter("b", configs[1])
        both.save_pretrained(root, selected_adapters=["a", "b"])
    return root, both


@pytest.mark.peers
def test_what_peft_composes_is_the_same(llamas: tuple[Path, Any], tmp_path: Path) -> None:
    """The products B A, since factors of a product are not unique."""
    root, both = llamas
    weights = [0.7, -0.4]
    pairs: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
        ("cat", {}, "cat", {}),
        ("svd", {"rank": 4}, "svd", {"svd_rank": 4}),
        ("linear_factors", {}, "linear", {}),
        (
            "ties", {"density": 0.5, "variant": "peft", "rank": 6},
            "ties_svd", {"density": 0.5, "svd_rank": 6},
        ),
    ]  # fmt: skip
    import peft

    for method, ours, theirs, given in pairs:
        made = merge_adapters(
            [root / "a", root / "b"], tmp_path / method, weights=weights, method=method, **ours
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both.add_weighted_adapter(
                ["a", "b"], weights, f"{method}_peft", combination_type=theirs, **given
            )
            both.load_adapter(str(tmp_path / method), f"{method}_ours")
        count = 0
        for name, layer in both.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                peers = layer.get_delta_weight(f"{method}_peft")
                mine = layer.get_delta_weight(f"{method}_ours")
                scale = float(peers.abs().max())
                assert torch.allclose(mine, peers, rtol=0, atol=3e-6 * scale + 1e-7), (method, name)
                count += 1
        assert count == len(made.modules)
    # The sum, and what PEFT's linear makes of it: the difference is told.
    told = merge_adapters(
        [root / "a", root / "b"], tmp_path / "told", weights=weights, method="linear_factors"
    )
    assert told.relative > 0.5


@pytest.mark.peers
def test_an_extracted_adapter_makes_the_finetune_of_the_base(
    llamas: tuple[Path, Any], tmp_path: Path
) -> None:
    """GPT-2: matrices stored as [in, out], biases and norms that changed, a layer that did not."""
    import peft
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 67, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "h.1" in name or "ln_f" in name:
                noise = 0.1 * torch.randn(value.shape)
                if value.dim() == 2:
                    u, s, v = torch.linalg.svd(noise, full_matrices=False)
                    noise = u[:, :3] * s[:3] @ v[:3]
                value += noise
    model.save_pretrained(tmp_path / "tuned")
    made = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3)
    assert {module.rank for module in made.modules} == {3}
    assert len(made.modules) == 4
    assert made.lost == ()
    assert made.relative < 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only"
    assert config["fan_in_fan_out"] is True
    assert all("h.1" in name for name in config["target_modules"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    x = torch.arange(1, 9)[None]
    wanted = model(x).logits
    assert torch.allclose(loaded(x).logits, wanted, atol=1e-4)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "out"), "parameters": {"weight": 1.0}}],
    }
    again = execute(make_plan(parse_recipe(recipe), tmp_path / "again")).output
    whole = AutoModelForCausalLM.from_pretrained(again).eval()
    assert torch.allclose(whole(x).logits, wanted, atol=1e-4)
    recipe["base_model"] = str(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"another base.*not the weight that it was extract"):
        execute(make_plan(parse_recipe(recipe), tmp_path / "no"))


# Extraction without PEFT.


def tuned(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    base = {
        f"{Q.format(0)}.weight": torch.randn(60, 40, generator=g),
        f"{Q.format(1)}.weight": torch.randn(60, 40, generator=g),
        "model.norm.weight": torch.randn(40, generator=g),
        f"{EMBED}.weight": torch.randn(10, 40, generator=g),
        "lm_head.weight": torch.randn(10, 40, generator=g),
    }
    base = {name: value.bfloat16() for name, value in base.items()} | {"ids": torch.arange(3)}
    after = {
        name: (value.float() + 0.05 * torch.randn(value.shape, generator=g)).bfloat16()
        for name, value in base.items()
        if value.is_floating_point()
    }
    after["ids"] = base["ids"]
    after[f"{Q.format(1)}.weight"] = base[f"{Q.format(1)}.weight"]
    return (
        cases.save(tmp_path / "base", base), cases.save(tmp_path / "tuned", after, 2), base, after
    )  # fmt: skip


def test_the_error_told_is_that_of_the_written_factors(tmp_path: Path) -> None:
    base, finetuned, before, after = tuned(tmp_path)
    made = extract_adapter(
        base, finetuned, tmp_path / "out", rank=4, others="lose", dtype="bfloat16", svd="exact"
    )
    total = {name: after[name].double() - before[name].double() for name in before}
    written = deltas(tmp_path / "out")
    assert set(written) == {Q.format(0), "lm_head"}
    squares = 0.0
    for module in made.modules:
        delta = total[f"{module.name}.weight"]
        error = float((delta - written[module.name]).norm())
        assert module.error == pytest.approx(error, rel=1e-9)
        least = float(torch.linalg.svdvals(delta)[4:].norm())
        assert least <= error <= least * 1.01
        squares += error**2
    assert {lost.name for lost in made.lost} == {"model.norm.weight", f"{EMBED}.weight"}
    squares += sum(float(total[lost.name].square().sum()) for lost in made.lost)
    assert made.error == pytest.approx(math.sqrt(squares), rel=1e-9)
    assert made.change == pytest.approx(
        math.sqrt(sum(float(d.square().sum()) for d in total.values())), rel=1e-9
    )
    assert made.unchanged == 2
    rough = extract_adapter(
        base, finetuned, tmp_path / "rough", rank=4, others="lose", svd="randomized", threads=2
    )
    assert made.error * (1 - 0.01) <= rough.error <= made.error * 1.01
    kept = extract_adapter(base, finetuned, tmp_path / "kept", energy=0.8, targets=["q_proj"])
    assert kept.saved == ("lm_head.weight", f"{EMBED}.weight", "model.norm.weight")
    assert read_adapter(tmp_path / "kept").config["modules_to_save"] == [
        "lm_head", EMBED, "model.norm",
    ]  # fmt: skip
    [module] = kept.modules
    assert 0.19 < 1 - module.relative**2 - 0.6 < 0.25
    json.dumps(kept.to_json(), allow_nan=False)


def test_an_untied_head_is_not_lost_without_a_word(tmp_path: Path) -> None:
    def saved(name: str, state: dict[str, Tensor], *, tied: bool) -> Path:
        folder = cases.save(tmp_path / name, state)
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        return folder

    base = {f"{Q.format(0)}.weight": torch.zeros(4, 4), f"{EMBED}.weight": torch.eye(4)}
    after = base | {f"{Q.format(0)}.weight": torch.eye(4), "lm_head.weight": 2 * torch.eye(4)}
    below = saved("base", base, tied=True)
    untied = saved("untied", after, tied=False)
    with pytest.raises(CheckpointError, match=r"untied has a 'lm_head\.weight' of its own"):
        extract_adapter(below, untied, tmp_path / "out", rank=2)
    same = saved("same", after, tied=True)  # stored, and not used
    assert extract_adapter(below, same, tmp_path / "out", rank=2).saved == ()


def test_lora_alpha_that_is_left_out_is_that_of_peft(tmp_path: Path) -> None:
    config = of(tmp_path / "a") / "adapter_config.json"
    content = json.loads(config.read_text())
    del content["lora_alpha"]
    config.write_text(json.dumps(content))
    assert {m.scale for m in read_adapter(tmp_path / "a").modules.values()} == {8 / 2}


def test_writing_an_adapter_touches_nothing_else(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = tmp_path / ".out.cl_fast-partial"
    merge.mkdir()
    (merge / "journal.jsonl").write_text("of an unfinished merge")
    merge_adapters(three, tmp_path / "out", method="cat")
    assert (merge / "journal.jsonl").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="s3://bucket/out: an adapter is written to a folder"):
        merge_adapters(three, "s3://bucket/out", method="cat")
    assert {path.name for path in tmp_path.iterdir()} == {"out", merge.name}


def test_a_replaced_adapter_outlives_a_kill(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two names cannot be swapped in one step, the next run puts the old one back."""
    from cl_fast.merging import output

    out = tmp_path / "out"
    merge_adapters(three, out, method="cat")
    before = cases.contents(out)
    monkeypatch.setattr(output, "_exchange", lambda *_: False)
    real = Path.rename

    def dies(self: Path, target: Path) -> Path:
        if target == out:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        for name in ("recover", "discard"):  # as in a kill: nobody is left to tidy up
            patch.setattr(output.OutputFolder, name, lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            merge_adapters(three, out, overwrite=True)
    assert not out.exists()
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge_adapters(three, out)
    assert cases.contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# Bad input.


def of(folder: Path, shapes: dict[str, tuple[int, int]] = SHAPES, **more: Any) -> Path:
    return adapter_cases.write(folder, adapter_cases.factors(shapes, 2, seed=9), **more)


REFUSED: list[Any] = [
    pytest.param({"method": "tie"}, RecipeError, "did you mean 'ties'", id="method"),
    pytest.param({"method": "cat", "rank": 3}, RecipeError, "rank: has no effect", id="cat rank"),
    pytest.param({"method": "svd", "density": 0.5}, RecipeError, "density: has no", id="svd"),
    pytest.param({"method": "ties"}, RecipeError, "density: must be given", id="no density"),
    pytest.param({"method": "ties", "density": 0}, ValueError, r"in \(0, 1\]", id="density"),
    pytest.param({"method": "ties", "density": 1, "t": 1}, RecipeError, "no such", id="parameter"),
    pytest.param(
        {"method": "ties", "density": 1, "variant": "x"}, RecipeError, "variant", id="variant"
    ),
    pytest.param({"method": "sce", "weights": 0.5}, RecipeError, "weights: have no", id="sce"),
    pytest.param({"weights": [1.0]}, ValueError, "one number for each adapter, 2", id="weights"),
    pytest.param({"weights": math.nan}, ValueError, "must be finite", id="nan weight"),
    pytest.param({"rank": 0}, ValueError, "rank must be at least 1", id="rank"),
    pytest.param({"energy": 1.5}, ValueError, "energy must be in", id="energy"),
    pytest.param({"rank": 2, "energy": 0.5}, ValueError, "either rank or energy", id="both"),
    pytest.param({"max_rank": 2}, RecipeError, "without energy", id="max_rank"),
    pytest.param({"dtype": "int8"}, ValueError, "dtype must be one of", id="dtype"),
    pytest.param({"svd": "full"}, ValueError, "svd must be one of", id="svd kind"),
]


@pytest.mark.parametrize(("given", "error", "words"), REFUSED)
def test_settings_that_are_refused(
    three: list[Path], tmp_path: Path, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        merge_adapters(three[:2], tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_fit_one_another(three: list[Path], tmp_path: Path) -> None:
    def refuse(other: Path, words: str, **more: Any) -> None:
        with pytest.raises(CheckpointError, match=words):
            merge_adapters([three[0], other], tmp_path / "out", **more)

    refuse(of(tmp_path / "a", {Q.format(0): (24, 18)}), "for different bases")
    refuse(of(tmp_path / "b"), r"the ranks \[2, 3\]", method="linear_factors")
    refuse(of(tmp_path / "c", bias="all"), "has trained biases")
    head = {"lm_head.weight": torch.ones(2)}
    one = of(tmp_path / "d", more=head, modules_to_save=["lm_head"])
    two = of(tmp_path / "e", more={"lm_head.weight": torch.zeros(2)}, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match=r"both bring their own 'lm_head\.weight'"):
        merge_adapters([one, two], tmp_path / "out")
    made = adapter_cases.factors(SHAPES, 2)
    made[Q.format(1)][1][0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        merge_adapters([three[0], adapter_cases.write(tmp_path / "f", made)], tmp_path / "out")
    with pytest.raises(OutputError, match="touches the adapter"):
        merge_adapters(three, three[0] / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge_adapters(three, tmp_path / "full")
    merge_adapters(three, tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "x").exists()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_finetunes_that_cannot_be_extracted(tmp_path: Path) -> None:
    base, finetuned, before, after = tuned(tmp_path)

    def refuse(other: Path, error: type[Exception], words: str, **more: Any) -> None:
        with pytest.raises(error, match=words):
            extract_adapter(base, other, tmp_path / "out", **({"rank": 2} | more))

    refuse(finetuned, ValueError, "either rank or energy", rank=None)
    refuse(finetuned, ValueError, "'k_proj' is no linear layer", targets=["k_proj"])
    refuse(finetuned, ValueError, "is an embedding", targets=["embed_tokens"])
    refuse(finetuned, ValueError, "needs rank or max_rank", rank=None, energy=0.5, svd="randomized")
    refuse(base, CheckpointError, "nothing to extract")
    refuse(tmp_path / "nowhere", CheckpointError, "finetuned: ")
    name = f"{EMBED}.weight"
    resized = cases.save(tmp_path / "resized", after | {name: torch.ones(11, 40).bfloat16()})
    refuse(resized, CheckpointError, "vocabulary was resized")
    rest = {key: value for key, value in after.items() if key != name}
    refuse(cases.save(tmp_path / "less", rest), CheckpointError, "has no tensor")
    bad = after[f"{Q.format(0)}.weight"].clone()
    bad[0, 0] = math.nan
    broken = cases.save(tmp_path / "nan", after | {f"{Q.format(0)}.weight": bad})
    refuse(broken, NonFiniteError, "holds NaN")
    other = cases.save(tmp_path / "ids", after | {"ids": torch.arange(3) + 1})
    refuse(other, CheckpointError, "'ids' holds integers or booleans that differ")
    with pytest.raises(OutputError, match="touches the input"):
        extract_adapter(base, finetuned, finetuned, rank=2)
    assert not (tmp_path / "out").exists()
    assert before.keys() == after.keys()


def test_the_command(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, finetuned, _, _ = tuned(tmp_path)
    out, report = tmp_path / "out", tmp_path / "report.json"
    assert main(
        ["adapter", "extract", str(base), str(finetuned), "--out", str(out), "--rank", "2",
         "--json", str(report), "--others", "lose"]
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "lost: model.norm.weight" in said
    assert "rank 2 on 2 modules" in said
    assert "largest losses" not in said  # all of them are listed
    assert json.loads(report.read_text())["unchanged"] == 2
    assert main(["adapter", "info", str(out), "--base", str(base)]) == 0
    said = capsys.readouterr().out
    assert f"fits     {base}" in said
    assert "linear [60, 40], rank 2, F32" in said
    assert main(["adapter", "info", str(three[0]), "--base", str(base)]) == 1
    assert "the adapter is for another base" in capsys.readouterr().err
    words = ["adapter", "merge", *map(str, three), "--out", str(tmp_path / "m")]
    assert main([*words, "--method", "ties", "--density", "0.5", "--weights", "1", "2", "3"]) == 0
    assert "relative error" in capsys.readouterr().out
    most = [*words[:-1], str(tmp_path / "most"), "--rank", "99", "--weights", "1"]
    assert main(most) == 0
    assert re.search(r"^note: rank: 99 asked, \d+ suffice$", capsys.readouterr().out, re.M)
    assert main([*words, "--method", "cat"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_extract_tells_which_losses_it_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = [SimpleNamespace(name=f"m{i}", rank=2, relative=i / 10) for i in range(7)]
    made = SimpleNamespace(path=tmp_path, lost=(), modules=modules, saved=(), relative=0.5)
    monkeypatch.setattr("cl_fast.merging.extracting.extract_adapter", lambda *_, **__: made)
    assert main(["adapter", "extract", "b", "f", "--out", str(tmp_path), "--rank", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "the 5 largest losses of 7 modules:"
    assert [line.split()[-1] for line in said[1:6]] == ["m6", "m5", "m4", "m3", "m2"]
