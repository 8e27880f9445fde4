"""A loop with torchtitan's contract: hidden states in, sum over tokens / global tokens out.

The loop calls its loss as torchtitan's trainer does: `loss_fn(pred, labels, global_valid_tokens,
**per_token_inputs)` for each step of accumulation, with the model's head skipped. With torchtitan
installed the class is a subclass of its ChunkedLossWrapper and goes into its config as it is. Runs
in a few seconds on a CPU:

    python examples/distill_torchtitan_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl_fast.integrations.torchtitan import LinearDivergenceLoss

VOCABULARY, LENGTH = 96, 16


class Decoder(nn.Module):
    """The shape of torchtitan's decoders, with one layer."""

    _skip_lm_head = False

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = nn.Embedding(VOCABULARY, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.layer(self.tok_embeddings(tokens))
        return hidden if self._skip_lm_head else self.lm_head(hidden)


student, teacher = Decoder(0, 32), Decoder(1, 64)
nn.init.normal_(teacher.lm_head.weight)
loss_fn = LinearDivergenceLoss.Config(kind="forward_kl").build(compile_config=None)
# What torchtitan's trainer does of itself:
loss_fn.set_lm_head(student.lm_head)
student._skip_lm_head = True
# And what is left to do:
loss_fn.set_teacher_head(teacher.lm_head)
teacher._skip_lm_head = True

optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)
accumulation = 2
print(f"{'step':>4}{'divergence per token':>23}")
for step in range(1, 61):
    batches = [torch.randint(0, VOCABULARY, (8, LENGTH + 1)) for _ in range(accumulation)]
    valid = torch.tensor(float(sum(batch[:, 1:].numel() for batch in batches)))
    total = torch.zeros(())
    optimiser.zero_grad()
    for batch in batches:
        tokens, labels = batch[:, :-1], batch[:, 1:]
        with torch.no_grad():
            taught = teacher(tokens)
        loss, _ = loss_fn(student(tokens), labels, valid, teacher_hidden=taught)
        loss.backward()
        total += loss.detach()
    optimiser.step()
    if step in (1, 20, 40, 60):
        print(f"{step:>4}{total.item():>23.4f}")
