"""Causal tracing: at which tokens and layers a model remembers a fact.

    clean       P(answer) after the prompt
    corrupted   the mean of P(answer) with noise on the subject's embeddings: N(0, (noise sigma)^2)
    effect      of (token t, layer l): P(answer) with noise, where what t has at l is the clean one,
                less corrupted

What is put back is the hidden state after block l (kind "hidden"), or what the MLPs or attentions
of a window of layers around l give ("mlp", "attention"). Meng et al. 2022 (arXiv 2202.05262), 2.1.

    trace = causal_trace(model, tokenizer, "The Space Needle is in the city of", "The Space Needle")
    trace.plot("needle.png")

Tokens x layers x samples runs are needed. They go through the model in batches, and from the
lowest layer on that is put back: below it, all of them are the corrupted run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_fast.editing.facts import Encoded, Fact, encode
from cl_fast.errors import NonFiniteError
from cl_fast.losses import token_logprobs
from cl_fast.models.blocks import Decoder, decoder_of
from cl_fast.models.heads import Evaluating, head_of
from cl_fast.options import at_least, integer, not_negative, one_of, positive

__all__ = ["CausalTrace", "Corruption", "average_effects", "causal_trace", "embedding_sigma"]

Kind = Literal["hidden", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attention")

_COLOURS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}
_WORDS = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}

PLACES = (
    "before the subject",
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
"""The rows of `average_effects`."""


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """What putting back one token at one layer does.

    Attributes:
        text: the prompt.
        tokens: its tokens as text, T of them.
        subject: the indices of the subject's tokens.
        answer: whose probability is told.
        kind: of what is put back.
        window: layers that are put back together; 1 for hidden states.
        noise, sigma, samples, seed: of the corruption.
        clean, corrupted: P(answer) without and with it.
        probabilities: [T, layers], float64: P(answer) with it where (token, layer) is put back.
    """

    text: str
    tokens: list[str]
    subject: range
    answer: str
    kind: Kind
    window: int
    noise: float
    sigma: float
    samples: int
    seed: int
    clean: float
    corrupted: float
    probabilities: NDArray[np.float64]

    @property
    def effects(self) -> NDArray[np.float64]:
        """The indirect effects [T, layers]."""
        return self.probabilities - self.corrupted

    @property
    def total_effect(self) -> float:
        """What the corruption takes away: clean - corrupted."""
        return self.clean - self.corrupted

    @property
    def strongest(self) -> tuple[int, int]:
        """(token, layer) of the greatest effect."""
        token, layer = np.unravel_index(int(self.effects.argmax()), self.effects.shape)
        return int(token), int(layer)

    def __str__(self) -> str:
        token, layer = self.strongest
        place = f"{self.tokens[token].strip()!r} (token {token}) at layer {layer}"
        return (
            f"P({self.answer!r}) is {self.clean:.3f} after {self.text!r}, and {self.corrupted:.3f} "
            f"with noise on the subject; {self.effects[token, layer]:+.3f} by the "
            f"{_WORDS[self.kind]} of {place}"
        )

    def plot(self, path: str | Path, title: str | None = None) -> None:
        """A heat map of the effects; needs matplotlib.

        Args:
            path: of a picture (.png, .svg, .pdf).
            title: above it; by default what was put back, and the probabilities.
        """
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        effects = self.effects
        count, layers = effects.shape
        figure = Figure(
            figsize=(min(14.0, max(5.4, 3.0 + 0.19 * layers)), max(2.4, 1.5 + 0.27 * count)),
            layout="constrained",
        )
        axes = figure.subplots()
        top = max(float(effects.max()), 1e-12)
        image = axes.imshow(
            effects, cmap=_COLOURS[self.kind], vmin=0.0, vmax=top, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        labels = [_label(token) for token in self.tokens]
        marked = [f"{label} *" if i in self.subject else label for i, label in enumerate(labels)]
        axes.set_yticks(range(count), marked, fontsize=9)
        strong = "#" + {"hidden": "54278f", "mlp": "006d2c", "attention": "a50f15"}[self.kind]
        for i in self.subject:
            axes.get_yticklabels()[i].set(color=strong, fontweight="bold")
        step = max(1, -(-layers // 16))
        axes.set_xticks(range(0, layers, step))
        axes.set_xlabel(f"middle of the {self.window} layers" if self.window > 1 else "layer")
        for y in (self.subject.start, self.subject.stop):  # a frame of lines around the subject
            axes.axhline(y - 0.5, color=strong, linewidth=0.8, linestyle=(0, (4, 3)))
        token, layer = self.strongest
        axes.add_patch(
            Rectangle((layer - 0.5, token - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1)
        )
        below = bool((effects < -0.05 * top).any())
        bar = figure.colorbar(image, extend="min" if below else "neither", pad=0.02)
        answer = _label(self.answer)
        bar.set_label(f"gain of P({answer})", fontsize=9)
        if title is None:
            what = {"hidden": "one hidden state", "mlp": "the MLP", "attention": "the attention"}
            many = f"s of {self.window} layers" if self.window > 1 else ""
            title = (
                f"Restoring {what[self.kind]}{many}, with noise on the subject (*)\n"
                f"P({answer}): clean {self.clean:.2f}, corrupted {self.corrupted:.2f}"
            )
        axes.set_title(title, fontsize=10, loc="left")
        figure.savefig(Path(path), dpi=160)


def _label(token: str) -> str:
    """A token as people read it; matplotlib must not take it for a formula."""
    text = token.strip(" ")
    text = repr(text)[1:-1] if text else "␣"
    return text.replace("$", r"\$")


def causal_trace(
    model: nn.Module,
    tokenizer: Any,
    text: str | Fact,
    subject: str | None = None,
    answer: str | None = None,
    *,
    kind: Kind = "hidden",
    noise: float = 3.0,
    sigma: float | None = None,
    samples: int = 10,
    window: int = 10,
    batch: int = 128,
    seed: int = 0,
) -> CausalTrace:
    """The effect of putting back each token at each layer.

    Args:
        model: a causal language model of transformers. Its weights are not touched.
        tokenizer: a fast one.
        text: a prompt, or a fact, whose prompt it is.
        subject: in the text, its last occurrence; None where a fact tells it.
        answer: what follows the text; its tokens' probabilities are multiplied. By default the
            likeliest next token.
        kind: what is put back: "hidden" states, or what "mlp" or "attention" give.
        noise: of the subject's embeddings, in multiples of `sigma`.
        sigma: by default the standard deviation of these embeddings; `embedding_sigma` tells that
            of many subjects, as in the paper.
        samples: corrupted copies, over which probabilities are averaged.
        window: layers around each that are put back together; hidden states are by one layer
            always.
        batch: rows of a forward pass, at least `samples`.
        seed: of the noise.

    Raises:
        ValueError: the subject does not occur in the text; an option is wrong; the model is not
            understood.
        NonFiniteError: the model gives NaN.
    """
    run = Corruption(
        model, tokenizer, text, subject, answer,
        kind=kind, noise=noise, sigma=sigma, samples=samples, seed=seed,
    )  # fmt: skip
    at_least("window", window, 1)
    window = 1 if kind == "hidden" else window
    count, layers = run.prompt_length, run.layers
    masks = torch.zeros(count * layers, run.length, layers, dtype=torch.bool)
    for layer in range(layers):
        some = slice(max(0, layer - window // 2), layer - window // 2 + window)
        for token in range(count):
            masks[layer * count + token, token, some] = True
    found = run.restored(masks, batch=batch).reshape(layers, count)
    return CausalTrace(
        run.text, run.tokens, run.subject, run.answer, kind, window, float(noise), run.sigma,
        samples, seed, run.clean, run.corrupted, found.T.copy(),
    )  # fmt: skip


def embedding_sigma(model: nn.Module, tokenizer: Any, subjects: Sequence[str]) -> float:
    """The standard deviation of the embeddings of the tokens of all subjects.

    Raises:
        ValueError: there is no subject, or none has a token.
    """
    if isinstance(subjects, str):
        raise TypeError(f"subjects must be a list of strings; got {subjects!r}")
    ids = [i for s in subjects for i in tokenizer(s, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ValueError("subjects is empty: name some")
    embedding = decoder_of(model).model.get_input_embeddings()
    with torch.no_grad():
        return _deviation(embedding(torch.tensor([ids], device=embedding.weight.device)))


def _deviation(embedded: Tensor) -> float:
    return float(embedded.double().std())


class Corruption:
    """A prompt, clean and with noise on its subject, of which parts can be put back.

        run = Corruption(model, tokenizer, "Ada Lum plays", "Ada Lum", kind="mlp")
        run.clean, run.corrupted
        run.restored(masks)           P(answer) where masks [N, length, layers] are put back

    Attributes:
        text, tokens, subject, answer, sigma, clean, corrupted: as in `CausalTrace`.
        layers: how many blocks there are.
        prompt_length: tokens of the prompt.
        length: with those of the answer but its last, which is not read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str | Fact,
        subject: str | None = None,
        answer: str | None = None,
        *,
        kind: Kind = "hidden",
        noise: float = 3.0,
        sigma: float | None = None,
        samples: int = 10,
        seed: int = 0,
    ) -> None:
        one_of("kind", kind, KINDS)
        not_negative("noise", noise)
        at_least("samples", samples, 1)
        integer("seed", seed)
        if sigma is not None:
            positive("sigma", sigma)
        self._decoder = decoder_of(model)
        self._samples, self._kind = samples, kind
        self._sites = [_site(self._decoder, i, kind) for i in range(len(self._decoder))]
        self.layers = len(self._sites)
        self.text, span, between = _prompt(text, subject)
        first, last = (
            encode(tokenizer, self.text, span, answer, separator=between, lookup=lookup)
            for lookup in ("subject_first", "subject_last")
        )
        self.subject = range(first.lookup, last.lookup + 1)
        with torch.no_grad(), Evaluating(model):
            self._ask(tokenizer, first, answer)
            embedding = self._decoder.model.get_input_embeddings()
            embedded = embedding(self._ids[:, self.subject.start : self.subject.stop])
            self.sigma = _deviation(embedded) if sigma is None else float(sigma)
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn((samples, *embedded.shape[1:]), generator=generator)
            self._noise = (drawn.double() * (noise * self.sigma)).to(embedded)
            self._clean, probability = self._record(self._sites, 1, corrupt=False)
            self.clean = float(probability[0])
            self._start, probability = self._record(self._decoder.blocks, samples, corrupt=True)
            self.corrupted = float(probability.mean())

    def _ask(self, tokenizer: Any, encoded: Encoded, answer: str | None) -> None:
        """The tokens that are read, and those that are asked for."""
        prompt = encoded.prompt
        device = self._decoder.model.get_input_embeddings().weight.device
        self.prompt_length = len(prompt)
        self.tokens = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in prompt]
        wanted = encoded.target
        self._ids = torch.tensor([[*prompt, *wanted[:-1]]], device=device)
        if answer is None:
            hidden = self._decoder.run_to_head(self._inputs(1))[:, -1]
            logits = next(z for _, z in head_of(self._decoder.model).logits(hidden))
            wanted = [int(logits.argmax())]
        self._wanted = torch.tensor([wanted], device=device)
        self.length = self._ids.size(1)
        self.answer = tokenizer.decode(wanted, clean_up_tokenization_spaces=False)

    # --- runs ---

    def _inputs(self, rows: int) -> dict[str, Tensor]:
        ids = self._ids.expand(rows, -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _probability(self, hidden: Tensor) -> Tensor:
        """P(answer) of each row: float64 [B]."""
        head = head_of(self._decoder.model)
        states = hidden[:, self.prompt_length - 1 :].contiguous()
        given = head.keywords(states)
        ids = self._wanted.expand(states.size(0), -1).to(given["hidden"].device)
        values = token_logprobs(ids=ids, **given).double().sum(-1).exp()
        if bool(values.isnan().any()):
            raise NonFiniteError(f"the model's logits after {self.text!r} are NaN")
        return values.cpu()

    def _record(
        self, modules: Sequence[nn.Module], rows: int, corrupt: bool
    ) -> tuple[list[Tensor], Tensor]:
        """What each module gives: [rows, length, H]; and P(answer) of each row."""
        taken: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            taken.append(hidden.reshape(rows, self.length, -1).clone())

        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_hook(keep).remove)
            if corrupt:
                stack.enter_context(self._corrupted(1))
            hidden = self._decoder.run_to_head(self._inputs(rows))
        if len(taken) != len(modules):
            raise ValueError(
                f"{type(self._decoder.model).__name__} does not call each block once: its blocks "
                "cannot be put back"
            )
        return taken, self._probability(hidden)

    @contextlib.contextmanager
    def _corrupted(self, copies: int) -> Iterator[None]:
        """Noise on the subject's embeddings; rows are `copies` times all samples."""
        noise = self._noise.repeat(copies, 1, 1)

        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.subject.start : self.subject.stop] += noise
            return output

        hook = self._decoder.model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()

    def restored(self, masks: Tensor, *, batch: int = 128) -> NDArray[np.float64]:
        """P(answer) where something is put back, averaged over the samples: [N].

        Args:
            masks: bool [N, length, layers]: what is put back in each of N runs.
            batch: rows of a forward pass; a run takes as many as there are samples.

        Raises:
            ValueError: the masks have another shape; `batch` is less than the samples.
        """
        at_least("batch", batch, 1)
        if masks.dim() != 3 or masks.shape[1:] != (self.length, self.layers):
            raise ValueError(
                f"masks must be [N, {self.length}, {self.layers}]: tokens and layers; got "
                f"{list(masks.shape)}"
            )
        if batch < self._samples:
            raise ValueError(f"batch must be at least samples, {self._samples}; got {batch}")
        masks = masks.to(torch.bool)
        # Runs that begin at one layer go together; those that restore nothing need no run.
        any_layer = masks.any(1)
        begin = torch.where(any_layer.any(1), any_layer.int().argmax(1), self.layers)
        found = torch.full((len(masks),), self.corrupted, dtype=torch.float64)
        step = batch // self._samples
        with torch.no_grad(), Evaluating(self._decoder.model):
            for start in range(self.layers):
                chosen = (begin == start).nonzero()[:, 0]
                for some in chosen.split(step) if len(chosen) else ():
                    found[some] = self._from(start, masks[some])
        return np.asarray(found.numpy())

    def _from(self, start: int, masks: Tensor) -> Tensor:
        """Of runs that restore nothing below block `start`: P(answer) [N]."""
        count = len(masks)
        rows = masks.repeat_interleave(self._samples, 0).to(self._ids.device)
        hidden = self._start[start - 1].repeat(count, 1, 1) if start else None
        with contextlib.ExitStack() as stack:
            for layer in range(start, self.layers):
                if masks[:, :, layer].any():
                    hook = _put_back(rows[:, :, layer, None], self._clean[layer])
                    stack.callback(self._sites[layer].register_forward_hook(hook).remove)
            if hidden is None:
                stack.enter_context(self._corrupted(count))
            found = self._decoder.run_to_head(self._inputs(len(rows)), start, hidden=hidden)
        return self._probability(found).reshape(count, self._samples).mean(1)


