"""Against the alignment tax: pre-training text beside a task, as a term of its loss.

    L = L_task - gamma E_pretraining[log pi]        the mean log-prob of a token of the text

What reinforcement from preferences takes from a model's general abilities, the pre-training loss
holds: PPO-ptx of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, equation 2), here beside any
trainer's loss. It is replay whose share is a weight instead of a ratio of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_fast.models.heads import IGNORED
from cl_fast.training.keeping import Dataset, Keep
from cl_fast.training.permutations import Permutation, order_key
from cl_fast.training.tokens import batch_logprobs, on_device_of

__all__ = ["PretrainingLoss", "collate_text"]


def collate_text(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A padded batch of examples with `input_ids`; `labels` are those, or the example's own.

    Padding is on the right and does not count.
    """
    rows = [torch.as_tensor(example["input_ids"], dtype=torch.int64) for example in examples]
    longest = max(row.numel() for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        n = row.numel()
        ids[i, :n], mask[i, :n] = row, 1
        labels[i, :n] = torch.as_tensor(example.get("labels", row), dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class PretrainingLoss(Keep):
    """weight * mean negative log-likelihood of the next batch of pre-training text.

    Batch n of rank k of R holds the draws (n R + k) B ... + B - 1, where draws run through
    permutations of the data set, one per epoch: no example twice before all were drawn, no example
    on two ranks in an epoch, and a resumed run goes on where it was. One batch is drawn for each
    micro-batch of the host: with gradient accumulation of 4, a batch_size of 2 draws what a
    batch_size of 8 draws without.

    It costs a forward and a backward pass over the batch. Logits are not made.

    Args:
        dataset: map-style; its examples have `input_ids` (and `labels`, where they differ).
        weight: gamma, above 0.
        batch_size: examples of a micro-batch, per rank.
        seed: of the order.
        collate: examples to a batch with labels; by default `collate_text`.

    Raises:
        ValueError: an empty data set, examples without input_ids, or a weight or batch size that is
            not above 0.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        weight: float = 1.0,
        batch_size: int = 1,
        seed: int = 0,
        collate: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        if not len(dataset):
            raise ValueError("dataset is empty: there is no pre-training text to draw")
        if not weight > 0:
            raise ValueError(f"weight must be above 0; got {weight}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if collate is None:
            first = dataset[0]
            if not isinstance(first, Mapping) or "input_ids" not in first:
                known = sorted(first) if isinstance(first, Mapping) else type(first).__name__
                raise ValueError(f"examples of dataset have no input_ids; got {known}: tokenise it")
        self.dataset, self.weight, self.batch_size = dataset, float(weight), int(batch_size)
        self.seed, self.collate = int(seed), collate or collate_text
        self.drawn = 0
        self._order: tuple[int, Permutation] | None = None
        self._last: Tensor | None = None

    def draws(self, batch: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """The indices of the examples of a batch, by its number."""
        first = (batch * ranks + rank) * self.batch_size
        return [self._at(n) for n in range(first, first + self.batch_size)]

    def _at(self, draw: int) -> int:
        epoch, place = divmod(draw, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            key = order_key(self.seed, "pretraining", epoch)
            self._order = epoch, Permutation(len(self.dataset), key)
        return self._order[1][place]

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        ranks = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
        examples = [self.dataset[i] for i in self.draws(self.drawn, rank, size)]
        self.drawn += 1
        batch = on_device_of(model, self.collate(examples))
        logprobs, counts = batch_logprobs(model, batch)
        nll = -logprobs.sum() / counts.sum().clamp(min=1)
        self._last = nll.detach()
        return self.weight * nll

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = int(state["drawn"])

    def options(self) -> dict[str, Any]:
        return {"weight": self.weight, "batch_size": self.batch_size, "seed": self.seed,
                "examples": len(self.dataset)}  # fmt: skip

    def measures(self) -> dict[str, float]:
        return {} if self._last is None else {"pretraining_loss": float(self._last)}
