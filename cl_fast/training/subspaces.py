"""Subspaces to protect: of the inputs that a layer has seen, and of its weight.

    C   = sum_tokens x x^T                         input_moments, [d, d] per layer
    C'  = (I - M M^T) C (I - M M^T)                what the basis M does not span yet
    M  <- [M, leading eigenvectors of C']          extend_basis, until
          tr(M^T C M) >= energy tr(C)
    W  ~= U_k S_k V_k^T                            weight_subspace, the leading singular directions

The energy of a direction is the sum of squares of the inputs along it: an eigenvalue of C, which is
a squared singular value of the matrix of inputs. That is the criterion of GPM (Saha et al. 2021,
arXiv 2103.09762, eq. 9). The code of InfLoRA (Liang and Li 2024, arXiv 2404.00228) takes the
singular values of C for those of the inputs and squares them again, so its thresholds mean fewer
directions than the same numbers here.

Eigenvectors and factorisations are float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_fast.models.heads import Evaluating, forward_names, hidden_states, unwrap
from cl_fast.models.sharding import local, reshard, this_rank
from cl_fast.ops import gram_
from cl_fast.options import at_least, share

__all__ = ["extend_basis", "input_moments", "linear_layers", "weight_subspace"]

_NOT_INPUTS = ("labels", "shift_labels", "num_items_in_batch")


def linear_layers(model: nn.Module, layers: str | None = None) -> dict[str, nn.Linear]:
    """The linear layers of `model` by their names, in its order.

    Args:
        model: any; not wrapped.
        layers: a regular expression that a whole name must match. None for all but the output head
            (`get_output_embeddings`).

    Raises:
        ValueError: there is none; one of them is quantised, or shares its weight with another
            module.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    pattern = None if layers is None else re.compile(layers)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module is head if pattern is None else pattern.fullmatch(name) is None:
            continue
        weight = module.weight
        if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            raise ValueError(
                f"{name}.weight is quantised ({weight.dtype}): the update of a weight can be "
                "projected only where it is stored in 16 bits or more. Load the model without "
                "quantisation, or leave the layer out with `layers`"
            )
        shared = [other for other in owners.get(id(weight), ()) if other != f"{name}.weight"]
        if shared:
            raise ValueError(
                f"{name}.weight is also {shared[0]}: two layers move it, so that no basis protects "
                "it. Leave it out with `layers`"
            )
        found[name] = module
    if not found:
        kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "weight")}
        which = "" if layers is None else f" whose name matches {layers!r}"
        raise ValueError(
            f"{type(model).__name__} has no linear layer{which} (nn.Linear); modules with weights "
            f"are {sorted(kinds)}"
        )
    return found


