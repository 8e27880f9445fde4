"""Folders as people have them, and the ones that must be refused with words that help."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import CONFIG, TINY, write_checkpoint, write_file, write_index

from cl_fast.checkpoints import Checkpoint
from cl_fast.errors import CheckpointError

WEIGHT = {"w": ("F32", (2,))}


def test_single_file_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == list(TINY)
    assert checkpoint.config == CONFIG
    assert checkpoint.path == checkpoint.folder == folder
    assert checkpoint.reference == str(folder)
    assert (checkpoint.layers, checkpoint.vocab_size, checkpoint.tied) == (2, 10, None)
    assert checkpoint.nbytes == sum(t.nbytes for t in checkpoint.tensors.values())


def test_sharded_folder_and_direct_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=3)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(TINY)
    assert [Path(f.path).name for f in checkpoint.files] == [
        f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")
    ]
    single = write_checkpoint(tmp_path / "s") / "model.safetensors"
    direct = Checkpoint.open(single)
    assert direct.path == single
    assert direct.folder == single.parent
    assert direct.config == CONFIG


def test_one_file_of_another_name(tmp_path: Path) -> None:
    write_file(tmp_path / "m" / "weights.safetensors", WEIGHT)
    assert set(Checkpoint.open(tmp_path / "m").tensors) == {"w"}
    assert Checkpoint.open(tmp_path / "m").config is None


def test_the_hubs_cache_is_made_of_links(tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "blobs", shards=2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert set(Checkpoint.open(snapshot).tensors) == set(TINY)


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for reference in ("m", "./m", "m/", "~/m"):
        assert Checkpoint.open(reference).path == tmp_path / "m"


def test_an_index_over_the_single_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", WEIGHT)
    write_index(folder, {"w": "model.safetensors"})
    assert set(Checkpoint.open(folder).tensors) == {"w"}


def nested_config(folder: Path) -> Path:
    nested = {"text_config": {"num_hidden_layers": 7, "vocab_size": 9, "tie_word_embeddings": True}}
    return write_checkpoint(folder, config=nested)


def test_nested_config(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(nested_config(tmp_path / "m"))
    assert (checkpoint.layers, checkpoint.vocab_size, checkpoint.tied) == (7, 9, True)


def indexed(weight_map: Any, *files: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in files:
            write_file(folder / name, WEIGHT)
        folder.mkdir(exist_ok=True)
        write_index(folder, weight_map)
        return folder

    return make


def content(name: str, data: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return folder

    return make


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def with_stray_single(folder: Path) -> Path:
    return write_checkpoint(write_checkpoint(folder, shards=2), WEIGHT)


def adapter(folder: Path) -> Path:
    write_file(folder / "adapter_model.safetensors", WEIGHT)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def two_files(folder: Path) -> Path:
    write_file(folder / "model-00001-of-00002.safetensors", WEIGHT)
    write_file(folder / "model-00002-of-00002.safetensors", {"v": ("F32", ())})
    return folder


def bad_config(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_checkpoint(folder)
        (folder / "config.json").write_text(text)
        return folder

    return make


def then(make: Callable[[Path], Path], *parts: str) -> Callable[[Path], Path]:
    return lambda folder: make(folder).joinpath(*parts)


def link_loop(folder: Path) -> Path:
    folder.symlink_to(folder)
    return folder


INDEX = "model.safetensors.index.json"

BAD = [
    pytest.param(lambda p: p, "does not exist", id="absent"),
    pytest.param(link_loop, "exist", id="loop of links"),
    pytest.param(lambda p: p.mkdir() or p, "no weights", id="empty folder"),
    pytest.param(
        content("pytorch_model.bin", pickle.dumps(Bomb())), "save_pretrained", id="pickle"
    ),
    pytest.param(
        then(content("x.pt", pickle.dumps(Bomb())), "x.pt"), "never opened", id="pickle file"
    ),
    pytest.param(content("model.gguf", b"GGUF"), "GGUF", id="gguf"),
    pytest.param(then(content("a.yml", b"x: 1"), "a.yml"), "is a recipe", id="recipe"),
    pytest.param(then(content("a.txt", b"x"), "a.txt"), "neither", id="some file"),
    pytest.param(adapter, "adapter (LoRA)", id="adapter"),
    pytest.param(two_files, f"no {INDEX}", id="shards without index"),
    pytest.param(
        then(two_files, "model-00001-of-00002.safetensors"), "one shard of 2", id="one shard"
    ),
    pytest.param(then(indexed({}), INDEX), "give its folder", id="index as model"),
    pytest.param(with_stray_single, "two checkpoints", id="single beside index"),
    pytest.param(indexed({}), "empty", id="index empty"),
    pytest.param(indexed([]), "'weight_map'", id="index list"),
    pytest.param(content(INDEX, b"[]"), "JSON object", id="index not an object"),
    pytest.param(content(INDEX, b"{"), "JSON", id="index broken"),
    pytest.param(content(INDEX, b'{"weight_map": {"a": "x", "a": "y"}}'), "twice", id="index dup"),
    pytest.param(indexed({"w": 3}), "'w' must be a file name", id="index number"),
    pytest.param(indexed({"w": "a.safetensors"}), "'a.safetensors' (for tensor 'w')", id="no file"),
    pytest.param(
        indexed({"v": "a.safetensors"}, "a.safetensors"), "does not know it", id="tensor not known"
    ),
    pytest.param(
        indexed({"w": "a.safetensors", "v": "a.safetensors"}, "a.safetensors"),
        "does not hold it",
        id="tensor not there",
    ),
    pytest.param(
        indexed({"w": "a.safetensors", "v": "b.safetensors"}, "a.safetensors", "b.safetensors"),
        "says it is in 'a.safetensors'",
        id="tensor in two files",
    ),
    pytest.param(indexed({"w": "a.bin"}), "not a .safetensors file", id="index names pickle"),
    *(
        pytest.param(indexed({"w": name}), "not inside", id=f"traversal {name!r}")
        for name in (
            "../m/a.safetensors",
            "x/../../a.safetensors",
            "/etc/a.safetensors",
            "..",
            "",
            ".",
            "C:\\a.safetensors",
            "C:a.safetensors",
            "..\\a.safetensors",
            "\\\\host\\a.safetensors",
            "a\0.safetensors",
        )
    ),
    pytest.param(bad_config("["), "config.json", id="config broken"),
    pytest.param(bad_config("[]"), "JSON object", id="config list"),
    pytest.param(bad_config('{"a": 1, "a": 2}'), "twice", id="config dup"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_refused(
    tmp_path: Path,
    make: Callable[[Path], Path],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = make(tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(reference, key="models[3].model")
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("Qwen/Qwen2.5-0.5B", "hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-0.5B@main", "hf download Qwen/Qwen2.5-0.5B "),
        ("nonsense", "does not exist"),
        ("~nobody-of-that-name/x", "does not exist"),
        ("", "not a path"),
        ("a\0b", "not a path"),
    ],
)
def test_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(reference, key="base_model")
    assert words in str(caught.value)
    assert str(caught.value).startswith("base_model: ")


def test_a_base_with_an_adapter(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match="adapter"):
        Checkpoint.open(f"{folder}+some/lora")


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (TINY, {"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        (TINY, {"text_config": {"quantization_config": {"bits": 4}}}, "quantised"),
        ({"a.weight": ("F8_E4M3", (4,)), "a.weight_scale_inv": ("F32", ())}, {}, "scale"),
        ({"a.weight": ("F8_E4M3", (4,)), "a.weight_scale": ("F32", ())}, {}, "scale"),
        ({"a.weight": ("I8", (4,)), "a.scales": ("F16", ())}, {}, "scale"),
        ({"a.qweight": ("I32", (4,)), "a.qzeros": ("I32", ())}, {}, "I32 codes"),
        ({"a_blocks": ("U8", (4,)), "a_scales": ("U8", ())}, {}, "U8 codes"),
        ({"a": ("F8_E8M0", (4,))}, {}, "quantised checkpoint"),
    ],
)
def test_quantised(tmp_path: Path, tensors: Any, config: Any, words: str) -> None:
    folder = write_checkpoint(tmp_path / "m", tensors, config=config)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).refuse_quantised()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"logit_scale": ("F32", ()), "layer_scale": ("BF16", (3,))},
        {"a.weight": ("F8_E5M2", (4,)), "norm.weight": ("BF16", (4,))},
        {"norm.scale": ("F32", (3,)), "position_ids": ("I64", (3,)), "mask": ("U8", (3,))},
    ],
)
def test_not_quantised(tmp_path: Path, tensors: Any) -> None:
    config = {"quantization_config": None}
    Checkpoint.open(write_checkpoint(tmp_path / "m", tensors, config=config)).refuse_quantised()


def test_a_json_that_is_too_large(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="no JSON"):
        Checkpoint.open(folder)


def test_inputs_are_not_touched(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    Checkpoint.open(folder).refuse_quantised()
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    assert json.loads((folder / "config.json").read_text()) == CONFIG
