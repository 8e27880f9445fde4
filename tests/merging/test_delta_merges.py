"""Packed deltas on their base and in merges: the bits of the dense merge, or a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import delta_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cl_fast.checkpoints.deltas import read_delta
from cl_fast.cli import main
from cl_fast.errors import (
    CheckpointError,
    ClFastError,
    Interrupted,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from cl_fast.merging import describe, execute, make_plan, parse_recipe
from cl_fast.merging.deltas import apply_delta, pack_delta, plan_delta, unpack_delta
from cl_fast.merging.verify import verify

torch.set_num_threads(1)

UP = "model.layers.0.mlp.up_proj.weight"
BACKENDS = ("native", "eager")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family, and math.delta, code.delta and law.delta (drop 0.9, seed 7)."""
    root = cases.family(tmp_path_factory.mktemp("deltas"))
    for name in (*cases.MODELS, "renumbered"):
        pack_delta(root / "base", root / name, root / f"{name}.delta.safetensors",
                   drop_rate=0.9, seed=7)  # fmt: skip
    return root


def _is_packed(model: str) -> bool:
    return ".delta." in Path(model).name or Path(model).name == "folder"


def recipe(root: Path, method: str, *models: str, **changes: Any) -> dict[str, Any]:
    """A recipe over models (weight 1/k), with `own` parameters of the dense ones and the packed."""
    own, packed = changes.pop("own", {}), changes.pop("packed", {})
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [
            {
                "model": str(root / model),
                "parameters": {"weight": 1 / k, **(packed if _is_packed(model) else own)},
            }
            for k, model in enumerate(models, 1)
        ],
        **changes,
    }


def run(content: dict[str, Any], output: Path, *, shard: int = 5 << 30, **options: Any) -> Path:
    plan = make_plan(parse_recipe(content), output, out_shard_size=shard)
    return execute(plan, fsync=False, **options).output


def packed(*names: str) -> list[str]:
    return [f"{name}.delta.safetensors" for name in names]


@pytest.mark.parametrize("rescale", ["l1", "keep_rate", "none"])
def test_pack_and_apply_is_dare_bit_for_bit(root: Path, tmp_path: Path, rescale: Any) -> None:
    """The mask, the factor and every rounding, of all types, and -0 where nothing changed."""
    words = {"rescale": False} if rescale == "none" else {"rescale_by": rescale}
    content = recipe(root, "dare_linear", "math", own={"density": 1 - 0.9}, seed=7,
                     parameters=words)  # fmt: skip
    dense = run(content, tmp_path / "dense")
    path = tmp_path / "m.safetensors"
    pack_delta(root / "base", root / "math", path, drop_rate=0.9, seed=7, rescale=rescale)
    for backend in BACKENDS:
        applied = apply_delta(root / "base", path, tmp_path / backend, backend=backend, fsync=False)
        cases.same_bits(dense, applied.output)
        assert (applied.output / "config.json").read_bytes() == (
            root / "base" / "config.json"
        ).read_bytes()


@settings(max_examples=12, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), max_size=3),
    dtypes=st.tuples(*[st.sampled_from((torch.bfloat16, torch.float16, torch.float32))] * 2),
    drop=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**64 - 1),
    backend=st.sampled_from(BACKENDS),
)
def test_apply_is_the_formula(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    drop: float,
    seed: int,
    backend: str,
) -> None:
    """base + keep * r (x - base), from the documented stream, of any shape and two types."""
    folder = tmp_path_factory.mktemp("formula")
    draw = torch.Generator().manual_seed(seed % 1000)
    base = torch.randn(shape, generator=draw).to(dtypes[0])
    tuned = (base.float() + 0.1 * torch.randn(shape, generator=draw)).to(dtypes[1])
    other = torch.randn(3, generator=draw)
    save_file({"w": base, "v": other}, folder / "base.safetensors")
    save_file({"w": tuned, "v": other + 1}, folder / "tuned.safetensors")
    delta = pack_delta(folder / "base.safetensors", folder / "tuned.safetensors",
                       folder / "d.safetensors", drop_rate=drop, seed=seed, stream="s",
                       rescale="keep_rate", backend=backend)  # fmt: skip
    out = apply_delta(folder / "base.safetensors", folder / "d.safetensors", folder / "out",
                      backend=backend, fsync=False).output  # fmt: skip
    key = cases.Reader(folder / "d.safetensors").key("w")
    keep = torch.zeros(base.numel(), dtype=torch.bool)
    keep[cases.kept(key, base.numel(), delta.threshold)] = True
    d = tuned.float().reshape(-1) - base.float().reshape(-1)
    r = torch.tensor(2.0**32 / delta.threshold).float()
    wanted = base.float().reshape(-1) + torch.where(keep, d, 0.0) * r
    assert torch.equal(cases.load(out)["w"].reshape(-1), wanted.to(dtypes[0]))
    assert not any(path.name.startswith(".") for path in folder.iterdir())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "task_arithmetic"])
