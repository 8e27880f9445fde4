"""A patch goes on and comes off to the bit; facts come out of it and into it exactly."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import pickle
import struct
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import patch_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_fast.checkpoints.patches import hash_stored, is_patch, read_patch, stored_name
from cl_fast.checkpoints.safetensors import read_header
from cl_fast.editing import applying
from cl_fast.editing.applying import write_factors
from cl_fast.editing.facts import Fact
from cl_fast.editing.lora import truncated
from cl_fast.editing.patch import LayerPatch, Patch, undo_patches, weight_hash
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError
from cl_fast.merging import ties

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


class Conv1D(nn.Module):
    """As GPT-2's: the weight is [f, d]."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(f, d))
        self.bias = nn.Parameter(0.2 * torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Model(nn.Module):
    """Two blocks of an up- and a down-projection."""

    def __init__(self, transposed: bool = False, d: int = 10, f: int = 14) -> None:
        super().__init__()
        torch.manual_seed(0)
        down = (lambda: Conv1D(d, f)) if transposed else (lambda: nn.Linear(f, d))
        self.ups = nn.ModuleList(nn.Linear(d, f) for _ in range(2))
        self.downs = nn.ModuleList(down() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        return x


LAYERS = ("downs.0", "downs.1")


def made(
    dtype: torch.dtype = torch.float32, transposed: bool = False, **changes: Any
) -> tuple[Model, cases.Case]:
    model = Model(transposed).to(dtype)
    weights = cases.matrices(model, LAYERS)
    frozen = {name: weight.detach().clone() for name, weight in weights.items()}
    return model, cases.case_of(frozen, transposed=transposed, **changes)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        now[name].dtype == value.dtype and torch.equal(now[name], value)
        for name, value in before.items()
    )


def rounded(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 values to the nearest of a dtype, ties to even; and which are no ties, nor nearly."""
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    mantissa, exponent = np.frexp(exact.numpy())
    if dtype == torch.float16:  # subnormal below 2^-14
        exponent_floor = np.maximum(exponent, -13)
        mantissa = np.ldexp(mantissa, exponent - exponent_floor)
        exponent = exponent_floor
    scaled = np.ldexp(mantissa, bits)
    away = np.abs(scaled - np.floor(scaled) - 0.5)
    values = np.ldexp(np.rint(scaled), exponent - bits)
    return torch.from_numpy(values), torch.from_numpy(away > 2.0**-12 if bits < 24 else away > 1e-4)


# On the model.


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rounds_the_sum_once_and_undo_gives_every_bit_back(
    dtype: torch.dtype, transposed: bool
) -> None:
    model, case = made(dtype, transposed)
    model.downs[0].weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    before = state(model)
    patch = case.patch()
    assert patch.applied is None
    assert patch.apply(model) is patch
    assert patch.applied == "merge"
    checked = 0
    for name in LAYERS:
        layer = next(layer for layer in patch.layers if layer.name == name)
        assert torch.allclose(layer.delta, case.delta(name, range(5)), rtol=0, atol=1e-12)
        u, v = layer.U.float().double(), layer.V.float().double()  # as they count for weights
        product = v @ u.T if transposed else u @ v.T
        wanted, clear = rounded(case.weights[name].double() + product, dtype)
        now = model.get_submodule(name).weight.detach().double()
        assert torch.equal(now[clear], wanted[clear])
        assert not torch.equal(now, case.weights[name].double())
        checked += int(clear.sum())
        wrong = now - case.weights[name].double() - layer.delta
        told = float(wrong.norm() / layer.delta.norm())
        assert patch.rounding_error[name] == pytest.approx(told, rel=1e-6)
    assert checked > 0.97 * 2 * 140
    others = {f"{name}.weight" for name in LAYERS}
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in before.items()
        if name not in others
    )
    patch.undo()
    assert same(model, before)
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in parameters.items())
    assert [p.requires_grad for p in after.values()] == [name != "downs.0.weight" for name in after]
    assert patch.rounding_error.keys() == set(LAYERS), "kept, since it was asked for"


def test_float64_models_are_edited_in_float64() -> None:
    model, case = made(torch.float64)
    before = state(model)
    with case.patch().apply(model) as patch:
        for name in LAYERS:
            exact = case.weights[name] + case.delta(name, range(5))
            assert torch.allclose(model.get_submodule(name).weight, exact, rtol=0, atol=1e-12)
        assert max(patch.rounding_error.values()) < 1e-14
    assert same(model, before)


def test_more_columns_than_one_product_takes_are_summed_before_the_rounding() -> None:
    many = applying.MOST_RANK + 3
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.randn(4, many, generator=draw, dtype=torch.float64) for _ in range(2))
    base = torch.randn(4, 4, generator=draw, dtype=torch.float64)
    layer = LayerPatch("a", False, "", u, v)
    for dtype in (torch.float64, torch.bfloat16):
        weight = torch.empty(4, 4, dtype=dtype)
        write_factors(weight, base.to(dtype), layer)
        exact = base.to(dtype).double() + u @ v.T
        rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (2.0**-8, 1e-4)
        assert torch.allclose(weight.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_is_unbiased_and_follows_the_seed(dtype: torch.dtype) -> None:
    model, case = made(dtype)
    patch, before = case.patch(), state(model)
    layer, base = patch.layers[0], case.weights[LAYERS[0]]
    exact = base.double() + layer.delta
    draws = torch.empty(300, *base.shape, dtype=dtype)
    for seed, draw in enumerate(draws):
        write_factors(draw, base, layer, "stochastic", seed)
    errors = draws.double() - exact
    ulp = exact.abs() * 2.0 ** (-7 if dtype == torch.bfloat16 else -10) + 2.0**-24
    assert bool((errors.abs() <= ulp).all())
    # The sum over all elements: its deviation is known from the draws themselves.
    total = errors.sum((1, 2))
    assert abs(float(total.mean())) < 4 * float(total.std()) / math.sqrt(len(draws))
    # Each element: what is next to never drawn has no deviation yet.
    spread = errors.std(0) / math.sqrt(len(draws))
    assert bool((errors.mean(0).abs() <= 6 * spread + 10 * ulp / len(draws)).all())
    with patch.apply(model, rounding="stochastic", seed=7):
        assert torch.equal(model.downs[0].weight, draws[7])
        second = torch.empty(base.shape, dtype=dtype)
        write_factors(second, case.weights[LAYERS[1]], patch.layers[1], "stochastic", 8)
        assert torch.equal(model.downs[1].weight, second)
    assert not torch.equal(draws[7], draws[8])
    assert same(model, before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_branch_adds_beside_untouched_weights(dtype: torch.dtype, transposed: bool) -> None:
    model, case = made(dtype, transposed)
    before, x = state(model), torch.randn(3, 10).to(dtype)
    plain = model(x)
    layer, delta = model.downs[0], case.delta(LAYERS[0], range(5))
    wide = torch.randn(6, 14).to(dtype)
    unpatched = layer(wide)
    patch = case.patch().apply(model, how="branch")
    assert patch.applied == "branch"
    assert same(model, before)
    added = wide.double() @ (delta if transposed else delta.T)
    wanted = unpatched.double() + added
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 44}[dtype]
    assert torch.allclose(
        layer(wide).double(), wanted, rtol=2.0**-bits, atol=2e-5 if bits < 40 else 1e-10
    )
    if not transposed:
        assert torch.equal(layer(input=wide), layer(wide)), "by name, too"
    assert layer(wide).dtype == dtype
    assert patch.rounding_error == dict.fromkeys(LAYERS, 0.0)
    assert not torch.equal(model(x), plain)
    patch.undo()
    assert torch.equal(model(x), plain)


def test_a_branch_is_float32_under_autocast_and_lets_gradients_through() -> None:
    model, case = made()
    x = torch.randn(4, 14, requires_grad=True)
    with case.patch().apply(model, how="branch"):
        full = model.downs[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model.downs[0](x)
        [grad] = torch.autograd.grad(full.sum(), x)
    assert mixed.dtype == torch.bfloat16
    delta = case.delta(LAYERS[0], range(5))
    low = torch.nn.functional.linear(x.bfloat16(), model.downs[0].weight.bfloat16())
    low = low.double() + model.downs[0].bias.double() + x.double() @ delta.T
    assert torch.allclose(mixed.double(), low, rtol=2**-6, atol=2**-6)
    exact = (case.weights[LAYERS[0]].double() + delta).sum(0)
    assert torch.allclose(grad.double(), exact.expand_as(grad), atol=1e-5)


def test_with_undoes_whatever_happens_in_it() -> None:
    model, case = made(torch.bfloat16)
    before, patch = state(model), case.patch().bind(model)
    inside = []
    with pytest.raises(ZeroDivisionError), patch:
        inside.append(same(model, before) or 1 / 0)
    assert not inside
    assert same(model, before)
    with patch, patch:
        pass
    assert same(model, before), "the outermost block undoes"
    with patch:
        with patch:
            pass
        assert patch.applied, "an inner block does not"
    patch.apply()
    with patch:
        assert not same(model, before)
    assert same(model, before), "applied before the block: the block still ends it"
    with patch:
        patch.undo()
    with patch.apply(how="branch"):
        assert patch.applied == "branch"
    assert patch.applied is None
    assert same(model, before)


def test_a_patch_is_applied_once_and_alone() -> None:
    model, case = made()
    one, two = case.patch([0, 1]).bind(model), case.patch([2]).bind(model)
    before = state(model)
    with pytest.raises(ValueError, match="nothing to undo"):
        one.undo()
    with pytest.raises(ValueError, match="knows no model yet"):
        case.patch().apply()
    one.apply()
    edited = state(model)
    with pytest.raises(ValueError, match=r"applied already \(merge\): undo it first"):
        one.apply()
    for how in ("merge", "branch"):
        with pytest.raises(ValueError, match=r"'downs.0' has a patch on.*memit of 2 facts.*undo"):
            two.apply(how=how)
    with pytest.raises(ValueError, match="another model: undo it first"):
        one.bind(Model())
    assert same(model, edited)
    one.undo()
    two.apply(how="branch")
    with pytest.raises(ValueError, match="memit of 1 facts"):
        one.apply()
    two.undo()
    assert same(model, before)
    copied = copy.deepcopy(model)
    one.apply()
    case.patch().apply(copied).undo()
    one.undo()
    assert same(copied, before)


def test_a_failure_in_the_middle_takes_back_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, case = made(torch.float16)
    before = state(model)
    first, second = case.patch().layers
    large = LayerPatch(
        second.name, False, second.base_hash, 1e9 * second.U, second.V, second.keys, second.targets
    )
    patch = case.patch(layers=[first, large])
    with pytest.raises(NonFiniteError, match=r"'downs.1' overflows torch.float16; .*bfloat16"):
        patch.apply(model)
    assert same(model, before)
    assert patch.applied is None

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(applying, "_finite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        case.patch().apply(model)
    assert same(model, before)
    monkeypatch.undo()
    case.patch().apply(model).undo()


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(1.5),
        lambda weight: weight.data[3, 4].add_(1.0),
        lambda weight: weight.data.copy_(weight.data.flip(0)),
    ],
)
def test_undo_restores_changed_weights_and_says_so(change: Callable[[Tensor], Any]) -> None:
    model, case = made(torch.bfloat16)
    before, patch = state(model), case.patch().apply(model)
    change(model.downs[1].weight)
    with pytest.warns(UserWarning, match=r"1 edited weights were changed.*\(downs.1\)"):
        patch.undo()
    assert same(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.apply().undo()


def test_undo_after_the_model_was_cast_or_its_parameters_replaced() -> None:
    model, case = made()
    before, patch = state(model), case.patch().apply(model)
    model.to(torch.bfloat16)
    model.downs[0].weight = nn.Parameter(torch.zeros(10, 14, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="2 edited weights were changed"):
        patch.undo()
    assert same(model, {name: value.bfloat16() for name, value in before.items()})


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(10, 14, dtype=torch.int8)


def other_model(change: Callable[[Model], Any]) -> Model:
    model = made()[0]
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.downs[1].weight.data[0, 0].add_(1e-3), "for another base.*'downs.1'"),
        (lambda m: m.to(torch.bfloat16), "for another base.*'downs.0'"),
        (lambda m: m.double(), "for another base.*or to float64, does not"),
        (lambda m: setattr(m, "downs", m.ups), r"'downs.0' has the shape \(14, 10\).*\(10, 14\)"),
        (lambda m: m.downs.pop(1), "no layer 'downs.1', which the patch edits .it has '"),
        (lambda m: m.downs.__setitem__(0, Quantised()), "'downs.0' is torch.int8, a quantised"),
        (lambda m: m.downs.__setitem__(0, nn.ReLU()), "'downs.0' is missing: ReLU has none"),
        (lambda m: m.downs.to("meta"), "'downs.0' is on the meta device"),
    ],
)
def test_other_models_are_refused_before_anything_is_changed(
    change: Callable[[Model], Any], words: str
) -> None:
    _, case = made()
    model = other_model(change)
    before = {k: v.clone() for k, v in model.state_dict().items() if v.device.type != "meta"}
    for how in ("merge", "branch"):
        with pytest.raises(ValueError, match=words):
            case.patch().apply(model, how=how)
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match=words):
        case.patch().state_dict(model)


def test_state_dicts_of_other_bases_are_refused() -> None:
    model, case = made()
    tensors = state(model)
    changed = tensors | {"downs.1.weight": tensors["downs.1.weight"] + 1e-3}
    for base, words in (
        (changed, "another base: the weight of layer 'downs.1'"),
        (
            {k: v for k, v in tensors.items() if k != "downs.0.weight"},
            "lacks the .* 'downs.0.weight'",
        ),
        (
            tensors | {"downs.0.weight": torch.zeros(2, dtype=torch.int8)},
            "holds as torch.int8, quantised",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            case.patch().state_dict(base)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"how": "hard"}, ValueError, "how must be one of 'merge', 'branch'; got 'hard'"),
        ({"rounding": "up"}, ValueError, "rounding must be one of"),
        (
            {"rounding": "stochastic"},
            ValueError,
            "needs weights of bfloat16 or .*'downs.0'",
        ),
        ({"how": "branch", "rounding": "stochastic"}, ValueError, "no effect with how='branch'"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
    ],
)
def test_options_of_apply(given: dict[str, Any], error: type[Exception], words: str) -> None:
    model, case = made()
    before = state(model)
    with pytest.raises(error, match=words):
        case.patch().apply(model, **given)
    assert same(model, before)


def test_patches_that_nobody_holds_are_taken_off() -> None:
    model, case = made(torch.bfloat16)
    before, x = state(model), torch.randn(2, 10).bfloat16()
    plain = model(x)
    for how in ("merge", "branch"):
        case.patch([0, 1]).apply(model, how=how)
        gc.collect()
        with pytest.raises(ValueError, match=r"undo it first \(undo_patches\(model\) does"):
            case.patch().apply(model)
        assert undo_patches(nn.DataParallel(model)) == ["memit of 2 facts"]
        assert same(model, before)
        assert torch.equal(model(x), plain)
    held = case.patch().apply(model)
    undo_patches(model)
    assert held.applied is None
    assert undo_patches(model) == []
    held.apply().undo()
    assert same(model, before)


@pytest.mark.parametrize("how", ["merge", "branch"])
def test_a_patch_keeps_no_model_alive_that_nobody_holds(how: Any) -> None:
    model, case = made()
    case.patch().apply(model, how=how)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_wrappers_are_seen_through_and_compiled_models_have_no_branch() -> None:
    model, case = made()
    before = state(model)
    with case.patch().apply(nn.DataParallel(model)):
        assert not same(model, before)
    compiled = torch.compile(model, backend="eager")
    with case.patch().apply(compiled):
        assert not same(model, before)
    assert same(model, before)
    with pytest.raises(ValueError, match="OptimizedModule does not see, as it is compiled"):
        case.patch().apply(compiled, how="branch")


def test_undo_of_a_weight_of_another_shape_is_refused() -> None:
    model, case = made()
    patch = case.patch().apply(model)
    edited = model.downs[0].weight
    model.downs[0].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"'downs.0' has the shape \(2, 2\) now and had"):
        patch.undo()
    model.downs[0].weight = edited
    patch.undo()


# The base's hash.


def test_weight_hash_is_of_shape_and_values_and_not_of_storage() -> None:
    weight = torch.randn(6, 4).to(torch.bfloat16)
    wide = weight.float()
    by_hand = hashlib.blake2b(b"F32 6x4\n" + wide.numpy().tobytes(), digest_size=16).hexdigest()
    assert weight_hash(weight) == weight_hash(wide) == by_hand
    assert weight_hash(wide.half().bfloat16().T.contiguous().T) == by_hand
    assert weight_hash(wide.double()) != by_hand
    assert weight_hash(wide.T) != by_hand
    assert weight_hash(wide.reshape(4, 6)) != by_hand
    assert weight_hash(wide.half()) != by_hand or torch.equal(wide.half().float(), wide)
    assert weight_hash(-wide) != by_hand


def test_weight_hash_of_many_blocks_and_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(50, 7) for _ in range(5)]
    wanted = [weight_hash(weight) for weight in weights]
    monkeypatch.setattr(applying, "_BLOCK", 30)
    monkeypatch.setattr(applying.os, "cpu_count", lambda: 4)
    assert [weight_hash(weight) for weight in weights] == wanted
    assert applying._hashes(weights) == wanted


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_stored_weights_have_the_hash_of_loaded_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weight = torch.randn(9, 5).to(dtype)
    save_file({"a": weight, "b": torch.arange(3)}, tmp_path / "model.safetensors")
    tensors = read_header(tmp_path / "model.safetensors").tensors
    assert hash_stored(tensors["a"]) == weight_hash(weight)
    with pytest.raises(CheckpointError, match=r"'b' is I64.*Dequantise"):
        hash_stored(tensors["b"])


def test_names_of_bare_decoders_are_found() -> None:
    assert stored_name("transformer.h.0.w", {"h.0.w": 0, "h.1.w": 0}) == "h.0.w"
    assert stored_name("h.0.w", {"transformer.h.0.w": 0}) == "transformer.h.0.w"
    assert stored_name("a.w", {"x.a.w": 0, "y.a.w": 0}) is None
    assert stored_name("h.0.w", {"th.0.w": 0}) is None


# Facts out and in.


def close(patch: Patch, case: cases.Case, which: Sequence[int], tolerance: float = 1e-9) -> None:
    for layer in patch.layers:
        wanted = case.delta(layer.name, which)
        assert (layer.delta - wanted).norm() <= tolerance * max(1.0, float(wanted.norm()))


@settings(max_examples=30)
@given(
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.permutations(range(6)),
    st.integers(0, 3),
)
def test_drop_and_plus_are_the_fits_of_what_is_held(
    left: list[bool], order: list[int], seed: int
) -> None:
    _, case = made(torch.float64, count=6, seed=seed)
    one, two = [i for i in order if left[i]], [i for i in order if not left[i]]
    whole = case.patch(order)
    close(whole, case, range(6))
    rest = whole.drop([f"f{i}" for i in one])
    assert rest.ids == tuple(f"f{i}" for i in two)
    assert "f0" in rest or 0 in one
    close(rest, case, two)
    summed = case.patch(one) + case.patch(two)
    assert set(summed.ids) == set(whole.ids)
    close(summed, case, range(6))
    close(case.patch(two) + case.patch(one), case, range(6))
    close(summed.drop([f"f{i}" for i in one]), case, two)
    close(rest + case.patch(one), case, range(6))


def test_what_is_dropped_to_nothing_applies_as_nothing() -> None:
    model, case = made(torch.bfloat16)
    before, empty = state(model), case.patch().bind(model).drop([f"f{i}" for i in range(5)])
    assert (len(empty), empty.rank, empty.ids) == (0, 0, ())
    with empty:
        assert same(model, before)
        assert empty.rounding_error == dict.fromkeys(LAYERS, 0.0)
    with empty.apply(how="branch"):
        assert same(model, before)
    assert len(empty + case.patch([1])) == 1


def test_patches_are_values() -> None:
    model, case = made()
    patch = case.patch().bind(model)
    before = [layer.delta for layer in patch.layers]
    with patch:
        rest = patch.drop(["f1"])
        assert rest.applied is None
        assert rest.model is model
        assert patch.drop([]).ids == patch.ids
    assert all(torch.equal(a, b.delta) for a, b in zip(before, patch.layers, strict=True))
    with pytest.raises(AttributeError):
        patch.ridge = torch.ones(5)  # type: ignore[misc]
    for twin in (pickle.loads(pickle.dumps(patch)), copy.deepcopy(patch), copy.copy(patch)):
        assert twin.model is None
        assert twin.applied is None
        assert twin.ids == patch.ids
        twin.apply(model).undo()


def together(case: cases.Case) -> Patch:
    """f0 and f1 share a column."""
    facts = dict(case.patch([0, 2]).facts)
    facts["f1"] = Fact("{} was born in", "Person 0", "Town", id="f1")
    return case.patch([0, 2], columns=[("f0", "f1"), ("f2",)], facts=facts)


@pytest.mark.parametrize(
    ("patch", "ids", "error", "words"),
    [
        (lambda c: c.patch(), ["f11"], ValueError, "no fact with the id 'f11'; did you mean 'f1'"),
        (lambda c: c.patch(), "f1", TypeError, "list of ids"),
        (lambda c: c.patch(joint=False), ["f1"], ValueError, "without history.*history=True"),
        (together, ["f1"], ValueError, "'f1' and 'f0' share one key.*drop all of them, and upsert"),
        (
            lambda c: c.patch(
                layers=[
                    LayerPatch(x.name, x.transposed, x.base_hash, x.U, x.V)
                    for x in c.patch().layers
                ]
            ),
            ["f1"],
            ValueError,
            "slim patch cannot drop facts",
        ),
    ],
)
def test_drops_that_are_refused(
    patch: Callable[[cases.Case], Patch], ids: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        patch(made()[1]).drop(ids)


def test_facts_of_one_column_are_dropped_together() -> None:
    _, case = made(torch.float64)
    close(together(case).drop(["f1", "f0"]), case, [2])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda c: c.patch([1, 2]), "both patches hold 'f1'"),
        (lambda c: c.patch([2], joint=False), "cannot be added.*without history"),
        (
            lambda c: c.patch([2], priors=dict.fromkeys(LAYERS, "x")),
            "different priors .*downs.0",
        ),
        (
            lambda c: c.patch([2], layers=c.patch([2]).layers[:1]),
            "same layers.*'downs.1'",
        ),
        (lambda c: made(torch.bfloat16)[1].patch([2]), "different bases: .*'downs.0'"),
        (
            lambda c: c.patch(
                [2], facts={"x": Fact("{} lives in", "Person 1", "Rome", id="x")}, columns=[("x",)]
            ),
            "contradict each other: 'f1' .'Person 1 lives in City 1'. and 'x'",
        ),
        (
            lambda c: c.patch(
                [2], facts={"x": Fact("{} plays", "Person 1", "chess", id="x")}, columns=[("x",)]
            ),
            "'f1' and 'x' share one key.*upsert",
        ),
    ],
)
def test_sums_that_are_refused(other: Callable[[cases.Case], Patch], words: str) -> None:
    _, case = made()
    with pytest.raises(ValueError, match=words):
        case.patch([0, 1]) + other(case)


def test_keys_at_the_last_token_differ_by_their_relation() -> None:
    _, case = made()
    facts = {"x": Fact("{} plays", "Person 1", "chess", id="x")}
    last = {"options": {"lookup": "last"}}
    other = case.patch([2], facts=facts, columns=[("x",)], **last)
    assert len(case.patch([0, 1], **last) + other) == 3


class Table:
    """An editor that looks keys and targets up; a shared key has the first fact's column."""

    def __init__(self, case: cases.Case) -> None:
        self.case = case
        self.calls: list[list[str]] = []

    def fit(self, facts: Sequence[Fact], after: Patch | None = None) -> Patch:
        self.calls.append([fact.id for fact in facts])
        numbers = [int(fact.subject.split()[-1]) for fact in facts]
        which = sorted(set(numbers))
        columns = [
            tuple(f.id for f, i in zip(facts, numbers, strict=True) if i == j) for j in which
        ]
        new = self.case.patch(which, facts={f.id: f for f in facts}, columns=columns)
        return (new if after is None else after + new).bind(self.case_model, self)

    case_model: nn.Module


def test_upsert_is_the_fit_with_the_new_facts_in_the_place_of_the_old() -> None:
    model, case = made(torch.float64)
    editor = Table(case)
    editor.case_model = model
    patch = editor.fit(case.facts[:3])
    more = patch.upsert([case.facts[3]])
    assert more.ids == ("f0", "f1", "f2", "f3")
    close(more, case, range(4))
    editor.calls.clear()
    renewed = more.upsert([Fact("{} lives in", "Person 1", "Rome", id="f1")])
    assert editor.calls == [["f1"]]
    assert renewed.facts["f1"].target == "Rome"
    assert renewed.ids == ("f0", "f2", "f3", "f1")
    close(renewed, case, range(4))
    # One key, another relation: both are fitted anew, as one column.
    shared = more.upsert([Fact("{} plays", "Person 2", "chess", id="x")])
    assert editor.calls[-1] == ["x", "f2"]
    assert shared.columns[-1] == ("x", "f2")
    # Under another id, but with the text of a fact that is held: in its place.
    replaced = more.upsert([Fact("{} lives in", "Person 0", "Rome", id="y")])
    assert "f0" not in replaced
    assert replaced.facts["y"].target == "Rome"
    with pytest.raises(ValueError, match="knows no editor"):
        case.patch().upsert([case.facts[0]])
    assert case.patch([0]).upsert([case.facts[1]], editor=editor).ids == ("f0", "f1")


def test_the_parts_of_a_patch_must_fit() -> None:
    _, case = made()
    whole = case.patch()
    layer = whole.layers[0]
    for change, words in (
        ({"layers": []}, "at least one layer"),
        ({"layers": [layer, layer]}, "in the patch twice"),
        ({"columns": [("f0",)]}, "has 5 columns, the patch names 1"),
        ({"columns": [("f0",)] * 5}, "every fact must be in a column"),
        ({"columns": [*whole.columns[:4], ("f4", "x")]}, "every fact must be in a column"),
        ({"ridge": torch.ones(2)}, "one number for each of the 5 columns"),
        ({"ridge": -torch.ones(5)}, "0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            case.patch(**change)
    for change, error, words in (
        ({"U": layer.U * math.nan}, ValueError, "U of layer 'downs.0' holds NaN"),
        ({"keys": None}, ValueError, "come together"),
        ({"V": layer.V[:, :2]}, ValueError, r"V of layer 'downs.0' must have the shape \(14, 5\)"),
        ({"targets": layer.V}, ValueError, r"targets .* must have the shape \(10, 5\)"),
        ({"U": [1.0]}, TypeError, "U of layer 'downs.0' must be a tensor"),
    ):
        parts = {name: getattr(layer, name) for name in ("U", "V", "keys", "targets")}
        with pytest.raises(error, match=words):
            LayerPatch("downs.0", False, "", **(parts | change))


def test_it_says_what_it_is() -> None:
    model, case = made()
    patch = case.patch()
    assert repr(patch) == "Patch(memit, 5 facts, rank 5 in 2 layers (downs.0 ... downs.1))"
    one = case.patch([1], layers=case.patch([1]).layers[:1], joint=False).apply(model, "branch")
    words = "Patch(memit, 1 fact, rank 1 in 1 layer (downs.0), not joint, applied (branch))"
    assert repr(one) == words
    one.undo()


def test_reports_follow_their_facts() -> None:
    _, case = made()
    report = {"facts": {f"f{i}": {"loss": i} for i in range(5)}, "seconds": 2.0}
    patch = case.patch(report=report)
    rest = patch.drop(["f1", "f2"])
    assert set(rest.report["facts"]) == {"f0", "f3", "f4"}
    again = rest + case.patch([1], report={"facts": {"f1": {"loss": 9}}}, method="rome")
    assert again.report["facts"]["f1"] == {"loss": 9}
    assert again.report["sum_of"] == [{"seconds": 2.0}, {}]
    assert again.method == "memit + rome"


# In a file.


def rich(case: cases.Case) -> Patch:
    return case.patch(
        options={"layers": [4, 5], "clamp": 0.75, "none": None},
        report={"facts": {"f0": {"loss": math.inf, "steps": 25}}, "layers": {"downs.0": 0.5}},
        facts={
            f.id: Fact(
                f.prompt, f.subject, f"Zürich {i}", id=f.id, weight=1.0 + i, target_true="Bern",
                paraphrases=("a", "b"),
            )
            for i, f in enumerate(case.facts)
        },
    )  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_patch_is_the_patch(dtype: str, transposed: bool, tmp_path: Path) -> None:
    model, case = made(torch.bfloat16, transposed)
    patch = rich(case)
    path = tmp_path / "edits.safetensors"
    patch.save(path, dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["edits.safetensors"]
    loaded = Patch.load(path, model)
    assert loaded.model is model
    assert loaded.facts == patch.facts
    assert loaded.columns == patch.columns
    assert loaded.options == patch.options
    assert loaded.priors == patch.priors
    assert (loaded.method, loaded.joint, loaded.slim) == ("memit", True, False)
    assert loaded.report["facts"]["f0"] == {"loss": "inf", "steps": 25}
    assert torch.equal(loaded.ridge, patch.ridge)
    kind = torch.float32 if dtype == "float32" else torch.float64
    for one, two in zip(patch.layers, loaded.layers, strict=True):
        assert (one.name, one.transposed, one.base_hash) == (
            two.name,
            two.transposed,
            two.base_hash,
        )
        for part in ("U", "V", "keys", "targets"):
            assert torch.equal(getattr(two, part), getattr(one, part).to(kind).double())
    # What is on the weights is the same to the bit, whatever the file holds.
    with patch.apply(model):
        before = state(model)
    with loaded:
        assert same(model, before)
    refit = loaded.drop(["f3"]) + case.patch([3])
    close(refit, case, range(5), 1e-5 if dtype == "float32" else 1e-9)
    again = tmp_path / "again.safetensors"
    loaded.save(again, dtype)
    assert again.read_bytes() == path.read_bytes()


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    _, case = made()
    path = tmp_path / "edits.safetensors"
    rich(case).save(path)
    tensors = load_file(path)
    names = {f"{layer}.{part}" for layer in LAYERS for part in "UVKT"} | {"ridge"}
    assert set(tensors) == names
    assert tensors["downs.0.U"].shape == (10, 5)
    assert tensors["downs.0.K"].dtype == torch.float32
    assert tensors["ridge"].dtype == torch.float64
    header = read_header(path)
    assert header.metadata["format"] == "cl_fast.patch"
    assert header.metadata["version"] == "1"
    assert json.loads(header.metadata["facts"])["f1"]["target"] == "Zürich 1"
    data = path.read_bytes()[header.data_start :]
    assert header.metadata["content"] == hashlib.blake2b(data, digest_size=16).hexdigest()
    stored = read_patch(path)
    assert [layer.weight_name for layer in stored.layers] == [f"{x}.weight" for x in LAYERS]
    assert [layer.shape for layer in stored.layers] == [(10, 14)] * 2
    assert is_patch(path)
    assert not is_patch(tmp_path)
    assert not is_patch(tmp_path / "none.safetensors")


def test_a_slim_patch_is_half_the_size_and_only_applies(tmp_path: Path) -> None:
    model, case = made()
    whole, slim = tmp_path / "whole.safetensors", tmp_path / "slim.safetensors"
    case.patch().save(whole)
    case.patch().save(slim, slim=True)

    def size(path: Path) -> int:
        header = read_header(path)
        return header.file_size - header.data_start

    assert size(slim) * 2 == size(whole) - 8 * 5
    loaded = Patch.load(slim, model)
    assert "slim" in repr(loaded)
    with case.patch().apply(model):
        before = state(model)
    with loaded:
        assert same(model, before)
    for act in (lambda: loaded.drop(["f1"]), lambda: loaded + loaded):
        with pytest.raises(ValueError, match="slim patch cannot"):
            act()
    loaded.save(whole)
    assert Patch.load(whole).slim


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another header over the same data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    body = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data[8 + length :])


def put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["__metadata__"].update({key: value})


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def poison(path: Path) -> None:
    """NaN in the data, under a hash that says so."""
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", math.nan)
    start = read_header(path).data_start
    path.write_bytes(data)
    content = hashlib.blake2b(data[start:], digest_size=16).hexdigest()
    rewrite(path, put("content", content))


def lose(name: str) -> Callable[[Path], Any]:
    return lambda path: rewrite(path, lambda h: h["__metadata__"].pop(name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.unlink(), "there is no such file; give the file that patch.save wrote"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "truncated"),
        (lambda p: p.write_bytes(b""), "too short for a safetensors file"),
        (lambda p: rewrite(p, put("format", "pt")), "no edit patch .* format 'pt'"),
        (lambda p: rewrite(p, put("version", "9")), "version '9'.* reads 1; use the cl_fast"),
        (damage, "not those that were saved"),
        (poison, "T of layer 'downs.1'|targets of layer 'downs.1' holds NaN"),
        (lose("facts"), "the header has no 'facts'; the patch is damaged"),
        (lambda p: rewrite(p, put("columns", "[]")), "do not belong together"),
        (lambda p: rewrite(p, put("joint", "1")), "'joint' of the header is not of the type bool"),
        (lambda p: rewrite(p, put("layers", "[]")), "has no layers"),
        (lambda p: rewrite(p, put("layers", "[{}]")), "does not tell its name"),
        (lambda p: rewrite(p, put("options", "{")), "options: not valid"),
        (
            lambda p: rewrite(p, lambda h: h.update({"x.U": h.pop("downs.1.U")})),
            "no tensor 'downs.1.U'",
        ),
        (
            lambda p: rewrite(p, lambda h: h["downs.1.U"].update(shape=[5, 10])),
            r"'downs.1.U' has the shape \[5, 10\], not \[any, 5\]",
        ),
        (
            lambda p: rewrite(
                p,
                lambda h: h["__metadata__"].update(
                    facts=h["__metadata__"]["facts"].replace('"subject"', '"object"')
                ),
            ),
            "fact 'f0': unknown key 'object'; did you mean 'subject'",
        ),
    ],
)
def test_files_that_are_no_patch_or_damaged(
    change: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "edits.safetensors"
    made()[1].patch().save(path)
    change(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        Patch.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "given", "error", "words"),
    [
        ("edits.pt", {}, ValueError, "must end in .safetensors; got"),
        ("edits.safetensors", {"dtype": "bfloat16"}, ValueError, "dtype must be one of 'float32'"),
        ("none/edits.safetensors", {}, OutputError, "cannot be written"),
    ],
)
def test_saves_that_are_refused(
    path: str, given: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        made()[1].patch().save(tmp_path / path, **given)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_cannot_hold_is_told(tmp_path: Path) -> None:
    _, case = made()
    file = tmp_path / "edits.safetensors"
    with pytest.raises(ValueError, match=r"options.model of the patch must be .*Linear"):
        case.patch(options={"model": nn.Linear(1, 1)}).save(file)
    wide = case.patch()
    huge = LayerPatch("a", False, "", wide.layers[0].U * 1e39, wide.layers[0].V)
    patch = case.patch(layers=[huge])
    with pytest.raises(ValueError, match=r"U of layer 'a' is beyond float32: .*float64"):
        patch.save(file)
    patch.save(file, "float64")
    assert torch.equal(Patch.load(file).layers[0].U, huge.U)


# As a model, and as an adapter.


def test_as_a_model_it_is_merged_in_memory() -> None:
    model, case = made(torch.bfloat16)
    base, patch = state(model), case.patch()
    edited = patch.state_dict(model)
    assert same(model, base)
    for name, value in base.items():
        layer = name.removesuffix(".weight")
        if layer not in LAYERS:
            assert edited[name].data_ptr() == model.state_dict()[name].data_ptr()
            continue
        exact = value.double() + case.delta(layer, range(5))
        assert edited[name].dtype == torch.float32
        assert torch.allclose(edited[name].double(), exact, rtol=2**-23, atol=1e-6)
    merged = ties(base, [patch.state_dict(base)], density=1.0)
    with patch.apply(model):
        now = model.state_dict()
        assert all(torch.equal(merged[name], now[name]) for name in now)


def llama_and_gpt2() -> list[tuple[Any, list[str], bool]]:
    import tiny_models
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 67, "n_positions": 32}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    llama = tiny_models.llama().eval()
    return [
        (llama, [f"model.layers.{i}.mlp.down_proj" for i in range(2)], False),
        (gpt2, [f"transformer.h.{i}.mlp.c_proj" for i in range(2)], True),
    ]


def test_peft_loads_it_as_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for number, (model, names, transposed) in enumerate(llama_and_gpt2()):
        weights = {k: v.detach().clone() for k, v in cases.matrices(model, names).items()}
        case = cases.case_of(weights, transposed=transposed, size=0.3)
        patch = case.patch().bind(model)
        x = torch.arange(1, 9)[None]
        plain = model(x).logits
        with patch.apply(how="branch"):
            wanted = model(x).logits
        assert (wanted - plain).abs().max() > 1e-2
        folder = tmp_path / f"adapter-{number}"
        assert patch.to_peft(folder) == dict.fromkeys(names, 0.0)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        assert (loaded(x).logits - wanted).abs().max() < 1e-5
        config = loaded.peft_config["default"]
        assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (5, 5, transposed)
        errors = patch.to_peft(tmp_path / f"small-{number}", rank=2)
        small = load_file(tmp_path / f"small-{number}" / "adapter_model.safetensors")
        for name in names:
            key = f"base_model.model.{name}.lora"
            product = (small[f"{key}_B.weight"] @ small[f"{key}_A.weight"]).double()
            delta = case.layers[name].fit(range(5), case.ridge)
            sizes = torch.linalg.svdvals(delta)
            best = float(sizes[2:].norm() / sizes.norm())
            assert errors[name] == pytest.approx(best, rel=1e-6)
            assert float((product - delta).norm() / delta.norm()) == pytest.approx(best, rel=1e-4)


def test_adapters_of_layers_that_differ_in_rank(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    weights = {k: v.detach().clone() for k, v in cases.matrices(model, ["0", "2"]).items()}
    patch = cases.case_of(weights).patch().bind(model)
    patch.to_peft(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (5, {"2": 3})
    x = torch.randn(4, 12)
    with patch.apply(how="branch"):
        wanted = model(x)
    config.pop("task_type")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    assert torch.allclose(loaded(x), wanted, atol=1e-5)


def test_truncation_is_the_nearest() -> None:
    draw = torch.Generator().manual_seed(3)
    u, v = (torch.randn(n, 7, generator=draw, dtype=torch.float64) for n in (5, 9))
    for rank in (1, 3, 5, 7):
        left, right, error = truncated(u, v, rank)
        assert left.shape == (5, min(rank, 5))
        distance = (left @ right.T - u @ v.T).norm() / (u @ v.T).norm()
        sizes = torch.linalg.svdvals(u @ v.T)
        assert float(distance) == pytest.approx(
            float(sizes[rank:].norm() / sizes.norm()), abs=1e-12
        )
        assert error == pytest.approx(float(distance), abs=1e-12)


def test_adapters_that_are_refused(tmp_path: Path) -> None:
    _, case = made()
    with pytest.raises(ValueError, match="rank must be at least 1"):
        case.patch().to_peft(tmp_path / "a", rank=0)
    with pytest.raises(ValueError, match="rank 0 does not exist"):
        case.patch([]).to_peft(tmp_path / "a")
    (tmp_path / "a").mkdir()
    case.patch().to_peft(tmp_path / "a")
    with pytest.raises(OutputError, match="exists and is not empty"):
        case.patch().to_peft(tmp_path / "a")
