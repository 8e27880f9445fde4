"""Log-probs of given tokens without the logits, and their sums over sequences.

    logprob_i = z_i[id_i] - log sum_j exp z_ij          z = logits / temperature
    sequence_sums: s_b = sum of the values of sequence b, padded or packed

What DPO, KTO, PPO and GRPO need of a model is one number per token. `token_logprobs` makes it from
hidden states and the head, one chunk of logits at a time; formulas and costs are those of
`cl_fast.ops.logprobs`.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from cl_fast.losses.divergence import _autocast, _cap, _plain, check_finite, check_tensors
from cl_fast.ops.logprobs import linear_logprobs, logprob_rows
from cl_fast.ops.vocabulary_rows import How

__all__ = ["sequence_sums", "token_logprobs", "token_logprobs_from_logits"]


def _lead(name: str, x: Tensor, ids: Tensor) -> torch.Size:
    """The shape of the tokens."""
    if x.dim() == 0:
        raise ValueError(f"{name} must have a last dimension; got a scalar")
    lead = x.shape[:-1]
    if ids.shape != lead:
        raise ValueError(
            f"ids must have the shape of the tokens, {tuple(lead)}; got {tuple(ids.shape)}"
        )
    return lead


def _shaped(
    logprobs: Tensor, entropies: Tensor | None, lead: torch.Size
) -> Tensor | tuple[Tensor, Tensor]:
    if entropies is None:
        return logprobs.reshape(lead)
    return logprobs.reshape(lead), entropies.reshape(lead)


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    entropy: Literal[False] = ...,
    chunk_tokens: int | None = ...,
    debug: bool = ...,
    process_group: Any = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    entropy: Literal[True],
    chunk_tokens: int | None = ...,
    debug: bool = ...,
    process_group: Any = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    chunk_tokens: int | None = None,
    debug: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `ids` under the head `weight` on the hidden states, without the logits.

    Gradients reach hidden, weight and bias, each only where it requires grad. Under autocast hidden
    states and weights are cast as a linear layer casts them.

    Args:
        hidden: [..., H], the last hidden states: padded [B, T, H] or packed [N, H].
        weight: [V, H], the head.
        ids: integer [...], the token that follows each row; `ignore_index` takes the row out.
        bias: [V], or None.
        logit_scale, softcap: of the logits, softcap * tanh(logit_scale * x / softcap).
        temperature: the logits are divided by it.
        ignore_index: the id that takes a row out; such rows cost no product.
        entropy: return the entropies of the rows too. They are differentiable; their gradient makes
            the chunks of logits once more, where one arrives.
        chunk_tokens: rows of a chunk, by default chosen.
        debug: look for NaN, infinities and wrong ids first; on a card this waits for it.
        process_group: the head is split over the ranks of this group by the vocabulary; see
            `cl_fast.losses.parallel`.
        backend: "eager", "native" or "triton", for tests and benchmarks.

    Returns:
        Log-probs [...], float32 (float64 where an input is), 0 for rows that are ignored; with
        `entropy` also the entropies [...] in nats.

    Raises:
        TypeError, ValueError: an argument, named, is wrong. On a card an id out of range is an
            assertion of the device.
    """
    check_tensors(hidden=hidden, weight=weight, ids=ids, bias=bias)
    if process_group is not None:
        from cl_fast.losses import parallel

        result: Tensor | tuple[Tensor, Tensor] = parallel.token_logprobs(
            hidden, weight, ids, bias=bias, logit_scale=logit_scale, softcap=softcap,
            temperature=temperature, ignore_index=ignore_index, entropy=entropy,
            chunk_tokens=chunk_tokens, debug=debug, process_group=process_group, backend=backend,
        )  # fmt: skip
        return result
    hidden, weight = _plain("hidden", hidden), _plain("weight", weight)
    bias = None if bias is None else _plain("bias", bias)
    lead = _lead("hidden", hidden, ids)
    if debug:
        check_finite(hidden=hidden, weight=weight, bias=bias)
    how = How(float(logit_scale), _cap(softcap), float(temperature))
    rows, head, offset = _autocast(hidden.reshape(ids.numel(), hidden.size(-1)), weight, bias)
    assert rows is not None
    assert head is not None
    logprobs, entropies = linear_logprobs(
        rows, head, offset, ids.reshape(-1), ignore=ignore_index, how=how, entropy=entropy,
        chunk_tokens=chunk_tokens, debug=debug, backend=backend,
    )  # fmt: skip
    return _shaped(logprobs, entropies, lead)


