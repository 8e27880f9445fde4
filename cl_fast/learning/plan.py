"""The YAML of `cl-fast train`: continual pre-training on text files, checked in every key.

    model: models/base
    output: runs/code
    old_texts: [pile/*.jsonl]
    learning_rate: {peak: 3e-4, min: 3e-5}
    schedule: {rewarm: {warmup: 0.01}}
    replay: 0.05
    batch: {sequences: 8, length: 2048, accumulate: 4}
    stages:
      - {name: code, texts: [code/*.jsonl], held_out: 0.01, epochs: 1}

As in the recipe of a merge nothing is ignored: an unknown key, an option that the schedule or the
keep does not have, two keys that say the same are errors that name the key. docs/train-plan.md has
all keys. This module imports pydantic and yaml, neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from cl_fast.documents import key_path, kind_of, parse_document, read_document
from cl_fast.errors import RecipeError
from cl_fast.merging.methods import suggest

__all__ = [
    "CONTROLLED",
    "INHERITED",
    "KEEPS",
    "Batch",
    "LearningRate",
    "Optimizer",
    "Peft",
    "Plan",
    "Replay",
    "Schedule",
    "Stage",
    "load_plan",
    "parse_plan",
]

#: Words of `keep:` -> the class, and which of its options name texts in a plan.
KEEPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "anchor": ("cl_fast.training.anchors:Anchor", ()),
    "distill": ("cl_fast.training.distilling:SelfDistill", ("prompts",)),
    "orthogonal": ("cl_fast.training.orthogonal:Orthogonal", ()),
    "project": ("cl_fast.training.projection:Project", ()),
}

#: What TrainingArguments have under another word in the plan.
CONTROLLED: dict[str, str] = {
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.epsilon",
    "bf16": "precision",
    "data_seed": "seed",
    "disable_tqdm": "--quiet",
    "fp16": "precision",
    "gradient_accumulation_steps": "batch.accumulate",
    "learning_rate": "learning_rate",
    "lr_scheduler_kwargs": "schedule",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "optimizer.clip",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "optim": "optimizer.name",
    "output_dir": "output",
    "per_device_train_batch_size": "batch.sequences",
    "save_steps": "save_every",
    "save_strategy": "save_every",
    "seed": "seed",
    "warmup_ratio": "schedule",
    "warmup_steps": "schedule",
    "weight_decay": "optimizer.weight_decay",
}
_NOT_HERE: dict[str, str] = {
    "auto_find_batch_size": "would change the batches of a run; set batch.sequences",
    "data_collator": "blocks are of equal length and are stacked as they are",
    "deepspeed": "is not supported: it steps out of sight of keeps; use fsdp",
    "ignore_data_skip": "would make a resumed run another one",
    "load_best_model_at_end": "would undo a stage; the scores are in the report",
    "resume_from_checkpoint": "is not needed: give the same command again",
    "use_cache": "would keep keys and values that training has no use for",
    "train_sampling_strategy": "is fixed: the order of samples is that of the mixture",
}

#: Keys that a stage takes from the plan where it does not have them.
LENGTHS = ("epochs", "steps", "tokens")
INHERITED = (*LENGTHS, "held_out", "learning_rate", "schedule", "replay", "documents", "text_key")

_OWN_SCHEDULES: dict[str, dict[str, Any]] = {
    "rewarm": {"warmup": 0.01, "skip_zero": False},
    "infinite": {
        "warmup": 0.01,
        "cooldown": 0.3,
        "anneal": 0.1,
        "cooling": "cosine",
        "annealing": "exponential",
        "skip_zero": False,
    },
}
_CHOICES = {"cooling": ("cosine", "inverse_sqrt"), "annealing": ("exponential", "harmonic")}


def _a_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_a_list), Field(min_length=1)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LearningRate(_Block):
    """`min` and `constant` for schedules that have them; by default a tenth and a half of peak."""

    peak: float = Field(gt=0)
    min: float | None = Field(default=None, ge=0)
    constant: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> LearningRate:
        for name in ("min", "constant"):
            value = getattr(self, name)
            if value is not None and value > self.peak:
                raise RecipeError(f"learning_rate.{name}: {value:g} is above peak, {self.peak:g}")
        if self.min is not None and self.constant is not None and self.min > self.constant:
            raise RecipeError(
                f"learning_rate.min: {self.min:g} is above constant, {self.constant:g}"
            )
        return self


class Schedule(_Block):
    """A word, or a mapping from it to its options."""

    type: str
    options: dict[str, Any]


class Replay(_Block):
    """How much of the training is old."""

    ratio: float = Field(ge=0, lt=1)
    split: Literal["even", "size"] = "even"
    shuffle: bool = True


class Batch(_Block):
    sequences: int = Field(default=1, ge=1, description="per device and micro-batch")
    length: int = Field(default=2048, ge=2, description="tokens of a block")
    accumulate: int = Field(default=1, ge=1, description="micro-batches of a step")


class Optimizer(_Block):
    name: str = "adamw_torch"
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("betas"), list):
            return {**data, "betas": tuple(data["betas"])}
        return data

    @model_validator(mode="after")
    def _check(self) -> Optimizer:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optimizer.betas: must be in [0, 1); got {list(self.betas)}")
        return self


class Peft(_Block):
    """A LoRA of PEFT on the model."""

    r: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="default: 2 r")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    merge: bool = Field(default=False, description="multiply the adapter out into the final model")


class _Learning(_Block):
    """What a stage may say itself or take from the plan."""

    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    held_out: float | Names | None = None
    learning_rate: LearningRate | None = None
    schedule: Schedule | None = None
    replay: Replay | None = None
    documents: Literal["file", "line", "paragraph"] | None = None
    text_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for key, field in (("learning_rate", "peak"), ("replay", "ratio")):
            if _is_number(data.get(key)):
                data[key] = {field: float(data[key])}
        if "schedule" in data and data["schedule"] is not None:
            data["schedule"] = _schedule(data["schedule"])
        if _is_number(data.get("tokens")) and float(data["tokens"]).is_integer():
            data["tokens"] = int(data["tokens"])  # 2e9
        return data

    @model_validator(mode="after")
    def _one_length(self) -> _Learning:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{given[1]}: {given[0]} says already how long to train; give one")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise RecipeError(
                f"held_out: a fraction of the documents must be above 0 and below 1; got "
                f"{self.held_out:g}"
            )
        return self


class Stage(_Learning):
    """One stage of the training: its texts, and how long and how they are learned."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    texts: Names


