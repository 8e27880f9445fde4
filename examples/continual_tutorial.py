"""A model learns two tasks after a first skill: what it forgets, and what keeps it.

The script of docs/tutorial.md, in less than half a minute on one CPU core:

    python examples/continual_tutorial.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from cl_fast import learn
from cl_fast.learning import Report
from cl_fast.training import LoraTasks, Replay, SelfDistill, use

options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
options.add_argument("--out", type=Path, default=None, help="a new folder, for the runs")
given = options.parse_args()
out = given.out or Path(tempfile.mkdtemp())
warnings.filterwarnings("ignore", category=FutureWarning)
disable_progress_bar()  # of small files
disable_progress_bars()
torch.set_num_threads(1)  # a model this small only waits for threads

# --- a first skill, and two tasks --------------------------------------------------------------

N = 12
SKILLS = {
    "larger": lambda a, b: max(a, b),  # what the model knows at the start
    "later": lambda a, b: (a + 5) % N,  # the first task
    "mirror": lambda a, b: N - 1 - b,  # the second task
}
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "=", *SKILLS, *map(str, range(N))]
ID = {word: i for i, word in enumerate(WORDS)}


def example(skill: str, a: int, b: int) -> dict[str, list[int]]:
    """`later 3 7 =` and its answer, which alone is learned: the other labels are -100."""
    ids = [ID[skill], ID[str(a)], ID[str(b)], ID["="], ID[str(SKILLS[skill](a, b))]]
    return {"input_ids": ids, "labels": [-100] * 4 + ids[4:]}


def drawn(skill: str, count: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(N, (count, 2), generator=generator).tolist()
    return [example(skill, a, b) for a, b in pairs]


def every(skill: str) -> list[dict[str, list[int]]]:
    return [example(skill, a, b) for a in range(N) for b in range(N)]


@torch.no_grad()
def accuracy(model: Any, examples: Any, name: str = "") -> float:
    ids = torch.tensor([row["input_ids"] for row in examples])
    answers = model(input_ids=ids[:, :4]).logits[:, -1].argmax(-1)
    return float((answers == ids[:, 4]).float().mean())


config = LlamaConfig(
    vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=16, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
torch.manual_seed(0)
skilled = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(skilled.parameters(), lr=2e-3)
for step in range(200):
    rows = drawn("larger", 64, seed=step)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    skilled(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def base() -> Any:
    """The model with its first skill, anew."""
    model = LlamaForCausalLM(config)
    model.load_state_dict(skilled.state_dict())
    return model


print(f"the first skill, before the stream: {accuracy(base(), every('larger')):.2f}")

# --- 1. plainly --------------------------------------------------------------------------------

tasks = {
    "later": (drawn("later", 5120, seed=1001), every("later")),
    "mirror": (drawn("mirror", 5120, seed=1002), every("mirror")),
}
settings: dict[str, Any] = {
    "output_dir": "unused",  # learn sets it
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": 20,
    "save_total_limit": 1,
    "use_cpu": True,
    "report_to": [],
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
args = TrainingArguments(**settings)
common: dict[str, Any] = {
    "args": args,
    "score": accuracy,
    "probes": {"larger": every("larger")},  # never trained on: what should be kept
}
plain = learn(base(), tasks, out=out / "plain", **common)
print("\nplainly\n" + str(plain))

# --- 2. with replay ----------------------------------------------------------------------------

stored = drawn("larger", 1000, seed=1003)
keep: Any = Replay(0.25, old={"larger": stored}, seed=0)
replayed = learn(base(), tasks, out=out / "replay", keep=keep, **common)
print("\nwith a quarter of replay\n" + str(replayed))

# --- 3. with its earlier self as teacher -------------------------------------------------------


def earlier_prompts(model: Any, task: Any) -> list[list[int]]:
    """Prompts without answers: of the first skill, and of the tasks before this one."""
    before = ["larger", *list(tasks)[: task.index]]
    return [row["input_ids"][:4] for name in before for row in drawn(name, 200, seed=1004)]


keep = SelfDistill(earlier_prompts, batch_size=16, weight=1.0, seed=0)
distilled = learn(base(), tasks, out=out / "distilled", keep=keep, **common)
print("\nwith self-distillation\n" + str(distilled))

# --- what is in the folder ---------------------------------------------------------------------

report = Report.load(out / "replay")  # report.json; report.md and report.png lie beside it
assert report == replayed  # but for the model
report.plot(out / "replay.png")
print(f"\nbackward transfer {report.backward:+.2f}, {report.kept('larger'):.0%} of larger kept")

# --- killed, and called again ------------------------------------------------------------------


class PowerCut(TrainerCallback):
    """In the middle of the second task."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "mirror" in args.output_dir and state.global_step == 50:
            raise KeyboardInterrupt


try:
    keep = Replay(0.25, old={"larger": stored}, seed=0)
    learn(base(), tasks, out=out / "cut", keep=keep, callbacks=[PowerCut()], **common)
except KeyboardInterrupt:
    print("\ncut off after step 50 of mirror")
keep = Replay(0.25, old={"larger": stored}, seed=0)
again = learn(base(), tasks, out=out / "cut", keep=keep, **common)  # later is not trained again
mine, theirs = again.model.state_dict(), replayed.model.state_dict()
same = all(torch.equal(mine[name], theirs[name]) for name in theirs)
print(f"the same bits as the run that was not cut off: {same}")

# --- TRL's SFTTrainer --------------------------------------------------------------------------

backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")

sft = SFTConfig(**settings, gradient_checkpointing=False, bf16=False)
texts = {
    name: (Dataset.from_list(train), evaluation) for name, (train, evaluation) in tasks.items()
}
keep = Replay(0.25, old={"larger": Dataset.from_list(stored)}, seed=0)
trl = learn(base(), texts, out=out / "sft", trainer=SFTTrainer, processing_class=tokenizer,
            keep=keep, **{**common, "args": sft})  # fmt: skip
print("\nwith replay in SFTTrainer\n" + str(trl))

# --- a LoRA per task ---------------------------------------------------------------------------

torch.manual_seed(0)
adapted = get_peft_model(base(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def told(model: Any, examples: Any, name: str) -> float:
    """The task is known: its adapter answers, or the base where it has none."""
    if name in model.peft_config:
        use(model, name)
        return accuracy(model, examples)
    with model.disable_adapter():
        return accuracy(model, examples)


faster = TrainingArguments(**{**settings, "learning_rate": 5e-3})
separate = learn(adapted, tasks, out=out / "lora", keep=LoraTasks(seed=0),
                 **{**common, "args": faster, "score": told})  # fmt: skip
print("\na LoRA per task, the task is told\n" + str(separate))
