"""Models whose tokenizers differ: the output's tokens, and which row every token gets.

The oracle is written from the rules in docs/tokenizers.md, token by token, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import write_file
from torch import Tensor

from cl_fast.checkpoints import Checkpoint
from cl_fast.checkpoints.vocabulary import read_vocabulary
from cl_fast.errors import CheckpointError, ClFastError, Interrupted, RecipeError
from cl_fast.merging.aligned import GROUP, MEAN, SHIFT, ZERO, Aligned
from cl_fast.merging.deltas import apply_delta, pack_delta
from cl_fast.merging.description import describe
from cl_fast.merging.engine import execute
from cl_fast.merging.plan import Plan, make_plan
from cl_fast.merging.recipe import parse_recipe
from cl_fast.merging.sources import Source
from cl_fast.merging.verify import verify

tokenizers = pytest.importorskip("tokenizers")

EMBED, HEAD, BODY = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WIDTH = 6


def special(content: str) -> Any:
    return tokenizers.AddedToken(content, special=True)


def bpe(*words: str, added: tuple[Any, ...] = ()) -> Any:
    """A BPE tokenizer that has every prefix of some words."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(set("".join(words))))}
    merges = []
    for word in words:
        for i in range(1, len(word)):
            if word[: i + 1] not in vocabulary:
                vocabulary[word[: i + 1]] = len(vocabulary)
                merges.append((word[:i], word[i]))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for token in added:
        made.add_tokens([token])
    return made


def words(*listed: str, added: tuple[Any, ...] = ()) -> Any:
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for token in added:
        made.add_tokens([token])
    return made


BASE = bpe("the", "cat", "sat", added=(special("<s>"),))
FIRST = bpe("the", "cat", "mat", added=(special("<s>"), special("<im>")))
SECOND = bpe("dog", "the", "sat", added=(special("<im>"), tokenizers.AddedToken("<x>")))

_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write(
    folder: Path,
    tokenizer: Any,
    rows: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    head: bool = True,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint with embeddings, a head and one vector; tokens are in tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    count = rows or (tokenizer.get_vocab_size() if tokenizer is not None else 10)
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBED: (count, WIDTH), BODY: (WIDTH,)} | ({HEAD: (count, WIDTH)} if head else {})
    tensors = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    raw = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values())
    entries = {name: (_STORED[dtype], tuple(t.shape)) for name, t in tensors.items()}
    write_file(folder / "model.safetensors", entries, raw)
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": count,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": not head,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(content))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {"tokenizer_class": "PreTrainedTokenizerFast", **(tokenizer_config or {})}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    types = {name: dtype for dtype, name in _STORED.items()}
    found = {}
    for name, info in Checkpoint.open(folder).tensors.items():
        raw = bytearray(Path(info.path).read_bytes()[info.offset : info.offset + info.nbytes])
        found[name] = torch.frombuffer(raw, dtype=types[info.dtype]).reshape(info.shape)
    return found


def ids(folder: Path) -> dict[str, int]:
    """token -> id as the tokenizers library loads them, not as the file says."""
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found: dict[str, int] = loaded.get_vocab()
    return found


class Family:
    """A base and two models in a folder, and recipes over them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, **options: Any) -> None:
        for i, (name, made) in enumerate((("base", BASE), ("a", FIRST), ("b", SECOND))):
            write(self.root / name, made, seed=i, **options)

    def recipe(self, method: str = "task_arithmetic", **changes: Any) -> dict[str, Any]:
        named = [
            {"model": str(self.root / name), "parameters": {"weight": w}} for name, w in WEIGHTS
        ]
        content: dict[str, Any] = {"merge_method": method, "models": named}
        if method != "linear":
            content["base_model"] = str(self.root / "base")
        return {**content, **changes}

    def plan(self, method: str = "task_arithmetic", output: str = "out", **changes: Any) -> Plan:
        options = {"truncate_embeddings": changes.pop("truncate", False)}
        recipe = parse_recipe(self.recipe(method, **changes))
        return make_plan(recipe, self.root / output, **options)

    def merge(self, method: str = "task_arithmetic", output: str = "out", **changes: Any) -> Path:
        plan = self.plan(method, output, **changes)
        execute(plan, fsync=False)
        return self.root / output


WEIGHTS = (("a", 0.5), ("b", 0.25))


@pytest.fixture
def family(tmp_path: Path) -> Family:
    made = Family(tmp_path)
    made.write()
    return made


def expected(root: Path, name: str, token: str, *, base: bool = True) -> Tensor:
    """The merged row of a token, in float64: each model's own, or what the rules fill in."""
    listed = (["base"] if base else []) + ["a", "b"]
    rows = {}
    for model in listed:
        index = ids(root / model).get(token)
        matrix = load(root / model)[name].double()
        rows[model] = None if index is None or index >= len(matrix) else matrix[index]
    known = [row for row in rows.values() if row is not None]
    if not known:
        filled = torch.zeros(WIDTH, dtype=torch.float64)
    elif base and rows["base"] is not None:
        filled = rows["base"]
    else:
        filled = sum(known) / len(known)
    full = {model: filled if row is None else row for model, row in rows.items()}
    if base:
        return full["base"] + sum(w * (full[model] - full["base"]) for model, w in WEIGHTS)
    return sum(w * full[model] for model, w in WEIGHTS) / sum(w for _, w in WEIGHTS)