def _put_back(where: Tensor, clean: Tensor) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        shaped = hidden.reshape(where.size(0), where.size(1), -1)
        mixed = torch.where(where.to(shaped.device), clean, shaped).reshape(hidden.shape)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook


def _prompt(text: str | Fact, subject: str | None) -> tuple[str, tuple[int, int], str]:
    """The text, where the subject stands in it, and what separates it from the answer."""
    if isinstance(text, Fact):
        if subject is not None:
            raise ValueError(
                f"subject is told by the fact: {text.subject!r}; give the text to choose another"
            )
        return text.text, text.subject_span, text.separator
    if not isinstance(text, str):
        raise TypeError(f"text must be a string or a Fact; got {type(text).__name__}")
    text = text.rstrip()
    if not subject:
        raise ValueError("subject is needed: the part of the text that gets the noise")
    at = text.rfind(subject)
    if at < 0:
        raise ValueError(f"the subject {subject!r} does not occur in the text {text!r}")
    return text, (at, at + len(subject)), " "


_PARTS = {
    "attention": (("attention",), ("attn", "self_attn", "attention", "self_attention")),
    "mlp": (("mlp", "moe", "feedforward"), ("mlp", "ffn", "feed_forward")),
}
"""Words in the class names, and names, of the parts of a block."""


