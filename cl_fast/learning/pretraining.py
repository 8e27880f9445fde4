"""What `cl-fast train` does with a plan: checks, packs, learns, reports.

    job = Job(plan)          every file, key and option is looked at; nothing is written
    job.describe(...)        the stages in words, their tokens counted or estimated
    job.run()                packs, learns stage after stage, leaves the model

The folder of a run:

    plan.json    the plan that the run was begun with; a resumed run must have an equal one, unless
                 nothing was scored or trained yet
    tokens/      the packed texts (`cl_fast.learning.texts`)
    run/         what `learn` keeps: report.json, report.md, report.png, the state after each stage
    model/       the final model and its tokenizer, for from_pretrained
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.utils import logging

from cl_fast.errors import CheckpointError, OutputError, RecipeError
from cl_fast.learning.plan import KEEPS, Plan, Stage, flat, span
from cl_fast.learning.report import Report
from cl_fast.learning.stream import FREE, learn
from cl_fast.learning.texts import (
    Blocks,
    Count,
    Texts,
    begin_token,
    count_tokens,
    end_token,
    find_files,
    pack,
    stacked,
    too_short,
)
from cl_fast.merging.description import bytes_text
from cl_fast.merging.methods import suggest
from cl_fast.models.heads import Evaluating
from cl_fast.training.keeping import Keep, Task
from cl_fast.training.mixing import Mixture, mix
from cl_fast.training.schedules import Infinite, InfiniteLR, Rewarm, ScheduleLR

__all__ = ["Job", "Lengths", "loss_table"]

#: Keys that say where a run is and what it shows, not what it computes.
_MAY_DIFFER = {"output", "save_every", *(f"training.{name}" for name in FREE)}


@dataclass(frozen=True)
class Lengths:
    """Tokens and steps of a stage.

    Attributes:
        tokens: of its texts.
        exact: whether they were counted, or estimated from a part.
        blocks: of training.
        held_out: blocks that are held out.
        steps: of the optimizer.
        samples: blocks that the steps read.
    """

    tokens: int
    exact: bool
    blocks: int
    held_out: int
    steps: int
    samples: int


class Job:
    """A plan with all that it names, checked.

    Args:
        plan: of `load_plan` or `parse_plan`.
        out: the folder of the run; default: the plan's output.
        quiet: no progress, no logs.

    Raises:
        RecipeError: a key is wrong in the light of the files, the model or the tokenizer.
        CheckpointError: the model cannot be read, or `out` holds a run of another plan.
        OutputError: `out` holds something else.
    """

    def __init__(
        self, plan: Plan, out: str | os.PathLike[str] | None = None, *, quiet: bool = False
    ) -> None:
        where = out if out is not None else plan.output
        if where is None:
            raise RecipeError("output: is required, in the plan or as --out")
        self.plan, self.out, self.quiet = plan, Path(where).expanduser(), quiet
        self.texts = {
            s.name: self._texts(s.texts, f"stages[{i}].texts", s) for i, s in enumerate(plan.stages)
        }
        self.held_out = {
            s.name: self._texts(s.held_out, f"stages[{i}].held_out", s)
            for i, s in enumerate(plan.stages)
            if not isinstance(s.held_out, float)
        }
        self.probes = {n: self._texts(p, f"probes.{n}", plan) for n, p in plan.probes.items()}
        self.old = self._texts(plan.old_texts, "old_texts", plan) if plan.old_texts else None
        self.prompts: dict[tuple[int, str], Texts] = {}
        self._check_keeps()
        self._check_replay()
        self.config, self.tokenizer = self._model()
        self.trainable, self.parameters = self._sizes()
        self.arguments = {s.name: self._arguments(s, 1) for s in plan.stages}
        if plan.peft is not None and plan.peft.merge and plan.training.get("fsdp"):
            raise RecipeError(
                "peft.merge: not with training.fsdp, which leaves a part of the weights on each "
                "device; leave it out and merge the adapter afterwards"
            )
        self._check_output()
        if self.old and not any(s.replay and s.replay.ratio for s in plan.stages):
            # The last, since one may have switched replay off to see what it does.
            raise RecipeError("old_texts: no stage replays; set replay, or remove old_texts")

    # --- checks --------------------------------------------------------------------------------

    def _texts(self, names: Any, where: str, says: Any) -> Texts:
        return Texts(find_files(names, where), says.documents or "file", says.text_key or "text")

    def _check_keeps(self) -> None:
        for i, one in enumerate(self.plan.keep):
            ((word, options),) = one.items()
            where = f"keep[{i}].{word}"
            parameters = inspect.signature(_keep_class(word)).parameters
            known = [n for n in parameters if n != "self"]
            for name in options:
                if name not in known:
                    raise RecipeError(
                        f"{where}.{name}: unknown option{suggest(str(name), known)}; known are "
                        f"{', '.join(known)}"
                    )
            for name in known:
                if parameters[name].default is inspect.Parameter.empty and name not in options:
                    raise RecipeError(f"{where}: {name} is required")
            for name in KEEPS[word][1]:
                if name in options:
                    files = options[name] if isinstance(options[name], list) else [options[name]]
                    self.prompts[i, name] = self._texts(files, f"{where}.{name}", self.plan)
            self._keep(i, dict.fromkeys(self.prompts, _Nothing()))
            if word == "orthogonal" and self.plan.peft is None:
                raise RecipeError(f"{where}: works on a LoRA; set peft")

    def _keep(self, i: int, packed: Mapping[tuple[int, str], Any]) -> Keep:
        ((word, options),) = self.plan.keep[i].items()
        given = dict(options)
        given |= {name: data for (at, name), data in packed.items() if at == i}
        if isinstance(given.get("dtype"), str):
            given["dtype"] = _dtype(given["dtype"], f"keep[{i}].{word}.dtype")
        try:
            keep: Keep = _keep_class(word)(**given)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"keep[{i}].{word}: {error}") from error
        return keep

    def _check_replay(self) -> None:
        first = self.plan.stages[0]
        replays = first.replay is not None and first.replay.ratio > 0
        if replays and self.old is None and first.replay != self.plan.replay:
            raise RecipeError(
                "stages[0].replay: there is nothing to replay in the first stage; name texts of "
                "what the model was trained on under old_texts, or remove it"
            )

    def _model(self) -> tuple[Any, Any]:
        plan = self.plan
        for key, reference in (("model", plan.model), ("tokenizer", plan.tokenizer)):
            # Before transformers asks the hub for it, again and again.
            if reference and _is_path(reference) and not Path(reference).expanduser().is_dir():
                raise RecipeError(f"{key}: there is no folder {reference}")
        try:
            config = AutoConfig.from_pretrained(_reference(plan.model))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"model: {plan.model} cannot be read: {_first(error)}") from error
        source = plan.tokenizer or plan.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(_reference(source))
        except (OSError, ValueError, KeyError) as error:
            hint = "" if plan.tokenizer else "; name the tokenizer's folder under tokenizer"
            raise CheckpointError(
                f"tokenizer: {source} cannot be read{hint}: {_first(error)}"
            ) from error
        end_token(tokenizer)
        begin_token(tokenizer, plan.bos)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and plan.batch.length > longest:
            raise RecipeError(
                f"batch.length: {plan.batch.length} tokens, but the model has only {longest} "
                "positions (max_position_embeddings)"
            )
        return config, tokenizer

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    def _sizes(self) -> tuple[int, int]:
        """Trained parameters and all of them, from a model without storage."""
        with torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(self.config)
            except ValueError as error:
                raise CheckpointError(f"model: {self.plan.model}: {_first(error)}") from error
            model = self._with_adapter(model)
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def _with_adapter(self, model: Any) -> Any:
        peft = self.plan.peft
        if peft is None:
            return model
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise RecipeError("peft: needs PEFT: pip install peft") from None
        try:
            config = LoraConfig(
                r=peft.r,
                lora_alpha=2 * peft.r if peft.alpha is None else peft.alpha,
                lora_dropout=peft.dropout,
                target_modules=peft.targets,
                task_type="CAUSAL_LM",
            )
            return get_peft_model(model, config)
        except ValueError as error:
            raise RecipeError(f"peft.targets: {_first(error)}") from error

    def _arguments(self, stage: Stage, steps: int) -> TrainingArguments:
        plan = self.plan
        known = {f.name for f in fields(TrainingArguments)}
        for name in plan.training:
            if name not in known:
                raise RecipeError(
                    f"training.{name}: TrainingArguments of transformers have no such "
                    f"name{suggest(name, known)}"
                )
        rate, schedule, optimizer = stage.learning_rate, stage.schedule, plan.optimizer
        assert rate is not None
        assert schedule is not None
        given = {
            "dataloader_pin_memory": torch.cuda.is_available(),
            "ddp_find_unused_parameters": False,
            "logging_steps": 10,
            "per_device_eval_batch_size": plan.batch.sequences,
            "report_to": "none",
            "save_total_limit": 2,
            **plan.training,
            "output_dir": str(self.out / "run"),
            "per_device_train_batch_size": plan.batch.sequences,
            "gradient_accumulation_steps": plan.batch.accumulate,
            "max_steps": steps,
            "learning_rate": rate.peak,
            # The schedule is made by `make_scheduler`; here it is told, so that a run is not
            # resumed with another one.
            "lr_scheduler_type": "constant",
            "lr_scheduler_kwargs": {"plan": [schedule.type, schedule.options, rate.model_dump()]},
            "optim": optimizer.name,
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "adam_epsilon": optimizer.epsilon,
            "weight_decay": optimizer.weight_decay,
            "max_grad_norm": optimizer.clip,
            "bf16": plan.precision == "bf16",
            "fp16": plan.precision == "fp16",
            "save_strategy": "steps",
            "save_steps": plan.save_every,
            "seed": plan.seed,
            "train_sampling_strategy": "sequential",
            "disable_tqdm": self.quiet,
        }
        if self.quiet:
            given["logging_strategy"] = "no"
        try:
            return TrainingArguments(**given)
        except (TypeError, ValueError, ImportError) as error:
            raise RecipeError(f"training: {_first(error)}") from error

    def _check_output(self) -> None:
        saved = self.out / "plan.json"
        if saved.is_file():
            if not self._begun():
                return  # nothing is lost by another plan
            try:
                theirs = json.loads(saved.read_text())
            except ValueError as error:
                raise CheckpointError(f"{saved} is no plan: {error}") from error
            mine = json.loads(json.dumps(dict(flat(self.plan))))
            for key in dict.fromkeys([*mine, *theirs]):
                if mine.get(key) != theirs.get(key) and key not in _MAY_DIFFER:
                    raise CheckpointError(
                        f"{self.out} holds a run with another {key}: {theirs.get(key)!r} there, "
                        f"{mine.get(key)!r} now. Give what it was given, or choose another output"
                    )
        elif self.out.exists():
            if not self.out.is_dir():
                raise OutputError(f"output: {self.out} is a file")
            strange = sorted(p.name for p in self.out.iterdir() if not p.name.endswith(".part"))
            if strange:
                raise OutputError(
                    f"output: {self.out} is not empty ({strange[0]}) and holds no run of "
                    "cl-fast train; choose another folder"
                )

    def _begun(self) -> bool:
        """Whether the folder has scores or a trained stage."""
        try:
            content = json.loads((self.out / "run" / "stream.json").read_text())
            return bool(content["trained"] or content["scores"])
        except FileNotFoundError:
            return False
        except (KeyError, TypeError, ValueError):
            return True  # `learn` will tell what is wrong with it

    # --- lengths -------------------------------------------------------------------------------

    @property
    def step_samples(self) -> int:
        """Blocks of a step, on all processes."""
        args = next(iter(self.arguments.values()))
        return int(args.train_batch_size * args.world_size * self.plan.batch.accumulate)

    def _ratio(self, stage: Stage, olds: int) -> Fraction:
        if stage.replay is None or not olds:
            return Fraction(0)
        return Fraction(stage.replay.ratio).limit_denominator(10**6)

    def _olds(self, i: int) -> list[str]:
        """What stage i may replay."""
        return [*(["old_texts"] if self.old else []), *(s.name for s in self.plan.stages[:i])]

    def _steps(self, i: int, blocks: int) -> int:
        stage, length = self.plan.stages[i], self.plan.batch.length
        if stage.steps is not None:
            return stage.steps
        if stage.tokens is not None:
            return max(1, math.ceil(Fraction(stage.tokens, length * self.step_samples)))
        assert stage.epochs is not None
        ratio = self._ratio(stage, len(self._olds(i)))
        samples = Fraction(stage.epochs).limit_denominator(10**6) * blocks / (1 - ratio)
        return max(1, math.ceil(samples / self.step_samples))

    def estimate(self) -> dict[str, Lengths]:
        """Lengths of the stages by reading their texts, or a part of them; writes nothing."""
        found = {}
        for i, stage in enumerate(self.plan.stages):
            part = stage.held_out if isinstance(stage.held_out, float) else 0.0
            count = self._count(self.texts[stage.name], stage.name, part)
            exact, held = count.exact, count.held_out
            if not part:
                other = self._count(self.held_out[stage.name], _held(stage.name))
                exact, held = exact and other.exact, other.tokens
            length = self.plan.batch.length
            for name, tokens in ((stage.name, count.tokens), (_held(stage.name), held)):
                if exact and tokens < length:
                    raise RecipeError(f"{name}: {too_short(tokens, length)}")
            blocks = count.tokens // length
            steps = self._steps(i, max(1, blocks))
            samples = steps * self.step_samples
            found[stage.name] = Lengths(count.tokens, exact, blocks, held // length, steps, samples)
        return found

    def _count(self, texts: Texts, name: str, held_out: float = 0.0) -> Count:
        return count_tokens(texts, self.tokenizer, held_out=held_out, bos=self.plan.bos, name=name)

    # --- words ---------------------------------------------------------------------------------

    def describe(
        self, lengths: Mapping[str, Lengths], data: Mapping[str, Mixture] | None = None
    ) -> Iterator[str]:
        """The plan in lines."""
        plan, args = self.plan, next(iter(self.arguments.values()))
        trained = "all" if self.trainable == self.parameters else f"{self.trainable:,}"
        kind = (self.config.architectures or [self.config.model_type])[0]
        yield f"model    {plan.model}: {kind}, {self.parameters:,} parameters, {trained} trained"
        tokens = self.step_samples * plan.batch.length
        yield (
            f"step     {plan.batch.sequences} sequences x {plan.batch.length} tokens x "
            f"{plan.batch.accumulate} accumulated x {args.world_size * max(1, args.n_gpu)} "
            f"device{'s' if args.world_size * max(1, args.n_gpu) > 1 else ''} = {tokens:,} tokens"
        )
        for i, stage in enumerate(plan.stages):
            yield from self._stage_lines(i, stage, lengths[stage.name], data)
        if self.old is not None:
            yield f"old      {_files(self.old)}"
        for name, texts in self.probes.items():
            yield f"probe    {name}: {_files(texts)}"
        yield from self._memory()
        keeps = [word for one in plan.keep for word in one]
        if keeps:
            yield f"keep     {', '.join(keeps)}"
        yield f"output   {self.out}"

    def _stage_lines(
        self, i: int, stage: Stage, has: Lengths, data: Mapping[str, Mixture] | None
    ) -> Iterator[str]:
        texts, about = self.texts[stage.name], "" if has.exact else "about "
        yield (
            f"stage {i + 1}  {stage.name}: {_files(texts)}, "
            f"{about}{has.tokens:,} tokens in {has.blocks:,} blocks, and {has.held_out:,} more "
            "held out"
        )
        olds = self._olds(i)
        ratio = self._ratio(stage, len(olds))
        old = has.samples * ratio // 1
        new = has.samples - old
        passes = f"{new / max(1, has.blocks):.2f} passes"
        replay = ""
        if ratio:
            counts = data[stage.name].counts(has.samples) if data else {}
            each = ", ".join(f"{n} {counts[n]:,}" for n in counts if n != "new")
            replay = f", {old:,} replayed ({each or ', '.join(olds)})"
        elif stage.replay is not None and stage.replay.ratio:
            replay = ", none replayed: nothing is old yet (old_texts)"
        yield (
            f"         {about}{has.steps:,} steps, {has.samples * self.plan.batch.length:,} "
            f"tokens: {new:,} new blocks ({passes}){replay}"
        )
        yield f"         {schedule_words(stage, has.steps)}"

    def _memory(self) -> Iterator[str]:
        batch = self.plan.batch
        size = _dtype_of(self.plan, self.config).itemsize
        weights, gradients = self.parameters * size, self.trainable * size
        logits = batch.sequences * batch.length * self.vocabulary * (4 + size)
        adam = 2 * gradients if "adam" in self.plan.optimizer.name else 0
        moments = f", moments {bytes_text(adam)}" if adam else ""
        yield (
            f"memory   at least {bytes_text(weights + gradients + adam + logits)} per device: "
            f"weights {bytes_text(weights)}, gradients {bytes_text(gradients)}{moments}, logits "
            f"{bytes_text(logits)}; other activations come on top"
        )

    # --- the run -------------------------------------------------------------------------------

    @property
    def first(self) -> bool:
        """Whether this process is the first of all."""
        return int(os.environ.get("RANK", "0")) == 0

    def _pack(self, texts: Texts, name: str, held_out: float = 0.0) -> tuple[Any, Any]:
        rows = pack(
            texts, self.tokenizer, self.out / "tokens",
            held_out=held_out, bos=self.plan.bos, vocabulary=self.vocabulary, name=name,
            quiet=self.quiet or not self.first, waits=not self.first,
        )  # fmt: skip
        length, apart = self.plan.batch.length, self.plan.documents_apart
        found = []
        for row, which in zip(rows, (name, _held(name)), strict=True):
            try:
                found.append(row and Blocks(row, length, documents_apart=apart))
            except ValueError as error:
                raise RecipeError(f"{which}: {error}") from None
        return found[0], found[1]

    def _data(self) -> tuple[dict[str, Blocks], dict[str, Blocks], dict[str, Blocks], Any, Any]:
        """Packed: blocks of each stage, held-out ones, probes, old ones, prompts of keeps."""
        blocks, held = {}, {}
        for stage in self.plan.stages:
            part = stage.held_out if isinstance(stage.held_out, float) else 0.0
            blocks[stage.name], kept = self._pack(self.texts[stage.name], stage.name, part)
            if kept is None:
                kept, _ = self._pack(self.held_out[stage.name], _held(stage.name))
            held[stage.name] = kept
        probes = {name: self._pack(t, f"probes.{name}")[0] for name, t in self.probes.items()}
        old = self._pack(self.old, "old_texts")[0] if self.old else None
        prompts = {
            (i, name): self._pack(t, f"keep[{i}].{name}")[0]
            for (i, name), t in self.prompts.items()
        }
        return blocks, held, probes, old, prompts

    def _mixture(self, i: int, blocks: Mapping[str, Blocks], old: Any, samples: int) -> Mixture:
        stage, olds = self.plan.stages[i], self._olds(i)
        sources = {n: old if n == "old_texts" else blocks[n] for n in olds}
        ratio, replay = self._ratio(stage, len(olds)), stage.replay
        new, seed = blocks[stage.name], self.plan.seed
        if not ratio or replay is None:
            return mix(new, new, 0, seed=seed, length=samples)
        return mix(
            new, sources, ratio, seed=seed, length=samples,
            shuffle_old=replay.shuffle, split=replay.split,
        )  # fmt: skip

    def make_model(self) -> nn.Module:
        """The model as the run begins with it, always the same."""
        set_seed(self.plan.seed)
        dtype: Any = "auto" if self.plan.dtype == "auto" else getattr(torch, self.plan.dtype)
        try:
            with _bars(self.first and not self.quiet):
                model = AutoModelForCausalLM.from_pretrained(
                    _reference(self.plan.model), dtype=dtype
                )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"model: {self.plan.model} cannot be read: {_first(error)}"
            ) from error
        if self.plan.documents_apart and not documents_are_apart(model):
            raise RecipeError(
                f"documents_apart: {type(model).__name__} lets tokens attend to other documents; "
                "remove it"
            )
        model = self._with_adapter(model)
        if self.plan.peft is not None and self.plan.training.get("gradient_checkpointing"):
            model.enable_input_require_grads()
        made: nn.Module = model
        return made

    def run(self, say: Callable[[str], Any] = print) -> Report:
        """Packs, learns, and leaves the model in `out`/model; goes on where an earlier call of
        the same plan was cut off. `say` gets lines, on the first process only."""
        if not self.first or self.quiet:
            say = _silence
        if self.first:
            self._write_plan()
        blocks, held, probes, old, prompts = self._data()
        lengths, data = {}, {}
        for i, stage in enumerate(self.plan.stages):
            mine, kept = blocks[stage.name], held[stage.name]
            steps = self._steps(i, len(mine))
            samples = steps * self.step_samples
            lengths[stage.name] = Lengths(
                mine.row.tokens, True, len(mine), len(kept), steps, samples
            )
            data[stage.name] = self._mixture(i, blocks, old, samples)
            self.arguments[stage.name] = self._arguments(stage, steps)
            check_schedule(stage, steps, f"stages[{i}]")
        keeps = [self._keep(i, prompts) for i in range(len(self.plan.keep))]
        for line in self.describe(lengths, data):
            say(line)
        for name, packed in blocks.items():
            say(_packed_words(name, packed))
        stages = {stage.name: stage for stage in self.plan.stages}

        def schedule(optimizer: torch.optim.Optimizer, steps: int, task: Task) -> Any:
            return make_scheduler(stages[task.name], optimizer, steps)

        with _bars(False):
            report = learn(
                self.make_model,
                {name: (data[name], held[name]) for name in stages},
                args=self.arguments,
                out=self.out / "run",
                keep=keeps,
                trainer=BlockTrainer,
                probes=probes,
                score_every=self.plan.score_every,
                schedule=schedule,
                processing_class=self.tokenizer,
                data_collator=stacked,
            )
            if self.first:
                self._leave(report)
        _wait()
        say("")
        for line in loss_table(report):
            say(line)
        say(f"{self.out / 'model'}: the model after {self.plan.stages[-1].name}")
        return report

    def _write_plan(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            part = self.out / "plan.json.part"
            part.write_text(json.dumps(dict(flat(self.plan)), indent=1) + "\n")
            part.replace(self.out / "plan.json")
        except OSError as error:
            raise OutputError(f"{self.out} cannot be written: {error.strerror}") from error

    def _leave(self, report: Report) -> None:
        """The final model where it is looked for."""
        made, final = self.out / "run" / "model", self.out / "model"
        if self.plan.peft is not None and self.plan.peft.merge:
            model: Any = report.model
            shutil.rmtree(made)
            model.merge_and_unload().save_pretrained(made)
            self.tokenizer.save_pretrained(made)
        config = made / "config.json"
        if config.is_file() and hasattr(self.config, "use_cache"):
            # The Trainer switches it off for training, and saves it so.
            content = json.loads(config.read_text()) | {"use_cache": self.config.use_cache}
            config.write_text(json.dumps(content, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        made.replace(final)


class BlockTrainer(Trainer):  # type: ignore[misc]
    """The Trainer of transformers, silent where it shows no bars."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)