def assert_rows(root: Path, out: Path, *, base: bool = True, tokens: Any = None) -> None:
    merged, numbers = load(out), ids(out)
    for name in (EMBED, HEAD):
        for token in tokens or numbers:
            wanted = expected(root, name, token, base=base)
            error = (merged[name][numbers[token]].double() - wanted).abs().max()
            assert error <= 8 * 2.0**-24 * (1 + wanted.abs().max()), (name, token)


# The output's tokens.


def test_union_has_the_tokens_of_all(family: Family) -> None:
    out = family.merge(tokenizer_source="union")
    every = {t for name in ("base", "a", "b") for t in ids(family.root / name)}
    found = ids(out)
    assert found.keys() == every
    assert sorted(found.values()) == list(range(len(every)))
    assert ids(family.root / "base").items() <= found.items()  # the base's keep their ids
    listed = json.loads((out / "tokenizer.json").read_text())
    said = {entry["content"]: entry["id"] for entry in listed["added_tokens"]}
    assert all(found[token] == index for token, index in said.items())
    flags = {entry["content"]: entry["special"] for entry in listed["added_tokens"]}
    assert flags["<im>"]
    assert not flags["<x>"]
    loaded = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert loaded.encode("the cat <im>").tokens == ["the", "cat", "<im>"]
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(every)
    assert load(out)[EMBED].shape[0] == len(every)
    assert_rows(family.root, out)


def test_transformers_loads_a_union_with_every_token_at_its_row(family: Family) -> None:
    transformers = pytest.importorskip("transformers")
    decoder = {
        str(i): {"content": t, "special": True, "normalized": False, "lstrip": False}
        for t, i in ids(family.root / "base").items()
        if t == "<s>"
    }
    config = {"added_tokens_decoder": decoder, "pad_token": "<pad>", "bos_token": "<s>"}
    write(family.root / "base", BASE, tokenizer_config=config)
    plan = family.plan(tokenizer_source="union")
    execute(plan, fsync=False)
    loaded = transformers.AutoTokenizer.from_pretrained(str(family.root / "out"))
    assert loaded.get_vocab() == ids(family.root / "out")
    assert "<pad>" in loaded.get_vocab()  # named by the config alone; it has a row now
    assert len(loaded) == load(family.root / "out")[EMBED].shape[0]
    assert loaded.pad_token_id == loaded.get_vocab()["<pad>"]


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("source", ["base", "a", "b"])
def test_the_tokens_of_one_model(family: Family, method: str, source: str) -> None:
    if (method, source) == ("linear", "base"):
        source, named = "a", "base"  # without a base_model, the first model
    else:
        named = source if source == "base" else str(family.root / source)
    out = family.merge(method, tokenizer_source=named)
    assert (out / "tokenizer.json").read_bytes() == (
        family.root / source / "tokenizer.json"
    ).read_bytes()
    assert load(out)[EMBED].shape[0] == len(ids(family.root / source))
    assert_rows(family.root, out, base=method != "linear")


def test_the_order_of_a_union_is_that_of_the_recipe(family: Family) -> None:
    first, again = family.plan(tokenizer_source="union"), family.plan(tokenizer_source="union")
    assert first.fingerprint == again.fingerprint
    listed = family.recipe()["models"][::-1]
    other = family.plan(tokenizer_source="union", models=listed)
    assert other.fingerprint != first.fingerprint
    texts = [file.content for file in (*first.sidecars, *other.sidecars)]
    assert len({text for text in texts if text and b"added_tokens" in text}) == 2


def test_backends_and_threads_give_the_same_bytes(family: Family) -> None:
    digests = set()
    for backend in ("native", "eager"):
        for threads in (1, 3):
            plan = family.plan("ties", f"{backend}{threads}", tokenizer_source="union")
            digests.add(execute(plan, backend=backend, threads=threads, fsync=False).digest)
    assert len(digests) == 1


# Rows.


def test_equal_vocabularies_are_read_as_they_are_stored(tmp_path: Path) -> None:
    family = Family(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, BASE, 32, seed=i)
    for source in ("union", "base", str(tmp_path / "b")):
        plan = family.plan(tokenizer_source=source)
        assert all(type(s) is Source for t in plan.tensors for s in (t.base, t.terms[0].source))
        assert plan.vocabulary is not None
        assert plan.vocabulary.aligned == ()
        assert {file.content for file in plan.sidecars} == {None}
    assert family.plan().memory == family.plan(tokenizer_source="union").memory


