"""Preference replay in TRL: DPO in which each pair keeps the reference of its own stage.

    StoredReferences    before TRL's DPOTrainer, or before that of `cl_fast.integrations.trl`
    ReplayDPOTrainer    both: stored references, and log-probs without logits
    mix_preferences     new pairs and those of past stages, as a `datasets.Dataset`

    trainer = ReplayDPOTrainer(model, args=DPOConfig(precompute_ref_log_probs=True, ...),
                               train_dataset=mix_preferences(helpful, [safe], 0.25), ...)
    trainer.train()
    trainer.stage_pairs("helpful").save_to_disk("memory/helpful")

TRL reads `ref_chosen_logps` and `ref_rejected_logps` from its data set with
precompute_ref_log_probs=True only, and then makes them anew for every pair, of the model that the
trainer begins with. Here the pairs that have them keep them; TRL makes those of the others. So no
second model is in memory, for pairs of any stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cl_fast.options import share
from cl_fast.training.mixing import mix
from cl_fast.training.preferences import REFERENCES, has_references, pair_checksum

__all__ = ["CHECKSUM", "STAGE", "StoredReferences", "mix_preferences"]

CHECKSUM = "ref_checksum"
"""The column that tells of which tokens the reference log-probs are."""
STAGE = "stage"
"""The column with the name of a remembered pair's stage."""


def __dir__() -> list[str]:
    return sorted([*__all__, "ReplayDPOTrainer"])


def __getattr__(name: str) -> Any:
    if name != "ReplayDPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cl_fast.integrations.trl import DPOTrainer

    doc = "`trl.DPOTrainer` with `StoredReferences`, and log-probs without logits."
    made = type(name, (StoredReferences, DPOTrainer), {"__module__": __name__, "__doc__": doc})
    globals()[name] = made
    return made


def mix_preferences(new: Any, past: Any, ratio: float, *, seed: int = 0) -> Any:
    """New pairs and those of past stages in one data set; `ratio` of it is past.

    Args:
        new: a `datasets.Dataset` as DPOTrainer takes it: prompt, chosen, rejected.
        past: one of `StoredReferences.stage_pairs`, or several: the past stages.
        ratio: the share of past pairs, in [0, 1); with 0, `new` itself.
        seed: of the order within the sources.

    Returns:
        A `datasets.Dataset`, in the order of the mix. New pairs have no reference log-probs yet.

    Raises:
        TypeError: not a `datasets.Dataset`.
        ValueError: the ratio, an empty source, a past pair without reference log-probs.
    """
    from datasets import Dataset, concatenate_datasets

    stages = [past] if isinstance(past, Dataset) else list(past)
    for name, rows in (("new", new), *((f"past[{i}]", rows) for i, rows in enumerate(stages))):
        if not isinstance(rows, Dataset):
            raise TypeError(f"{name} must be a datasets.Dataset; got {type(rows).__name__}")
        if not len(rows):
            raise ValueError(f"{name} has no pairs")
    if ratio == 0 or not stages:
        share("ratio", ratio, whole=False)
        return new
    for i, rows in enumerate(stages):
        for name in ("prompt", "chosen", "rejected", *REFERENCES):
            if name not in rows.column_names:
                raise ValueError(f"past[{i}] has no column {name}; got {rows.column_names}")
        lacking = _without_references(rows)
        if lacking:
            raise ValueError(
                f"pair {lacking[0]} of past[{i}] has no reference log-probs: take stage_pairs of "
                "the trainer of its stage"
            )
    old = concatenate_datasets(stages)
    order = mix(range(len(new)), range(len(new), len(new) + len(old)), ratio, seed=seed)
    picks = [int(order[i]) for i in range(len(order))]
    return concatenate_datasets([new, old]).select(picks)


def _without_references(rows: Any) -> list[int]:
    """The indices of the pairs that have no reference log-probs."""
    there = [name in rows.column_names for name in REFERENCES]
    if not any(there):
        return list(range(len(rows)))
    columns = [
        rows[name] if has else [None] * len(rows)
        for name, has in zip(REFERENCES, there, strict=True)
    ]
    pairs = enumerate(zip(*columns, strict=True))
    return [i for i, pair in pairs if not has_references(dict(zip(REFERENCES, pair, strict=True)))]


