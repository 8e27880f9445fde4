"""`cl-fast edit`: facts into a checkpoint on disk, from the files to the report.

    facts -> statistics of keys -> values (batch after batch) -> patch -> scores -> OUT

    OUT/                     the edited checkpoint: the base's tensors, those edited rewritten
        edits.safetensors    the patch: undo, drop and merge facts with it
        edits.json, .md      the report
    .OUT.edit/               while the job is under way; every part is whole or not there
        job.json             what the job is made of
        stats/  values/  edits.safetensors  before.json  after.json  model/

A job that was cut off goes on with the same command. OUT appears by one rename, at the end.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cl_fast.checkpoints.checkpoint import Checkpoint
from cl_fast.checkpoints.patches import hash_stored, stored_name
from cl_fast.checkpoints.writing import write_whole
from cl_fast.editing.applying import check_bases, find_layers, weight_hash, write_factors
from cl_fast.editing.datasets import load_facts
from cl_fast.editing.editors import AlphaEdit, Emmet, Memit, Rome, WeightEditor
from cl_fast.editing.evaluation import Reference, evaluate
from cl_fast.editing.facts import check_facts
from cl_fast.editing.patch import Patch
from cl_fast.editing.presets import preset_of
from cl_fast.editing.report import Report, compared
from cl_fast.editing.stats import KeyStats
from cl_fast.editing.values import Group, Values, group_facts
from cl_fast.errors import CheckpointError, OutputError
from cl_fast.learning.ledger import load_tensors, save_tensors
from cl_fast.learning.texts import Texts, documents, find_files
from cl_fast.merging.executors import torch_dtype
from cl_fast.merging.journal import WorkLock
from cl_fast.merging.manifest import relocate
from cl_fast.merging.patches import apply_patch
from cl_fast.models.blocks import Decoder, decoder_of
from cl_fast.options import at_least, one_of

__all__ = ["EDITORS", "PHASES", "EditJob", "EditSettings", "not_said", "side_by_side"]

EDITORS: dict[str, type[WeightEditor]] = {
    "memit": Memit,
    "rome": Rome,
    "emmet": Emmet,
    "alphaedit": AlphaEdit,
}

Progress = Callable[[str, int, int], None]

PHASES = ("loading", "statistics", "values", "layers", "scores before", "scores after")
"""Of the progress, besides "write", which counts bytes."""


@dataclass(frozen=True)
class EditSettings:
    """What decides the result, besides model and facts. None: the preset's.

    Attributes:
        method: of `EDITORS`.
        layers: blocks to edit.
        edges: edit the first and last of them only, each with values of its own (BLUE).
        prior_weight: lambda of the covariance.
        steps, lr, clamp: of the values.
        stats: a folder of statistics, used if it holds some, else filled.
        any_model: take statistics of another model with the same layers.
        texts: files for the statistics; none: the model's own samples.
        tokens: for the statistics.
        seed: of contexts and samples.
        batch: facts at a time.
        dtype: of the model while it is edited: "auto" is float32 on the CPU, else the checkpoint's.
        device: "auto" is the first CUDA device, else the CPU.
        evaluate: score the facts before and after.
    """

    method: str = "memit"
    layers: tuple[int, ...] | None = None
    edges: bool = False
    prior_weight: float | None = None
    steps: int | None = None
    lr: float | None = None
    clamp: float | None = None
    stats: Path | None = None
    any_model: bool = False
    texts: tuple[str, ...] = ()
    tokens: int = 150_000
    seed: int = 0
    batch: int = 64
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    evaluate: bool = True

    def __post_init__(self) -> None:
        one_of("method", self.method, EDITORS)
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        at_least("tokens", self.tokens, 1)
        at_least("batch", self.batch, 1)
        free = self.method == "alphaedit" or (self.method == "rome" and self.stats is None)
        if free and self.prior_weight is not None:
            raise ValueError(
                f"prior_weight has no effect with method={self.method!r}"
                + (" without stats" if self.method == "rome" else "")
            )
        if self.edges and self.method in ("rome", "emmet"):
            raise ValueError(f"edges has no effect with method={self.method!r}: it edits one block")
        unused = {"texts": bool(self.texts) and self.method == "rome", "any_model": self.any_model}
        for name, given in unused.items():
            if given and self.stats is None:
                raise ValueError(
                    f"{name} has no effect without stats: name a folder of statistics with it"
                )


@dataclass(frozen=True)
class Result:
    """output: the folder. facts: how many. report: None without evaluation. seconds: of this run.
    before: the scores of the unedited model."""

    output: Path
    facts: int
    before: Report | None
    report: Report | None
    seconds: float


class EditJob:
    """One `cl-fast edit`.

    Everything that files can tell is checked here, before anything is loaded or written.

    Args:
        model: a checkpoint folder with config and tokenizer.
        facts: a file of `load_facts`.
        output: the folder to make; it must not exist.
        settings: see `EditSettings`.
        restart: throw away what an earlier job for `output` left.
        progress: told what is being done, how much is done, and of how much.

    Raises:
        CheckpointError: the model cannot be read.
        OutputError: the output exists, or an unfinished job there is another one.
        ValueError: the facts are wrong; the message names file and line.
    """

    def __init__(
        self,
        model: str | Path,
        facts: str | Path,
        output: str | Path,
        settings: EditSettings | None = None,
        *,
        restart: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.settings = EditSettings() if settings is None else settings
        self.base = Checkpoint.open(model)
        self.folder = self.base.folder
        self.out = Path(output).expanduser().absolute()
        self.work = self.out.with_name(f".{self.out.name}.edit")
        self.progress = progress
        try:
            self.facts = check_facts(load_facts(facts))
        except OSError as error:
            raise ValueError(f"{facts}: cannot be read ({error.strerror})") from error
        try:
            self.config = AutoConfig.from_pretrained(self.folder)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder}: config or tokenizer cannot be read: {_first_line(error)}"
            ) from error
        group_facts(self.facts, self.tokenizer)  # every fact has tokens where they are needed
        self._check_layers()
        self.texts = find_files(self.settings.texts, "texts") if self.settings.texts else ()
        self._check_device()
        self._check_stats()
        self.identity = self._identity()
        if self.out.exists() or self.out.is_symlink():
            if not self._published():
                raise OutputError(f"{self.out}: exists already; choose another folder")
        elif restart:
            shutil.rmtree(self.work, ignore_errors=True)
        self._check_work()

    # --- what it is ---

    def _check_device(self) -> None:
        name = self.settings.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(name)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} is not there: {_first_line(error)}") from error

    def _check_layers(self) -> None:
        depth = int(getattr(self.config.get_text_config(), "num_hidden_layers", 0))
        wrong = [i for i in self.settings.layers or () if depth and i >= depth]
        if wrong:
            raise ValueError(
                f"layers: the model has the blocks 0 to {depth - 1}, and none with the number "
                f"{wrong[0]}"
            )

    def _check_stats(self) -> None:
        """A folder that cannot take statistics is refused before they are collected."""
        folder = self.settings.stats
        if folder is None or self._has_stats():
            return
        if not folder.exists():
            return
        ours = {"factors", "moments.safetensors.part"}  # as KeyStats.save allows
        if not folder.is_dir() or {p.name for p in folder.iterdir()} - ours:
            raise OutputError(f"{folder}: is not empty, and holds no statistics of keys")

    def _identity(self) -> dict[str, Any]:
        """What must not differ when the job goes on."""
        hashed = blake2b(digest_size=16)
        for fact in self.facts:
            hashed.update(json.dumps(fact.to_dict(), sort_keys=True).encode() + b"\n")
        settings = asdict(self.settings)
        for name in ("device", "evaluate"):
            settings.pop(name)
        settings["stats"] = None if self.settings.stats is None else str(self.settings.stats)
        files = [(Path(f.path).name, f.file_size, f.mtime_ns) for f in self.base.files]
        plain: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "format": "cl_fast.edit v1",
                    "model": str(self.base.path),
                    "files": files,
                    "facts": hashed.hexdigest(),
                    "texts": [(str(p.absolute()), p.stat().st_size) for p in self.texts],
                    **settings,
                }
            )
        )
        return plain

    def _check_work(self) -> None:
        path = self.work / "job.json"
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            found = {}
        if {p.name for p in self.work.iterdir()} <= {"job.json", "lock"}:
            return  # cut off, or refused, before anything was done: nothing is lost
        for key, value in self.identity.items():
            if found.get(key) != value:
                what = "facts" if key == "facts" else (
                    f"{key}: {_short(found.get(key))} there, {_short(value)} now"
                )  # fmt: skip
                raise OutputError(
                    f"{self.out}: an unfinished job for it has other {what}. Give what it was "
                    "given, or --restart to throw it away"
                )

    def _published(self) -> bool:
        """Whether OUT is this very job's, whose process ended before it could tidy up."""
        path = self.work / "job.json"
        if not path.is_file() or (self.work / "model").exists():
            return False
        return (self.out / "edits.safetensors").is_file() and json.loads(
            path.read_text(encoding="utf-8")
        ) == self.identity

    def describe(self) -> list[str]:
        """What would be done, in lines."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        settings = self.settings
        decoder = decoder_of(model)
        layers = self._layers(decoder)
        groups = len(group_facts(self.facts, self.tokenizer))
        stats = "none needed" if settings.method == "rome" and settings.stats is None else (
            f"{settings.stats} (found)" if self._has_stats() else
            f"{settings.tokens} tokens of " + (f"{len(self.texts)} files" if self.texts else
                                               "the model's own samples")
        )  # fmt: skip
        return [
            f"model    {self.base.path} ({type(model).__name__}, {len(decoder)} blocks)",
            f"facts    {len(self.facts)}, about {groups} keys",
            f"method   {settings.method}, blocks {', '.join(map(str, layers))}",
            f"stats    {stats}",
            f"on       {self.device}, {self._dtype() or 'the dtype of the checkpoint'}",
            f"output   {self.out}",
        ]

    def _has_stats(self) -> bool:
        folder = self.settings.stats
        return folder is not None and (folder / "moments.safetensors").is_file()

    def _dtype(self) -> str | None:
        if self.settings.dtype != "auto":
            return self.settings.dtype
        return "float32" if self.device.type == "cpu" else None

    # --- doing it ---

    def run(self) -> Result:
        """Carries it out, from where an earlier run was cut off.

        Raises:
            CheckpointError, OutputError, ValueError, NonFiniteError: see the parts.
        """
        started = time.perf_counter()
        if self._published():
            before = _maybe_report(self.work / "before.json")
            after = _maybe_report(self.work / "after.json")
            shutil.rmtree(self.work)
            return Result(self.out, len(self.facts), before, after, time.perf_counter() - started)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.work}: cannot be made ({error.strerror})") from error
        lock = WorkLock(self.work, self.out)
        lock.acquire()
        try:
            return self._run(started)
        finally:
            lock.release()

    def _run(self, started: float) -> Result:
        write_whole(self.work / "job.json", [json.dumps(self.identity, indent=1).encode()])
        patch_file = self.work / "edits.safetensors"
        scored = self.work / "after.json"
        if not patch_file.is_file() or (self.settings.evaluate and not scored.is_file()):
            self._fit(patch_file)
        before = _maybe_report(self.work / "before.json")
        after = _maybe_report(scored)
        model = self.work / "model"
        if not (model / "config.json").is_file():
            apply_patch(
                self.base.path, patch_file, model, resume=True, progress=self._told("write")
            )
        self._leave(model, patch_file, before, after)
        model.rename(self.out)
        shutil.rmtree(self.work)
        return Result(self.out, len(self.facts), before, after, time.perf_counter() - started)

    def _fit(self, patch_file: Path) -> None:
        """The patch, and the scores: what needs the model in memory."""
        model = self._load()
        scoring = self.settings.evaluate
        before_file = self.work / "before.json"
        if not patch_file.is_file():
            self._check_weights(model)
            editor = self._editor(model)
            values = self._values(editor)
            patch = editor.fit(self.facts, values=values, progress=self._told())
            patch.save(patch_file)
        if not scoring:
            return
        reference = None
        self._say("scores before", 0, 1)
        if any(fact.neighbourhood for fact in self.facts):
            reference = Reference.take(model, self.tokenizer, self.facts, batch=self.settings.batch)
        if not before_file.is_file():
            self._scores(model, reference).to_json(before_file)
        self._say("scores after", 0, 1)
        with self._as_written(model, Patch.load(patch_file)):
            self._scores(model, reference).to_json(self.work / "after.json")

    def _layers(self, decoder: Decoder) -> tuple[int, ...]:
        settings = self.settings
        layers = settings.layers or preset_of(decoder, EDITORS[settings.method].method).layers
        return tuple(dict.fromkeys((layers[0], layers[-1]))) if settings.edges else layers

    def _check_weights(self, model: nn.Module) -> None:
        """What is edited must be in memory what it is in the files, on which the patch will go."""
        decoder = decoder_of(model)
        for site in decoder.sites(self._layers(decoder)):
            name = stored_name(site.weight_name, self.base.tensors)
            if name is None:
                raise CheckpointError(
                    f"{self.base.path}: holds no tensor {site.weight_name!r}, which is to be "
                    "edited: save the model anew with save_pretrained"
                )
            stored = self.base.tensors[name]
            if hash_stored(stored) != weight_hash(site.weight):
                raise ValueError(
                    f"{site.weight_name} is {site.weight.dtype} in memory and {stored.dtype} in "
                    f"{stored.path}, with other values: a patch for the one does not go on the "
                    "other. Leave dtype out, or give one that holds what is stored (float32)"
                )

    @contextmanager
    def _as_written(self, model: nn.Module, patch: Patch) -> Iterator[None]:
        """The edited weights as they will be in OUT: rounded to the dtype of the checkpoint, which
        may be another than that of the model in memory."""
        weights = [module.weight.detach() for module in find_layers(model, patch.layers)]
        check_bases(patch.layers, weights)
        bases = [weight.clone() for weight in weights]
        try:
            for layer, weight, base in zip(patch.layers, weights, bases, strict=True):
                name = stored_name(layer.weight_name, self.base.tensors) or layer.weight_name
                stored = base.to(torch_dtype(self.base.tensors[name].dtype))
                edited = torch.empty_like(stored)
                write_factors(edited, stored, layer)
                weight.copy_(edited)
            yield
        finally:
            for weight, base in zip(weights, bases, strict=True):
                weight.copy_(base)

    def _scores(self, model: nn.Module, reference: Reference | None) -> Report:
        return evaluate(
            model, self.tokenizer, self.facts, batch=self.settings.batch, reference=reference
        )

    def _load(self) -> Any:
        dtype = self._dtype()
        self._say("loading", 0, 1)
        try:
            with _quiet_bars():
                model = AutoModelForCausalLM.from_pretrained(
                    self.folder, dtype="auto" if dtype is None else getattr(torch, dtype)
                )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: cannot be loaded: {_first_line(error)}"
            ) from error
        return model.to(self.device).eval()

    def _editor(self, model: Any) -> WeightEditor:
        settings = self.settings
        given: dict[str, Any] = {
            "layers": settings.layers,
            "prior_weight": settings.prior_weight,
            "steps": settings.steps,
            "lr": settings.lr,
            "clamp": settings.clamp,
            "spread": "ends" if settings.edges else None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return EDITORS[settings.method](
            model, self.tokenizer, self._stats(model), batch=settings.batch, seed=settings.seed,
            **given,
        )  # fmt: skip

    def _stats(self, model: Any) -> KeyStats | None:
        settings = self.settings
        if settings.method == "rome" and settings.stats is None:
            return None
        folder = settings.stats if settings.stats is not None else self.work / "stats"
        if (folder / "moments.safetensors").is_file():
            try:
                return KeyStats.load(folder, model, any_model=settings.any_model)
            except ValueError as error:
                if settings.stats is None:
                    raise
                error.add_note("on the command line: --any-model, or another --stats folder")
                raise
        layers = self._layers(decoder_of(model))
        texts: Literal["self"] | Iterator[str] = "self"
        if self.texts:
            texts = documents(Texts(self.texts, documents="paragraph"))
        self._say("statistics", 0, 1)
        stats = KeyStats.collect(
            model, self.tokenizer, texts=texts, layers=layers, tokens=settings.tokens,
            seed=settings.seed, progress=self.progress is not None,
        )  # fmt: skip
        stats.save(folder)
        return KeyStats.load(folder, model)

    def _values(self, editor: WeightEditor) -> list[Values]:
        """The values of all facts, kept on disk batch by batch."""
        groups = group_facts(self.facts, self.tokenizer, editor.lookup)
        size = self.settings.batch
        (self.work / "values").mkdir(exist_ok=True)
        parts: list[list[Values]] = []
        done = 0
        for number, first in enumerate(range(0, len(groups), size)):
            some = groups[first : first + size]
            path = self.work / "values" / f"{number:05d}.safetensors"
            self._say("values", done, len(self.facts))
            if path.is_file():
                parts.append(_load_values(path, some))
            else:
                found = editor.optimise([fact for group in some for fact in group.facts])
                _save_values(path, found)
                parts.append(found)
            done += sum(len(group.facts) for group in some)
        self._say("values", done, len(self.facts))
        return [
            Values(
                groups,
                torch.cat([part[i].delta for part in parts]),
                torch.cat([part[i].start for part in parts]),
                [row for part in parts for row in part[i].report],
                parts[0][i].layer,
            )
            for i in range(len(parts[0]))
        ]

    def _leave(
        self, model: Path, patch_file: Path, before: Report | None, after: Report | None
    ) -> None:
        """Patch and report beside the weights."""
        shutil.copy2(patch_file, model / "edits.safetensors")
        relocate(model, {str(patch_file): str(self.out / "edits.safetensors")}, self.out.name)
        patch = Patch.load(patch_file)
        content = {
            "format": "cl_fast.edits v1",
            "base": str(self.base.path),
            "method": patch.method,
            "options": dict(patch.options),
            "layers": dict(patch.report.get("layers", {})),
            "facts": [
                {**patch.facts[i].to_dict(), **patch.report.get("facts", {}).get(i, {}), "id": i}
                for i in patch.ids
            ],
            "before": None if before is None else before.to_dict(),
            "after": None if after is None else after.to_dict(),
        }
        write_whole(model / "edits.json", [json.dumps(content, indent=1).encode() + b"\n"])
        write_whole(model / "edits.md", [self._markdown(patch, before, after).encode()])

    def _markdown(self, patch: Patch, before: Report | None, after: Report | None) -> str:
        layers = ", ".join(layer.name for layer in patch.layers)
        lines = [
            "# Edited facts",
            "",
            f"{len(patch)} facts by {patch.method} in {layers} of `{self.base.path.name}`. "
            "`edits.safetensors` is the patch: `Patch.load` takes facts back or adds some.",
            "",
        ]
        if before is not None and after is not None:
            lines += [side_by_side(before, after, form="markdown"), ""]
        if after is not None:
            missed = not_said(after)
            if missed:
                lines += [
                    f"{len(missed)} of {len(after.rows)} facts are not what the model writes:",
                    "",
                    *(
                        f"- {row['prompt']} **{row['target']}**; it writes: {row['greedy_text']}"
                        for row in missed[:50]
                    ),
                    *(["- ..."] if len(missed) > 50 else []),
                    "",
                ]
        off = ("prior_weight",) if patch.options.get("prior") != "covariance" else _OF_NULL_SPACE
        shown = {k: patch.options[k] for k in _SHOWN if k in patch.options and k not in off}
        shown = {k: f"{v:g}" if isinstance(v, float) else v for k, v in shown.items()}
        lines += [
            "Settings: " + ", ".join(f"{k} {v}" for k, v in shown.items() if v is not None) + ".",
            "",
        ]
        return "\n".join(lines)

    # --- telling ---

    def _say(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def _told(self, name: str | None = None) -> Any:
        if self.progress is None:
            return None if name is not None else False
        return lambda what, done, total: self._say(name or what, done, total)


# --- scores ------------------------------------------------------------------------------------

_COLUMNS = ("score", "es", "ps", "ns", "es_acc", "ps_acc", "ns_acc", "ns_plus", "nkl", "greedy")
_OF_NULL_SPACE = ("energy", "threshold", "l2")
_SHOWN = ("layers", "prior", "prior_weight", "energy", "threshold", "l2", "ridge", "spread",
          "lr", "steps", "clamp", "kl_factor", "weight_decay")  # fmt: skip


def side_by_side(before: Report, after: Report, form: str = "text") -> str:
    """The scores of the unedited and the edited model: successes and what is really answered."""
    known = {*before.names, *after.names}
    return compared(
        {"before": before, "after": after}, [name for name in _COLUMNS if name in known], form
    )


def not_said(report: Report) -> list[dict[str, Any]]:
    """The rows of facts whose targets are not what the model writes."""
    return [row for row in report.rows if row.get("greedy", 1.0) < 1.0]


# --- files -------------------------------------------------------------------------------------


def _save_values(path: Path, found: Sequence[Values]) -> None:
    tensors: dict[str, Tensor] = {}
    for i, values in enumerate(found):
        tensors[f"{i}.delta"], tensors[f"{i}.start"] = values.delta, values.start
        told = json.dumps([values.layer, values.report]).encode()
        tensors[f"{i}.report"] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    save_tensors(tensors, path)


def _load_values(path: Path, groups: list[Group]) -> list[Values]:
    tensors = load_tensors(path)
    found = []
    for i in range(len(tensors) // 3):
        layer, report = json.loads(bytes(tensors[f"{i}.report"].tolist()))
        found.append(
            Values(groups, tensors[f"{i}.delta"], tensors[f"{i}.start"], report, int(layer))
        )
    return found


def _maybe_report(path: Path) -> Report | None:
    return Report.from_json(path) if path.is_file() else None


@contextmanager
def _quiet_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