def test_rows_of_other_tokens_are_told(tmp_path: Path) -> None:
    made = Family(tmp_path)
    write(tmp_path / "base", words("?", "a", "b", "c"))
    write(tmp_path / "a", words("?", "a", "c", "b"))
    write(tmp_path / "b", words("?", "a", "b", "c"))
    told = f"the tokenizers of {tmp_path / 'base'} and {tmp_path / 'a'} number 2 tokens "
    told += "differently (as 'b'); rows are merged by number: write tokenizer_source: base to "
    told += "align them"
    assert [note for note in made.plan().notes if "number" in note] == [told]
    assert told not in made.plan(tokenizer_source="base").notes
    # other files of the same vocabulary, or one with more tokens, number nothing otherwise
    raw = tmp_path / "a" / "tokenizer.json"
    words("?", "a", "b", "c", added=(special("<new>"),)).save(str(raw))
    assert not [note for note in made.plan().notes if "number" in note]
    raw.write_text("damaged")
    assert not [note for note in made.plan().notes if "number" in note]


def test_padding_rows_are_kept_by_their_number(tmp_path: Path) -> None:
    """Others cut a matrix to the number of tokens; inference engines need the padded size."""
    family = Family(tmp_path)
    size = BASE.get_vocab_size()
    write(tmp_path / "base", BASE, 32, seed=1)
    write(tmp_path / "a", BASE, 32, seed=2)
    write(tmp_path / "b", SECOND, seed=3)
    out = family.merge(tokenizer_source="base")
    merged, base, a = load(out)[EMBED], load(tmp_path / "base")[EMBED], load(tmp_path / "a")[EMBED]
    assert merged.shape[0] == 32
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 32
    # the model of the same tokenizer has padding of its own; the other takes the base's
    wanted = base[size:].double() + 0.5 * (a[size:].double() - base[size:].double())
    used = set(ids(tmp_path / "b").values())
    b = load(tmp_path / "b")[EMBED]
    for row in range(size, 32):
        if row < len(b) and row not in used:
            wanted[row - size] += 0.25 * (b[row].double() - base[row].double())
    assert torch.allclose(merged[size:].double(), wanted, atol=1e-6)


def test_new_tokens_take_padding_rows_first(tmp_path: Path) -> None:
    family = Family(tmp_path)
    write(tmp_path / "base", BASE, 64, seed=1)
    write(tmp_path / "a", FIRST, seed=2)
    write(tmp_path / "b", SECOND, seed=3)
    out = family.merge(tokenizer_source="union")
    assert load(out)[EMBED].shape[0] == 64
    assert_rows(tmp_path, out)


def test_pad_to_multiple_of(family: Family) -> None:
    out = family.merge(tokenizer={"source": "union", "pad_to_multiple_of": 16})
    merged, count = load(out)[EMBED], len(ids(out))
    assert merged.shape[0] == 32 > count
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 32
    assert_rows(family.root, out)
    # the mean of each model's rows, merged: the mean of the merged rows, for a linear method
    mean = merged[:count].double().mean(0)
    assert torch.allclose(merged[count:].double(), mean.expand(32 - count, -1), atol=1e-6)


