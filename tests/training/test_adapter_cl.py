"""Adapters after blocks, alone and by row; the task of an input by its perplexity."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from cl_fast.errors import CheckpointError, NonFiniteError
from cl_fast.integrations.keeping import KeepCallback
from cl_fast.training.adapters import (
    Adapter,
    AdapterPerTask,
    adapter_names,
    adapter_state_dict,
    add_adapters,
    blocks_of,
    identify_task,
    load_adapter,
    remove_adapters,
    save_adapter,
    train_adapter,
    use_adapter,
    using_adapter,
)
from cl_fast.training.anchors import Anchor
from cl_fast.training.keeping import Keep, Task


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=tiny_models.VOCABULARY, n_positions=64,
        initializer_range=0.4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    return tiny_models.llama(seed, **changes).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def filled(model: nn.Module, *names: str) -> nn.Module:
    """Adapters that do something, each something else."""
    for k, name in enumerate(names):
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for value in adapter_state_dict(model, name).values():
                value += 0.3 * torch.randn(value.shape, generator=generator)
    return model


@pytest.fixture(params=MODELS)
def two(request: pytest.FixtureRequest) -> nn.Module:
    model = MODELS[request.param]()
    add_adapters(model, ["a", "b"], bottleneck=3)
    return filled(model, "a", "b")


def ids(size: int = 4, length: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny_models.VOCABULARY, (size, length), generator=generator)


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch).logits


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_adapter_by_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    adapter = Adapter(6, 3, activation=activation, dtype=torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(adapter(x), x)
    for p in adapter.parameters():
        p.data = torch.randn_like(p)
    phi = {
        "relu": lambda h: h.clamp(min=0),
        "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
        "silu": lambda h: h / (1 + (-h).exp()),
        "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
    }[activation]
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    p = dict(adapter.named_parameters())
    normed = (x - mean) / (var + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    want = phi(normed @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"]
    torch.testing.assert_close(adapter(x), x + want)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_at_the_start_and_after_removal(name: str) -> None:
    model = MODELS[name]()
    before, keys = logits(model, ids()), list(model.state_dict())
    add_adapters(model, ["a", "b.c"], bottleneck=3)
    assert adapter_names(model) == ["a", "b.c"]
    for choice in (None, "a", "b.c", ["a", None, "b.c", "a"]):
        use_adapter(model, choice)
        assert torch.equal(logits(model, ids()), before)
    assert [k for k in model.state_dict() if "task_adapters" not in k] == keys
    filled(model, "a")
    use_adapter(model, "a")
    assert not torch.equal(logits(model, ids()), before)
    use_adapter(model, None)
    assert torch.equal(logits(model, ids()), before)
    remove_adapters(model, "a")
    assert adapter_names(model) == ["b.c"]
    remove_adapters(model)
    assert list(model.state_dict()) == keys
    assert not any(block._forward_hooks for block in blocks_of(model))
    assert torch.equal(logits(model, ids()), before)


def test_by_hand_after_each_block() -> None:
    """The blocks called one by one, their outputs put through the adapters."""
    model = llama()
    plain = copy.deepcopy(model)
    add_adapters(model, "a", bottleneck=3)
    filled(model, "a")
    use_adapter(model, "a")
    adapters = [block.task_adapters.get("a") for block in blocks_of(model)]
    for block, adapter in zip(plain.model.layers, adapters, strict=True):
        own = block.forward
        block.forward = lambda *x, own=own, adapter=adapter, **k: adapter(own(*x, **k))
    assert torch.equal(logits(model, ids()), logits(plain, ids()))


@pytest.mark.parametrize("choice", [["a", "a", "b", None], ["b", None, "a", "b"], ["b"] * 4])
def test_rows_of_a_batch_have_their_own(two: nn.Module, choice: list[str | None]) -> None:
    batch = ids()
    with using_adapter(two, choice):
        together = logits(two, batch)
    for i, name in enumerate(choice):
        with using_adapter(two, name):
            alone = logits(two, batch[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_gradients_of_rows(two: nn.Module) -> None:
    """Each adapter learns from its own rows only."""
    batch, choice = ids(), ["b", "a", "b", "a"]
    two.requires_grad_(False)
    parameters = [p for n, p in two.named_parameters() if "task_adapters" in n]
    for p in parameters:
        p.requires_grad_()
    with using_adapter(two, choice):
        together = torch.autograd.grad(two(input_ids=batch).logits.square().sum(), parameters)
    alone = [torch.zeros_like(p) for p in parameters]
    for i, name in enumerate(choice):
        with using_adapter(two, name):
            value = two(input_ids=batch[i : i + 1]).logits.square().sum()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        alone = [x if g is None else x + g for x, g in zip(alone, found, strict=True)]
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_generate_with_a_cache(two: nn.Module) -> None:
    batch, choice = ids(length=4), ["a", "b", None, "b"]
    options: Any = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with using_adapter(two, choice):
        together = two.generate(batch, attention_mask=torch.ones_like(batch), **options)
        without = two.generate(
            batch, attention_mask=torch.ones_like(batch), use_cache=False, **options
        )
    assert torch.equal(together, without)
    for i, name in enumerate(choice):
        with using_adapter(two, name):
            row = batch[i : i + 1]
            alone = two.generate(row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_the_active_one_learns(two: nn.Module, reentrant: bool) -> None:
    """With activations recomputed in the backward pass as well."""
    found = []
    batch = ids()
    for checkpointing in (False, True):
        trained = train_adapter(two, "b")
        two.train()
        if checkpointing:
            two.enable_input_require_grads()
            two.activation_checkpointing_enable({"use_reentrant": reentrant})
        two.zero_grad()
        two(input_ids=batch, labels=batch).loss.backward()
        grads = {n: p.grad.clone() for n, p in two.named_parameters() if p.grad is not None}
        assert len(trained) == len(grads) == 2 * 6
        assert all("task_b" in name and g.any() for name, g in grads.items())
        assert [n for n, p in two.named_parameters() if p.requires_grad] == list(grads)
        found.append(grads)
        two.eval()
    for name, g in found[0].items():
        if "gpt2" not in type(two).__name__.lower():  # its dropout is drawn anew
            torch.testing.assert_close(found[1][name], g)


def test_copies_are_apart() -> None:
    model = llama()
    add_adapters(model, ["a", "b"], bottleneck=3)
    filled(model, "a", "b")
    use_adapter(model, "a")
    twin = copy.deepcopy(model)
    use_adapter(twin, "b")
    with using_adapter(model, "b"):
        want = logits(model, ids())
    assert torch.equal(logits(twin, ids()), want)
    assert not torch.equal(logits(model, ids()), want)


def test_the_same_numbers_everywhere() -> None:
    """They follow from seed, name and block alone: not from the global state or the order."""
    first, second = llama(), llama()
    add_adapters(first, ["a", "b"], bottleneck=3)
    torch.rand(3)
    add_adapters(second, "b", bottleneck=3)
    one, other = adapter_state_dict(first, "b"), adapter_state_dict(second, "b")
    assert all(torch.equal(one[k], other[k]) for k in one)
    downs = [one["blocks.0.down.weight"], one["blocks.1.down.weight"]]
    downs.append(adapter_state_dict(first, "a")["blocks.0.down.weight"])
    assert len({tuple(x.flatten().tolist()) for x in downs}) == 3
    assert all(0.1 < float(x.abs().max()) <= 0.25 for x in downs)


def test_low_precision_blocks_have_float32_adapters() -> None:
    model = llama().bfloat16()
    add_adapters(model, "a", bottleneck=3)
    filled(model, "a")
    use_adapter(model, "a")
    assert {p.dtype for p in adapter_state_dict(model, "a").values()} == {torch.float32}
    assert logits(model, ids()).dtype == torch.bfloat16


# --- on disk -----------------------------------------------------------------------------------


def test_save_and_load(two: nn.Module, tmp_path: Path) -> None:
    save_adapter(two, "a", tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    kind = next(k for k in MODELS if k in type(two).__name__.lower())
    fresh = MODELS[kind]()
    assert load_adapter(fresh, tmp_path / "a.safetensors", name="news") == "news"
    use_adapter(fresh, "news")
    with using_adapter(two, "a"):
        assert torch.equal(logits(fresh, ids()), logits(two, ids()))
    rounded = MODELS[kind]().bfloat16()
    assert load_adapter(rounded, tmp_path / "a.safetensors") == "a"


def test_bad_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama()
    add_adapters(model, "a", bottleneck=3)
    path = tmp_path / "a.safetensors"
    save_adapter(model, "a", path)
    state = load_file(path)
    meta = {"format": "cl_fast adapter 1", "name": "a", "activation": "relu"}
    lacks = {k: v for k, v in state.items() if k != "blocks.1.up.bias"}
    save_file(lacks, tmp_path / "lacks", metadata=meta)
    save_file({**state, "blocks.1.up.bias": torch.zeros(9)}, tmp_path / "shape", metadata=meta)
    save_file(state, tmp_path / "other", metadata={"format": "pt"})
    (tmp_path / "cut").write_bytes(path.read_bytes()[:200])
    changed = llama()
    changed.model.layers[1].mlp.down_proj.weight.data *= 1.1
    changed.model.layers[1].mlp.up_proj.weight.data *= 1.1
    changed.model.layers[1].mlp.gate_proj.weight.data *= 1.1
    table: list[tuple[nn.Module, str, str]] = [
        (llama(), "nowhere", "cannot be read as an adapter"),
        (llama(), "cut", "cannot be read as an adapter"),
        (llama(), "other", "was not written by save_adapter"),
        (llama(), "lacks", "lacks the tensor blocks.1.up.bias"),
        (llama(), "shape", "blocks.1.up.bias has the shape (9,); an adapter of this model has"),
        (llama(hidden_size=32), "a.safetensors", "blocks.0.norm.weight has the shape (16,)"),
        (llama(num_hidden_layers=3), "a.safetensors", "of a base with 2 blocks; the model has 3"),
        (llama(1), "a.safetensors", "block 0 of the model has other weights than the base"),
        (changed, "a.safetensors", "block 1 of the model has other weights than the base"),
    ]
    for target, name, words in table:
        with pytest.raises(CheckpointError, match=re.escape(words)):
            load_adapter(target, tmp_path / name)
        assert not adapter_names(target)
    load_adapter(changed, path, check_base=False)
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        load_adapter(changed, path, check_base=False)


# --- which task --------------------------------------------------------------------------------


def cross_entropy_by_hand(model: nn.Module, row: list[int]) -> float:
    """Float64, from the logits of the row alone, without padding."""
    logp = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
    return -float(sum(logp[i, row[i + 1]] for i in range(len(row) - 1)).detach()) / (len(row) - 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_cross_entropies(two: nn.Module, side: str, max_tokens: int) -> None:
    rows = [ids(1, length, seed=length)[0].tolist() for length in (2, 6, 9, 5)]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    left, pairs = side == "left", list(zip(pads, rows, strict=True))
    batch = {
        "input_ids": torch.tensor([p + r if left else r + p for p, r in pairs]),
        "attention_mask": torch.tensor(
            [p + [1] * len(r) if left else [1] * len(r) + p for p, r in pairs]
        ),
        "labels": torch.full((4, width), -100),
    }
    if left:  # GPT-2 does not count positions from the mask by itself
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    use_adapter(two, "b")
    found = identify_task(two, batch, ["b", "a"], max_tokens=max_tokens)
    for t, name in enumerate(("b", "a")):
        with using_adapter(two, name):
            for i, row in enumerate(rows):
                want = cross_entropy_by_hand(two, row)
                assert float(found.cross_entropy[i, t]) == pytest.approx(want, rel=1e-5)
    best = found.cross_entropy.argmin(1).tolist()
    assert found.names == [["b", "a"][t] for t in best]
    torch.testing.assert_close(found.perplexity, found.cross_entropy.exp())
    assert len(set(found.names)) == 2  # the case says something
    with using_adapter(two, "b"):
        want_b = logits(two, ids())
    assert torch.equal(logits(two, ids()), want_b)  # what was in use still is


def test_no_logits_are_made(two: nn.Module) -> None:
    batch = {"input_ids": ids(8, 40)}
    with tiny_models.NoLogits(rows=8 * 40):
        identify_task(two, batch)


def train(model: nn.Module, keep: AdapterPerTask, task: Task, data: Tensor) -> None:
    """A plain loop."""
    keep.before_task(model, task)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-2)
    for step in range(12):
        rows = data[(8 * step) % len(data) :][:8]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    keep.after_task(model, task)


def language(first: int, seed: int) -> Tensor:
    """Sentences of words of its own."""
    return first + ids(32, 10, seed) % 12


def test_two_tasks_are_learned_kept_and_told_apart() -> None:
    model, keep = llama(), AdapterPerTask(8)
    base = {n: p.clone() for n, p in model.named_parameters()}
    tasks = {"x": language(5, 1), "y": language(40, 2)}
    for index, (name, data) in enumerate(tasks.items()):
        kept = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, keep, Task(name, index), data)
        for n, p in model.named_parameters():
            if n in kept:
                assert torch.equal(p, kept[n]), n  # all that was learned before, and the base
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    held_out = torch.cat([language(5, 3)[:6], language(40, 4)[:6]])
    found = identify_task(model, {"input_ids": held_out})
    assert found.names == ["x"] * 6 + ["y"] * 6
    assert found.tasks == ["x", "y"]

    # As a stream is resumed: the modules first, then their weights.
    fresh = llama()
    again = AdapterPerTask(8)
    again.restore(fresh, [Task("x"), Task("y", 1)])
    fresh.load_state_dict(model.state_dict(), strict=True)
    again.load_state_dict(keep.state_dict())
    assert identify_task(fresh, {"input_ids": held_out}).names == found.names


def test_adapters_of_another_kind() -> None:
    """By `switch`, here between LoRAs of PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config, "one")
    model.add_adapter("two", config)
    batch = {"input_ids": ids(5, 6)}
    found = identify_task(model, batch, ["two", "one"], switch=model.set_adapter, max_tokens=12)
    for t, name in enumerate(("two", "one")):
        model.set_adapter(name)
        model.eval()
        for i, row in enumerate(batch["input_ids"].tolist()):
            want = cross_entropy_by_hand(model, row)
            assert float(found.cross_entropy[i, t]) == pytest.approx(want, rel=1e-5)


