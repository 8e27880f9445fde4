"""Self-distillation: oracles in float64, teachers that are what they are said to be."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from divergence_oracle import divergence, log_probs
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, NoLogits, batch, gemma2, gradients, llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from cl_fast.errors import CheckpointError
from cl_fast.integrations.keeping import KeepCallback, KeepMixin
from cl_fast.losses import TeacherCache
from cl_fast.training.distilling import SelfDistill
from cl_fast.training.keeping import Task
from cl_fast.training.prompts import PromptDraw


def prompts(count: int = 10, seed: int = 0, longest: int = 9) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        size = longest - i % 4
        ids = torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


PROMPTS = prompts()
TASK = Task("new")
LOGGED = "self_distill/divergence"


def moved(model: nn.Module, seed: int = 1, size: float = 0.1) -> nn.Module:
    """As if a task had trained what can be trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    targets = changes.pop("targets", ["q_proj", "v_proj", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(llama(seed), LoraConfig(r=2, target_modules=targets, **changes))


def wanted(
    student: nn.Module,
    teacher: nn.Module,
    rows: list[dict[str, list[int]]],
    *,
    kind: str = "forward_kl",
    mix: float = 0.5,
    temperature: float = 1.0,
    tokens: str = "all",
    average: str = "sequences",
) -> Tensor:
    """In float64 from whole logits, one sequence at a time, without padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            z = teacher(input_ids=ids).logits[0]
        x = student(input_ids=ids).logits[0]
        lp = log_probs(x, temperature=temperature)
        lq = log_probs(z, temperature=temperature)
        values = divergence(lp, lq, kind, mix)
        if tokens == "labels":
            values = values[[i for i, y in enumerate(row["labels"][1:]) if y != -100]]
        total = total + (values.mean() if average == "sequences" else values.sum())
        count += 1 if average == "sequences" else values.numel()
    return total / count


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1) -> None:
    """Up to float32: the norms of transformers compute in it whatever the model's dtype."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 2.0**-20 * scale * float(gradient.abs().max())
        torch.testing.assert_close(found[name], scale * gradient, rtol=0, atol=atol, msg=name)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["copy", "base", "ema"])
@pytest.mark.parametrize("on", ["prompts", "inputs"])
def test_it_is_exactly_zero_where_the_task_begins(teacher: str, on: str) -> None:
    model = adapted() if teacher == "base" else llama()
    keep = SelfDistill(PROMPTS if on == "prompts" else None, teacher=teacher, on=on, kind="jsd")
    keep.before_task(model, TASK)
    model.train()
    loss = keep.loss(model, batch())
    assert loss is not None
    assert float(loss.detach()) == 0
    loss.backward()
    assert gradients(model)
    assert all(not gradient.any() for gradient in gradients(model).values())
    assert model.training


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("forward_kl", {}),
        ("reverse_kl", {"temperature": 2.0}),
        ("forward_kl", {"temperature": 2.0, "temperature_squared": True, "weight": 0.3}),
        ("jsd", {"beta": 0.3, "tokens": "labels"}),
        ("forward_kl", {"average": "tokens"}),
        ("tvd", {"average": "tokens", "tokens": "labels"}),
    ],
)
def test_loss_and_gradients_are_those_of_whole_logits(kind: str, options: dict[str, Any]) -> None:
    teacher = llama().double()
    model = copy.deepcopy(teacher)
    keep = SelfDistill(PROMPTS, kind=kind, batch_size=10, **options)
    keep.before_task(model, TASK)
    moved(model)
    loss = keep.loss(model, {})
    assert loss is not None
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    factor = options.pop("weight", 1.0)
    factor *= 4.0 if options.pop("temperature_squared", False) else 1.0
    expected = wanted(model, teacher, PROMPTS, kind=kind, mix=options.pop("beta", 0.5), **options)
    expected.backward()
    assert float(expected.detach()) > 1e-3
    torch.testing.assert_close(loss, factor * expected, rtol=1e-7, atol=0)
    assert_same(found, gradients(model), factor)
    assert keep.measures() == {"self_distill/divergence": pytest.approx(expected.item(), rel=1e-7)}
    assert keep.measures() == {}


