"""Second moments of inputs, and the directions chosen from them, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import NoLogits, batch, llama
from torch import Tensor, nn

from cl_fast.training.subspaces import (
    extend_basis,
    input_moments,
    linear_layers,
    weight_subspace,
)


class Mlp(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.one = nn.Linear(width, 5)
        self.two = nn.Linear(width, 4)
        self.last = nn.Linear(5, 3)
        self.drop = nn.Dropout()  # not while inputs are collected

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        return self.last(self.drop(torch.tanh(one))) + two[..., :3]


def rows(seed: int, count: int, width: int = 6, rank: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g, dtype=torch.float64)
    if rank is not None:
        x = x[:, :rank] @ torch.randn(rank, width, generator=g, dtype=torch.float64)
    return x


def energies(x: np.ndarray, old: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """GPM by the singular values of the inputs: what is spanned already, and the residual's."""
    total, inside = (x**2).sum(), 0.0
    if old is not None:
        inside = ((x @ old) ** 2).sum()
        x = x - x @ old @ old.T
    return inside / total, np.linalg.svd(x, compute_uv=False) ** 2 / total


def test_layers_are_all_but_the_head() -> None:
    model = llama()
    names = list(linear_layers(model))
    assert len(names) == 14
    assert all(".layers." in name for name in names)
    only = linear_layers(model, r".*\.1\.mlp\.(up|gate)_proj")
    assert list(only) == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert list(linear_layers(model, "lm_head")) == ["lm_head"]


def test_moments_are_sums_of_outer_products_of_inputs() -> None:
    model = Mlp().double()
    x = rows(0, 24).view(4, 6, 6)
    layers = linear_layers(model)
    found = input_moments(model, [{"x": x[:2]}, {"x": x[2:], "labels": x}], layers)
    inputs = x.flatten(0, 1).numpy()
    np.testing.assert_allclose(found["one"].numpy(), inputs.T @ inputs, rtol=1e-12, atol=1e-12)
    hidden = np.tanh(inputs @ model.one.weight.detach().numpy().T + model.one.bias.detach().numpy())
    np.testing.assert_allclose(found["last"].numpy(), hidden.T @ hidden, rtol=1e-12)
    assert found["two"] is found["one"]
    assert not model.one._forward_pre_hooks


def test_padding_is_left_out_and_no_logits_are_made() -> None:
    model = llama().double()
    layers = linear_layers(model)
    given = batch(size=3, length=9)
    mask = given["attention_mask"]
    assert not mask.all()
    inputs: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: inputs.__setitem__(n, a[0].detach()))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=given["input_ids"], attention_mask=mask)
    for hook in hooks:
        hook.remove()
    model.train()
    with NoLogits(8):
        found = input_moments(model, [given], layers)
    assert model.training
    for name in layers:
        x = inputs[name][mask.bool()].numpy()
        np.testing.assert_allclose(found[name].numpy(), x.T @ x, rtol=1e-9, atol=1e-12)
    # Seven layers per block, of which query, key, value share one input, and gate and up another.
    assert len({id(c) for c in found.values()}) == 8
    with pytest.raises(AssertionError, match="logits"), NoLogits(8):
        input_moments(model, [given], {**layers, "lm_head": model.lm_head})


def test_tokens_end_the_collection() -> None:
    model, drawn = llama(), []

    def stream() -> Any:
        for seed in range(9):
            drawn.append(seed)
            yield batch(seed, size=3, length=9)  # 25 tokens that count

    layers = linear_layers(model, r".*\.0\.mlp\.down_proj")
    input_moments(model, stream(), layers, tokens=51, dtype=torch.float32)
    assert drawn == [0, 1, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.999), st.integers(1, 6))
def test_as_few_directions_as_reach_the_energy(seed: int, energy: float, rank: int) -> None:
    x = rows(seed, 15, rank=rank)
    basis = extend_basis(None, x.t() @ x, energy=energy, floor=2.0**-44)
    _, values = energies(x.numpy())
    assert basis.size(1) == int((np.cumsum(values) < energy).sum()) + 1
    assert basis.size(1) <= rank
    spanned, _ = energies(x.numpy(), basis.numpy())
    assert spanned >= energy - 1e-9
    torch.testing.assert_close(basis.t() @ basis, torch.eye(basis.size(1), dtype=torch.float64))


def test_a_later_task_adds_what_is_not_spanned() -> None:
    first, second = rows(1, 20, 12, rank=3), rows(2, 20, 12, rank=4)
    old = extend_basis(None, first.t() @ first, energy=1.0, floor=2.0**-44)
    assert old.size(1) == 3
    both = torch.cat([second, 5 * first])
    new = extend_basis(old, both.t() @ both, energy=1.0, floor=2.0**-44)
    assert new.size(1) == 7
    np.testing.assert_allclose((new[:, :3] @ new[:, :3].t()).numpy(), (old @ old.t()).numpy(),
                               atol=1e-12)  # fmt: skip
    assert float((second - second @ new @ new.t()).norm()) < 1e-10
    # An energy that is reached by the old directions asks for no new one.
    inside, _ = energies(both.numpy(), old.numpy())
    assert extend_basis(old, both.t() @ both, energy=inside * 0.999).size(1) == 3
    assert extend_basis(old, both.t() @ both, energy=min(1.0, inside * 1.001)).size(1) > 3
    assert extend_basis(old, both.t() @ both, energy=1.0, rank=5).size(1) == 5
    # All is spanned already, up to rounding.
    assert extend_basis(new.float(), first.t() @ first, energy=1.0).size(1) == 7


