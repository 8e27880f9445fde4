"""A linear head met one chunk of rows at a time: its logits, and what they owe its inputs.

    Y = X W^T + b       X [M, H] hidden states, W [V, H], Y [M, V] raw logits
    dX = dY W,  dW = dY^T X,  db = sum dY

No more of Y exists than a chunk. Products of low-precision matrices accumulate in float32 and stay
there: logits that are rounded to bfloat16 give gradients that are wrong by percents. The gradient
of a chunk is rounded to the dtype of the weight where tensor cores multiply it, as any training
step in that dtype does; sums over chunks are float32. float64 stays float64.

On the CPU torch has no product of bfloat16 matrices that keeps the accumulator, so the weight is
widened, a block of the vocabulary at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Head", "HeadGradients", "chunks"]

_LOW = (torch.bfloat16, torch.float16)
CHUNK_BYTES = 1 << 26
"""Of the logits of a chunk, at least: smaller chunks would read the weight too often."""
CPU_CHUNK_BYTES = 132 << 20
"""256 rows of 128k ids: products of fewer rows are slow on a CPU."""
_BLOCK_BYTES = 1 << 25
"""Of a widened block of the weight."""


def chunks(
    rows: int,
    columns: int,
    chunk_tokens: int | None = None,
    many: int = 32,
    size: int = CHUNK_BYTES,
) -> list[slice]:
    """Chunks of `rows` rows of logits, equal but for the last one.

    Args:
        rows, columns: of the logits.
        chunk_tokens: rows of a chunk; by default a `many`-th of all of them, but no fewer than what
            fills `size`.
        many: fewer chunks where each reads and writes a sum as large as the weight.
        size: bytes of float32.

    Raises:
        ValueError: `chunk_tokens` is not positive.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1; got {chunk_tokens}")
    if chunk_tokens is None:
        step = max(-(-rows // many), size // (4 * max(1, columns)), 16)
        step = (step + 32) // 64 * 64 or step  # whole tiles of a matrix product
    else:
        step = chunk_tokens
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


class Head:
    """The logits of a linear head, one chunk at a time.

    Args:
        hidden: [M, H].
        weight: [V, H].
        bias: [V], or None.
        index: int64 [C], the rows of `hidden` that count, by default all. Chunks are slices of it.
        recycle: logits of a chunk are made where those of the chunk before were, which are gone
            then; fresh memory of this size costs as much as several passes over it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None = None,
        recycle: bool = False,
    ) -> None:
        self._recycle = recycle
        self._memory: Tensor | None = None
        self.hidden, self.weight, self.bias, self.index = hidden, weight, bias, index
        self.wide = (
            torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
        )
        self.tensor_cores = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in _LOW
        """Products of low-precision matrices whose accumulators are kept."""
        self._widened: Tensor | None = None
        if not self.tensor_cores and weight.dtype == self.wide:
            self._widened = weight
        elif not self.tensor_cores and weight.numel() * self.wide.itemsize <= 2 * _BLOCK_BYTES:
            self._widened = weight.to(self.wide)

    def _place(self, hidden: Tensor) -> Tensor:
        """Memory for the logits of these rows."""
        shape = hidden.size(0), self.weight.size(0)
        if not self._recycle:
            return hidden.new_empty(shape)
        if self._memory is None or self._memory.size(0) < shape[0]:
            self._memory = hidden.new_empty(shape)
        return self._memory[: shape[0]]

    def rows(self, rows: slice) -> Tensor:
        """The hidden states of a chunk, in their dtype."""
        if self.index is None:
            return self.hidden[rows]
        return self.hidden.index_select(0, self.index[rows])

    def blocks(self) -> list[tuple[slice, Tensor]]:
        """The weight in `wide`, by blocks of the vocabulary."""
        if self._widened is not None:
            return [(slice(0, self.weight.size(0)), self._widened)]
        row_bytes = max(1, self.weight.size(1)) * self.wide.itemsize
        return [
            (block, self.weight[block])
            for block in chunks(self.weight.size(0), 1, max(1, _BLOCK_BYTES // row_bytes))
        ]

    def logits(self, rows: slice) -> Tensor:
        """[C, V] in `wide`, contiguous; the caller may overwrite it."""
        hidden = self.rows(rows)
        if self.tensor_cores:
            out = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            hidden = hidden.to(self.wide)
            out = self._place(hidden)
            for block, weight in self.blocks():
                torch.mm(hidden, weight.to(self.wide).t(), out=out[:, block])
        return out if self.bias is None else out.add_(self.bias)


class HeadGradients:
    """The gradients of a head's inputs, summed over chunks in `head.wide`.

    Args:
        head: whose logits were made.
        hidden, weight, bias: which gradients are wanted; the others stay None.
    """

    def __init__(self, head: Head, hidden: bool, weight: bool, bias: bool) -> None:
        self._head = head
        x, w = head.hidden, head.weight
        # Rows that do not count keep 0.
        self.hidden = x.new_zeros(x.shape, dtype=head.wide) if hidden else None
        self.weight = w.new_zeros(w.shape, dtype=head.wide) if weight else None
        self.bias = w.new_zeros(w.size(0), dtype=head.wide) if bias else None
        self._buffer: Tensor | None = None

    @property
    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def target(self, logits: Tensor) -> Tensor:
        """Where the gradient of a chunk's logits belongs: in their place, or in the dtype that the
        products want."""
        if not self._head.tensor_cores:
            return logits
        rows = logits.size(0)
        if self._buffer is None or self._buffer.size(0) < rows:
            self._buffer = logits.new_empty(logits.shape, dtype=self._head.weight.dtype)
        return self._buffer[:rows]

    def add(self, rows: slice, dy: Tensor) -> None:
        """Take the gradient of the chunk's raw logits: [C, V]."""
        head = self._head
        if self.bias is not None:
            self.bias += dy.sum(0, dtype=head.wide)
        if head.tensor_cores:
            self._add_low(rows, dy.to(head.weight.dtype))
            return
        if self.hidden is not None:
            if head.index is None:
                out = self.hidden[rows]
            else:
                out = self.hidden.new_empty((dy.size(0), self.hidden.size(1)))
            for i, (block, weight) in enumerate(head.blocks()):
                wide = weight.to(head.wide)
                if i == 0:
                    torch.mm(dy[:, block], wide, out=out)
                else:
                    out.addmm_(dy[:, block], wide)
            self._place(rows, out)
        if self.weight is not None:
            self.weight.addmm_(dy.t(), head.rows(rows).to(head.wide))

    def scale(self, factor: Tensor) -> None:
        """Multiply all by one number, or the rows of the hidden states that count by one each."""
        if self.hidden is not None:
            index = self._head.index
            if factor.dim() and index is not None:
                factor = factor.new_zeros(self.hidden.size(0)).index_copy_(0, index, factor)
            self.hidden *= factor[:, None] if factor.dim() else factor
        if self.weight is not None:
            self.weight *= factor
        if self.bias is not None:
            self.bias *= factor

    def _add_low(self, rows: slice, dy: Tensor) -> None:
        head = self._head
        if self.hidden is not None:
            self._place(rows, torch.mm(dy, head.weight, out_dtype=torch.float32))
        if self.weight is not None:
            torch.ops.aten.addmm.dtype_out(
                self.weight, dy.t(), head.rows(rows), torch.float32, out=self.weight
            )

    def _place(self, rows: slice, dx: Tensor) -> None:
        assert self.hidden is not None
        if self._head.index is not None:
            self.hidden.index_copy_(0, self._head.index[rows], dx)
        elif self.hidden[rows].data_ptr() != dx.data_ptr():
            self.hidden[rows] = dx
