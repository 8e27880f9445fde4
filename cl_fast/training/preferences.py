"""Preference pairs that keep the reference of their own stage, and their replay.

    DPO: -log sigma(beta ((log pi_c - ref_c) - (log pi_r - ref_r)))

A stage of DPO is held to its reference: the model that the stage began with. A pair of an earlier
stage is replayed with the reference that it had then, so what is kept of a stage is

    prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps

two numbers beside the tokens. No earlier model is needed again.

    with_reference_logps(pairs, model)    the two numbers of pairs that have none yet
    PreferenceMemory                      the pairs of past stages
    mix_preferences(new, past, ratio)     a data set of both
    preference_loss(model, batch)         DPO of a batch with its own references
    PreferenceReplay                      all of it as a keep, for TRL's DPOTrainer

The columns have TRL's names, and batches are those of TRL's collator: chosen answers, then rejected
ones. DPO: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cl_fast.losses import dpo_loss, sequence_sums
from cl_fast.models.heads import Evaluating
from cl_fast.options import at_least, integer, one_of, share
from cl_fast.training.keeping import Dataset, Keep, Task
from cl_fast.training.mixing import mix
from cl_fast.training.tokens import batch_logprobs, on_device_of

__all__ = [
    "PAIR",
    "REFERENCES",
    "PreferenceMemory",
    "PreferenceReplay",
    "collate_pairs",
    "has_references",
    "mix_preferences",
    "pair_checksum",
    "pair_logprobs",
    "preference_loss",
    "with_reference_logps",
]

PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")
"""The columns of a tokenised pair, each a list of ids."""
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
"""The columns of the sums of log-probs of the two answers under the reference of their stage."""

Truncation = Literal["keep_start", "keep_end"]
LossType = Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair"]


def has_references(pair: Mapping[str, Any]) -> bool:
    """Whether a pair has both of its reference log-probs; None and NaN stand for none.

    Raises:
        ValueError: it has one of the two.
    """
    known = [x is not None and not math.isnan(x) for x in (pair.get(name) for name in REFERENCES)]
    if known[0] != known[1]:
        raise ValueError(
            "a pair has one of ref_chosen_logps and ref_rejected_logps but not the other; got "
            f"{[pair.get(name) for name in REFERENCES]}"
        )
    return known[0]


def _check_pair(pair: Any, at: object) -> None:
    missing = [name for name in PAIR if not isinstance(pair, Mapping) or pair.get(name) is None]
    if missing:
        known = sorted(pair) if isinstance(pair, Mapping) else type(pair).__name__
        raise ValueError(f"pair {at} has no {missing[0]}; got {known}. Tokenise pairs first")


def _slice(max_length: int | None, truncation_mode: str) -> slice:
    one_of("truncation_mode", truncation_mode, get_args(Truncation))
    if max_length is None:
        return slice(None)
    return slice(None, max_length) if truncation_mode == "keep_start" else slice(-max_length, None)


def _whole(pair: Mapping[str, Any], answer: str, part: slice) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and one answer, and which are of the answer; truncated."""
    ids = [*pair["prompt_ids"], *pair[answer]]
    counts = [0] * len(pair["prompt_ids"]) + [1] * len(pair[answer])
    return ids[part], counts[part]


def collate_pairs(
    pairs: Sequence[Mapping[str, Any]],
    *,
    pad_id: int = 0,
    max_length: int | None = None,
    truncation_mode: Truncation = "keep_start",
) -> dict[str, Tensor]:
    """Tokenised pairs as a batch: chosen answers in the first half, rejected ones in the second.

    Returns:
        input_ids, attention_mask and completion_mask, int64 [2 B, T], padded on the right; and
        ref_chosen_logps and ref_rejected_logps, float64 [B], where all pairs have them.

    Raises:
        ValueError: a pair lacks a column.
    """
    part = _slice(max_length, truncation_mode)
    for i, pair in enumerate(pairs):
        _check_pair(pair, i)
    rows = [_whole(pair, answer, part) for answer in PAIR[1:] for pair in pairs]
    ids = [torch.tensor(row, dtype=torch.int64) for row, _ in rows]
    answers = [torch.tensor(row, dtype=torch.int64) for _, row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "completion_mask": pad_sequence(answers, batch_first=True),
    }
    if all(has_references(pair) for pair in pairs):
        for name in REFERENCES:
            batch[name] = torch.tensor([float(p[name]) for p in pairs], dtype=torch.float64)
    return batch


