"""Patches on synthetic keys and targets, solved here in the primal form: no code of cl_fast's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_fast.editing.facts import Fact
from cl_fast.editing.patch import LayerPatch, Patch, weight_hash


@dataclass(frozen=True)
class Layer:
    """The keys, targets and prior of one layer, a column for each fact."""

    K: Tensor
    T: Tensor
    prior: Tensor

    def fit(self, which: Sequence[int], ridge: Tensor) -> Tensor:
        """min |(D K - T) ridge^-1/2|^2 + tr(D C0 D^T) over these columns: [d, f]."""
        K, T, each = self.K[:, which], self.T[:, which], ridge[list(which)]
        return torch.linalg.solve(self.prior + (K / each) @ K.T, (K / each) @ T.T).T


@dataclass(frozen=True)
class Case:
    """Facts with keys and targets in the layers of a model."""

    weights: Mapping[str, Tensor]
    transposed: bool
    layers: Mapping[str, Layer]
    ridge: Tensor
    facts: Sequence[Fact]

    def patch(self, which: Sequence[int] | None = None, **changes: object) -> Patch:
        """The patch of these columns, or of all."""
        which = list(range(len(self.facts))) if which is None else list(which)
        made = []
        for name, layer in self.layers.items():
            K, T = layer.K[:, which], layer.T[:, which]
            V = torch.linalg.solve(layer.prior, K)
            U = T @ torch.linalg.inv(K.T @ V + torch.diag(self.ridge[which]))
            base = weight_hash(self.weights[name])
            made.append(LayerPatch(name, self.transposed, base, U, V, K, T))
        given: dict[str, object] = {
            "layers": made,
            "columns": [(self.facts[i].id,) for i in which],
            "ridge": self.ridge[which],
            "facts": {self.facts[i].id: self.facts[i] for i in which},
            "priors": dict.fromkeys(self.layers, "a prior"),
            "method": "memit",
        }
        return Patch(**(given | changes))  # type: ignore[arg-type]

    def delta(self, name: str, which: Sequence[int]) -> Tensor:
        """What these facts together change, as the weight has it, float64."""
        delta = self.layers[name].fit(which, self.ridge)
        return delta.T if self.transposed else delta


def case_of(
    weights: Mapping[str, Tensor],
    count: int = 5,
    *,
    transposed: bool = False,
    seed: int = 0,
    size: float = 1.0,
) -> Case:
    """A case on these weights (layer -> matrix) with `count` facts f0, f1, ..."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    layers = {}
    for name, weight in weights.items():
        d, f = weight.shape[::-1] if transposed else weight.shape
        roots = noise(f, 2 * f)
        layers[name] = Layer(noise(f, count), size * noise(d, count), roots @ roots.T / (2 * f))
    facts = [Fact("{} lives in", f"Person {i}", f"City {i}", id=f"f{i}") for i in range(count)]
    return Case(
        weights, transposed, layers, 0.5 + torch.rand(count, generator=draw).double(), facts
    )


def matrices(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of some layers of a model."""
    return {name: model.get_submodule(name).weight for name in names}