class _Nothing:
    """Stands for blocks that are not packed yet while options are checked."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, dtype=torch.int64)}


def _held(name: str) -> str:
    return f"{name}, held out"


def _files(texts: Texts) -> str:
    count = len(texts.files)
    return f"{count} file{'s' if count > 1 else ''}, {bytes_text(texts.size)}"


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Whether transformers shows bars of its own where it reads and writes models."""
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def _silence(_: str) -> None:
    pass


def _wait() -> None:
    """For all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _reference(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _is_path(name: str) -> bool:
    """Whether a name is one of a folder, and not of a model on the hub, as gpt2 or owner/model."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        return True
    owner, slash, _ = name.partition("/")
    if not slash or not Path(owner).is_dir():
        return False
    files = ("config.json", "tokenizer_config.json", "tokenizer.json")
    try:
        return not any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except ValueError:
        return True  # no name that the hub could have


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _dtype(word: str, where: str) -> torch.dtype:
    found = getattr(torch, word, None)
    if not isinstance(found, torch.dtype):
        raise RecipeError(f"{where}: {word!r} is no dtype of torch; write float32 or bfloat16")
    return found


def _dtype_of(plan: Plan, config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None) if plan.dtype == "auto" else getattr(torch, plan.dtype)
    return found if isinstance(found, torch.dtype) else torch.float32


