"""The decoder blocks of a model: where each writes its MLP's output, and how to run a part of them.

    blocks_of(model)           the blocks, from modules and config
    decoder_of(model)          the same with what editing needs: sites and partial runs
    decoder.site(i)            W of block i:  y = W k,  the block's output = ... + scale norm(y)
    decoder.run(inputs, a, b)  the model's own forward in which only blocks a .. b - 1 work

W is the down-projection of the block's MLP (`down_proj`, `c_proj`, `fc_out`, `dense_4h_to_h`), the
matrix that ROME and MEMIT edit. It is found by its shape and place, whatever it is called. What
becomes of its output, a norm after it (Gemma 2 and 3) or a multiplier (Granite), is measured once
by a perturbation of the block; a block that does something else is refused.

A partial run replaces the forward of the blocks that do not work, so that masks, positions, rotary
embeddings and caches are those that the model makes itself.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_fast.models.heads import Evaluating, capture, forward_names, forward_replaced, unwrap

__all__ = [
    "Decoder",
    "Site",
    "batched",
    "blocks_of",
    "cache_rows",
    "decoder_of",
    "text_config",
    "widths_of",
]


def text_config(inner: Any) -> Any:
    """The config of the text part; None where there is none."""
    config: Any = getattr(inner, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _named_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    inner = unwrap(model)
    count = getattr(text_config(inner), "num_hidden_layers", None)
    if count is None:
        raise ValueError(
            f"{type(inner).__name__} has no config with num_hidden_layers, so its blocks cannot be "
            "told: a model of transformers is needed"
        )
    lists = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Lists within a block are not meant.
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        raise ValueError(
            f"{type(inner).__name__} has {len(outer)} lists of {count} modules, "
            f"{[name for name, _ in outer]}; exactly one is needed, to know its blocks"
        )
    name, modules = outer[0]
    return [(f"{name}.{i}", module) for i, module in enumerate(modules)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder of transformers: the list of as many modules as its config tells.

    Raises:
        ValueError: there is no config, no such list, or more than one.
    """
    return [module for _, module in _named_blocks(model)]


# --- the matrix that writes --------------------------------------------------------------------


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, also of GPT-2's Conv1D; None of another module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if _is_conv1d(module) and weight.dim() == 2:
        return weight.size(0), weight.size(1)
    return None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@dataclass(frozen=True, eq=False)
class Site:
    """The matrix W [d, f] with which the MLP of one block writes into the residual stream.

    Attributes:
        layer: the index of the block.
        name: of the module in the model; `weight_name` is that of its parameter.
        module: an nn.Linear, or GPT-2's Conv1D.
        transposed: the parameter is stored as [f, d].
        scale, norm: the block adds scale norm(y) of y = W k + b; norm is None for y itself.
    """

    layer: int
    name: str
    module: nn.Module
    transposed: bool
    scale: float = 1.0
    norm: nn.Module | None = None

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def weight(self) -> nn.Parameter:
        """As it is stored: [d, f], or [f, d] where `transposed`."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def matrix(self) -> Tensor:
        """W [d, f]: a view of the parameter, without grad."""
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def key_size(self) -> int:
        """f, the width of the keys."""
        return int(self.matrix().size(1))

    @property
    def value_size(self) -> int:
        """d, the width of the residual stream."""
        return int(self.matrix().size(0))

    def output(self, keys: Tensor) -> Tensor:
        """y = W k + b of keys [..., f], in float32, or float64 where W is: [..., d]."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        y = keys.to(wide) @ self.matrix().to(wide).T
        bias = getattr(self.module, "bias", None)
        return y if bias is None else y + bias.detach().to(wide)

    def contribution(self, y: Tensor) -> Tensor:
        """What the block adds to the stream for y = W k + b: [..., d]."""
        return self.scale * (y if self.norm is None else self.norm(y))

    def needed(self, y: Tensor, change: Tensor) -> Tensor:
        """The change of y that changes the contribution by `change`: [..., d], of y's dtype.

        Exact without a norm. An RMS norm g y / rms(y) gives only vectors of one length: y then
        gets the direction of the wanted contribution, and keeps its own length.
        """
        if self.norm is None:
            return change / self.scale
        gain = self.norm(torch.ones_like(y[..., :1, :])) if y.dim() > 1 else None
        if gain is None:
            gain = self.norm(torch.ones_like(y))
        wanted = (self.norm(y) + change / self.scale) / gain
        length = y.norm(dim=-1, keepdim=True)
        return wanted * (length / wanted.norm(dim=-1, keepdim=True).clamp_min(1e-30)) - y


