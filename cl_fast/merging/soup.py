"""Model soups: the mean of finetuned models, all of them or those that help (Wortsman et al. 2022).

    uniform   mean of all candidates
    greedy    sort the candidates by their own held-out score, start with the best, go down the
              list, and keep a candidate if the mean with it scores higher than the mean without

`evaluate` is the user's: it gets a state dict (candidates in memory) or the folder of a checkpoint
(candidates on disk) and returns a number, higher is better, from data that is held out.

In memory the sum of the chosen ones is kept in float32, so a trial costs one addition and one
division per element. On disk every trial is one streaming merge of the chosen checkpoints into a
folder beside the output, removed after it was scored. Either way a trial is exactly
`linear(chosen + [candidate])`, and no candidate is held that the caller does not hold.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from cl_fast.merging.state_dicts import Inputs, Models, StateDict, linear

__all__ = ["Soup", "Trial", "choose", "greedy_soup", "uniform_soup"]

Folder: TypeAlias = str | os.PathLike[str]
Candidates: TypeAlias = Models | Sequence[Folder] | Mapping[str, Folder]
Score: TypeAlias = Callable[[Any], float]
Accept: TypeAlias = Literal["rise", "no_fall"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One step of a greedy soup: the mean with `name` scored `score`."""

    name: str
    score: float
    accepted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Soup:
    """A greedy soup.

    Attributes:
        chosen: names of the ingredients, in the order in which they came in.
        score: of the soup.
        scores: of every candidate alone.
        history: the trials in order; the first is the best candidate alone.
        state_dict: the soup, for candidates in memory.
        path: its folder, for candidates on disk.
    """

    chosen: tuple[str, ...]
    score: float
    scores: Mapping[str, float]
    history: tuple[Trial, ...]
    state_dict: dict[str, Tensor] | None = None
    path: Path | None = None


def uniform_soup(
    models: Candidates,
    *,
    output: Folder | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
) -> dict[str, Tensor] | Path:
    """The mean of all models: sum x / N, in float32, rounded once.

    Args:
        models: state dicts, modules or checkpoint folders: a list, or a mapping from names.
        output: the folder to write; for folders, and needed there.
        out_dtype: of the floating tensors; the default is that of the first model.
        into: a module that the result is loaded into as well; for models in memory.

    Returns:
        A state dict, or the path of `output`.

    Raises:
        CheckpointError, NonFiniteError, OutputError: as a merge by "linear".
        TypeError, ValueError: models of mixed kinds, or an argument for the other kind.
    """
    named = _named(models)
    if _on_disk(named):
        if into is not None:
            raise ValueError("into has no effect for checkpoint folders; load output instead")
        return _merge_folders(list(map(str, named.values())), _needed(output), out_dtype)
    if output is not None:
        raise ValueError("output has no effect for models in memory; save the returned state dict")
    return linear(cast(Models, named), out_dtype=out_dtype, into=into)


