"""What Fisher merging and RegMean know of a model: a safetensors file beside it.

    fisher    F in the shape of each parameter: the mean over groups of the squared gradient of the
              summed log likelihood,  F = 1/N sum_n (d/dtheta log p(y_n | x_n))^2
    gram      G = 1/N sum_n x_n x_n^T of the inputs of each linear layer, [in, in], under the name
              of its weight

The tensors are float32. The file's metadata tells ``format`` ("cl_fast.statistics"), ``version``,
``kind``, ``counts`` (JSON: name -> N), ``in_first`` (JSON: weights stored as [in, out]), ``group``
(of a Fisher) and ``crc64`` (JSON: name -> CRC-64 of the parameter's bytes as float32), by which a
merge refuses the statistics of another model. Reading a header needs no torch; collecting does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_fast.checkpoints.safetensors import Header, build_header, read_header
from cl_fast.checkpoints.writing import write_whole
from cl_fast.errors import CheckpointError, NonFiniteError, RecipeError
from cl_fast.merging.sources import Source
from cl_fast.options import one_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cl_fast.merging.recipe import Part

__all__ = ["Statistics", "collect_fisher", "collect_gram", "open_statistics", "write_statistics"]

Kind = Literal["fisher", "gram"]
FORMAT, VERSION = "cl_fast.statistics", "1"


@dataclass(frozen=True, slots=True)
class Statistics:
    """An opened file of statistics: where they are, and of which parameters."""

    header: Header
    kind: Kind
    in_first: frozenset[str]
    crcs: Mapping[str, int]

    def source(self, name: str, shape: tuple[int, ...]) -> Source | None:
        """The statistics of a tensor, ``None`` if there are none.

        Raises:
            CheckpointError: of another shape, or type.
        """
        info = self.header.tensors.get(name)
        if info is None:
            return None
        wanted = shape
        if self.kind == "gram":
            if len(shape) != 2:
                raise CheckpointError(
                    f"{info.path}: holds input moments of {name!r}, which is no matrix but "
                    f"{list(shape)}; collect them anew"
                )
            inputs = shape[0] if name in self.in_first else shape[1]
            wanted = (inputs, inputs)
        if info.shape != wanted or info.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(
                f"{info.path}: the {self.kind} of {name!r} is {info.dtype} of {list(info.shape)}; "
                f"it must be float32 of {list(wanted)}, as the model's tensor is"
            )
        return Source.of(info)


def open_statistics(path: str, kind: Kind, key: str) -> Statistics:
    """Read the header of a file of statistics.

    Raises:
        RecipeError: there is no such file. CheckpointError: it is not one of that kind.
    """
    if not Path(path).is_file():
        raise RecipeError(
            f"{key}: {path!r} is not a file; give the .safetensors file that collect_{kind} wrote"
        )
    header = read_header(path)
    said = header.metadata.get("format"), header.metadata.get("kind")
    if said != (FORMAT, kind):
        raise CheckpointError(
            f"{path}: is no file of {kind} statistics (format {said[0]!r}, kind {said[1]!r}); make "
            f"one with cl_fast.merging.statistics.collect_{kind}"
        )
    if header.metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has version {header.metadata.get('version')!r}, this version reads {VERSION}"
        )
    try:
        in_first = frozenset(json.loads(header.metadata.get("in_first", "[]")))
        crcs = {n: int(c, 16) for n, c in json.loads(header.metadata.get("crc64", "{}")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from None
    return Statistics(header, kind, in_first, crcs)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one tensor of every model: see :class:`~cl_fast.merging.rules.Whole`."""

    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    crcs: tuple[int | None, ...]
    in_first: bool


def open_all(part: Part, kind: str | None) -> tuple[Statistics, ...]:
    """The statistics of the models of a part, in order; none for a method without."""
    if kind is None:
        return ()
    return tuple(
        open_statistics(entry.file or "", "fisher" if kind == "fisher" else "gram", entry.key)
        for entry in part.entries
    )


