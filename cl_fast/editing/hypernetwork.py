"""The hypernetworks of MEND and MALMEN: they make of a token's (x, delta) a better pair.

    z = [(x - mean) / (std + 1e-7); (delta - mean) / (std + 1e-7)]          [f + d]
    two blocks, each                                                       U = 0, V ~ N(0, 1)
        MEND      z <- max(s_m (U V z + b) + t_m, 0) + z
        MALMEN    z <- s_m max(U V z + b, 0) + t_m + z
    x~, delta~ = z[:f], z[f:]

One network serves all matrices of one shape; s_m (ones) and t_m (zeros) belong to matrix m. With
U = 0 it is the identity, and the pair is the normalised one: or, without the normaliser, the
gradient itself. max is `clamp`, whose slope at 0 is 1: `relu` has 0 there, and a network that
begins with U = 0 would never leave it.

Sources: Mitchell et al. 2022 (arXiv 2110.11309), section 3 and its code; Tan et al. 2024 (arXiv
2311.04661). Mean and standard deviation are those of Welford's recurrence, taken over a batch at a
time (Chan et al. 1979).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["GradientTransform", "Moments"]

Form = Literal["mend", "malmen"]

EPSILON = 1e-7


class Moments(nn.Module):  # type: ignore[misc]
    """Mean and standard deviation of the rows seen so far, in float64.

        n' = n + k;  d = mean_k - mean;  mean' = mean + d k / n';  M2' = M2 + M2_k + d^2 n k / n'

    std = sqrt(M2 / (n - 1)), that of the sample, as Welford's recurrence row by row gives it.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Adds rows [k, size]; k may be 0."""
        if not rows.size(0):
            return
        rows = rows.detach().to(torch.float64)
        mean = rows.mean(0)
        squares = (rows - mean).square_().sum(0)
        total = self.count + rows.size(0)
        apart = mean - self.mean
        self.squares += squares + apart.square() * (self.count * rows.size(0) / total)
        self.mean += apart * (rows.size(0) / total)
        self.count.copy_(total)

    @property
    def std(self) -> Tensor:
        return (self.squares / (self.count - 1).clamp_min(1)).sqrt()

    def forward(self, rows: Tensor) -> Tensor:
        """(rows - mean) / (std + 1e-7), in the dtype of the rows.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        if float(self.count) < 2:
            raise ValueError(
                f"the normaliser has seen {int(self.count)} tokens, and needs two: train the "
                "editor first"
            )
        return (rows - self.mean.to(rows.dtype)) / (self.std.to(rows.dtype) + EPSILON)


class Block(nn.Module):  # type: ignore[misc]
    """One residual layer of rank r: see the module."""

    def __init__(
        self,
        size: int,
        rank: int,
        modes: int,
        form: Form,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.form = form
        self.U = nn.Parameter(torch.zeros(size, rank, dtype=dtype))
        self.V = nn.Parameter(torch.randn(rank, size, dtype=dtype, generator=generator))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(modes, size, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(modes, size, dtype=dtype))

    def forward(self, z: Tensor, mode: int) -> Tensor:
        a = (z @ self.V.T) @ self.U.T + self.bias
        if self.form == "mend":
            return (a * self.scale[mode] + self.shift[mode]).clamp(min=0) + z
        return a.clamp(min=0) * self.scale[mode] + self.shift[mode] + z


class GradientTransform(nn.Module):  # type: ignore[misc]
    """The network of all matrices of one shape.

    Args:
        inputs, outputs: f and d.
        modes: how many matrices share it.
        rank: of U V, at most f + d.
        blocks: how many residual layers.
        norm: x and delta are normalised first.
        form: "mend" or "malmen".
        dtype: of its weights, and of what it computes.
        generator: of V, on the CPU.
        chunk_tokens: rows that go through at a time.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        modes: int,
        rank: int,
        blocks: int,
        norm: bool,
        form: Form,
        dtype: torch.dtype,
        generator: torch.Generator,
        chunk_tokens: int,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.norm = inputs, outputs, norm
        self.chunk_tokens, self.dtype = chunk_tokens, dtype
        size = inputs + outputs
        self.moments = Moments(size)
        self.blocks = nn.ModuleList(
            Block(size, min(rank, size), modes, form, dtype, generator) for _ in range(blocks)
        )

    def observe(self, x: Tensor, delta: Tensor) -> None:
        """Adds rows to the normaliser's moments."""
        for start in range(0, x.size(0), self.chunk_tokens):
            rows = slice(start, start + self.chunk_tokens)
            self.moments.update(torch.cat([x[rows], delta[rows]], 1))

    def _rows(self, x: Tensor, delta: Tensor, mode: int) -> Tensor:
        z = torch.cat([x, delta], 1).to(self.dtype)
        if self.norm:
            z = self.moments(z)
        for block in self.blocks:
            z = block(z, mode)
        return z

    def forward(self, x: Tensor, delta: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """x~ [n, f] and delta~ [n, d] of matrix `mode`, of x [n, f] and delta [n, d].

        More than `chunk_tokens` rows go through in parts, which the backward pass makes again: the
        memory of activations is that of one part.
        """
        parts = []
        for start in range(0, max(1, x.size(0)), self.chunk_tokens):
            rows = slice(start, start + self.chunk_tokens)
            if torch.is_grad_enabled() and x.size(0) > self.chunk_tokens:
                z = checkpoint(self._rows, x[rows], delta[rows], mode, use_reentrant=False)
            else:
                z = self._rows(x[rows], delta[rows], mode)
            parts.append(z)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[:, : self.inputs], whole[:, self.inputs :]
