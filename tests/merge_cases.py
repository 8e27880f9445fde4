"""Families of tiny checkpoints and recipes over them, for the tests of everything that merges."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import CONFIG, TOKENIZER

from cl_fast.backends import native
from cl_fast.merging import Plan, make_plan, parse_recipe

# The tensors here are tiny: starting threads for them takes longer than the work.
torch.set_num_threads(1)

#: Shapes that cross a tile (65,536 elements), end off a vector, and hold one element.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (1000, 64),
    "model.layers.0.mlp.up_proj.weight": (300, 401),
    "model.layers.0.input_layernorm.weight": (63,),
    "model.layers.1.mlp.up_proj.weight": (300, 401),
    "model.layers.1.input_layernorm.weight": (1,),
    "model.norm.weight": (64,),
}

#: name -> (merge_method, parameters of each model, parameters of the recipe)
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {}, {}),
    "task_arithmetic": ("task_arithmetic", {}, {"lambda": 0.7}),
    "ties": ("ties", {"density": 0.2}, {}),
    "ties peft": ("ties", {"density": 0.2}, {"variant": "peft"}),
    "ties paper": ("ties", {"density": 0.2}, {"variant": "paper"}),
    "ties frequency max": ("ties", {"density": 0.5}, {"elect": "frequency", "reduce": "max"}),
    "dare_linear": ("dare_linear", {"density": 0.3}, {}),
    "dare_ties": ("dare_ties", {"density": 0.3}, {"variant": "paper"}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.3, "gamma": 0.05}, {"rescale": True}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.6}, {}),
    "della": ("della", {"density": 0.3, "epsilon": 0.2}, {}),
    "della_linear": ("della_linear", {"density": 0.5}, {"variant": "paper"}),
}


def tensors(seed: int, near: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Random bfloat16 tensors of SHAPES, or small changes of `near`."""
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i))
        made[name] = (
            noise.bfloat16() if near is None else (near[name].float() + 0.02 * noise).bfloat16()
        )
    return made


def save(folder: Path, state: Mapping[str, torch.Tensor], files: int = 1) -> Path:
    """A checkpoint folder with config and tokenizer, cut into `files` files of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "generation_config.json").write_text('{"max_length": 20}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if files == 1:
        save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(files):
        filename = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(state.items())[i::files])
        save_file(part, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def family(root: Path) -> Path:
    """`root` with the checkpoints base, one, two, three; one of them in several files."""
    base = tensors(0)
    ids = {"model.ids": torch.arange(7)}
    save(root / "base", base | ids, files=2)
    for seed, name in enumerate(("one", "two", "three"), 1):
        save(root / name, tensors(seed, near=base) | ids, files=seed)
    return root


def recipe(root: Path, method: str = "ties", **changes: Any) -> dict[str, Any]:
    """A recipe over a family as a mapping; `changes` replace top-level keys."""
    name, own, everywhere = METHODS[method]
    content: dict[str, Any] = {
        "merge_method": name,
        "models": [
            {"model": str(root / model), "parameters": {"weight": weight, **own}}
            for model, weight in (("one", 1.0), ("two", 0.5), ("three", 0.25))
        ],
    }
    if everywhere:
        content["parameters"] = dict(everywhere)
    if name != "linear":
        content["base_model"] = str(root / "base")
    return content | changes


def plan(
    root: Path, output: Path, method: str = "ties", *, shard: int = 300_000, **more: Any
) -> Plan:
    """The plan of `recipe(root, method)`, in several shards."""
    return make_plan(parse_recipe(recipe(root, method)), output, out_shard_size=shard, **more)


def write_recipe(path: Path, content: Mapping[str, Any]) -> Path:
    """A recipe file (JSON is YAML)."""
    path.write_text(json.dumps(content))
    return path


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def raw(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a folder, however it is cut into files."""
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in load(folder).items()
    }


def snapshot(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, and its time of change."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        + f" {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def partial(output: Path) -> Path:
    """The hidden folder in which `output` is made."""
    return output.parent / f".{output.name}.cl_fast-partial"


def poison(folder: Path, tensor: str, index: int, value: float) -> Path:
    """Overwrites one bfloat16 element of a stored tensor; returns the file."""
    bits = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if tensor in header:
            at = 8 + length + header[tensor]["data_offsets"][0] + 2 * index
            data[at : at + 2] = bits
            path.write_bytes(data)
            return path
    raise AssertionError(f"{tensor} is not in {folder}")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs with these mount options. Only root may mount: the callers say what they need."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def need_native() -> None:
    """Skips a test that is about the core where there is none, unless there must be one."""
    if native.load() is None:
        if os.environ.get("CL_FAST_REQUIRE_NATIVE") == "1":
            pytest.fail(f"CL_FAST_REQUIRE_NATIVE=1, but {native.reason()}")
        pytest.skip(native.reason())


def may_mount() -> bool:
    """Whether this process may mount file systems (a root inside a container often may not)."""
    if os.geteuid() != 0:
        return False
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    )
    return probe.returncode == 0
