"""A teacher's k likeliest tokens for every position of a dataset, on disk.

    cache = TeacherCache.build(model, dataset, k=64, path="teacher", tokenizer=tokenizer)
    cache = TeacherCache.open("teacher", tokenizer=tokenizer)
    teacher = cache[0]                      # TopK of the first sequence
    train = cache.attach(dataset)           # its examples, with teacher_ids and teacher_logprobs

A teacher that is run once and read many times costs a training step nothing but the reading, and
need not fit beside the student. A position takes 4 k bytes where the vocabulary has at most 65,536
ids, else 6 k: an id of 16 or 32 bits and a log-probability of 16.

A folder holds `shard-00000.safetensors`, ... and `cache.json`, which is written last; while it is
being built there is `build.json` instead. Each shard is the k ids and log-probs of some sequences
in order, is written under another name and renamed when it is whole, and carries a digest of its
data. What a shard holds depends on dataset, model and options alone, so a build that was cut off
and called again goes on at the next shard, and its files have the bytes that they would have had.

Neither a shard nor its reader needs more than numpy and torch. The format is in
docs/teacher-cache.md.
"""

from __future__ import annotations

import json
import operator
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from cl_fast.checkpoints.safetensors import build_header, read_header, strict_json
from cl_fast.checkpoints.writing import write_whole
from cl_fast.errors import CheckpointError, OutputError
from cl_fast.losses.teachers import Tail, TopK
from cl_fast.ops.heads import Head, chunks
from cl_fast.ops.supports import topk_logprobs
from cl_fast.ops.vocabulary_rows import How

__all__ = ["TaughtDataset", "TeacherCache"]

FORMAT, VERSION = "cl_fast.teacher_cache", 1
MANIFEST, PLAN = "cache.json", "build.json"
IGNORED = -100
_OPEN_SHARDS = 16
_PROBED = 8
"""Positions on which hidden states and head are compared with the model's own logits."""
_NUMPY = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "U8": "u1"}
_DTYPES = {"float16": "F16", "bfloat16": "BF16"}


# --- what a cache was made of ------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of which id means which token; "" of None."""
    if tokenizer is None:
        return ""
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"tokenizer must have get_vocab(), like those of transformers; "
            f"got {type(tokenizer).__name__}"
        )
    vocabulary = sorted((int(i), token) for token, i in tokenizer.get_vocab().items())
    return _hash([json.dumps(vocabulary, ensure_ascii=True).encode()])


