"""The ops, registered with torch under the namespace `cl_fast`, and their torch-free ground.

    combine, combine_many    one pass over base and finetuned tensors: every merge of this library
    dare                     drop and rescale one delta
    magnitude_threshold      the exact k-th largest magnitude and how many of its ties stay
    Policy, trim_keep_count  the variants of a merge
    stream_key, keep_threshold  the documented random stream

Torch is imported when an op is first named; Policy and the stream need the standard library only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cl_fast.ops.policy import Policy, trim_keep_count
from cl_fast.ops.streams import keep_threshold, stream_key

if TYPE_CHECKING:
    from cl_fast.ops.combining import combine, combine_many, combine_reference, model_thresholds
    from cl_fast.ops.dropping import dare, keep_mask
    from cl_fast.ops.magnitude import magnitude_threshold

__all__ = [
    "Policy",
    "combine",
    "combine_many",
    "combine_reference",
    "dare",
    "keep_mask",
    "keep_threshold",
    "magnitude_threshold",
    "model_thresholds",
    "stream_key",
    "trim_keep_count",
]

# Modules are not named like what they export: importing a module would hide the function.
_HOMES = {
    "combine": "combining",
    "combine_": "combining",
    "combine_many": "combining",
    "combine_many_": "combining",
    "combine_reference": "combining",
    "dare": "dropping",
    "keep_mask": "dropping",
    "magnitude_threshold": "magnitude",
    "PackedDelta": "packing",
    "gram": "low_rank",
    "gram_": "low_rank",
    "model_thresholds": "combining",
    "orthogonal_penalty": "orthogonality",
    "orthogonal_project": "orthogonality",
    "orthogonal_project_": "orthogonality",
    "pack": "packing",
    "rank_update": "low_rank",
    "rank_update_": "low_rank",
    "rank_update_many_": "low_rank",
    "unpack": "packing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl_fast.ops.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cl_fast.ops' has no attribute {name!r}")