def test_a_merge_of_packed_deltas_is_the_dense_merge(
    root: Path, tmp_path: Path, method: str
) -> None:
    """Three of them, shards, threads, both backends; dropped when packed or in the merge."""
    dense = "dare_linear" if method == "task_arithmetic" else method
    content = recipe(root, dense, *cases.MODELS, own={"density": 1 - 0.9}, seed=7)
    wanted = run(content, tmp_path / "dense")
    content = recipe(root, method, *packed(*cases.MODELS))
    for number, options in enumerate(
        ({"threads": 1}, {"threads": 3, "shard": 100_000}, {"backend": "eager"}, {"io": "pread"})
    ):
        cases.same_bits(wanted, run(content, tmp_path / str(number), **options))


def test_packed_beside_dense_in_dare(root: Path, tmp_path: Path) -> None:
    """One dropped in the merge, one when it was packed; the order is the recipe's."""
    wanted = run(
        recipe(root, "dare_ties", "math", "code", own={"density": 1 - 0.9}, seed=7),
        tmp_path / "dense",
    )
    content = recipe(root, "dare_ties", "math.delta.safetensors", "code",
                     own={"density": 1 - 0.9}, seed=7)  # fmt: skip
    for backend in BACKENDS:
        cases.same_bits(wanted, run(content, tmp_path / backend, backend=backend))


def as_dense(root: Path, name: str, folder: Path) -> Path:
    """Kept values on the base, as a checkpoint: a delta with r = 1."""
    reader, base = cases.Reader(root / f"{name}.delta.safetensors"), cases.load(root / "base")
    tuned = cases.load(root / name)
    for tensor, entry in reader.tensors.items():
        if entry["kind"] != "kept":
            continue
        flat = base[tensor].reshape(-1)
        which = cases.kept(reader.key(tensor), flat.numel(), int(reader.metadata["threshold"]))
        flat[which] = tuned[tensor].reshape(-1)[which]
    return cases.save(folder, base)


@pytest.mark.parametrize(
    ("method", "own", "words"),
    [
        ("ties", {}, {}),
        ("ties", {}, {"variant": "peft"}),
        ("ties", {}, {"variant": "paper"}),
        ("ties", {}, {"rescale": True}),
        ("ties", {}, {"elect": "frequency"}),
        ("breadcrumbs", {"gamma": 0.01}, {}),
        ("breadcrumbs_ties", {"gamma": 0.01}, {}),
        ("della", {"epsilon": 0.05}, {}),
        ("della_linear", {"epsilon": 0.05}, {}),
    ],
)
def test_where_magnitudes_count_a_packed_delta_is_the_base_with_its_values(
    root: Path, tmp_path: Path, method: str, own: dict[str, Any], words: dict[str, Any]
) -> None:
    """Trimmed by magnitude, zeros and all: as the dense model of the same values."""
    for name in cases.MODELS[:2]:
        path = tmp_path / f"{name}.delta.safetensors"
        pack_delta(root / "base", root / name, path, drop_rate=0.9, seed=7, rescale="none")
        as_dense(root, name, tmp_path / f"{name}.dense")
    own = {"density": 0.07, **own}
    words = {"seed": 3} if method.startswith("della") else {"parameters": words}
    # The streams of della are keyed by the last component of the path: call both alike.
    models = {}
    for kind in ("dense", "packed"):
        (tmp_path / kind).mkdir()
        models[kind] = [str(tmp_path / kind / name) for name in cases.MODELS[:2]]
    for name in cases.MODELS[:2]:
        (tmp_path / f"{name}.dense").rename(tmp_path / "dense" / name)
        (tmp_path / "packed" / name).mkdir()
        (tmp_path / f"{name}.delta.safetensors").rename(
            tmp_path / "packed" / name / "delta.safetensors"
        )
    wanted = run(recipe(root, method, *models["dense"], own=own, **words), tmp_path / "wanted")
    content = recipe(root, method, *models["packed"], own=own, **words)
    for number, options in enumerate(
        ({"threads": 1}, {"threads": 3, "io": "pread"}, {"backend": "eager"})
    ):
        cases.same_bits(wanted, run(content, tmp_path / str(number), **options))