def model_fingerprint(model: nn.Module) -> str:
    """A hash of all weights of a model and of what its config computes.

    Of a tensor it takes name, shape, dtype, the sum of its elements read as integers, and every
    n-th element: one pass, on the device where it lies.
    """
    parts = []
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        about = {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("_name_or_path", "transformers_version", "use_cache", "torch_dtype")
        }
        parts.append(json.dumps(about, sort_keys=True, default=str).encode())
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, x in sorted(model.state_dict().items()):
        if not isinstance(x, Tensor):
            continue
        bits = x.detach().reshape(-1).contiguous()
        bits = bits.view(integers[bits.element_size()]) if bits.element_size() in integers else bits
        some = bits[:: max(1, bits.numel() // 256)].cpu()
        total = int(bits.sum(dtype=torch.int64)) if bits.numel() else 0
        parts.append(f"{name} {tuple(x.shape)} {x.dtype} {total}".encode())
        parts.append(some.numpy().tobytes())
    return _hash(parts)


def _hash(parts: Iterable[bytes]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Example:
    """One sequence: its tokens, and which positions are to be stored."""

    tokens: NDArray[np.int64]
    attended: NDArray[np.bool_]
    kept: NDArray[np.bool_]


def _row(name: str, value: Any, where: str, size: int | None = None) -> NDArray[np.int64]:
    array = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(
            f"{where}: {name} must be one sequence of integers; got {array.dtype} of the shape "
            f"{array.shape}"
        )
    if size is not None and array.size != size:
        raise ValueError(f"{where}: {name} must be as long as input_ids, {size}; got {array.size}")
    return array.astype(np.int64)


def _example(dataset: Any, i: int, keep: str) -> _Example:
    item, where = dataset[i], f"dataset[{i}]"
    if not hasattr(item, "keys"):
        item = {"input_ids": item}
    if "input_ids" not in item:
        raise ValueError(f"{where} must have input_ids; it has {', '.join(map(str, item))}")
    tokens = _row("input_ids", item["input_ids"], where)
    attended = np.ones(tokens.size, dtype=np.bool_)
    if item.get("attention_mask") is not None:
        attended = _row("attention_mask", item["attention_mask"], where, tokens.size) != 0
    kept = attended
    if keep == "labels":
        if item.get("labels") is None:
            raise ValueError(f"{where} has no labels, which keep='labels' needs")
        labels = _row("labels", item["labels"], where, tokens.size)
        # Position t says what comes at t + 1.
        kept = attended & np.append(labels[1:] != IGNORED, False)[: tokens.size]
    return _Example(tokens, attended, kept)


@dataclass(frozen=True)
class _Identity:
    """What may not differ between two builds of one cache."""

    k: int
    vocab_size: int
    dtype: str
    temperature: float
    keep: str
    shard_tokens: int
    sequences: int
    tokenizer: str
    dataset: str
    model: str

    _WORDS = {  # noqa: RUF012
        "dataset": "another dataset",
        "model": "another model",
        "tokenizer": "another tokenizer",
    }

    def refuse_other(self, other: _Identity, where: Path) -> None:
        for name, mine in asdict(self).items():
            theirs = getattr(other, name)
            if mine != theirs:
                what = self._WORDS.get(name, f"{name} = {theirs!r}, not {mine!r}")
                raise CheckpointError(
                    f"{where}: was made with {what}; build into another folder, or delete this one"
                )


def _dataset_facts(dataset: Any, keep: str, bar: Any) -> tuple[str, list[int], list[int]]:
    """The fingerprint of a dataset, and of each sequence how many positions it has and keeps."""
    digest = blake2b(digest_size=16)
    positions, rows = [], []
    for i in range(len(dataset)):
        example = _example(dataset, i, keep)
        digest.update(example.tokens.size.to_bytes(8, "little"))
        digest.update(example.tokens.astype("<i8").tobytes())
        digest.update(np.packbits(example.attended).tobytes())
        digest.update(np.packbits(example.kept).tobytes())
        positions.append(example.tokens.size)
        rows.append(int(example.kept.sum()))
        bar.update(1)
    return digest.hexdigest(), positions, rows


def _check_dataset(dataset: Any) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            "dataset must be map-style, with a length and examples by index; "
            f"got {type(dataset).__name__}"
        )


# --- files -------------------------------------------------------------------------------------


def _json(content: dict[str, Any]) -> list[bytes]:
    return [json.dumps(content, indent=1).encode() + b"\n"]


@dataclass(frozen=True)
class _Entry:
    """A shard, as the manifest has it."""

    file: str
    first: int
    sequences: int
    rows: int
    digest: str


class _Shard:
    """A shard that is mapped into memory.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """

    def __init__(self, path: Path, identity: _Identity, entry: _Entry | None, verify: bool) -> None:
        header = read_header(path)
        if header.metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a shard of a teacher cache")
        if header.metadata.get("version") != str(VERSION):
            raise CheckpointError(
                f"{path}: has version {header.metadata.get('version')} of the format; this "
                f"cl_fast reads version {VERSION}"
            )
        if header.metadata.get("identity") != _stamp(identity):
            raise CheckpointError(f"{path}: belongs to another cache")
        self.digest = header.metadata.get("digest", "")
        if entry is not None and self.digest != entry.digest:
            raise CheckpointError(f"{path}: is not the shard that {MANIFEST} names")
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, info in header.tensors.items():
            dtype = np.dtype(_NUMPY.get(info.dtype, "u1"))
            if info.nbytes == 0:
                self._arrays[name] = np.zeros(info.shape, dtype)
            else:
                self._arrays[name] = np.memmap(
                    path, dtype, mode="r", offset=info.offset, shape=info.shape
                )
        if verify and _digest(self._arrays) != self.digest:
            raise CheckpointError(
                f"{path}: is corrupted, its data is not what was written; delete the file and "
                f"{MANIFEST}, and build again"
            )
        self._bfloat16 = header.tensors["logprobs"].dtype == "BF16"
        self._k = identity.k
        self.rows = int(self._arrays["rows"][-1])

    def sequence(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids int32 [L, k], log-probs [L, k], and which positions are stored, bool [L]."""
        first, last = (int(x) for x in self._arrays["rows"][i : i + 2])
        start, stop = (int(x) for x in self._arrays["positions"][i : i + 2])
        ids = torch.from_numpy(self._arrays["ids"][first:last].astype(np.int32))
        stored = np.array(self._arrays["logprobs"][first:last])
        logprobs = torch.from_numpy(stored.view(np.int16) if self._bfloat16 else stored)
        if self._bfloat16:
            logprobs = logprobs.view(torch.bfloat16)
        if "kept" not in self._arrays:
            return ids, logprobs, torch.ones(stop - start, dtype=torch.bool)
        kept = torch.from_numpy(self._arrays["kept"][start:stop].astype(np.bool_))
        whole_ids, whole_logprobs = _nothing(kept.numel(), self._k, logprobs.dtype)
        whole_ids[kept], whole_logprobs[kept] = ids, logprobs
        return whole_ids, whole_logprobs, kept


def _nothing(rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of which nothing is known: a support that every check lets pass."""
    ids = torch.arange(k, dtype=torch.int32).repeat(rows, 1)
    return ids, torch.full((rows, k), -float(np.log(k)), dtype=dtype)


def _stamp(identity: _Identity) -> str:
    return json.dumps(asdict(identity), sort_keys=True)


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    return _hash(x for name in sorted(arrays) for x in (name.encode(), arrays[name].tobytes()))


def _save_shard(path: Path, identity: _Identity, arrays: dict[str, NDArray[Any]]) -> str:
    kinds = {
        "rows": "I64",
        "positions": "I64",
        "ids": "U16" if identity.vocab_size <= 1 << 16 else "I32",
        "logprobs": _DTYPES[identity.dtype],
        "kept": "U8",
    }
    widths = {"I64": 0, "I32": 1, "F16": 2, "BF16": 2, "U16": 2, "U8": 3}
    names = sorted(arrays, key=lambda name: (widths[kinds[name]], name))
    digest = _digest(arrays)
    header, _, _ = build_header(
        [(name, kinds[name], arrays[name].shape) for name in names],
        {
            "format": FORMAT,
            "version": str(VERSION),
            "identity": _stamp(identity),
            "digest": digest,
        },
    )
    write_whole(path, [header, *(arrays[name].tobytes() for name in names)])
    return digest


# --- the teacher -------------------------------------------------------------------------------


class _Teacher:
    """A causal language model of transformers, its logits never whole.

    Raises:
        ValueError: it has no decoder or head to be taken apart into.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if head is None or not isinstance(getattr(head, "weight", None), Tensor):
            raise ValueError(
                "model must have an output head (get_output_embeddings); "
                f"got {type(inner).__name__}"
            )
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        if decoder is None or decoder is inner:
            decoder = getattr(inner, "base_model", None)
        if decoder is None or decoder is inner:
            raise ValueError(
                f"model must have a decoder (get_decoder or base_model); got {type(inner).__name__}"
            )
        self.model, self._decoder = model, decoder
        self.weight: Tensor = head.weight.detach()
        bias = getattr(head, "bias", None)
        self._bias = bias.detach() if isinstance(bias, Tensor) else None
        self._device = next(decoder.parameters()).device
        self._how = _how(inner, temperature)

    def topk(self, batch: list[_Example], k: int) -> tuple[Tensor, Tensor]:
        """ids and log-probs of the kept positions of all sequences, one after the other."""
        hidden = [
            states[torch.from_numpy(example.kept[example.attended]).to(states.device)]
            for example, states in zip(batch, self._hidden(batch), strict=True)
        ]
        rows = torch.cat(hidden).to(self.weight.device)
        head = Head(rows, self.weight, self._bias)
        ids, logprobs = [], []
        for part in chunks(rows.size(0), self.weight.size(0)):
            i, lp = topk_logprobs(head.logits(part), k, how=self._how)
            ids.append(i.cpu())
            logprobs.append(lp.cpu())
        if not ids:
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
        return torch.cat(ids), torch.cat(logprobs)

    def _hidden(self, batch: list[_Example]) -> list[Tensor]:
        """Of each sequence the last hidden states of its attended tokens."""
        tokens = [torch.from_numpy(example.tokens[example.attended]) for example in batch]
        width = max(len(x) for x in tokens)
        if width == 0:
            return [self.weight.new_zeros(0, self.weight.size(1)) for _ in tokens]
        ids = torch.zeros(len(tokens), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, x in enumerate(tokens):
            ids[i, : len(x)], mask[i, : len(x)] = x, 1
        # A sequence without tokens must not be one without anything to attend to.
        mask[:, 0] = 1
        out = self._decoder(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
        )
        states = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
        return [states[i, : len(x)] for i, x in enumerate(tokens)]

    def probe(self, example: _Example) -> None:
        """Raise unless hidden states and head give the logits that the model gives.

        What a model does to its logits is read from its config by name; one that does something
        else must not be cached wrongly.
        """
        few = _Example(*(x[example.attended][:_PROBED] for x in vars(example).values()))
        if not few.tokens.size:
            return
        states = self._hidden([few])[0].to(self.weight.device)
        head = Head(states, self.weight, self._bias)
        ours = _logits(head.logits(slice(0, states.size(0))), self._how._replace(temperature=1.0))
        ids = torch.from_numpy(few.tokens)[None].to(self._device)
        theirs = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits[0].to(ours)  # fmt: skip
        # The model rounds its logits to its own dtype.
        allowed = 1e-4 + 4 * torch.finfo(self.weight.dtype).eps * ours.abs().max()
        if ours.shape != theirs.shape or not bool((ours - theirs).abs().max() <= allowed):
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not those of its decoder and its "
                "output head (an adapter on the head, or a change to the logits that its config "
                "does not name); merge adapters into the head first"
            )


def _how(model: Any, temperature: float) -> How:
    """Scale and softcap by the names that configs of transformers have for them."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale, cap = getattr(config, "logit_scale", None), None
    if scale is None and (by := getattr(config, "logits_scaling", None)) is not None:
        scale = 1.0 / float(by)
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        cap = cap or getattr(config, name, None)
    return How(
        scale=1.0 if scale is None else float(scale),
        softcap=float(cap or 0.0),
        temperature=temperature,
    )


def _logits(x: Tensor, how: How) -> Tensor:
    x = x * how.scale
    return torch.tanh(x / how.softcap) * how.softcap if how.softcap else x


# --- the cache ---------------------------------------------------------------------------------


class TeacherCache:
    """The k likeliest tokens of a teacher for each position of a dataset; see the module.

    `len(cache)` is the number of sequences, `cache[i]` the `TopK` of the i-th, and iteration goes
    through them in order. Shards are mapped, so reading costs no memory to speak of, and a cache
    can be sent to the workers of a DataLoader.

    Attributes:
        path: the folder.
        k: tokens per position.
        vocab_size: of the teacher.
        temperature: at which the log-probs were made.
        rows: positions that are stored.
        nbytes: of all shards.
    """

    def __init__(self, path: Path, identity: _Identity, shards: list[_Entry], verify: bool) -> None:
        self.path, self._identity, self._shards = path, identity, shards
        self._verify = verify
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._verified: set[int] = set()
        self.k, self.vocab_size = identity.k, identity.vocab_size
        self.temperature = identity.temperature
        self.rows = sum(entry.rows for entry in shards)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        dataset: Any,
        k: int,
        *,
        path: str | os.PathLike[str],
        tokenizer: Any = None,
        batch_size: int = 8,
        dtype: str | torch.dtype = "float16",
        temperature: float = 1.0,
        keep: str = "all",
        shard_tokens: int = 1 << 16,
        progress: bool = True,
    ) -> TeacherCache:
        """Run a teacher over a dataset; call it again to go on with a build that was cut off.

        Args:
            model: a causal language model of transformers, on its device; evaluated without
                gradients. Its logits exist a chunk at a time.
            dataset: map-style; examples are sequences of token ids, or mappings with `input_ids`
                and perhaps `attention_mask` and `labels`.
            k: tokens per position.
            path: a folder, new or of a build that was cut off.
            tokenizer: whose vocabulary the cache will be held to.
            batch_size: sequences per forward pass.
            dtype: of the log-probs, "float16" or "bfloat16"; float16 is the more precise.
            temperature: of the log-probs; that of the student, where it is not 1.
            keep: "all" positions that are attended to, or those whose next token has one of the
                "labels" other than -100. Others are given back as uniform, to be masked.
            shard_tokens: positions of a shard, at most (but at least one sequence).
            progress: show bars.

        Raises:
            CheckpointError: the folder holds another cache; the message says what differs.
            OutputError: a file cannot be written.
            TypeError, ValueError: naming the argument.
        """
        _check_dataset(dataset)
        k = operator.index(k)
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(f"dtype must be 'float16' or 'bfloat16'; got {dtype!r}")
        if keep not in ("all", "labels"):
            raise ValueError(f"keep must be 'all' or 'labels'; got {keep!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        if batch_size < 1 or shard_tokens < 1:
            raise ValueError(
                f"batch_size and shard_tokens must be at least 1; got {batch_size} and "
                f"{shard_tokens}"
            )
        teacher = _Teacher(model, float(temperature))
        vocabulary = teacher.weight.size(0)
        if not 0 < k <= vocabulary:
            raise ValueError(
                f"k must be between 1 and {vocabulary}, the size of the vocabulary; got {k}"
            )
        folder = Path(path)
        count = len(dataset)
        with tqdm(total=count, desc="reading the dataset", disable=not progress) as bar:
            content, positions, rows = _dataset_facts(dataset, keep, bar)
        identity = _Identity(
            k, vocabulary, name, float(temperature), keep, shard_tokens, count,
            tokenizer_fingerprint(tokenizer), content, model_fingerprint(model),
        )  # fmt: skip
        if (folder / MANIFEST).exists():
            done = cls.open(folder)
            identity.refuse_other(done._identity, folder)
            return done
        _begin(folder, identity)
        plan = _plan(positions, shard_tokens)
        training = model.training
        model.eval()
        entries = []
        try:
            with (
                torch.inference_mode(),
                tqdm(total=count, desc="asking the teacher", disable=not progress) as bar,
            ):
                for i in [i for i, size in enumerate(rows) if size][:1]:
                    teacher.probe(_example(dataset, i, keep))
                for number, (first, last) in enumerate(plan):
                    file = folder / f"shard-{number:05d}.safetensors"
                    digest = _finished(file, identity)
                    if digest is None:
                        arrays = _ask(teacher, dataset, first, last, k, keep, batch_size, name, bar)
                        digest = _save_shard(file, identity, arrays)
                    else:
                        bar.update(last - first)
                    entries.append(
                        _Entry(file.name, first, last - first, sum(rows[first:last]), digest)
                    )
        finally:
            model.train(training)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "identity": asdict(identity),
            "shards": [asdict(entry) for entry in entries],
        }
        write_whole(folder / MANIFEST, _json(manifest))
        (folder / PLAN).unlink(missing_ok=True)
        return cls.open(folder)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        dataset: Any = None,
        verify: bool = True,
    ) -> TeacherCache:
        """A cache that was built.

        Args:
            path: its folder.
            tokenizer, dataset: refused unless the cache was made with them.
            verify: compare the data of a shard with its digest when it is first read.

        Raises:
            CheckpointError: it is not a whole cache, or was made with something else.
        """
        folder = Path(path)
        identity, shards = _manifest(folder)
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != identity.tokenizer:
            raise CheckpointError(
                f"{folder}: was made with another tokenizer"
                if identity.tokenizer
                else f"{folder}: was made without naming a tokenizer, so none can be compared"
            )
        cache = cls(folder, identity, shards, verify)
        if dataset is not None:
            cache._check_content(dataset)
        for entry in shards:
            file = folder / entry.file
            if not file.is_file():
                raise CheckpointError(f"{file}: is missing")
            read_header(file)  # says so where the file was cut off
        return cache

    def _check_content(self, dataset: Any) -> None:
        _check_dataset(dataset)
        with tqdm(disable=True) as bar:
            content = _dataset_facts(dataset, self._identity.keep, bar)[0]
        if content != self._identity.dataset:
            raise CheckpointError(f"{self.path}: was made with another dataset")

    @property
    def nbytes(self) -> int:
        return sum((self.path / entry.file).stat().st_size for entry in self._shards)

    def __len__(self) -> int:
        return self._identity.sequences

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.path)!r}: {len(self)} sequences, {self.rows} positions, "
            f"k = {self.k})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a mapping stays in its process

    def _sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        i %= len(self)
        low, high = 0, len(self._shards) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._shards[middle].first <= i else (low, middle - 1)
        return self._shard(low).sequence(i - self._shards[low].first)

    def _shard(self, number: int) -> _Shard:
        shard = self._open.get(number)
        if shard is None:
            entry = self._shards[number]
            verify = self._verify and number not in self._verified
            shard = _Shard(self.path / entry.file, self._identity, entry, verify)
            self._verified.add(number)
            self._open[number] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return shard

    def __getitem__(self, index: int) -> TopK:
        """ids int32 [L, k] and log-probs [L, k] of a sequence of L tokens."""
        ids, logprobs, _ = self._sequence(index)
        return TopK(ids, logprobs, temperature=self.temperature)

    def kept(self, index: int) -> Tensor:
        """Which positions of a sequence are stored: bool [L]; the others are uniform."""
        return self._sequence(index)[2]

    def __iter__(self) -> Iterator[TopK]:
        return (self[i] for i in range(len(self)))

    def batch(self, indices: Sequence[int], tail: Tail = "bucket") -> TopK:
        """Some sequences, padded at the end to the longest: [B, L, k]. Mask what is padded.

        Args:
            indices: of the sequences.
            tail: see `TopK`.
        """
        return replace(self.pad([self[i] for i in indices]), tail=tail)

    @staticmethod
    def pad(teachers: Sequence[TopK]) -> TopK:
        """Sequences [L, k] padded at the end with uniform rows to the longest: [B, L, k].

        Raises:
            ValueError: there are none, or they differ in k or in temperature.
        """
        if len({(teacher.ids.size(-1), teacher.temperature) for teacher in teachers}) != 1:
            raise ValueError("teachers must be some sequences of one k and one temperature")
        width = max(teacher.ids.size(0) for teacher in teachers)
        ids, logprobs = [], []
        for teacher in teachers:
            missing = width - teacher.ids.size(0)
            more = _nothing(missing, teacher.ids.size(-1), teacher.logprobs.dtype)
            ids.append(torch.cat([teacher.ids, more[0].to(teacher.ids)]))
            logprobs.append(torch.cat([teacher.logprobs, more[1].to(teacher.logprobs)]))
        first = teachers[0]
        return TopK(torch.stack(ids), torch.stack(logprobs), first.tail, first.temperature)

    def attach(self, dataset: Any, *, verify: bool = True) -> TaughtDataset:
        """The dataset that the cache was built from, its examples with the teacher's.

        Args:
            verify: read the dataset once, and refuse another.

        Raises:
            CheckpointError: it is another dataset.
        """
        _check_dataset(dataset)
        if verify:
            self._check_content(dataset)
        if len(dataset) != len(self):
            raise CheckpointError(
                f"{self.path}: was made with another dataset: it has {len(self)} sequences, "
                f"not {len(dataset)}"
            )
        return TaughtDataset(dataset, self)


