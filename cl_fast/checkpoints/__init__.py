"""Checkpoints on disk: headers, folders and the files beside the weights. Torch-free."""

from __future__ import annotations

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.safetensors import Header, TensorInfo, read_header

__all__ = ["Checkpoint", "Header", "TensorInfo", "read_header"]