def test_in_the_trainer_and_resumed(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in language(5, 1)[:8]]

    def made(model: nn.Module, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], save_steps=2,
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        callback = KeepCallback(AdapterPerTask(3), name="news")
        return Trainer(model, arguments, train_dataset=data, callbacks=[callback])

    straight, cut, resumed = llama(), llama(), llama()
    made(straight, 4).train()
    made(cut, 2).train()
    made(resumed, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    one, other = adapter_state_dict(straight, "news"), adapter_state_dict(resumed, "news")
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert any(x.any() for k, x in one.items() if "up" in k)
    base = llama().state_dict()
    assert all(torch.equal(straight.state_dict()[k], v) for k, v in base.items())


class _Cut(Keep):
    """Stops a run at a step of a task, as a kill would."""

    def __init__(self, task: str, step: int) -> None:
        self.at, self.seen = (task, step), ("", 0)

    def before_task(self, model: nn.Module, task: Task) -> None:
        self.seen = (task.name, 0)

    def on_update(self, model: nn.Module) -> None:
        self.seen = (self.seen[0], self.seen[1] + 1)
        if self.seen == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("keep", [lambda: AdapterPerTask(3), lambda: Anchor(9.0, fisher="batch")])
def test_a_stream_goes_on_with_the_same_bits(keep: Any, tmp_path: Path) -> None:
    """Killed within the second task: the first one's adapter, and anchors, are there again."""
    from transformers import TrainingArguments

    from cl_fast.learning import learn

    def rows(first: int, seed: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": row, "labels": row} for row in language(first, seed)[:8]]

    tasks = {"x": (rows(5, 1), rows(5, 3)[:2]), "y": (rows(40, 2), rows(40, 4)[:2])}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, save_steps=1,
        learning_rate=2e-2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    def score(model: nn.Module, data: Any, name: str) -> float:
        with using_adapter(model, name if name in adapter_names(model) else None):
            ids = torch.stack([row["input_ids"] for row in data])
            return -float(model(input_ids=ids, labels=ids).loss)

    def run(out: str, cut: _Cut) -> Any:
        model = llama()
        return learn(
            model, tasks, args=arguments, out=tmp_path / out, keep=[keep(), cut], score=score
        )

    straight = run("straight", _Cut("", 1))
    with pytest.raises(KeyboardInterrupt):
        run("cut", _Cut("y", 2))
    resumed = run("cut", _Cut("", 1))
    one, other = straight.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert straight.matrix.rows == resumed.matrix.rows
    if adapter_names(resumed.model):  # what was learned of x is not touched by y
        assert resumed.matrix.rows[0][0] == resumed.matrix.rows[1][0]


# --- bad input ---------------------------------------------------------------------------------


def one() -> nn.Module:
    model = llama()
    add_adapters(model, ["news", "law"], bottleneck=2)
    return model


PADDED = {
    "input_ids": torch.tensor([[5, 6], [0, 5]]),
    "attention_mask": torch.tensor([[1, 1], [0, 1]]),
}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: add_adapters(m, "news"), "has an adapter 'news' already"),
        (lambda m: add_adapters(m, ["c", "c"]), "names must differ from one another"),
        (lambda m: add_adapters(m, ""), "must be a string that is not empty"),
        (lambda m: add_adapters(m, [3]), "must be a string that is not empty: 3"),
        (lambda m: add_adapters(m, "c", bottleneck=0), "bottleneck must be at least 1"),
        (lambda m: add_adapters(m, "c", activation="elu"), "activation must be one of"),
        (lambda m: add_adapters(m, "c", dtype=torch.int8), "dtype must be a floating-point one"),
        (lambda m: use_adapter(m, "sport"), "no adapter 'sport'; it has ['news', 'law']"),
        (lambda m: use_adapter(m, ["news", "sport"]), "no adapter 'sport'; it has ['news', 'law']"),
        (lambda m: use_adapter(m, []), "an empty list of names"),
        (lambda m: train_adapter(m, "sport"), "no adapter 'sport'"),
        (lambda m: save_adapter(m, "sport", "x"), "no adapter 'sport'"),
        (lambda m: remove_adapters(m, "sport"), "no adapter 'sport'"),
        (lambda m: identify_task(m, {"input_ids": ids()}, ["sport"]), "no adapter 'sport'; it has"),
        (lambda m: identify_task(m, {"input_ids": ids()}, []), "no task to choose from: names is"),
        (lambda m: identify_task(m, {"labels": ids()}), "batch must have input_ids; it has"),
        (lambda m: identify_task(m, PADDED), "row 1 of input_ids has fewer than two tokens"),
        (lambda m: identify_task(m, {"input_ids": ids()}, max_tokens=0), "max_tokens must be at"),
        (lambda m: identify_task(m, {"input_ids": ids()}, switch=print), "names must be given"),
        (lambda m: identify_task(llama(), {"input_ids": ids()}), "the model has no adapters"),
        (lambda m: use_adapter(llama(), "news"), "none was added: see add_adapters"),
        (lambda m: blocks_of(nn.Linear(2, 2)), "Linear has no config with num_hidden_layers"),
        (lambda m: AdapterPerTask(0), "bottleneck must be at least 1; got 0"),
        (lambda m: AdapterPerTask(4, activation="elu"), "activation must be one of"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    model = one()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(words)):
        call(model)
    assert list(model.state_dict()) == before


def test_bad_use() -> None:
    model = one()
    use_adapter(model, ["news", "law"])
    with pytest.raises(ValueError, match=r"given 2 names.*and the batch has 4 rows"):
        logits(model, ids())
    with pytest.raises(ValueError, match="is in use"):
        remove_adapters(model, "law")
    filled(model, "law")
    adapter_state_dict(model, "law")["blocks.1.up.bias"].fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="cross-entropy of row 0 under 'law' is nan"):
        identify_task(model, {"input_ids": ids()})
    doubled = llama()
    doubled.other = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"2 lists of 2 modules, \['model.layers', 'other'\]"):
        add_adapters(doubled, "a")
