"""Losses and callbacks for the trainers that you have: glue only, each host imported when used.

    transformers   head_of, hidden_states, distill_loss_func, DistillMixin
    trl            GKDTrainer, SDFTTrainer, DPOTrainer, DistillationTrainer that hold no logits
    peft           adapters on the output head, as the losses want them
    torchtitan     loss classes of its contract

Importing this package imports none of them: name the module that you need.
"""
