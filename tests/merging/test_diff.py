"""Comparing models with their base: the numbers, against float64; what is refused; the command."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import adapter_cases
import merge_cases as cases
import patch_cases
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_fast.backends import native
from cl_fast.cli import main
from cl_fast.errors import CheckpointError, OutputError, RecipeError
from cl_fast.merging import parse_recipe
from cl_fast.merging.deltas import pack_delta, unpack_delta
from cl_fast.merging.diff import Comparison, Group, Statistics, compare
from cl_fast.merging.places import place_of
from cl_fast.merging.report import check_report

MODELS = ("one", "two", "three")
BACKENDS = ["eager"] + (["native"] if native.load() is not None else [])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family in which one model leaves a tensor alone, and is sparse in another."""
    root = cases.family(tmp_path_factory.mktemp("family"))
    state = cases.load(root / "three")
    base = cases.load(root / "base")
    state["model.norm.weight"] = base["model.norm.weight"]
    wide = base["model.layers.1.mlp.up_proj.weight"].clone()
    wide[5, :3] += 1.0
    state["model.layers.1.mlp.up_proj.weight"] = wide
    shutil.rmtree(root / "three")
    cases.save(root / "three", state, files=3)
    return root


@pytest.fixture(scope="module", params=BACKENDS)
def compared(root: Path, request: pytest.FixtureRequest) -> Comparison:
    return compare(root / "base", [root / name for name in MODELS], backend=request.param)


def oracle(root: Path, names: list[str]) -> dict[str, Any]:
    """The statistics of some tensors together, in float64."""

    def flat(model: str) -> Tensor:
        state = cases.load(root / model)
        return torch.cat([state[name].reshape(-1).double() for name in names])

    base, models = flat("base"), [flat(name) for name in MODELS]
    deltas = [x - base for x in models]
    signs = [d.sign() for d in deltas]
    n = len(base)

    def pair(f: Any) -> list[list[float]]:
        return [[float(f(i, j)) for j in range(3)] for i in range(3)]

    def share(x: Tensor) -> float:
        return int(x.sum()) / n

    def over(x: Tensor) -> float:
        return float(x.abs().max() / x.square().mean().sqrt())

    unlike = pair(lambda i, j: share(signs[i] * signs[j] < 0))
    cosine = [
        [
            float((x @ y) / (x.norm() * y.norm())) if x.norm() * y.norm() else None
            for y in deltas
        ]
        for x in deltas
    ]
    return {
        "elements": n,
        "base": {
            "l2": float(base.norm()),
            "l1": float(base.abs().sum()),
            "max": float(base.abs().max()),
            "rms": float(base.square().mean().sqrt()),
            "outlier": over(base),
            "nonfinite": 0,
        },
        "models": [
            {
                "l2": float(d.norm()),
                "l1": float(d.abs().sum()),
                "max": float(d.abs().max()),
                "relative_l2": float(d.norm() / base.norm()),
                "relative_l1": float(d.abs().sum() / base.abs().sum()),
                "relative_max": float(d.abs().max() / base.abs().max()),
                "changed": int((d != 0).sum()),
                "changed_share": share(d != 0),
                "weight_l2": float(x.norm()),
                "weight_max": float(x.abs().max()),
                "weight_outlier": over(x),
                "nonfinite": 0,
            }
            for d, x in zip(deltas, models, strict=True)
        ],
        "cosine": cosine,
        "overlap": pair(lambda i, j: share((signs[i] != 0) & (signs[j] != 0))),
        "conflict": unlike,
        "conflicts": int(((torch.stack(signs) > 0).any(0) & (torch.stack(signs) < 0).any(0)).sum()),
        "shared": int((torch.stack(signs).abs().sum(0) > 1).sum()),
    }