def _keep_class(word: str) -> Any:
    module, _, name = KEEPS[word][0].partition(":")
    return getattr(importlib.import_module(module), name)


def _packed_words(name: str, packed: Blocks) -> str:
    row = packed.row
    dropped = f"{packed.dropped:,} after the last whole block dropped"
    if row.found:
        return (
            f"found    {name}: {row.documents:,} documents, {row.tokens:,} tokens, packed "
            f"before, {dropped}"
        )
    speed = row.tokens / max(row.seconds, 1e-9)
    return (
        f"packed   {name}: {row.documents:,} documents, {row.tokens:,} tokens ({speed:,.0f} per "
        f"second), {dropped}"
    )


def documents_are_apart(model: nn.Module) -> bool:
    """Whether position ids that begin anew keep a model from attending across documents."""
    ids = torch.tensor([[1, 2, 3, 1, 2, 3], [2, 3, 1, 1, 2, 3]])
    places = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with torch.no_grad(), Evaluating(model):
        first, second = model(input_ids=ids, position_ids=places, use_cache=False).logits
    return bool(torch.equal(first[3:], second[3:])) and not torch.equal(first[:3], second[:3])


# --- schedules ---------------------------------------------------------------------------------


def rate(stage: Stage, steps: int) -> Rewarm | Infinite | None:
    """lr(n) of the schedules of cl_fast; None for those of transformers.

    Raises:
        ValueError: the phases do not fit into so many steps.
    """
    schedule, given = stage.schedule, stage.learning_rate
    assert schedule is not None
    assert given is not None
    options, peak = dict(schedule.options), given.peak
    low = peak / 10 if given.min is None else given.min
    if schedule.type == "rewarm":
        options["warmup"] = span(options["warmup"], steps)
        return Rewarm(max_lr=peak, min_lr=low, steps=steps, **options)
    if schedule.type != "infinite":
        return None
    constant = peak / 2 if given.constant is None else given.constant
    warmup, cooldown, anneal = (
        span(options.pop(name), steps) for name in ("warmup", "cooldown", "anneal")
    )
    if warmup + cooldown + anneal > steps:
        raise ValueError(
            f"warmup {warmup}, cooldown {cooldown} and anneal {anneal} are more than the stage's "
            f"{steps} steps"
        )
    return Infinite(
        max_lr=peak if warmup or cooldown else constant,
        constant_lr=constant,
        min_lr=low,
        warmup=warmup,
        cooldown=cooldown,
        anneal_at=steps - anneal if anneal else None,
        anneal_steps=anneal or None,
        **options,
    )