def test_softcaps_are_the_models() -> None:
    teacher = gemma2().double()
    model = copy.deepcopy(teacher)
    keep = SelfDistill(PROMPTS, batch_size=10)
    keep.before_task(model, TASK)
    moved(model)
    loss = keep.loss(model, {})
    torch.testing.assert_close(loss, wanted(model, teacher, PROMPTS), rtol=1e-7, atol=0)


def test_new_inputs_are_those_of_the_batch() -> None:
    teacher, given = llama().double(), batch()
    model = copy.deepcopy(teacher)
    rows = []
    for ids, mask, labels in zip(*given.values(), strict=True):
        first = int((mask == 0).sum())
        rows.append({"input_ids": ids[first:].tolist(), "labels": labels[first:].tolist()})
    for tokens in ("labels", "all"):
        keep = SelfDistill(on="inputs", tokens=tokens)
        student = copy.deepcopy(model)
        keep.before_task(student, TASK)
        moved(student)
        # What hosts put beside what a forward takes does not reach it.
        extra = {"completion_mask": given["attention_mask"], "ref_logps": torch.zeros(3)}
        loss = keep.loss(student, {**given, **extra})
        expected = wanted(student, teacher, rows, tokens=tokens)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


def test_logits_are_never_made() -> None:
    given = batch(size=4)
    with NoLogits(20):
        for teacher in ("copy", "ema", "base"):
            for on in ("prompts", "inputs"):
                model = adapted(targets=["q_proj"])
                keep = SelfDistill(
                    PROMPTS if on == "prompts" else None, teacher=teacher, on=on, chunk_tokens=8
                )
                keep.before_task(model, TASK)
                loss = keep.loss(moved(model), given)
                assert loss is not None
                loss.backward()