def test_tied_heads_need_only_the_embeddings(tmp_path: Path) -> None:
    family = Family(tmp_path)
    family.write(head=False)
    out = family.merge(tokenizer_source="union")
    assert load(out).keys() == {EMBED, BODY}
    assert load(out)[EMBED].shape[0] == len(ids(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_a_mean_once(tmp_path: Path, dtype: torch.dtype) -> None:
    family = Family(tmp_path)
    family.write(dtype=dtype)
    plan = family.plan(tokenizer_source="union")
    [source] = [t.base for t in plan.tensors if t.name == EMBED]
    assert isinstance(source, Aligned)
    data = torch.frombuffer(source.make(), dtype=dtype).reshape(source.rows, WIDTH)
    assert plan.vocabulary is not None
    execute(plan, fsync=False)
    numbers = ids(family.root / "out")
    for token in ("m", "mat", "<im>", "<x>"):
        rows = [
            load(tmp_path / name)[EMBED][ids(tmp_path / name)[token]].double()
            for name in ("a", "b")
            if token in ids(tmp_path / name)
        ]
        mean = sum(rows) / len(rows)
        assert torch.equal(data[numbers[token]], mean.float().to(dtype)), token


def test_models_of_different_types(tmp_path: Path) -> None:
    family = Family(tmp_path)
    write(tmp_path / "base", BASE, dtype=torch.bfloat16)
    write(tmp_path / "a", FIRST, seed=1, dtype=torch.float16)
    write(tmp_path / "b", SECOND, seed=2)
    plan = family.plan(tokenizer_source="union", out_dtype="float32")
    execute(plan, fsync=False)
    assert_rows(tmp_path, tmp_path / "out")
    assert {t.dtype for t in family.plan(tokenizer_source="union").tensors} == {"BF16"}


def test_rows_that_a_tokenizer_lacks(family: Family) -> None:
    """A token behind the last row (a pad token that was added without resizing) is no row."""
    write(family.root / "base", BASE, BASE.get_vocab_size() - 1)  # <s> has none
    write(family.root / "b", SECOND, seed=2)
    plan = family.plan(tokenizer_source="base")
    execute(plan, fsync=False)
    assert load(family.root / "out")[EMBED].shape[0] == BASE.get_vocab_size()  # a's <s>
    assert_rows(family.root, family.root / "out")
    for name in ("base", "a", "b"):
        named = {"model_max_length": len(name)}  # files that differ, tokens that do not
        write(family.root / name, BASE, BASE.get_vocab_size() - 1, tokenizer_config=named)
    plan = family.plan(output="short", tokenizer_source="base")
    assert plan.vocabulary is not None
    assert plan.vocabulary.aligned == ()
    assert plan.vocabulary.rows == BASE.get_vocab_size() - 1
    assert any("tokens beyond the rows" in note for note in plan.notes)


# Rules for single tokens.


def token_rules(family: Family, **rules: Any) -> dict[str, Any]:
    return {"source": "union", "tokens": rules}


def test_rules_for_tokens(family: Family) -> None:
    root = family.root
    rules = {
        "mat": {"source": {"kind": "zero"}},  # for base and b, which lack it
        "the": {"source": str(root / "b"), "force": True},
        "<im>": {"source": {"kind": "model_token", "model": str(root / "b"), "token": "dog"}},
        "<new>": {"source": {"kind": "model_token", "model": str(root / "a"), "token_id": 3}},
        "<empty>": {},
        "<x>": {"source": {"kind": "zero"}, "force": True},
    }
    out = family.merge(tokenizer={"source": "union", "tokens": rules})
    numbers, merged = ids(out), load(out)
    assert {"<new>", "<empty>"} <= numbers.keys()
    for name in (EMBED, HEAD):
        a, b = (load(root / model)[name].double() for model in ("a", "b"))
        of_a, of_b = ids(root / "a"), ids(root / "b")

        def row(token: str, name: str = name) -> Tensor:
            return merged[name][numbers[token]].double()

        assert torch.allclose(row("mat"), 0.5 * a[of_a["mat"]], atol=1e-6)
        assert torch.equal(row("the"), b[of_b["the"]])
        dog = b[of_b["dog"]]
        wanted = dog + 0.5 * (a[of_a["<im>"]] - dog) + 0.25 * (b[of_b["<im>"]] - dog)
        assert torch.allclose(row("<im>"), wanted, atol=1e-6)
        assert torch.equal(row("<new>"), a[3])
        assert not row("<empty>").any()
        assert not row("<x>").any()
    assert_rows(root, out, tokens=["cat", "sat", "dog", "m"])


def test_a_rule_that_every_model_makes_needless_is_told(family: Family) -> None:
    plan = family.plan(tokenizer=token_rules(family, the={"source": str(family.root / "a")}))
    assert any("tokenizer.tokens.the: every model has a row" in note for note in plan.notes)


# The configs.


def test_special_ids_go_with_the_tokenizer(family: Family) -> None:
    root = family.root
    number = ids(root / "a")
    write(
        root / "a",
        FIRST,
        seed=1,
        config={"bos_token_id": number["<s>"], "eos_token_id": [number["<im>"], 0]},
    )
    old = ids(root / "base")
    write(root / "base", BASE, config={"pad_token_id": old["cat"], "bos_token_id": old["<s>"]})
    (root / "base" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "pad_token_id": old["cat"], "temperature": 0.5})
    )
    out = family.merge(tokenizer_source=str(root / "a"))
    config = json.loads((out / "config.json").read_text())
    assert config["bos_token_id"] == number["<s>"]
    assert config["eos_token_id"] == [number["<im>"], 0]
    assert config["pad_token_id"] == number["cat"]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": [number["<im>"], 0],
        "pad_token_id": number["cat"],
        "temperature": 0.5,
    }
    plan = family.plan(tokenizer_source="base")
    assert not any("token_id" in note for note in plan.notes)