def make_scheduler(stage: Stage, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning-rate scheduler of a stage."""
    found = rate(stage, steps)
    if found is not None:
        return (
            ScheduleLR(optimizer, found)
            if isinstance(found, Rewarm)
            else InfiniteLR(optimizer, found)
        )
    schedule, given = stage.schedule, stage.learning_rate
    assert schedule is not None
    assert given is not None
    options = dict(schedule.options)
    warmup = span(options.pop("warmup", 0), steps)
    if schedule.type == "constant" and (options or warmup):
        raise ValueError("constant has no options; constant_with_warmup has a warmup")
    if given.min is not None:
        options["min_lr"] = given.min
    if schedule.type == "constant_with_warmup" and options:
        raise TypeError(f"constant_with_warmup has no option {next(iter(options))!r}")
    return get_scheduler(schedule.type, optimizer, warmup, steps, options)


def check_schedule(stage: Stage, steps: int, where: str) -> None:
    """Raises RecipeError where the schedule cannot be made for so many steps."""
    assert stage.learning_rate is not None
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=stage.learning_rate.peak)
    try:
        make_scheduler(stage, optimizer, steps)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}.schedule: {_first(error)}") from error


def schedule_words(stage: Stage, steps: int) -> str:
    """The phases of a stage's schedule."""
    try:
        found = rate(stage, steps)
    except ValueError as error:
        return f"schedule: {error}"
    if found is not None:
        return _phases(found)
    schedule, given = stage.schedule, stage.learning_rate
    assert schedule is not None
    assert given is not None
    warmup = span(schedule.options.get("warmup", 0), steps)
    up = f" after {warmup} steps of warm-up" if warmup else ""
    low = "" if given.min is None else f", down to {given.min:g}"
    return f"{schedule.type}: {given.peak:g}{up}{low}"


def _phases(found: Rewarm | Infinite) -> str:
    start = f"{found(0):g} to {found.max_lr:g} at step {found.warmup}, " if found.warmup else ""
    if isinstance(found, Rewarm):
        return f"rewarm: {start}cosine to {found.min_lr:g} at {found.steps}"
    if found.cooldown:
        down = f"{found.cooling} to {found.constant_lr:g} at {found.warmup + found.cooldown}"
        start = f"{start}{down}, "
    if found.anneal_at is None:
        return f"infinite: {start}{found.constant_lr:g} to the end"
    hold = f"{found.constant_lr:g} until {found.anneal_at}"
    return f"infinite: {start}{hold}, {found.annealing} to {found.min_lr:g} at {found.end}"


def loss_table(report: Report) -> list[str]:
    """Held-out loss and perplexity of every stage and probe, before and after each stage."""
    names = [*report.matrix.tasks, *report.probes]
    scored = {"before": report.matrix.before}
    scored |= dict(zip(report.matrix.tasks, report.matrix.rows, strict=False))
    rows = {
        where: dict(
            zip(
                names,
                [*row, *(p.get(where, math.nan) for p in report.probes.values())],
                strict=True,
            )
        )
        for where, row in scored.items()
    }

    def cell(score: float) -> str:
        if math.isnan(score):
            return "-"
        return f"{-score:.3f} ({math.exp(min(-score, 700.0)):.4g})"

    lines = [["after", *names]]
    lines += [[where, *(cell(row[n]) for n in names)] for where, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["held-out loss (perplexity) of each column after each row:"] + [
        "  ".join(
            x.ljust(w) if not i else x.rjust(w)
            for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
