"""O-LoRA and separate LoRAs in `learn`: cut off within a later task, the same call ends with the
bits of an uninterrupted run, in a model made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, llama
from transformers import TrainerCallback, TrainingArguments

from cl_fast.learning import learn
from cl_fast.training.keeping import Keep
from cl_fast.training.lora_tasks import LoraTasks
from cl_fast.training.orthogonal import Orthogonal


class Stop(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def rows(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (8, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def streamed(folder: Path, keep: Keep, stop: int) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(llama(0), config)
    args = TrainingArguments(
        str(folder), max_steps=3, save_strategy="steps", save_steps=1, learning_rate=2e-2,
        per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    tasks = {name: (rows(i), rows(i)) for i, name in enumerate(("first", "second"))}
    learn(model, tasks, args=args, out=folder, keep=[keep], score_every="end",
          callbacks=[Stop(stop)])  # fmt: skip
    return model


@pytest.mark.parametrize(
    "make",
    [Orthogonal, lambda: Orthogonal("l1", past="keep"), lambda: LoraTasks(start="previous")],
)
def test_a_stream_that_was_cut_off_ends_with_the_same_bits(
    make: Callable[[], Keep], tmp_path: Path
) -> None:
    straight = streamed(tmp_path / "straight", make(), stop=99).state_dict()
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path / "cut", make(), stop=6)  # the last step of the second task
    resumed = streamed(tmp_path / "cut", make(), stop=99).state_dict()
    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