class Plan(_Learning):
    """A checked plan; its stages have what they inherit. Made by :func:`load_plan` or
    :func:`parse_plan`, which raise :class:`~cl_fast.errors.RecipeError`."""

    model: str = Field(min_length=1)
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    output: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    stages: list[Stage] = Field(min_length=1)
    old_texts: Annotated[list[str], BeforeValidator(_a_list)] = Field(default_factory=list)
    probes: dict[str, Names] = Field(default_factory=dict)
    bos: bool = False
    documents_apart: bool = False
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    peft: Peft | None = None
    keep: list[dict[str, dict[str, Any]]] = Field(default_factory=list)
    save_every: int = Field(default=500, ge=1)
    score_every: Literal["task", "end"] = "task"
    training: dict[str, Any] = Field(default_factory=dict)

    _source: Path | None = PrivateAttr(None)

    @property
    def source(self) -> Path | None:
        """The file it was read from."""
        return self._source

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if isinstance(data.get("keep"), str | Mapping):
            raise RecipeError(
                f"keep: must be a list (each entry begins with '-'); got {data['keep']!r}"
            )
        if isinstance(data.get("keep"), list):
            data["keep"] = [_keep(one, f"keep[{i}]") for i, one in enumerate(data["keep"])]
        if isinstance(data.get("stages"), list):
            count = len(data["stages"])
            data["stages"] = [
                _stage(one, data, i, count) if isinstance(one, Mapping) else one
                for i, one in enumerate(data["stages"])
            ]
        return data

    @model_validator(mode="after")
    def _check(self) -> Plan:
        for name in self.training:
            if name in CONTROLLED:
                raise RecipeError(f"training.{name}: say it with {CONTROLLED[name]}")
            if name in _NOT_HERE:
                raise RecipeError(f"training.{name}: {_NOT_HERE[name]}")
        seen: dict[str, str] = dict.fromkeys(("before", "new", "old_texts"), "a word of cl-fast")
        for where, names in (("stages", [s.name for s in self.stages]), ("probes", self.probes)):
            for i, name in enumerate(names):
                key = f"stages[{i}].name" if where == "stages" else f"probes.{name}"
                if name in seen:
                    raise RecipeError(f"{key}: {name!r} is {seen[name]}; choose another name")
                seen[name] = f"the name of {key} already"
        for i, stage in enumerate(self.stages):
            _check_stage(self, stage, i)
        return self


