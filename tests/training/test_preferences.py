"""Pairs keep the reference of their own stage; the memory gives back what it was given."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, NoLogits, gemma2, llama
from torch import Tensor, nn

from cl_fast.training.keeping import Task
from cl_fast.training.preferences import (
    PAIR,
    REFERENCES,
    PreferenceMemory,
    PreferenceReplay,
    collate_pairs,
    has_references,
    mix_preferences,
    pair_checksum,
    pair_logprobs,
    preference_loss,
    with_reference_logps,
)

COLUMNS = (*PAIR, *REFERENCES)


def pairs(seed: int, count: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(1, 6), "chosen_ids": ids(1, 8), "rejected_ids": ids(1, 8), "note": i}
        for i in range(count)
    ]


def by_hand(model: nn.Module, pair: dict[str, Any], answer: str) -> Tensor:
    """The sum of the log-probs of an answer: one sequence, its logits, in float64."""
    ids = torch.tensor([pair["prompt_ids"] + pair[answer]])
    logits = copy.deepcopy(model).double()(input_ids=ids).logits[0].log_softmax(-1)
    first = len(pair["prompt_ids"])
    return sum(logits[t - 1, ids[0, t]] for t in range(first, ids.size(1)))  # type: ignore[return-value]


def test_references_are_sums_over_answers_and_old_ones_stay() -> None:
    model = llama(1).train()
    rows = pairs(0)
    rows[2].update(ref_chosen_logps=-1.25, ref_rejected_logps=-2.5)
    rows[4].update(ref_chosen_logps=None, ref_rejected_logps=math.nan)
    with NoLogits(12):
        found = with_reference_logps(rows, model, batch_size=4)
    assert model.training
    assert [row["note"] for row in found] == list(range(6))
    assert "ref_chosen_logps" not in rows[0]  # the caller's rows are not touched
    for i, row in enumerate(found):
        expected = [by_hand(model, row, answer).item() for answer in PAIR[1:]]
        if i == 2:
            expected = [-1.25, -2.5]
        assert [row[name] for name in REFERENCES] == pytest.approx(expected, rel=1e-5)
    again = with_reference_logps(found, llama(9))
    assert again == found


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "robust"])
def test_loss_and_gradient_are_those_of_the_formula_with_each_stages_reference(
    loss_type: Any,
) -> None:
    """-log sigma of eq. 7 in float64, from logits; the references are of two other models."""
    first, second, policy = llama(1).double(), gemma2(2).double(), llama(3).double()
    old = with_reference_logps(pairs(0, 3), first)
    new = with_reference_logps(pairs(1, 3), second)
    batch = collate_pairs(old + new)
    beta, s = 0.3, 0.1
    policy.zero_grad()
    preference_loss(
        policy, batch, beta=beta, loss_type=loss_type, label_smoothing=s * (loss_type == "robust")
    ).backward()
    found = policy.model.layers[0].mlp.up_proj.weight.grad.clone()
    policy.zero_grad()

    losses = []
    for pair, reference in [(p, first) for p in old] + [(p, second) for p in new]:
        ratios = []
        for answer in PAIR[1:]:
            ids = torch.tensor([pair["prompt_ids"] + pair[answer]])
            at = torch.arange(len(pair["prompt_ids"]), ids.size(1))
            log_p, log_q = (
                m(input_ids=ids).logits[0].log_softmax(-1)[at - 1, ids[0, at]].sum()
                for m in (policy, reference)
            )
            mean = 1 / len(at) if loss_type == "ipo" else 1
            ratios.append((log_p - log_q.detach()) * mean)
        delta = ratios[0] - ratios[1]
        up, down = torch.sigmoid(beta * delta).log(), torch.sigmoid(-beta * delta).log()
        losses.append(
            {
                "sigmoid": -up,
                "ipo": (delta - 1 / (2 * beta)) ** 2,
                "robust": (-(1 - s) * up + s * down) / (1 - 2 * s),
            }[loss_type]
        )
    expected = torch.stack(losses)
    expected.mean().backward()
    torch.testing.assert_close(found, policy.model.layers[0].mlp.up_proj.weight.grad)
    mine = preference_loss(
        policy, batch, beta=beta, loss_type=loss_type, label_smoothing=s * (loss_type == "robust"),
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(mine, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_is_that_of_trl(mode: Any) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = with_reference_logps(pairs(4), llama(0), max_length=6, truncation_mode=mode)
    theirs = DataCollatorForPreference(0, max_length=6, truncation_mode=mode)(rows)
    mine = collate_pairs(rows, max_length=6, truncation_mode=mode)
    assert mine.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(mine[name].to(x.dtype), x, rtol=0, atol=0)


# --- memory ------------------------------------------------------------------------------------


def stage(seed: int, count: int) -> list[dict[str, Any]]:
    made = pairs(seed, count)
    for i, row in enumerate(made):
        row.update(ref_chosen_logps=-float(i) - seed / 7, ref_rejected_logps=-3.5 * i)
    return made


def bare(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in COLUMNS}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_memory_gives_back_what_it_was_given(sizes: list[int]) -> None:
    memory = PreferenceMemory()
    kept = []
    for i, size in enumerate(sizes):
        memory.add(f"s{i}", stage(i, size))
        kept += [bare(row) for row in stage(i, size)]
    assert [memory[i] for i in range(len(memory))] == kept
    assert memory[-1] == kept[-1]
    assert memory.stages == {f"s{i}": size for i, size in enumerate(sizes)}
    buffer = io.BytesIO()
    torch.save(memory.state_dict(), buffer)
    buffer.seek(0)
    other = PreferenceMemory()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert [*other.stage("s0")] == kept[: sizes[0]]
    assert [other[i] for i in range(len(other))] == kept
    with pytest.raises(IndexError):
        memory[len(kept)]


def test_memory_keeps_so_many_of_a_stage() -> None:
    rows = stage(0, 40)
    picks = []
    for seed in (0, 0, 1):
        memory = PreferenceMemory()
        memory.add("a", rows, size=10, seed=seed)
        kept = [memory[i] for i in range(len(memory))]
        places = [[bare(row) for row in rows].index(row) for row in kept]
        assert len(set(places)) == 10
        picks.append(places)
    assert picks[0] == picks[1] != picks[2]


def test_mix_holds_the_ratio_and_the_references() -> None:
    new, old = stage(0, 30), PreferenceMemory()
    old.add("a", stage(1, 20))
    mixed = mix_preferences(new, old, 0.25, seed=3)
    rows = [mixed[i] for i in range(len(mixed))]
    past = [row for row in rows if row in [old[i] for i in range(20)]]
    assert abs(len(past) - len(rows) / 4) < 1
    fresh = [row for row in rows if row not in past]
    assert sorted(map(str, fresh)) == sorted(str(bare(row)) for row in new)
    assert mix_preferences(new, old, 0.0) is new


def test_a_checksum_tells_what_sums_are_over() -> None:
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]}
    base = pair_checksum(pair)
    assert base == pair_checksum({**pair, "note": 1}, max_length=5)
    assert 0 <= base < 2**63
    others = [
        pair_checksum(pair, max_length=4),
        pair_checksum(pair, max_length=4, truncation_mode="keep_end"),
        pair_checksum(pair, ld_alpha=0.5),
        pair_checksum({**pair, "prompt_ids": [5], "chosen_ids": [6, 7, 8, 9]}),
        pair_checksum({**pair, "chosen_ids": [7, 8, 3]}),
        pair_checksum({**pair, "rejected_ids": [10, 11]}),
    ]
    assert len({base, *others}) == 7


# --- the keep ----------------------------------------------------------------------------------


def test_keep_remembers_stages() -> None:
    model = nn.Linear(1, 1)
    keep = PreferenceReplay(0.5, size=4, seed=1)
    first, second = stage(0, 8), stage(1, 8)
    keep.before_task(model, Task("a"))
    assert keep.data(first, ()) is first
    keep.after_task(model, Task("a"))
    saved = keep.state_dict()
    keep.before_task(model, Task("b", 1))
    mixed = keep.data(second, [Task("a")])
    again = PreferenceReplay(0.5, size=4, seed=1)
    again.load_state_dict(saved)
    repeated = again.data(second, [Task("a")])
    assert [mixed[i] for i in range(len(mixed))] == [repeated[i] for i in range(len(repeated))]
    again.load_state_dict(saved)  # of a checkpoint within the task
    keep.after_task(model, Task("b", 1))
    assert keep.memory.stages == {"a": 4, "b": 4}
    assert all(row in [bare(r) for r in second] for row in keep.memory.stage("b"))

    late = PreferenceReplay(0.5)
    late.data(second, ())
    with pytest.raises(ValueError, match="before the trainer is made"):
        late.load_state_dict(saved)
    with pytest.raises(ValueError, match="already"):
        keep.before_task(model, Task("a", 2))


LONELY = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PreferenceReplay(1.0), r"ratio must be in \[0, 1\); got 1.0"),
        (lambda: PreferenceReplay(-0.1), r"ratio must be in \[0, 1\)"),
        (lambda: PreferenceReplay(0.1, size=0), "size must be at least 1"),
        (lambda: PreferenceReplay(0.1).data([LONELY], ()), "precompute_ref_log_probs=True"),
        (lambda: PreferenceReplay(0.1).data(stage(0, 1), [Task("a")]), "past stage 'a'"),
        (lambda: mix_preferences(stage(0, 2), stage(1, 2), 1.0), "ratio"),
        (lambda: mix_preferences(stage(0, 2), [], 0.5), "past has no pairs"),
        (lambda: mix_preferences([LONELY], stage(0, 2), 0.5), "no reference log-probs"),
        (lambda: mix_preferences([{"prompt": "a"}], stage(0, 2), 0.5), "no prompt_ids"),
        (lambda: PreferenceMemory().add("a", []), "'a' has no pairs"),
        (lambda: PreferenceMemory().add("a", [LONELY]), "pair 0 of the stage 'a'"),
        (lambda: collate_pairs(stage(0, 1), truncation_mode="middle"), "truncation_mode"),  # type: ignore[arg-type]
        (lambda: collate_pairs([{"prompt": "a"}]), "pair 0 has no prompt_ids"),
        (lambda: preference_loss(llama(), collate_pairs([LONELY])), "no ref_chosen_logps"),
        (lambda: has_references({"ref_chosen_logps": 1.0}), "but not the other"),
        (lambda: pair_logprobs(llama(), {"input_ids": torch.ones(2, 2)}), "which tokens count"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
