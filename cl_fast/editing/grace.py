"""GRACE: a codebook of answers at one layer, for edits one after the other.

    codebook = Grace(model, tokenizer).fit(facts)
    with codebook:
        model.generate(...)

Hartvigsen et al. 2023 (arXiv 2211.11031). The layer is the matrix that writes the MLP of one block:
y = W k + b. A fact's key is what the layer is given at the last token of its prompt, its label the
target. With d the distance to the nearest key j and eps_j the radius of that key:

    there is no key           add      a key with the radius eps
    d > eps + eps_j           add      a key with the radius eps
    else, another label       split    eps_j = d/2 - 1e-5, and a new key with the radius d/2
    else, d > eps_j           cover    eps_j = d, no new key
    else                      inside   nothing

The value of a new key is what the layer shall give there instead, found by Adam through the model,
which is frozen and does not see the codebook:

    loss = mean over the tokens of the target of -log p

While the codebook is attached, a token whose nearest key is within its radius gets that key's value
in the place of y ("replace_last": of each text up to some token the last one). Every token asks for
itself, so that decoding with a cache computes what the whole text would; beyond all radii y keeps
its bits. A distance counts as within up to a thousandth above the radius, since the same text is
rounded differently in another batch.

The rule depends on the order of the facts and not on the values. The codebook is at any time what
the facts that are there would have made one after the other: whichever fact is deleted, what it
changed is gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cl_fast.editing.facts import Encoded, Fact, check_facts, encode_many, fact_of, unknown_ids
from cl_fast.editing.memory import BlockMemory, Inputs
from cl_fast.editing.memory_files import write_memory
from cl_fast.editing.rows import padded_inputs
from cl_fast.errors import NonFiniteError
from cl_fast.losses import token_logprobs
from cl_fast.losses.cache import model_fingerprint
from cl_fast.models.heads import Evaluating, head_of
from cl_fast.ops import nearest_key
from cl_fast.options import at_least, integer, one_of, positive

__all__ = ["SLACK", "Action", "CodebookKey", "Grace", "Within", "rule"]

Action = Literal["add", "split", "cover", "inside"]

SLACK = 1e-3
"""How much further than the radius counts as within, relative to it."""
_SPLIT = 1e-5


def rule(
    distance: float | None, radius: float, same_label: bool, eps: float
) -> tuple[Action, float, float | None]:
    """What a new fact does; see the module.

    Args:
        distance: to the nearest key, None without keys.
        radius: of that key.
        same_label: whether its label is that of the new fact.
        eps: the radius of a key that stands alone.

    Returns:
        The action, the radius of the nearest key after it, and that of the new key, if any.
    """
    if distance is None or distance > eps + radius:
        return "add", radius, eps
    if not same_label:
        return "split", distance / 2 - _SPLIT, distance / 2
    if distance > radius:
        return "cover", distance, None
    return "inside", radius, None


@dataclass(frozen=True)
class CodebookKey:
    """One key.

    Attributes:
        ids: the fact that it was made for, and those that it covers.
        label: their target.
        radius: within which it answers; below 0 it never does.
    """

    ids: tuple[str, ...]
    label: str
    radius: float


@dataclass(frozen=True)
class Within:
    """A token that is answered by the codebook.

    Attributes:
        position: counted from the first of the text, special tokens included.
        ids: of the facts of the key.
        distance: to the key.
    """

    position: int
    ids: tuple[str, ...]
    distance: float


@dataclass(eq=False)
class _Edit:
    """A fact, its key [f] float32 on the CPU, and its value and final loss, if it needed any."""

    fact: Fact
    key: Tensor
    value: Tensor | None = None
    loss: float | None = None


@dataclass(eq=False)
class _Step:
    """What an edit did: to which key, how far away."""

    action: Action
    key: int
    distance: float | None


class Grace(BlockMemory):
    """A codebook at one layer of a model, which keeps all of its weights.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, a fast one.
        layer: the block, from the end where negative; "auto" is five sixths of the way up, as the
            authors chose for Llama 2, and below the last one: a value there reaches the first token
            of a target only.
        eps: the radius of a key that stands alone, in the units of the layer's input.
        steps: updates of a value.
        lr: of Adam.
        init: what a value begins with: "cold", numbers from [0, 1) as in the authors' setting, or
            "warm", what the layer gives there.
        batch: values that are found at a time.
        seed: of the cold beginnings, which depend on it and on the fact alone.

    Raises:
        TypeError, ValueError: naming the argument; the layer is not understood.
    """

    _noun, _format = "codebook", "grace"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        layer: int | Literal["auto"] = "auto",
        eps: float = 1.0,
        steps: int = 100,
        lr: float = 1.0,
        init: Literal["cold", "warm"] = "cold",
        batch: int = 64,
        seed: int = 0,
    ) -> None:
        positive("eps", eps)
        positive("lr", lr)
        at_least("steps", steps, 1)
        at_least("batch", batch, 1)
        integer("seed", seed)
        one_of("init", init, ("cold", "warm"))
        super().__init__(model, tokenizer)
        depth = len(self.decoder)
        usual = max(0, min(depth - 2, 27 * depth // 32))
        self.layer = self.decoder.layer(usual if layer == "auto" else layer, "layer")
        self.eps, self.steps, self.lr, self.init = float(eps), steps, float(lr), init
        self.batch, self.seed = batch, seed
        self._inputs = Inputs(self.decoder, self.layer, "mlp")
        self._site = self.decoder.site(self.layer)
        self._settle([], [], [], [])

    # --- what it holds ---

    @property
    def codebook(self) -> list[CodebookKey]:
        """The keys, in the order in which they were made."""
        return list(self._codebook)

    def fit(self, facts: Iterable[Fact]) -> Grace:
        """Makes the codebook anew, of these facts in their order.

        Raises:
            TypeError, ValueError: as `insert`; the codebook is then as it was.
        """
        self._become([], list(facts))
        return self

    def insert(self, facts: Iterable[Fact]) -> None:
        """Adds facts, one after the other.

        Raises:
            TypeError, ValueError: a fact, or its id, is there twice or contradicts another; a key
                or value is not finite. Then nothing has changed.
        """
        self._become(self._edits, list(facts))

    def upsert(self, facts: Iterable[Fact]) -> None:
        """Adds facts; those with the same id, or the same prompt and subject, are deleted first.

        Raises:
            TypeError, ValueError: as `insert`.
        """
        new, gone = self._replacing(facts)
        self._become(self._without(gone), new)

    def delete(self, ids: Iterable[str]) -> None:
        """Takes facts out: the codebook becomes what the others make of it.

        A fact that one of them covered may get a key of its own now; its value is found then.

        Raises:
            ValueError: an id is not known; then nothing has changed.
        """
        gone = unknown_ids(ids, self._facts, "codebook")
        if gone:
            self._become(self._without(gone), None)

    def _without(self, gone: Iterable[str]) -> list[_Edit]:
        names = set(gone)
        return [edit for edit in self._edits if edit.fact.id not in names]

    def _become(self, stay: Sequence[_Edit], facts: list[Fact] | None) -> None:
        """The edits that stay, and new ones."""
        if facts is not None:
            facts = check_facts(facts, known={edit.fact.id: edit.fact for edit in stay})
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.decoder.model)
        edits = [*stay, *self._with_keys(facts or [])]
        steps, codebook, made = self._walk(edits)
        missing = [edits[i] for i in made if edits[i].value is None]
        found = self._find_values([edit.fact for edit in missing])
        # Nothing below can fail.
        for edit, (value, loss) in zip(missing, found, strict=True):
            edit.value, edit.loss = value, loss
        self._settle(edits, steps, codebook, made)

    def _settle(
        self, edits: list[_Edit], steps: list[_Step], codebook: list[CodebookKey], made: list[int]
    ) -> None:
        self._edits, self._steps, self._codebook = edits, steps, codebook
        self._facts = {edit.fact.id: edit.fact for edit in edits}
        self._lay_out([edits[i] for i in made], [key.radius for key in codebook])

    def _walk(self, edits: Sequence[_Edit]) -> tuple[list[_Step], list[CodebookKey], list[int]]:
        """The rule, edit by edit: steps, keys, and which edit made each key."""
        steps: list[_Step] = []
        made: list[int] = []
        codebook: list[CodebookKey] = []
        keys = torch.empty(len(edits), self._inputs.size, dtype=torch.float64)
        for number, edit in enumerate(edits):
            key = edit.key.double()
            label, name = edit.fact.target, edit.fact.id
            distance, at = None, 0
            if made:
                distances = (keys[: len(made)] - key).norm(dim=1)
                at = int(distances.argmin())  # of equal ones the first
                distance = float(distances[at])
            near = codebook[at] if made else CodebookKey((), "", 0.0)
            action, radius, own = rule(distance, near.radius, near.label == label, self.eps)
            if made:
                codebook[at] = replace(near, radius=radius)
            if own is None:
                codebook[at] = replace(codebook[at], ids=(*near.ids, name))
            else:
                at = len(made)
                keys[at] = key
                made.append(number)
                codebook.append(CodebookKey((name,), label, own))
            steps.append(_Step(action, at, distance))
        return steps, codebook, made

    def _lay_out(self, edits: Sequence[_Edit], radii: Sequence[float]) -> None:
        """The tensors that the layer looks into; keys are centred, for the digits of distances."""
        device = self._site.weight.device
        f, d = self._site.key_size, self._site.value_size
        keys = torch.stack([e.key for e in edits]) if edits else torch.empty(0, f)
        values = [e.value for e in edits if e.value is not None]
        assert len(values) == len(edits), "every key has a value"
        self._values = (torch.stack(values) if values else torch.empty(0, d)).to(device)
        self._centre = keys.double().mean(0).float().to(device) if edits else keys.new_zeros(f)
        self._keys = keys.to(device) - self._centre.to(device)
        self._bias = -0.5 * self._keys.square().sum(1)
        self._radii = torch.tensor(list(radii), dtype=torch.float32, device=device)

    # --- keys and values ---

    def _encoded(self, facts: Sequence[Fact]) -> list[Encoded]:
        rows = [(fact.text, None, fact.target) for fact in facts]
        return encode_many(self.tokenizer, rows, separator=[fact.separator for fact in facts])

    def _with_keys(self, facts: Sequence[Fact]) -> list[_Edit]:
        if not facts:
            return []
        rows = [e.prompt for e in self._encoded(facts)]
        keys = self._at_end(rows).float().cpu()
        for fact, key in zip(facts, keys, strict=True):
            if not bool(key.isfinite().all()):
                raise NonFiniteError(
                    f"the key of {fact.text!r} at block {self.layer} holds NaN or infinity: look "
                    "at the weights of the model"
                )
        return [_Edit(fact, key.clone()) for fact, key in zip(facts, keys, strict=True)]

    def _find_values(self, facts: Sequence[Fact]) -> list[tuple[Tensor, float]]:
        found: list[tuple[Tensor, float]] = []
        for start in range(0, len(facts), self.batch):
            with self._pause(), Evaluating(self.decoder.model):
                found += self._find_batch(facts[start : start + self.batch])
        return found

    def _find_batch(self, facts: Sequence[Fact]) -> list[tuple[Tensor, float]]:
        """Values, float32 on the CPU, and the loss with each: rows do not see one another."""
        encoded = self._encoded(facts)
        device = self.decoder.device
        read = [e.ids[:-1] for e in encoded]
        inputs = padded_inputs(read, side="right", pad=self._pad, device=device)
        places: list[tuple[int, int, int, float]] = []
        for i, e in enumerate(encoded):
            places += [(i, at - 1, e.ids[at], 1 / len(e.targets)) for at in e.targets]
        row, column, target = (
            torch.tensor([p[i] for p in places], device=device) for i in range(3)
        )
        share = torch.tensor([p[3] for p in places], device=device)
        at = torch.tensor([e.targets.start - 1 for e in encoded], device=device)
        every = torch.arange(len(facts), device=device)
        outputs: list[Tensor] = []
        hook = self._site.module.register_forward_hook(
            lambda _, __, output: outputs.append(output.detach())
        )
        try:
            with torch.no_grad():
                hidden = self.decoder.run(inputs, 0, self.layer + 1)
        finally:
            hook.remove()
        given = outputs[0].reshape(hidden.shape)[every, at]
        rest = hidden[every, at].float() - self._site.contribution(given).float()
        head = head_of(self.decoder.model)

        def losses(value: Tensor) -> Tensor:
            there = rest + self._site.contribution(value.to(given.dtype)).float()
            changed = hidden.index_put((every, at), there.to(hidden.dtype))
            states = self.decoder.run_to_head(inputs, self.layer + 1, hidden=changed)
            keywords = head.keywords(states[row, column])
            logprobs = cast(Tensor, token_logprobs(ids=target, **keywords)).float()
            return torch.zeros(len(facts), device=device).index_add(0, row, -logprobs * share)

        if self.init == "cold":
            value = torch.stack([self._cold(fact) for fact in facts]).to(device)
        else:
            value = given.float().clone()
        value.requires_grad_(True)
        adam = torch.optim.Adam([value], lr=self.lr)
        for _ in range(self.steps):
            with torch.enable_grad():
                (value.grad,) = torch.autograd.grad(losses(value).sum(), value)
            adam.step()
        with torch.no_grad():
            last = losses(value)
        value = value.detach().cpu()
        for fact, number, v in zip(facts, last.tolist(), value, strict=True):
            if not (bool(v.isfinite().all()) and number == number):
                raise NonFiniteError(
                    f"the value of {fact.text!r} is not finite after {self.steps} steps: the "
                    f"model's own numbers are not finite there, or lr={self.lr} is too large"
                )
        return [(v.clone(), float(x)) for v, x in zip(value, last, strict=True)]

    def _cold(self, fact: Fact) -> Tensor:
        words = f"{self.seed} {fact.statement}".encode()
        number = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
        generator = torch.Generator().manual_seed(number >> 1)
        return torch.rand(self._site.value_size, generator=generator)

    # --- in the model ---

    def _hooks(self) -> list[Any]:
        return [self._site.module.register_forward_hook(self._answer)]

    def _answer(self, _: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """The hook of the layer."""
        if not len(self._radii):
            return None
        within, index, _distance = self._look_up(args[0].detach())
        if output.device.type == "cpu" and not bool(within.any()):
            return None
        value = self._values[index.clamp_min(0)].to(output.dtype).view_as(output)
        return torch.where(within.view(output.shape[:-1]).unsqueeze(-1), value, output)

    def _look_up(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per token, in one row: whether it is within the radius of its nearest key, which key
        that is, and how far away."""
        if self._keys.device != seen.device:
            for name in ("_keys", "_values", "_centre", "_bias", "_radii"):
                setattr(self, name, getattr(self, name).to(seen.device))
        flat = seen.reshape(-1, seen.size(-1)).float() - self._centre
        _, index = nearest_key(flat, self._keys, self._bias)
        if not len(self._radii):
            return torch.zeros_like(index, dtype=torch.bool), index, flat.new_zeros(len(index))
        at = index.clamp_min(0)
        # The score would lose the digits of a small distance between large vectors.
        distance = (flat - self._keys[at]).norm(dim=1)
        radius = self._radii[at]
        # A comparison with NaN is false; a radius of 0 has the key itself within.
        return (index >= 0) & (distance <= radius + SLACK * radius.abs()), index, distance

    # --- what it does ---

    def within(self, texts: Sequence[str]) -> list[list[Within]]:
        """Which tokens of each text are answered by the codebook."""
        return [
            [Within(position, self._codebook[key].ids, d) for position, key, d in hits]
            for hits in self._hits(texts)
        ]

    def report(self) -> dict[str, Any]:
        """What the facts did, and what became of the codebook.

        Returns:
            facts, keys, layer, bytes; `edits` by id: action, key (its number), distance to the
            nearest key when the fact came, and, of those that made a key, the final loss.
        """
        edits = {}
        for edit, step in zip(self._edits, self._steps, strict=True):
            edits[edit.fact.id] = {
                "action": step.action,
                "key": step.key,
                "distance": step.distance,
                "loss": edit.loss if step.action in ("add", "split") else None,
            }
        return {
            "facts": len(self._edits),
            "keys": len(self._codebook),
            "layer": self.layer,
            "bytes": self._keys.nbytes + self._values.nbytes,
            "edits": edits,
        }

    # --- files ---

    def save(self, path: str | Path) -> None:
        """Writes the codebook, its facts, and which model it is for.

        Raises:
            ValueError: it is empty.
            OutputError: the file cannot be written.
        """
        about = self._about()
        valued = [i for i, edit in enumerate(self._edits) if edit.value is not None]
        tensors = {
            "keys": torch.stack([edit.key for edit in self._edits]),
            "values": torch.stack([cast(Tensor, self._edits[i].value) for i in valued]),
        }
        about |= {
            "eps": self.eps,
            "steps": self.steps,
            "lr": self.lr,
            "init": self.init,
            "valued": [[i, self._edits[i].loss] for i in valued],
        }
        write_memory(path, self._format, tensors, about)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: Any) -> Grace:
        """Reads a codebook that was saved.

        Args:
            path: of the file.
            model: the one that it was made for; its weights are compared.
            tokenizer: that of the model.

        Raises:
            CheckpointError: it is not such a file, is damaged, or is for another model or
                tokenizer.
        """
        with cls._opened(path, model, tokenizer) as (tensors, about):
            options = ("layer", "eps", "steps", "lr", "init", "batch", "seed")
            made = cls(model, tokenizer, **{name: about[name] for name in options})
            facts = [fact_of(given, "facts") for given in about["facts"]]
            size = (len(facts), made._site.key_size)
            if tensors["keys"].shape != size:
                raise ValueError(f"keys of the shape {list(size)} were expected")
            edits = [_Edit(f, key.clone()) for f, key in zip(facts, tensors["keys"], strict=True)]
            for (i, loss), value in zip(about["valued"], tensors["values"], strict=True):
                edits[i].value, edits[i].loss = value.clone(), loss
            steps, codebook, keys = made._walk(edits)
            if any(edits[i].value is None for i in keys):
                raise ValueError("a key has no value")
        made._settle(edits, steps, codebook, keys)
        made._fingerprint = about["model"]
        return made
