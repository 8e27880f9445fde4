"""Adapters after each block, one set per task; and which task an input is of, by perplexity.

    adapter:    x + W_up phi(W_down LN(x) + b_down) + b_up                bottleneck b << width
    task(x):    argmin_t  CE_t(x)           the mean cross-entropy of the input's own tokens under
                                            the adapters of task t; perplexity = exp(CE)

Bottleneck adapters are those of Houlsby et al. 2019 (arXiv 1902.00751). AdapterCL (Madotto et al.
2021, arXiv 2012.15504) has one after each block, trains one set per task with all else frozen, so
that no task can be forgotten, and picks the set by the perplexity of the input. There the adapter
begins at random; here W_up and b_up begin at 0, and the model with them is the model without.

    add_adapters(model, "news")                   into the blocks of a model of transformers
    train_adapter(model, "news")                  all else is frozen
    use_adapter(model, ["news", None, "law"])     one name, or one for each row of the batch
    identify_task(model, batch).names             one pass over tasks x rows, no logits
    save_adapter, load_adapter                    its weights alone, held to their base
    AdapterPerTask()                              the same as a keep, task by task

An adapter is a module of its block (`block.task_adapters`) and is called by a hook of it, so the
model keeps its class, its names, its cache, checkpointing of activations and `generate`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_fast.errors import CheckpointError, NonFiniteError
from cl_fast.models.blocks import blocks_of, text_config
from cl_fast.models.heads import IGNORED, Evaluating, unwrap
from cl_fast.ops import stream_key
from cl_fast.options import at_least, dtype_name, integer, one_of
from cl_fast.training.keeping import Keep, Task
from cl_fast.training.tokens import batch_logprobs, on_device_of

__all__ = [
    "ACTIVATIONS",
    "Adapter",
    "AdapterPerTask",
    "Identified",
    "adapter_names",
    "adapter_state_dict",
    "add_adapters",
    "blocks_of",
    "identify_task",
    "load_adapter",
    "remove_adapters",
    "save_adapter",
    "train_adapter",
    "use_adapter",
    "using_adapter",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}

_PLACE = "task_adapters"
_FORMAT = "cl_fast adapter 1"
_SAMPLES = 32
"""Numbers of each block by which a base is known again."""


class Adapter(nn.Module):  # type: ignore[misc, unused-ignore]
    """x + W_up phi(W_down LN(x) + b_down) + b_up, in the dtype of its weights; one rounding to x's.

    Args:
        width: of x.
        bottleneck: rows of W_down.
        activation: phi, a key of `ACTIVATIONS`.
        generator: of W_down, uniform in +-width^-0.5 as nn.Linear has it; W_up and b_up are 0.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        activation: str = "relu",
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"device": device or torch.device("cpu"), "dtype": dtype}
        self.activation = activation
        self.norm = nn.LayerNorm(width, **given)
        self.down = nn.utils.skip_init(nn.Linear, width, bottleneck, **given)
        self.up = nn.utils.skip_init(nn.Linear, bottleneck, width, **given)
        bound = width**-0.5
        with torch.no_grad():
            for p in (self.down.weight, self.down.bias):
                drawn = torch.rand(p.shape, generator=generator, dtype=torch.float32)
                p.copy_(drawn.mul_(2 * bound).sub_(bound))
            self.up.weight.zero_()
            self.up.bias.zero_()

    @property
    def bottleneck(self) -> int:
        return int(self.down.weight.size(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.to(self.norm.weight.dtype))
        h = self.up(ACTIVATIONS[self.activation](self.down(h)))
        return (x + h).to(x.dtype)


class _Route:
    """Which adapter a batch takes; the banks of a model share one."""

    def __init__(self) -> None:
        self.chosen: str | tuple[str | None, ...] | None = None
        self.groups: list[tuple[str | None, list[int]]] = []
        self.sorted = True
        self.back: Tensor | None = None

    def choose(self, chosen: str | tuple[str | None, ...] | None) -> None:
        self.chosen, self.back = chosen, None
        rows: dict[str | None, list[int]] = {}
        for i, name in enumerate(chosen if isinstance(chosen, tuple) else ()):
            rows.setdefault(name, []).append(i)
        self.groups = list(rows.items())
        order = [i for _, group in self.groups for i in group]
        self.sorted = order == list(range(len(order)))
        if not self.sorted:
            self.back = torch.tensor(order).argsort()


class _Bank(nn.Module):  # type: ignore[misc, unused-ignore]
    """The adapters of one block."""

    def __init__(self, route: _Route) -> None:
        super().__init__()
        self.route = route
        self.of = nn.ModuleDict()

    def has(self, name: str) -> bool:
        return _key(name) in self.of

    def get(self, name: str) -> Adapter:
        return cast(Adapter, self.of[_key(name)])

    def _one(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else cast(Tensor, self.get(name)(x))

    def forward(self, x: Tensor) -> Tensor:
        route = self.route
        if not isinstance(route.chosen, tuple):
            return self._one(route.chosen, x)
        if x.size(0) != len(route.chosen):
            raise ValueError(
                f"use_adapter was given {len(route.chosen)} names, one for each row, and the batch "
                f"has {x.size(0)} rows: give as many names (with beams or several answers, each "
                "name as often as its row)"
            )
        if route.sorted:  # rows of one adapter lie side by side
            parts = x.split([len(rows) for _, rows in route.groups])
        else:
            parts = tuple(x[torch.tensor(rows, device=x.device)] for _, rows in route.groups)
        out = [self._one(name, part) for (name, _), part in zip(route.groups, parts, strict=True)]
        if len(out) == 1:
            return out[0]
        joined = torch.cat(out)
        if route.sorted:
            return joined
        assert route.back is not None
        route.back = route.back.to(x.device)
        return joined[route.back]


def _key(name: str) -> str:
    # A module's name has no dots, and must not be a method of ModuleDict.
    return "task_" + name.replace("%", "%25").replace(".", "%2E")


def _name(key: str) -> str:
    return key.removeprefix("task_").replace("%2E", ".").replace("%25", "%")


def _after_block(block: nn.Module, _: Any, output: Any) -> Any:
    bank = getattr(block, _PLACE)
    if isinstance(output, Tensor):
        return bank(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (bank(output[0]), *output[1:])
    raise TypeError(
        f"{type(block).__name__} gives a {type(output).__name__}; hidden states, or a tuple that "
        "begins with them, are understood"
    )


# --- into a model ------------------------------------------------------------------------------


def _banks(model: nn.Module) -> list[_Bank]:
    return [m for m in unwrap(model).modules() if isinstance(m, _Bank)]


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that were added to `model`, in that order."""
    banks = _banks(model)
    return [_name(key) for key in banks[0].of] if banks else []


def _known(model: nn.Module, names: Iterable[str | None]) -> list[_Bank]:
    known = adapter_names(model)
    for name in names:
        if name is not None and name not in known:
            raise ValueError(
                f"the model has no adapter {name!r}; "
                + (f"it has {known}" if known else "none was added: see add_adapters")
            )
    return _banks(model)


def _names(names: str | Iterable[str]) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a name of an adapter must be a string that is not empty: {name!r}")
    if len(set(listed)) != len(listed):
        raise ValueError(f"names must differ from one another; got {listed}")
    return listed


def add_adapters(
    model: nn.Module,
    names: str | Iterable[str],
    *,
    bottleneck: int = 64,
    activation: str = "relu",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """One adapter after each block of `model`, for each name. Which one works, `use_adapter` tells.

    They change nothing yet: their output begins at 0. Their numbers follow from seed, name and
    block alone, so all ranks get the same.

    Args:
        model: a causal language model of transformers; also of PEFT, or within DDP.
        names: one, or several.
        bottleneck: b; 2 b width + b + 3 width numbers per block.
        activation: "relu", "gelu", "silu" or "tanh".
        dtype: of the adapters, in which they also compute outside of autocast; by default float32
            (float64 where the block is).

    Raises:
        ValueError: a name that is there already; an unknown activation; blocks that cannot be told,
            or are sharded already (add adapters before fully_shard).
    """
    listed = _names(names)
    _check_options(bottleneck, activation, seed, dtype)
    there = adapter_names(model)
    for name in listed:
        if name in there:
            raise ValueError(f"the model has an adapter {name!r} already; it has {there}")
    blocks = blocks_of(model)
    width = int(text_config(unwrap(model)).hidden_size)
    if any(isinstance(p, DTensor) for p in blocks[0].parameters()):
        raise ValueError("the blocks are sharded already: add adapters before fully_shard")
    banks = _banks(model)
    route = banks[0].route if banks else _Route()
    for i, block in enumerate(blocks):
        like = _like(block)
        if not banks:
            block.add_module(_PLACE, _Bank(route))
            block.register_forward_hook(_after_block)
        bank = cast(_Bank, getattr(block, _PLACE))
        for name in listed:
            key = stream_key(seed, name, f"block {i}")
            bank.of[_key(name)] = Adapter(
                width,
                bottleneck,
                activation=activation,
                generator=torch.Generator().manual_seed(key),
                device=like.device,
                dtype=dtype or torch.promote_types(like.dtype, torch.float32),
            )


def _check_options(bottleneck: int, activation: str, seed: int, dtype: torch.dtype | None) -> None:
    at_least("bottleneck", bottleneck, 1)
    one_of("activation", activation, ACTIVATIONS)
    integer("seed", seed)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one; got {dtype}")


def _like(block: nn.Module) -> Tensor:
    """A parameter of the block that tells its device and precision."""
    own = [p for n, p in block.named_parameters() if not n.startswith(f"{_PLACE}.")]
    dense = [p for p in own if p.dtype.is_floating_point and p.dtype.itemsize > 1]
    if not dense:
        raise ValueError(f"{type(block).__name__} has no floating-point parameter")
    return max(dense, key=lambda p: p.numel())


def remove_adapters(model: nn.Module, names: str | Iterable[str] | None = None) -> None:
    """Takes adapters out of `model`; all of them without `names`. Without any it is as it was.

    Raises:
        ValueError: there is no such adapter, or it is in use: `use_adapter(model, None)` first.
    """
    listed = adapter_names(model) if names is None else _names(names)
    banks = _known(model, listed)
    if not banks:
        return
    chosen = banks[0].route.chosen
    if names is None:
        banks[0].route.choose(None)
    elif {chosen} & set(listed) if not isinstance(chosen, tuple) else set(chosen) & set(listed):
        raise ValueError(f"an adapter of {listed} is in use: use_adapter(model, None) first")
    for bank in banks:
        for name in listed:
            del bank.of[_key(name)]
    if adapter_names(model):
        return
    for block in unwrap(model).modules():
        if isinstance(getattr(block, _PLACE, None), _Bank):
            for number, hook in list(block._forward_hooks.items()):
                if hook is _after_block:
                    del block._forward_hooks[number]
            delattr(block, _PLACE)


def use_adapter(model: nn.Module, name: str | Sequence[str | None] | None) -> None:
    """Which adapter the next batches take, until told otherwise.

    Args:
        name: one for all rows; None for the base; or a list with one for each row of the batch.

    Raises:
        ValueError: there is no such adapter; the known ones are named.
    """
    chosen = name if name is None or isinstance(name, str) else tuple(name)
    if isinstance(chosen, tuple) and not chosen:
        raise ValueError("use_adapter was given an empty list of names; give one for each row")
    banks = _known(model, chosen if isinstance(chosen, tuple) else (chosen,))
    if banks:
        banks[0].route.choose(chosen)


@contextlib.contextmanager
def using_adapter(model: nn.Module, name: str | Sequence[str | None] | None) -> Iterator[None]:
    """`use_adapter` while this lasts; then what was in use before."""
    banks = _banks(model)
    before = banks[0].route.chosen if banks else None
    use_adapter(model, name)
    try:
        yield
    finally:
        use_adapter(model, before)


def train_adapter(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Use the adapter `name`, and freeze all of the model but it. Returns its parameters.

    With checkpointing of activations in its reentrant form the inputs of the first block must
    require grad: `model.enable_input_require_grads()`.
    """
    banks = _known(model, [name])
    unwrap(model).requires_grad_(False)
    parameters = [p for bank in banks for p in bank.get(name).parameters()]
    for p in parameters:
        p.requires_grad_()
    use_adapter(model, name)
    return parameters


# --- on disk -----------------------------------------------------------------------------------


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of one adapter: "blocks.3.up.weight" and so on. They share memory with it.

    Raises:
        ValueError: there is no such adapter; or it is sharded.
    """
    found = {}
    for i, bank in enumerate(_known(model, [name])):
        for part, value in bank.get(name).state_dict().items():
            if isinstance(value, DTensor):
                raise ValueError(
                    f"the adapter {name!r} is sharded over ranks: gather the model's state first "
                    "(torch.distributed.checkpoint.state_dict.get_model_state_dict)"
                )
            found[f"blocks.{i}.{part}"] = value
    return found


def _samples(block: nn.Module) -> Tensor:
    """Some numbers of the largest weight of a block: [_SAMPLES]."""
    flat = _like(block).detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES].float().cpu().contiguous()


def save_adapter(model: nn.Module, name: str, path: str | os.PathLike[str]) -> None:
    """One adapter into a safetensors file, with some numbers of each block of its base.

    Raises:
        ValueError: there is no such adapter; or it is sharded.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().contiguous() for k, v in adapter_state_dict(model, name).items()}
    first = _banks(model)[0].get(name)
    for i, block in enumerate(blocks_of(model)):
        state[f"base.{i}"] = _samples(block)
    metadata = {"format": _FORMAT, "name": name, "activation": first.activation}
    target = Path(path)
    part = target.with_name(target.name + ".part")
    save_file(state, part, metadata=metadata)
    part.replace(target)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    check_base: bool = True,
) -> str:
    """Adds the adapter of a file that `save_adapter` wrote to `model`. Returns its name.

    Args:
        name: under which it is added; by default that which it was saved with.
        check_base: compare the numbers of the base that the file holds with the model's blocks.
            They may differ by the rounding to bfloat16.

    Raises:
        CheckpointError: no such file, or not of `save_adapter`; its shapes do not fit the model, or
            the model is another base. The tensor, or the block, is named; nothing is added.
        ValueError: the model has an adapter of this name.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as an adapter: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was not written by save_adapter: format {metadata}")
    blocks, saved = blocks_of(model), sum(key.startswith("base.") for key in state)
    if saved != len(blocks):
        raise CheckpointError(
            f"{path} is of a base with {saved} blocks; the model has {len(blocks)}"
        )
    down = state.get("blocks.0.down.weight")
    if down is None or down.dim() != 2:
        raise CheckpointError(f"{path} lacks the matrix blocks.0.down.weight")
    width = int(text_config(unwrap(model)).hidden_size)
    made = Adapter(width, down.size(0), activation=metadata["activation"]).state_dict()
    for i in range(len(blocks)):
        for part, like in made.items():
            key = f"blocks.{i}.{part}"
            if key not in state:
                raise CheckpointError(f"{path} lacks the tensor {key}")
            if state[key].shape != like.shape:
                raise CheckpointError(
                    f"{path}: {key} has the shape {tuple(state[key].shape)}; an adapter of this "
                    f"model has {tuple(like.shape)}"
                )
    if check_base:
        _check_base(str(path), state, blocks)
    chosen = metadata["name"] if name is None else name
    add_adapters(
        model, chosen, bottleneck=down.size(0), activation=metadata["activation"], dtype=down.dtype
    )
    with torch.no_grad():
        for key, value in adapter_state_dict(model, chosen).items():
            value.copy_(state[key])
    return chosen


def _check_base(path: str, state: Mapping[str, Tensor], blocks: Sequence[nn.Module]) -> None:
    for i, block in enumerate(blocks):
        saved, here = state[f"base.{i}"], _samples(block)
        off = float((saved - here).abs().max()) if saved.shape == here.shape else math.inf
        if not off <= 2.0**-7 * float(saved.abs().max()):
            raise CheckpointError(
                f"{path}: block {i} of the model has other weights than the base on which this "
                "adapter was trained. Load it into its own base, or give check_base=False if the "
                "base was changed on purpose"
            )


# --- which task --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Identified:
    """What `identify_task` found.

    Attributes:
        names: of the likeliest task, for each row: what `use_adapter` takes.
        tasks: all that were compared.
        cross_entropy: float64 [rows, tasks], the mean over a row's tokens, in nats.
    """

    names: list[str]
    tasks: list[str]
    cross_entropy: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp of the cross-entropy, [rows, tasks]."""
        return self.cross_entropy.exp()


def _own_tokens(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """What a model is given, and each token of the input as its own label, but the first."""
    if batch.get("input_ids") is None:
        raise ValueError(f"batch must have input_ids; it has {sorted(batch)}")
    given = {k: v for k, v in batch.items() if k != "labels" and v is not None}
    ids: Tensor = given["input_ids"]
    mask = given.get("attention_mask")
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    counts = seen.clone()
    counts[:, 0] = False
    counts[:, 1:] &= seen[:, :-1]  # padding predicts nothing
    short = (~counts.any(1)).nonzero().flatten().tolist()
    if short:
        raise ValueError(
            f"row {short[0]} of input_ids has fewer than two tokens: nothing in it is predicted, "
            "so its task cannot be told"
        )
    return given, ids.masked_fill(~counts, IGNORED)


def _cross_entropy(model: nn.Module, given: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Mean over the tokens of a row: float64 [B]."""
    logprobs, counts = batch_logprobs(model, {**given, "labels": labels})
    return -logprobs.double().sum(1) / counts.sum(1)


def identify_task(
    model: nn.Module,
    batch: Mapping[str, Any],
    names: Sequence[str] | None = None,
    *,
    max_tokens: int = 16_384,
    switch: Callable[[str], object] | None = None,
) -> Identified:
    """The task of each row: the one whose adapter finds the row's own tokens least surprising.

    tasks x rows go through the model in passes of at most `max_tokens`, each row with its adapter;
    no logits are made. What was in use stays in use.

    Args:
        model: a causal language model with adapters.
        batch: input_ids [B, T] and attention_mask, padded on either side: the inputs alone, since
            at this point there is no answer. Labels are not looked at.
        names: among which tasks; by default all adapters.
        max_tokens: of a pass, padding included; at least one row goes.
        switch: for adapters of another kind, as the LoRAs of PEFT: is called with each of `names`
            before a pass over all rows, `lambda name: model.set_adapter(name)`. The last one stays.

    Raises:
        ValueError: an unknown name; a row with fewer than two tokens; nothing to choose from.
        NonFiniteError: a cross-entropy is NaN or infinite; task and row are named.
    """
    if switch is not None and names is None:
        raise ValueError("names must be given with switch: it does not tell which tasks there are")
    tasks = adapter_names(model) if names is None else _names(names)
    if not tasks:
        raise ValueError(
            "there is no task to choose from: "
            + ("names is empty" if names is not None else "the model has no adapters")
        )
    at_least("max_tokens", max_tokens, 1)
    if switch is None:
        _known(model, tasks)
    given, labels = _own_tokens(on_device_of(model, batch))
    size, length = labels.shape
    rows = max(1, max_tokens // length)

    def taken(index: Tensor) -> dict[str, Any]:
        return {
            k: v[index] if isinstance(v, Tensor) and v.dim() and v.size(0) == size else v
            for k, v in given.items()
        }

    found = []
    with Evaluating(unwrap(model)), torch.no_grad():
        if switch is not None:
            every = torch.arange(size, device=labels.device)
            for task in tasks:
                switch(task)
                for index in every.split(rows):
                    found.append(_cross_entropy(model, taken(index), labels[index]))
        else:
            every = torch.arange(size * len(tasks), device=labels.device)
            of = [task for task in tasks for _ in range(size)]
            for start in range(0, len(of), rows):
                index = every[start : start + rows] % size
                with using_adapter(model, of[start : start + rows]):
                    found.append(_cross_entropy(model, taken(index), labels[index]))
    table = torch.cat(found).view(len(tasks), size).t().contiguous()
    wrong = (~torch.isfinite(table)).nonzero().tolist()
    if wrong:
        row, task_index = wrong[0]
        raise NonFiniteError(
            f"the cross-entropy of row {row} under {tasks[task_index]!r} is "
            f"{float(table[row, task_index])}: its task cannot be told"
        )
    return Identified([tasks[i] for i in table.argmin(1).tolist()], tasks, table)


# --- the keep ----------------------------------------------------------------------------------


class AdapterPerTask(Keep):
    """AdapterCL: each task gets an adapter under its name, and trains nothing else.

    What was learned before cannot change: all of it is frozen. Which adapter an input needs at
    inference is told by `use_adapter`, or found by `identify_task`. After a task its adapter stays
    in use.

    Args:
        bottleneck, activation, seed, dtype: see `add_adapters`.

    Raises:
        ValueError: see `add_adapters`.
    """

    def __init__(
        self,
        bottleneck: int = 64,
        *,
        activation: str = "relu",
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_options(bottleneck, activation, seed, dtype)
        self.bottleneck, self.activation = bottleneck, activation
        self.seed, self.dtype = seed, dtype

    def _add(self, model: nn.Module, name: str) -> None:
        if name not in adapter_names(model):
            add_adapters(
                model,
                name,
                bottleneck=self.bottleneck,
                activation=self.activation,
                seed=self.seed,
                dtype=self.dtype,
            )

    def before_task(self, model: nn.Module, task: Task) -> None:
        self._add(model, task.name)
        train_adapter(model, task.name)

    def restore(self, model: nn.Module, past: Sequence[Task]) -> None:
        for task in past:
            self._add(model, task.name)
        if past:
            use_adapter(model, past[-1].name)

    def scoring(self, model: nn.Module, name: str) -> AbstractContextManager[Any]:
        """The task's own adapter; none where it has none."""
        return using_adapter(model, name if name in adapter_names(model) else None)

    def options(self) -> dict[str, Any]:
        return {
            "bottleneck": self.bottleneck,
            "activation": self.activation,
            "seed": self.seed,
            "dtype": dtype_name(self.dtype),
        }