@pytest.mark.parametrize("first", ["packed", "dense"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "della_linear"])
def test_a_whole_packed_delta_beside_models_that_are_sparsified(
    root: Path, tmp_path: Path, method: str, first: str
) -> None:
    """At density 1 it is what it keeps: as the dense model of the same values at density 1."""
    (tmp_path / "math").mkdir()
    pack_delta(root / "base", root / "math", tmp_path / "math" / "delta.safetensors",
               drop_rate=0.9, seed=7, rescale="none")  # fmt: skip
    as_dense(root, "math", tmp_path / "dense" / "math")

    def content(whole: Path) -> dict[str, Any]:
        models = [
            {"model": str(whole), "parameters": {"weight": 0.7, "density": 1.0}},
            {"model": str(root / "code"), "parameters": {"weight": 0.4, "density": 0.3}},
        ]
        models = models if first == "packed" else models[::-1]
        return {"merge_method": method, "base_model": str(root / "base"), "models": models}

    wanted = run(content(tmp_path / "dense" / "math"), tmp_path / "wanted")
    for backend in BACKENDS:
        made = run(content(tmp_path / "math"), tmp_path / backend, backend=backend)
        cases.same_bits(wanted, made)


@pytest.mark.parametrize(
    ("method", "own", "words"),
    [
        ("ties", {}, {}),
        ("ties", {}, {"variant": "peft"}),
        ("ties", {}, {"rescale": True}),
        ("breadcrumbs_ties", {"gamma": 0.01}, {"rescale": True}),
        ("della", {"epsilon": 0.05}, {}),
    ],
)
def test_the_factor_multiplies_the_weight(
    root: Path, tmp_path: Path, method: str, own: dict[str, Any], words: dict[str, Any]
) -> None:
    """With r of each tensor: the core and the reference give the same bits."""
    content = recipe(root, method, *packed("math", "code"), packed={"density": 0.07, **own},
                     parameters=words)  # fmt: skip
    native = run(content, tmp_path / "native", backend="native")
    cases.same_bits(native, run(content, tmp_path / "eager", backend="eager"))