def pair_logprobs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Sums of the log-probs of the chosen and the rejected answers: [B] each, differentiable.

    Args:
        model: a causal language model of transformers. No logits are made.
        batch: of `collate_pairs`, or of TRL's collator.
    """
    logprobs, counts = batch_logprobs(model, batch)
    chosen, rejected = sequence_sums(logprobs, mask=counts).chunk(2)
    return chosen, rejected


def preference_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """DPO of a batch in which each pair has the reference of its own stage.

    Args:
        batch: of `collate_pairs`, with ref_chosen_logps and ref_rejected_logps.
        beta, loss_type, label_smoothing, reduction: of `cl_fast.losses.dpo_loss`. For "ipo" sums,
            stored ones too, are divided by the number of tokens.

    Raises:
        ValueError: pairs without references.
    """
    for name in REFERENCES:
        if batch.get(name) is None:
            raise ValueError(f"the batch has no {name}: take with_reference_logps first")
    logprobs, counts = batch_logprobs(model, batch)
    sums = sequence_sums(logprobs, mask=counts)
    # Sums of float32 stay so: the loss would take float64 of stored numbers for its own.
    ref = torch.cat([batch[name] for name in REFERENCES]).to(sums.device, sums.dtype)
    if loss_type == "ipo":
        tokens = counts.sum(1).clamp(min=1)
        sums, ref = sums / tokens, ref / tokens
    return dpo_loss(
        *sums.chunk(2), *ref.chunk(2), beta=beta, loss_type=loss_type,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


def with_reference_logps(
    pairs: Dataset | Iterable[Mapping[str, Any]],
    model: nn.Module,
    *,
    batch_size: int = 8,
    pad_id: int = 0,
    max_length: int | None = None,
    truncation_mode: Truncation = "keep_start",
) -> list[dict[str, Any]]:
    """Pairs with their reference log-probs: of `model`, where they have none of their own yet.

    Args:
        pairs: tokenised, map-style.
        model: the reference of this stage: the model as it is before the stage; in eval mode here.
        batch_size: pairs of a forward pass.
        pad_id, max_length, truncation_mode: of `collate_pairs`, and as in the training that
            follows.

    Returns:
        A list of dicts: the pairs' own columns, and both reference log-probs.

    Raises:
        ValueError: a pair lacks a column.
    """
    given: Any = pairs
    rows = [dict(given[i]) for i in range(len(given))] if hasattr(given, "__len__") else list(given)
    for i, row in enumerate(rows):
        _check_pair(row, i)
    missing = [row for row in rows if not has_references(row)]
    with Evaluating(model), torch.no_grad():
        for first in range(0, len(missing), batch_size):
            some = missing[first : first + batch_size]
            batch = collate_pairs(
                some, pad_id=pad_id, max_length=max_length, truncation_mode=truncation_mode
            )
            values = pair_logprobs(model, on_device_of(model, batch))
            for name, column in zip(REFERENCES, values, strict=True):
                for row, x in zip(some, column.tolist(), strict=True):
                    row[name] = x
    return rows


def pair_checksum(
    pair: Mapping[str, Any],
    *,
    max_length: int | None = None,
    truncation_mode: Truncation = "keep_start",
    ld_alpha: float | None = None,
) -> int:
    """63 bits that change with what the reference log-probs of a pair are sums over: its tokens, as
    they are truncated, and TRL's `ld_alpha`."""
    part = _slice(max_length, truncation_mode)
    words = hashlib.blake2b(digest_size=8, person=b"cl_fast pair")
    for answer in PAIR[1:]:
        ids, counts = _whole(pair, answer, part)
        words.update(repr((ids, sum(counts))).encode())
    words.update(repr(None if ld_alpha is None else float(ld_alpha)).encode())
    return int(int.from_bytes(words.digest(), "little") >> 1)