class TaughtDataset:
    """A map-style dataset whose examples have `teacher_ids` and `teacher_logprobs` [L, k].

    Attributes:
        temperature: at which the log-probs were made.
    """

    def __init__(self, dataset: Any, cache: TeacherCache) -> None:
        self._dataset, self._cache = dataset, cache
        self.temperature = cache.temperature

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._dataset[index]
        if not hasattr(example, "keys"):
            example = {"input_ids": example}
        teacher = self._cache[index]
        return {**example, "teacher_ids": teacher.ids, "teacher_logprobs": teacher.logprobs}


def _manifest(folder: Path) -> tuple[_Identity, list[_Entry]]:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        if (folder / PLAN).exists():
            raise CheckpointError(
                f"{folder}: this cache is not whole; call TeacherCache.build again to go on"
            ) from None
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    content = strict_json(raw, str(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a teacher cache")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has version {content.get('version')} of the format; this cl_fast reads "
            f"version {VERSION}"
        )
    try:
        identity = _Identity(**content["identity"])
        shards = [_Entry(**entry) for entry in content["shards"]]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: is damaged; build the cache again") from None
    return identity, shards


def _begin(folder: Path, identity: _Identity) -> None:
    """Make the folder, or see that it holds the beginning of this build and nothing else."""
    path = folder / PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = [p for p in folder.iterdir() if p.name != PLAN + ".part"]
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})") from error
    if path.exists():
        content = strict_json(path.read_bytes(), str(path))
        try:
            other = _Identity(**content["identity"])
        except (KeyError, TypeError):
            raise CheckpointError(f"{path}: is damaged; delete the folder") from None
        identity.refuse_other(other, folder)
    elif inside:
        raise OutputError(f"{folder}: is not empty, and holds no teacher cache")
    else:
        content = {"format": FORMAT, "version": VERSION, "identity": asdict(identity)}
        write_whole(path, _json(content))