def test_a_delta_on_a_base_of_its_own_is_a_model(root: Path, tmp_path: Path) -> None:
    """base+delta where models themselves are combined, or on another base: base + y in float32."""
    delta = read_delta(root / "math.delta.safetensors")
    base, tuned = cases.load(root / "base"), cases.load(root / "math")
    code, pair = cases.load(root / "code"), f"{root}/base+{root}/math.delta.safetensors"
    models = {}
    for name in cases.SHAPES:
        tensor = delta.tensors[name]
        keep = torch.zeros(tensor.numel, dtype=torch.bool)
        keep[cases.kept(tensor.key, tensor.numel, delta.threshold)] = True
        d = (tuned[name].float() - base[name].float()) * torch.tensor(tensor.factor).float()
        models[name] = base[name].float() + torch.where(keep.reshape(d.shape), d, 0.0)
    content: dict[str, Any] = {
        "merge_method": "linear",
        "models": [
            {"model": pair, "parameters": {"weight": 0.25}},
            {"model": str(root / "code"), "parameters": {"weight": 0.75}},
        ],
    }
    for number, options in enumerate(
        ({"threads": 2}, {"backend": "eager"}, {"io": "pread", "shard": 100_000})
    ):
        out = run(content, tmp_path / str(number), **options)
        for name, model in models.items():
            wanted = model * 0.25 + code[name].float() * 0.75
            assert torch.equal(cases.load(out)[name], wanted.to(base[name].dtype)), name
        assert verify(out, sample=None, threads=1).ok
    out = run({"merge_method": "passthrough", "models": [{"model": pair}]}, tmp_path / "one")
    cases.same_bits(out, apply_delta(root / "base", root / "math.delta.safetensors",
                                     tmp_path / "applied", fsync=False).output)  # fmt: skip
    # On another base: its delta there is (base + y) - code.
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "code"),
        "models": [{"model": pair, "parameters": {"weight": 0.5}}],
    }
    for backend in BACKENDS:
        out = run(content, tmp_path / f"other {backend}", backend=backend)
        for name, model in models.items():
            wanted = code[name].float() + (model - code[name].float()) * 0.5
            assert torch.equal(cases.load(out)[name], wanted.to(base[name].dtype)), name
    # All of the base is compared beforehand, since the merge does not.
    cases.save(tmp_path / "inputs", {**base, UP: base[UP] + 1})
    content["models"][0]["model"] = f"{tmp_path}/inputs+{root}/math.delta.safetensors"
    with pytest.raises(CheckpointError, match=f"another base: tensor '{re.escape(UP)}'"):
        run(content, tmp_path / "no")


def test_rules_take_packed_deltas(root: Path, tmp_path: Path) -> None:
    """slerp of base+delta is that of the dense model in float32; model_stock of parts, with r."""
    pair = f"{root}/base+{root}/math.delta.safetensors"
    unpack_delta(root / "base", root / "math.delta.safetensors", tmp_path / "y.safetensors")
    dense, base = load_file(tmp_path / "y.safetensors"), cases.load(root / "base")
    cases.save(
        tmp_path / "dense",
        {n: base[n].float() + dense[n] if n in dense else t + 0.0 if t.is_floating_point() else t
         for n, t in base.items()},
    )  # fmt: skip

    def slerp(model: str) -> dict[str, Any]:
        return {
            "merge_method": "slerp",
            "base_model": str(root / "code"),
            "models": [{"model": str(root / "code")}, {"model": model}],
            "parameters": {"t": 0.3},
        }

    wanted = run(slerp(str(tmp_path / "dense")), tmp_path / "wanted")
    for backend in BACKENDS:
        cases.same_bits(wanted, run(slerp(pair), tmp_path / f"slerp {backend}", backend=backend))
    content = recipe(root, "model_stock", *packed("math", "code"))
    for entry in content["models"]:
        del entry["parameters"]
    written = [run(content, tmp_path / f"stock {b}", backend=b) for b in BACKENDS]
    cases.same_bits(*written)
    assert not torch.equal(cases.load(written[0])[UP], base[UP])


def test_a_comparison_sees_base_and_delta(root: Path, tmp_path: Path) -> None:
    """cl-fast diff: norms are those of the dense delta; damaged values and bases are refused."""
    from cl_fast.merging.diff import compare

    path = unpack_delta(root / "base", root / "math.delta.safetensors", tmp_path / "y.safetensors")
    dense = load_file(path)
    for backend in BACKENDS:
        found = compare(root / "base", [root / "math.delta.safetensors"], backend=backend)
        norms = {t.name: t.statistics.models[0].l2 for t in found.tensors}
        for name, tensor in dense.items():
            assert norms[name] == pytest.approx(float(tensor.double().norm()), rel=1e-4)
    with pytest.raises(CheckpointError, match="is for another base"):
        compare(root / "code", [root / "math.delta.safetensors"])