def test_accumulated_prompts_give_the_gradient_of_all_at_once() -> None:
    """Sequences of different lengths: each has its weight."""
    start = llama().double()
    found = []
    for size in (8, 2):
        model = copy.deepcopy(start)
        keep = SelfDistill(PROMPTS, batch_size=size)
        keep.before_task(model, TASK)
        moved(model)
        for _ in range(8 // size):
            loss = keep.loss(model, {})
            assert loss is not None
            (loss * size / 8).backward()
        found.append(gradients(model))
    assert_same(found[0], found[1])


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        model = llama().double()
        keep = SelfDistill(PROMPTS)
        keep.before_task(model, TASK)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        moved(model).train()
        loss = keep.loss(model, {})
        assert loss is not None
        loss.backward()
        found.append(gradients(model))
    assert_same(found[0], found[1])


# --- teachers ------------------------------------------------------------------------------------


def test_the_base_is_the_model_without_its_adapters() -> None:
    base = llama().double()
    model = moved(adapted(lora_dropout=0.5).double())
    keep = SelfDistill(PROMPTS, teacher="base", batch_size=10)
    keep.before_task(model, TASK)
    model.eval()  # no dropout in the student, to compare
    loss = keep.loss(model, {})
    expected = wanted(model, base, PROMPTS)
    assert float(expected.detach()) > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


def test_what_was_frozen_within_an_adapter_stays_so() -> None:
    """PEFT lets all active adapters be trained again where they are switched on."""
    model = moved(adapted())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    keep = SelfDistill(PROMPTS, teacher="base")
    keep.before_task(model, TASK)
    host = model(**batch()).loss
    loss = keep.loss(model, {})
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    (host + loss).backward()
    assert all("lora_B" in name for name in gradients(model))
    assert len(gradients(model)) == 5


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_ema_follows_its_formula(adapters: bool, decay: float) -> None:
    model = moved(adapted()).double() if adapters else llama().double()
    teacher = copy.deepcopy(model)
    keep = SelfDistill(PROMPTS, teacher="ema", decay=decay, batch_size=10)
    keep.before_task(model, TASK)
    averages = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for seed in range(3):
        moved(model, seed)
        keep.on_update(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                averages[name] = decay * averages[name] + (1 - decay) * parameter.detach()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name in averages:
                parameter.copy_(averages[name])
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = keep.loss(model, {})
    expected = wanted(model, teacher, PROMPTS)
    assert float(expected.detach()) > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert (keep.state_dict().get("ema") is None) == (decay == 1)


def test_the_average_of_a_bfloat16_model_moves_by_steps_that_bfloat16_rounds_away() -> None:
    model = llama().to(torch.bfloat16)
    keep = SelfDistill(PROMPTS, teacher="ema", decay=0.999)
    keep.before_task(model, TASK)
    start = model.lm_head.weight.detach().float()
    with torch.no_grad():
        model.lm_head.weight += 0.25
    end = model.lm_head.weight.detach().float()
    for _ in range(10):
        keep.on_update(model)
    average = keep.state_dict()["ema"]["lm_head.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, end + 0.999**10 * (start - end), rtol=1e-4, atol=1e-6)
    loss = keep.loss(model, {})
    assert loss is not None
    loss.backward()


def test_a_cached_teacher_is_the_live_one_on_its_likeliest_tokens(tmp_path: Path) -> None:
    teacher = llama()
    cache = TeacherCache.build(teacher, PROMPTS, k=7, path=tmp_path / "all", progress=False)
    keep = SelfDistill(PROMPTS, teacher=cache, batch_size=10)
    model = copy.deepcopy(teacher)
    keep.before_task(model, TASK)
    moved(model)
    loss = keep.loss(model, {})
    expected = torch.zeros((), dtype=torch.float64)
    for row in PROMPTS:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            lq, lp = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (teacher, model))
        top = lq.topk(7, -1)
        p, q = lp.gather(-1, top.indices).exp(), top.values.exp()
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        expected += (q * (q / p).log()).sum(-1).mean() / len(PROMPTS)
    assert float(expected) > 1e-3
    # Log-probs are stored in 16 bits: a relative error of 2^-11 of each.
    torch.testing.assert_close(loss.double(), expected, rtol=4e-3, atol=0)  # type: ignore[union-attr]


def test_what_a_cache_did_not_keep_does_not_count(tmp_path: Path) -> None:
    teacher = llama()
    model = moved(copy.deepcopy(teacher))
    losses = []
    for keep_what, tokens in (("labels", "all"), ("all", "labels")):
        path = tmp_path / keep_what
        cache = TeacherCache.build(teacher, PROMPTS, k=7, path=path, keep=keep_what, progress=False)
        keep = SelfDistill(PROMPTS, teacher=cache, tokens=tokens, batch_size=10)
        keep.before_task(model, TASK)
        losses.append(keep.loss(model, {}))
    torch.testing.assert_close(*losses)


def test_a_copy_may_have_another_dtype() -> None:
    model = llama()
    keep = SelfDistill(PROMPTS, dtype=torch.bfloat16)
    keep.before_task(model, TASK)
    loss = keep.loss(model, {})
    assert loss is not None
    assert 0 < float(loss.detach()) < 1e-2


def test_a_copy_runs_its_own_weights_where_a_host_has_put_a_forward_on_the_model() -> None:
    """As TRL's trainers do, with a closure over the model, which a deep copy does not copy."""
    model = llama()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    keep = SelfDistill(PROMPTS)
    keep.before_task(model, TASK)
    moved(model)
    loss = keep.loss(model, {})
    assert loss is not None
    assert float(loss.detach()) > 1e-3


def test_a_student_that_runs_another_model_is_refused() -> None:
    """A deep copy of a model that TRL has patched: its logits are those of the first one."""
    from trl.trainer.utils import add_fused_lm_head

    model = llama()
    add_fused_lm_head(model)
    SelfDistill(PROMPTS).before_task(model, TASK)
    student = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"runs another one.*del model\.__dict__"):
        SelfDistill(PROMPTS).before_task(student, TASK)
    del student.__dict__["forward"]
    SelfDistill(PROMPTS).before_task(student, TASK)


# --- prompts, time, state ------------------------------------------------------------------------


def test_prompts_may_be_made_when_a_task_begins() -> None:
    asked = []

    def made(model: nn.Module, task: Task) -> Any:
        asked.append((model, task.name))
        return PROMPTS if task.index else None

    model = llama()
    keep = SelfDistill(made)
    keep.before_task(model, Task("first", 0))
    assert keep.loss(model, batch()) is None
    assert keep.state_dict() == {}
    keep.after_task(model, Task("first", 0))
    keep.before_task(model, Task("second", 1))
    assert keep.loss(model, batch()) is not None
    assert asked == [(model, "first"), (model, "second")]
    keep.after_task(model, Task("second", 1))
    with pytest.raises(ValueError, match="before_task"):
        keep.loss(model, batch())


@pytest.mark.parametrize("teacher", ["copy", "ema"])
def test_a_resumed_task_goes_on_as_if_nothing_had_happened(teacher: str, tmp_path: Path) -> None:
    def steps(keep: SelfDistill, model: nn.Module, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = keep.loss(model, {})
            assert loss is not None
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad + 1e-3
            keep.on_update(model)
            losses.append(loss.item())
        return losses

    made = {"teacher": teacher, "batch_size": 3, "decay": 0.8}
    whole, model = SelfDistill(PROMPTS, **made), llama()
    whole.before_task(model, TASK)
    steps(whole, model, 3)
    torch.save([whole.state_dict(), model.state_dict()], tmp_path / "state.pt")
    expected = steps(whole, model, 3)

    again, model = SelfDistill(PROMPTS, **made), llama()
    again.before_task(model, TASK)
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(weights)
    again.load_state_dict(state)
    assert steps(again, model, 3) == expected
    assert again.options() == whole.options()


def test_states_of_other_options_are_refused() -> None:
    model = llama()
    keep, other = SelfDistill(PROMPTS), SelfDistill(PROMPTS, teacher="ema")
    for one in (keep, other):
        one.before_task(model, TASK)
    with pytest.raises(CheckpointError, match=r"holds \['drawn'\].*\['drawn', 'ema'\]"):
        other.load_state_dict(keep.state_dict())
    state = other.state_dict()
    state["ema"]["lm_head.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*\(3,\).*of another model"):
        other.load_state_dict(state)


def test_draws_do_not_depend_on_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = PromptDraw(10, seed=3)
    order = [i for _ in range(6) for i in alone.next(5)]
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order != [i for d in [PromptDraw(10, seed=4)] for _ in range(6) for i in d.next(5)]
    shared: list[int] = []
    draws = [PromptDraw(10, seed=3), PromptDraw(10, seed=3)]
    for _ in range(5):
        for rank, draw in enumerate(draws):
            monkeypatch.setattr("cl_fast.training.drawing.this_rank", lambda rank=rank: (rank, 2))
            shared += draw.next(3)
    assert shared == order
    resumed = PromptDraw(10, seed=3)
    resumed.drawn = 17
    monkeypatch.setattr("cl_fast.training.drawing.this_rank", lambda: (0, 1))
    assert resumed.next(13) == order[17:]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**40))
