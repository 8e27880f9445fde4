"""One compilation of one Triton kernel, as its launcher asks for it, and what must hold of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What is compiled, and what the machine code must show."""

    name: str
    """Unique; the key in registers.json."""
    kernel: Any
    signature: Mapping[str, Any]
    """Types of the arguments that are no constexpr, such as "*bf16", "i64", "fp32"."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: Sequence[str] = ()
    """Arguments that the launcher guarantees to be divisible by 16."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """num_warps, num_stages, enable_fp_fusion."""
    vectors: bool = True
    """Global memory is read with 16-byte instructions."""
    matrix: bool = False
    """Tensor cores are used."""
    exact: bool = False
    """No product is fused with a sum."""
    most_registers: int = 255