def test_a_packed_delta_of_another_type_with_rows_longer_than_a_tile(tmp_path: Path) -> None:
    """What ranks a row expands more than the tile while another's values wait to be placed."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(1, 300_000, generator=draw).bfloat16()
    cases.save(tmp_path / "base", {"w": base})
    models = []
    for name, dtype, density in (("one", torch.bfloat16, 1.0), ("two", torch.float32, 0.4)):
        tuned = (base.float() + 0.02 * torch.randn(base.shape, generator=draw)).to(dtype)
        cases.save(tmp_path / name, {"w": tuned})
        path = tmp_path / f"{name}.delta.safetensors"
        pack_delta(tmp_path / "base", tmp_path / name, path, drop_rate=0.1)
        models.append({"model": str(path), "parameters": {"weight": 0.5, "density": density}})
    content = {"merge_method": "della_linear", "base_model": str(tmp_path / "base"),
               "models": models, "parameters": {"variant": "paper"}}  # fmt: skip
    native, eager = (run(content, tmp_path / backend, backend=backend) for backend in BACKENDS)
    cases.same_bits(native, eager)


def test_types_may_differ(root: Path, tmp_path: Path) -> None:
    """A float32 finetuned model on a bfloat16 base, and fp8 values, in sums and in trims."""
    draw = torch.Generator().manual_seed(5)
    base = torch.randn(300, 300, generator=draw).bfloat16()
    save_file({"w": base}, tmp_path / "base.safetensors")
    for dtype in (torch.float32, torch.float8_e4m3fn):
        tuned = (base.float() + 0.1 * torch.randn(300, 300, generator=draw)).to(dtype)
        save_file({"w": tuned}, tmp_path / "tuned.safetensors")
        pack_delta(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors",
                   tmp_path / "d.safetensors", drop_rate=0.6, overwrite=True)  # fmt: skip
        for method, own in (("task_arithmetic", {}), ("ties", {"density": 0.2})):
            content = {
                "merge_method": method,
                "base_model": str(tmp_path / "base.safetensors"),
                "models": [{"model": str(tmp_path / "d.safetensors"),
                            "parameters": {"weight": 0.5, **own}}],
            }  # fmt: skip
            written = [
                run(content, tmp_path / f"{dtype}{method}{backend}", backend=backend)
                for backend in BACKENDS
            ]
            cases.same_bits(*written)


def test_integers_that_changed_come_along(root: Path, tmp_path: Path) -> None:
    out = apply_delta(root / "base", root / "renumbered.delta.safetensors", tmp_path / "out",
                      fsync=False).output  # fmt: skip
    applied, tuned = cases.load(out), cases.load(root / "renumbered")
    assert torch.equal(applied[cases.CHANGED], tuned[cases.CHANGED])
    assert verify(out, sample=None).ok
    content = recipe(root, "task_arithmetic", *packed("renumbered", "code"))
    with pytest.raises(CheckpointError, match=f"tensor {cases.CHANGED} is not of a floating type"):
        run(content, tmp_path / "two")


def test_what_travels_beside_the_weights(root: Path, tmp_path: Path) -> None:
    """A folder's config and tokenizer are applied with it; a file leaves the base's."""
    spoken = cases.save(tmp_path / "spoken", cases.tuned_state(cases.base_state(), 4), "u")
    pack_delta(root / "base", spoken, tmp_path / "folder", drop_rate=0.9)
    out = apply_delta(root / "base", tmp_path / "folder", tmp_path / "out", fsync=False).output
    assert (out / "tokenizer.json").read_bytes() == (spoken / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 10
    assert verify(out, sample=None).ok
    out = run(recipe(root, "dare_linear", str(tmp_path / "folder"), "math.delta.safetensors"),
              tmp_path / "merged")  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (root / "base" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpack_is_the_delta_alone(root: Path, tmp_path: Path, backend: str) -> None:
    path = unpack_delta(root / "base", root / "math.delta.safetensors", tmp_path / "u.safetensors",
                        backend=backend)  # fmt: skip
    dense, base, tuned = load_file(path), cases.load(root / "base"), cases.load(root / "math")
    delta = read_delta(root / "math.delta.safetensors")
    assert dense.keys() == set(cases.SHAPES)
    for name in dense:
        tensor = delta.tensors[name]
        keep = torch.zeros(tensor.numel, dtype=torch.bool)
        keep[cases.kept(tensor.key, tensor.numel, delta.threshold)] = True
        d = (tuned[name].float() - base[name].float()) * torch.tensor(tensor.factor).float()
        wanted = torch.where(keep.reshape(d.shape), d, 0.0)
        assert torch.equal(dense[name], wanted)
        assert dense[name].dtype == torch.float32
    with pytest.raises(OutputError, match="exists"):
        unpack_delta(root / "base", root / "math.delta.safetensors", path)
    with pytest.raises(OutputError, match=r"give a name in \.safetensors"):
        unpack_delta(root / "base", root / "math.delta.safetensors", tmp_path / "folder")
    with pytest.raises(RecipeError, match="out_dtype: must be one of"):
        unpack_delta(root / "base", root / "math.delta.safetensors", path, out_dtype="int8")
    with pytest.raises(CheckpointError, match="is for another base: tensor"):
        unpack_delta(root / "code", root / "math.delta.safetensors", tmp_path / "v.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["u.safetensors"]


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_of_the_delta_is_refused(root: Path, tmp_path: Path, backend: str) -> None:
    """Values, offsets, header and seal; alone and in a merge; nothing is left behind."""
    source = root / "code.delta.safetensors"
    data = cases.Reader(source)
    path = tmp_path / "inputs" / source.name
    path.parent.mkdir()
    places = [0, data.raw.index(b"cl_fast.delta"), data.start - 70, len(data.raw) - 1]
    for name in (f"kept/{UP}", f"offsets/{UP}", "kept/model.norm.weight"):
        begin, end = data.header[name]["data_offsets"]
        places.append(data.start + (begin + end) // 2)
    for place in places:
        path.write_bytes(data.raw)
        flip(path, place)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            apply_delta(root / "base", path, tmp_path / "out", backend=backend)
        content = recipe(root, "ties", "math.delta.safetensors", str(path),
                         packed={"density": 0.05})  # fmt: skip
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            run(content, tmp_path / "out", backend=backend)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_offsets_that_are_not_those_of_the_stream_are_refused(
    root: Path, tmp_path: Path, method: str, backend: str
) -> None:
    """Forged with the right checksums: they lead to no byte outside of the values."""
    source = root / "math.delta.safetensors"
    path = tmp_path / "inputs" / source.name
    path.parent.mkdir()
    right = cases.Reader(source).offsets(UP)
    for wrong in (
        [right[0], right[1] + 1, right[2]],
        [right[0], right[2], right[2]],
        [1, right[1], right[2]],
        [right[0], right[1], right[2] - 1],
        [right[0], right[2] + 1, right[2]],
        [right[0], -1, right[2]],
        [right[0], 2**62, right[2]],
    ):
        path.write_bytes(source.read_bytes())
        cases.forge_offsets(path, UP, wrong)
        content = recipe(root, method, str(path), packed={} if method[1] == "a" else
                         {"density": 0.05})  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.*offsets"):
            run(content, tmp_path / "out", backend=backend)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_of_the_base_is_refused(root: Path, tmp_path: Path, backend: str) -> None:
    """In every tensor, also one that did not change; large ones are noticed in the merge itself."""
    inputs = tmp_path / "inputs"
    for name in (*cases.SHAPES, cases.SAME, cases.CHANGED, cases.KEPT):
        state = cases.base_state()
        state[name].reshape(-1).view(torch.uint8)[state[name].nbytes // 2] ^= 1
        if name == cases.KEPT:
            state[name] = ~cases.base_state()[name]
        cases.save(inputs / name, state)
        with pytest.raises(CheckpointError, match=f"tensor '?{re.escape(name)}'? "):
            apply_delta(inputs / name, root / "math.delta.safetensors", tmp_path / "out",
                        backend=backend)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_a_large_base_tensor_is_compared_while_it_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with no tensor so small that it is looked at beforehand; the merge throws away."""
    from cl_fast.merging import deltas

    monkeypatch.setattr(deltas, "_SMALL", -1)
    state = cases.base_state()
    state[UP].reshape(-1).view(torch.uint8)[-1] ^= 1
    cases.save(tmp_path / "inputs" / "base", state)
    for backend in BACKENDS:
        with pytest.raises(CheckpointError, match=r"is not that of the base of .*math\.delta"):
            apply_delta(tmp_path / "inputs" / "base", root / "math.delta.safetensors",
                        tmp_path / "out", out_shard_size=50_000, backend=backend)  # fmt: skip
    state[UP].reshape(-1)[5] = float("nan")
    cases.save(tmp_path / "inputs" / "nan", state)
    with pytest.raises(CheckpointError, match="is not that of the base"):
        apply_delta(tmp_path / "inputs" / "nan", root / "math.delta.safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def _another(root: Path, tmp_path: Path) -> dict[str, Any]:
    """Two deltas of two bases."""
    state = cases.base_state()
    state["model.norm.weight"] += 1
    cases.save(tmp_path / "other", state)
    pack_delta(tmp_path / "other", root / "math", tmp_path / "o.delta.safetensors", drop_rate=0.9)
    return recipe(root, "task_arithmetic", "code.delta.safetensors",
                  str(tmp_path / "o.delta.safetensors"))  # fmt: skip


def _narrow(root: Path, tmp_path: Path) -> dict[str, Any]:
    state = cases.base_state()
    state[UP] = state[UP].float()
    cases.save(tmp_path / "wide", state)
    return recipe(root, "task_arithmetic", *packed("math")) | {"base_model": str(tmp_path / "wide")}


def _lacking(root: Path, tmp_path: Path) -> dict[str, Any]:
    state = cases.base_state()
    del state[UP]
    cases.save(tmp_path / "less", state)
    return recipe(root, "task_arithmetic", *packed("math")) | {"base_model": str(tmp_path / "less")}


def _at(method: str, *models: str, **changes: Any) -> Callable[[Path, Path], dict[str, Any]]:
    return lambda root, _: recipe(root, method, *models, **changes)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (_another, CheckpointError, "were packed on different bases"),
        (_narrow, CheckpointError, f"was packed on a tensor '{UP}' of BF16 [300, 401]"),
        (_lacking, CheckpointError, f"changes tensor '{UP}', which"),
        (
            _at("dare_linear", *packed("math"), packed={"density": 0.5}),
            RecipeError,
            "models[0].parameters.density: ",
        ),
        (
            _at("dare_ties", "code", *packed("math"), parameters={"density": 0.5}),
            RecipeError,
            "would drop twice: give it density: 1.0",
        ),
        (
            lambda root, _: (
                recipe(root, "task_arithmetic", "code")
                | {"base_model": str(root / packed("math")[0])}
            ),
            RecipeError,
            "base_model: ",
        ),
        (
            _at("task_arithmetic", "code", tokenizer_source="x.delta.safetensors"),
            ClFastError,
            "tokenizer_source: ",
        ),
    ],
)
def test_merges_that_make_no_sense_are_told(
    root: Path, tmp_path: Path, make: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        make_plan(parse_recipe(make(root, tmp_path)), tmp_path / "out")


def test_a_seed_without_effect_is_told(root: Path, tmp_path: Path) -> None:
    def told(*models: str, method: str = "dare_linear", **changes: Any) -> bool:
        plan = make_plan(parse_recipe(recipe(root, method, *models, **changes)), tmp_path / "out")
        return any("seed: has no effect: every model" in note for note in plan.notes)

    assert told(*packed("math", "code"), seed=7)
    assert not told(*packed("math", "code"))
    assert not told(*packed("code"), "math", own={"density": 0.5}, seed=7)


def test_a_density_of_its_own_beside_one_for_all(root: Path, tmp_path: Path) -> None:
    content = recipe(root, "dare_linear", "code", *packed("math"), packed={"density": 1.0},
                     parameters={"density": 0.1}, seed=7)  # fmt: skip
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    assert not any("no density" in note for note in plan.notes)
    lines = "\n".join(describe(plan))
    assert "packed delta (drop 0.9, seed 7, stream 'math', 5 of 8 tensors)" in lines
    # A tenth of one model is read of the other: base and code whole, math a tenth.
    state = cases.load(root / "base")
    floats = sum(state[name].nbytes for name in cases.SHAPES)
    assert plan.bytes_read < 2 * 2.5 * floats


def test_nan_and_overflow_are_told(root: Path, tmp_path: Path) -> None:
    content = recipe(root, "task_arithmetic", *packed("math"), parameters={"lambda": 1e38},
                     out_dtype="float16")  # fmt: skip
    for backend in BACKENDS:
        with pytest.raises(NonFiniteError, match="overflow F16"):
            run(content, tmp_path / "out", backend=backend)


def test_an_interrupted_merge_goes_on_and_is_verified(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cl_fast.merging.executors import NativeExecutor

    content = recipe(root, "dare_ties", *packed(*cases.MODELS))
    wanted = run(content, tmp_path / "wanted", shard=100_000)
    write, done = NativeExecutor.write, []

    def stop(self: Any, *arguments: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(write(self, *arguments))
        return done[0]

    monkeypatch.setattr(NativeExecutor, "write", stop)
    with pytest.raises(Interrupted):
        run(content, tmp_path / "out", shard=100_000)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    plan = make_plan(parse_recipe(content), tmp_path / "out", out_shard_size=100_000)
    result = execute(plan, resume=True)
    assert result.resumed == 1
    cases.same_bits(wanted, result.output)
    record = json.loads((result.output / "cl_fast_merge.json").read_text())
    assert [entry["role"] for entry in record["inputs"]] == ["base", *["delta"] * 3]
    for backend in BACKENDS:
        report = verify(result.output, sample=None, backend=backend)
        assert report.ok, report.problems
        assert len(report.recomputed) == len(plan.tensors)


def test_verify_tells_a_delta_that_was_changed(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "math.delta.safetensors"
    path.write_bytes((root / path.name).read_bytes())
    out = apply_delta(root / "base", path, tmp_path / "out", fsync=False).output
    assert verify(out).ok
    place = cases.Reader(path).header[f"kept/{UP}"]["data_offsets"][0]
    flip(path, cases.Reader(path).start + place)
    report = verify(out)
    assert not report.ok
    assert f"the values of tensor '{UP}' are not those" in report.problems[0]
    path.unlink()
    assert "is not at" in verify(out).notes[0]


def test_memory_and_reads_are_foretold(root: Path, tmp_path: Path) -> None:
    """Torch-free and small by the core: nothing is expanded whole."""
    plan = plan_delta(root / "base", root / "math.delta.safetensors", tmp_path / "out")
    assert plan.memory < 100_000_000
    assert execute(plan, memory=16 << 20, fsync=False).backend == "native"
    stored = plan.inputs[0].nbytes + (root / "math.delta.safetensors").stat().st_size
    assert plan.bytes_read < stored


def test_the_command(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["delta", "pack", f"{root}/base", f"{root}/math", "--drop", "0.9", "--seed", "7"]) == 0
    )
    written = tmp_path / "math.delta.safetensors"
    assert written.read_bytes() == (root / written.name).read_bytes()
    assert "of the finetuned model's" in capsys.readouterr().out
    assert main(["delta", "info", written.name, "--check"]) == 0
    told = capsys.readouterr().out
    assert "stream   'math', seed 7" in told
    assert "every byte agrees" in told
    assert main(["delta", "info", written.name, "--json"]) == 0
    words = json.loads(capsys.readouterr().out)
    assert words["tensors"][UP]["kind"] == "kept"
    assert words["kept"] == sum(t["kept"] for t in words["tensors"].values())
    assert main(["delta", "apply", f"{root}/base", written.name, "out", "--dry-run"]) == 0
    assert "packed delta (drop 0.9" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["delta", "apply", f"{root}/base", written.name, "out", "--dtype", "float32"]) == 0
    assert cases.load(tmp_path / "out")[UP].dtype == torch.float32
    assert main(["delta", "unpack", f"{root}/base", written.name, "u.safetensors", "--quiet"]) == 0
    assert main(["delta", "apply", f"{root}/code", written.name, "no"]) == 1
    assert "is for another base" in capsys.readouterr().err
    assert main(["delta"]) == 2
    assert "pack" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["delta", "pack", "a", "b", "--drop", "1"])
    assert "'1' is not a fraction" in capsys.readouterr().err
    made = ["math.delta.safetensors", "out", "u.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