def _plan(positions: list[int], shard_tokens: int) -> list[tuple[int, int]]:
    """First and last (exclusive) sequence of each shard."""
    plan, first, held = [], 0, 0
    for i, size in enumerate(positions):
        if i > first and held + size > shard_tokens:
            plan.append((first, i))
            first, held = i, 0
        held += size
    return [*plan, (first, len(positions))] if positions else []


def _finished(file: Path, identity: _Identity) -> str | None:
    """The digest of a shard that an earlier call has finished; None: it has to be made."""
    if not file.exists():
        return None
    try:
        return _Shard(file, identity, None, verify=True).digest
    except CheckpointError:
        return None


def _ask(
    teacher: _Teacher,
    dataset: Any,
    first: int,
    last: int,
    k: int,
    keep: str,
    batch_size: int,
    dtype: str,
    bar: Any,
) -> dict[str, NDArray[Any]]:
    """The arrays of a shard. Batches end with it, so that they do not depend on where a build was
    cut off."""
    wide = teacher.weight.size(0) > 1 << 16
    ids, logprobs, kept, rows = [], [], [], []
    for start in range(first, last, batch_size):
        batch = [_example(dataset, i, keep) for i in range(start, min(start + batch_size, last))]
        i, lp = teacher.topk(batch, k)
        ids.append(i.numpy().astype("<i4" if wide else "<u2"))
        logprobs.append(_stored(lp, dtype))
        kept += [example.kept for example in batch]
        rows += [int(example.kept.sum()) for example in batch]
        bar.update(len(batch))
    arrays = {
        "rows": np.cumsum([0, *rows], dtype="<i8"),
        "positions": np.cumsum([0, *(x.size for x in kept)], dtype="<i8"),
        "ids": np.concatenate(ids),
        "logprobs": np.concatenate(logprobs),
    }
    every = np.concatenate(kept)
    if not every.all():
        arrays["kept"] = every.astype(np.uint8)
    return arrays


def _stored(logprobs: Tensor, dtype: str) -> NDArray[Any]:
    if dtype == "float16":
        return cast(NDArray[Any], logprobs.to(torch.float16).numpy().astype("<f2"))
    bits = logprobs.to(torch.bfloat16).view(torch.int16).numpy()
    return cast(NDArray[Any], bits.view(np.uint16).astype("<u2"))
