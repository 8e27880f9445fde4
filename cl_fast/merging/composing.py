"""LoRA adapters composed among themselves, without their base.

With D_k = s_k B_k A_k and weights w_k, for each module:

    cat             sum_k w_k D_k, exactly: factors side by side, rank sum_k r_k
    linear          the same sum, as `cat` has it
    svd             the best approximation of the same sum with a given rank or energy
    ties, dare_...  the merge method over the D_k, then the best approximation
    linear_factors  (sum_k sqrt(w_k s_k) B_k) (sum_k sqrt(w_k s_k) A_k): PEFT's "linear"

`linear_factors` is not the sum: it adds the cross terms sqrt(w_i s_i w_j s_j) B_i A_j of adapters
that have nothing to do with each other, which is why "linear" means the sum itself here.
Everything tells its error |exact - B A|_F, module by module.

`svd` works on the factors (see `factors`); methods that look at single elements, as ties and dare,
need each D_k whole, one module at a time. The random masks are those of a merge with the base:
keyed by seed, name of the adapter, and name of the weight.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_fast import options
from cl_fast.checkpoints.adapters import AdaptedModule, AdapterFile, read_adapter
from cl_fast.checkpoints.safetensors import TensorInfo
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError, RecipeError
from cl_fast.merging.checksum import crc64_of_file
from cl_fast.merging.factors import (
    DTYPES,
    AdapterWriter,
    Rank,
    Svd,
    frobenius,
    layer_by_layer,
    product_error,
    torch_read,
    truncate,
    truncate_product,
)
from cl_fast.merging.inputs import resolve
from cl_fast.merging.methods import suggest
from cl_fast.merging.plan import term_names

__all__ = ["Composition", "ModuleError", "composing_methods", "merge_adapters"]

_FACTOR_METHODS = ("cat", "linear", "svd", "linear_factors")
_WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class ModuleError:
    """What became of one module: |D|_F of what was to be written, |D - B A|_F of what was."""

    name: str
    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """error / norm, 0 where both are."""
        return self.error / self.norm if self.norm else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"relative": self.relative}


@dataclass(frozen=True, slots=True)
class Composition:
    """A written adapter.

    Attributes:
        path: its folder.
        method: how it was made.
        modules: each with its rank and error.
        copied: whole tensors that one of the adapters brought.
        notes: sentences that the user should be told.
    """

    path: Path
    method: str
    modules: tuple[ModuleError, ...]
    copied: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def relative(self) -> float:
        """|D - B A|_F / |D|_F over all modules."""
        norm = math.hypot(*(module.norm for module in self.modules))
        return math.hypot(*(module.error for module in self.modules)) / norm if norm else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "method": self.method,
            "relative_error": self.relative,
            "modules": [module.to_json() for module in self.modules],
            "copied": list(self.copied),
            "notes": list(self.notes),
        }


def composing_methods() -> tuple[str, ...]:
    """Names that `merge_adapters` takes as a method."""
    return (*_FACTOR_METHODS, *sorted(_elementwise()))


def _elementwise() -> dict[str, Any]:
    """The functions of merge methods that work on deltas, by name."""
    from cl_fast.merging import state_dicts
    from cl_fast.merging.methods import METHODS

    return {
        name: getattr(state_dicts, name)
        for name, method in METHODS.items()
        if method.needs_base and name != "task_arithmetic" and hasattr(state_dicts, name)
    }


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | float = 1.0,
    method: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    density: Sequence[float] | float | None = None,
    seed: int = 0,
    svd: Svd = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    **parameters: Any,
) -> Composition:
    """Writes one adapter that is made of several, module by module.

    Args:
        adapters: folders of PEFT adapters of one base. A module that some of them lack is 0 there.
        output: the folder to make.
        weights: w_k: one for all, or one for each.
        method: see `composing_methods`; PEFT's names with `_svd` are understood.
        rank: of the result, for `svd` and the methods of elements; the default is the largest of
            the adapters' (as in PEFT).
        energy: instead of a rank: as few directions as hold this part of |D|_F^2 in each module,
            at most `max_rank`.
        density: of ties and dare: one for all, or one for each.
        seed: of the random masks.
        svd: "exact" or "randomized", where a module must be multiplied out; "auto" takes the latter
            where the rank is below an eighth of the sides.
        dtype: of the factors: "float32", "bfloat16" or "float16"; the default is the widest type
            among the adapters' factors, float32 at most.
        threads: modules that are worked on at the same time; None: the cores of this process.
        overwrite: replace an existing output once the new one is complete.
        parameters: further keywords of the merge method: lam, normalize, variant, ...

    Returns:
        the path, and what the result is off by.

    Raises:
        CheckpointError: an adapter is damaged or of a kind that is not understood, or they do not
            fit one another; the message names the module.
        RecipeError: a setting is unknown or has no effect.
        NonFiniteError: a factor holds NaN or infinity, or the result overflows its type.
        OutputError: the output exists or cannot be written.
        ValueError: an argument is out of its range.
    """
    paths = [os.fspath(path) for path in adapters]
    if not paths:
        raise ValueError("adapters must name at least one folder")
    method = method.removesuffix("_svd") if method.endswith("_svd") else method
    _check_method(method)
    opened = [read_adapter(resolve(path)) for path in paths]
    names = list(term_names(paths))
    factors = _per_adapter("weights", weights, len(paths))
    kept = None if density is None else _per_adapter("density", density, len(paths))
    wanted = _rank(method, opened, rank, energy, max_rank)
    options.one_of("svd", svd, ("auto", "exact", "randomized"))
    merge = _merge_function(method, names, factors, kept, seed, parameters)
    out_dtype = _dtype(opened, dtype)
    notes: list[str] = []
    modules = _common(opened, notes)
    copied = _copied(opened)
    if copied and set(factors) != {1.0}:
        notes.append(
            f"{len(copied)} whole tensors (modules_to_save) are copied as they are: weights have "
            "no effect on them"
        )
    _check_output(output, opened)

    def work(name: str) -> tuple[str, Tensor, Tensor, float, float]:
        parts = [
            (k, adapter.modules[name], factors[k])
            for k, adapter in enumerate(opened)
            if name in adapter.modules
        ]
        b, a, norm, error = _compose(method, name, parts, wanted, svd, seed, merge, opened)
        low_b, low_a = b.to(out_dtype), a.to(out_dtype)
        if not bool(torch.isfinite(low_b).all() and torch.isfinite(low_a).all()):
            raise NonFiniteError(
                f"{name}: the composed factors overflow {out_dtype}; choose dtype='float32'"
            )
        return name, low_b, low_a, norm, error(low_b, low_a)

    told = []
    with AdapterWriter(output, overwrite=overwrite) as writer:
        for name, b, a, norm, error in layer_by_layer(modules, work, threads):
            module = modules[name]
            first, second = (
                ("lora_embedding_A", "lora_embedding_B")
                if module.embedding
                else ("lora_A.weight", "lora_B.weight")
            )
            writer.add(f"{name}.{first}", a)
            writer.add(f"{name}.{second}", b)
            told.append(ModuleError(name, a.shape[0], norm, error))
        for name, info in copied.items():
            writer.copy(name, info)
        said = {"method": method, "adapters": names, "weights": factors, "seed": seed}
        ranks = {module.name: module.rank for module in told}
        if rank is not None and max(ranks.values()) < rank:
            notes.append(f"rank: {rank} asked, {max(ranks.values())} suffice")
        writer.finish(_config(opened, ranks), {"cl_fast.made": said})
    return Composition(writer.path, method, tuple(told), tuple(copied), tuple(notes))


def _check_method(method: str) -> None:
    known = composing_methods()
    if method not in known:
        hint = suggest(method, known)
        raise RecipeError(f"method: unknown {method!r}{hint}; there are {', '.join(known)}")


def _per_adapter(name: str, value: Sequence[float] | float, count: int) -> list[float]:
    listed = list(value) if isinstance(value, Sequence) else [value] * count
    if len(listed) != count:
        raise ValueError(f"{name} must be one number for each adapter, {count}; got {len(listed)}")
    for number in listed:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be numbers; got {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite; got {number}")
    return [float(number) for number in listed]


def _rank(
    method: str,
    opened: Sequence[AdapterFile],
    rank: int | None,
    energy: float | None,
    most: int | None,
) -> Rank:
    if method in ("cat", "linear", "linear_factors"):
        for name, value in (("rank", rank), ("energy", energy), ("max_rank", most)):
            if value is not None:
                raise RecipeError(
                    f"{name}: has no effect with method {method!r}, whose rank follows from the "
                    "adapters; use svd"
                )
    if rank is None and energy is None:
        if most is not None:
            raise RecipeError("max_rank: has no effect without energy; give rank instead")
        rank = max(adapter.ranks[-1] for adapter in opened)
    return Rank(rank, energy, most)


def _merge_function(
    method: str,
    names: Sequence[str],
    weights: Sequence[float],
    density: Sequence[float] | None,
    seed: int,
    parameters: Mapping[str, Any],
) -> Any:
    """deltas of a module by adapter -> the merged one; None for what works on factors."""
    if method in _FACTOR_METHODS:
        for name in [*parameters, *([] if density is None else ["density"])]:
            raise RecipeError(f"{name}: has no effect with method {method!r}; remove it")
        return None
    function = _elementwise()[method]
    accepted = inspect.signature(function).parameters
    for name in parameters:
        if name not in accepted or name in ("base", "models", "weight", "out_dtype", "into", "nan"):
            raise RecipeError(f"{name}: method {method!r} has no such parameter")
    given = dict(parameters)
    if "density" in accepted:
        if density is None:
            raise RecipeError(f"density: must be given with method {method!r}")
        for number in density:
            if not 0 < number <= 1:
                raise ValueError(f"density must be in (0, 1]; got {number}")
    elif density is not None:
        raise RecipeError(f"density: has no effect with method {method!r}; remove it")
    if "seed" in accepted:
        given["seed"] = seed
    if "weight" in accepted:
        given["weight"] = list(weights)
    elif set(weights) != {1.0}:
        raise RecipeError(f"weights: have no effect with method {method!r}; leave them at 1")

    def merge(weight_name: str, deltas: Mapping[int, Tensor]) -> Tensor:
        some = next(iter(deltas.values()))
        zero = torch.zeros_like(some)
        if "weight" not in accepted and len(deltas) < len(names):
            raise CheckpointError(
                f"{weight_name}: {len(names) - len(deltas)} of the adapters have no such module, "
                f"which method {method!r} cannot take for 0; use svd, ties or dare"
            )
        models = {name: {weight_name: deltas.get(k, zero)} for k, name in enumerate(names)}
        more = dict(given) | ({"density": list(density)} if density is not None else {})
        merged: Tensor = function({weight_name: zero}, models, out_dtype=torch.float32, **more)[
            weight_name
        ]
        return merged

    # What the method itself says against the parameters comes before any work.
    merge("check", {k: torch.eye(2) + k for k in range(len(names))})
    return merge


def _compose(
    method: str,
    name: str,
    parts: Sequence[tuple[int, AdaptedModule, float]],
    rank: Rank,
    svd: Svd,
    seed: int,
    merge: Any,
    opened: Sequence[AdapterFile],
) -> tuple[Tensor, Tensor, float, Any]:
    """B and A, |D|_F, and a function of the stored factors that measures their error."""
    loaded = []
    for k, module, weight in parts:
        a, b = torch_read(module.a).double(), torch_read(module.b).double()
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise NonFiniteError(
                f"{opened[k].header.path}: the factors of {name} hold NaN or infinity; repair the "
                "adapter"
            )
        loaded.append((k, b, a, module.scale, weight * module.scale))
    if merge is not None:
        flip = parts[0][1].embedding or any(opened[k].fan_in_fan_out for k, *_ in parts)
        deltas = {}
        for k, b, a, scale, _ in loaded:
            delta = (scale * (b @ a)).float()
            deltas[k] = delta.t().contiguous() if flip else delta
        merged = merge(parts[0][1].weight_name, deltas)
        merged = merged.t() if flip else merged
        b, a = truncate(merged, rank, svd, seed=seed, name=name)

        def measured(low_b: Tensor, low_a: Tensor) -> float:
            return frobenius(merged.double() - low_b.double() @ low_a.double())

        return b, a, frobenius(merged), measured
    exact_b = torch.cat([b for _, b, *_ in loaded], 1)
    exact_a = torch.cat([a * factor for _, _, a, _, factor in loaded], 0)
    if method == "svd":
        b, a = truncate_product(exact_b, exact_a, rank)
    elif method == "linear_factors":
        sizes = {x.shape[0] for _, _, x, _, _ in loaded}
        if len(sizes) > 1:
            raise CheckpointError(
                f"{name}: the adapters have the ranks {sorted(sizes)}; linear_factors adds "
                "factors of one rank, use cat or svd"
            )
        roots = [math.sqrt(abs(factor)) for *_, factor in loaded]
        signs = [math.copysign(1.0, factor) for *_, factor in loaded]
        b = torch.stack([root * x for root, (_, x, *_) in zip(roots, loaded, strict=True)]).sum(0)
        rows = [
            sign * root * x for sign, root, (_, _, x, *_) in zip(signs, roots, loaded, strict=True)
        ]
        a = torch.stack(rows).sum(0)
    else:
        b, a = exact_b, exact_a

    def error(low_b: Tensor, low_a: Tensor) -> float:
        return product_error(exact_b, exact_a, low_b, low_a)

    return b, a, product_error(exact_b, exact_a), error


def _common(opened: Sequence[AdapterFile], notes: list[str]) -> dict[str, AdaptedModule]:
    """Every module that one of the adapters has. Raises where they are for other bases."""
    modules: dict[str, tuple[AdapterFile, AdaptedModule]] = {}
    for adapter in opened:
        if any(module.bias is not None for module in adapter.modules.values()):
            raise CheckpointError(
                f"{adapter.path}: has biases beside its factors (lora_bias); give the adapters as "
                "models of a merge with their base instead"
            )
        if adapter.config.get("bias") not in (None, "none"):
            raise CheckpointError(
                f"{adapter.path}: has trained biases (bias: {adapter.config['bias']}), which only "
                "a merge with the base can combine; give the adapters as models of one"
            )
        for name, module in adapter.modules.items():
            first, known = modules.setdefault(name, (adapter, module))
            if known.size != module.size or known.embedding != module.embedding:
                raise CheckpointError(
                    f"{adapter.path} adapts {name} as {list(module.size)}, {first.path} as "
                    f"{list(known.size)}: they are for different bases"
                )
    bases = sorted({adapter.base_name for adapter in opened if adapter.base_name is not None})
    if len(bases) > 1:
        notes.append(
            f"the adapters name different bases ({', '.join(bases)}); their shapes fit one another"
        )
    targets = {frozenset(adapter.modules) for adapter in opened}
    if len(targets) > 1:
        notes.append("the adapters have different modules; where one has none it counts as 0")
    return {name: module for name, (_, module) in modules.items()}


def _copied(opened: Sequence[AdapterFile]) -> dict[str, TensorInfo]:
    """Whole tensors: of modules_to_save, and embeddings beside their factors."""
    found: dict[str, tuple[AdapterFile, TensorInfo]] = {}
    for adapter in opened:
        own = dict(adapter.saved)
        for module in adapter.modules.values():
            if module.weight is not None:
                own[f"{module.name}.base_layer.weight"] = module.weight
        for name, info in own.items():
            first, known = found.setdefault(name, (adapter, info))
            if known is info:
                continue
            same = (known.dtype, known.shape) == (info.dtype, info.shape) and _crc(known) == _crc(
                info
            )
            if not same:
                raise CheckpointError(
                    f"{first.path} and {adapter.path} both bring their own {name!r}, and they "
                    "differ (modules_to_save); only a merge with the base can combine them: give "
                    "the adapters as models of one"
                )
    return {name: info for name, (_, info) in found.items()}


def _crc(info: TensorInfo) -> int:
    return crc64_of_file(info.path, info.offset, info.nbytes)


def _check_output(output: str | os.PathLike[str], opened: Sequence[AdapterFile]) -> None:
    target = Path(output).resolve()
    for adapter in opened:
        folder = adapter.path.resolve()
        if target == folder or target in folder.parents or folder in target.parents:
            raise OutputError(
                f"{output}: the output touches the adapter {adapter.path}; choose another folder"
            )


def _dtype(opened: Sequence[AdapterFile], asked: str | None) -> torch.dtype:
    if asked is not None:
        options.one_of("dtype", asked, DTYPES)
        return DTYPES[asked]
    found = {x.a.dtype for adapter in opened for x in adapter.modules.values()}
    if found == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if found == {"F16"} else torch.float32


_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _config(opened: Sequence[AdapterFile], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The config of the result: scale 1, and the modules of all."""
    first = opened[0].config
    kept = {
        key: first.get(key)
        for key in ("task_type", "base_model_name_or_path", "revision", "auto_mapping")
    }
    selections = {repr([_plain(x.config.get(key)) for key in _SELECTION]) for x in opened}
    selection: dict[str, Any] = {key: first.get(key) for key in _SELECTION}
    if len(selections) > 1:
        selection = dict.fromkeys(_SELECTION) | {"target_modules": sorted(ranks)}
    saved = sorted({name for x in opened for name in x.config.get("modules_to_save") or ()})
    return (
        kept
        | selection
        | rank_settings(ranks)
        | {
            "fan_in_fan_out": any(adapter.fan_in_fan_out for adapter in opened),
            "modules_to_save": saved or None,
        }
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Settings of a plain LoRA of scale 1 with these ranks of modules."""
    counts = list(ranks.values())
    usual = max(sorted(set(counts)), key=counts.count)
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "lora_bias": False,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