class PreferenceMemory:
    """The pairs of past stages, as a map-style data set: tokens and reference log-probs.

    Tokens lie one after the other in one tensor per stage: 4 bytes per token and 40 per pair.

    Attributes:
        stages: the name of each stage and its number of pairs, in order.
    """

    def __init__(self) -> None:
        self._ids: dict[str, Tensor] = {}
        self._ends: dict[str, Tensor] = {}
        self._refs: dict[str, Tensor] = {}

    @property
    def stages(self) -> dict[str, int]:
        return {name: refs.size(0) for name, refs in self._refs.items()}

    def add(self, name: str, pairs: Dataset, *, size: int | None = None, seed: int = 0) -> None:
        """Keep the pairs of a stage.

        Args:
            name: of the stage, which is not there yet.
            pairs: tokenised, with their reference log-probs.
            size: how many of them, drawn without replacement; by default all.
            seed: of that draw.

        Raises:
            ValueError: the name is taken; there are no pairs, or one lacks a column.
        """
        if name in self._refs:
            raise ValueError(f"the memory has a stage {name!r} already")
        total = len(pairs)
        if not total:
            raise ValueError(f"the stage {name!r} has no pairs")
        chosen: Iterable[int] = range(total)
        if size is not None and size < total:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
            chosen = sorted(order[:size].tolist())
        ids: list[int] = []
        ends: list[list[int]] = []
        refs: list[list[float]] = []
        for i in chosen:
            pair = pairs[i]
            _check_pair(pair, f"{i} of the stage {name!r}")
            if not has_references(pair):
                raise ValueError(
                    f"pair {i} of the stage {name!r} has no reference log-probs: take "
                    "with_reference_logps, or a trainer with precompute_ref_log_probs=True"
                )
            row = []
            for column in PAIR:
                ids.extend(int(x) for x in pair[column])
                row.append(len(ids))
            ends.append(row)
            refs.append([float(pair[column]) for column in REFERENCES])
        self._ids[name] = torch.tensor(ids, dtype=torch.int32)
        self._ends[name] = torch.tensor(ends, dtype=torch.int64)
        self._refs[name] = torch.tensor(refs, dtype=torch.float64)

    def stage(self, name: str) -> Sequence[dict[str, Any]]:
        """The pairs of one stage.

        Raises:
            KeyError: there is no such stage.
        """
        return _Stage(self._ids[name], self._ends[name], self._refs[name])

    def __len__(self) -> int:
        return sum(self.stages.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        at = index + len(self) if index < 0 else index
        if at >= 0:
            for name, pairs in self.stages.items():
                if at < pairs:
                    return self.stage(name)[at]
                at -= pairs
        raise IndexError(f"pair {index} of {len(self)}")

    def state_dict(self) -> dict[str, Any]:
        """The stages in order, as `torch.load(weights_only=True)` reads them."""
        return {
            "stages": [
                {"name": name, "ids": self._ids[name], "ends": self._ends[name], "refs": refs}
                for name, refs in self._refs.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, in the place of what is there."""
        self.__init__()  # type: ignore[misc]
        for stage in state["stages"]:
            name = str(stage["name"])
            self._ids[name], self._ends[name] = stage["ids"], stage["ends"]
            self._refs[name] = stage["refs"]


class _Stage(Sequence[dict[str, Any]]):
    def __init__(self, ids: Tensor, ends: Tensor, refs: Tensor) -> None:
        self._ids, self._ends, self._refs = ids, ends, refs

    def __len__(self) -> int:
        return int(self._refs.size(0))

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self))[index]
        if isinstance(at, range):
            return [self[i] for i in at]
        first = int(self._ends[at - 1, -1]) if at else 0
        row: dict[str, Any] = {}
        for column, end in zip(PAIR, self._ends[at].tolist(), strict=True):
            row[column] = self._ids[first:end].tolist()
            first = end
        row.update(zip(REFERENCES, self._refs[at].tolist(), strict=True))
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


class _Pairs:
    """A data set with the columns of pairs alone: sources that are mixed must have the same."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        _check_pair(row, index)
        if not has_references(row):
            raise ValueError(
                f"pair {index} has no reference log-probs: take with_reference_logps, or a trainer "
                "with precompute_ref_log_probs=True"
            )
        return {name: row[name] for name in (*PAIR, *REFERENCES)}


def mix_preferences(new: Dataset, past: Dataset, ratio: float, *, seed: int = 0) -> Dataset:
    """New pairs and those of past stages in one map-style data set; `ratio` of it is past.

    Args:
        new: tokenised pairs with their reference log-probs.
        past: the same, of earlier stages: a `PreferenceMemory`, or rows of any map-style data set.
        ratio: the share of past pairs, in [0, 1); with 0, `new` itself.
        seed: of the order.

    Raises:
        ValueError: the ratio, an empty source, or a pair without a column.
    """
    if ratio == 0:
        return new
    for rows, name in ((new, "new"), (past, "past")):
        if not len(rows):
            raise ValueError(f"{name} has no pairs")
        _Pairs(rows)[0]
    mixed: Dataset = mix(_Pairs(new), _Pairs(past), ratio, seed=seed)
    return mixed


class PreferenceReplay(Keep):
    """DPO over several stages: each trains on its own pairs and on those of earlier stages.

        keep = PreferenceReplay(0.25)
        class Keeping(KeepMixin, DPOTrainer): ...
        Keeping(..., train_dataset=safety, keep=[keep], task=Task("safety")).train()
        Keeping(..., train_dataset=help, keep=[keep], task=Task("help", 1)).train()

    The trainer must make reference log-probs in advance (TRL: precompute_ref_log_probs=True). It
    makes those of the new pairs, with the model that the stage begins with; `data` mixes in the
    pairs of earlier stages with those that they had. After the stage its pairs join the memory.
    Evaluation sets are not changed.

    The memory is part of `state_dict`, and so of each checkpoint of a trainer: `size` bounds it.

    Args:
        ratio: the share of past pairs among all, in [0, 1).
        size: pairs kept of a stage; by default all.
        seed: of the order, and of the pairs that are kept.

    Raises:
        ValueError: a ratio outside [0, 1), a size below 1.
    """

    def __init__(self, ratio: float, *, size: int | None = None, seed: int = 0) -> None:
        share("ratio", ratio, whole=False)
        if size is not None:
            at_least("size", size, 1)
        integer("seed", seed)
        self.ratio, self.size, self.seed = float(ratio), size, int(seed)
        self.memory = PreferenceMemory()
        self._new: Dataset | None = None
        self._mixed: list[str] | None = None

    def before_task(self, model: nn.Module, task: Task) -> None:
        if task.name in self.memory.stages:
            raise ValueError(
                f"the memory has the pairs of a stage {task.name!r} already: name the task of this "
                "trainer, KeepMixin(task=Task(name, index))"
            )

    def data(self, new: Dataset, past: Sequence[Task]) -> Dataset:
        unknown = [task.name for task in past if task.name not in self.memory.stages]
        if unknown:
            raise ValueError(
                f"the memory has no pairs of the past stage {unknown[0]!r}; it has "
                f"{list(self.memory.stages)}. Load the state that was saved after that stage"
            )
        _Pairs(new)[0]
        self._new, self._mixed = new, list(self.memory.stages)
        if not self.memory.stages:
            return new
        return mix_preferences(new, self.memory, self.ratio, seed=self.seed)

    def after_task(self, model: nn.Module, task: Task) -> None:
        if self._new is not None:
            self.memory.add(task.name, self._new, size=self.size, seed=self.seed)
            self._new = self._mixed = None

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        given = [str(stage["name"]) for stage in state["stages"]]
        if self._mixed is not None and given != self._mixed:
            raise ValueError(
                f"the checkpoint was trained with pairs of the stages {given} in its memory, this "
                f"run mixed in those of {self._mixed}: load the state before the trainer is made"
            )
        self.memory.load_state_dict(state)

    def options(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "size": self.size, "seed": self.seed}