def _check_stage(plan: Plan, stage: Stage, i: int) -> None:
    where = f"stages[{i}]"
    if not any(getattr(stage, name) is not None for name in LENGTHS):
        raise RecipeError(f"{where}: say how long it trains: epochs, steps or tokens")
    for name in ("held_out", "learning_rate", "schedule"):
        if getattr(stage, name) is None:
            raise RecipeError(f"{where}.{name}: is required, here or for the whole plan")
    schedule, rate = stage.schedule, stage.learning_rate
    assert schedule is not None
    assert rate is not None
    if rate.constant is not None and schedule.type != "infinite":
        raise RecipeError(
            f"{where}.learning_rate.constant: is of schedule 'infinite'; the schedule is "
            f"{schedule.type!r}"
        )
    if rate.min is not None and schedule.type not in (*_OWN_SCHEDULES, *_WITH_MIN):
        known = ", ".join((*_OWN_SCHEDULES, *_WITH_MIN))
        raise RecipeError(
            f"{where}.learning_rate.min: has no effect with schedule {schedule.type!r}; those "
            f"with one are {known}"
        )


#: Schedules of transformers that take a lowest rate.
_WITH_MIN = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
#: Those of transformers that can be had here; the others look at the loss.
_HF_SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip


def _stage(stage: Mapping[Any, Any], plan: Mapping[Any, Any], i: int, count: int) -> dict[Any, Any]:
    """A stage with what it inherits."""
    whole = dict(stage)
    own_length = any(whole.get(name) is not None for name in LENGTHS)
    for key in INHERITED:
        if key in whole or plan.get(key) is None or (key in LENGTHS and own_length):
            continue
        whole[key] = plan[key]
        if key == "schedule":
            whole[key] = _part_of_infinite(_schedule(plan[key]), i, count)
    return whole


def _part_of_infinite(schedule: dict[str, Any], i: int, count: int) -> dict[str, Any]:
    """An infinite schedule that was given for the whole plan goes over all of its stages: it warms
    up and cools down in the first one, and anneals in the last one."""
    if schedule.get("type") != "infinite":
        return schedule
    options = dict(schedule["options"])
    if i > 0:
        options["warmup"] = options["cooldown"] = 0
    if i < count - 1:
        options["anneal"] = 0
    return {"type": "infinite", "options": options}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _schedule(value: Any) -> dict[str, Any]:
    if isinstance(value, Schedule):
        return value.model_dump()
    if isinstance(value, Mapping) and set(value) == {"type", "options"}:  # read already
        value = {value["type"]: value["options"]}
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RecipeError(
            "schedule: must be a word, or a mapping from it to its options, as "
            f"{{rewarm: {{warmup: 0.01}}}}; got {kind_of(value)}"
        )
    ((word, options),) = value.items()
    known = (*_OWN_SCHEDULES, *_HF_SCHEDULES)
    if word not in known:
        raise RecipeError(
            f"schedule: {word!r} is not known{suggest(str(word), known)}; known are "
            f"{', '.join(known)}"
        )
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise RecipeError(f"schedule.{word}: must be a mapping of options; got {kind_of(options)}")
    defaults = _OWN_SCHEDULES.get(word)
    if defaults is None:
        return {"type": word, "options": _hf_options(word, dict(options))}
    for key, option in options.items():
        if key not in defaults:
            raise RecipeError(
                f"schedule.{word}.{key}: unknown key{suggest(str(key), defaults)}; known are "
                f"{', '.join(defaults)}"
            )
        where = f"schedule.{word}.{key}"
        if key in _CHOICES:
            if option not in _CHOICES[key]:
                raise RecipeError(f"{where}: must be {' or '.join(_CHOICES[key])}; got {option!r}")
        elif key == "skip_zero":
            if not isinstance(option, bool):
                raise RecipeError(f"{where}: must be true or false; got {kind_of(option)}")
        else:
            _check_span(option, where)
    return {"type": word, "options": {**defaults, **options}}


def _hf_options(word: str, options: dict[Any, Any]) -> dict[Any, Any]:
    for key, other in (("min_lr", "learning_rate.min"), ("num_warmup_steps", "warmup")):
        if key in options:
            raise RecipeError(f"schedule.{word}.{key}: say it with {other}")
    if "warmup" in options:
        _check_span(options["warmup"], f"schedule.{word}.warmup")
    return options


def _check_span(value: Any, key: str) -> None:
    """Of a stage: steps, or a fraction."""
    fraction = isinstance(value, float) and 0 <= value <= 1
    steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not (fraction or steps):
        raise RecipeError(
            f"{key}: must be a number of steps, or a fraction of the stage's (0.0 to 1.0); got "
            f"{value!r}"
        )


