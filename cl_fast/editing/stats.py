"""What the keys of a model look like: second moments of the inputs of its down-projections.

    C = (1/N) sum_t k_t k_t^T     k_t [f]: what the down-projection of a block is given at token t

    stats = KeyStats.collect(model, tokenizer, texts=my_texts, layers=[4, 5, 6])
    stats.save("stats")
    stats = KeyStats.load("stats", model)
    prior = stats.prior(4)                     # C0 = 15000 C, for the solver

MEMIT (Meng et al. 2023, arXiv 2210.07229) asks with C what it would cost to change the answer to
keys of ordinary text; AlphaEdit (2410.02355) takes its null space. C is not centred. One pass over
the texts serves all layers and ends after the deepest one: no logits are made. Products are summed
in float32 over blocks of tokens and in float64 over the blocks (`cl_fast.ops.gram_`); padded tokens
do not count.

A folder of statistics holds `moments.safetensors`: of every layer the sum of k k^T, its part on and
above the diagonal, row by row; and `factors/`, where `prior(..., keep_factors=True)` leaves what is
expensive to compute.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from cl_fast.checkpoints.safetensors import Header, build_header, read_header, strict_json
from cl_fast.checkpoints.writing import write_whole
from cl_fast.editing.presets import preset_of
from cl_fast.editing.rows import padded_inputs
from cl_fast.editing.solver import CholeskyPrior, NullSpace, Precision, Prior, mirror_upper_
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError
from cl_fast.losses.cache import model_fingerprint
from cl_fast.models.blocks import Decoder, Site, decoder_of
from cl_fast.models.heads import Evaluating
from cl_fast.ops.low_rank import gram_
from cl_fast.options import at_least, integer, not_negative, one_of, positive

__all__ = ["KeyStats"]

FORMAT, VERSION = "cl_fast.key_stats", 1
MOMENTS, FACTORS = "moments.safetensors", "factors"
SHRINKAGE = 1e-3
"""Of tr(C) / f, added to the diagonal where fewer tokens than f were seen."""
_MOST_LENGTH, _SAMPLE_LENGTH, _SAMPLES = 1024, 256, 64
_WINDOW = 16
"""Batches that are read ahead and sorted by length."""
_DTYPES = {"float32": ("F32", "<f4"), "float64": ("F64", "<f8")}

Kind = Literal["covariance", "nullspace"]


@dataclass(frozen=True)
class _Layer:
    """A layer's name and the sum of k k^T: [f (f + 1) / 2], float64, or float32 from a file."""

    name: str
    size: int
    packed: Tensor


