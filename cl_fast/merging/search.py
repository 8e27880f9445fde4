"""Searching for a merge: weights, densities, gradients and methods that score best.

    study   a recipe with ranges in place of numbers (`space`), and what scores a candidate
    trial   values from the sampler -> recipe -> candidate in memory (`candidates`) -> score
    best    the recipe of the best trial, as YAML that `cl-fast merge` runs

The sampler is Optuna's: TPE (Bergstra et al. 2011), CMA-ES (Hansen 2016), random; a grid and the
greedy soup (Wortsman et al. 2022) are here. Trials are stored in SQLite as they happen. The same
call goes on: a trial that was killed is evaluated again with the same values, and the sampler is
seeded for each trial from (seed, number), so an interrupted study proposes what an uninterrupted
one does. A study is one process at a time, which a lock holds.

A trial that fails (the command ends with an error, the score is NaN, the merge overflows) is a
failed trial and not the end, unless the first `GIVE_UP` all fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from cl_fast import options
from cl_fast.documents import kind_of, parse_document, read_document
from cl_fast.errors import (
    CheckpointError,
    ClFastError,
    Interrupted,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from cl_fast.merging.candidates import Maker, Workspace
from cl_fast.merging.methods import suggest
from cl_fast.merging.plan import Plan, make_plan, term_names
from cl_fast.merging.recipe import MAX_RECIPE_BYTES, parse_recipe
from cl_fast.merging.scoring import EvaluationError, find_function, score_by_command
from cl_fast.merging.space import find_space, place

__all__ = ["GIVE_UP", "SearchResult", "Study", "Tried", "load_study", "search"]

GIVE_UP = 5
"""So many failed trials, and none that scored, end a study."""

Sampler: TypeAlias = Literal["tpe", "cma-es", "random", "grid"]
Strategy: TypeAlias = Literal["sample", "greedy_soup"]
Gives: TypeAlias = Literal["state_dict", "model"]
Evaluate: TypeAlias = Callable[[Any], float] | Sequence[str] | str

_SAMPLERS = ("tpe", "cma-es", "random", "grid")
_STRATEGIES = ("sample", "greedy_soup")
_FORMAT = 1
_IDENTITY = "cl_fast"
_STUDY_KEYS = (
    "recipe", "evaluate", "function", "gives", "direction", "trials", "timeout", "sampler",
    "strategy", "accept", "seed", "device",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is searched for, and how.

    Attributes:
        recipe: a recipe whose values may be places (`cl_fast.merging.space`).
        evaluate: a command in which {} is the folder of the candidate, as words; or a function of
            the candidate. The score of a command is the last number that it prints.
        gives: what a function gets: "state_dict" or "model".
        direction: "maximize" or "minimize".
        trials: how many in all, with those of earlier runs.
        timeout: seconds after which no trial is begun; None: no bound.
        sampler: "tpe", "cma-es", "random" or "grid" (every combination; needs steps or choices).
        strategy: "sample"; or "greedy_soup": the mean of those models that raise the score, of a
            recipe of `linear` without places.
        accept: of the greedy soup: "rise", or "no_fall".
        seed: of the sampler.
        device: for functions: where candidates are made; None: a GPU if there is one.
        source: the file that it came from.
    """

    recipe: Mapping[str, Any]
    evaluate: Callable[[Any], float] | tuple[str, ...]
    evaluated_by: str
    gives: Gives = "state_dict"
    direction: Literal["maximize", "minimize"] = "maximize"
    trials: int = 50
    timeout: float | None = None
    sampler: Sampler = "tpe"
    strategy: Strategy = "sample"
    accept: Literal["rise", "no_fall"] = "rise"
    seed: int = 0
    device: str | None = None
    source: Path | None = None

    def __post_init__(self) -> None:
        try:
            options.one_of("gives", self.gives, ("state_dict", "model"))
            options.one_of("direction", self.direction, ("maximize", "minimize"))
            options.at_least("trials", self.trials, 1)
            if self.timeout is not None:
                options.positive("timeout", self.timeout)
            options.one_of("sampler", self.sampler, _SAMPLERS)
            options.one_of("strategy", self.strategy, _STRATEGIES)
            options.one_of("accept", self.accept, ("rise", "no_fall"))
            options.at_least("seed", self.seed, 0)
        except TypeError as error:
            raise RecipeError(str(error)) from None
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if isinstance(self.evaluate, tuple):
            for name, default in (("gives", "state_dict"), ("device", None)):
                if getattr(self, name) != default:
                    raise RecipeError(
                        f"{name}: has no effect with a command, which gets a folder; remove it"
                    )

    def labels(self) -> dict[str, str]:
        """Key of what is varied -> a shorter one: models[0].parameters.weight -> math.weight."""
        entries = self.recipe.get("models")
        models = [
            entry.get("model") if isinstance(entry, Mapping) else entry
            for entry in (entries if isinstance(entries, list) else [])
        ]
        called: Sequence[str] = [f"models[{i}]" for i in range(len(models))]
        if all(isinstance(model, str) for model in models):
            called = term_names([str(model) for model in models])

        def short(name: str) -> str:
            text = re.sub(
                r"^models\[(\d+)\]\.(?=parameters\.)", lambda m: f"{called[int(m[1])]}.", name
            )
            return re.sub(r"(^|\.)parameters\.", r"\1", text)

        names = [number.name for number in find_space(self.recipe).numbers]
        labels = {name: short(name) for name in names}
        return labels if len(set(labels.values())) == len(names) else {n: n for n in names}


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial.

    number: of it. values: name -> value. score: None where it failed; `error` says why. seconds:
    of merging and scoring. recipe: that was merged.
    """

    number: int
    values: Mapping[str, Any]
    score: float | None
    seconds: float
    error: str
    recipe: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A study so far.

    Attributes:
        best: the trial with the best score; the first one of equals.
        trials: all of them, failed ones too.
        new: how many this run added.
        direction: of the score.
        names: of what is varied.
        labels: name -> a shorter one, for tables.
    """

    best: Tried
    trials: tuple[Tried, ...]
    new: int
    direction: str
    names: tuple[str, ...] = field(default=())
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The best recipe."""
        return self.best.recipe

    def top(self, count: int) -> list[Tried]:
        """The best trials, best first."""
        sign = -1.0 if self.direction == "maximize" else 1.0
        scored = [trial for trial in self.trials if trial.score is not None]
        return sorted(scored, key=lambda t: (sign * (t.score or 0.0), t.number))[:count]

    def table(self, count: int = 10) -> list[str]:
        """The best trials as lines of text."""
        rows = [["score", "trial", *(self.labels.get(name, name) for name in self.names)]]
        for trial in self.top(count):
            cells = [_text(trial.values.get(name, "")) for name in self.names]
            rows.append([f"{(trial.score or 0.0) + 0.0:.6g}", str(trial.number), *cells])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def to_yaml(self) -> str:
        """The best recipe as a file."""
        failed = sum(trial.score is None for trial in self.trials)
        lines = [
            f"# score {self.best.score!r} ({self.direction}d), trial {self.best.number} of "
            f"{len(self.trials)}" + (f", {failed} of which failed" if failed else ""),
        ]
        text: str = yaml.safe_dump(_plain(self.recipe), sort_keys=False, allow_unicode=True)
        return "\n".join(lines) + "\n" + text

    def to_json(self) -> dict[str, Any]:
        return {
            "direction": self.direction,
            "best": self.best.number,
            "trials": [_plain(asdict(trial)) for trial in self.trials],
        }


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Without what YAML and JSON do not have: tuples, numbers of numpy."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, float | int | str | bool) or value is None:
        return value
    return str(value)


# The study file.


def load_study(path: str | Path) -> Study:
    """Reads a study file (docs/search.md).

    Raises:
        RecipeError: it cannot be read, a key is unknown or malformed.
    """
    file = Path(path)
    text = read_document(file, "study", MAX_RECIPE_BYTES)
    content = parse_document(text, f"{file}: ")
    try:
        return _study(content, file)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def _study(content: Any, file: Path) -> Study:
    if not isinstance(content, Mapping):
        raise RecipeError(f"a study is a mapping; got {kind_of(content)}")
    for key in content:
        if key not in _STUDY_KEYS:
            hint = suggest(str(key), _STUDY_KEYS)
            raise RecipeError(f"unknown key {key!r}{hint}; a study has {', '.join(_STUDY_KEYS)}")
    recipe = content.get("recipe")
    if not isinstance(recipe, Mapping):
        raise RecipeError(f"recipe: must be a recipe; got {kind_of(recipe)}")
    command, function = content.get("evaluate"), content.get("function")
    if (command is None) == (function is None):
        raise RecipeError(
            "give either evaluate: a command in which {} is the checkpoint, or function: "
            "module:function"
        )
    find_space(recipe)
    evaluate: Any
    if function is not None:
        if not isinstance(function, str):
            raise RecipeError(f"function: must be module:function; got {kind_of(function)}")
        evaluate, by = find_function(function, file.absolute().parent), function
    else:
        evaluate, by = _words(command)
    given = {
        key: value
        for key, value in content.items()
        if key not in ("recipe", "evaluate", "function") and value is not None
    }
    return Study(recipe=recipe, evaluate=evaluate, evaluated_by=by, source=file, **given)


def _words(command: Any) -> tuple[tuple[str, ...], str]:
    if isinstance(command, str):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise RecipeError(f"evaluate: {command!r}: {error}") from None
    elif isinstance(command, list | tuple) and all(isinstance(word, str) for word in command):
        words = list(command)
    else:
        raise RecipeError(f"evaluate: must be a command; got {kind_of(command)}")
    if not any("{}" in word for word in words):
        raise RecipeError(
            f"evaluate: {shlex.join(words)!r} does not say {{}} where the checkpoint's folder goes"
        )
    return tuple(words), shlex.join(words)


# Searching.


def search(
    recipe: Mapping[str, Any] | Study,
    evaluate: Evaluate | None = None,
    *,
    space: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
    on_trial: Callable[[Tried, SearchResult | None], None] | None = None,
    **settings: Any,
) -> SearchResult:
    """Finds the recipe whose merge scores best.

    Args:
        recipe: a recipe with places as a mapping, or a `Study`.
        evaluate: a function of the candidate that returns a number, or a command as text or words
            in which {} is the folder of the candidate.
        space: places by key ("models[0].parameters.weight": {"search": [0, 1]}), put into the
            recipe.
        storage: the SQLite file of the trials, made if it is not there; None: kept in memory only.
        threads: of the merges.
        say: called with sentences that the user should be told.
        on_trial: called after each trial with it and the study so far.
        settings: the attributes of `Study`: direction, trials, timeout, sampler, strategy, accept,
            seed, gives, device.

    Returns:
        the best trial and all others, with those of earlier runs.

    Raises:
        RecipeError: the study is malformed, or its storage has scores of another search space,
            other inputs, another recipe, evaluation or direction.
        CheckpointError: an input does not fit, found before the first trial.
        OutputError: the storage is in use, or no SQLite file of a study.
        ClFastError: Optuna is not installed; every trial failed.
    """
    if isinstance(recipe, Study):
        if evaluate is not None or space is not None:
            raise TypeError("evaluate and space are the study's own; give a recipe instead")
        study = replace(recipe, **settings) if settings else recipe
    else:
        document = _plain(recipe)
        for key, value in (space or {}).items():
            place(document, key, value)
        if evaluate is None:
            raise TypeError("evaluate must be a function or a command")
        what: Any
        if callable(evaluate):
            what, by = evaluate, options.function_name(evaluate) or "a function"
        else:
            what, by = _words(evaluate if isinstance(evaluate, str) else list(evaluate))
        study = Study(recipe=document, evaluate=what, evaluated_by=by, **settings)
    return _Search(study, storage, threads, say or (lambda _: None), on_trial).run()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ClFastError(
            "searching needs Optuna: pip install 'cl_fast[search]' in a checkout of cl_fast"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class _Search:
    def __init__(
        self,
        study: Study,
        storage: str | Path | None,
        threads: int | None,
        say: Callable[[str], None],
        on_trial: Callable[[Tried, SearchResult | None], None] | None,
    ) -> None:
        self._study = study
        self._storage = None if storage is None else Path(storage).absolute()
        self._threads = threads
        self._say = say
        self._on_trial = on_trial
        self._space = find_space(study.recipe)
        self._sign = 1.0 if study.direction == "maximize" else -1.0
        self._new = 0
        self._maker: Maker | None = None
        self._stamps: dict[str, list[Any]] = {}
        self._optuna = _optuna()

    def run(self) -> SearchResult:
        study = self._study
        self._check_strategy()
        started = time.monotonic()
        with self._locked(), warnings.catch_warnings():
            warnings.simplefilter("ignore", category=self._optuna.exceptions.ExperimentalWarning)
            # Without a storage nothing keeps two searches apart but their processes.
            beside = self._storage or Path.cwd() / f"search-{os.getpid()}"
            self._workspace = Workspace(beside, self._say)
            try:
                identity = self._identity(self._check_recipes())
                if not isinstance(study.evaluate, tuple):
                    self._maker = Maker(study.device, self._threads)
                self._trials = self._open(identity)
                if study.strategy == "greedy_soup":
                    self._greedy(started)
                else:
                    self._sample(started)
                return self._result()
            finally:
                self._workspace.clear()

    # What can be known before the first trial.

    def _check_strategy(self) -> None:
        study, numbers = self._study, self._space.numbers
        if study.strategy == "greedy_soup":
            method = study.recipe.get("merge_method")
            models = study.recipe.get("models")
            if numbers or method != "linear":
                raise RecipeError(
                    "strategy: greedy_soup chooses among the models of a recipe of "
                    f"merge_method: linear without places; got {method!r}"
                    + (f" and a place at {numbers[0].name}" if numbers else "")
                )
            if not isinstance(models, list) or len(models) < 2:
                raise RecipeError("strategy: greedy_soup needs at least two models in the recipe")
            return
        if not numbers:
            raise RecipeError(
                "recipe: has no place to search; write a number as {search: [low, high]} or "
                "{choices: [...]}"
            )
        if study.sampler == "grid":
            for number in numbers:
                if number.grid is None:
                    raise RecipeError(
                        f"{number.name}: sampler: grid needs a step or choices, since a range "
                        "has no end of values"
                    )
        if study.sampler == "cma-es":
            try:
                import cmaes  # noqa: F401
            except ImportError as error:
                raise RecipeError(
                    "sampler: cma-es needs the package cmaes: pip install cmaes"
                ) from error
            ranges = [n for n in numbers if n.choices is None and n.low < n.high]
            if len(ranges) < 2:
                raise RecipeError(
                    f"sampler: cma-es adapts two ranges or more; the recipe has {len(ranges)}, "
                    "use tpe"
                )

    def _check_recipes(self) -> list[Plan]:
        """Plans of what the space can be: whatever headers can tell is told now."""
        self._check_fixed()
        plans = [self._planned(values) for values in self._space.middles()]
        for ends in self._space.ends():
            try:
                plans.append(self._plan(self._space.fill(ends)))
            except (RecipeError, CheckpointError):
                # Ends that are wrong only together (weights that sum to zero) are failed trials.
                for values in self._space.one_by_one(ends):
                    self._planned(values)
        from cl_fast.merging.inputs import check_derived

        for plan in plans:
            check_derived(plan)
        return plans

    def _check_fixed(self) -> None:
        """Tells plainly what is wrong whatever the values are: a model that does not exist."""
        first = None
        for values in (*self._space.middles(), *self._space.ends()):
            try:
                self._plan(self._space.fill(values))
            except (RecipeError, CheckpointError) as error:
                if first is not None and str(error) != str(first):
                    return
                first = first or error
            else:
                return
        if first is not None:
            raise first

    def _planned(self, values: Mapping[str, Any]) -> Plan:
        try:
            return self._plan(self._space.fill(values))
        except (RecipeError, CheckpointError) as error:
            told = self._space.told(values)
            if not told:
                raise
            where = ", ".join(f"{name}: {_text(value)}" for name, value in told.items())
            raise type(error)(f"the recipe with {where}: {error}") from None

    def _plan(self, recipe: Mapping[str, Any]) -> Plan:
        return make_plan(parse_recipe(recipe), self._workspace.nowhere(), threads=self._threads)

    def _identity(self, plans: Sequence[Plan]) -> dict[str, Any]:
        self._stamps = {path: stamp for plan in plans for path, stamp in _stamps(plan).items()}
        study = self._study
        return {
            "format": _FORMAT,
            "space": _plain(self._space.to_json()),
            "recipe": _plain(study.recipe),
            "inputs": self._stamps,
            "direction": study.direction,
            "evaluate": study.evaluated_by,
            "gives": study.gives,
            "strategy": study.strategy,
        }

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._storage is None:
            yield
            return
        path = self._storage.with_name(self._storage.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise OutputError(
                f"{self._storage}: cannot be written ({error.strerror or error})"
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(
                    f"{self._storage}: another search is at work with it; wait for it, or give "
                    "another storage"
                ) from error
            yield

    def _open(self, identity: dict[str, Any]) -> Any:
        optuna, path = self._optuna, self._storage
        if path is None:
            study = optuna.create_study(direction=self._study.direction)
        else:
            if "?" in str(path):
                raise OutputError(f"{path}: SQLite takes no '?' in a path; give another storage")
            known = path.exists()
            try:
                study = optuna.create_study(
                    storage=f"sqlite:///{path}",
                    study_name="search",
                    direction=self._study.direction,
                    load_if_exists=True,
                )
                stored = study.user_attrs.get(_IDENTITY)
            except Exception as error:  # of SQLAlchemy, which has many
                raise OutputError(
                    f"{path}: is no storage of a study ({type(error).__name__}); give another one"
                ) from error
            if known and stored is None and study.trials:
                raise OutputError(f"{path}: holds a study of something else; give another storage")
            if stored is not None:
                try:
                    self._compare(stored, identity)
                    anew = self._gave_up(study)
                except RecipeError:
                    if self._any_score(study):
                        raise
                    anew = True
                if anew:
                    failed = sum(trial.state.is_finished() for trial in study.trials)
                    if failed:
                        self._say(f"no trial in {path} has a score ({failed} failed): begins anew")
                    optuna.delete_study(study_name="search", storage=f"sqlite:///{path}")
                    study = optuna.create_study(
                        storage=f"sqlite:///{path}",
                        study_name="search",
                        direction=self._study.direction,
                    )
        study.set_user_attr(_IDENTITY, identity)
        return study

    def _any_score(self, study: Any) -> bool:
        complete = self._optuna.trial.TrialState.COMPLETE
        return any(trial.state == complete for trial in study.get_trials(deepcopy=False))

    def _gave_up(self, study: Any) -> bool:
        """Whether this same study ended without a score: what failed may have been mended."""
        finished = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
        return finished >= min(GIVE_UP, self._study.trials) and not self._any_score(study)

    def _compare(self, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        def refuse(what: str) -> None:
            raise RecipeError(
                f"{self._storage}: the trials there are of {what}; scores of both cannot be "
                "compared. Give another storage, or remove that file to begin again"
            )

        if stored.get("format") != _FORMAT:
            refuse("another version of cl_fast")
        if stored["strategy"] != identity["strategy"]:
            refuse(f"another strategy ({stored['strategy']})")
        if stored["direction"] != identity["direction"]:
            refuse(f"another direction ({stored['direction']})")
        now = json.loads(json.dumps(identity))
        if stored["space"] != now["space"]:
            before = {number["name"]: number for number in stored["space"]}
            after = {number["name"]: number for number in now["space"]}
            name = next(n for n in {**before, **after} if before.get(n) != after.get(n))
            refuse(f"another search space ({name} differs)")
        if stored["recipe"] != now["recipe"]:
            refuse("another recipe")
        if stored["inputs"] != now["inputs"]:
            paths = {**stored["inputs"], **now["inputs"]}
            path = next(p for p in paths if stored["inputs"].get(p) != now["inputs"].get(p))
            refuse(f"other inputs ({path} differs)")
        if (stored["evaluate"], stored["gives"]) != (now["evaluate"], now["gives"]):
            refuse(f"another evaluation ({stored['evaluate']})")

    # Trials.

    def _over(self, started: float) -> bool:
        return self._study.timeout is not None and (
            time.monotonic() - started >= self._study.timeout
        )

    def _sample(self, started: float) -> None:
        study = self._study
        wanted = study.trials
        if study.sampler == "grid":
            points = math.prod(len(n.grid or ()) for n in self._space.numbers)
            if wanted < points:
                self._say(f"the grid has {points} combinations, of which {wanted} are tried")
            wanted = min(wanted, points)
        running = self._optuna.trial.TrialState.RUNNING
        for number in range(wanted):
            if self._over(started):
                self._say(f"stopped after {study.timeout:g} seconds")
                return
            trials = self._trials.get_trials(deepcopy=False)
            if number < len(trials) and trials[number].state.is_finished():
                continue
            self._trials.sampler = self._sampler(number)
            if number < len(trials) and trials[number].state == running:
                # It was killed: the same values again.
                trial = self._optuna.trial.Trial(self._trials, trials[number]._trial_id)
            else:
                if study.sampler == "grid" and number >= len(trials):
                    self._trials.enqueue_trial(self._grid_point(number))
                trial = self._trials.ask()
            values = self._suggest(trial)
            if self._repeated(trial, values):
                continue
            self._evaluate(trial, self._space.fill(values), self._space.told(values))

    def _repeated(self, trial: Any, values: Mapping[str, Any]) -> bool:
        """Gives a trial of values that have a score that score, unevaluated."""
        complete = self._optuna.trial.TrialState.COMPLETE
        for known in self._trials.get_trials(deepcopy=False):
            if known.state == complete and known.params == values:
                tried = known.user_attrs["tried"]
                trial.set_user_attr("tried", tried)
                trial.set_user_attr("came_of_it", {"seconds": 0.0, "error": ""})
                self._trials.tell(trial, known.value)
                self._new += 1
                self._report(trial.number)
                return True
        return False

    def _grid_point(self, number: int) -> dict[str, Any]:
        point = {}
        for entry in reversed(self._space.numbers):
            grid = entry.grid or []
            number, position = divmod(number, len(grid))
            point[entry.name] = grid[position]
        return point

    def _sampler(self, number: int) -> Any:
        samplers = self._optuna.samplers
        text = f"{self._study.seed} {number}".encode()
        seed = int.from_bytes(blake2b(text, digest_size=4).digest(), "little")
        if self._study.sampler == "tpe":
            return samplers.TPESampler(seed=seed, multivariate=True)
        if self._study.sampler == "cma-es":
            return samplers.CmaEsSampler(
                seed=seed,
                independent_sampler=samplers.RandomSampler(seed=seed),
                warn_independent_sampling=False,
            )
        return samplers.RandomSampler(seed=seed)

    def _suggest(self, trial: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for number in self._space.numbers:
            if number.choices is not None:
                positions = list(range(len(number.choices)))
                values[number.name] = trial.suggest_categorical(number.name, positions)
            else:
                values[number.name] = trial.suggest_float(
                    number.name, number.low, number.high, log=number.log, step=number.step
                )
        return values

    def _evaluate(
        self, trial: Any, recipe: dict[str, Any], told: Mapping[str, Any]
    ) -> float | None:
        began = time.monotonic()
        trial.set_user_attr("tried", {"recipe": _plain(recipe), "values": _plain(told)})
        score, failure = None, ""
        try:
            score = self._score(recipe)
        except (EvaluationError, NonFiniteError, RecipeError) as error:
            failure = str(error)
        except ClFastError:
            raise  # not of this trial's values: it is not finished, and will be tried again
        except Exception as error:
            if isinstance(self._study.evaluate, tuple):
                raise
            failure = f"{self._study.evaluated_by}: {type(error).__name__}: {error}"
        if score is not None and not math.isfinite(score):
            score, failure = None, f"the score is {score}"
        trial.set_user_attr("came_of_it", {"seconds": time.monotonic() - began, "error": failure})
        state = self._optuna.trial.TrialState
        if score is None:
            self._trials.tell(trial, state=state.FAIL)
        else:
            self._trials.tell(trial, score)
        self._new += 1
        self._report(trial.number)
        return score

    def _score(self, recipe: Mapping[str, Any]) -> float:
        evaluate = self._study.evaluate
        plan = self._plan(recipe)
        for path, stamp in _stamps(plan).items():
            if self._stamps.get(path) != stamp:
                raise CheckpointError(
                    f"{path}: was changed since the study began; scores before and after cannot "
                    "be compared. Search when nothing writes to the inputs, with another storage"
                )
        if isinstance(evaluate, tuple):
            try:
                with self._workspace.folder(recipe, self._threads) as folder:
                    return score_by_command(evaluate, folder, "evaluate")
            except Interrupted:  # of the merge, whose finished shards are of no use here
                raise KeyboardInterrupt from None
        assert self._maker is not None
        made = self._maker.model(plan) if self._study.gives == "model" else None
        found = evaluate(made if made is not None else self._maker.state_dict(plan))
        try:
            return float(found)
        except (TypeError, ValueError):
            raise RecipeError(
                f"{self._study.evaluated_by} must return a number; got {type(found).__name__}"
            ) from None

    def _report(self, number: int) -> None:
        tried = self._tried(self._trials.get_trials(deepcopy=False)[number])
        trials = self._all()
        scored = [trial for trial in trials if trial.score is not None]
        if self._on_trial is not None:
            self._on_trial(tried, self._result() if scored else None)
        if not scored and len(trials) >= GIVE_UP:
            raise ClFastError(
                f"the first {len(trials)} trials failed, so there is nothing to go on; the last "
                f"one: {trials[-1].error}"
            )

    def _tried(self, trial: Any) -> Tried:
        tried = trial.user_attrs.get("tried", {})
        came = trial.user_attrs.get("came_of_it", {})
        complete = trial.state == self._optuna.trial.TrialState.COMPLETE
        return Tried(
            trial.number,
            tried.get("values", {}),
            trial.value if complete else None,
            came.get("seconds", 0.0),
            "" if complete else came.get("error", "not finished"),
            tried.get("recipe", {}),
        )

    def _all(self) -> list[Tried]:
        """The finished trials."""
        trials = self._trials.get_trials(deepcopy=False)
        return [self._tried(trial) for trial in trials if trial.state.is_finished()]

    def _result(self) -> SearchResult:
        trials = self._all()
        scored = [trial for trial in trials if trial.score is not None]
        if not scored:
            last = f"; the last one: {trials[-1].error}" if trials else ""
            raise ClFastError(f"no trial of {len(trials)} gave a score{last}")
        best = max(scored, key=lambda trial: (self._sign * (trial.score or 0.0), -trial.number))
        names = tuple(number.name for number in self._space.numbers)
        if self._study.strategy == "greedy_soup":
            names = ("models",)
        return SearchResult(
            best, tuple(trials), self._new, self._study.direction, names, self._study.labels()
        )

    # Greedy soup.

    def _greedy(self, started: float) -> None:
        from cl_fast.merging.soup import choose

        study = self._study
        entries = study.recipe["models"]
        references = [str(e.get("model") if isinstance(e, Mapping) else e) for e in entries]
        names = term_names(references)
        entry_of = dict(zip(names, entries, strict=True))

        def score(chosen: Sequence[str]) -> float | None:
            """Of the mean of these, in this order; one that is known is not evaluated again."""
            state = self._optuna.trial.TrialState
            for known in self._trials.get_trials(deepcopy=False):
                if known.user_attrs.get("chosen") == list(chosen):
                    if known.state == state.COMPLETE:
                        return self._sign * float(known.value)
                    if known.state == state.FAIL:
                        return None
                    trial = self._optuna.trial.Trial(self._trials, known._trial_id)
                    break
            else:
                if self._over(started) or len(self._all()) >= study.trials:
                    raise _Enough
                trial = self._trials.ask()
                trial.set_user_attr("chosen", list(chosen))
            recipe = dict(study.recipe) | {"models": [entry_of[name] for name in chosen]}
            found = self._evaluate(trial, recipe, {"models": " + ".join(chosen)})
            return None if found is None else self._sign * found

        try:
            alone = {name: score([name]) for name in names}
            scored = {name: value for name, value in alone.items() if value is not None}
            if not scored:
                return
            chosen: list[str] = []

            def taste(name: str) -> float:
                value = score([*chosen, name])
                return -math.inf if value is None else value

            choose(scored, taste, chosen.append, study.accept)
        except _Enough:
            self._say("stopped before the soup was ready; the same command goes on")


def _stamps(plan: Plan) -> dict[str, list[Any]]:
    """File of an input -> what tells it from another of its name."""
    return {
        header.path: [header.file_size, header.mtime_ns, header.digest]
        + ([header.version] if header.version else [])
        for checkpoint in plan.inputs
        for header in checkpoint.files
    }


class _Enough(Exception):
    """Time or trials are used up."""