def greedy_soup(
    candidates: Candidates,
    evaluate: Score,
    *,
    accept: Accept = "rise",
    scores: Mapping[str, float] | None = None,
    output: Folder | None = None,
    out_dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
    on_score: Callable[[tuple[str, ...], float], None] | None = None,
) -> Soup:
    """The mean of those candidates that raise a held-out score, chosen greedily.

    Calls `evaluate` once for each candidate, and once for each mean that is tried: 2 N - 1 times.

    Args:
        candidates: state dicts, modules or checkpoint folders: a list, or a mapping from names.
        evaluate: score of a state dict, or of a folder for folders; higher is better. A state dict
            is read-only and valid during the call; a trial's folder is removed after it.
        accept: "rise" keeps a candidate if the score rises (the authors' code), "no_fall" also if
            it stays the same (the paper's algorithm).
        scores: known scores of candidates alone by name; those are not evaluated.
        output: the folder to write; for folders, and needed there. Trials go beside it.
        out_dtype: of the floating tensors of trials and soup; the default is that of the
            ingredient that came first.
        into: a module that the soup is loaded into as well; for candidates in memory.
        on_score: called after each call of `evaluate` with the names in the mean and its score.

    Raises:
        CheckpointError, NonFiniteError, OutputError: as a merge by "linear".
        TypeError, ValueError: candidates of mixed kinds, a score that is no number or NaN, an
            argument for the other kind.
    """
    if accept not in ("rise", "no_fall"):
        raise ValueError(f"accept must be 'rise' or 'no_fall'; got {accept!r}")
    named = _named(candidates)
    unknown = sorted((scores or {}).keys() - named.keys())
    if unknown:
        raise ValueError(f"scores has {unknown[0]!r}, which is none of {', '.join(named)}")
    pot: _Pot
    if _on_disk(named):
        if into is not None:
            raise ValueError("into has no effect for checkpoint folders; load output instead")
        pot = _FolderPot(named, _needed(output), out_dtype)
    else:
        if output is not None:
            raise ValueError("output has no effect for candidates in memory; save the state dict")
        pot = _MemoryPot(named, out_dtype)

    kept: list[str] = []

    def told(name: str, score: Any) -> float:
        value = _number(name, score)
        if on_score is not None:
            on_score((*kept, name), value)
        return value

    alone = {
        name: _number(name, scores[name])
        if scores and name in scores
        else told(name, evaluate(pot.alone(name)))
        for name in named
    }

    def taste(name: str) -> float:
        return told(name, pot.taste(name, evaluate))

    def add(name: str) -> None:
        pot.add(name)
        kept.append(name)

    chosen, best, history = choose(alone, taste, add, accept)
    soup = Soup(chosen, best, alone, history, **pot.serve())
    if into is not None and soup.state_dict is not None:
        into.load_state_dict(soup.state_dict)
    return soup


def choose(
    alone: Mapping[str, float],
    taste: Callable[[str], float],
    add: Callable[[str], None],
    accept: Accept = "rise",
) -> tuple[tuple[str, ...], float, tuple[Trial, ...]]:
    """The greedy choice itself: the names chosen, their score, and the trials.

    Args:
        alone: scores of the candidates alone, higher is better.
        taste: score of the mean of all that was added, and one more.
        add: called with a candidate that is kept.
        accept: as in `greedy_soup`.
    """
    order = sorted(alone, key=lambda name: -alone[name])  # stable: equals in the order given
    best = alone[order[0]]
    add(order[0])
    chosen, history = [order[0]], [Trial(order[0], best, True)]
    for name in order[1:]:
        score = taste(name)
        accepted = score > best or (accept == "no_fall" and score == best)
        history.append(Trial(name, score, accepted))
        if accepted:
            best = score
            chosen.append(name)
            add(name)
    return tuple(chosen), best, tuple(history)


class _Pot(Protocol):
    """What is chosen so far, and how to try one more."""

    def alone(self, name: str) -> Any: ...

    def taste(self, name: str, evaluate: Score) -> float: ...

    def add(self, name: str) -> None: ...

    def serve(self) -> dict[str, Any]: ...


