"""Editors that keep facts beside the weights, at one block: what `FactStore` and `Grace` share.

What the block (or the matrix that writes its MLP) is given is looked up at each position; keys are
what it was given at the end of a prompt. Here are the way to see that, the hooks while a memory is
attached, and its file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from cl_fast.editing.facts import Fact, encode_many, listed_facts
from cl_fast.editing.memory_files import read_memory
from cl_fast.editing.rows import like_lengths, padded_left
from cl_fast.errors import CheckpointError
from cl_fast.losses.cache import model_fingerprint, tokenizer_fingerprint
from cl_fast.models.blocks import Decoder, decoder_of
from cl_fast.models.heads import Evaluating

__all__ = ["BlockMemory", "Inputs", "Keys", "refuse_attached"]

Keys = Literal["mlp", "block"]


class Inputs:
    """What a block (or the matrix that writes its MLP) was given, while hooks are set.

    A block whose forward is replaced by a stand-in does no work, and then there is nothing to take.

    Args:
        decoder: the model.
        layer: of the block.
        keys: "mlp" or "block".

    Raises:
        ValueError: the matrix is not one that is understood, or another store or codebook changes
            what the block gives at this moment.
    """

    def __init__(self, decoder: Decoder, layer: int, keys: Keys) -> None:
        self.block = decoder.blocks[layer]
        inner = (hook for m in self.block.modules() for hook in m._forward_hooks.values())
        if any(hasattr(getattr(hook, "__self__", None), "attach") for hook in inner):
            raise ValueError(
                f"another editor is attached to block {layer}: detach it before this one is made "
                "(both may be attached afterwards)"
            )
        self.keys = keys
        if keys == "mlp":
            site = decoder.site(layer)
            self.works: nn.Module = site.module
            self.size = site.key_size
        else:
            # The first layer with weights: it is called where the block really works.
            inner = (m for m in self.block.modules() if m is not self.block and m._parameters)
            self.works = next(inner)
            self.size = decoder.hidden_size
        self._given: Tensor | None = None
        self._seen: Tensor | None = None

    def hook(self) -> list[Any]:
        """Handles of the hooks, to be removed."""
        handles = [self.works.register_forward_pre_hook(self._worked)]
        if self.keys == "block":
            handles.append(self.block.register_forward_pre_hook(self._enters, with_kwargs=True))
        return handles

    def _enters(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._given = (args[0] if args else kwargs["hidden_states"]).detach()

    def _worked(self, _: nn.Module, args: Any) -> None:
        self._seen = args[0].detach() if self.keys == "mlp" else self._given

    def take(self) -> Tensor | None:
        """Of the last call of the block: [..., size]; None where it did not work."""
        seen, self._seen, self._given = self._seen, None, None
        return seen


def refuse_attached(decoder: Decoder) -> None:
    """Raise where a memory is attached to the model: what it adds would be taken for the model's.

    Raises:
        ValueError: naming the block.
    """
    for number, block in enumerate(decoder.blocks):
        hooks = (hook for m in block.modules() for hook in m._forward_hooks.values())
        owners = (getattr(hook, "__self__", None) for hook in hooks)
        for owner in owners:
            if isinstance(owner, BlockMemory):
                raise ValueError(
                    f"a {type(owner).__name__} is attached to block {number} of the model: detach "
                    "it first, and attach it again afterwards"
                )


class BlockMemory(AbstractContextManager["BlockMemory"]):
    """Facts beside one block of a model, looked up there while the memory is attached.

    A subclass sets `layer`, `_inputs`, `batch` and `seed`, and keeps `_facts`.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, a fast one.
    """

    _noun: ClassVar[str]
    """What messages call it."""
    _format: ClassVar[str]
    """Of its files."""
    layer: int
    batch: int
    seed: int
    _inputs: Inputs

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.decoder = decoder_of(model)
        self.tokenizer = tokenizer
        self._facts: dict[str, Fact] = {}
        self._fingerprint: str | None = None
        self._handles: list[Any] = []

    # --- what it holds ---

    def __len__(self) -> int:
        return len(self._facts)

    def __contains__(self, name: object) -> bool:
        return name in self._facts

    @property
    def ids(self) -> list[str]:
        """Of the facts, in the order in which they came."""
        return list(self._facts)

    @property
    def facts(self) -> dict[str, Fact]:
        """By id, in the order in which they came."""
        return dict(self._facts)

    def _replacing(self, facts: Iterable[Fact]) -> tuple[list[Fact], list[str]]:
        """New facts, and the ids of those with the same id, or the same prompt and subject."""
        new = listed_facts(facts)
        words = {fact.id for fact in new} | {fact.text for fact in new}
        return new, [name for name, f in self._facts.items() if {name, f.text} & words]

    # --- in the model ---

    @abstractmethod
    def _hooks(self) -> list[Any]:
        """Handles of the hooks, which are set now."""

    @property
    def attached(self) -> bool:
        """Whether the model looks facts up."""
        return bool(self._handles)

    def attach(self) -> Self:
        """From now on the model looks facts up; they may be changed while it does.

        Raises:
            ValueError: it does already.
        """
        if self._handles:
            raise ValueError(f"this {self._noun} is attached already: detach it first")
        self._handles = self._hooks()
        return self

    def detach(self) -> None:
        """The model is as it was; without effect where nothing is attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._inputs.take()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """The model as if nothing were attached, while this lasts."""
        attached = self.attached
        self.detach()
        try:
            yield
        finally:
            self._inputs.take()
            if attached:
                self.attach()

    # --- what the block is given ---

    @property
    def _pad(self) -> int:
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    def _run(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Of rows of tokens: indices, [rows, length, size], attention mask [rows, length].

        Rows are padded on the left.
        """
        for some in like_lengths(rows, tokens=4096):
            given = padded_left([rows[i] for i in some], self._pad, self.decoder.device)
            with self._pause(), torch.no_grad(), Evaluating(self.decoder.model):
                handles = self._inputs.hook()
                try:
                    hidden = self.decoder.run(given, 0, self.layer + 1)
                finally:
                    for handle in handles:
                        handle.remove()
                seen = self._inputs.take()
            assert seen is not None, "the block has run"
            yield some, seen.reshape(*hidden.shape[:-1], self._inputs.size), given["attention_mask"]

    def _at_end(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What the last token of each row gives: [rows, size], on the model's device."""
        found: Tensor | None = None
        for some, seen, _ in self._run(rows):
            if found is None:
                found = seen.new_empty(len(rows), self._inputs.size)
            found[some] = seen[:, -1]
        assert found is not None, "there are rows"
        return found

    @abstractmethod
    def _look_up(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per position of [..., size], in one row: whether a key answers, which, and how near."""

    def _hits(self, texts: Sequence[str]) -> list[list[tuple[int, int, float]]]:
        """Where each text is answered: position from its first token, which key, how near."""
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts; got the string {texts!r}")
        rows = [e.ids for e in encode_many(self.tokenizer, [(text, None, None) for text in texts])]
        found: list[list[tuple[int, int, float]]] = [[] for _ in rows]
        places = [i for i, row in enumerate(rows) if row]
        if not self._facts or not places:
            return found
        for some, seen, mask in self._run([rows[i] for i in places]):
            hit, index, near = (x.view(mask.shape) for x in self._look_up(seen))
            for line, at in (hit & mask.bool()).nonzero().tolist():
                row = places[some[line]]
                position = at - (mask.size(1) - len(rows[row]))
                found[row].append((position, int(index[line, at]), float(near[line, at])))
        return found

    # --- files ---

    def _about(self) -> dict[str, Any]:
        """What every file tells."""
        if not self._facts or self._fingerprint is None:
            raise ValueError(f"the {self._noun} is empty: there is nothing to save")
        return {
            "model": self._fingerprint,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "layer": self.layer,
            "batch": self.batch,
            "seed": self.seed,
            "facts": [fact.to_dict() for fact in self._facts.values()],
        }

    @classmethod
    @contextmanager
    def _opened(
        cls, path: str | Path, model: nn.Module, tokenizer: Any
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """A file that is for this model; what is found amiss inside is told of it."""
        tensors, about = read_memory(path, cls._format)
        if about.get("model") != model_fingerprint(decoder_of(model).model):
            raise CheckpointError(
                f"{path}: was made for other weights, or another dtype of them, than those of this "
                f"model: load the model that it was made with, or make the {cls._noun} anew with "
                "fit"
            )
        if about.get("tokenizer") != tokenizer_fingerprint(tokenizer):
            raise CheckpointError(f"{path}: was made with another tokenizer")
        try:
            yield tensors, about
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: does not hold what a {cls._noun} has ({error})"
            ) from error