def test_the_tokenizer_of_a_base_that_is_not_merged(family: Family) -> None:
    """passthrough with a base_model: it gives config and tokenizer, and no row."""
    one = {"sources": [{"model": str(family.root / "a"), "layer_range": [0, 1]}]}
    path = family.root / "a" / "model.safetensors"
    tensors = load(family.root / "a") | {"model.layers.0.x": torch.ones(2)}
    raw = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values())
    write_file(path, {key: ("F32", tuple(t.shape)) for key, t in tensors.items()}, raw)
    content = {
        "merge_method": "passthrough",
        "base_model": str(family.root / "base"),
        "slices": [one],
        "tokenizer_source": "base",
    }
    out = family.root / "out"
    execute(make_plan(parse_recipe(content), out), fsync=False)
    numbers, merged = ids(out), load(out)
    assert numbers == ids(family.root / "base")
    of_a, a = ids(family.root / "a"), load(family.root / "a")
    for name in (EMBED, HEAD):
        assert len(merged[name]) == len(numbers)
        for token, index in numbers.items():
            mine = a[name][of_a[token]] if token in of_a else torch.zeros(WIDTH)
            assert torch.equal(merged[name][index], mine), token
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(numbers)
    assert verify(out).ok


# Truncation.


def test_truncation_keeps_the_first_rows(tmp_path: Path) -> None:
    family = Family(tmp_path)
    for i, (name, rows) in enumerate((("base", 20), ("a", 16), ("b", 18))):
        write(tmp_path / name, None, rows, seed=i)
    with pytest.raises(CheckpointError, match="vocabularies differ"):
        family.plan()
    plan = family.plan(truncate=True)
    assert any(note.startswith("UNSAFE: lm_head.weight is cut to 16 rows") for note in plan.notes)
    execute(plan, fsync=False)
    merged = load(tmp_path / "out")
    for name in (EMBED, HEAD):
        base, a, b = (load(tmp_path / m)[name][:16].double() for m in ("base", "a", "b"))
        wanted = base + 0.5 * (a - base) + 0.25 * (b - base)
        assert torch.allclose(merged[name].double(), wanted, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16
    assert verify(tmp_path / "out").ok
    for name in ("base", "a", "b"):
        write(tmp_path / name, None, 16)
    assert any("has no effect" in note for note in family.plan(truncate=True).notes)


# Slices.


def test_slices_align_what_they_take(tmp_path: Path) -> None:
    """The embeddings are merged in the first slice, the head is that of the last one."""
    family = Family(tmp_path)
    family.write()
    for name, made in (("base", BASE), ("a", FIRST), ("b", SECOND)):
        folder = tmp_path / name
        tensors = load(folder)
        tensors |= {f"model.layers.{i}.x": torch.full((2,), float(i)) for i in range(2)}
        raw = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values())
        entries = {key: ("F32", tuple(t.shape)) for key, t in tensors.items()}
        write_file(folder / "model.safetensors", entries, raw)
        assert made.get_vocab_size() == len(tensors[EMBED])

    def source(name: str, *layers: int) -> dict[str, Any]:
        return {"model": str(tmp_path / name), "layer_range": list(layers)}

    content = {
        "merge_method": "linear",
        "slices": [
            {"sources": [{**source(n, 0, 1), "parameters": {"weight": w}} for n, w in WEIGHTS]},
            {"sources": [{**source("base", 1, 2), "parameters": {"weight": 1.0}}]},
        ],
        "tokenizer_source": "union",
    }
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    execute(plan, fsync=False)
    merged, numbers = load(tmp_path / "out"), ids(tmp_path / "out")
    assert merged[EMBED].shape == merged[HEAD].shape == (len(numbers), WIDTH)
    base = ids(tmp_path / "base")
    for token, index in numbers.items():
        wanted = expected(tmp_path, EMBED, token, base=False)
        assert torch.allclose(merged[EMBED][index].double(), wanted, atol=1e-6), token
        mine = load(tmp_path / "base")[HEAD][base[token]] if token in base else torch.zeros(WIDTH)
        assert torch.equal(merged[HEAD][index], mine), token
    assert verify(tmp_path / "out").ok


# Inputs that are changes of the base.


def test_a_packed_delta_has_the_tokens_of_its_base(tmp_path: Path) -> None:
    family = Family(tmp_path)
    write(tmp_path / "base", BASE, seed=1)
    write(tmp_path / "tuned", BASE, seed=2)
    write(tmp_path / "b", SECOND, seed=3)
    delta = tmp_path / "tuned.delta.safetensors"
    pack_delta(tmp_path / "base", tmp_path / "tuned", delta, drop_rate=0.5, seed=7)
    apply_delta(tmp_path / "base", delta, tmp_path / "a", fsync=False)
    found = {}
    for name in ("a", "tuned.delta.safetensors"):
        models = [
            {"model": str(tmp_path / name), "parameters": {"weight": 0.5}},
            {"model": str(tmp_path / "b"), "parameters": {"weight": 0.25}},
        ]
        out = family.merge(
            "task_arithmetic", f"{name}.out", models=models, tokenizer_source="union"
        )
        found[name] = load(out)
        assert verify(out).ok
    dense, packed = found.values()
    for name in (EMBED, HEAD):
        assert torch.allclose(dense[name], packed[name], atol=1e-6)
    # another base, of the same shapes, is refused
    write(tmp_path / "base", BASE, seed=9)
    plan = family.plan(output="again", models=models, tokenizer_source="union")
    with pytest.raises(CheckpointError, match="packed on"):
        execute(plan, fsync=False)


