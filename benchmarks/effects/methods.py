"""What is tried against forgetting: each method is a `learn` of the same stream.

Learning rates were chosen once, by hand, on seed 0; nothing was tuned per seed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from toy import BASE, STREAM, Toy, accuracy
from transformers import TrainingArguments

from cl_fast import learn
from cl_fast.learning import Report
from cl_fast.training import (
    AdapterPerTask,
    Anchor,
    LoraTasks,
    Orthogonal,
    Project,
    Replay,
    SelfDistill,
    adapter_names,
    add_lora_moe,
    generate_prompts,
    identify_task,
    rewarm,
    use,
    use_adapter,
)
from cl_fast.training.keeping import Keep, Task

STEPS, SIZE = {"shared": 120, "disjoint": 100}, 64
FULL, LORA = 1e-3, 5e-3  # learning rates
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Found:
    """What one method did with one seed: shares of right answers.

    Attributes:
        average: over the tasks of the stream, at the end.
        learned: of each task right after it, mean.
        backward: transfer, nan where tasks are not learned one after the other.
        kept: of the skills of the base, mean at the end.
    """

    average: float
    learned: float
    backward: float
    kept: float


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: of the row.
        keep: keeps(toy, base model), anew for each run.
        wrap: what is made of the base model, as a PEFT model.
        rate: learning rate.
        options: of `learn`.
        score: other than the accuracy of the model as it is.
        note: what must be known to read the row.
    """

    name: str
    keep: Callable[[Toy, Any], list[Keep]] = lambda toy, model: []
    wrap: Callable[[Any], Any] = lambda model: model
    rate: float = FULL
    options: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[nn.Module, Any, str], float] = accuracy
    note: str = ""

    def run(
        self, toy: Toy, base: Mapping[str, Tensor], *, steps: int | None = None, tasks: int = 4
    ) -> Found:
        """One seed; fewer steps and tasks for a quick look."""
        steps = steps or STEPS[toy.kind]
        stream = {
            name: (toy.draw((name,), steps * SIZE, draw=1 + i), toy.every(name))
            for i, name in enumerate(STREAM[:tasks])
        }
        model = toy.model(base)
        keeps = self.keep(toy, model)
        args = TrainingArguments(
            output_dir="in a folder of the run",
            max_steps=steps,
            per_device_train_batch_size=SIZE,
            learning_rate=self.rate,
            lr_scheduler_type="constant",
            seed=toy.seed,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            report = learn(
                self.wrap(model),
                stream,
                args=args,
                out=folder,
                keep=keeps,
                score=self.score,
                probes={name: toy.every(name) for name in BASE},
                **self.options,
            )
        return found(report)


def found(report: Report) -> Found:
    tasks = report.matrix.tasks
    if report.merged:
        average = sum(report.merged[name] for name in tasks) / len(tasks)
        kept = sum(report.merged[name] for name in BASE) / len(BASE)
        return Found(average, report.learning_accuracy, math.nan, kept)
    kept = sum(report.probes[name][tasks[-1]] for name in BASE) / len(BASE)
    backward = math.nan if "known" in report.metric else report.backward
    return Found(report.average, report.learning_accuracy, backward, kept)


# --- pieces ------------------------------------------------------------------------------------


def lora(alpha: float = 16.0) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear")
        return get_peft_model(model, config)

    return wrap


def moe(model: Any) -> Any:
    add_lora_moe(model, LINEAR, experts=4, rank=4, alpha=32.0)
    return model


def earlier(toy: Toy) -> Callable[[nn.Module, Task], Any]:
    """Stored prompts of the base and of the tasks before this one, without answers."""

    def prompts(_: nn.Module, task: Task) -> list[Tensor]:
        names = (*BASE, *STREAM[: task.index])
        return toy.draw(names, 1024, draw=100 + task.index).prompts()

    return prompts


def generated(toy: Toy) -> Callable[[nn.Module, Task], Any]:
    """Prompts that the model, as the task finds it, makes from the marks of what it has learned."""

    def prompts(model: nn.Module, task: Task) -> Any:
        names = (*BASE, *STREAM[: task.index])
        marks = [toy.every(name).ids[0, :1] for name in names]
        return generate_prompts(
            model, 512, prefixes=marks, max_new_tokens=3, batch_size=256, seed=toy.seed,
            progress=False,
        )  # fmt: skip

    return prompts


def remembered(toy: Toy, model: Any, **options: Any) -> list[Keep]:
    """Project, which is told what inputs the base's skills have."""
    keep = Project(**options)
    if options.get("protect", "inputs") == "inputs":
        keep.remember(model, [{"input_ids": toy.draw(BASE, 1024, draw=99).ids}])
    return [keep]


class BaseFisher(Anchor):
    """EWC that is anchored at the base before the first task."""

    def __init__(self, toy: Toy, weight: float) -> None:
        super().__init__(weight, fisher="sequence", labels="model", sequences=256)
        self._toy = toy

    def before_task(self, model: nn.Module, task: Task) -> None:
        if task.index == 0:
            data = self._toy.draw(BASE, 256, draw=98)
            batch = {"input_ids": data.ids, "labels": data.labels}
            self.after_task(model, Task("base", 0, batches=lambda: [batch]))
        super().before_task(model, task)


def task_known(model: nn.Module, examples: Any, name: str) -> float:
    """The adapter of the task that is asked for; none for the base's skills."""
    known = name in STREAM and _has_adapter(model, name)
    use_adapter(model, name if known else None)
    try:
        return accuracy(model, examples)
    finally:
        use_adapter(model, None)


def lora_known(model: Any, examples: Any, name: str) -> float:
    """The LoRA of the task that is asked for; none where there is none."""
    if name not in model.peft_config:
        with model.disable_adapter():
            return accuracy(model, examples)
    before = model.active_adapter
    use(model, name)
    try:
        return accuracy(model, examples)
    finally:
        use(model, before)


def task_identified(model: nn.Module, examples: Any, name: str) -> float:
    """The adapter under which the prompt is likeliest."""
    names = adapter_names(model)
    if not names:
        return accuracy(model, examples)
    chosen = identify_task(model, {"input_ids": examples.ids[:, :-1]}, names).names
    use_adapter(model, chosen)
    try:
        return accuracy(model, examples)
    finally:
        use_adapter(model, None)


def _has_adapter(model: nn.Module, name: str) -> bool:
    return name in adapter_names(model)


# --- the rows ----------------------------------------------------------------------------------


def replayed(ratio: float) -> Callable[[Toy, Any], list[Keep]]:
    def keep(toy: Toy, _: Any) -> list[Keep]:
        # As many samples of each of the base's skills as of a task.
        count = len(BASE) * STEPS[toy.kind] * SIZE
        base = {"base": toy.draw(BASE, count, draw=97)}
        return [Replay(ratio, old=base, split="size", seed=toy.seed)]

    return keep


def rewarmed(optimizer: Any, steps: int, task: Task) -> Any:
    return rewarm(optimizer, steps=steps, warmup=steps // 10, min_lr=FULL / 10)


SEPARATE: dict[str, Any] = {"start": "base"}

METHODS: list[Method] = [
    Method("sequential"),
    Method("sequential, re-warming", options={"schedule": rewarmed}),
    Method("replay 1 %", replayed(0.01)),
    Method("replay 5 %", replayed(0.05)),
    Method("replay 25 %", replayed(0.25)),
    Method(
        "self-distillation, new inputs (LwF)",
        lambda toy, model: [SelfDistill(on="inputs", tokens="all")],
    ),
    Method(
        "self-distillation, old prompts",
        lambda toy, model: [SelfDistill(earlier(toy), batch_size=16, seed=toy.seed)],
        note="prompts without answers",
    ),
    Method(
        "self-distillation, own prompts",
        lambda toy, model: [SelfDistill(generated(toy), batch_size=16, seed=toy.seed)],
        note="the model writes them",
    ),
    Method("L2-SP", lambda toy, model: [Anchor(0.1)]),
    Method("EWC", lambda toy, model: [BaseFisher(toy, 1000.0)]),
    Method("projection off inputs (GPM)", lambda toy, model: remembered(toy, model, energy=0.995)),
    Method(
        "projection off weights (OSF)",
        lambda toy, model: remembered(toy, model, protect="weights", others="train"),
    ),
    Method("one LoRA, sequential", wrap=lora(8.0), rate=LORA),
    Method(
        "new LoRA per task, folded",
        lambda toy, model: [Orthogonal("squared", weight=0.0)],
        lora(),
        LORA,
    ),
    Method("O-LoRA, exact", lambda toy, model: [Orthogonal()], lora(), LORA),
    Method("O-LoRA, L1", lambda toy, model: [Orthogonal("l1", weight=0.1)], lora(), LORA),
    Method("O-LoRA, squared", lambda toy, model: [Orthogonal("squared", weight=5.0)], lora(), LORA),
    Method("LoRAMoE", wrap=moe, rate=2e-3),
    Method(
        "AdapterCL, task known",
        lambda toy, model: [AdapterPerTask(32)],
        rate=LORA,
        score=task_known,
    ),
    Method(
        "AdapterCL, task identified",
        lambda toy, model: [AdapterPerTask(32)],
        rate=LORA,
        score=task_identified,
        note="a prompt of the base goes to an adapter too",
    ),
    Method(
        "separate LoRAs, task known",
        lambda toy, model: [LoraTasks()],
        lora(),
        LORA,
        score=lora_known,
    ),
    Method(
        "separate LoRAs, mean",
        wrap=lora(),
        rate=LORA,
        options={**SEPARATE, "merge": "linear"},
    ),
    Method(
        "separate LoRAs, sum (task arithmetic)",
        wrap=lora(),
        rate=LORA,
        options={**SEPARATE, "merge": "task_arithmetic"},
    ),
    Method(
        "separate LoRAs, TIES",
        wrap=lora(),
        rate=LORA,
        options={**SEPARATE, "merge": "ties", "merge_options": {"density": 0.2}},
    ),
    Method(
        "separate LoRAs, DARE",
        wrap=lora(),
        rate=LORA,
        options={
            **SEPARATE,
            "merge": "dare_linear",
            "merge_options": {"density": 0.2, "weight": 0.25, "seed": 0},
        },
    ),
]