def span(value: float, steps: int) -> int:
    """A number of steps as it is, a fraction as that part of `steps`."""
    return round(value * steps) if isinstance(value, float) else value


def _keep(one: Any, where: str) -> dict[str, dict[str, Any]]:
    if isinstance(one, str):
        one = {one: None}
    if not isinstance(one, Mapping) or len(one) != 1:
        raise RecipeError(f"{where}: must be a word, or a mapping from it to its options")
    ((word, options),) = one.items()
    if word not in KEEPS:
        hint = "; replay is a key of the plan or of a stage" if word == "replay" else ""
        raise RecipeError(
            f"{where}: {word!r} is not known{hint or suggest(str(word), KEEPS)}; known are "
            f"{', '.join(KEEPS)}"
        )
    if options is not None and not isinstance(options, Mapping):
        raise RecipeError(f"{where}.{word}: must be a mapping of options; got {kind_of(options)}")
    return {word: dict(options or {})}


# --- reading -----------------------------------------------------------------------------------

_MAX_BYTES = 16_000_000


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or a key in it is wrong.
    """
    file = Path(path)
    return parse_plan(read_document(file, "plan", _MAX_BYTES), source=file)


def parse_plan(content: str | Mapping[str, Any], *, source: Path | None = None) -> Plan:
    """Check a plan given as YAML text or as a mapping.

    Raises:
        RecipeError: what is wrong, beginning with `source` (if given) and the key's path.
    """
    prefix = f"{source}: " if source is not None else ""
    data: Any = parse_document(content, prefix) if isinstance(content, str) else content
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{prefix}a plan is a mapping with 'model' and 'stages'; got {kind_of(data)}"
        )
    try:
        plan = Plan.model_validate(dict(data))
    except ValidationError as error:
        _raise(error, prefix)
    except RecipeError as error:
        raise RecipeError(f"{prefix}{error}") from None
    plan._source = source
    return plan


_WORDS = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list (each entry begins with '-')",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "must be of letters, digits, '.', '_' and '-'",
}
#: Of blocks that may be written as a number.
_SHORT: dict[int | str, str] = {
    "learning_rate": "must be a number like 3e-4, or a mapping with peak",
    "replay": "must be a ratio like 0.05, or a mapping with ratio",
}
_BLOCKS: dict[str, type[BaseModel]] = {
    "learning_rate": LearningRate,
    "replay": Replay,
    "batch": Batch,
    "optimizer": Optimizer,
    "peft": Peft,
    "stages": Stage,
}


def _raise(error: ValidationError, prefix: str) -> NoReturn:
    # A misspelt key is both unknown and missing; "unknown" can say what was meant.
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    location = tuple(x for x in first["loc"] if not _of_union(x))
    where = key_path(location) or "plan"
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, RecipeError):
        inside = f"{key_path(location[:2])}." if location[:1] == ("stages",) else ""
        raise RecipeError(f"{prefix}{inside}{cause}") from None
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        known = _known(location)
        word = str(location[-1])
        raise RecipeError(
            f"{prefix}{where}: unknown key{suggest(word, known)}; known are {', '.join(known)}"
        ) from None
    if kind == "missing":
        raise RecipeError(f"{prefix}{where}: is required") from None
    short = _SHORT.get(location[-1]) if kind.startswith("model_") and location else None
    words = short or _WORDS.get(kind, str(first["msg"]).lower().replace("input should", "must"))
    raise RecipeError(f"{prefix}{where}: {words}; got {kind_of(value)}") from None


def _of_union(part: int | str) -> bool:
    """Pydantic's names of the branches of a union, which are no keys."""
    return isinstance(part, str) and (part in ("float", "str") or "[" in part) and part != "[key]"


def _known(location: Iterable[int | str]) -> list[str]:
    """Keys that are known beside the last one of a location."""
    model: type[BaseModel] = Plan
    for part in list(location)[:-1]:
        if isinstance(part, str) and part in _BLOCKS:
            model = _BLOCKS[part]
    return list(model.model_fields)


def flat(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Every value of a plan under the path of its key, in JSON's types."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, one in value.items():
                yield from walk(one, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list | tuple):
            if all(not isinstance(one, Mapping) for one in value):
                yield path, list(value)
            else:
                for i, one in enumerate(value):
                    yield from walk(one, f"{path}[{i}]")
        else:
            yield path, value

    for key, value in plan.model_dump(mode="json").items():
        if key not in INHERITED or key in ("documents", "text_key"):  # the stages have them
            yield from walk(value, key)
