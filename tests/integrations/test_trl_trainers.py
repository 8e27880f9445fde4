"""TRL's trainers with our losses against TRL's own functions on the same batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import WORDS, NoLogits, batch, gemma2, gradients, llama, tokenizer
from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*experimental"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        **changes,
    }


def sentence(seed: int, words: int) -> str:
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[int(i)] for i in order[:words])


def compare(trainer: Any, host: type, inputs: dict[str, Any], *more: Any, method: str) -> float:
    """Ours and TRL's own method on the same trainer: loss and gradients."""
    results = []
    for function in (getattr(type(trainer), method), getattr(host, method)):
        trainer.model.zero_grad()
        torch.manual_seed(0)
        loss = function(trainer, trainer.model, dict(inputs), *more)
        loss.backward()
        results.append((loss.detach(), gradients(trainer.model)))
    (ours, found), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 2e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=tolerance, msg=name)
    assert any(gradient.any() for gradient in expected.values())
    return float(ours)


# --- GKD ---------------------------------------------------------------------------------------


def gkd(folder: Path, student: nn.Module, teacher: nn.Module, **changes: Any) -> Any:
    from trl.experimental.gkd import GKDConfig

    from cl_fast.integrations.trl import GKDTrainer

    rows = [
        {
            "messages": [
                {"role": "user", "content": sentence(i, 4)},
                {"role": "assistant", "content": sentence(i + 50, 5)},
            ]
        }
        for i in range(8)
    ]
    args = GKDConfig(**options(folder, max_new_tokens=4, max_length=32, **changes))
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, torch.tensor(37)])
def test_gkd_loss_is_that_of_trl(beta: float, items: Tensor | None, tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDTrainer as Host

    trainer = gkd(tmp_path, llama(0), llama(1), beta=beta)
    compare(trainer, Host, batch(), False, items, method="compute_loss")
    with NoLogits(27):
        trainer.compute_loss(trainer.model, batch()).backward()


def test_gkd_reads_softcaps(tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDTrainer as Host

    trainer = gkd(tmp_path, gemma2(0), gemma2(1))
    compare(trainer, Host, batch(), method="compute_loss")


@pytest.mark.parametrize("outputs", [False, True])
def test_gkd_on_several_processes(
    outputs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its count is of all of them and their gradients are averaged; TRL lets that stand."""
    from accelerate import Accelerator

    trainer = gkd(tmp_path, llama(0), llama(1))
    assert trainer.args.average_tokens_across_devices
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 4))

    def loss(items: Any) -> Tensor:
        found = trainer.compute_loss(trainer.model, batch(), outputs, items)
        return found[0] if outputs else found

    items = torch.tensor(40)
    as_trl, alone = loss(items), loss(None)
    trainer.scale_by_processes = True
    torch.testing.assert_close(loss(items), 4 * as_trl)
    torch.testing.assert_close(loss(None), alone)
    trainer.args.average_tokens_across_devices = False
    torch.testing.assert_close(loss(items), as_trl)


def test_gkd_trains_and_evaluates(tmp_path: Path) -> None:
    trainer = gkd(tmp_path, llama(0), llama(1), lmbda=0.5, gradient_accumulation_steps=2)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    changed = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert "lm_head.weight" in changed


# --- SDFT --------------------------------------------------------------------------------------


def sdft(folder: Path, model: nn.Module | None = None, **changes: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig

    from cl_fast.integrations.trl import SDFTTrainer

    rows = [{"prompt": sentence(i, 4), "privileged_context": sentence(i + 9, 3)} for i in range(8)]
    given = {"teacher_model_kind": "live", "max_completion_length": 5, "num_generations": 2}
    given.update(changes)
    return SDFTTrainer(
        model=model or llama(0),
        args=SDFTConfig(**options(folder, **given)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def rollout(old: bool = True) -> dict[str, Tensor]:
    given = batch(5, 3, 11)
    other = batch(6, 3, 4)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 3:] = 0
    mask[2, 1:] = 0
    out = {
        "prompt_ids": given["input_ids"][:, :5],
        "prompt_mask": given["attention_mask"][:, :5],
        "completion_ids": given["input_ids"][:, 5:],
        "completion_mask": mask,
        "teacher_input_ids": torch.cat([other["input_ids"], given["input_ids"]], 1),
        "teacher_attention_mask": torch.cat(
            [other["attention_mask"], given["attention_mask"][:, :5], mask], 1
        ),
    }
    if old:
        generator = torch.Generator().manual_seed(1)
        out["old_per_token_logps"] = -torch.rand(3, 6, generator=generator) * 3 - 3
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"distillation_mode": "topk_logits", "distillation_topk": 7, "distillation_add_tail": True},
        {
            "distillation_mode": "topk_logits",
            "distillation_topk": 7,
            "distillation_add_tail": False,
        },
        {"distillation_mode": "topk_logits", "distillation_topk": 1, "distillation_add_tail": True},
        {"distillation_mode": "full_logits"},
        {"distillation_mode": "full_logits", "num_loss_tokens_to_skip": 2, "temperature": 0.7},
        {"distillation_mode": "full_logits", "distillation_is_clip": None},
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sdft_loss_is_that_of_trl(changes: dict[str, Any], alpha: float, tmp_path: Path) -> None:
    from trl.experimental.sdft import SDFTTrainer as Host

    trainer = sdft(tmp_path, distillation_alpha=alpha, **changes)
    trainer.current_gradient_accumulation_steps = 2
    compare(trainer, Host, rollout(), method="compute_loss")
    metrics = trainer._metrics["train"]["sdft/distillation_loss"]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    with NoLogits(18):
        trainer.compute_loss(trainer.model, rollout()).backward()


def test_sdft_sampled_tokens(tmp_path: Path) -> None:
    from trl.experimental.sdft import SDFTTrainer as Host

    changes = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
    trainer = sdft(tmp_path, temperature=1.3, **changes)
    trainer.current_gradient_accumulation_steps = 1
    compare(trainer, Host, rollout(), method="compute_loss")
    compare(trainer, Host, rollout(old=False), method="compute_loss")
    trainer.args.distillation_alpha = 0.5
    with pytest.raises(ValueError, match="reverse KL only"):
        trainer.compute_loss(trainer.model, rollout())


def test_sdft_with_the_base_as_teacher_and_lora_on_the_head(tmp_path: Path) -> None:
    from trl.experimental.sdft import SDFTTrainer as Host

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    model = get_peft_model(llama(0), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    trainer = sdft(tmp_path, model, teacher_model_kind="base", distillation_mode="full_logits")
    trainer.current_gradient_accumulation_steps = 1
    loss = compare(trainer, Host, rollout(), method="compute_loss")
    assert loss > 1e-3


def test_sdft_of_nothing_is_a_connected_zero(tmp_path: Path) -> None:
    trainer = sdft(tmp_path, distillation_mode="topk_logits", distillation_topk=5)
    trainer.current_gradient_accumulation_steps = 1
    empty = rollout()
    empty["completion_mask"] = torch.zeros_like(empty["completion_mask"])
    loss = trainer.compute_loss(trainer.model, empty)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(trainer.model).values())


@pytest.mark.parametrize("mode", ["topk_logits", "sampled_token"])
def test_sdft_trains(mode: str, tmp_path: Path) -> None:
    alpha = 1.0 if mode == "sampled_token" else 0.5
    trainer = sdft(
        tmp_path,
        distillation_mode=mode,
        distillation_topk=9,
        distillation_alpha=alpha,
        num_iterations=2,
        max_steps=3,
    )
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changed = [k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])]
    assert "lm_head.weight" in changed


def test_sdft_log_probs_of_the_rollout(tmp_path: Path) -> None:
    from trl.experimental.sdft import SDFTTrainer as Host

    trainer = sdft(tmp_path, num_iterations=3, temperature=0.8)
    given = {k: v for k, v in rollout(old=False).items() if not k.startswith("teacher")}
    with NoLogits(18):
        ours = trainer._compute_rollout_logps(**given)
    theirs = Host._compute_rollout_logps(trainer, **given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- DPO ---------------------------------------------------------------------------------------


def dpo(folder: Path, ours: bool = True, model: nn.Module | None = None, **changes: Any) -> Any:
    import trl as host

    from cl_fast.integrations.trl import DPOTrainer

    rows = [
        {"prompt": sentence(i, 3), "chosen": sentence(i + 20, 4), "rejected": sentence(i + 40, 2)}
        for i in range(8)
    ]
    made = DPOTrainer if ours else host.DPOTrainer
    policy = model or llama(0)
    adapted = hasattr(policy, "peft_config")
    return made(
        model=policy,
        ref_model=None if adapted else llama(1),
        args=host.DPOConfig(**options(folder, max_length=32, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def pairs(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_deep_copy_of_the_policy_answers_with_its_own_weights(
    adapted: bool, tmp_path: Path
) -> None:
    policy = llama(0)
    if adapted:
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]))
    model = dpo(tmp_path, model=policy).model
    inputs = batch()

    def answers(of: Any) -> list[Tensor]:
        with torch.no_grad():
            of.eval()
            fused = of(**inputs, fused_lm_head=True)
            return [of(**inputs).logits, fused.log_probs, fused.loss]

    made, expected = copy.deepcopy(model), answers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for found, value in zip(answers(made), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0)
    assert not torch.equal(answers(model)[0], expected[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "sigmoid", "precompute_ref_log_probs": True},
        {"loss_type": "ipo", "precompute_ref_log_probs": True},
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": "sigmoid", "f_divergence_type": "js_divergence", "ld_alpha": 0.5},
    ],
)
def test_dpo_loss_is_that_of_trl(changes: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for ours in (True, False):
        trainer = dpo(tmp_path, ours, beta=0.4, **changes)
        inputs = pairs(trainer)
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
        results.append((loss.detach(), gradients(trainer.model), metrics))
    (ours_, found, metrics), (theirs, expected, wanted) = results
    torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        tolerance = 1e-5 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance, msg=name)
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_dpo_makes_no_logits_and_can_leave_metrics_out(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    trainer.token_metrics = False
    trainer.train()
    inputs = pairs(trainer)
    rows = inputs["completion_mask"][:, 1:].numel()
    with NoLogits(rows):
        trainer.compute_loss(trainer.model, inputs).backward()
    logged = trainer.state.log_history[0]
    assert "rewards/margins" in logged
    assert "entropy" in logged
    assert not {"logits/chosen", "mean_token_accuracy"} & logged.keys()


def test_dpo_pays_for_token_metrics_only_where_they_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cl_fast.models.heads import LinearHead

    trainer = dpo(tmp_path)
    inputs = pairs(trainer)
    products: list[int] = []
    logits = LinearHead.logits

    def counted(head: LinearHead, *args: Any, **kwargs: Any) -> Any:
        products.append(1)
        return logits(head, *args, **kwargs)

    monkeypatch.setattr(LinearHead, "logits", counted)
    counts = []
    for wanted in (True, False, True):
        trainer.token_metrics = wanted
        products.clear()
        trainer.compute_loss(trainer.model, dict(inputs))
        counts.append(len(products))
    assert counts == [1, 0, 1]


def test_dpo_trains_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainer = dpo(tmp_path, model=model, max_steps=6)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the policy at first
    assert losses[-1] < losses[0]
    trainer.model.generate(**{k: v[:, :2] for k, v in batch().items() if k != "labels"})


# --- the stable DistillationTrainer ------------------------------------------------------------


def distillation(folder: Path, student: nn.Module, teacher: nn.Module, **changes: Any) -> Any:
    import trl as host

    from cl_fast.integrations.trl import DistillationTrainer

    rows = [{"prompt": sentence(i, 4)} for i in range(8)]
    args = host.DistillationConfig(**options(folder, max_completion_length=5, **changes))
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_loss_is_that_of_trl(beta: float, temperature: float, tmp_path: Path) -> None:
    from trl import DistillationTrainer as Host

    trainer = distillation(tmp_path, llama(0), llama(1), beta=beta, temperature=temperature)
    given = {k: v for k, v in rollout(old=False).items() if not k.startswith("teacher")}
    given["num_items_in_batch"] = torch.tensor(13)
    compare(trainer, Host, given, method="compute_loss")
    ours = type(trainer)._compute_loss(trainer, trainer.model, given, None)
    theirs = Host._compute_loss(trainer, trainer.model, given, None)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_distillation_trains(tmp_path: Path) -> None:
    trainer = distillation(tmp_path, gemma2(0), gemma2(1))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] > 0
    assert logged["entropy"] > 0


# --- the module --------------------------------------------------------------------------------


def test_unknown_names_are_refused() -> None:
    import cl_fast.integrations.trl as module

    assert {"GKDTrainer", "SDFTTrainer", "DPOTrainer", "DistillationTrainer"} <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        _ = module.PPOTrainer
