"""The ops, registered with torch under the namespace `cl_fast`, and their torch-free ground.

    combine, combine_many    one pass over base and finetuned tensors: every merge of this library
    combine_, combine_many_  the same, written over the base
    dare                     drop and rescale one delta
    magnitude_threshold      the exact k-th largest magnitude and how many of its ties stay
    magnitude_band, magprune  what Model Breadcrumbs keeps; DELLA's drop by rank
    PackedDelta, pack, unpack  the kept values of a drop, without their mask
    rank_update, gram        W + U V^T with one rounding; second moments of keys
    nearest_key          the gate of stores of facts: the best key of each query, and its score
    orthogonal_penalty, orthogonal_project  O-LoRA's penalty and the projection off a subspace
    anchor_gradient_, anchor_pull_  the pull of EWC and L2-SP, without temporaries
    gated_low_rank           n low-rank adapters behind a softmax gate, as two products
    Policy, trim_keep_count, band_counts  the variants of a merge
    stream_key, keep_threshold  the documented random stream

Torch is imported when an op is first named; Policy and the stream need the standard library only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cl_fast.ops.policy import Policy, band_counts, trim_keep_count
from cl_fast.ops.streams import keep_threshold, stream_key

if TYPE_CHECKING:
    from cl_fast.ops.anchoring import anchor_gradient_, anchor_penalty, anchor_pull_
    from cl_fast.ops.combining import (
        combine,
        combine_,
        combine_many,
        combine_many_,
        combine_reference,
        model_thresholds,
    )
    from cl_fast.ops.dropping import dare, keep_mask
    from cl_fast.ops.gated_experts import gated_low_rank
    from cl_fast.ops.inner_products import gram_matrix
    from cl_fast.ops.low_rank import gram, gram_, rank_update, rank_update_, rank_update_many_
    from cl_fast.ops.magnitude import magnitude_threshold
    from cl_fast.ops.nearest import nearest_key
    from cl_fast.ops.orthogonality import (
        orthogonal_penalty,
        orthogonal_project,
        orthogonal_project_,
    )
    from cl_fast.ops.packing import PackedDelta, pack, unpack
    from cl_fast.ops.ranking import magnitude_band, magprune
    from cl_fast.ops.spherical import karcher_mean, model_stock, multislerp, nuslerp, slerp
    from cl_fast.ops.weighted_means import fisher_mean, regmean

__all__ = [
    "PackedDelta",
    "Policy",
    "anchor_gradient_",
    "anchor_penalty",
    "anchor_pull_",
    "band_counts",
    "combine",
    "combine_",
    "combine_many",
    "combine_many_",
    "combine_reference",
    "dare",
    "fisher_mean",
    "gated_low_rank",
    "gram",
    "gram_",
    "gram_matrix",
    "karcher_mean",
    "keep_mask",
    "keep_threshold",
    "magnitude_band",
    "magnitude_threshold",
    "magprune",
    "model_stock",
    "model_thresholds",
    "multislerp",
    "nearest_key",
    "nuslerp",
    "orthogonal_penalty",
    "orthogonal_project",
    "orthogonal_project_",
    "pack",
    "rank_update",
    "rank_update_",
    "rank_update_many_",
    "regmean",
    "slerp",
    "stream_key",
    "trim_keep_count",
    "unpack",
]

# Modules are not named like what they export: importing a module would hide the function.
_HOMES = {
    "PackedDelta": "packing",
    "anchor_gradient_": "anchoring",
    "anchor_penalty": "anchoring",
    "anchor_pull_": "anchoring",
    "combine": "combining",
    "combine_": "combining",
    "combine_many": "combining",
    "combine_many_": "combining",
    "combine_reference": "combining",
    "dare": "dropping",
    "fisher_mean": "weighted_means",
    "gated_low_rank": "gated_experts",
    "gram": "low_rank",
    "gram_": "low_rank",
    "gram_matrix": "inner_products",
    "karcher_mean": "spherical",
    "keep_mask": "dropping",
    "magnitude_band": "ranking",
    "magnitude_threshold": "magnitude",
    "magprune": "ranking",
    "model_stock": "spherical",
    "model_thresholds": "combining",
    "multislerp": "spherical",
    "nearest_key": "nearest",
    "nuslerp": "spherical",
    "orthogonal_penalty": "orthogonality",
    "orthogonal_project": "orthogonality",
    "orthogonal_project_": "orthogonality",
    "pack": "packing",
    "rank_update": "low_rank",
    "rank_update_": "low_rank",
    "rank_update_many_": "low_rank",
    "regmean": "weighted_means",
    "slerp": "spherical",
    "unpack": "packing",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl_fast.ops.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cl_fast.ops' has no attribute {name!r}")