def known_of(
    part: Part,
    opened: tuple[Statistics, ...],
    stored: Sequence[Mapping[str, str]],
    name: str,
    shape: tuple[int, ...],
) -> Known | None:
    """The statistics of a tensor; ``None`` where no model has them.

    Args:
        stored: for each model the names that its tensors have there, where it is another.

    Raises:
        CheckpointError: some of the models have them, or of another shape, or stored otherwise.
    """
    names = [renamed.get(name, name) for renamed in stored]
    found = [one.source(own, shape) for one, own in zip(opened, names, strict=False)]
    sources = tuple(source for source in found if source is not None)
    if not sources:
        return None
    if len(sources) < len(found):
        missing = opened[found.index(None)].header.path
        raise CheckpointError(
            f"{missing}: holds no statistics of {name!r}, which {sources[0].path} has; collect "
            "them for the same tensors of every model"
        )
    turned = {own in one.in_first for one, own in zip(opened, names, strict=False)}
    if len(turned) > 1:
        raise CheckpointError(
            f"{opened[0].header.path} and others disagree on whether {name!r} is stored as [in, "
            "out]; they are of different classes of models"
        )
    crcs = tuple(one.crcs.get(own) for one, own in zip(opened, names, strict=False))
    info = opened[0].header.tensors[names[0]]
    return Known(sources, info.shape, crcs, turned.pop())


def write_statistics(
    path: str | os.PathLike[str],
    kind: Kind,
    values: Mapping[str, Tensor],
    model: nn.Module | Mapping[str, Tensor],
    *,
    counts: Mapping[str, int],
    in_first: Iterable[str] = (),
    group: str = "",
) -> Path:
    """Write statistics that were collected otherwise, such as ``fisher_diagonal`` of training.

    Args:
        path: the .safetensors file to write.
        kind: ``fisher`` or ``gram``.
        values: name of a parameter -> its statistics, see the module.
        model: whose parameters they are; their bytes are hashed.
        counts: name -> how many groups or tokens they are of.
        in_first: names of matrices that the model stores as [in, out].
        group: over what a Fisher's gradients were summed before they were squared.

    Raises:
        ValueError: unknown kind, no values, or a name that the model has not.
        NonFiniteError: statistics with NaN or infinity.
        OutputError: the file cannot be written.
    """
    import torch

    from cl_fast.merging.checksum import crc64

    one_of("kind", kind, ("fisher", "gram"))
    if not values:
        raise ValueError("values must hold the statistics of at least one parameter")
    state = model if isinstance(model, Mapping) else dict(model.named_parameters())
    crcs, ready = {}, {}
    for name, value in values.items():
        if name not in state:
            raise ValueError(f"values: the model has no parameter {name!r}")
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"the {kind} of {name} holds NaN or infinite values")
        ready[name] = value.detach().to("cpu", torch.float32).contiguous()
        stored = state[name].detach().to("cpu", torch.float32).contiguous()
        stored = stored.reshape(-1).view(torch.uint8)
        crcs[name] = f"{crc64(stored.numpy().data):016x}"
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "counts": json.dumps({name: int(counts[name]) for name in ready}),
        "in_first": json.dumps(sorted(set(in_first) & ready.keys())),
        "crc64": json.dumps(crcs),
    }
    if group:
        metadata["group"] = group
    target = Path(path)
    head, _, _ = build_header(
        ((name, "F32", tuple(value.shape)) for name, value in ready.items()), metadata
    )
    parts = (value.reshape(-1).view(torch.uint8).numpy().data for value in ready.values())
    write_whole(target, [head, *parts])
    return target


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    log_likelihood: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    group: Literal["sequence", "batch"] = "sequence",
) -> Path:
    """The empirical Fisher diagonal of a model on labelled data, written to a file.

    One backward pass per group. ``group="sequence"`` squares the gradient of each row of a batch,
    as the paper does; ``"batch"`` squares that of a whole batch, which is as many times faster as a
    batch has rows and mixes them: it is another quantity, and the file says which one it holds.
    For causal language models ``cl_fast.training.fisher_diagonal`` can draw labels from the model
    itself; :func:`write_statistics` writes what it gives.

    Args:
        model: any module; it is put in eval mode, and what it was before is restored.
        batches: mappings of tensors with the rows first, on the model's device.
        log_likelihood: the summed log p of a batch's labels; by default ``-loss`` of
            ``model(**batch)``, times the number of labels that count (after a shift for models
            whose labels are tokens), since such losses are means.
        group: over what gradients are summed before they are squared.

    Raises:
        ValueError: unknown group, nothing requires grad, or no batch.
        NonFiniteError: a gradient is NaN or infinite.
    """
    import torch

    one_of("group", group, ("sequence", "batch"))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model requires grad: there is no Fisher")
    likelihood = log_likelihood or _by_loss
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    before = {name: p.grad for name, p in named.items()}
    training, groups = model.training, 0
    model.eval()
    try:
        for batch in batches:
            for part in _rows(batch) if group == "sequence" else [batch]:
                for p in named.values():
                    p.grad = None
                with torch.enable_grad():
                    likelihood(model, part).backward()
                groups += 1
                for name, p in named.items():
                    if p.grad is not None:
                        sums[name].addcmul_(p.grad.double(), p.grad.double())
    finally:
        model.train(training)
        for name, p in named.items():
            p.grad = before[name]
    if not groups:
        raise ValueError("batches is empty: there is nothing to collect")
    for value in sums.values():
        value /= groups
    counts = dict.fromkeys(sums, groups)
    return write_statistics(path, "fisher", sums, model, counts=counts, group=group)