@overload
def token_logprobs_from_logits(
    logits: Tensor,
    ids: Tensor,
    *,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    entropy: Literal[False] = ...,
    inplace: bool = ...,
    debug: bool = ...,
    process_group: Any = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def token_logprobs_from_logits(
    logits: Tensor,
    ids: Tensor,
    *,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    entropy: Literal[True],
    inplace: bool = ...,
    debug: bool = ...,
    process_group: Any = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs_from_logits(
    logits: Tensor,
    ids: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    inplace: bool = False,
    debug: bool = False,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of logits that exist already: one pass forward, one backward.

    Args:
        logits: [..., V]; -inf excludes an id.
        logit_scale, softcap: still to be applied to the logits; most models have done so.
        inplace: the backward pass writes the gradient over the logits and so needs no memory; they
            must not be used for anything else. A second backward pass is refused by torch.
        (others): as in `token_logprobs`.
    """
    check_tensors(logits=logits, ids=ids)
    if process_group is not None:
        from cl_fast.losses import parallel

        result: Tensor | tuple[Tensor, Tensor] = parallel.token_logprobs_from_logits(
            logits, ids, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
            ignore_index=ignore_index, entropy=entropy, inplace=inplace, debug=debug,
            process_group=process_group, backend=backend,
        )  # fmt: skip
        return result
    logits = _plain("logits", logits)
    lead = _lead("logits", logits, ids)
    if debug:
        check_finite(logits=logits)
    how = How(float(logit_scale), _cap(softcap), float(temperature))
    logprobs, entropies = logprob_rows(
        logits.reshape(ids.numel(), logits.size(-1)), ids.reshape(-1), ignore=ignore_index, how=how,
        entropy=entropy, inplace=inplace, debug=debug, backend=backend,
    )  # fmt: skip
    return _shaped(logprobs, entropies, lead)


# --- sequences ---------------------------------------------------------------------------------


def sequence_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [tokens]: the sequence of each token of a packed batch; S for what follows the last.

    Args:
        cu_seqlens: integer [S + 1], where sequences begin and the last one ends.

    Raises:
        ValueError, TypeError: it is not such a list; on a card its numbers are not looked at.
    """
    if cu_seqlens.dtype.is_floating_point or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must be integers; got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            "cu_seqlens must be a vector, where sequences begin and the last one ends; got the "
            f"shape {tuple(cu_seqlens.shape)}"
        )
    if not (cu_seqlens.is_cuda or torch.compiler.is_compiling()):
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] > tokens or starts != sorted(starts):
            raise ValueError(
                f"cu_seqlens must rise from 0 to at most the {tokens} tokens; got {starts}"
            )
    at = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(at, cu_seqlens[1:].contiguous(), right=True)


def sequence_sums(
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    sequences: int | None = None,
    average: bool = False,
) -> Tensor:
    """The sums of `values` over sequences: log-probs of tokens to log-probs of answers.

    Args:
        values: padded [..., T], summed over the last dimension; or, where `cu_seqlens` or
            `sequence_ids` is given, of packed tokens in any shape.
        mask: of the shape of `values`; values where it is 0 or False do not count, even NaN.
        cu_seqlens: integer [S + 1], where packed sequences begin and the last one ends.
        sequence_ids: integer, of the shape of `values`: the sequence of each token; negative for
            none. Needs `sequences`.
        sequences: how many sequences there are.
        average: divide by the number of tokens that count, and at least 1.

    Returns:
        [...] or [S], float32 (float64 where the values are).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    counts = torch.ones_like(values, dtype=torch.bool)
    if mask is not None:
        if mask.shape != values.shape:
            raise ValueError(
                f"mask must have the shape of values, {tuple(values.shape)}; got "
                f"{tuple(mask.shape)}"
            )
        counts = mask != 0
    given = torch.where(counts, values, 0).to(wide)
    if cu_seqlens is not None and sequence_ids is not None:
        raise ValueError("cu_seqlens and sequence_ids exclude each other; give one of them")
    if cu_seqlens is None and sequence_ids is None:
        if sequences is not None:
            raise ValueError("sequences needs sequence_ids")
        if values.dim() == 0:
            raise ValueError("values must have a last dimension of tokens; got a scalar")
        sums = given.sum(-1)
        return sums / counts.sum(-1).clamp(min=1) if average else sums
    if cu_seqlens is not None:
        if sequences is not None:
            raise ValueError("sequences needs sequence_ids; cu_seqlens says how many there are")
        index, total = sequence_index(cu_seqlens, values.numel()), cu_seqlens.numel() - 1
    else:
        assert sequence_ids is not None
        index, total = _index_of(sequence_ids, sequences, values.shape)
    # One more bucket, for tokens of no sequence.
    sums = given.new_zeros(total + 1).index_add(0, index, given.reshape(-1))[:total]
    if not average:
        return sums
    number = given.new_zeros(total + 1).index_add(0, index, counts.reshape(-1).to(wide))[:total]
    return sums / number.clamp(min=1)


def _index_of(ids: Tensor, sequences: int | None, shape: torch.Size) -> tuple[Tensor, int]:
    if sequences is None or sequences < 0:
        raise ValueError(
            "sequence_ids needs sequences, how many there are (asking a card would wait for it); "
            f"got {sequences}"
        )
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise TypeError(f"sequence_ids must be integers; got {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(
            f"sequence_ids must have the shape of values, {tuple(shape)}; got {tuple(ids.shape)}"
        )
    wrong = ids >= sequences
    if wrong.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), f"sequence_ids must be below sequences, {sequences}")
    elif wrong.any():
        raise ValueError(f"sequence_ids must be below sequences, {sequences}; got {int(ids.max())}")
    return torch.where(ids < 0, sequences, ids).reshape(-1).long(), sequences