# Records, resume, verify.


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_an_interrupted_merge_goes_on(family: Family, backend: str) -> None:
    def plan(output: str) -> Plan:
        recipe = parse_recipe(family.recipe(tokenizer_source="union"))
        return make_plan(recipe, family.root / output, out_shard_size=600)

    whole = execute(plan("whole"), backend=backend, fsync=False)
    assert whole.shards == 2

    def stop(what: str, done: int, total: int) -> None:
        if what == "merge" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(plan("out"), backend=backend, fsync=False, progress=stop)
    found = execute(plan("out"), backend=backend, fsync=False, resume=True)
    assert (found.digest, found.resumed) == (whole.digest, 1)


def test_verify_computes_aligned_tensors_again(family: Family, tmp_path: Path) -> None:
    out = family.merge(
        tokenizer={"source": "union", "tokens": {"the": {"source": str(family.root / "b")}}}
    )
    recorded = json.loads((out / "cl_fast_merge.json").read_text())["vocabulary"]
    assert recorded["aligned"] == [EMBED, HEAD]
    report = verify(out, sample=1)
    assert report.ok, report.problems
    assert {EMBED, HEAD} <= set(report.recomputed)
    # another row in an input that the header does not show
    path = family.root / "a" / "model.safetensors"
    info = Checkpoint.open(family.root / "a").tensors[EMBED]
    raw = bytearray(path.read_bytes())
    raw[info.offset + 5] ^= 4
    path.write_bytes(raw)
    assert any(EMBED in problem for problem in verify(out).problems)
    raw[info.offset + 5] ^= 4
    path.write_bytes(raw)
    assert verify(out).ok
    # another tokenizer
    bpe("cat", "the", "mat", "rat", added=(special("<s>"),)).save(
        str(family.root / "a" / "tokenizer.json")
    )
    assert any("tokenizers of its inputs" in problem for problem in verify(out).problems)


def test_a_change_of_a_tokenizer_changes_the_fingerprint(family: Family) -> None:
    first = family.plan(tokenizer_source="base").fingerprint
    assert family.plan(tokenizer_source="base").fingerprint == first
    bpe("mat", "the", "cat", added=(special("<s>"), special("<im>"))).save(
        str(family.root / "a" / "tokenizer.json")
    )
    assert family.plan(tokenizer_source="base").fingerprint != first


def test_describe_tells_the_tokens(family: Family) -> None:
    text = "\n".join(describe(family.plan(tokenizer_source="union")))
    assert f"tokens   union, 23 tokens, 23 rows; aligned: {EMBED}, {HEAD}" in text


# What cannot be.


def unreadable(family: Family) -> None:
    (family.root / "a" / "tokenizer.json").write_text("{}")


def of_another_kind(family: Family) -> None:
    write(family.root / "b", words("?", "the", "cat"))


def no_tokenizer(family: Family) -> None:
    (family.root / "b" / "tokenizer.json").unlink()


def nothing_shared(family: Family) -> None:
    write(family.root / "b", words("x", "y", "?"))


def gaps(family: Family) -> None:
    path = family.root / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["id"] = 40
    path.write_text(json.dumps(content))


def slow(family: Family) -> None:
    (family.root / "b" / "tokenizer.json").unlink()
    (family.root / "b" / "tokenizer.model").write_bytes(b"not a model")


def nothing(family: Family) -> None:
    pass


BAD: list[tuple[Callable[[Family], None], Any, type[ClFastError], tuple[str, ...]]] = [
    (unreadable, "union", CheckpointError, ("a/tokenizer.json", "no object 'model'")),
    (of_another_kind, "union", RecipeError, ("/base (BPE)", "/b (WordLevel)", "unite")),
    (no_tokenizer, "union", CheckpointError, ("/b holds no tokenizer", "/base")),
    (no_tokenizer, "base", CheckpointError, ("/b holds no tokenizer", "have 16 rows")),
    (nothing_shared, "base", CheckpointError, ("no token in common", "/b")),
    (gaps, "union", CheckpointError, ("has id 40, loading it gives 12", "/base/")),
    (slow, "union", CheckpointError, ("/b: has no tokenizer.json", "cannot convert")),
    (nothing, "/nowhere", CheckpointError, ("tokenizer_source: '/nowhere' does not exist",)),
    (nothing, {"the": {}}, RecipeError, ("tokenizer.tokens.the: has no effect",)),
    (nothing, {"the": {"source": "/m"}}, RecipeError, ("'/m' is none of the models",)),
    (
        nothing,
        {"q": {"source": "ROOT/a"}},
        RecipeError,
        ("tokenizer.tokens.q.source", "no row for 'q'", "has 14 rows"),
    ),
    (
        nothing,
        {"q": {"source": {"kind": "model_token", "model": "ROOT/a", "token_id": 99}}},
        RecipeError,
        ("no row for id 99",),
    ),
]