def test_rounding_is_no_direction() -> None:
    x = rows(3, 40, 16, rank=5).float()
    model = nn.Sequential(nn.Linear(16, 2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net = Net()
    (total,) = input_moments(net, [{"x": x}], linear_layers(net)).values()
    assert total.dtype == torch.float64
    assert extend_basis(None, total, energy=1.0).size(1) == 5


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_leading_singular_directions(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u0, s, vt = np.linalg.svd(w.numpy(), full_matrices=False)
    u, v = weight_subspace(w, rank=3)
    np.testing.assert_allclose((u @ u.t()).numpy(), u0[:, :3] @ u0[:, :3].T, atol=1e-10)
    np.testing.assert_allclose((v @ v.t()).numpy(), vt[:3].T @ vt[:3], atol=1e-10)
    share = np.cumsum(s**2) / (s**2).sum()
    assert weight_subspace(w, energy=0.8)[0].size(1) == int((share < 0.8).sum()) + 1
    assert weight_subspace(w, energy=1.0)[0].size(1) == min(shape)
    assert weight_subspace(w, energy=1.0, rank=2)[1].size(1) == 2
    assert weight_subspace(w * 0, rank=3)[0].size(1) == 0
    low = w[:, :2] @ w[:2]
    u, v = weight_subspace(low.float(), rank=5)
    assert u.size(1) == v.size(1) == 2
    for basis in (u, v):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(2, dtype=torch.float64))


def quantised() -> nn.Module:
    model = Mlp()
    model.two.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class Repeating(Mlp):
    times = 1

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.one(x.repeat(1, self.times, 1))


LAYERS = Mlp().double()
X = rows(5, 8)
EYE = torch.eye(3, dtype=torch.float64)
MASK = torch.ones(2, 4)
REPEATING = Repeating()
GIVEN = {"x": X.float().view(2, 4, 6), "attention_mask": MASK}
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: linear_layers(quantised()), ValueError, "two.weight is quantised"),
    (lambda: linear_layers(tied()), ValueError, "0.weight is also 1.weight"),
    (lambda: linear_layers(nn.Sequential(nn.LayerNorm(3))), ValueError, "no linear layer"),
    (lambda: linear_layers(Mlp(), "three"), ValueError, "matches 'three'"),
    (lambda: linear_layers(llama(tie_word_embeddings=True), "lm_head"), ValueError, "is also"),
    (lambda: input_moments(LAYERS, [], linear_layers(LAYERS)), ValueError, "no tokens"),
    (lambda: input_moments(LAYERS, [{"y": X}], linear_layers(LAYERS)), ValueError, "['y']"),
    (lambda: input_moments(LAYERS, [{"x": X * torch.nan}], linear_layers(LAYERS)), ValueError,
     "inputs of one are not finite"),
    (lambda: input_moments(LAYERS, [{"x": X}], linear_layers(LAYERS), tokens=0), ValueError,
     "tokens must be"),
    (lambda: input_moments(LAYERS, [{"x": X}], linear_layers(LAYERS), dtype=torch.bfloat16),
     TypeError, "dtype must be"),
    (lambda: input_moments(LAYERS, [{"x": X}], linear_layers(LAYERS), dtype=torch.float32),
     TypeError, "one has float64 inputs"),
    (lambda: input_moments(REPEATING, [GIVEN], linear_layers(REPEATING)), ValueError,
     "two was not called"),
    (lambda: input_moments(REPEATING, [{**GIVEN, "attention_mask": MASK[:, None, None]}],
                           {"one": REPEATING.one}), ValueError, "must be [batch, length]"),
    (lambda: input_moments(LAYERS, [{"x": X}], {"four": nn.Linear(2, 2)}), ValueError,
     "four was not called"),
    (lambda: extend_basis(None, EYE, energy=1.5), ValueError, "energy must be"),
    (lambda: extend_basis(None, EYE[:2], energy=0.5), ValueError, "moments must be [d, d]"),
    (lambda: extend_basis(EYE[:2], EYE, energy=0.5), ValueError, "basis must be [3, k]"),
    (lambda: extend_basis(None, EYE * 0, energy=0.5), ValueError, "not zero"),
    (lambda: weight_subspace(EYE), ValueError, "energy or rank"),
    (lambda: weight_subspace(EYE, energy=-0.1), ValueError, "energy must be"),
    (lambda: weight_subspace(EYE, rank=-1), ValueError, "rank must not"),
    (lambda: weight_subspace(EYE / 0, rank=1), ValueError, "not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_inputs_that_the_mask_does_not_describe() -> None:
    model = Repeating()
    model.times = 2
    with pytest.raises(ValueError, match=r"one has inputs of the shape \(2, 8, 6\)"):
        input_moments(model, [GIVEN], {"one": model.one})
    assert not model.one._forward_pre_hooks