class StoredReferences:
    """A DPOTrainer that keeps the reference log-probs that its pairs come with.

        class Mine(StoredReferences, trl.DPOTrainer): ...

    All loss types and f-divergences, WPO weighting and `ld_alpha` are TRL's own code on the stored
    sums. "aot" is refused: it sorts the references' margins apart from the policy's, so that a
    pair meets references of other stages ("aot_unpaired" does not).

    Pairs of `stage_pairs` come with a checksum of the tokens that their sums are over. Where the
    tokenizer, its chat template, `max_length`, `truncation_mode` or `ld_alpha` have changed since,
    they are refused.
    """

    _new_rows: Sequence[int] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        host: Any = self
        _check_precomputed(host.args)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        _check_precomputed(args)
        base: Any = super()
        return base._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        host: Any = self
        base: Any = super()
        stored = [column for column in (*REFERENCES, CHECKSUM) if column in dataset.column_names]
        missing = _without_references(dataset)
        if len(missing) < len(dataset) and "aot" in host.loss_types:
            raise ValueError(
                "loss_type='aot' sorts the references' margins apart from the policy's, so pairs "
                "would meet references of other stages: take 'aot_unpaired', or no stored pairs"
            )
        if name == "train":
            self._new_rows = missing
        sums = [self._checksum(pair) for pair in dataset]
        if CHECKSUM in stored:
            for i, (mine, given) in enumerate(zip(sums, dataset[CHECKSUM], strict=True)):
                if given is not None and given != mine:
                    raise ValueError(
                        f"pair {i} of the {name} data has reference log-probs of other tokens than "
                        "it has now: the tokenizer, its chat template, max_length, truncation_mode "
                        "or ld_alpha was another in its stage"
                    )
        bare = dataset.remove_columns(stored)
        if len(missing) == len(dataset):
            return base._precompute_ref_logps(bare, name, batch_size).add_column(CHECKSUM, sums)
        columns = {column: list(dataset[column]) for column in REFERENCES}
        if missing:
            made = base._precompute_ref_logps(bare.select(missing), name, batch_size)
            for column in REFERENCES:
                for i, value in zip(missing, made[column], strict=True):
                    columns[column][i] = value
        # In float32, as TRL has them.
        for column, values in columns.items():
            bare = bare.add_column(column, torch.tensor(values, dtype=torch.float32).numpy())
        return bare.add_column(CHECKSUM, sums)

    def _checksum(self, pair: Any) -> int:
        host: Any = self
        return pair_checksum(
            pair,
            max_length=host.args.max_length,
            truncation_mode=host.args.truncation_mode,
            ld_alpha=host.ld_alpha,
        )

    def stage_pairs(
        self, stage: str | None = None, *, size: int | None = None, seed: int = 0
    ) -> Any:
        """The pairs that were new in this trainer, with their reference log-probs: what the next
        stage replays.

        Args:
            stage: its name, kept in the column `stage`.
            size: how many pairs, drawn without replacement; by default all.
            seed: of that draw.

        Returns:
            A `datasets.Dataset` with the columns that DPOTrainer takes (prompt, chosen, rejected
            and what else the pairs had), without the tokens. `save_to_disk` and `to_parquet` keep
            it.
        """
        host: Any = self
        if self._new_rows is None:
            raise ValueError("the train data of this trainer has no reference log-probs")
        rows = host.train_dataset.select(self._new_rows)
        if size is not None and size < len(rows):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            rows = rows.select(sorted(order[:size].tolist()))
        dropped = ("prompt_ids", "chosen_ids", "rejected_ids", STAGE)
        rows = rows.remove_columns([name for name in dropped if name in rows.column_names])
        return rows if stage is None else rows.add_column(STAGE, [stage] * len(rows))


def _check_precomputed(args: Any) -> None:
    if not args.precompute_ref_log_probs:
        raise ValueError(
            "stored references are read with precompute_ref_log_probs=True only: set it in the "
            "DPOConfig"
        )