class KeyStats:
    """Second moments of the keys of some layers of one model; see the module.

    Attributes:
        layers: indices of the blocks, ascending.
        names: the name of the down-projection of each of them.
        tokens: how many keys were summed per layer.
        model: the fingerprint of the model.
        any_model: `check` lets every model pass whose layers have these names and sizes.
        folder: where it was saved or loaded, or None.
    """

    def __init__(
        self, model: str, tokens: int, layers: Mapping[int, _Layer], *, any_model: bool = False
    ) -> None:
        self.model, self.tokens, self.any_model = model, tokens, any_model
        self.folder: Path | None = None
        self._layers = dict(sorted(layers.items()))
        self._contents: dict[int, str] = {}
        self._priors: dict[tuple[Any, ...], CholeskyPrior] = {}
        self._spectra: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._layers)

    @property
    def names(self) -> dict[int, str]:
        return {i: layer.name for i, layer in self._layers.items()}

    def __repr__(self) -> str:
        return f"KeyStats(layers={list(self.layers)}, {self.tokens} tokens, {self.model[:8]})"

    def size(self, layer: int) -> int:
        """f, the width of a layer's keys."""
        return self._layer(layer).size

    # --- collecting ---

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        texts: Iterable[str] | Literal["self"],
        layers: Sequence[int] | Literal["auto"] | None = "auto",
        tokens: int = 150_000,
        batch_tokens: int = 8192,
        max_length: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        progress: bool = False,
    ) -> KeyStats:
        """One pass over texts.

        Special tokens that the tokenizer adds count like others. Texts longer than `max_length` are
        cut into pieces, each with what the tokenizer puts in front of a text. The last piece is cut
        so that `tokens` is met exactly, if there is enough text.

        texts="self" needs no text: the model continues its own BOS token (EOS where there is none,
        random tokens where there is neither) by samples from its whole distribution, up to EOS. The
        samples depend on `seed`, the model and the device, not on the global random state.

        Args:
            model: of transformers; also within DDP. Its weights and modes are left as they are.
            tokenizer: called with a text; may be None for texts="self".
            texts: strings, read once and only as far as needed; or "self".
            layers: "auto": those of MEMIT's preset; None: all; or indices of blocks, negative ones
                from the end. Every layer takes 8 f^2 bytes on the device while it lasts, and half
                of that in memory afterwards.
            tokens: keys to be summed.
            batch_tokens: tokens of a forward pass, padding included.
            max_length: tokens of a text, at most; by default what the model allows, but not more
                than 1024, and 256 for texts="self".
            seed: of the samples of texts="self".
            dtype: of the sums, float64 or float32.
            progress: show a bar.

        Raises:
            TypeError: an argument, or a text, is of another kind.
            ValueError: an argument is out of range; a layer is no dense MLP (see `decoder_of`); the
                texts have no tokens.
            NonFiniteError: a key has NaN or infinity; the message names the layer.
        """
        _check_options(tokens, batch_tokens, max_length, seed, dtype)
        if isinstance(texts, str) and texts != "self":
            raise TypeError(
                f"texts must be an iterable of strings, or 'self'; got one string, {texts[:40]!r}"
            )
        decoder = decoder_of(model)
        sites = _sites(decoder, layers)
        if dtype != torch.float64 and any(site.weight.dtype == torch.float64 for site in sites):
            raise ValueError("dtype must be float64 for a model in float64")
        own = isinstance(texts, str)
        longest = _longest(decoder, max_length, own)
        with Evaluating(decoder.model), torch.no_grad():
            if own:
                pieces = _samples(decoder, tokenizer, longest, seed)
            else:
                pieces = _pieces(tokenizer, texts, longest)
            sums, count = _sum(decoder, sites, pieces, tokens, batch_tokens, dtype, progress)
        if not count:
            raise ValueError("texts must have tokens; there were none")
        f = max(site.key_size for site in sites)
        if count < f:
            warnings.warn(
                f"{count} tokens were seen, keys have {f} entries: C is rank-deficient. The "
                f"covariance prior will add {SHRINKAGE:g} of its mean diagonal, and the null space "
                f"will hold what was not seen for free. Some {10 * f} tokens are recommended",
                stacklevel=2,
            )
        found = {
            site.layer: _Layer(site.name, site.key_size, _packed(total))
            for site, total in zip(sites, sums, strict=True)
        }
        return cls(model_fingerprint(decoder.model), count, found)

    # --- whose they are ---

    def check(self, model: nn.Module, any_model: bool = False) -> None:
        """Raise unless they are of this model.

        Args:
            any_model: its layers need only have the same names and sizes.

        Raises:
            ValueError: naming what differs, and what to do.
        """
        decoder = decoder_of(model)
        for i, layer in self._layers.items():
            site = decoder.site(i) if i < len(decoder) else None
            if site is None or (site.name, site.key_size) != (layer.name, layer.size):
                has = "has no such block" if site is None else f"has {site.name}, {site.key_size}"
                raise ValueError(
                    f"the statistics are of another architecture: block {i} is {layer.name} with "
                    f"keys of {layer.size}; the model {has}. Collect them with this model"
                )
        if any_model or self.any_model:
            return
        found = model_fingerprint(decoder.model)
        if found != self.model:
            raise ValueError(
                f"the statistics are of another model: fingerprint {self.model}, this one has "
                f"{found}. If a patch is applied to it, undo that first; if it is the same model "
                "in another dtype, or a close relative, load them with any_model=True; otherwise "
                "collect them anew with KeyStats.collect(model, ...)"
            )

    def identity(self, layer: int) -> str:
        """A hash of a layer's sums, to the precision of float32, and of the count.

        So it is the same before and after they were saved.
        """
        found = self._layer(layer)
        if layer not in self._contents:
            digest = blake2b(f"{found.size} {self.tokens} ".encode(), digest_size=16)
            for part in found.packed.split(1 << 22):
                digest.update(_bytes(part.to(torch.float32).numpy().astype("<f4")))
            self._contents[layer] = digest.hexdigest()
        return self._contents[layer]

    def _layer(self, layer: int) -> _Layer:
        if layer not in self._layers:
            raise ValueError(f"layer must be one of {list(self.layers)}; got {layer!r}")
        return self._layers[layer]

    def __add__(self, other: object) -> KeyStats:
        """Both together, as if collected in one pass.

        Raises:
            ValueError: they are of different models, or of different layers.
        """
        if not isinstance(other, KeyStats):
            return NotImplemented
        if self.model != other.model:
            raise ValueError(
                f"only statistics of one model add up: these are of {self.model} and {other.model}"
            )
        if self._shape() != other._shape():
            raise ValueError(
                f"only statistics of the same layers add up: these have {self.names} and "
                f"{other.names}"
            )
        layers = {
            i: _Layer(a.name, a.size, a.packed.double() + other._layers[i].packed.double())
            for i, a in self._layers.items()
        }
        any_model = self.any_model or other.any_model
        return KeyStats(self.model, self.tokens + other.tokens, layers, any_model=any_model)

    def _shape(self) -> list[tuple[int, str, int]]:
        return [(i, layer.name, layer.size) for i, layer in self._layers.items()]

    # --- what they are for ---

    def moment(self, layer: int, device: torch.device | str = "cpu") -> Tensor:
        """C = sum k k^T / tokens: [f, f], float64, a new tensor.

        Raises:
            ValueError: there is no such layer.
        """
        found = self._layer(layer)
        C = torch.empty(found.size, found.size, dtype=torch.float64)
        start = 0
        for i in range(found.size):
            row = found.packed[start : start + found.size - i]
            C[i, i:] = row
            start += row.numel()
        mirror_upper_(C)
        return C.div_(self.tokens).to(device)

    def prior(
        self,
        layer: int,
        kind: Kind = "covariance",
        weight: float = 15000.0,
        *,
        shrinkage: float | None = None,
        threshold: float | None = None,
        energy: float | None = None,
        l2: float = 10.0,
        precision: Precision = "float64",
        device: torch.device | str = "cpu",
        keep_factors: bool = False,
    ) -> Prior:
        """The solver's prior of a layer.

        The factor of C, or its eigenvectors, are computed once and kept in memory (`forget` lets
        them go): another weight, threshold, energy or l2 costs nothing.

        Args:
            layer: one of `layers`.
            kind: "covariance" is C0 = weight C (MEMIT), "nullspace" C0^-1 = P / l2 (AlphaEdit).
            weight: MEMIT's lambda: how much the keys of ordinary text count beside a fact.
            shrinkage: this share of tr(C) / f is added to C's diagonal. None: 0 where at least f
                tokens were seen, else 1e-3, since directions that were never seen would be free.
            threshold, energy, l2: see `NullSpace`.
            precision: see `CholeskyPrior`.
            device: where the prior is to be: that of the keys.
            keep_factors: also in the folder of the statistics, f (f + 1) / 2 or f^2 numbers of 8
                bytes, where later processes find them. They must have been saved or loaded.

        Raises:
            ValueError: an argument is out of range, or has no meaning for this kind; there is no
                folder to keep factors in; C is indefinite.
            CheckpointError: a kept factor does not belong to these statistics, or is damaged.
        """
        one_of("kind", kind, ("covariance", "nullspace"))
        found = self._layer(layer)
        place = torch.device(device)
        if kind == "nullspace":
            for name, value, default in (
                ("shrinkage", shrinkage, None), ("precision", precision, "float64"),
                ("weight", weight, 15000.0),
            ):  # fmt: skip
                if value != default:
                    raise ValueError(f"{name} has no effect with kind='nullspace'; leave it out")
            if self.tokens < found.size:
                warnings.warn(
                    f"the null space of {found.name} holds every direction that {self.tokens} "
                    f"tokens did not show, of {found.size}: collect more tokens",
                    stacklevel=2,
                )
            values, vectors = self._spectrum(layer, place, keep_factors)
            return NullSpace.from_eigenvectors(
                values, vectors, threshold=threshold, energy=energy, l2=l2, name=found.name,
                identity=self.identity(layer),
            )  # fmt: skip
        for name, value, default in (
            ("threshold", threshold, None), ("energy", energy, None), ("l2", l2, 10.0)
        ):  # fmt: skip
            if value != default:
                raise ValueError(f"{name} has no effect with kind='covariance'; leave it out")
        positive("weight", weight)
        if shrinkage is None:
            shrinkage = 0.0 if self.tokens >= found.size else SHRINKAGE
        not_negative("shrinkage", shrinkage)
        one_of("precision", precision, ("float64", "mixed"))
        if keep_factors and precision == "mixed":
            raise ValueError("keep_factors=True keeps float64 factors; leave precision out")
        key = (layer, float(shrinkage), precision, place)
        identity = _hashed(self.identity(layer), float(shrinkage).hex())
        path = self._factor_path(keep_factors, kind, layer, identity)
        if key not in self._priors:
            self._priors[key] = self._factorised(*key, path, identity)
        if path is not None and not path.exists():
            prior = self._priors[key]
            more = {"relative_jitter": prior.relative_jitter.hex()}
            size = found.size * (found.size + 1) // 2
            _keep(path, "cholesky", identity, {"factor": ((size,), list(prior.rows()))}, more)
        return self._priors[key].reweighted(weight)

    def forget(self) -> None:
        """Let go of the factors in memory."""
        self._priors.clear()
        self._spectra.clear()

    def _factor_path(self, keep: bool, kind: Kind, layer: int, identity: str) -> Path | None:
        """Where the factors of a layer are or shall be; None where they are not, and shall not."""
        if self.folder is None:
            if keep:
                raise ValueError(
                    "keep_factors=True needs a folder: save the statistics first, or load them"
                )
            return None
        name = f"{kind}-{layer:03d}-{identity[:8]}.safetensors"
        path = self.folder / FACTORS / name
        return path if keep or path.exists() else None

    def _factorised(
        self,
        layer: int,
        shrinkage: float,
        precision: Precision,
        device: torch.device,
        path: Path | None,
        identity: str,
    ) -> CholeskyPrior:
        found = self._layer(layer)
        C = self.moment(layer, device)
        C.diagonal().add_(shrinkage * C.diagonal().mean())
        if path is None or not path.exists() or precision == "mixed":
            return CholeskyPrior(
                C, name=found.name, precision=precision, overwrite=True, identity=identity
            )
        kept = _kept(path, "cholesky", identity)
        factor = torch.from_numpy(kept.array("factor")).to(device)
        try:
            relative = float.fromhex(kept.header.metadata["relative_jitter"])
            return CholeskyPrior.from_factor(
                C, factor, relative_jitter=relative, name=found.name, identity=identity
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); delete the file") from error

    def _spectrum(self, layer: int, device: torch.device, keep: bool) -> tuple[Tensor, Tensor]:
        found, key, identity = self._layer(layer), (layer, device), self.identity(layer)
        path = self._factor_path(keep, "nullspace", layer, identity)
        if key not in self._spectra:
            C = self.moment(layer, device)
            if path is None or not path.exists():
                values, vectors = torch.linalg.eigh(C)
            else:
                kept = _kept(path, "eigenvectors", identity)
                f = found.size
                values = torch.from_numpy(kept.array("values", (f,))).to(device)
                vectors = torch.from_numpy(kept.array("vectors", (f, f))).to(device)
                p = torch.sin(torch.arange(1.0, f + 1, dtype=torch.float64)).to(device)
                off = (vectors @ (values * (vectors.mT @ p)) - C @ p).norm()
                if not float(off) <= 1e-8 * float(values.abs().max() * p.norm()):
                    raise CheckpointError(f"{path}: is damaged (not of C); delete the file")
            self._spectra[key] = values, vectors
        values, vectors = self._spectra[key]
        if path is not None and not path.exists():
            tensors = {
                "values": (tuple(values.shape), [values]),
                "vectors": (tuple(vectors.shape), list(vectors)),
            }
            _keep(path, "eigenvectors", identity, tensors, {})
        return values, vectors

    # --- on disk ---

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype | str = "float32") -> None:
        """Write `moments.safetensors` into a folder, whole or not at all.

        Args:
            folder: new, empty, or with these very statistics.
            dtype: float32 takes 2 f (f + 1) bytes per layer, and rounds entries by less than the
                noise of the texts; float64 twice as much, and nothing is rounded.

        Raises:
            ValueError: dtype is neither.
            OutputError: the folder holds something else, or cannot be written.
        """
        name = str(dtype).removeprefix("torch.")
        one_of("dtype", name, _DTYPES)
        path = Path(folder) / MOMENTS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            inside = {p.name for p in path.parent.iterdir()} - {FACTORS, MOMENTS + ".part"}
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror})") from error
        if MOMENTS in inside:
            self._refuse_other(path)
        elif inside:
            raise OutputError(f"{folder}: is not empty, and holds no statistics of keys")
        code, kind = _DTYPES[name]
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "model": self.model,
            "tokens": str(self.tokens),
            "layers": json.dumps([[i, x.name, x.size] for i, x in self._layers.items()]),
            "digests": json.dumps(
                [_digest_of(_parts(x.packed, kind)) for x in self._layers.values()]
            ),
        }
        shapes = [(f"layers.{i}", code, (x.packed.numel(),)) for i, x in self._layers.items()]
        header, _, _ = build_header(shapes, metadata)
        write_whole(path, _stream(header, [(x.packed, kind) for x in self._layers.values()]))
        self.folder = path.parent

    def _refuse_other(self, path: Path) -> None:
        try:
            other = KeyStats.load(path.parent)
        except CheckpointError as error:
            raise OutputError(f"{path}: is there and cannot be read ({error}); delete it") from None
        same = (self.model, self.tokens, self._shape()) == (
            other.model, other.tokens, other._shape()
        ) and all(self.identity(i) == other.identity(i) for i in self.layers)  # fmt: skip
        if not same:
            raise OutputError(
                f"{path.parent}: holds other statistics, {other}; save to another folder, or "
                "delete this one"
            )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module | None = None,
        any_model: bool = False,
    ) -> KeyStats:
        """What was saved. The sums stay on disk, mapped into memory.

        Args:
            folder: of `save`.
            model: refused unless they are of it; None: nothing is compared now.
            any_model: of any model with these layers, now and in every later `check`.

        Raises:
            CheckpointError: a file is missing, truncated or corrupted.
            ValueError: they are of another model.
        """
        path = Path(folder) / MOMENTS
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file; give a folder of KeyStats.save")
        stored = _Stored(read_header(path), FORMAT, "statistics of keys")
        tokens, listed = stored.value("tokens"), stored.value("layers")
        digests = stored.value("digests")
        layers = {}
        try:
            for (i, name, size), digest in zip(listed, digests, strict=True):
                packed = torch.from_numpy(stored.array(f"layers.{i}", (size * (size + 1) // 2,)))
                if _digest_of([_bytes(packed.numpy())]) != digest:
                    raise CheckpointError(
                        f"{path}: tensor 'layers.{i}' is corrupted, its data is not what was "
                        "written; collect and save them again"
                    )
                layers[int(i)] = _Layer(str(name), int(size), packed)
            made = cls(stored.header.metadata["model"], int(tokens), layers, any_model=any_model)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: its header is damaged; save them again") from None
        if not layers or made.tokens < 1:
            raise CheckpointError(f"{path}: holds no layers; save them again")
        made.folder = path.parent
        if model is not None:
            made.check(model)
        return made


# --- the pass ------------------------------------------------------------------------------------


def _check_options(
    tokens: int, batch_tokens: int, max_length: int | None, seed: int, dtype: torch.dtype
) -> None:
    at_least("tokens", tokens, 1)
    at_least("batch_tokens", batch_tokens, 1)
    if max_length is not None:
        at_least("max_length", max_length, 2)
    integer("seed", seed)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype; got {dtype!r}")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be float64 or float32; got {dtype}")


def _sites(decoder: Decoder, layers: Sequence[int] | str | None) -> list[Site]:
    if layers is None:
        chosen: Sequence[int] = range(len(decoder))
    elif isinstance(layers, str):
        one_of("layers", layers, ("auto",))
        chosen = preset_of(decoder, "memit").layers
    elif isinstance(layers, Sequence) and layers:
        chosen = [*layers]  # type: ignore[list-item, unused-ignore]
    else:
        raise ValueError(f"layers must be some indices of blocks, 'auto' or None; got {layers!r}")
    return decoder.sites(sorted({decoder.layer(i) for i in chosen}))


def _longest(decoder: Decoder, given: int | None, own: bool) -> int:
    allowed = getattr(decoder.config, "max_position_embeddings", None)
    allowed = int(allowed) if allowed else None
    if given is not None:
        if allowed is not None and given > allowed:
            raise ValueError(
                f"max_length must be at most {allowed}, the positions of the model; got {given}"
            )
        return given
    usual = _SAMPLE_LENGTH if own else _MOST_LENGTH
    return usual if allowed is None else min(usual, allowed)


def _pieces(tokenizer: Any, texts: Iterable[str], longest: int) -> Iterator[list[int]]:
    """Token ids of texts, cut into pieces that begin like texts."""
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be callable; got {type(tokenizer).__name__}")
    empty, some = _ids(tokenizer, ""), _ids(tokenizer, "a")
    # What is in front of every text; some tokenizers put an EOS behind, which is not meant.
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(empty, some, strict=False))
    start = [i for i, _ in same]
    if len(start) >= longest:
        raise ValueError(
            f"max_length must be more than the {len(start)} tokens that begin every text; got "
            f"{longest}"
        )
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] must be a string; got {type(text).__name__}")
        ids = _ids(tokenizer, text)
        if len(ids) <= len(empty):
            continue
        yield ids[:longest]
        step = longest - len(start)
        for at in range(longest, len(ids), step):
            yield [*start, *ids[at : at + step]]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text)["input_ids"]]


