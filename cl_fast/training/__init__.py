"""Continual training: the pieces, each usable alone in the trainer that you have.

    mix, Replay, Permutation        old data in an exact ratio, at random access
    Rewarm, Infinite                re-warming and infinite schedules; `rewarm`, `infinite` make
                                    schedulers of them
    Orthogonal                      O-LoRA on PEFT's adapters, as a penalty or exactly
    LoraTasks, compose, use         a LoRA per task, merged or chosen at inference
    LoRAMoE, add_lora_moe, Balance  experts behind a gate as one layer
    Adapter, AdapterPerTask, identify_task   Houlsby's adapters, AdapterCL
    Project                         full fine-tuning off the subspaces that earlier tasks use
    Anchor, agem_                   EWC and L2-SP; A-GEM's projection of gradients
    SelfDistill                     the model before the task is its own teacher
    PreferenceReplay, KLToBase, KLPenalty, PretrainingLoss   alignment, kept and watched
    Keep, Task                      what they have in common, and how to write one of your own
    TransferMatrix                  what tasks did to one another

`cl_fast.learn` strings tasks together; `cl_fast.integrations.keeping` brings keeps into a Trainer.
Torch is imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_fast.training.adapters import (
        Adapter,
        AdapterPerTask,
        Identified,
        adapter_names,
        add_adapters,
        identify_task,
        load_adapter,
        remove_adapters,
        save_adapter,
        train_adapter,
        use_adapter,
        using_adapter,
    )
    from cl_fast.training.agem import agem_
    from cl_fast.training.anchors import Anchor, fisher_diagonal
    from cl_fast.training.distilling import SelfDistill
    from cl_fast.training.keeping import Keep, Task
    from cl_fast.training.kl_to_base import KLPenalty, KLToBase, kl_of_tokens
    from cl_fast.training.lora_moe import (
        Balance,
        LoRAMoE,
        WithColumn,
        add_lora_moe,
        load_lora_moe,
        lora_moe_layers,
        lora_moe_state_dict,
        remove_lora_moe,
    )
    from cl_fast.training.lora_tasks import LoraTasks, compose, merged_state_dict, use
    from cl_fast.training.metrics import TransferMatrix
    from cl_fast.training.mixing import Mixture, mix
    from cl_fast.training.orthogonal import Orthogonal, lora_penalty
    from cl_fast.training.permutations import Permutation
    from cl_fast.training.preferences import (
        PreferenceMemory,
        PreferenceReplay,
        mix_preferences,
        preference_loss,
        with_reference_logps,
    )
    from cl_fast.training.pretraining_loss import PretrainingLoss
    from cl_fast.training.projection import Project
    from cl_fast.training.prompts import generate_prompts
    from cl_fast.training.replay import Replay
    from cl_fast.training.rewriting import RewriteReport, Rewritten, rewrite_targets, same_number
    from cl_fast.training.schedules import Infinite, Rewarm, infinite, rewarm
    from cl_fast.training.subspaces import (
        extend_basis,
        input_moments,
        linear_layers,
        weight_subspace,
    )
    from cl_fast.training.tokens import batch_logprobs, frozen_copy

__all__ = [
    "Adapter",
    "AdapterPerTask",
    "Anchor",
    "Balance",
    "Identified",
    "Infinite",
    "KLPenalty",
    "KLToBase",
    "Keep",
    "LoRAMoE",
    "LoraTasks",
    "Mixture",
    "Orthogonal",
    "Permutation",
    "PreferenceMemory",
    "PreferenceReplay",
    "PretrainingLoss",
    "Project",
    "Replay",
    "Rewarm",
    "RewriteReport",
    "Rewritten",
    "SelfDistill",
    "Task",
    "TransferMatrix",
    "WithColumn",
    "adapter_names",
    "add_adapters",
    "add_lora_moe",
    "agem_",
    "batch_logprobs",
    "compose",
    "extend_basis",
    "fisher_diagonal",
    "frozen_copy",
    "generate_prompts",
    "identify_task",
    "infinite",
    "input_moments",
    "kl_of_tokens",
    "linear_layers",
    "load_adapter",
    "load_lora_moe",
    "lora_moe_layers",
    "lora_moe_state_dict",
    "lora_penalty",
    "merged_state_dict",
    "mix",
    "mix_preferences",
    "preference_loss",
    "remove_adapters",
    "remove_lora_moe",
    "rewarm",
    "rewrite_targets",
    "same_number",
    "save_adapter",
    "train_adapter",
    "use",
    "use_adapter",
    "using_adapter",
    "weight_subspace",
    "with_reference_logps",
]

_HOMES = {
    "Adapter": "adapters",
    "AdapterPerTask": "adapters",
    "Anchor": "anchors",
    "Balance": "lora_moe",
    "Identified": "adapters",
    "Infinite": "schedules",
    "KLPenalty": "kl_to_base",
    "KLToBase": "kl_to_base",
    "Keep": "keeping",
    "LoRAMoE": "lora_moe",
    "LoraTasks": "lora_tasks",
    "Mixture": "mixing",
    "Orthogonal": "orthogonal",
    "Permutation": "permutations",
    "PreferenceMemory": "preferences",
    "PreferenceReplay": "preferences",
    "PretrainingLoss": "pretraining_loss",
    "Project": "projection",
    "Replay": "replay",
    "Rewarm": "schedules",
    "RewriteReport": "rewriting",
    "Rewritten": "rewriting",
    "SelfDistill": "distilling",
    "Task": "keeping",
    "TransferMatrix": "metrics",
    "WithColumn": "lora_moe",
    "adapter_names": "adapters",
    "add_adapters": "adapters",
    "add_lora_moe": "lora_moe",
    "agem_": "agem",
    "batch_logprobs": "tokens",
    "compose": "lora_tasks",
    "extend_basis": "subspaces",
    "fisher_diagonal": "anchors",
    "frozen_copy": "tokens",
    "generate_prompts": "prompts",
    "identify_task": "adapters",
    "infinite": "schedules",
    "input_moments": "subspaces",
    "kl_of_tokens": "kl_to_base",
    "linear_layers": "subspaces",
    "load_adapter": "adapters",
    "load_lora_moe": "lora_moe",
    "lora_moe_layers": "lora_moe",
    "lora_moe_state_dict": "lora_moe",
    "lora_penalty": "orthogonal",
    "merged_state_dict": "lora_tasks",
    "mix": "mixing",
    "mix_preferences": "preferences",
    "preference_loss": "preferences",
    "remove_adapters": "adapters",
    "remove_lora_moe": "lora_moe",
    "rewarm": "schedules",
    "rewrite_targets": "rewriting",
    "same_number": "rewriting",
    "save_adapter": "adapters",
    "train_adapter": "adapters",
    "use": "lora_tasks",
    "use_adapter": "adapters",
    "using_adapter": "adapters",
    "weight_subspace": "subspaces",
    "with_reference_logps": "preferences",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl_fast.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cl_fast.training' has no attribute {name!r}")