def test_ranks_share_the_stream_of_one(count: int, size: int, ranks: int, seed: int) -> None:
    steps = -(-3 * count // (size * ranks))
    alone = PromptDraw(count, seed)
    draws = [PromptDraw(count, seed) for _ in range(ranks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cl_fast.training.drawing.this_rank", lambda: (0, 1))
        order = alone.next(steps * size * ranks)
        shared: list[int] = []
        for _ in range(steps):
            for rank, draw in enumerate(draws):
                patch.setattr("cl_fast.training.drawing.this_rank", lambda rank=rank: (rank, ranks))
                shared += draw.next(size)
    assert shared == order
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


# --- in trainers ---------------------------------------------------------------------------------


class Keeping(KeepMixin, Trainer):  # type: ignore[misc]
    """The Trainer, with keeps."""


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**given, **changes})


ROWS = [
    dict(zip(batch(), values, strict=True)) for values in zip(*batch(1, 16).values(), strict=True)
]


def trained(folder: Path, keep: SelfDistill, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    model = changes.pop("model", None) or llama()
    resume = changes.pop("resume", None)
    trainer = Keeping(model, arguments(folder, **changes), train_dataset=ROWS, keep=keep)
    trainer.train(resume_from_checkpoint=resume)
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}, trainer


def test_in_the_trainer_accumulation_changes_nothing(tmp_path: Path) -> None:
    found = [
        trained(
            tmp_path,
            SelfDistill(PROMPTS, batch_size=8 // parts, weight=5.0),
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            model=moved(llama().double(), size=0.0),
        )[0]
        for parts in (1, 4)
    ]
    plain, _ = trained(
        tmp_path, SelfDistill(PROMPTS, weight=1e-9), per_device_train_batch_size=8, optim="sgd",
        model=llama().double(),
    )  # fmt: skip
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert not torch.allclose(plain["lm_head.weight"], found[0]["lm_head.weight"], atol=1e-6)


def test_in_the_trainer_it_logs_and_resumes(tmp_path: Path) -> None:
    def keep() -> SelfDistill:
        return SelfDistill(PROMPTS, teacher="ema", decay=0.5, batch_size=3)

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, trainer = trained(tmp_path, keep(), **options)
    logged = [x[LOGGED] for x in trainer.state.log_history if LOGGED in x]
    assert len(logged) == 4
    assert logged[0] == 0 < logged[1]
    again, _ = trained(tmp_path, keep(), **options, resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_autocast_does_not_tell_student_and_copy_apart(tmp_path: Path) -> None:
    _, trainer = trained(tmp_path, SelfDistill(PROMPTS), bf16=True)
    logged = [x[LOGGED] for x in trainer.state.log_history if LOGGED in x]
    assert logged[0] == 0 < logged[1]


@pytest.mark.parametrize("teacher", ["copy", "base", "ema"])
def test_in_sft_of_trl_no_logits_are_made(teacher: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from tiny_models import tokenizer
    from trl import SFTConfig, SFTTrainer

    class KeepingSFT(KeepMixin, SFTTrainer):  # type: ignore[misc]
        pass

    class Watched(SelfDistill):
        def loss(self, model: nn.Module, inputs: Any) -> Tensor | None:
            with NoLogits(17):
                return super().loss(model, inputs)

    data = Dataset.from_list([{"text": "the cat sat on the mat"}, {"text": "a dog ran"}] * 8)
    # Twice: the forward that TRL has put on the model must not become that of the teacher.
    model = adapted(targets=["q_proj", "v_proj"]) if teacher == "base" else llama()
    for _ in range(2):
        config = SFTConfig(**{**arguments(tmp_path).to_dict(), "max_length": 16, "bf16": False})
        trainer = KeepingSFT(
            model, config, train_dataset=data, processing_class=tokenizer(),
            keep=Watched(PROMPTS, teacher=teacher, chunk_tokens=8),
        )  # fmt: skip
        trainer.train()
        logged = [x[LOGGED] for x in trainer.state.log_history if LOGGED in x]
        assert logged[-1] > 0
        assert logged[0] == 0 or teacher == "base"
        model = trainer.model


def test_a_callback_is_refused() -> None:
    with pytest.raises(ValueError, match="hook `loss`"):
        KeepCallback(SelfDistill(PROMPTS))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, "prompts are needed"),
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": "a text"}, TypeError, "prompts must be a map-style dataset"),
        ({"prompts": [{"text": "a"}]}, ValueError, r"prompts\[0\] must have input_ids: tokenise"),
        ({"prompts": [[1.5]]}, ValueError, "one sequence of token ids"),
        ({"prompts": [[3]], "tokens": "labels"}, ValueError, r"prompts\[0\] has no labels"),
        ({"prompts": [[3]], "on": "inputs"}, ValueError, "no use with on='inputs'"),
        ({"on": "answers"}, ValueError, "on must be one of"),
        ({"teacher": "live"}, ValueError, "teacher must be one of 'copy', 'base', 'ema'"),
        ({"teacher": nn.Linear(2, 2)}, TypeError, "DistillMixin"),
        ({"tokens": "some"}, ValueError, "tokens must be one of"),
        ({"average": "rows"}, ValueError, "average must be one of"),
        ({"tail": "cut"}, ValueError, "tail must be one of"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"weight": 0.0}, ValueError, "weight must be positive"),
        ({"weight": float("nan")}, ValueError, "weight must be positive"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be positive"),
        ({"kind": "kl"}, ValueError, "kind"),
        ({"kind": "jsd", "beta": 2.0}, ValueError, "beta"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\]"),
        ({"seed": -1}, ValueError, "seed"),
        ({"teacher": "ema", "dtype": torch.bfloat16}, ValueError, "dtype is of teacher='copy'"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens"),
    ],
)
def test_bad_options(given: dict[str, Any], error: type[Exception], words: str) -> None:
    alone = not given or "prompts" in given
    with pytest.raises(error, match=words):
        SelfDistill(**(given if alone else {"prompts": PROMPTS, **given}))


def test_bad_caches(tmp_path: Path) -> None:
    cache = TeacherCache.build(llama(), PROMPTS, k=3, path=tmp_path / "cache", progress=False)
    with pytest.raises(CheckpointError, match="another dataset"):
        SelfDistill(prompts(seed=1), teacher=cache)
    with pytest.raises(ValueError, match="temperature 1 and its tail is not known at 2"):
        SelfDistill(PROMPTS, teacher=cache, temperature=2.0)
    with pytest.raises(ValueError, match="not to on='inputs'"):
        SelfDistill(teacher=cache, on="inputs")
    with pytest.raises(ValueError, match="the dataset that it was built of"):
        SelfDistill(lambda model, task: PROMPTS, teacher=cache)
    keep = SelfDistill(PROMPTS, teacher=cache, temperature=2.0, tail="renorm")
    keep.before_task(llama(), TASK)
    assert keep.loss(moved(llama()), {}) is not None


def test_bad_models_and_batches() -> None:
    with pytest.raises(ValueError, match="teacher='base' needs a PEFT model"):
        SelfDistill(PROMPTS, teacher="base").before_task(llama(), TASK)
    with pytest.raises(ValueError, match="none requires grad"):
        SelfDistill(PROMPTS, teacher="ema").before_task(llama().requires_grad_(False), TASK)
    with pytest.raises(ValueError, match="no output head"):
        SelfDistill(PROMPTS).before_task(nn.Linear(2, 2), TASK)
    with pytest.raises(ValueError, match=r"what prompts\(\) gave is empty"):
        SelfDistill(lambda model, task: []).before_task(llama(), TASK)
    with pytest.raises(ValueError, match="needs input_ids in the batch; it has pixels"):
        _begun(SelfDistill(on="inputs")).loss(llama(), {"pixels": torch.zeros(1)})
    with pytest.raises(ValueError, match="no labels"):
        _begun(SelfDistill(on="inputs")).loss(llama(), {"input_ids": torch.ones(1, 3).long()})
    with pytest.raises(ValueError, match=r"below 67.*got 70"):
        _begun(SelfDistill([[70, 3]])).loss(llama(), {})
    model = llama()
    keep = SelfDistill(PROMPTS, teacher="ema")
    keep.before_task(model, TASK)
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*within it"):
        keep.on_update(model)


def _begun(keep: SelfDistill) -> SelfDistill:
    keep.before_task(llama(), TASK)
    return keep