def close(got: Any, want: Any, where: str = "") -> None:
    """Equal counts; sums as near as float32 sums of magnitudes in pieces of 1024 are."""
    if isinstance(want, dict):
        for key, value in want.items():
            close(got[key], value, f"{where}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for i, value in enumerate(want):
            close(got[i], value, f"{where}[{i}]")
    elif isinstance(want, float) and not math.isnan(want):
        assert got == pytest.approx(want, rel=64 * 2.0**-24, abs=1e-12), where
    else:
        assert got == want, where


def test_every_group_against_float64(compared: Comparison, root: Path) -> None:
    floating = list(cases.SHAPES)
    assert [group.name for group in compared.tensors] == sorted(
        floating, key=lambda name: (name.split(".")[1] == "norm", name)
    )
    for group in compared.tensors:
        close(group.to_dict(), oracle(root, [group.name]))
    for i, layer in enumerate(compared.layers):
        assert layer.layer == layer.name == f"model.layers.{i}"
        members = [name for name in floating if f"layers.{i}." in name]
        close(layer.to_dict(), oracle(root, members))
    assert [kind.kind for kind in compared.kinds] == ["embed", "norm", "up"]
    close(compared.kinds[1].to_dict(), oracle(root, [n for n in floating if "norm" in n]))
    assert [(cell.layer, cell.kind) for cell in compared.cells] == [
        ("", "embed"),
        ("model.layers.0", "norm"),
        ("model.layers.0", "up"),
        ("model.layers.1", "norm"),
        ("model.layers.1", "up"),
        ("", "norm"),
    ]
    close(compared.whole.to_dict(), oracle(root, floating))
    assert [tensor.name for tensor in compared.left_out] == ["model.ids"]
    assert "I64" in compared.left_out[0].reason


def test_the_core_counts_what_the_reference_counts(root: Path) -> None:
    cases.need_native()
    models = [root / name for name in MODELS]
    mine = compare(root / "base", models, backend="native")
    theirs = compare(root / "base", models, backend="eager")
    assert mine.sampled == theirs.sampled < mine.whole.statistics.elements
    close(json.loads(mine.to_json()), json.loads(theirs.to_json()))
    threads = compare(root / "base", models, backend="native", threads=3)
    assert threads.to_json() == mine.to_json()


def test_what_a_trim_keeps(compared: Comparison, root: Path) -> None:
    for k, name in enumerate(MODELS):
        base, state = cases.load(root / "base"), cases.load(root / name)
        deltas = {n: (state[n].float() - base[n].float()).abs() for n in cases.SHAPES}
        every = torch.cat([d.reshape(-1) for d in deltas.values()])
        keep = int(0.2 * len(every))
        threshold = float(every.sort(descending=True).values[keep - 1])
        # a bin of the sample is an eighth of an octave wide
        assert compared.thresholds[k] == pytest.approx(threshold, rel=0.13)
        assert compared.whole.statistics.models[k].kept == pytest.approx(0.2 * len(every))
        for group in compared.tensors:
            kept = int((deltas[group.name] >= threshold).sum()) / deltas[group.name].numel()
            assert group.statistics.models[k].kept_share == pytest.approx(kept, abs=0.06)
    [lonely] = [group for group in compared.tensors if "1.mlp.up_proj" in group.name]
    # three changed elements that a sample may miss are kept all the same
    assert lonely.statistics.models[2].kept == pytest.approx(3.0)


def test_histogram_rows_and_outliers(compared: Comparison, root: Path) -> None:
    base = cases.load(root / "base")
    for k, name in enumerate(MODELS):
        assert sum(compared.histogram[k]) == pytest.approx(
            compared.whole.statistics.models[k].changed
        )
        state = cases.load(root / name)
        rows = [row for row in compared.rows if row.model == name]
        lengths = sorted(
            (
                (length, n, i)
                for n, shape in cases.SHAPES.items()
                if len(shape) == 2
                for i, length in enumerate(
                    (state[n].double() - base[n].double()).norm(dim=1).tolist()
                )
            ),
            reverse=True,
        )
        for row, (length, tensor, i) in zip(rows, lengths[:5], strict=False):
            assert (row.tensor, row.index) == (tensor, (i,))
            assert row.l2 == pytest.approx(length)
            assert row.base_l2 == pytest.approx(float(base[tensor][i].double().norm()))
    assert all(b == 2 * a for a, b in itertools.pairwise(compared.edges))
    first = compared.outliers[0]
    state = base if first.model == "base" else cases.load(root / first.model)
    assert float(state[first.tensor][first.index].abs()) == first.magnitude
    ratios = [
        float(x.double().abs().max() / x.double().square().mean().sqrt())
        for model in ("base", *MODELS)
        for x in cases.load(root / model).values()
        if x.dim() == 2
    ]
    assert first.ratio == pytest.approx(max(ratios))


def test_models_may_come_in_any_order(root: Path) -> None:
    forth = compare(root / "base", [root / name for name in MODELS])
    back = compare(root / "base", [root / name for name in reversed(MODELS)])
    for mine, theirs in zip(forth.tensors, back.tensors, strict=True):
        x, y = mine.statistics, theirs.statistics
        assert x.conflicts == y.conflicts
        assert x.shared == y.shared
        assert [m.changed for m in x.models] == [m.changed for m in reversed(y.models)]
        close([m.l2 for m in x.models], [m.l2 for m in reversed(y.models)])
        close([list(r) for r in x.cosine], [list(r)[::-1] for r in reversed(y.cosine)])


def test_one_model_and_a_model_that_is_the_base(root: Path) -> None:
    alone = compare(root / "base", [root / "one"])
    assert alone.whole.statistics.cosine == ((1.0,),)
    assert alone.whole.statistics.conflicts == 0
    assert not any(line.startswith("pair") for line in alone.lines())
    same = compare(root / "base", [root / "base"])
    model = same.whole.statistics.models[0]
    assert (model.l2, model.changed, model.kept, same.edges, same.rows) == (0.0, 0, 0.0, (), ())
    assert same.whole.statistics.cosine == ((None,),)
    json.loads(same.to_json())


def test_nan_and_infinity_are_told(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "one", tmp_path / "one")
    cases.poison(tmp_path / "one", "model.norm.weight", 3, math.nan)
    cases.poison(tmp_path / "one", "model.norm.weight", 4, math.inf)
    found = compare(root / "base", [tmp_path / "one", root / "two"])
    assert [m.nonfinite for m in found.whole.statistics.models] == [2, 0]
    assert found.nonfinite == 2
    assert any("2 NaN or infinite" in line for line in found.lines())
    json.loads(found.to_json())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_patch_is_a_model(tmp_path: Path, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    module = "model.layers.0.mlp.down_proj"
    name = f"{module}.weight"
    state = {name: torch.randn(8, 6, generator=g), "model.norm.weight": torch.ones(6)}
    cases.save(tmp_path / "base", state)
    layer = patch_cases.Layer(
        torch.randn(6, 2, generator=g), torch.randn(8, 2, generator=g), torch.eye(6)
    )
    case = patch_cases.Case(
        {module: state[name]}, False, {module: layer}, torch.ones(2), facts(2)
    )
    case.patch().save(tmp_path / "edits.safetensors")
    found = compare(tmp_path / "base", [tmp_path / "edits.safetensors"], backend=backend)
    exact = case.delta(module, [0, 1])
    edited, norm = found.tensors
    assert edited.statistics.models[0].l2 == pytest.approx(float(exact.norm()), rel=1e-5)
    assert norm.statistics.models[0].changed == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_is_a_model(root: Path, tmp_path: Path, backend: str) -> None:
    module = "model.layers.0.mlp.up_proj"
    made = adapter_cases.factors({module: (300, 401)}, 2)
    adapter = adapter_cases.write(tmp_path / "adapter", made, alpha=4.0)
    found = compare(root / "base", [adapter, root / "one"], backend=backend)
    a, b = made[module]
    exact = 2.0 * b.double() @ a.double()
    [moved] = [group for group in found.tensors if group.statistics.models[0].changed]
    assert moved.name == f"{module}.weight"
    assert moved.statistics.models[0].l2 == pytest.approx(float(exact.norm()), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_delta_is_a_model(root: Path, tmp_path: Path, backend: str) -> None:
    packed = tmp_path / "one.safetensors"
    pack_delta(root / "base", root / "one", packed, drop_rate=0.9)
    unpack_delta(root / "base", packed, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    found = compare(root / "base", [packed, root / "two"], backend=backend)
    assert len(found.tensors) == len(cases.SHAPES)
    for group in found.tensors:
        model = group.statistics.models[0]
        # base + delta was rounded to float32
        assert model.l2 == pytest.approx(float(dense[group.name].double().norm()), rel=1e-4)
        assert model.changed <= int((dense[group.name] != 0).sum()) + 1
    assert found.whole.statistics.models[0].changed_share == pytest.approx(0.1, abs=0.02)


def test_models_at_urls(root: Path) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("base", "one"):
        store.put(str(root / name), f"/test_diff/{name}", recursive=True)
    there = compare("memory://test_diff/base", ["memory://test_diff/one"])
    here = compare(root / "base", [root / "one"])
    assert there.tensors == here.tensors
    assert there.models == ("one",)


def facts(count: int) -> list[Any]:
    from cl_fast.editing.facts import Fact

    return [Fact(f"The {{}} of {i} is", "name", f"value {i}") for i in range(count)]


def test_tensors_that_do_not_fit_are_left_out_and_told(root: Path, tmp_path: Path) -> None:
    state = cases.load(root / "one")
    state["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
    state["extra"] = torch.ones(2, dtype=torch.bfloat16)
    del state["model.layers.0.input_layernorm.weight"]
    cases.save(tmp_path / "one", state)
    found = compare(root / "base", [tmp_path / "one"])
    reasons = {tensor.name: tensor.reason for tensor in found.left_out}
    assert set(reasons) == {
        "extra",
        "model.ids",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    }
    assert f"absent from {root / 'base'}" in reasons["extra"]
    assert "[64] in" in reasons["model.norm.weight"]
    assert "[65] in" in reasons["model.norm.weight"]
    assert sum("is not compared" in line for line in found.lines()) == 3
    assert "and 1 more" in found.lines()[-1]


@pytest.mark.parametrize(
    ("models", "options", "error", "words"),
    [
        ([], {}, ValueError, "1 to 16 models; got 0"),
        (["one"] * 17, {}, ValueError, "got 17"),
        (["absent"], {}, CheckpointError, r"models\[0\].*does not exist"),
        (["empty"], {}, CheckpointError, "holds no weights"),
        (["short"], {}, CheckpointError, "short"),
        (["other"], {}, CheckpointError, "no floating tensor in common"),
        (["one"], {"threads": 0}, ValueError, "threads must be at least 1"),
        (["one"], {"io": "fast"}, ValueError, "io must be one of"),
        (["one"], {"backend": "cuda"}, ValueError, "backend must be"),
        (["one"], {"backend": "eager", "io": "direct"}, ValueError, "needs the C\\+\\+ core"),
    ],
)
def test_bad_input(
    root: Path, models: list[str], options: Any, error: type[Exception], words: str
) -> None:
    if not (root / "empty").exists():
        (root / "empty").mkdir()
        cases.save(root / "other", {"w": torch.ones(3)})
        (root / "short").mkdir()
        whole = (root / "one" / "model.safetensors").read_bytes()
        (root / "short" / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(error, match=words):
        compare(root / "base", [root / name for name in models], **options)


def test_models_must_be_a_list(root: Path) -> None:
    with pytest.raises(TypeError, match="must be a list"):
        compare(root / "base", str(root / "one"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_shrinks_while_it_is_read(
    root: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cl_fast.merging import diff

    shutil.copytree(root / "one", tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    surveyed = diff.survey

    def cut(*args: Any, **options: Any) -> Any:
        file.write_bytes(file.read_bytes()[:-1000])
        return surveyed(*args, **options)

    monkeypatch.setattr(diff, "survey", cut)
    with pytest.raises(CheckpointError, match=r"truncated|changed while it was read"):
        compare(root / "base", [tmp_path / "one"], backend=backend)


@pytest.mark.parametrize(
    ("name", "stack", "layer", "kind"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers", 11, "q"),
        ("model.layers.0.self_attn.q_norm.weight", "model.layers", 0, "norm"),
        ("model.layers.0.self_attn.k_proj.bias", "model.layers", 0, "k"),
        ("model.layers.0.self_attn.o_proj.weight", "model.layers", 0, "o"),
        ("model.layers.3.self_attn.qkv_proj.weight", "model.layers", 3, "qkv"),
        ("model.layers.3.mlp.gate_proj.weight", "model.layers", 3, "gate"),
        ("model.layers.3.mlp.gate_up_proj.weight", "model.layers", 3, "up"),
        ("model.layers.3.mlp.gate.weight", "model.layers", 3, "router"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "model.layers", 3, "down"),
        ("model.layers.3.block_sparse_moe.gate.weight", "model.layers", 3, "router"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", "model.layers", 3, "down"),
        ("model.layers.3.post_attention_layernorm.weight", "model.layers", 3, "norm"),
        ("model.embed_tokens.weight", "", None, "embed"),
        ("lm_head.weight", "", None, "head"),
        ("model.norm.weight", "", None, "norm"),
        ("transformer.h.5.attn.c_attn.weight", "transformer.h", 5, "qkv"),
        ("transformer.h.5.attn.c_proj.weight", "transformer.h", 5, "o"),
        ("transformer.h.5.mlp.c_fc.weight", "transformer.h", 5, "up"),
        ("transformer.h.5.mlp.c_proj.weight", "transformer.h", 5, "down"),
        ("transformer.h.5.ln_1.weight", "transformer.h", 5, "norm"),
        ("transformer.wte.weight", "", None, "embed"),
        ("gpt_neox.layers.2.attention.query_key_value.weight", "gpt_neox.layers", 2, "qkv"),
        ("gpt_neox.layers.2.attention.dense.weight", "gpt_neox.layers", 2, "o"),
        ("gpt_neox.layers.2.mlp.dense_h_to_4h.weight", "gpt_neox.layers", 2, "up"),
        ("gpt_neox.layers.2.mlp.dense_4h_to_h.bias", "gpt_neox.layers", 2, "down"),
        ("model.decoder.layers.1.fc1.weight", "model.decoder.layers", 1, "up"),
        ("model.decoder.layers.1.self_attn.out_proj.weight", "model.decoder.layers", 1, "o"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block", 0, "q"),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", "encoder.block", 0, "down"),
        ("bert.encoder.layer.4.attention.self.query.weight", "bert.encoder.layer", 4, "q"),
        ("bert.encoder.layer.4.attention.output.dense.weight", "bert.encoder.layer", 4, "o"),
        ("layers.2.attention.wo.weight", "layers", 2, "o"),
        ("layers.2.feed_forward.w1.weight", "layers", 2, "gate"),
        ("something.weight", "", None, "other"),
    ],
)
def test_places(name: str, stack: str, layer: int | None, kind: str) -> None:
    assert place_of(name) == (stack, layer, kind)


# ------------------------------------------------------------------------------------- the command


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    command = ["diff", *(str(root / name) for name in ("base", "one", "two"))]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "6 tensors, 304,728 elements" in told
    assert "pair    one, two: cosine" in told
    assert "model   one: relative L2 change " in told
    command += ["--out", str(page), "--json", str(numbers)]
    assert main(command) == 0
    assert f"wrote   {page}" in capsys.readouterr().out
    comparison = compare(root / "base", [root / "one", root / "two"])
    found = json.loads(numbers.read_text())
    assert found == json.loads(comparison.to_json())
    assert (found["format"], found["version"]) == ("cl_fast.diff", 1)
    before = page.read_bytes()
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    ("path", "suffix", "words"),
    [
        ("model.safetensors", ".html", "ends in .html"),
        ("there.html", ".html", "exists already"),
        ("folder.html", ".html", "is a folder"),
        ("absent/page.html", ".html", "does not exist"),
        ("page.html", ".json", "ends in .json"),
    ],
)
def test_places_where_no_report_can_go(
    tmp_path: Path, path: str, suffix: str, words: str
) -> None:
    (tmp_path / "there.html").touch()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OutputError, match=words):
        check_report(tmp_path / path, suffix, overwrite=False)


def test_the_report_of_a_merge(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = cases.write_recipe(tmp_path / "recipe.yml", cases.recipe(root))
    out = tmp_path / "merged"
    assert main(["merge", str(recipe), str(out), "--report"]) == 0
    page = tmp_path / "merged-report.html"
    assert f"{page}: what the models" in capsys.readouterr().out
    assert "The merge merged" in page.read_text()
    found = json.loads(page.with_suffix(".json").read_text())
    assert [model["name"] for model in found["models"]] == [*MODELS, "merged"]
    exact = compare(root / "base", [*(root / name for name in MODELS), out])
    assert found == json.loads(exact.to_json())
    # it exists now: told before anything is merged
    again = tmp_path / "again"
    assert main(["merge", str(recipe), str(again), "--report", str(page)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert not again.exists()


def test_a_merge_without_a_base_has_no_report(root: Path, tmp_path: Path) -> None:
    from cl_fast.merging.report import check_merge_report

    recipe = parse_recipe(cases.recipe(root, "linear"))
    with pytest.raises(RecipeError, match=r"has no base.*cl-fast diff BASE"):
        check_merge_report(recipe, tmp_path / "page.html", overwrite=False)
    many = cases.recipe(root)
    many["models"] = [
        {"model": f"model{i}", "parameters": {"weight": 1.0, "density": 0.5}} for i in range(16)
    ]
    with pytest.raises(RecipeError, match="at most 16 models"):
        check_merge_report(parse_recipe(many), tmp_path / "page.html", overwrite=False)


def test_a_summary_of_statistics_is_json(compared: Comparison) -> None:
    group: Group = compared.whole
    assert isinstance(group.statistics, Statistics)
    json.dumps(compared.to_dict(), allow_nan=False)
