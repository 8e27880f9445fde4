"""The file of a packed delta: as another program would read it, and when it is damaged."""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import delta_cases as cases
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cl_fast.checkpoints.deltas import BLOCK, is_delta, read_delta
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError, RecipeError
from cl_fast.merging.deltas import check_delta, pack_delta

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = cases.family(tmp_path_factory.mktemp("deltas"))
    pack_delta(
        root / "base", root / "renumbered", root / "d.safetensors", drop_rate=0.9, seed=7, threads=1
    )
    return root


def test_another_program_can_read_it(root: Path) -> None:
    """Every word of docs/delta-format.md, by a reader that was written from it."""
    reader, base = cases.Reader(root / "d.safetensors"), cases.load(root / "base")
    tuned = cases.load(root / "renumbered")
    assert reader.seal()
    assert reader.metadata["format"] == "cl_fast.delta"
    assert reader.metadata["version"] == "1"
    assert reader.metadata["stream"] == "cl_fast philox v1"
    assert (reader.metadata["seed"], reader.metadata["model"]) == ("7", "renumbered")
    assert reader.metadata["block"] == str(BLOCK)
    threshold = int(reader.metadata["threshold"])
    assert threshold == math.floor((1 - 0.9) * 2**32 + 0.5)
    assert reader.tensors.keys() == base.keys()
    stored = {"seal"}
    for name, entry in reader.tensors.items():
        raw = base[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert entry["base_crc64"] == f"{cases.crc64(raw):016x}", name
        assert entry["shape"] == list(base[name].shape)
        if entry["kind"] == "same":
            assert torch.equal(cases.bits(base[name]), cases.bits(tuned[name]))
            continue
        if entry["kind"] == "whole":
            data = reader.data(f"whole/{name}")
            assert list(struct.unpack("<9q", data)) == tuned[name].tolist()
            stored.add(f"whole/{name}")
        else:
            data = reader.data(f"kept/{name}")
            stored |= {f"kept/{name}", f"offsets/{name}"}
            assert entry["key"] == f"{reader.key(name):016x}"
            n = tuned[name].numel()
            which = cases.kept(reader.key(name), n, threshold)
            ends = [min(n, block * BLOCK) for block in range(-(-n // BLOCK) + 1)]
            assert reader.offsets(name) == [sum(i < end for i in which) for end in ends]
            assert entry["offsets_crc64"] == (f"{cases.crc64(reader.data(f'offsets/{name}')):016x}")
            values = tuned[name].reshape(-1)[which]
            assert data == values.view(torch.uint8).numpy().tobytes() if which else data == b""
            d = tuned[name].double().reshape(-1) - base[name].double().reshape(-1)
            total, left = float(d.abs().sum()), float(d[which].abs().sum())
            r = 1.0 if min(total, left) < 1e-7 else total / left
            assert entry["factor"] == pytest.approx(r, rel=1e-6)
        assert entry["crc64"] == f"{cases.crc64(data):016x}"
    assert stored == reader.header.keys()
    kinds = {name: entry["kind"] for name, entry in reader.tensors.items()}
    assert kinds[cases.SAME] == kinds[cases.KEPT] == "same"
    assert kinds[cases.CHANGED] == "whole"


def test_any_reader_of_safetensors_opens_it(root: Path) -> None:
    with safe_open(root / "d.safetensors", "pt") as file:
        values = file.get_tensor(f"kept/{UP}")
        offsets = file.get_tensor(f"offsets/{UP}")
    assert values.dtype == torch.bfloat16
    assert offsets.tolist()[-1] == values.numel()
    data = cases.Reader(root / "d.safetensors")
    assert data.start % 64 == 0
    for name, entry in data.header.items():
        item = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}[entry["dtype"]]
        assert entry["data_offsets"][0] % item == 0, name


def test_backends_and_threads_write_the_same_bytes(root: Path, tmp_path: Path) -> None:
    written = set()
    for backend, threads in (("native", 1), ("native", 3), ("eager", 1)):
        path = tmp_path / f"{backend}{threads}.safetensors"
        pack_delta(
            root / "base", root / "renumbered", path,
            drop_rate=0.9, seed=7, threads=threads, backend=backend,
        )  # fmt: skip
        written.add(path.read_bytes())
    assert written == {(root / "d.safetensors").read_bytes()}


@pytest.mark.parametrize(("drop", "least", "most"), [(0.9, 8, 11), (0.99, 40, 110)])
def test_it_is_as_small_as_the_drop_says(
    root: Path, tmp_path: Path, drop: float, least: float, most: float
) -> None:
    """A matrix large enough that the header does not count."""
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(2000, 500, generator=draw).bfloat16()
    tuned = (base.float() + 0.01 * torch.randn(2000, 500, generator=draw)).bfloat16()
    for name, tensor in (("base", base), ("tuned", tuned)):
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    delta = pack_delta(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d.safetensors",
        drop_rate=drop,
    )  # fmt: skip
    ratio = tuned.nbytes / delta.header.file_size
    assert least < ratio < most
    assert delta.tensors["w"].kept / tuned.numel() == pytest.approx(1 - drop, rel=0.05)


def test_rescale_and_stream_are_told(root: Path, tmp_path: Path) -> None:
    made = {}
    for rescale in ("keep_rate", "none"):
        made[rescale] = pack_delta(
            root / "base", root / "math", tmp_path / f"{rescale}.safetensors",
            drop_rate=0.75, rescale=rescale, stream="other",
        )  # fmt: skip
        assert (made[rescale].rescale, made[rescale].model) == (rescale, "other")
    assert made["keep_rate"].tensors[UP].factor == 4.0
    assert made["none"].tensors[UP].factor == 1.0
    assert made["none"].density == 0.25


def test_a_single_flipped_bit_is_seen(root: Path, tmp_path: Path) -> None:
    """One in every region of the file: length, metadata, offsets, values, integers, seal."""
    raw = (root / "d.safetensors").read_bytes()
    data = cases.Reader(root / "d.safetensors")
    places = [0, 3, 8, 9, data.start - 1]
    places += [at for word in (b"factor", b"base_crc64", b"seed", b"drop_rate", b"cl_fast")
               for at in (raw.index(word) + 1, raw.index(word) + len(word) + 4)]  # fmt: skip
    for name, entry in data.header.items():
        begin, end = entry["data_offsets"]
        if end > begin:
            middle = (begin + end) // 2
            places += [data.start + at for at in (begin, middle, end - 1)]
        assert name
    path = tmp_path / "flipped.safetensors"
    check_delta(root / "d.safetensors")
    for number, place in enumerate(places):
        changed = bytearray(raw)
        changed[place] ^= 1 << number % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=re.escape("flipped.safetensors")):
            check_delta(path)


def test_a_truncated_file_is_refused(root: Path, tmp_path: Path) -> None:
    raw = (root / "d.safetensors").read_bytes()
    path = tmp_path / "short.safetensors"
    for size in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"short\.safetensors: "):
            read_delta(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(CheckpointError, match="follow the last tensor"):
        read_delta(path)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Changes the metadata and the entries of a delta, and seals it again."""
    data = cases.Reader(path)
    change(data.metadata, data.tensors)
    cases.seal(path, data.metadata, data.tensors)


def _entry(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, tensors: tensors[UP].update(changes)


def _words(**changes: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda metadata, _: metadata.update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_words(format="cl_fast.patch"), "is no packed delta"),
        (_words(version="2"), "has version '2'"),
        (_words(stream="other"), "its stream is 'other'"),
        (_words(block="1"), "in blocks of 1"),
        (_words(threshold="0"), "'threshold' of the header is '0'"),
        (_words(threshold="4294967296"), "'threshold'"),
        (_words(drop_rate="1.5"), "drop rate is '1.5'"),
        (_words(rescale="l2"), "rescale 'l2'"),
        (_words(seed="8"), "is not that of its stream"),
        (_words(seed="x"), "'seed' of the header is 'x'"),
        (_entry(factor=0.0), f"entry of tensor '{UP}'"),
        (_entry(factor=None), f"entry of tensor '{UP}'"),
        (_entry(kind="half"), f"entry of tensor '{UP}'"),
        (_entry(base_crc64="12"), f"entry of tensor '{UP}'"),
        (_entry(shape=[300, -1]), f"entry of tensor '{UP}'"),
        (_entry(shape=[3, 4]), f"tensor 'offsets/{UP}' is I64 [3], not I64 [2]"),
        (_entry(dtype="F16"), f"tensor 'kept/{UP}' is BF16"),
        (_entry(kind="same"), "belongs to no tensor of a model"),
        (_entry(crc64="0" * 16), f"the values of tensor '{UP}' are not those"),
        (lambda _, tensors: tensors.pop(UP), "belongs to no tensor of a model"),
        (lambda _, tensors: tensors.clear(), "lists no tensors"),
        (lambda metadata, _: metadata.pop("model"), "the header has no 'model'"),
    ],
)
def test_a_header_that_says_nonsense_is_refused(
    root: Path, tmp_path: Path, change: Any, words: str
) -> None:
    path = tmp_path / "forged.safetensors"
    path.write_bytes((root / "d.safetensors").read_bytes())
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        check_delta(path)


def test_what_is_a_delta(root: Path, tmp_path: Path) -> None:
    assert is_delta(root / "d.safetensors")
    assert not is_delta(root / "base" / "model.safetensors")
    assert not is_delta(root / "base")
    assert not is_delta(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_delta(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="is no packed delta"):
        read_delta(root / "base" / "model.safetensors")


def test_a_folder_has_what_differs_beside_the_weights(root: Path, tmp_path: Path) -> None:
    delta = pack_delta(root / "base", root / "renumbered", tmp_path / "out", drop_rate=0.9, seed=7)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "delta.safetensors",
        "tokenizer.json",
    ]
    assert is_delta(tmp_path / "out")
    assert delta.path == tmp_path / "out"
    written = (tmp_path / "out" / "delta.safetensors").read_bytes()
    assert written == (root / "d.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists and is not empty"):
        pack_delta(root / "base", root / "math", tmp_path / "out", drop_rate=0.9)
    pack_delta(root / "base", root / "math", tmp_path / "out", drop_rate=0.9, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["delta.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"drop_rate": 0.0}, RecipeError, "drop_rate: must be above 0 and below 1; got 0.0"),
        ({"drop_rate": 1.0}, RecipeError, "drop_rate: must be above 0"),
        ({"drop_rate": 1 - 2**-40}, RecipeError, "drops everything"),
        ({"drop_rate": 2**-40}, RecipeError, "drops nothing"),
        ({"drop_rate": "0.9"}, RecipeError, "drop_rate: must be above 0"),
        ({"rescale": "l2"}, RecipeError, "rescale: must be one of l1, keep_rate, none"),
        ({"seed": -1}, RecipeError, "seed: must be"),
        ({"stream": ""}, RecipeError, "stream: '' names no random stream"),
        ({"backend": "cuda"}, RecipeError, "backend: must be native or eager"),
        ({"finetuned": "absent"}, CheckpointError, "absent"),
        ({"finetuned": "d.safetensors"}, CheckpointError, "is a packed delta and no checkpoint"),
        ({"base": "d.safetensors"}, CheckpointError, "is a packed delta and no checkpoint"),
        ({"output": "d.safetensors"}, OutputError, "exists; give another output"),
        ({"output": "no/d.safetensors"}, OutputError, "there is no folder"),
        ({"output": "base/model.safetensors"}, Exception, "base"),
    ],
)
def test_bad_arguments_are_told(
    root: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    given: dict[str, Any] = {"base": "base", "finetuned": "math", "output": "new.safetensors"}
    given |= {"drop_rate": 0.9} | changes
    paths = [root / given.pop(name) for name in ("base", "finetuned", "output")]
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(error, match=re.escape(words)):
        pack_delta(*paths, **given)
    assert sorted(path.name for path in root.iterdir()) == before


def test_inputs_that_do_not_fit_are_told(root: Path, tmp_path: Path) -> None:
    base = cases.base_state()
    other = {name: tensor for name, tensor in base.items() if name != UP}
    cases.save(tmp_path / "other", other)
    with pytest.raises(CheckpointError, match="does not have the same tensors"):
        pack_delta(root / "base", tmp_path / "other", tmp_path / "d.safetensors", drop_rate=0.9)
    broken = cases.tuned_state(base, 1)
    broken[UP][3, 3] = math.nan
    cases.save(tmp_path / "nan", broken)
    for backend in ("native", "eager"):
        with pytest.raises(NonFiniteError, match=f"tensor {re.escape(UP)}: .*NaN"):
            pack_delta(
                root / "base", tmp_path / "nan", tmp_path / "d.safetensors",
                drop_rate=0.9, backend=backend,
            )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan", "other"]


def test_a_full_disk_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if offset > 10_000:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="the disk is full"):
        pack_delta(root / "base", root / "math", tmp_path / "d.safetensors", drop_rate=0.5)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_no_hindrance(root: Path, tmp_path: Path) -> None:
    """The hidden file of a run that was killed is written over; while one runs it is refused."""
    import fcntl

    merge = tmp_path / "out" / ".folder.cl_fast-partial"
    merge.mkdir(parents=True)
    (merge / "journal.jsonl").write_text("a merge that was interrupted")
    left = tmp_path / "out" / ".folder.cl_fast-delta" / "model"
    left.mkdir(parents=True)
    (left / "x").write_bytes(b"x")
    pack_delta(
        root / "base", root / "renumbered", tmp_path / "out" / "folder", drop_rate=0.9, seed=7
    )
    assert (merge / "journal.jsonl").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".folder.cl_fast-partial",
        "folder",
    ]
    shutil.rmtree(tmp_path / "out")
    part = tmp_path / ".d.safetensors.cl_fast-partial"
    part.write_bytes(b"x" * 1_000_000)
    path = tmp_path / "d.safetensors"
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing it"):
            pack_delta(root / "base", root / "renumbered", path, drop_rate=0.9, seed=7)
    pack_delta(root / "base", root / "renumbered", path, drop_rate=0.9, seed=7)
    assert path.read_bytes() == (root / "d.safetensors").read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_leaves_nothing(root: Path, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "d.safetensors").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        pack_delta(
            root / "base", root / "math", tmp_path / "d.safetensors",
            drop_rate=0.5, progress=stop, overwrite=True,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]
    assert (tmp_path / "d.safetensors").read_bytes() == b"old"
