"""A patch: facts as low-rank factors, that go on a model, come off it, and are kept in a file.

    W = round(W0 + U V^T)     per edited layer; U [d, n], V [f, n], one column per fact or group
    U = T (K^T V + diag(ridge))^-1          of facts that share a key; V = C0^-1 K (MEMIT, Meng et
                                            al. 2023, eq. 14, in its dual form)

K are the keys, T what the update shall add to them, C0 what the model knew. With these stored, a
fact is taken out exactly: the columns that are left, refitted, are the fit without it. Two patches
that were fitted against one prior add up to their joint fit in the same way.

A patch is a value: `drop`, `upsert` and `+` make new ones. What it remembers of a model is which
one it is for, and while it is applied the untouched weights.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cl_fast._version import __version__
from cl_fast.checkpoints.patches import check_content, lay_out, read_patch
from cl_fast.checkpoints.safetensors import TensorInfo
from cl_fast.checkpoints.writing import write_whole
from cl_fast.editing.applying import (
    Application,
    How,
    Rounding,
    apply_factors,
    bare,
    check_bases,
    find_layers,
    undo_patches,
    weight_hash,
    write_factors,
)
from cl_fast.editing.facts import Fact, check_facts, fact_of, unknown_ids
from cl_fast.editing.lora import write_adapter
from cl_fast.editing.solver import refit
from cl_fast.errors import CheckpointError
from cl_fast.options import integer, one_of

__all__ = ["LayerPatch", "Patch", "undo_patches", "weight_hash"]


class Editor(Protocol):
    """What `upsert` needs: an editor that fits facts on top of a patch."""

    def fit(self, facts: Sequence[Fact], after: Patch | None = None) -> Patch: ...


@dataclass(frozen=True, eq=False)
class LayerPatch:
    """The factors of one edited layer, float64 on the CPU.

    Attributes:
        name: of the module; its weight is `name`.weight.
        transposed: the weight is [f, d] (GPT-2's Conv1D) and gets V U^T.
        base_hash: `weight_hash` of the weight that it was fitted on.
        U, V: [d, n] and [f, n].
        keys, targets: K [f, n] and T [d, n]; None in a slim patch.
    """

    name: str
    transposed: bool
    base_hash: str
    U: Tensor
    V: Tensor
    keys: Tensor | None = None
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.keys is None) != (self.targets is None):
            raise ValueError(f"layer {self.name!r}: keys and targets come together, or not at all")
        rows = {"U": None, "V": None, "keys": "V", "targets": "U"}
        for name, like in rows.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"{name} of layer {self.name!r} must be a tensor of a float type")
            value = value.detach().to("cpu", torch.float64)
            shape = (value.shape[0] if value.dim() else 0, self.U.shape[-1])
            if like is not None:
                shape = tuple(getattr(self, like).shape)
            if value.dim() != 2 or tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} of layer {self.name!r} must have the shape {shape}; got "
                    f"{tuple(value.shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} of layer {self.name!r} holds NaN or infinite values")
            object.__setattr__(self, name, value)

    @property
    def weight_name(self) -> str:
        """The parameter's name in the state dict."""
        return f"{self.name}.weight"

    @property
    def rank(self) -> int:
        return int(self.U.shape[1])

    @property
    def delta(self) -> Tensor:
        """U V^T as the weight has it, float64: [d, f], or [f, d] where it is transposed."""
        return self.V @ self.U.T if self.transposed else self.U @ self.V.T


@dataclass(slots=True)
class _Binding:
    """The model that a patch is for, and the patch on it."""

    model: nn.Module | None = None
    editor: Editor | None = None
    application: Application | None = None
    depth: int = 0
    rounding_error: dict[str, float] = field(default_factory=dict)

    @property
    def current(self) -> Application | None:
        """The patch on the model, unless it was undone: here, or by `undo_patches`."""
        application = self.application
        return application if application is not None and application.active else None


@dataclass(frozen=True, eq=False)
class Patch:
    """Facts as factors of a few weights.

        patch.apply(); patch.undo()
        with patch:
            model.generate(...)
        patch.drop(["f1"]).save("edits.safetensors")

    Attributes:
        layers: one `LayerPatch` for each edited matrix, in the order of the edit.
        columns: for each column the ids of its facts: several where they share a key. A fact has
            several columns where it is several keys (the tokens of MEND and MALMEN).
            Columns that belong to all facts together (fine-tuning) follow the one that names the
            facts, and name none, (); such a patch is not joint.
        ridge: [n], float64: what the solve adds for each column; 1 / weight, scaled.
        facts: every fact, by id.
        joint: all columns were fitted as one (with history); otherwise none can be taken out.
        priors: layer -> the prior's identity; only patches with the same priors add up.
        method, options: how it was fitted; plain values.
        report: what the editor tells of each fact and each layer; plain values.
    """

    layers: tuple[LayerPatch, ...]
    columns: tuple[tuple[str, ...], ...]
    ridge: Tensor
    facts: Mapping[str, Fact]
    joint: bool = True
    priors: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    _bound: _Binding = field(default_factory=_Binding, init=False, repr=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("layers", tuple(self.layers))
        put("columns", tuple(tuple(ids) for ids in self.columns))
        put("ridge", torch.as_tensor(self.ridge).detach().to("cpu", torch.float64).reshape(-1))
        put("facts", dict(self.facts))
        put("priors", dict(self.priors))
        if not self.layers:
            raise ValueError("a patch needs at least one layer")
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError(f"a layer is in the patch twice: {names}")
        count = len(self.columns)
        for layer in self.layers:
            if layer.rank != count:
                raise ValueError(
                    f"layer {layer.name!r} has {layer.rank} columns, the patch names {count}"
                )
            if (layer.keys is None) != (self.layers[0].keys is None):
                raise ValueError("keys and targets are held for all layers or for none")
        if self.ridge.numel() != count:
            raise ValueError(f"ridge must have one number for each of the {count} columns")
        if not bool((torch.isfinite(self.ridge) & (self.ridge >= 0)).all()):
            raise ValueError("ridge must be finite and 0 or more")
        told = {name for ids in self.columns for name in ids}
        if told != set(self.facts) or (self.joint and not all(self.columns)):
            raise ValueError("every fact must be in a column, and no column of a joint patch empty")

    # What it is.

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all facts, column by column."""
        return tuple(dict.fromkeys(name for ids in self.columns for name in ids))

    @property
    def rank(self) -> int:
        """The number of columns."""
        return len(self.columns)

    @property
    def slim(self) -> bool:
        """Whether keys and targets were left out, so that nothing can be refitted."""
        return self.layers[0].keys is None

    @property
    def applied(self) -> How | None:
        """How it is on a model now, or None."""
        application = self._bound.current
        return None if application is None else application.how

    @property
    def model(self) -> nn.Module | None:
        """The model that it is for, if it knows one."""
        return self._bound.model

    @property
    def rounding_error(self) -> dict[str, float]:
        """Layer -> ||rounded - exact|| / ||U V^T|| (Frobenius), while it is applied and after.

        Empty before the first `apply`. It is computed when asked for, and not known any more once
        the patch was undone without asking.
        """
        bound = self._bound
        application = bound.current
        if application is not None:
            bound.rounding_error = application.rounding_errors()
        return dict(bound.rounding_error)

    def __len__(self) -> int:
        return len(self.facts)

    def __contains__(self, fact: object) -> bool:
        return fact in self.facts

    def __repr__(self) -> str:
        facts = f"{len(self)} fact{'' if len(self) == 1 else 's'}"
        parts = [self.method or "patch", facts]
        names = [layer.name for layer in self.layers]
        where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        layers = f"{len(names)} layer{'' if len(names) == 1 else 's'} ({where})"
        parts += [f"rank {self.rank} in {layers}"]
        parts += ["slim"] if self.slim else []
        parts += [] if self.joint else ["not joint"]
        parts += [f"applied ({self.applied})"] if self.applied else []
        return f"Patch({', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is not applied and knows no model."""
        return {name: value for name, value in self.__dict__.items() if name != "_bound"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _bound=_Binding())

    # On a model, and off it.

    def bind(self, model: nn.Module, editor: Editor | None = None) -> Patch:
        """Tells it its model, and the editor that `upsert` uses. Returns the patch itself.

        Raises:
            ValueError: the model has not the layers that it edits, or it is applied to another.
        """
        if self._bound.current is not None and model is not self._bound.model:
            raise ValueError("the patch is applied to another model: undo it first")
        find_layers(model, self.layers)
        self._bound.model = model
        if editor is not None:
            self._bound.editor = editor
        return self

    def apply(
        self,
        model: nn.Module | None = None,
        how: How = "merge",
        *,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> Patch:
        """Puts it on a model. Returns the patch itself.

        Args:
            model: by default the one that it was fitted on, or bound to.
            how: "merge" writes round(W0 + U V^T) into the weights, which keep their identity, and
                keeps W0 for `undo`; "branch" leaves the weights and adds U (V^T x) to what the
                layers give, in float32 (float64 for float64 weights), until `undo`.
            rounding: of merge: "nearest" (ties to even), or "stochastic" for bfloat16 and float16.
            seed: of the random bits; layer i draws with seed + i.

        Raises:
            ValueError: there is no model; it is applied already; the model lacks a layer; a shape
                or the base differs; another patch is on a layer; rounding does not fit. Nothing
                was changed.
            NonFiniteError: the sum overflows the weight's dtype; all weights are as they were.
        """
        one_of("how", how, ("merge", "branch"))
        one_of("rounding", rounding, ("nearest", "stochastic"))
        integer("seed", seed)
        if how == "branch" and rounding != "nearest":
            raise ValueError("rounding='stochastic' has no effect with how='branch'; leave it out")
        bound = self._bound
        if bound.current is not None:
            raise ValueError(f"the patch is applied already ({self.applied}): undo it first")
        model = bound.model if model is None else model
        if model is None:
            raise ValueError("the patch knows no model yet: give it, patch.apply(model)")
        words = f"{self.method or 'patch'} of {len(self)} facts"
        bound.application = apply_factors(model, self.layers, words, how, rounding, seed)
        bound.model = model
        bound.rounding_error = {}
        return self

    def undo(self) -> Patch:
        """Takes it off: the edited weights are again what they were, bit for bit.

        Weights that were changed meanwhile are put back too, with a warning. `undo_patches(model)`
        does it where nobody holds the patch any more.

        Raises:
            ValueError: it is not applied, or a weight has another shape now.
        """
        application = self._bound.current
        if application is None:
            raise ValueError("the patch is not applied, so there is nothing to undo")
        application.undo()
        self._bound.application = None
        return self

    def __enter__(self) -> Patch:
        """Applies it, unless it is applied already; the end of the outermost block undoes it."""
        if self._bound.current is None:
            self.apply()
        self._bound.depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._bound.depth -= 1
        if self._bound.depth == 0 and self._bound.current is not None:
            self.undo()

    # Other patches from it.

    def drop(self, ids: Iterable[str]) -> Patch:
        """The patch without these facts: exactly the fit of the others.

        Without all of its facts it is an empty patch, which changes nothing.

        Args:
            ids: of the facts; facts that share a column go together.

        Raises:
            TypeError: `ids` is one string.
            ValueError: an id is unknown; a column would be torn apart; the patch is slim or was
                not fitted jointly.
        """
        gone = set(unknown_ids(ids, self.facts))
        self._check_refit("drop facts")
        kept = []
        for number, column in enumerate(self.columns):
            out = [name for name in column if name in gone]
            if out and len(out) < len(column):
                others = [name for name in column if name not in gone]
                raise ValueError(
                    f"{_listed(out)} and {_listed(others)} share one key (the same text up to the "
                    "subject) and were fitted as one value: drop all of them, and upsert those "
                    "that should stay"
                )
            if not out:
                kept.append(number)
        return self._columns(kept)

    def upsert(self, facts: Iterable[Fact], editor: Editor | None = None) -> Patch:
        """The patch with these facts new, or in the place of those with their ids or texts.

        It is `editor.fit(facts, after=patch.drop(old ones))`. Facts that share a key with one of
        these are fitted anew with it.

        Args:
            facts: new ones.
            editor: by default the one that made the patch.

        Raises:
            ValueError: there is no editor (a loaded patch knows none), or as `drop` and
                `editor.fit` do.
        """
        editor = editor or self._bound.editor
        if editor is None:
            raise ValueError(
                "the patch knows no editor (a loaded one never does): upsert(facts, editor=...)"
            )
        listed = check_facts(facts)
        ids, texts = {fact.id for fact in listed}, {fact.text for fact in listed}
        keys = {self._key_text(fact) for fact in listed}
        gone: list[str] = []
        again: list[Fact] = []
        for column in self.columns:
            held = [self.facts[name] for name in column]
            if not any(
                fact.id in ids or fact.text in texts or self._key_text(fact) in keys
                for fact in held
            ):
                continue
            gone += column
            again += [
                fact
                for fact in held
                if fact.id not in ids and fact.text not in texts and fact not in again
            ]
        rest = self.drop(gone) if gone else self
        return editor.fit([*listed, *again], after=rest)

    def __add__(self, other: object) -> Patch:
        """The joint fit of both: of patches on one base, against one prior, without common facts.

        Raises:
            ValueError: they do not fit together; the message names the layer or the facts.
        """
        if not isinstance(other, Patch):
            return NotImplemented
        self._check_refit("be added")
        other._check_refit("be added")
        theirs = {layer.name: layer for layer in other.layers}
        if [layer.name for layer in self.layers] != [layer.name for layer in other.layers]:
            raise ValueError(
                "only patches of the same layers, in one order, add up; these edit "
                f"{_listed(layer.name for layer in self.layers)} and {_listed(theirs)}"
            )
        for layer in self.layers:
            one, two = layer, theirs[layer.name]
            if one.base_hash != two.base_hash or one.U.shape[0] != two.U.shape[0]:
                raise ValueError(
                    f"the patches are for different bases: the weight of layer {layer.name!r} was "
                    f"{one.base_hash} for one and {two.base_hash} for the other"
                )
            if self.priors.get(one.name) != other.priors.get(one.name):
                raise ValueError(
                    f"the patches were fitted against different priors of layer {one.name!r}: fit "
                    "them with the same stats, weight and kind of prior"
                )
        self._check_apart(other)
        columns = self.columns + other.columns
        ridge = torch.cat([self.ridge, other.ridge])
        layers = []
        for one, two in zip(self.layers, other.layers, strict=True):
            keys = torch.cat([_held(one.keys), _held(two.keys)], 1)
            targets = torch.cat([_held(one.targets), _held(two.targets)], 1)
            v = torch.cat([one.V, two.V], 1)
            u = refit(v, keys, targets, ridge)
            layers.append(replace(one, U=u, V=v, keys=keys, targets=targets))
        same = self.options == other.options
        summed = replace(
            self,
            layers=tuple(layers),
            columns=columns,
            ridge=ridge,
            facts={**self.facts, **other.facts},
            method=self.method
            if self.method == other.method
            else f"{self.method or 'patch'} + {other.method or 'patch'}",
            options=self.options if same else {"sum_of": [dict(self.options), dict(other.options)]},
            report=_joined_reports(self.report, other.report),
        )
        summed._bound.model = self._bound.model or other._bound.model
        summed._bound.editor = self._bound.editor or other._bound.editor
        return summed

    def _check_refit(self, what: str) -> None:
        if self.slim and not self.joint:
            raise ValueError(
                f"this patch cannot {what}: its factors belong to all of its facts together "
                f"({self.method or 'no method told'}), and no part of them is the fit of some. Fit "
                "the facts that are wanted anew"
            )
        if self.slim:
            raise ValueError(
                f"a slim patch cannot {what}: its keys and targets were left out when it was "
                "saved; use the whole one"
            )
        if not self.joint:
            raise ValueError(
                f"this patch cannot {what}: its facts were fitted in several batches without "
                "history, so each batch stands on the weights that those before it left, and no "
                "part is the fit of its facts alone. Fit with history=True"
            )

    def _check_apart(self, other: Patch) -> None:
        common = [name for name in self.facts if name in other.facts]
        if common:
            raise ValueError(
                f"both patches hold {_listed(common)}: drop the facts from one of them first"
            )
        texts = {fact.text: fact for fact in self.facts.values()}
        keys = {self._key_text(fact): fact for fact in self.facts.values()}
        for fact in other.facts.values():
            twin = texts.get(fact.text)
            if twin is not None:
                words = "contradict each other" if twin.target != fact.target else "are the same"
                raise ValueError(
                    f"two facts {words}: {twin.id!r} ({twin.statement!r}) and {fact.id!r} "
                    f"({fact.statement!r}); drop one of them first"
                )
            twin = keys.get(other._key_text(fact))
            if twin is not None:
                raise ValueError(
                    f"{twin.id!r} and {fact.id!r} share one key (the same text up to the subject) "
                    "with a value each; one value must serve both: patch.upsert([...]) fits them "
                    "together"
                )

    def _key_text(self, fact: Fact) -> str:
        """What decides the key of a fact: all text up to the token that is looked up."""
        if self.options.get("lookup", "subject_last") in ("subject_last", "subject_first"):
            return fact.text[: fact.subject_span[1]]
        return fact.text

    def _columns(self, kept: Sequence[int]) -> Patch:
        """Some of the columns, refitted."""
        which = torch.tensor(kept, dtype=torch.long)
        columns = tuple(self.columns[number] for number in kept)
        ridge = self.ridge[which]
        facts = {name: self.facts[name] for ids in columns for name in ids}
        layers = []
        for layer in self.layers:
            keys, targets = _held(layer.keys)[:, which], _held(layer.targets)[:, which]
            v = layer.V[:, which]
            u = layer.U if len(kept) == self.rank else refit(v, keys, targets, ridge)
            layers.append(replace(layer, U=u, V=v, keys=keys, targets=targets))
        report = dict(self.report)
        if isinstance(report.get("facts"), Mapping):
            report["facts"] = {k: v for k, v in report["facts"].items() if k in facts}
        patch = replace(
            self, layers=tuple(layers), columns=columns, ridge=ridge, facts=facts, report=report
        )
        patch._bound.model, patch._bound.editor = self._bound.model, self._bound.editor
        return patch

    # As a model of its own.

    def state_dict(self, base: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base's tensors, but the edited weights with the patch on them, in float32.

        So it takes part in a merge in memory: `ties(base, [patch.state_dict(base), other], ...)`.
        The base is not changed; what the patch does not edit is the base's own tensor.

        Args:
            base: the model or the state dict that the patch was fitted on.

        Raises:
            ValueError: a weight is missing, of another shape, or not the one it was fitted on.
        """
        if isinstance(base, nn.Module):
            find_layers(base, self.layers)
            base = bare(base).state_dict()
        tensors = dict(base)
        weights = []
        for layer in self.layers:
            weight = tensors.get(layer.weight_name)
            if weight is None or not weight.is_floating_point():
                what = "lacks" if weight is None else f"holds as {weight.dtype}, quantised,"
                raise ValueError(f"the base {what} the tensor {layer.weight_name!r} to be edited")
            weights.append(weight.detach())
        check_bases(self.layers, weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            edited = torch.empty(weight.shape, dtype=wide, device=weight.device)
            write_factors(edited, weight, layer)
            tensors[layer.weight_name] = edited
        return tensors

    def to_peft(self, folder: str | os.PathLike[str], rank: int | None = None) -> dict[str, float]:
        """Writes it as a PEFT (LoRA) adapter, that `PeftModel.from_pretrained` loads.

        Args:
            folder: to make; must not exist, or be empty.
            rank: of the adapter; by default that of the patch. A smaller one is the nearest there
                is (truncated singular values).

        Returns:
            Layer -> relative error (Frobenius) of that truncation; 0 without one.

        Raises:
            ValueError: the patch is empty, or rank is below 1.
            OutputError: the folder is not empty, or cannot be written.
        """
        config = getattr(self._bound.model, "config", None)
        name = getattr(config, "_name_or_path", None) or None
        return write_adapter(folder, self.layers, rank, name)

    # In a file.

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: Literal["float32", "float64"] = "float32",
        *,
        slim: bool = False,
    ) -> None:
        """Writes it to a safetensors file, whole or not at all (docs/patches.md has the format).

        Args:
            path: ends in .safetensors.
            dtype: of the factors. float32 is what weights are edited with; float64 keeps what
                `drop` and `+` refit from to the last bit.
            slim: leave keys and targets out: half the size, but then nothing can be dropped,
                added or upserted any more.

        Raises:
            ValueError: another ending; report or options hold something else than plain values.
            OutputError: it cannot be written; what was there still is.
        """
        one_of("dtype", dtype, ("float32", "float64"))
        file = Path(path)
        if file.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors; got {os.fspath(path)!r}")
        slim = slim or self.slim
        number = torch.float32 if dtype == "float32" else torch.float64
        word = "F32" if dtype == "float32" else "F64"
        tensors: list[tuple[str, Tensor, torch.dtype, str]] = []
        if not slim:
            tensors.append(("ridge", self.ridge, torch.float64, "F64"))
        for layer in self.layers:
            parts = {"U": layer.U, "V": layer.V}
            if not slim:
                parts |= {"K": _held(layer.keys), "T": _held(layer.targets)}
            for name, value in parts.items():
                if dtype == "float32" and not bool(torch.isfinite(value.to(number)).all()):
                    raise ValueError(
                        f"{name} of layer {layer.name!r} is beyond float32: save it with "
                        "dtype='float64'"
                    )
                tensors.append((f"{layer.name}.{name}", value, number, word))

        def data() -> Iterator[memoryview]:
            for _, value, kind, _ in tensors:
                yield value.to(kind).contiguous().numpy().reshape(-1).view("u1").data

        hasher = hashlib.blake2b(digest_size=16)
        for part in data():
            hasher.update(part)
        header = lay_out(
            [(name, kind, tuple(value.shape)) for name, value, _, kind in tensors],
            {
                "cl_fast": __version__,
                "method": self.method,
                "joint": self.joint,
                "slim": slim,
                "layers": [
                    {
                        "name": layer.name,
                        "transposed": layer.transposed,
                        "base_hash": layer.base_hash,
                        "prior": self.priors.get(layer.name, ""),
                    }
                    for layer in self.layers
                ],
                "columns": self.columns,
                "facts": {name: fact.to_dict() for name, fact in self.facts.items()},
                "options": _plain("options", self.options),
                "report": _plain("report", self.report),
                "content": hasher.hexdigest(),
            },
        )

        def parts_of_file() -> Iterator[bytes | memoryview]:
            yield header
            yield from data()

        write_whole(file, parts_of_file())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        editor: Editor | None = None,
    ) -> Patch:
        """A patch from its file. Applied, it gives the bits that the saved one gave.

        Args:
            path: what `save` wrote.
            model: to bind it to.
            editor: for `upsert`.

        Raises:
            CheckpointError: the file is missing, truncated, damaged, no patch, of another version,
                or holds NaN.
            ValueError: the model has not its layers.
        """
        stored = read_patch(path)
        check_content(stored)
        try:
            facts = {
                name: fact_of({"id": name, **values}, f"fact {name!r}")
                for name, values in stored.facts.items()
            }
            layers = tuple(
                LayerPatch(
                    layer.name,
                    layer.transposed,
                    layer.base_hash,
                    _read(layer.u),
                    _read(layer.v),
                    None if layer.keys is None else _read(layer.keys),
                    None if layer.targets is None else _read(layer.targets),
                )
                for layer in stored.layers
            )
            ridge = torch.ones(len(stored.columns), dtype=torch.float64)
            patch = cls(
                layers=layers,
                columns=stored.columns,
                ridge=ridge if stored.ridge is None else _read(stored.ridge),
                facts=facts,
                joint=stored.joint,
                priors={layer.name: layer.prior for layer in stored.layers},
                method=stored.method,
                options=stored.options,
                report=stored.report,
            )
        except CheckpointError:
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{stored.path}: {error}; save the patch again") from error
        if editor is not None:
            patch._bound.editor = editor
        return patch if model is None else patch.bind(model)


def _read(info: TensorInfo) -> Tensor:
    """A tensor of a patch file, as float64."""
    with Path(info.path).open("rb") as file:
        file.seek(info.offset)
        data = bytearray(file.read(info.nbytes))
    dtype = torch.float32 if info.dtype == "F32" else torch.float64
    if not data:
        return torch.zeros(info.shape, dtype=torch.float64)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape).to(torch.float64)


def _held(value: Tensor | None) -> Tensor:
    assert value is not None  # slim patches never come here
    return value


def _listed(names: Iterable[str], most: int = 5) -> str:
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _joined_reports(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of single facts is told of all; what is told of the whole, of both parts."""
    facts: dict[str, Any] = {}
    for part in (one, two):
        if isinstance(part.get("facts"), Mapping):
            facts |= part["facts"]
    rest = [{k: v for k, v in part.items() if k != "facts"} for part in (one, two)]
    joined: dict[str, Any] = {"sum_of": rest} if any(rest) else {}
    return {**({"facts": facts} if facts else {}), **joined}


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it; numbers that JSON lacks become text.

    Raises:
        ValueError: something in it is no plain value.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{i}]", part) for i, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"{name} of the patch must be a plain value (text, numbers, lists, mappings); got "
        f"{type(value).__name__}"
    )