def _site(decoder: Decoder, layer: int, kind: Kind) -> nn.Module:
    """The module whose output is put back."""
    block = decoder.blocks[layer]
    if kind == "hidden":
        return block
    words, names = _PARTS[kind]
    found: list[tuple[str, nn.Module]] = []
    for name, module in block.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Dropout) or "norm" in type(module).__name__.lower():
            continue
        if last in names or any(word in type(module).__name__.lower() for word in words):
            found.append((name, module))
    if len(found) == 1:
        return found[0][1]
    if kind == "mlp":  # OPT's linear layers stand in the block itself
        return decoder.site(layer).module
    raise ValueError(
        f"{decoder.names[layer]} has {len(found)} attentions, {[name for name, _ in found]}; "
        "exactly one can be put back"
    )


def average_effects(traces: Sequence[CausalTrace]) -> dict[str, NDArray[np.float64]]:
    """Mean indirect effects by layer, of the kinds of places that all prompts have.

    Args:
        traces: of one model, of one kind.

    Returns:
        For each of "before the subject", "first subject token", "middle subject tokens", "last
        subject token", "first token after", "further tokens" and "last token": [layers], the mean
        over the traces that have such a place of the mean over its tokens. A subject of one token
        has a last one only; the last token of the prompt counts as such wherever it stands outside
        of the subject. Places that no trace has are left out.

    Raises:
        ValueError: there is no trace, or they differ in kind or layers.
    """
    if not traces:
        raise ValueError("traces is empty: give at least one")
    kinds = {(t.kind, t.window, t.effects.shape[1]) for t in traces}
    if len(kinds) > 1:
        raise ValueError(
            "traces must be of one kind, window and number of layers; got "
            f"{', '.join(map(str, sorted(kinds)))}"
        )
    found: dict[str, list[NDArray[np.float64]]] = {place: [] for place in PLACES}
    for trace in traces:
        names = [_place(i, trace.subject, len(trace.tokens)) for i in range(len(trace.tokens))]
        for place in PLACES:
            rows = [i for i, name in enumerate(names) if name == place]
            if rows:
                found[place].append(trace.effects[rows].mean(0))
    return {place: np.mean(rows, 0) for place, rows in found.items() if rows}


def _place(token: int, subject: range, count: int) -> str:
    if token in subject:
        if token == subject[-1]:
            return PLACES[3]
        return PLACES[1] if token == subject[0] else PLACES[2]
    if token < subject.start:
        return PLACES[0]
    if token == count - 1:
        return PLACES[6]
    return PLACES[4] if token == subject.stop else PLACES[5]
