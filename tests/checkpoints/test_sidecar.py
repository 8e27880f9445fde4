"""Which files an output gets beside its weights, and how config.json is patched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import CONFIG, TOKENIZER, write_checkpoint

from cl_fast.checkpoints import Checkpoint
from cl_fast.checkpoints.sidecar import has_tokenizer, patch_config, plan_sidecars, token_count
from cl_fast.errors import CheckpointError


def names(folder: Path, tokenizer: Path | None = None, dtype: str | None = "BF16") -> list[str]:
    files, _ = plan_sidecars(Checkpoint.open(folder), tokenizer or folder, dtype)
    return [file.name for file in files]


def test_what_is_copied_and_what_is_not(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    copied = [
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "vocab.json",
    ]
    left = [
        "README.md",
        "optimizer.pt",
        "pytorch_model.bin",
        "trainer_state.json",
        "training_args.bin",
        "modeling_custom.py",
        "model.safetensors.index.json.bak",
        ".gitattributes",
        "mergekit_config.yml",
    ]
    for name in copied + left:
        (folder / name).write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("t")
    found = set(names(folder))
    assert found == {
        *copied,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "additional_chat_templates/tools.jinja",
    }


def test_tokenizer_from_another_folder(tmp_path: Path) -> None:
    donor = write_checkpoint(tmp_path / "a")
    (donor / "vocab.json").write_text("{}")
    (donor / "chat_template.jinja").write_text("donor")
    (donor / "generation_config.json").write_text("{}")
    other = write_checkpoint(tmp_path / "b")
    (other / "generation_config.json").write_text("{}")
    files, notes = plan_sidecars(Checkpoint.open(donor), other, "BF16")
    assert {file.name: file.source.parent.name for file in files} == {
        "config.json": "a",
        "generation_config.json": "a",
        "tokenizer.json": "b",
        "tokenizer_config.json": "b",
    }
    assert notes == []


def test_code_goes_along_only_where_config_names_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config={**CONFIG, "auto_map": {"AutoModel": "x.Y"}})
    (folder / "modeling_x.py").write_text("raise SystemExit")
    files, notes = plan_sidecars(Checkpoint.open(folder), folder, "BF16")
    assert "modeling_x.py" in [file.name for file in files]
    assert any("never run" in note for note in notes)


def test_large_model_file_is_no_vocabulary(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", tokenizer=None)
    with (folder / "consolidated.model").open("wb") as file:
        file.truncate(100_000_000)
    files, notes = plan_sidecars(Checkpoint.open(folder), folder, "BF16")
    assert [file.name for file in files] == ["config.json"]
    assert any("too large" in note for note in notes)
    assert any("no tokenizer" in note for note in notes)


def test_no_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config=None, tokenizer=None)
    files, notes = plan_sidecars(Checkpoint.open(folder), folder, "BF16")
    assert files == ()
    assert any("no config.json" in note for note in notes)


def test_unchanged_config_is_copied_byte_for_byte(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "config.json").write_bytes(b'{ "torch_dtype":"bfloat16"}\n\n')
    (config,) = (f for f in plan_sidecars(Checkpoint.open(folder), folder, "BF16")[0][:1])
    assert (config.name, config.content, config.nbytes) == ("config.json", None, 29)


@pytest.mark.parametrize(
    ("before", "dtype", "after"),
    [
        ({"torch_dtype": "bfloat16"}, "F32", {"torch_dtype": "float32"}),
        ({"dtype": "float32"}, "BF16", {"dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, "F16", None),
        ({"dtype": "float32"}, None, {"dtype": "float32"}),
        ({"dtype": "float32"}, "I8", {"dtype": "float32"}),
        ({"a": 1}, "BF16", {"a": 1}),
        (
            {"text_config": {"dtype": "float16"}, "torch_dtype": "bfloat16"},
            "BF16",
            {"text_config": {"dtype": "bfloat16"}, "torch_dtype": "bfloat16"},
        ),
    ],
)
def test_patch(before: dict[str, object], dtype: str | None, after: dict[str, object]) -> None:
    raw = json.dumps(before).encode()
    patched = patch_config(raw, dtype)
    if after is None:
        after = {"dtype": "float16", "torch_dtype": "float16"}
    assert json.loads(patched) == after
    assert list(json.loads(patched)) == list(before)
    if before == after:
        assert patched is raw


def test_patch_keeps_unicode() -> None:
    assert "é" in patch_config('{"a": "é", "dtype": "float32"}'.encode(), "BF16").decode()


@pytest.mark.parametrize("raw", [b"[]", b"{", b"\xff"])
def test_patch_refuses(raw: bytes) -> None:
    with pytest.raises(CheckpointError):
        patch_config(raw, "BF16")


def test_token_count(tmp_path: Path) -> None:
    def count(content: object) -> int | None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return token_count(tmp_path)

    assert token_count(tmp_path) is None
    assert count(TOKENIZER) == 10
    assert count({**TOKENIZER, "added_tokens": [{"id": 12, "content": "<x>"}]}) == 13
    assert count({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}) == 2
    assert count({"model": 3, "added_tokens": 4}) is None
    assert count([]) is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert token_count(tmp_path) is None


def test_has_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_text("x")
    assert has_tokenizer(tmp_path)