def collect_gram(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    names: Callable[[str], bool] | None = None,
) -> Path:
    """Second moments of the inputs of linear layers, ``E[x x^T]`` per token, written to a file.

    One forward pass per batch. Where a batch has an ``attention_mask``, inputs with its [rows,
    tokens] in front leave out what it masks.

    Args:
        model: any module with ``nn.Linear`` or transformers' ``Conv1D`` layers.
        batches: mappings that ``model(**batch)`` takes.
        names: which layers, by name; by default all. A layer takes 8 in^2 bytes meanwhile.

    Raises:
        ValueError: no such layer, or no batch.
        NonFiniteError: an input is NaN or infinite.
    """
    import torch
    from torch import nn

    layers = {}
    for name, module in model.named_modules():
        linear, conv = isinstance(module, nn.Linear), type(module).__name__ == "Conv1D"
        if (linear or conv) and (names is None or names(name)):
            layers[f"{name}.weight" if name else "weight"] = (module, conv)
    if not layers:
        raise ValueError("the model has no linear layer of those names: nothing to collect")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            kept = mask[0]
            if kept is not None and x.shape[:-1] == kept.shape:
                x = x[kept]
            wide = x.reshape(-1, x.shape[-1]).float()
            product = (wide.t() @ wide).double()
            sums[name] = sums[name] + product if name in sums else product
            counts[name] = counts.get(name, 0) + len(wide)

        return hook

    hooks = [m.register_forward_pre_hook(watch(name)) for name, (m, _) in layers.items()]
    training, seen = model.training, False
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                seen = True
                given = batch.get("attention_mask")
                mask[0] = given.bool() if given is not None and given.ndim == 2 else None
                model(**batch)
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    if not seen:
        raise ValueError("batches is empty: there is nothing to collect")
    for name, value in sums.items():
        value /= max(1, counts[name])
    in_first = [name for name, (_, conv) in layers.items() if conv]
    return write_statistics(path, "gram", sums, model, counts=counts, in_first=in_first)


def _rows(batch: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Each row of a batch as a batch of one."""
    import torch

    sizes = {v.size(0) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim}
    if len(sizes) != 1:
        raise ValueError(
            f"batches: the tensors of a batch must have equally many rows; got {sorted(sizes)}"
        )
    for i in range(sizes.pop()):
        yield {
            k: v[i : i + 1] if isinstance(v, torch.Tensor) and v.ndim else v
            for k, v in batch.items()
        }


def _by_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    output = model(**batch)
    loss: Tensor | None = getattr(output, "loss", None)
    labels = batch.get("labels")
    if loss is None or labels is None:
        raise ValueError(
            "model(**batch) gives no loss, or the batch has no 'labels'; give log_likelihood"
        )
    counted = labels
    # A causal model predicts the next token: its first label counts for nothing.
    if labels.ndim == 2 and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        counted = labels[:, 1:]
    return -loss * (counted != -100).sum()