class _Collector:
    """Adds the inputs of layers to their sums while a model runs."""

    def __init__(self, layers: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self.sums: dict[str, Tensor] = {}
        self.source: dict[str, str] = {}
        self.mask: Tensor | None = None
        # Kept alive, so that no other tensor takes its place in memory.
        self.last: tuple[Tensor, str] | None = None

    def hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.add(name, args[0] if args else next(iter(kwargs.values())))

        return see

    def add(self, name: str, given: Tensor) -> None:
        shares = self.last is not None and self.last[0] is given
        source = self.last[1] if shares and self.last is not None else name
        known = self.source.setdefault(name, source)
        if known != source:
            raise ValueError(
                f"{name} has its inputs in common with {known!r} in one batch and with {source!r} "
                "in another: how this model calls its layers depends on the data. Leave it out "
                "with `layers`"
            )
        if shares and source != name:
            return
        self.last = (given, name)
        x = given.detach()
        rows = x.reshape(-1, x.shape[-1])
        if name not in self.sums:
            size = rows.size(1)
            self.sums[name] = torch.zeros(size, size, dtype=self.dtype, device=rows.device)
        total = self.sums[name]
        if rows.dtype == torch.float64 != total.dtype:
            raise TypeError(f"{name} has float64 inputs: moments must be float64, not {self.dtype}")
        gram_(total, rows, mask=self._of(name, x))

    def _of(self, name: str, x: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        if x.shape[:-1] == self.mask.shape:
            return self.mask.reshape(-1).to(x.device)
        if x.dim() == 2 and x.size(0) == self.mask.size(0):
            return None  # one row per sequence: a pooled state
        raise ValueError(
            f"{name} has inputs of the shape {tuple(x.shape)}, which the attention mask "
            f"{tuple(self.mask.shape)} does not describe. Leave the layer out with `layers`"
        )


def _summed(number: int, device: torch.device, lowest: bool = False) -> int:
    if this_rank()[1] == 1:
        return number
    counted = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(counted, op=dist.ReduceOp.MIN if lowest else dist.ReduceOp.SUM)
    return int(counted)


def input_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Mapping[str, nn.Module],
    *,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """C = sum x x^T over the tokens of `batches`, for the inputs x of each layer.

    The model runs in eval mode, without gradients and without logits. A batch may hold an
    `attention_mask` [batch, length]; positions of 0 are left out. Layers that are called with the
    same tensor one after the other (query, key, value; gate, up) share one C: the same tensor.
    With several processes the sums are those of all of them; stop when the first has no batch left.

    Costs 2 T d^2 FLOPs and d^2 numbers of `dtype` for each group of layers, besides the forward
    passes.

    Args:
        model: whose layers `layers` are.
        batches: what its forward takes, on its device; labels and unknown names are left out.
        layers: by name, as `linear_layers` gives them.
        tokens: stop after the batch with which so many have been seen; None for no end.
        dtype: of C, float64 or float32. Products of float32 or lower inputs are float32.

    Returns:
        Name -> [d_in, d_in].

    Raises:
        ValueError: no tokens at all; a layer that was not called; inputs that are not finite, or
            whose shape the attention mask does not describe.
    """
    if tokens is not None:
        at_least("tokens", tokens, 1)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64; got {dtype}")
    inner = unwrap(model)
    names = forward_names(inner)  # none where it takes anything
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    headless = isinstance(head, nn.Linear) and all(head is not m for m in layers.values())
    collector = _Collector(layers, dtype)
    hooks = [
        module.register_forward_pre_hook(collector.hook(name), with_kwargs=True)
        for name, module in layers.items()
    ]
    device = local(next(model.parameters())).device
    seen = 0
    stream = iter(batches)
    try:
        with torch.no_grad(), Evaluating(model):
            while tokens is None or seen < tokens:
                batch = next(stream, None)
                if not _summed(int(batch is not None), device, lowest=True):
                    break
                assert batch is not None
                given = {
                    k: v
                    for k, v in batch.items()
                    if k not in _NOT_INPUTS and (not names or k in names)
                }
                if not given:
                    raise ValueError(
                        f"a batch with the names {sorted(batch)} holds nothing that the forward "
                        f"pass of {type(inner).__name__} takes"
                    )
                collector.mask = _mask_of(given)
                collector.last = None
                if headless:
                    hidden_states(model, **given)
                else:
                    model(**given)
                    reshard(model)
                seen += _summed(_tokens_of(given, collector.mask), device)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("batches hold no tokens: nothing to protect can be told from them")
    missing = [name for name in layers if name not in collector.source]
    if missing:
        raise ValueError(
            f"{missing[0]} was not called by the model's forward pass: leave it out with `layers`"
        )
    for name, total in collector.sums.items():
        if this_rank()[1] > 1:
            dist.all_reduce(total)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"the inputs of {name} are not finite")
    return {name: collector.sums[collector.source[name]] for name in layers}


def _mask_of(batch: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be [batch, length]; got {shape}")
    return mask != 0


def _tokens_of(batch: Mapping[str, Any], mask: Tensor | None) -> int:
    if mask is not None:
        return int(mask.sum())
    first = batch.get("input_ids", next(v for v in batch.values() if isinstance(v, Tensor)))
    floating = first.dtype.is_floating_point  # features, not ids
    return math.prod(first.shape[:-1] if floating and first.dim() > 1 else first.shape)


def extend_basis(
    basis: Tensor | None,
    moments: Tensor,
    *,
    energy: float,
    rank: int | None = None,
    floor: float = 2.0**-20,
) -> Tensor:
    """The basis with the directions added that `moments` needs to reach `energy`: GPM's update.

    Args:
        basis: [d, k] orthonormal, of earlier inputs; or None.
        moments: C, [d, d].
        energy: which share of tr(C) the result spans at least, from 0 to 1.
        rank: at most so many columns; None for d.
        floor: a direction with less than this part of the largest eigenvalue is taken for
            rounding, and never added. 2^-20 is right for products of float32; those of float64
            allow 2^-44.

    Returns:
        [d, k'] float64, orthonormal; the first k columns span what `basis` does.

    Raises:
        ValueError: shapes that do not fit, moments that are zero or not finite, a share out of
            range.
    """
    share("energy", energy)
    if moments.dim() != 2 or moments.size(0) != moments.size(1):
        raise ValueError(f"moments must be [d, d]; got the shape {tuple(moments.shape)}")
    d = moments.size(0)
    if basis is not None and (basis.dim() != 2 or basis.size(0) != d or basis.size(1) > d):
        raise ValueError(
            f"basis must be [{d}, k] for these moments, k <= {d}; got {tuple(basis.shape)}"
        )
    c = moments.to(torch.float64)
    total = float(c.trace())
    if not math.isfinite(total) or total <= 0.0:
        raise ValueError(f"moments must be finite and not zero; their trace is {total}")
    m = c.new_empty(d, 0)
    if basis is not None and basis.size(1):
        m = torch.linalg.qr(basis.to(c)).Q
    room = (d if rank is None else min(rank, d)) - m.size(1)
    inside = float((m.t() @ c @ m).trace()) if m.size(1) else 0.0
    if room <= 0 or inside >= energy * total:
        return m
    rest = c - m @ (m.t() @ c)
    rest = rest - (rest @ m) @ m.t()
    values, vectors = torch.linalg.eigh((rest + rest.t()) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    count = _count(values, (energy * total - inside), min(room, d - m.size(1)))
    # Of the whole C: after a task that is spanned already, all that is left is rounding.
    largest = max(float(values[0]), inside / max(1, m.size(1)))
    count = min(count, int((values > floor * largest).sum()))
    new = vectors[:, :count]
    new = new - m @ (m.t() @ new)
    return torch.linalg.qr(torch.cat([m, new], 1)).Q


def _count(values: Tensor, wanted: float, most: int) -> int:
    """How many of the descending `values` add up to `wanted`; at most `most`."""
    reached = values.clamp(min=0.0).cumsum(0)
    return min(most, int((reached < wanted * (1.0 - 1e-12)).sum()) + 1)


def weight_subspace(
    weight: Tensor, *, energy: float | None = None, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """The leading singular directions of a weight: OSF's protected part.

    By the eigenvectors of W W^T (of W^T W where that is smaller) in float64.

    Args:
        weight: [m, n]; a DTensor is gathered.
        energy: as many directions as hold this share of the sum of squares.
        rank: at most so many directions. One of the two must be given.

    Returns:
        U [m, k] and V [n, k], float64, each orthonormal. No more directions than W has: singular
        values under 2^-20 of the largest are taken for zero (2^-24 for a float64 weight).

    Raises:
        ValueError: neither energy nor rank, one out of range, a weight that is not finite.
    """
    if energy is None and rank is None:
        raise ValueError("energy or rank must be given")
    if energy is not None:
        share("energy", energy)
    if rank is not None and rank < 0:
        raise ValueError(f"rank must not be negative; got {rank}")
    whole: Any = weight.detach()
    w = (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).to(torch.float64)
    if not bool(torch.isfinite(w).all()):
        raise ValueError("the weight has values that are not finite")
    wide = w.size(0) <= w.size(1)
    a = w if wide else w.t()
    values, vectors = torch.linalg.eigh(a @ a.t())
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    most = len(values) if rank is None else min(rank, len(values))
    # Eigenvalues are squares; those of a product in float64 are exact to about 2^-50.
    least = 2.0**-48 if weight.dtype == torch.float64 else 2.0**-40
    count = min(most, int((values > least * values[0]).sum()))
    if energy is not None:
        enough = _count(values, energy * float(values.sum()), most) if energy > 0.0 else 0
        count = min(count, enough)
    one = vectors[:, :count]
    # Its columns are orthogonal but for rounding: what QR gives spans the same, and is orthonormal.
    other = torch.linalg.qr(a.t() @ one).Q
    return (one, other) if wide else (other, one)