def _find_site(block_name: str, block: nn.Module, config: Any, layer: int) -> tuple[str, nn.Module]:
    """The name and module of W within a block."""
    hidden = int(config.hidden_size)
    attentions = [n for n, m in block.named_modules() if "attention" in type(m).__name__.lower()]
    found, experts = [], []
    for name, module in block.named_modules():
        kind = type(module).__name__.lower()
        last = name.rsplit(".", 1)[-1]
        if last == "experts" or "sparsemoe" in kind or kind.endswith(("moe", "moeblock")):
            experts.append(name)
        if any(name == n or (n and name.startswith(f"{n}.")) for n in attentions):
            continue
        widths = widths_of(module)
        if widths is not None and widths[1] == hidden:
            found.append((name, module, widths[0]))
    if experts:
        raise ValueError(
            f"{block_name}.{experts[0]} is a mixture of experts: which expert holds a fact depends "
            "on the router, and no editor here can change it. Choose `layers` that are dense, or "
            "keep the facts outside of the weights with FactStore"
        )
    size = getattr(config, "intermediate_size", None)
    inner = [item for item in found if item[2] == size] or found
    quantised = [n for n, m in block.named_modules() if "quant" in type(m).__name__.lower()]
    if not inner and quantised:
        raise ValueError(
            f"{block_name}.{quantised[0]} is quantised: a fact is a small change of a weight, "
            "which needs 16 bits or more. Load the model without quantisation"
        )
    if len(inner) != 1:
        listed = [name for name, _, _ in inner]
        raise ValueError(
            f"{block_name} (block {layer}) has {len(inner)} linear layers that could write its "
            f"MLP's output of {hidden} numbers into the stream: {listed}; exactly one is needed. "
            "The blocks of Llama, Qwen, Mistral, Gemma, GPT-2, GPT-J and their like are understood"
        )
    return inner[0][0], inner[0][1]