@pytest.mark.parametrize(("damage", "asked", "error", "said"), BAD)
def test_what_cannot_be_united(
    family: Family, damage: Any, asked: Any, error: type[ClFastError], said: tuple[str, ...]
) -> None:
    damage(family)
    key: dict[str, Any] = {"tokenizer_source": asked}
    if isinstance(asked, dict):
        text = json.dumps({"source": "union", "tokens": asked})
        key = {"tokenizer": json.loads(text.replace("ROOT", str(family.root)))}
    with pytest.raises(error) as caught:
        family.plan(**key)
    for part in said:
        assert part in str(caught.value)
    assert not (family.root / "out").exists()


def test_a_model_without_a_tokenizer_of_the_same_size(tmp_path: Path) -> None:
    family = Family(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, BASE if name != "b" else None, BASE.get_vocab_size(), seed=i)
    plan = family.plan(tokenizer_source="base")
    assert any("are taken to be those of" in note for note in plan.notes)
    assert plan.vocabulary is not None
    assert plan.vocabulary.aligned == ()


BAD_BLOCKS: list[tuple[Any, str]] = [
    ({"source": 3}, "tokenizer.source: must be 'base', 'union' or a model"),
    ({"source": " "}, "tokenizer.source: is empty"),
    ({"pad_to_multiple_of": 0}, "tokenizer.pad_to_multiple_of: must be a whole number"),
    ({"pad_to_multiple_of": True}, "tokenizer.pad_to_multiple_of: must be a whole number"),
    ({"tokens": ["x"]}, "tokenizer.tokens: must be a mapping"),
    ({"tokens": {3: {}}}, "tokenizer.tokens: a token must be text"),
    ({"tokens": {"x": "base"}}, "tokenizer.tokens.x: must be a mapping"),
    ({"tokens": {"x": {"sorce": "a"}}}, "tokenizer.tokens.x.sorce: unknown key"),
    ({"tokens": {"x": {"force": 1}}}, "tokenizer.tokens.x.force: must be true or false"),
    ({"tokens": {"x": {"force": True}}}, "tokenizer.tokens.x.force: needs a source"),
    ({"tokens": {"x": {"source": 3}}}, "tokenizer.tokens.x.source: must be a model"),
    ({"tokens": {"x": {"source": ""}}}, "tokenizer.tokens.x.source: is empty"),
    (
        {"tokens": {"x": {"source": {"kind": "zeros"}}}},
        "tokenizer.tokens.x.source.kind: must be zero or model_token; got 'zeros'; did you mean",
    ),
    (
        {"tokens": {"x": {"source": {"kind": "zero", "model": "m"}}}},
        "tokenizer.tokens.x.source.model: unknown key",
    ),
    (
        {"tokens": {"x": {"source": {"kind": "model_token", "token": "y"}}}},
        "tokenizer.tokens.x.source.model: must name a model",
    ),
    (
        {"tokens": {"x": {"source": {"kind": "model_token", "model": "m"}}}},
        "give either token or token_id",
    ),
    (
        {"tokens": {"x": {"source": {"kind": "model_token", "model": "m", "token_id": -1}}}},
        "token_id: must be a whole number of at least 0",
    ),
    (
        {"tokens": {"x": {"source": {"kind": "model_token", "model": "m", "token": 5}}}},
        "token: must be text",
    ),
]


@pytest.mark.parametrize(("block", "said"), BAD_BLOCKS)
def test_bad_tokenizer_blocks(block: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(Family(tmp_path).recipe(tokenizer=block))
    assert said in str(caught.value)


# The gather itself.


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_aligned_rows_are_a_gather(data: st.DataObject, tmp_path_factory: Any) -> None:
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    kinds |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    width = data.draw(st.integers(1, 5))
    names = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3))
    path = tmp_path_factory.mktemp("aligned") / "rows"
    values, sources, raw = [], [], b"\0" * 16
    for i, kind in enumerate(names):
        x = torch.randn(4 + i, width, generator=torch.Generator().manual_seed(i)).to(kinds[kind])
        values.append(x)
        stored = x.view(torch.uint8).numpy().tobytes()
        sources.append(Source(str(path), len(raw), kind, len(stored)))
        raw += stored
    path.write_bytes(raw)
    dtype = "F32" if len(set(names)) > 1 or names[0].startswith("F8") else names[0]
    one = st.integers(0, len(names) - 1).flatmap(
        lambda k: st.integers(0, 3 + k).map(lambda r: k << SHIFT | r)
    )
    groups = data.draw(st.lists(st.lists(one, min_size=2, max_size=3), max_size=2))
    code = st.one_of(one, st.sampled_from([ZERO, MEAN, *(GROUP - g for g in range(len(groups)))]))
    codes = data.draw(st.lists(code, min_size=1, max_size=12))
    item = 4 if dtype == "F32" else 2
    aligned = Aligned(
        path=str(path),
        offset=0,
        dtype=dtype,
        nbytes=len(codes) * width * item,
        rows=len(codes),
        width=width,
        inputs=tuple(sources),
        codes=torch.tensor(codes, dtype=torch.int64).numpy().tobytes(),
        groups=tuple(map(tuple, groups)),
    )

    def row(code: int) -> Tensor:
        return values[code >> SHIFT].double()[code & (1 << SHIFT) - 1]

    wanted = []
    for number in codes:
        if number >= 0:
            wanted.append(row(number))
        elif number in (ZERO, MEAN):
            wanted.append(torch.zeros(width, dtype=torch.float64))
        else:
            group = groups[GROUP - number]
            wanted.append(sum(row(c) for c in group) / len(group))
    table = torch.stack(wanted).float().to(kinds[dtype])
    known = [i for i, number in enumerate(codes) if number != MEAN]
    mean = table[known].double().sum(0) / max(1, len(known))
    table[[i for i, number in enumerate(codes) if number == MEAN]] = mean.float().to(kinds[dtype])
    found = torch.frombuffer(aligned.make(), dtype=kinds[dtype]).reshape(len(codes), width)
    assert torch.equal(found, table)


