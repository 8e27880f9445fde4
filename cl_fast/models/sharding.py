"""The part of a tensor that lies on this rank, and which rank this is.

FSDP2 splits each parameter by rows and keeps it as a DTensor. What works element by element, or
row by row, works on `local(parameter)` without a word between ranks; what mixes rows sums its
partial products with `sum_over_ranks_`.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

__all__ = ["is_sharded", "local", "reshard", "row_range", "sum_over_ranks_", "this_rank"]


def this_rank() -> tuple[int, int]:
    """Which rank this is, and how many there are: (0, 1) where there is one process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def local(tensor: Tensor) -> Tensor:
    """The rows of `tensor` that this rank holds, without a graph; all of them where it is whole.

    It shares memory with `tensor`: writing to it writes to the parameter.

    Raises:
        ValueError: it is sharded in another way than by rows (tensor parallelism).
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    _check(tensor)
    part = tensor.detach().to_local()
    return part.wait() if hasattr(part, "wait") else part


def row_range(tensor: Tensor) -> slice:
    """Which rows of the whole tensor `local` gives."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.size(0) if tensor.dim() else 1)
    _check(tensor)
    start, stop = 0, tensor.size(0)
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            parts, rank = tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim)
            size = -(-(stop - start) // parts)  # as torch.chunk splits
            start, stop = min(stop, start + rank * size), min(stop, start + (rank + 1) * size)
    return slice(start, stop)


def sum_over_ranks_(partial: Tensor, like: Tensor) -> Tensor:
    """Adds up `partial`, in place, over the ranks that hold other rows of `like`."""
    if isinstance(like, DTensor):
        _check(like)
        for dim, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(partial, group=like.device_mesh.get_group(dim))
    return partial


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds parts of parameters only: FSDP2, or ZeRO-3 of DeepSpeed."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """After a forward pass without a backward pass: parameters are split again under FSDP2.

    The root of an FSDP2 model stays whole until its backward pass. Without one, `parameters()`
    would go on giving the whole ones, and an optimizer made of them would train what is thrown
    away.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check(tensor: DTensor) -> None:
    for placement in tensor.placements:
        if placement.is_replicate() or (isinstance(placement, Shard) and placement.dim == 0):
            continue
        raise ValueError(
            f"a parameter is placed as {placement}; rows split over ranks (FSDP2) are understood, "
            "tensor parallelism is not"
        )