class _MemoryPot:
    """A running float32 sum. Its mean has the bits of `linear`, which adds in the same order."""

    def __init__(self, named: Mapping[str, Any], out_dtype: torch.dtype | None) -> None:
        self._inputs = Inputs.of(None, named)
        self._names = self._inputs.check()
        self._inputs.refuse_nonfinite(self._names)
        self._models = dict(zip(self._inputs.names, self._inputs.models, strict=True))
        self._out_dtype = out_dtype
        self._dtypes: dict[str, torch.dtype] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def alone(self, name: str) -> StateDict:
        return self._models[name]

    def taste(self, name: str, evaluate: Score) -> float:
        with torch.no_grad():
            trial = self._mean(name)
        return evaluate(trial)

    def add(self, name: str) -> None:
        with torch.no_grad():
            for key in self._names:
                value = self._models[name][key]
                self._dtypes.setdefault(key, self._out_dtype or value.dtype)
                if key in self._sums:
                    self._sums[key] += value.float()
                else:
                    self._sums[key] = value.to(torch.float32, copy=True)
        self._count += 1

    def serve(self) -> dict[str, Any]:
        with torch.no_grad():
            return {"state_dict": self._mean()}

    def _mean(self, more: str | None = None) -> dict[str, Tensor]:
        count = torch.tensor(float(self._count + (more is not None)))
        means = {}
        for key in self._names:
            total = self._sums[key]
            if more is not None:
                total = total + self._models[more][key].float()
            means[key] = (total / count.to(total.device)).to(self._dtypes[key])
        return self._inputs.result(means)


class _FolderPot:
    """The chosen folders; every trial is a merge of files."""

    def __init__(
        self, named: Mapping[str, Any], output: Path, out_dtype: torch.dtype | None
    ) -> None:
        self._folders = {name: str(folder) for name, folder in named.items()}
        self._output = output
        self._out_dtype = out_dtype
        self._chosen: list[str] = []
        if output.exists():
            from cl_fast.errors import OutputError

            raise OutputError(f"{output} exists; remove it, or give another output")

    def alone(self, name: str) -> Path:
        return Path(self._folders[name])

    def taste(self, name: str, evaluate: Score) -> float:
        trial = self._output.with_name(f".{self._output.name}.trial")
        shutil.rmtree(trial, ignore_errors=True)
        try:
            _merge_folders([*self._chosen, self._folders[name]], trial, self._out_dtype, False)
            return evaluate(trial)
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def add(self, name: str) -> None:
        self._chosen.append(self._folders[name])

    def serve(self) -> dict[str, Any]:
        return {"path": _merge_folders(self._chosen, self._output, self._out_dtype)}


def _merge_folders(
    folders: Sequence[str], output: Path, out_dtype: torch.dtype | None, fsync: bool = True
) -> Path:
    from cl_fast.merging.engine import execute
    from cl_fast.merging.plan import make_plan
    from cl_fast.merging.recipe import parse_recipe

    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": folder, "parameters": {"weight": 1.0}} for folder in folders],
    }
    if out_dtype is not None:
        recipe["out_dtype"] = str(out_dtype).removeprefix("torch.")
    return execute(make_plan(parse_recipe(recipe), output), fsync=fsync).output


def _named(models: Candidates) -> dict[str, Any]:
    if isinstance(models, (str, os.PathLike, nn.Module)):
        raise TypeError(
            f"candidates must be a list or a mapping from names, got {type(models).__name__}"
        )
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
    else:
        listed = list(models)
        names = [str(number) for number in range(len(listed))]
        if listed and all(isinstance(model, (str, os.PathLike)) for model in listed):
            from cl_fast.merging.plan import term_names

            names = list(term_names([os.fspath(cast(Folder, model)) for model in listed]))
        named = dict(zip(names, listed, strict=True))
    if not named:
        raise ValueError("candidates must hold at least one model")
    return named


def _on_disk(named: Mapping[str, Any]) -> bool:
    kinds = {isinstance(model, (str, os.PathLike)) for model in named.values()}
    if len(kinds) > 1:
        raise TypeError("candidates must be all in memory or all checkpoint folders, not both")
    return kinds.pop()


def _needed(output: Folder | None) -> Path:
    if output is None:
        raise ValueError("output must be given for checkpoint folders: the folder to write")
    return Path(output)


def _number(name: str, score: Any) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise TypeError(
            f"evaluate must return a number, got {type(score).__name__} for {name!r}"
        ) from None
    if math.isnan(value):
        raise ValueError(
            f"evaluate returned NaN for {name!r}; a candidate without a score is left "
            "out by not passing it"
        )
    return value
