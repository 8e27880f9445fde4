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
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cl_fast.models.heads import IGNORED
from cl_fast.options import at_least, function_name, integer, positive
from cl_fast.training.drawing import Draw
from cl_fast.training.keeping import Dataset, Keep
from cl_fast.training.tokens import batch_logprobs, on_device_of

__all__ = ["PretrainingLoss", "collate_text"]


def collate_text(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A padded batch of examples with `input_ids`; `labels` are those, or the example's own.

    Padding is on the right and does not count.
    """
    rows = [torch.as_tensor(example["input_ids"], dtype=torch.int64) for example in examples]
    own = [example.get("labels", row) for row, example in zip(rows, examples, strict=True)]
    labels = [torch.as_tensor(row, dtype=torch.int64) for row in own]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


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
        weight: gamma, positive.
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
        positive("weight", weight)
        at_least("batch_size", batch_size, 1)
        integer("seed", seed)
        if collate is None:
            first = dataset[0]
            if not isinstance(first, Mapping) or "input_ids" not in first:
                known = sorted(first) if isinstance(first, Mapping) else type(first).__name__
                raise ValueError(f"examples of dataset have no input_ids; got {known}: tokenise it")
        self.dataset, self.weight, self.batch_size = dataset, float(weight), int(batch_size)
        self.seed, self.collate = int(seed), collate or collate_text
        self._draw = Draw(len(dataset), self.seed, "pretraining")
        self._last: Tensor | None = None

    def draws(self, batch: int, rank: int = 0, ranks: int = 1) -> list[int]:
        """The indices of the examples of a batch, by its number."""
        first = (batch * ranks + rank) * self.batch_size
        return [self._draw[n] for n in range(first, first + self.batch_size)]

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        examples = [self.dataset[i] for i in self._draw.next(self.batch_size)]
        batch = on_device_of(model, self.collate(examples))
        logprobs, counts = batch_logprobs(model, batch)
        nll = -logprobs.sum() / counts.sum().clamp(min=1)
        self._last = nll.detach()
        return self.weight * nll

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._draw.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._draw.drawn = int(state["drawn"])

    def options(self) -> dict[str, Any]:
        return {
            "examples": len(self.dataset),
            "weight": self.weight,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "collate": function_name(self.collate),
        }

    def measures(self) -> dict[str, float]:
        return {} if self._last is None else {"pretraining_loss/nll": float(self._last)}