def _samples(decoder: Decoder, tokenizer: Any, longest: int, seed: int) -> Iterator[list[int]]:
    """What the model says by itself, without end."""
    model = decoder.model
    generator = torch.Generator(decoder.device).manual_seed(seed)
    vocabulary = int(model.get_input_embeddings().weight.size(0))
    begin, ends = _special(model, tokenizer)
    stop = torch.tensor(sorted(ends), device=decoder.device, dtype=torch.long)
    while True:
        if begin is None:
            ids = torch.randint(
                0, vocabulary, (_SAMPLES, 1), generator=generator, device=decoder.device
            )
        else:
            ids = torch.full((_SAMPLES, 1), begin, device=decoder.device)
        yield from _continued(model, ids, longest, stop, generator)


def _continued(
    model: Any, ids: Tensor, longest: int, stop: Tensor, generator: torch.Generator
) -> list[list[int]]:
    rows, cache, last = [ids], None, ids
    length = torch.full((len(ids),), longest, device=ids.device)
    with torch.no_grad():
        for position in range(1, longest):
            out = model(input_ids=last, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if not bool(torch.isfinite(logits).all()):
                raise NonFiniteError(
                    "the model's logits have NaN or infinity, so that it cannot be sampled from: "
                    "texts='self' needs a model that works; look at its weights and dtype"
                )
            last = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            rows.append(last)
            ended = torch.isin(last[:, 0], stop)
            length = torch.where(ended & (length == longest), position + 1, length)
            if bool((length <= position + 1).all()):
                break
    whole = torch.cat(rows, 1).cpu().tolist()
    return [row[:n] for row, n in zip(whole, length.tolist(), strict=True)]


def _special(model: Any, tokenizer: Any) -> tuple[int | None, set[int]]:
    """The token that begins a text, and those that end one."""
    configs = [getattr(model, "generation_config", None), getattr(model, "config", None)]
    places = [place for place in (tokenizer, *configs) if place is not None]

    def ids(name: str) -> list[int]:
        for place in places:
            value = getattr(place, name, None)
            if value is not None:
                return [int(i) for i in (value if isinstance(value, (list, tuple)) else [value])]
        return []

    ends = ids("eos_token_id")
    return next(iter([*ids("bos_token_id"), *ends]), None), set(ends)


def _batches(
    pieces: Iterator[list[int]], tokens: int, batch_tokens: int
) -> Iterator[list[list[int]]]:
    """Pieces of like lengths together, `tokens` in all; at most `batch_tokens` with padding."""
    left = tokens
    while left > 0:
        window: list[list[int]] = []
        held = 0
        while held < min(left, _WINDOW * batch_tokens):
            piece = next(pieces, None)
            if piece is None:
                break
            window.append(piece[: left - held])
            held += len(window[-1])
        if not window:
            return
        left -= held
        window.sort(key=len, reverse=True)
        while window:
            count = max(1, batch_tokens // len(window[0]))
            yield window[:count]
            window = window[count:]


def _sum(
    decoder: Decoder,
    sites: list[Site],
    pieces: Iterator[list[int]],
    tokens: int,
    batch_tokens: int,
    dtype: torch.dtype,
    progress: bool,
) -> tuple[list[Tensor], int]:
    """The sums of k k^T of all sites, and the number of keys."""
    devices = [site.weight.device for site in sites]
    sums = [
        torch.zeros(site.key_size, site.key_size, dtype=dtype, device=device)
        for site, device in zip(sites, devices, strict=True)
    ]
    stop = 1 + max(site.layer for site in sites)
    count = 0
    with tqdm(total=tokens, desc="statistics of keys", unit="token", disable=not progress) as bar:
        for number, batch in enumerate(_batches(pieces, tokens, batch_tokens), 1):
            # At the end, where causal attention does not see it.
            inputs = padded_inputs(batch, side="right", device=decoder.device)
            with _adding(sites, sums, inputs["attention_mask"].reshape(-1).bool()):
                decoder.run(inputs, 0, stop)
            _check_finite(sites, sums, number)
            count += sum(map(len, batch))
            bar.update(sum(map(len, batch)))
    return sums, count


@contextlib.contextmanager
def _adding(sites: list[Site], sums: list[Tensor], mask: Tensor) -> Iterator[None]:
    """Keys of the next forward pass are added to the sums."""
    seen = [0] * len(sites)

    def adding(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            keys = args[0].reshape(-1, args[0].size(-1))
            gram_(sums[i], keys, mask=mask.to(keys.device))
            seen[i] += 1

        return hook

    handles = [site.module.register_forward_pre_hook(adding(i)) for i, site in enumerate(sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for site, times in zip(sites, seen, strict=True):
        if times != 1:
            raise ValueError(
                f"{site.name} was called {times} times in a forward pass, not once; its keys "
                "cannot be told"
            )


def _check_finite(sites: list[Site], sums: list[Tensor], number: int) -> None:
    """A sum of squares shows what any key had."""
    for site, total in zip(sites, sums, strict=True):
        if not bool(torch.isfinite(total.diagonal().sum())):
            raise NonFiniteError(
                f"the keys of {site.name} (block {site.layer}) have NaN or infinity, or overflow, "
                f"in batch {number}: the model computes no numbers there. A model in float16 may "
                "need bfloat16 or float32"
            )


# --- packed triangles and files -------------------------------------------------------------------


def _packed(matrix: Tensor) -> Tensor:
    """The part on and above the diagonal, row by row: float64 on the CPU."""
    matrix = matrix.cpu()
    f = matrix.size(0)
    out = torch.empty(f * (f + 1) // 2, dtype=torch.float64)
    start = 0
    for i in range(f):
        out[start : start + f - i] = matrix[i, i:]
        start += f - i
    return out


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _parts(packed: Tensor, kind: str) -> Iterator[memoryview]:
    return (_bytes(part.numpy().astype(kind)) for part in packed.split(1 << 22))


def _digest_of(parts: Iterable[memoryview]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _stream(header: bytes, packed: list[tuple[Tensor, str]]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor, kind in packed:
        yield from _parts(tensor, kind)


def _hashed(*parts: str) -> str:
    return blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


class _Stored:
    """A safetensors file of ours, mapped into memory."""

    def __init__(self, header: Header, format: str, what: str) -> None:
        self.header, self._path = header, header.path
        if header.metadata.get("format") != format:
            raise CheckpointError(f"{header.path}: holds no {what}")
        if header.metadata.get("version") != str(VERSION):
            raise CheckpointError(
                f"{header.path}: has version {header.metadata.get('version')} of the format; this "
                f"cl_fast reads version {VERSION}"
            )

    def value(self, name: str) -> Any:
        if name not in self.header.metadata:
            raise CheckpointError(f"{self._path}: its header has no {name}; save it again")
        return strict_json(self.header.metadata[name].encode(), f"{self._path}: {name}")

    def array(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        info = self.header.tensors.get(name)
        kind = dict(_DTYPES.values()).get(info.dtype if info else "")
        if info is None or kind is None or (shape is not None and info.shape != shape):
            raise CheckpointError(f"{self._path}: has no tensor {name!r} as it should be")
        # Copy on write: torch warns of arrays that cannot be written.
        return np.memmap(self._path, kind, mode="c", offset=info.offset, shape=info.shape)


def _keep(
    path: Path,
    what: str,
    identity: str,
    tensors: Mapping[str, tuple[tuple[int, ...], list[Tensor]]],
    more: Mapping[str, str],
) -> None:
    """Factors in float64: the shape and the rows of each."""
    rows = [row for _, rows in tensors.values() for row in rows]
    about = {
        "format": f"{FORMAT}.{what}",
        "version": str(VERSION),
        "identity": identity,
        "digest": _digest_of(_bytes(row.cpu().numpy()) for row in rows),
        **more,
    }
    shapes = [(name, "F64", shape) for name, (shape, _) in tensors.items()]
    header, _, _ = build_header(shapes, about)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be made ({error.strerror})") from error
    write_whole(path, itertools.chain([header], (_bytes(row.cpu().numpy()) for row in rows)))


def _kept(path: Path, what: str, identity: str) -> _Stored:
    """A factor that an earlier call has left."""
    stored = _Stored(read_header(path), f"{FORMAT}.{what}", "factor of statistics of keys")
    if stored.header.metadata.get("identity") != identity:
        raise CheckpointError(f"{path}: belongs to other statistics; delete the file")
    data = [_bytes(stored.array(name)) for name in stored.header.tensors]
    if _digest_of(data) != stored.header.metadata.get("digest"):
        raise CheckpointError(
            f"{path}: is corrupted, its data is not what was written; delete the file, it will be "
            "computed again"
        )
    return stored