def _check_weight(name: str, module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        raise ValueError(
            f"{name}.weight is quantised ({weight.dtype}): a fact is a small change of a weight, "
            "which needs 16 bits or more. Load the model without quantisation"
        )
    if type(weight).__name__ == "DTensor" or hasattr(weight, "placements"):
        raise ValueError(
            f"{name}.weight is sharded over several ranks: gather the model on one device to edit"
        )
    if weight.is_meta:
        raise ValueError(f"{name}.weight has no values (meta device): load the model first")


# --- a part of the blocks ----------------------------------------------------------------------


class _Stop(BaseException):
    """Ends a forward pass once its result is known; not an Exception, so that no model eats it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _first(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"a block gives a {type(output).__name__}; hidden states, or a tuple that begins with "
            "them, are understood"
        )
    return hidden


class Decoder:
    """The blocks of a causal language model of transformers, for editing.

    Attributes:
        model: unwrapped.
        blocks, names: the blocks, and their names in the model.
        hidden_size: d.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = unwrap(model)
        if hasattr(self.model, "peft_config") or hasattr(self.model, "get_base_model"):
            raise ValueError(
                "the model carries adapters of PEFT: merge them first (merge_and_unload), or edit "
                "its base"
            )
        named = _named_blocks(self.model)
        self.names = [name for name, _ in named]
        self.blocks = [module for _, module in named]
        config = text_config(self.model)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(self.model).__name__} is an encoder-decoder; a causal decoder is needed"
            )
        self.config = config
        self.hidden_size = int(config.hidden_size)
        self._names = forward_names(self.model)
        self._sites: dict[int, Site] = {}
        self._tuples: bool | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: that of the embedding."""
        embedding = self.model.get_input_embeddings()
        return next(embedding.parameters()).dtype

    def layer(self, index: int, name: str = "layers") -> int:
        """`index`, counted from the end where negative.

        Raises:
            ValueError: there is no such block.
        """
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name} must be indices of blocks; got {index!r}")
        if not -len(self) <= index < len(self):
            raise ValueError(
                f"{name} must be in [0, {len(self) - 1}], the {len(self)} blocks of the model; "
                f"got {index}"
            )
        return index % len(self)

    def check_ids(self, ids: Sequence[int], text: str) -> None:
        """Raise unless the model can be given these tokens.

        Args:
            ids: of one text.
            text: what they are, for the message.

        Raises:
            ValueError: they are more than the model's positions, or beyond its vocabulary.
        """
        positions = getattr(self.config, "max_position_embeddings", None)
        if isinstance(positions, int) and len(ids) > positions:
            raise ValueError(
                f"{text!r:.200} takes {len(ids)} tokens, but the model has {positions} positions"
            )
        rows = self.model.get_input_embeddings().weight.size(0)
        if len(ids) and max(ids) >= rows:
            raise ValueError(
                f"{text!r:.200} has the token {max(ids)}, but the model's vocabulary has {rows}: "
                "this is the tokenizer of another model"
            )

    # --- sites ---

    def site(self, layer: int) -> Site:
        """The matrix with which the MLP of block `layer` writes.

        Raises:
            ValueError: the block is a mixture of experts, quantised, sharded, on the meta device,
                shares its weight, or does something to the MLP's output that is not understood.
        """
        layer = self.layer(layer)
        if layer not in self._sites:
            self._sites[layer] = self._measured(layer)
        return self._sites[layer]

    def sites(self, layers: Sequence[int] | None = None) -> list[Site]:
        return [self.site(i) for i in (range(len(self)) if layers is None else layers)]

    def key_size(self, layer: int) -> int:
        """f of block `layer`, also of a model without values (meta device).

        Raises:
            ValueError: the block is a mixture of experts, or its matrix cannot be told.
        """
        layer = self.layer(layer)
        _, module = _find_site(self.names[layer], self.blocks[layer], self.config, layer)
        widths = widths_of(module)
        assert widths is not None, "only modules with widths are found"
        return widths[0]

    def _measured(self, layer: int) -> Site:
        block, block_name = self.blocks[layer], self.names[layer]
        inner, module = _find_site(block_name, block, self.config, layer)
        name = f"{block_name}.{inner}" if inner else block_name
        _check_weight(name, module)
        weight = module.weight
        others = [
            n
            for n, p in self.model.named_parameters(remove_duplicate=False)
            if p is weight and n != f"{name}.weight"
        ]
        if others:
            raise ValueError(f"{name}.weight is also {others[0]}: an edit would change both")
        scale, norm = self._probe(block, block_name, module)
        return Site(layer, name, module, _is_conv1d(module), scale, norm)

    def _probe(
        self, block: nn.Module, block_name: str, module: nn.Module
    ) -> tuple[float, nn.Module | None]:
        """How the output of `module` enters the stream, measured on a few tokens."""
        layer = self.blocks.index(block)
        vocabulary = self.model.get_input_embeddings().weight.size(0)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (1, 5), generator=generator).to(self.device)
        seen: dict[str, Tensor] = {}
        given: list[tuple[nn.Module, Tensor]] = []
        push: list[Tensor] = []

        def record(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            seen["y"] = output.detach()
            return output + push[0].to(output.dtype) if push else None

        def norms(of: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                given.append((of, args[0]))

        hooks = [module.register_forward_hook(record)]
        hooks += [
            m.register_forward_pre_hook(norms)
            for n, m in block.named_modules()
            if n and "norm" in type(m).__name__.lower()
        ]

        def twice(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen["h"] = _first(output).detach()
            y = seen["y"]
            noise = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
            push.append(noise * y.float().std().to(y.dtype).clamp_min(1e-3))
            candidates = [m for m, x in given if x.shape == y.shape and torch.equal(x, y)]
            seen["h2"] = _first(block.forward(*args, **kwargs)).detach()
            raise _Found(y, push[0], candidates)

        hooks.append(block.register_forward_hook(twice, with_kwargs=True))
        found: _Found | None = None
        try:
            plain = torch.autocast(self.device.type, enabled=False)
            with torch.no_grad(), Evaluating(self.model), plain:
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                self._forward(inputs, 0, layer + 1, None, None)
        except _Found as stop:
            found = stop
        finally:
            for hook in hooks:
                hook.remove()
        assert found is not None, "the block's hook always ends the pass"
        moved = (seen["h2"] - seen["h"]).float()
        tolerance = 1e-3 if moved.dtype == self.dtype else 0.05
        norm = found.candidates[0] if found.candidates else None
        with torch.no_grad():
            direct = found.push.float()
            if norm is not None:
                y = found.y
                direct = norm(y + found.push).float() - norm(y).float()
        direct = direct.reshape(moved.shape)
        # Some numbers of the stream may be so large that such a change is lost in their rounding.
        largest = torch.maximum(seen["h"].abs(), seen["h2"].abs()).float()
        clear = torch.finfo(seen["h"].dtype).eps * largest <= 0.25 * moved.abs().median()
        if float(clear.float().mean()) >= 0.5:
            moved, direct = moved[clear], direct[clear]
        scale = float((moved * direct).sum() / (direct * direct).sum())
        left = float((moved - scale * direct).norm() / moved.norm().clamp_min(1e-30))
        rms = norm is None
        if norm is not None:
            with torch.no_grad():
                unit = found.y / found.y.float().std().clamp_min(1e-30).to(found.y.dtype)
                a, b = norm(unit).float(), norm(2 * unit).float()
                ones = norm(torch.ones_like(found.y[:1])).float()
            rms = bool(torch.allclose(a, b, rtol=0.02, atol=0.02 * float(a.abs().max())))
            rms = rms and float(ones.abs().min()) > 0
        if left > tolerance or not scale or not rms:
            raise ValueError(
                f"{block_name} does something to the output of its MLP that is not understood (a "
                "multiple of it, or of an RMS norm of it, should be added to the stream): it "
                "cannot be edited"
            )
        return (1.0 if abs(scale - 1.0) < tolerance else scale), norm

    # --- runs ---

    def _forward(
        self,
        inputs: Mapping[str, Any],
        start: int,
        stop: int,
        hidden: Tensor | None,
        cache: Any,
    ) -> Any:
        names = self._names
        given = {k: v for k, v in inputs.items() if k in names or not names}
        given["use_cache"] = cache is not None
        if cache is not None:
            given["past_key_values"] = cache
        with contextlib.ExitStack() as stack:
            for i in range(start):
                stand_in = self._stand_in(hidden if i == start - 1 else None)
                stack.enter_context(forward_replaced(self.blocks[i], stand_in))
            if stop < len(self):
                stack.enter_context(_stop_after(self.blocks[stop - 1]))
            return self.model.forward(**given)

    def _stand_in(self, hidden: Tensor | None) -> Callable[..., Any]:
        tuples = self._gives_tuples()

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            out = hidden
            if out is None:
                out = args[0] if args else kwargs["hidden_states"]
            return (out,) if tuples else out

        return pass_on

    def _gives_tuples(self) -> bool:
        """Whether the blocks give (hidden states, ...), seen once on one token."""
        if self._tuples is None:
            kinds: list[bool] = []
            hook = self.blocks[0].register_forward_hook(
                lambda _, __, output: kinds.append(isinstance(output, tuple))
            )
            try:
                with torch.no_grad(), Evaluating(self.model):
                    ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                    with contextlib.suppress(_Stop), _stop_after(self.blocks[0]):
                        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                        self._forward(given, 0, len(self), None, None)
            finally:
                hook.remove()
            self._tuples = kinds[0]
        return self._tuples

    def run(
        self,
        inputs: Mapping[str, Any],
        start: int = 0,
        stop: int | None = None,
        *,
        hidden: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """The hidden states after block `stop` - 1, where only blocks `start` .. `stop` - 1 work.

        Neither the final norm nor the head is called. Gradients flow from the result to `hidden`.

        Args:
            inputs: input_ids [batch, length], and what else the forward takes by name
                (attention_mask, position_ids); unknown names are left out.
            start, stop: blocks; stop=None for all.
            hidden: [batch, length, d], what block `start` is given; None where start is 0.
            cache: keys and values of earlier positions; blocks that work add to it.

        Raises:
            ValueError: `start`, `stop` and `hidden` do not fit.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise ValueError(
                f"start and stop must satisfy 0 <= start < stop <= {len(self)}; "
                f"got {start} and {stop}"
            )
        if (hidden is None) != (start == 0):
            raise ValueError(f"hidden is what block {start} is given: needed unless start is 0")
        with _stop_after(self.blocks[stop - 1]):
            try:
                self._forward(inputs, start, len(self), hidden, cache)
            except _Stop as end:
                return end.hidden
        raise ValueError(f"{type(self.model).__name__} does not call its block {stop - 1}")

    def run_to_head(
        self,
        inputs: Mapping[str, Any],
        start: int = 0,
        *,
        hidden: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """What the head is given when only the blocks from `start` on work: [batch, length, d]."""
        if (hidden is None) != (start == 0):
            raise ValueError(f"hidden is what block {start} is given: needed unless start is 0")
        taken, _ = capture(
            self.model, lambda: self._forward(inputs, start, len(self), hidden, cache)
        )
        return taken


def batched(rows: Tensor, batch: int) -> Tensor:
    """[batch, length, width], also of what a block had made flat (OPT's MLP)."""
    return rows.reshape(batch, -1, rows.size(-1))


class _Found(BaseException):
    """Ends the pass of a probe."""

    def __init__(self, y: Tensor, push: Tensor, candidates: list[nn.Module]) -> None:
        self.y, self.push, self.candidates = y, push, candidates


@contextlib.contextmanager
def _stop_after(block: nn.Module) -> Iterator[None]:
    def stop(_: nn.Module, __: Any, output: Any) -> None:
        raise _Stop(_first(output))

    hook = block.register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def cache_rows(cache: Any, rows: Tensor | None = None) -> Any:
    """A cache of keys and values that may grow on its own: of all rows, or of some.

    The tensors are shared with `cache` where all rows are meant; a layer that grows joins them into
    new ones.

    Raises:
        ValueError: the cache does not hold keys and values per layer (a recurrent state).
    """
    layers = getattr(cache, "layers", None)
    if not layers or not all(
        isinstance(getattr(layer, name, None), Tensor)
        for layer in layers
        for name in ("keys", "values")
    ):
        raise ValueError(
            f"a {type(cache).__name__} does not hold keys and values of every layer, so that the "
            "work of common prefixes cannot be kept; editors take suffix=False for such models"
        )
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in layers]
    if rows is not None:
        for layer in made.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return made


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder of `model`; also within DDP.

    Raises:
        ValueError: the model carries PEFT adapters, is an encoder-decoder, or its blocks cannot be
            told.
    """
    return Decoder(model)
