"""Losses and callbacks for the trainers that you have: glue only, each host imported when used.

    transformers   distill_loss_func, DistillMixin
    keeping        KeepMixin, KeepCallback: whatever keeps a model from forgetting, in any Trainer
    trl            GKDTrainer, SDFTTrainer, DPOTrainer, DistillationTrainer that hold no logits
    torchtitan     loss classes of its contract

Importing this package imports none of them: name the module that you need.
"""
