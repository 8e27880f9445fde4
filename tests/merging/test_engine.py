"""What a finished merge is: the right bytes, whatever carried it out, complete and described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest
import torch
from tiny_checkpoints import write_file

from cl_fast import backends
from cl_fast.backends import native
from cl_fast.errors import OutputError
from cl_fast.merging import execute, load_recipe, make_plan, parse_recipe
from cl_fast.merging.checksum import combine, crc64, crc64_eager, crc64_of_file
from cl_fast.ops.combining import combine_reference, model_thresholds
from cl_fast.ops.streams import stream_key


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.family(tmp_path_factory.mktemp("family"))


def reference(root: Path, method: str) -> dict[str, torch.Tensor]:
    """The merge in memory, from what safetensors reads, by the eager definition."""
    plan = cases.plan(root, root / "none", method)
    states = {name: cases.load(root / name) for name in ("base", "one", "two", "three")}
    models = [states[name] for name in ("one", "two", "three")]
    codes = None
    if plan.model_keep:
        first = plan.tensors[0]
        names = [tensor.name for tensor in plan.tensors if tensor.kind == "combine"]
        codes = model_thresholds(
            [states["base"][name] for name in names],
            [[model[name] for model in models] for name in names],
            policy=first.policy,
            density=[term.density for term in first.terms],
        )
    merged = {}
    for tensor in plan.tensors:
        if tensor.kind == "copy":
            merged[tensor.name] = models[0][tensor.name]
            continue
        merged[tensor.name] = combine_reference(
            states["base"][tensor.name] if tensor.policy.difference else None,
            [model[tensor.name] for model in models],
            weights=[1.0, 0.5, 0.25],
            policy=tensor.policy,
            density=[term.density for term in tensor.terms],
            gamma=[term.gamma for term in tensor.terms],
            epsilon=[term.epsilon for term in tensor.terms],
            keys=[stream_key(0, name, tensor.name) for name in ("one", "two", "three")],
            thresholds=codes,
            lam=tensor.lam,
        )
    return merged


@pytest.mark.parametrize("method", cases.METHODS)
def test_every_method_writes_what_its_definition_says(
    root: Path, tmp_path: Path, method: str, backend: str
) -> None:
    result = execute(cases.plan(root, tmp_path / "out", method), backend=backend)
    assert (result.backend, result.resumed) == (backend, 0)
    expected = reference(root, method)
    merged = cases.load(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        assert torch.equal(value, expected[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "method", ["ties", "ties paper", "dare_linear", "breadcrumbs", "della", "della_linear"]
)
def test_nothing_but_the_recipe_and_the_inputs_decides_the_bytes(
    root: Path, tmp_path: Path, method: str
) -> None:
    """Threads, memory (and so tiles), way of reading, shard size, executor, fsync."""
    ways: list[dict[str, Any]] = [{"backend": "eager"}, {"backend": "eager", "shard": 10_000_000}]
    if native.load() is not None:
        ways += [
            {"backend": "native", **way}
            for way in (
                {"threads": 1},
                {"threads": 5, "shard": 150_000},
                {"memory": 16 << 20, "threads": 3},
                {"io": "pread"},
                {"io": "direct", "shard": 10_000_000},
                {"fsync": False, "reread": True},
            )
        ]
    digests, seen = set(), []
    for i, way in enumerate(ways):
        shard = way.pop("shard", 300_000)
        output = tmp_path / f"out{i}"
        digests.add(execute(cases.plan(root, output, method, shard=shard), **way).digest)
        seen.append(cases.raw(output))
    assert len(digests) == 1
    assert all(one == seen[0] for one in seen)


def test_two_runs_write_the_same_folder(root: Path, tmp_path: Path, backend: str) -> None:
    for parent in ("a", "b"):
        execute(cases.plan(root, tmp_path / parent / "out"), backend=backend)
    assert cases.contents(tmp_path / "a" / "out") == cases.contents(tmp_path / "b" / "out")


def test_the_folder_is_a_checkpoint_with_everything_beside_the_weights(
    root: Path, tmp_path: Path, backend: str
) -> None:
    plan = cases.plan(root, tmp_path / "out")
    execute(plan, backend=backend)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(plan.shards) > 1
    assert names == {
        *(shard.filename for shard in plan.shards),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "cl_fast_merge.json",
        "README.md",
    }
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "base" / name).read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == cases.load(tmp_path / "out").keys()
    assert set(index["weight_map"].values()) == {shard.filename for shard in plan.shards}


def test_one_file_needs_no_index(root: Path, tmp_path: Path, backend: str) -> None:
    execute(cases.plan(root, tmp_path / "out", shard=10_000_000), backend=backend)
    weights = sorted(path.name for path in (tmp_path / "out").glob("model*"))
    assert weights == ["model.safetensors"]


def test_manifest_names_recipe_policy_seed_inputs_and_checksums(
    root: Path, tmp_path: Path, backend: str
) -> None:
    plan = cases.plan(root, tmp_path / "out", "dare_linear", seed=42)
    result = execute(plan, backend=backend)
    manifest = json.loads((tmp_path / "out" / "cl_fast_merge.json").read_text())
    assert manifest["seed"] == 42
    assert manifest["streams"] == ["one", "two", "three"]
    assert manifest["policy"]["sparsify"] == "drop"
    assert manifest["recipe"]["merge_method"] == "dare_linear"
    assert manifest["fingerprint"] == plan.fingerprint
    assert manifest["digest"] == result.digest
    assert [entry["role"] for entry in manifest["inputs"]] == ["base", "model", "model", "model"]
    assert [len(entry["files"]) for entry in manifest["inputs"]] == [2, 1, 2, 3]
    for name, data in cases.raw(tmp_path / "out").items():
        entry = manifest["tensors"][name]
        assert entry["crc64"] == f"{crc64_eager(data):016x}"
        for folder, crc in zip(("base", "one", "two", "three"), entry["sources"], strict=True):
            assert crc == f"{crc64_eager(cases.raw(root / folder)[name]):016x}"


def test_global_thresholds_are_recorded(root: Path, tmp_path: Path, backend: str) -> None:
    execute(cases.plan(root, tmp_path / "out", "ties paper"), backend=backend)
    manifest = json.loads((tmp_path / "out" / "cl_fast_merge.json").read_text())
    assert len(manifest["thresholds"]) == 3
    assert all(code > 0 for code in manifest["thresholds"])


def test_a_model_with_density_one_is_not_trimmed_globally(
    root: Path, tmp_path: Path, backend: str
) -> None:
    content = cases.recipe(root, "ties paper")
    content["models"][1]["parameters"]["density"] = 1.0
    outputs = []
    for name in ("eager", backend):
        plan = make_plan(parse_recipe(content), tmp_path / f"out-{name}-{len(outputs)}")
        execute(plan, backend=name)
        outputs.append(cases.raw(plan.output))
    assert outputs[0] == outputs[1]


def test_card_is_one_that_the_hub_reads(root: Path, tmp_path: Path, backend: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    execute(cases.plan(root, tmp_path / "out", "dare_ties"), backend=backend)
    card = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["merge", "cl_fast", "dare_ties"]
    assert card.data.library_name == "transformers"
    assert "density: 0.3" in card.text
    assert "seed 0" in card.text
    assert card.text.count("\n| model |") == 3


def test_progress_only_grows_and_ends_at_its_total(
    root: Path, tmp_path: Path, backend: str
) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    execute(
        cases.plan(root, tmp_path / "out", "ties paper"),
        backend=backend,
        reread=True,
        progress=lambda phase, done, total: seen.setdefault(phase, []).append((done, total)),
    )
    assert list(seen) == ["thresholds", "merge", "verify"]
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] == steps[-1][1] > 0


def test_an_empty_folder_is_as_good_as_none(root: Path, tmp_path: Path, backend: str) -> None:
    (tmp_path / "out").mkdir()
    execute(cases.plan(root, tmp_path / "out"), backend=backend)
    assert (tmp_path / "out" / "config.json").exists()


def test_parents_are_made(root: Path, tmp_path: Path, backend: str) -> None:
    execute(cases.plan(root, tmp_path / "a" / "b" / "out"), backend=backend)
    assert (tmp_path / "a" / "b" / "out" / "config.json").exists()


def test_overwrite_replaces_the_whole_folder(root: Path, tmp_path: Path, backend: str) -> None:
    execute(cases.plan(root, tmp_path / "out", shard=100_000), backend=backend)
    (tmp_path / "out" / "mine.txt").write_text("old")
    execute(cases.plan(root, tmp_path / "out", "linear"), backend=backend, overwrite=True)
    execute(cases.plan(root, tmp_path / "b" / "out", "linear"), backend=backend)
    assert cases.contents(tmp_path / "out") == cases.contents(tmp_path / "b" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out"]


def test_mixed_types_scalars_and_empty_tensors(tmp_path: Path, backend: str) -> None:
    """Each model stores what it likes; the output type is asked for."""
    states = {
        "base": torch.float16,
        "one": torch.bfloat16,
        "two": torch.float32,
        "three": torch.float8_e4m3fn,
    }
    loaded = {}
    for seed, (name, dtype) in enumerate(states.items()):
        generator = torch.Generator().manual_seed(seed)
        loaded[name] = {
            "a": torch.randn(70_001, generator=generator).to(dtype),
            "scalar": torch.randn((), generator=generator).to(dtype),
            "nothing": torch.zeros(0, 5, dtype=dtype),
            "flag": torch.tensor([True, False]),
        }
        cases.save(tmp_path / name, loaded[name])
    content = cases.recipe(tmp_path, "task_arithmetic", out_dtype="float32")
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    execute(plan, backend=backend)
    merged = cases.load(tmp_path / "out")
    assert merged["nothing"].shape == (0, 5)
    assert torch.equal(merged["flag"], torch.tensor([True, False]))
    for name in ("a", "scalar"):
        expected = combine_reference(
            loaded["base"][name],
            [loaded[model][name] for model in ("one", "two", "three")],
            weights=[1.0, 0.5, 0.25],
            policy=plan.tensors[0].policy,
            lam=0.7,
            out_dtype=torch.float32,
        )
        assert torch.equal(merged[name], expected), name


def test_transformers_loads_and_generates(tmp_path: Path, backend: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    states = []
    for i, name in enumerate(("base", "one", "two")):
        torch.manual_seed(i)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="8KB")
        states.append({name: value.double() for name, value in model.state_dict().items()})
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels:\n"
        f"- {{model: {tmp_path}/one, parameters: {{weight: 0.5}}}}\n"
        f"- {{model: {tmp_path}/two, parameters: {{weight: 0.25}}}}\n"
    )
    plan = make_plan(load_recipe(recipe), tmp_path / "out", out_shard_size=8_000)
    execute(plan, backend=backend)
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in merged.state_dict().items():
        base, one, two = (state[name] for state in states)
        exact = base + 0.5 * (one - base) + 0.25 * (two - base)
        assert value.dtype == torch.bfloat16
        # Half a spacing of bfloat16 at the result, and a few of float32 at the largest operand.
        spacing = torch.exp2(torch.frexp(exact).exponent.double() - 8)
        operand = torch.maximum(torch.maximum(one.abs(), two.abs()), base.abs())
        bound = 0.5 * spacing + 4 * 2.0**-24 * operand
        assert ((value.double() - exact).abs() <= bound).all(), name
    prompt = torch.tensor([[1, 2, 3]])
    assert merged.generate(prompt, max_new_tokens=5, do_sample=False).shape == (1, 8)


def test_threads_and_other_arguments_are_checked(root: Path, tmp_path: Path) -> None:
    plan = cases.plan(root, tmp_path / "out")
    for wrong, words in (
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"memory": 100}, "memory must be at least"),
        ({"io": "fast"}, "io must be one of auto, mmap, pread, direct; got 'fast'"),
        ({"nan": "keep"}, "nan must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"resume": True, "restart": True}, "contradict"),
    ):
        with pytest.raises(ValueError, match=words):
            execute(plan, **wrong)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_eager_reference_says_what_it_cannot_keep(root: Path, tmp_path: Path) -> None:
    plan = cases.plan(root, tmp_path / "out")
    with pytest.raises(OutputError, match="--io mmap needs the C\\+\\+ core"):
        execute(plan, backend="eager", io="mmap")
    big = write_file(
        tmp_path / "in" / "big.safetensors", {"a": ("BF16", (30_000_000,))}, sparse=True
    )
    content = {"merge_method": "linear", "models": [{"model": str(big)}]}
    content["models"][0]["parameters"] = {"weight": 1.0}  # type: ignore[index]
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    with pytest.raises(OutputError, match="holds whole tensors: a needs about"):
        execute(plan, backend="eager", memory=16 << 20)
    assert not (tmp_path / "out").exists()


def test_a_policy_that_the_core_has_not(root: Path, tmp_path: Path) -> None:
    """Told, and served by the eager reference; `--backend native` refuses."""
    content = cases.recipe(root, "ties paper")
    content["parameters"] |= {"rescale": True, "rescale_by": "l1"}
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    backends._said.clear()
    with pytest.warns(RuntimeWarning, match="served by the eager reference only"):
        assert execute(plan).backend == "eager"
    if native.load() is not None:
        plan = make_plan(parse_recipe(content), tmp_path / "again")
        with pytest.raises(OutputError, match="'native' is not available: rescale_by: l1"):
            execute(plan, backend="native")


@pytest.mark.parametrize("n", [0, 1, 9, 4095, 4096, 16_391, 600_001, 5_000_011])
def test_checksums_agree(n: int, tmp_path: Path) -> None:
    """The published check value, and the eager lanes against a bit-by-bit definition by pieces."""
    assert crc64_eager(b"123456789") == 0xAE8B14860A799888
    data = bytes(torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    whole = crc64_eager(data)
    assert crc64(data) == whole
    cut = n // 3
    assert crc64_eager(data[cut:], crc64_eager(data[:cut])) == whole
    assert combine(crc64_eager(data[:cut]), crc64_eager(data[cut:]), n - cut) == whole
    path = tmp_path / "data"
    path.write_bytes(b"xy" + data)
    assert crc64_of_file(path, 2, n) == whole
    with pytest.raises(EOFError):
        crc64_of_file(path, 3, n or 1)