def test_a_gather_from_a_short_file(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(20))
    source = Source(str(path), 8, "F32", 16)
    aligned = Aligned(str(path), 0, "F32", 16, 4, 1, (source,), bytes(32), ())
    with pytest.raises(CheckpointError, match="ended after 12 of 16 bytes"):
        aligned.make()


# Reading.


def test_vocabularies_are_read_as_they_load(tmp_path: Path) -> None:
    made = bpe("the", "cat", added=(special("<s>"), tokenizers.AddedToken("the")))
    folder = write(
        tmp_path / "m", made, tokenizer_config={"pad_token": "<pad>", "eos_token": "<s>"}
    )
    found = read_vocabulary(folder)
    assert found is not None
    assert found.kind == "BPE"
    assert found.tokens == {**made.get_vocab(), "<pad>": made.get_vocab_size()}
    assert list(found.added) == ["the", "<s>", "<pad>"]
    assert read_vocabulary(tmp_path) is None
    pieces = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([tuple(p) for p in pieces], 0))
    unigram.save(str(tmp_path / "tokenizer.json"))
    found = read_vocabulary(tmp_path)
    assert found is not None
    assert (found.kind, found.tokens) == ("Unigram", {"<unk>": 0, "a": 1, "b": 2})


# mergekit, run on the same files.


def by_mergekit(family: Family, recipe: dict[str, Any], output: str) -> Path:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    out = family.root / output
    run_merge(
        MergeConfiguration.model_validate(recipe),
        str(out),
        MergeOptions(quiet=True, write_model_card=False),
    )
    return out


MERGEKIT = [
    ("task_arithmetic", {"tokenizer_source": "union"}),
    ("task_arithmetic", {"tokenizer_source": "base"}),
    ("linear", {"tokenizer_source": "union"}),
    ("linear", {"tokenizer_source": "ROOT/b"}),
    (
        "task_arithmetic",
        {
            "tokenizer": {
                "source": "union",
                "pad_to_multiple_of": 32,
                "tokens": {
                    "the": {"source": "ROOT/b", "force": True},
                    "mat": {"source": {"kind": "zero"}},
                    "<new>": {"source": {"kind": "model_token", "model": "ROOT/a", "token": "cat"}},
                },
            }
        },
    ),
]


@pytest.mark.peers
@pytest.mark.parametrize(("method", "keys"), MERGEKIT)
def test_mergekit_gives_every_token_the_same_row(
    tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    """Ids differ: there new tokens have the order of a hash table, here that of the models."""
    family = Family(tmp_path)
    layers = {"num_hidden_layers": 0, "hidden_size": WIDTH, "num_attention_heads": 1}
    family.write(config={**layers, "num_key_value_heads": 1, "intermediate_size": 4})
    keys = json.loads(json.dumps(keys).replace("ROOT", str(tmp_path)))
    recipe = family.recipe(method, dtype="float32", **keys)
    theirs = by_mergekit(family, recipe, "theirs")
    ours = family.merge(method, dtype="float32", **keys)
    mine, other = ids(ours), ids(theirs)
    assert mine.keys() == other.keys()
    a, b = load(ours), load(theirs)
    for name in (EMBED, HEAD):
        assert a[name].shape == b[name].shape
        for token, index in mine.items():
            error = (a[name][index] - b[name][other[token]]).abs().max()
            assert error <= 2.0**-20, (name, token)
        for index in range(len(mine), a[name].shape[0]):
            assert torch.allclose(a[name][index], b[name][index], atol=1e-6)
