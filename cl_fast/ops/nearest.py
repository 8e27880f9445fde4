"""The nearest key of each query: the gate of stores that keep facts outside the weights.

    score_t = max_i s_ti          s_ti = q_t . k_i + b_i
    index_t = the lowest i with s_ti = score_t

    largest product       b = None
    largest cosine        normalised keys; score_t / |q_t| is the cosine, with the same index
    least distance        b_i = -|k_i|^2 / 2; then |q_t - k_i|^2 = |q_t|^2 - 2 s_ti
    a key switched off    b_i = -inf

A score of NaN or -inf is no candidate: a broken key hides no other one, a broken query finds
nothing. Where no candidate is left, n = 0 included, the score is -inf and the index -1.

Products and sums are float32 (float64 for float64), whatever the dtype of the keys; the scores
that are compared are these sums. The matrix [T, n] of all scores is never made: the reference
holds a block of bounded size, the Triton kernel a tile on the chip. There is no gradient.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cl_fast.backends import check_backend

__all__ = ["nearest_key"]

_OFFERED = ("eager", "triton")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_BLOCK = 8 << 20
"""Bytes of a block of scores: bounds the temporaries of the reference."""
_KEY_BLOCK = 16 << 20
"""Bytes of the keys, or queries, that are widened at a time."""


# What a call must look like.


def _check(queries: Tensor, keys: Tensor, bias: Tensor | None) -> None:
    """Raise unless these are the arguments of one search."""
    named = [("queries", queries), ("keys", keys)]
    for name, x in named:
        if x.dtype not in _FLOATS:
            raise TypeError(
                f"{name} must have one of the dtypes bfloat16, float16, float32, float64; "
                f"got {x.dtype}"
            )
        if x.dim() != 2:
            raise ValueError(f"{name} must have the shape [count, d]; got {tuple(x.shape)}")
    if keys.dtype != queries.dtype:
        raise TypeError(
            f"keys must have the dtype of queries, {queries.dtype}; got {keys.dtype}. Convert one"
        )
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(
            f"keys must have the width of queries, {queries.shape[1]}; got {keys.shape[1]}"
        )
    if bias is not None:
        if bias.dtype != _wide(keys):
            raise TypeError(f"bias must be {_wide(keys)} for {keys.dtype} keys; got {bias.dtype}")
        if tuple(bias.shape) != (keys.shape[0],):
            raise ValueError(
                f"bias must have one number for each of the {keys.shape[0]} keys; got the shape "
                f"{tuple(bias.shape)}"
            )
        named.append(("bias", bias))
    for name, x in named[1:]:
        if x.device != queries.device:
            raise ValueError(
                f"{name} must be on the device of queries, {queries.device}; got {x.device}"
            )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# The reference, in plain torch.


def _eager(queries: Tensor, keys: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    count, d = queries.shape
    wide = _wide(queries)
    score = torch.full((count,), float("-inf"), dtype=wide, device=queries.device)
    index = torch.full((count,), -1, dtype=torch.int64, device=queries.device)
    size = 8 if wide == torch.float64 else 4
    most = max(1, _KEY_BLOCK // (size * max(d, 1)))
    # Keys are the long side: they are read, and widened, once for as many queries as possible.
    rows = min(max(count, 1), most, max(1, _BLOCK // (size * 256)))
    columns = min(most, max(1, _BLOCK // (size * rows)))
    with torch.autocast(queries.device.type, enabled=False):
        for top in range(0, count, rows):
            some = queries[top : top + rows].to(wide)
            lines = some.shape[0]
            if lines == 1:
                # A product of a matrix and one vector may round equal keys differently.
                some = some.expand(2, d)
            best, where = score[top : top + rows], index[top : top + rows]
            for first in range(0, keys.shape[0], columns):
                part = keys[first : first + columns].to(wide)
                sums = torch.mm(some, part.t())[:lines]
                if bias is not None:
                    sums += bias[first : first + columns]
                sums.masked_fill_(sums.isnan(), float("-inf"))
                at = sums.argmax(1)  # the first of equal ones
                found = sums.gather(1, at[:, None])[:, 0]
                better = found > best
                best.copy_(torch.where(better, found, best))
                where.copy_(torch.where(better, at + first, where))
    return score, index


def _triton(device: torch.device, backend: str | None) -> ModuleType | None:
    """The Triton kernels where they serve; None means eager."""
    if backend is not None:
        check_backend(backend, device.type, _OFFERED)
    if backend == "eager" or (backend is None and device.type != "cuda"):
        return None
    from cl_fast.backends import triton

    kernels = triton.load("nearest")
    if kernels is None and backend == "triton":
        raise RuntimeError("backend='triton' cannot be used: triton is not installed")
    return kernels


def _search(
    queries: Tensor, keys: Tensor, bias: Tensor | None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    kernels = _triton(queries.device, backend)
    if kernels is None or queries.dtype == torch.float64 or not queries.numel() or not len(keys):
        return _eager(queries, keys, bias)
    score = torch.empty(len(queries), dtype=torch.float32, device=queries.device)
    index = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    kernels.nearest_key(queries, keys, bias, score, index)
    return score, index


# The op, as torch knows it.


def _nearest_key(queries: Tensor, keys: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(queries, keys, bias)
    return _search(queries, keys, bias)


def _nearest_key_fake(queries: Tensor, keys: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(queries, keys, bias)
    count = queries.shape[0]
    score = torch.empty(count, dtype=_wide(queries), device=queries.device)
    return score, torch.empty(count, dtype=torch.int64, device=queries.device)


_op = torch.library.custom_op("cl_fast::nearest_key", _nearest_key, mutates_args=())
_op.register_kernel("cpu")(_nearest_key)
_op.register_kernel("cuda")(_nearest_key)
_op.register_fake(_nearest_key_fake)


# What a caller sees.


def nearest_key(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """For each query the largest q.k + bias over the keys, and which key has it.

    Args:
        queries: [T, d]; bfloat16, float16, float32 or float64.
        keys: [n, d] of the same dtype; n may be 0.
        bias: [n], float32, or float64 for float64 keys; -inf switches a key off.
        backend: "eager" or "triton", for tests and benchmarks; otherwise the fastest there is.

    Returns:
        score: [T], float32, or float64 for float64 keys; -inf where no key is a candidate.
        index: [T], int64; of equal scores the lowest index, -1 where no key is a candidate. A
            score of NaN or -inf is no candidate.

    Neither has a gradient: backward through the score raises.

    Raises:
        TypeError: not a tensor, a dtype that is not supported or differs.
        ValueError: shapes or devices do not fit, unknown `backend`.
    """
    for name, x in (("queries", queries), ("keys", keys), ("bias", bias)):
        if not isinstance(x, Tensor) and not (name == "bias" and x is None):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if backend is None:
        score, index = _op(queries, keys, bias)
        return score, index
    _check(queries, keys, bias)
    with torch.no_grad():
        return _search(queries, keys, bias, backend)
