"""Second moments of keys: against numpy, one text at a time; whose they are; files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from cl_fast.editing import stats as module
from cl_fast.editing.solver import CholeskyPrior, NullSpace, solve
from cl_fast.editing.stats import KeyStats
from cl_fast.errors import CheckpointError, NonFiniteError, OutputError
from cl_fast.losses.cache import model_fingerprint

Array = NDArray[np.float64]
TOKENIZER = tiny_models.tokenizer()


class WithBos:
    """Every text begins with <bos>."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *TOKENIZER(text)["input_ids"]]}


class WithBosAndEos(WithBos):
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*super().__call__(text)["input_ids"], 2]}


def gpt2() -> Any:
    return tiny_models.gpt2(n_inner=32, n_layer=3, initializer_range=0.4)


def texts(count: int = 40, seed: int = 0, longest: int = 20) -> list[str]:
    g = np.random.default_rng(seed)
    return [" ".join(g.choice(tiny_models.WORDS, g.integers(1, longest + 1))) for _ in range(count)]


def down_projections(model: nn.Module) -> list[nn.Module]:
    names = ("down_proj", "c_proj")
    return [m for n, m in model.named_modules() if n.endswith(names) and "attn" not in n]


def keys_of(model: nn.Module, ids: list[int]) -> list[Array]:
    """Of each layer, [tokens, f]: one row without padding, the model's own forward."""
    found: list[Array] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: found.append(args[0][0].double().numpy()))
        for m in down_projections(model)
    ]
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


def moments(model: nn.Module, rows: list[list[int]]) -> list[Array]:
    """(1/N) sum k k^T in float64."""
    layers = zip(*(keys_of(model, ids) for ids in rows), strict=True)
    stacked = [np.concatenate(layer) for layer in layers]
    return [k.T @ k / len(k) for k in stacked]


def collect(model: Any, data: Any, tokenizer: Any = TOKENIZER, **options: Any) -> KeyStats:
    options = {"layers": None, "tokens": 10**6, **options}
    return KeyStats.collect(model, tokenizer, texts=data, **options)


def relative(got: Any, want: Any) -> float:
    got, want = np.asarray(got), np.asarray(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.llama()


@pytest.fixture(scope="module")
def stats(model: Any) -> KeyStats:
    return collect(model, texts())


# --- what is summed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [tiny_models.llama, tiny_models.gemma2, tiny_models.granite, gpt2],
    ids=lambda f: f.__name__,
)
def test_moments_are_those_of_numpy(make: Callable[[], nn.Module]) -> None:
    """Texts of all lengths in padded batches, against one text at a time."""
    model, data = make(), texts()
    rows = [TOKENIZER(text)["input_ids"] for text in data]
    got = collect(model, data, batch_tokens=100)
    want = moments(model, rows)
    assert got.layers == tuple(range(len(want)))
    assert got.tokens == sum(map(len, rows))
    for i, C in enumerate(want):
        found = got.moment(i).numpy()
        assert relative(found, C) < 1e-6
        assert np.array_equal(found, found.T)
        assert np.linalg.eigvalsh(found)[0] > -1e-9 * np.trace(found)
        assert got.size(i) == 32


def test_keys_of_a_low_precision_model_are_not_rounded_again() -> None:
    model, data = tiny_models.llama().bfloat16(), texts()
    want = moments(model, [TOKENIZER(text)["input_ids"] for text in data])
    got = collect(model, data, batch_tokens=1)  # no padding: the very same activations
    for i, C in enumerate(want):
        assert relative(got.moment(i), C) < 1e-6


def test_float64_is_exact() -> None:
    model, data = tiny_models.llama().double(), texts()
    want = moments(model, [TOKENIZER(text)["input_ids"] for text in data])
    got = collect(model, data, batch_tokens=64)
    for i, C in enumerate(want):
        assert relative(got.moment(i), C) < 1e-13


@settings(max_examples=12)
@given(batch_tokens=st.integers(1, 900), seed=st.integers(0, 2))
def test_batches_do_not_matter(batch_tokens: int, seed: int) -> None:
    model = tiny_models.llama().double()
    data = texts(25, seed)
    once = collect(model, data, batch_tokens=10**6)
    some = collect(model, iter(data), batch_tokens=batch_tokens)
    assert some.tokens == once.tokens
    for i in once.layers:
        assert relative(some.moment(i), once.moment(i)) < 1e-12


def test_one_pass_is_many(model: Any, stats: KeyStats) -> None:
    for i in stats.layers:
        alone = collect(model, texts(), layers=[i])
        assert alone.layers == (i,)
        torch.testing.assert_close(alone.moment(i), stats.moment(i), rtol=1e-12, atol=0)
    both = collect(model, texts(), layers=[-1, 0, 0])
    assert both.layers == (0, 1)
    assert both.names == {i: f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


def test_auto_is_the_preset() -> None:
    model = tiny_models.llama(num_hidden_layers=6)
    got = collect(model, texts(60, longest=6), layers="auto")
    assert got.layers == (1, 2)


def test_two_halves_are_the_whole(model: Any, stats: KeyStats) -> None:
    data = texts()
    both = collect(model, data[:17]) + collect(model, data[17:])
    assert both.tokens == stats.tokens
    for i in stats.layers:
        assert relative(both.moment(i), stats.moment(i)) < 1e-6
        assert both.identity(i) != collect(model, data[:17]).identity(i)


def test_no_more_tokens_than_asked_for(model: Any) -> None:
    read: list[str] = []

    def stream() -> Iterator[str]:
        for text in texts(10**6 // 50):
            read.append(text)
            yield text

    got = collect(model, stream(), tokens=333, batch_tokens=50)
    assert got.tokens == 333
    assert len(read) < 80
    rows, left = [], 333
    for text in read:
        rows.append(TOKENIZER(text)["input_ids"][:left])
        left -= len(rows[-1])
        if not left:
            break
    for i, C in enumerate(moments(model, rows)):
        assert relative(got.moment(i), C) < 1e-6


@pytest.mark.parametrize("tokenizer", [TOKENIZER, WithBos(), WithBosAndEos()])
def test_long_texts_are_cut_into_pieces_that_begin_like_texts(model: Any, tokenizer: Any) -> None:
    words = texts(1, longest=60)[0].split() * 3
    ids = tokenizer(" ".join(words))["input_ids"]
    front = ids[: 0 if tokenizer is TOKENIZER else 1]
    size = 10 - len(front)
    rest = ids[len(front) :]
    rows = [[*front, *rest[i : i + size]] for i in range(0, len(rest), size)]
    got = collect(model, [" ".join(words), "", " "], tokenizer, max_length=10)
    assert got.tokens == sum(map(len, rows))
    for i, C in enumerate(moments(model, rows)):
        assert relative(got.moment(i), C) < 1e-6


def test_the_head_is_not_called_and_nothing_is_left_on_the_model() -> None:
    model = tiny_models.llama(num_hidden_layers=3).train()
    model.lm_head.forward = lambda *_: pytest.fail("logits were made")
    model.model.layers[2].forward = lambda *_, **__: pytest.fail("a block too many")
    hooks = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    before = {n: p.clone() for n, p in model.named_parameters()}
    collect(model, texts(), layers=[1])
    assert hooks == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert all(m.training for m in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_dropout_is_off() -> None:
    model = gpt2()
    model.config.resid_pdrop = 0.5
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    first, again = (collect(model.train(), texts(), seed=s) for s in (0, 1))
    assert torch.equal(first.moment(1), again.moment(1))


def test_the_global_random_state_is_left_alone(model: Any) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    collect(model, "self", tokens=200)
    assert torch.equal(torch.rand(3), want)


# --- the model's own samples ---------------------------------------------------------------------


def test_own_samples_are_what_the_model_says() -> None:
    """A model that counts upwards from <bos>, and ends: its only text is known."""
    model = tiny_models.llama()
    follows = {1: 5, 5: 6, 6: 7, 7: 2, 2: 2}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    own = model.lm_head.forward

    def forward(hidden: Tensor) -> Tensor:
        logits = own(hidden)
        for row, ids in enumerate(seen[-1][:, -logits.size(1) :].tolist()):
            for at, i in enumerate(ids):
                logits[row, at, follows.get(i, 9)] = 100.0
        return logits

    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    model.lm_head.forward = forward
    got = collect(model, "self", tokenizer=None, tokens=50)
    assert got.tokens == 50
    rows = [[1, 5, 6, 7, 2]] * 10
    for i, C in enumerate(moments(tiny_models.llama(), rows)):
        assert relative(got.moment(i), C) < 1e-6


def test_a_sample_ends_at_its_first_end() -> None:
    """Three rows, of which the model says 2, "end", at other times, and twice in one of them."""
    says = torch.tensor([[5, 2, 2, 5, 5], [5, 6, 7, 2, 9], [2, 5, 5, 5, 5]])
    steps = iter(says.T)

    def model(**_: Any) -> SimpleNamespace:
        logits = nn.functional.one_hot(next(steps), 10)[:, None] * 1e4
        return SimpleNamespace(logits=logits.float(), past_key_values=None)

    generator, first = torch.Generator().manual_seed(0), torch.ones(3, 1, dtype=torch.long)
    rows = module._continued(model, first, 10, torch.tensor([2]), generator)
    assert rows == [[1, 5, 2], [1, 5, 6, 7, 2], [1, 2]]
    assert len(list(steps)) == 1  # nobody was asked once all had ended


def test_own_samples_depend_on_the_seed_alone(model: Any) -> None:
    first = collect(model, "self", tokens=2000, batch_tokens=500)
    torch.manual_seed(99)
    again = collect(model, "self", tokens=2000, batch_tokens=500)
    other = collect(model, "self", tokens=2000, batch_tokens=500, seed=1)
    assert torch.equal(first.moment(0), again.moment(0))
    assert relative(other.moment(0), first.moment(0)) > 1e-4
    # Two draws from one distribution: their moments are near each other, those of texts are not.
    assert relative(other.moment(0), first.moment(0)) < 0.3


def test_own_samples_without_bos_and_eos() -> None:
    model = tiny_models.llama()
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = None
    got = collect(model, "self", tokenizer=None, tokens=500, max_length=12)
    assert got.tokens == 500


def test_own_samples_of_the_true_distribution(model: Any) -> None:
    """The second token, over 64 texts and more: as often as the model's probabilities say."""
    pieces = module._samples(module.decoder_of(model), None, 2, seed=3)
    drawn = [next(pieces) for _ in range(6400)]
    assert {len(row) for row in drawn} == {2}
    counts = np.bincount([row[1] for row in drawn], minlength=67)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[1]])).logits[0, -1].double().softmax(-1).numpy()
    assert (np.abs(counts - 6400 * p) < 5 * np.sqrt(6400 * p * (1 - p)) + 1).all()


# --- as a prior ----------------------------------------------------------------------------------


def test_the_covariance_as_a_prior(stats: KeyStats) -> None:
    g = np.random.default_rng(0)
    K, T = g.standard_normal((32, 5)), g.standard_normal((16, 5))
    for weight in (15000.0, 10.0):
        prior = stats.prior(1, weight=weight)
        assert isinstance(prior, CholeskyPrior)
        C0 = weight * stats.moment(1).numpy()
        want = np.linalg.solve(C0 + K @ K.T, K @ T.T).T
        got = solve(prior, torch.from_numpy(K), torch.from_numpy(T))
        assert relative(got.delta(), want) < 1e-9
        assert relative(prior.matrix(), C0) < 1e-12
    factors = {id(stats.prior(1, weight=w)._factor) for w in (1.0, 7.0)}
    assert len(factors) == 1
    assert stats.prior(1).identity == stats.prior(1).identity
    assert stats.prior(1).identity != stats.prior(0).identity
    mixed = stats.prior(1, precision="mixed")
    assert mixed.precision == "mixed"
    keys = torch.from_numpy(K)
    assert relative(mixed.inverse(keys), stats.prior(1).inverse(keys)) < 1e-9
    shrunk = stats.prior(0, shrinkage=0.5, weight=1.0).matrix().numpy()
    C = stats.moment(0).numpy()
    assert relative(shrunk, C + 0.5 * np.trace(C) / 32 * np.eye(32)) < 1e-12


def test_the_null_space_as_a_prior(stats: KeyStats) -> None:
    values, vectors = np.linalg.eigh(stats.moment(0).numpy())
    bound = float(np.sqrt(values[19] * values[20]))
    prior = stats.prior(0, "nullspace", threshold=bound, l2=2.0)
    assert isinstance(prior, NullSpace)
    P = vectors[:, :20] @ vectors[:, :20].T
    K = np.random.default_rng(0).standard_normal((32, 3))
    assert relative(prior.inverse(torch.from_numpy(K)), P @ K / 2) < 1e-9
    share = stats.prior(0, "nullspace", energy=0.9)
    assert share.protected == 1 + int((np.cumsum(values[::-1]) < 0.9 * values.sum()).sum())
    assert share.identity != prior.identity


def test_few_tokens_are_told_and_held_by_shrinkage(model: Any) -> None:
    with pytest.warns(UserWarning, match="20 tokens were seen, keys have 32 entries: C is rank-d"):
        few = collect(model, texts(), tokens=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = few.prior(0, weight=1.0)
    C = few.moment(0).numpy()
    assert np.linalg.matrix_rank(C, rtol=1e-5) <= 20
    assert relative(prior.matrix(), C + 1e-3 * np.trace(C) / 32 * np.eye(32)) < 1e-12
    with pytest.warns(UserWarning, match=r"C0 of model.layers.0.mlp.down_proj is singular"):
        bare = few.prior(0, shrinkage=0.0)
    assert 0 < bare.relative_jitter < 1e-5
    assert bare.identity != few.prior(0).identity
    with pytest.warns(UserWarning, match="holds every direction that 20 tokens did not show"):
        few.prior(0, "nullspace", energy=0.999)


# --- whose they are ------------------------------------------------------------------------------


def test_another_model_is_refused(model: Any, stats: KeyStats, tmp_path: Path) -> None:
    stats.check(model)
    assert stats.model == model_fingerprint(model)
    other = tiny_models.llama(seed=1)
    with pytest.raises(ValueError, match=r"of another model: .*undo that first; .*any_model=True"):
        stats.check(other)
    stats.check(other, any_model=True)
    stats.save(tmp_path)
    assert KeyStats.load(tmp_path, model).model == stats.model
    with pytest.raises(ValueError, match="of another model"):
        KeyStats.load(tmp_path, other)
    anybody = KeyStats.load(tmp_path, other, any_model=True)
    anybody.check(other)
    for wrong, words in (
        (tiny_models.llama(intermediate_size=48), "has model.layers.0.mlp.down_proj, 48"),
        (tiny_models.llama(num_hidden_layers=1), "; the model has no such block"),
        (gpt2(), "has transformer.h.0.mlp.c_proj, 32"),
    ):
        with pytest.raises(ValueError, match=f"of another architecture: block .*{words}"):
            anybody.check(wrong)


def test_an_edited_model_is_another(model: Any, stats: KeyStats) -> None:
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 4] += 1
    with pytest.raises(ValueError, match="If a patch is applied to it, undo that first"):
        stats.check(model)
    with torch.no_grad():
        weight.copy_(kept)
    stats.check(model)


def test_only_what_belongs_together_adds_up(model: Any, stats: KeyStats) -> None:
    with pytest.raises(ValueError, match="only statistics of one model add up"):
        stats + collect(tiny_models.llama(seed=1), texts())
    with pytest.raises(ValueError, match="only statistics of the same layers add up"):
        stats + collect(model, texts(), layers=[0])
    with pytest.raises(TypeError):
        stats + 1  # type: ignore[operator]


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-7), (torch.float64, 0.0)])
def test_saved_and_loaded(stats: KeyStats, tmp_path: Path, dtype: Any, error: float) -> None:
    stats.save(tmp_path / "stats", dtype=dtype)
    again = KeyStats.load(tmp_path / "stats")
    assert (again.layers, again.names, again.tokens) == (stats.layers, stats.names, stats.tokens)
    for i in stats.layers:
        assert relative(again.moment(i), stats.moment(i)) <= error
        assert again.identity(i) == stats.identity(i)
        assert again.prior(i).identity == stats.prior(i).identity
    size = (tmp_path / "stats" / "moments.safetensors").stat().st_size
    assert size < 2 * 33 * 16 * (4 if error else 8) + 2000
    stats.save(tmp_path / "stats", dtype=dtype)  # the same again
    again.save(tmp_path / "copy", dtype=dtype)
    assert relative((again + again).moment(0), stats.moment(0)) <= error


def test_a_folder_of_something_else_is_left_alone(
    model: Any, stats: KeyStats, tmp_path: Path
) -> None:
    other = collect(model, texts(seed=1))
    other.save(tmp_path / "other")
    before = (tmp_path / "other" / "moments.safetensors").read_bytes()
    with pytest.raises(OutputError, match="holds other statistics, KeyStats"):
        stats.save(tmp_path / "other")
    assert (tmp_path / "other" / "moments.safetensors").read_bytes() == before
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty, and holds no statistics of keys"):
        stats.save(tmp_path)
    with pytest.raises(OutputError, match="cannot be made"):
        stats.save(tmp_path / "note.txt" / "x")
    (tmp_path / "other" / "moments.safetensors").write_bytes(before[:-9])
    with pytest.raises(OutputError, match=r"cannot be read .*truncated.*; delete it"):
        stats.save(tmp_path / "other")


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        data = data[:-100]
    elif how == "empty":
        data = b""
    elif how == "data":
        data = data[:-5] + bytes([data[-5] ^ 64]) + data[-4:]
    elif how == "format":
        data = data.replace(b"cl_fast.key_stats", b"cl_fast.key_sta?s")
    elif how == "version":
        data = data.replace(b'"version":"1"', b'"version":"7"')
    elif how == "name":
        data = data.replace(b'"layers.1"', b'"layers.7"')
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "truncated"),
        ("empty", "too short for a safetensors file"),
        ("data", "tensor 'layers.1' is corrupted, its data is not what was written"),
        ("format", "holds no statistics of keys"),
        ("version", "has version 7 of the format; this cl_fast reads version 1"),
        ("name", "has no tensor 'layers.1' as it should be"),
    ],
)
def test_damaged_files(stats: KeyStats, tmp_path: Path, how: str, words: str) -> None:
    stats.save(tmp_path)
    damage(tmp_path / "moments.safetensors", how)
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        KeyStats.load(tmp_path)
    assert "moments.safetensors" in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file; give a folder of"):
        KeyStats.load(tmp_path)


@pytest.mark.parametrize("kind", ["covariance", "nullspace"])
def test_factors_are_kept_beside_the_statistics(
    stats: KeyStats, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"energy": 0.9} if kind == "nullspace" else {"weight": 20.0}
    with pytest.raises(ValueError, match="keep_factors=True needs a folder"):
        KeyStats(stats.model, stats.tokens, stats._layers).prior(0, keep_factors=True)
    stats.save(tmp_path, "float64")
    first = KeyStats.load(tmp_path)
    prior = first.prior(0, kind, keep_factors=True, **options)  # type: ignore[arg-type]
    (file,) = (tmp_path / "factors").iterdir()
    assert file.name.startswith(f"{kind}-000-")
    again = KeyStats.load(tmp_path)
    with monkeypatch.context() as patch:
        for name in ("cholesky_ex", "eigh"):
            patch.setattr(torch.linalg, name, lambda *_, **__: pytest.fail("computed again"))
        kept = again.prior(0, kind, **options)  # type: ignore[arg-type]
    K = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept.inverse(K), prior.inverse(K))
    assert kept.identity == prior.identity
    if kind == "covariance":  # another shrinkage is another factor
        again.prior(0, shrinkage=0.1, keep_factors=True)
        assert len(list((tmp_path / "factors").iterdir())) == 2
    for change, words in (
        (lambda d: d[:-40], "truncated"),
        (lambda d: d[:-6] + bytes([d[-6] ^ 1]) + d[-5:], "is corrupted, its data is not what was"),
        (
            lambda d: d.replace(b"cl_fast.key_stats.", b"cl_fast.key_stats?"),
            "holds no factor of st",
        ),
        (lambda d: re.sub(rb'("identity":")....', rb"\1????", d), "belongs to other statistics"),
    ):
        data = file.read_bytes()
        file.write_bytes(change(data))
        with pytest.raises(CheckpointError, match=words) as error:
            KeyStats.load(tmp_path).prior(0, kind, **options)  # type: ignore[arg-type]
        assert file.name in str(error.value)
        file.write_bytes(data)


def test_factors_in_memory_are_kept_when_asked_for_later(stats: KeyStats, tmp_path: Path) -> None:
    mine = KeyStats(stats.model, stats.tokens, stats._layers)
    mine.prior(1)
    mine.prior(1, "nullspace", energy=0.5)
    mine.save(tmp_path)
    assert not (tmp_path / "factors").exists()
    mine.prior(1, keep_factors=True)
    mine.prior(1, "nullspace", energy=0.9, keep_factors=True)
    assert len(list((tmp_path / "factors").iterdir())) == 2
    mine.forget()
    assert torch.equal(mine.prior(1).matrix(), stats.prior(1).matrix())


# --- bad input -----------------------------------------------------------------------------------


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=67, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def broken(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_models.llama().to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = value
    return model


def bad(*, of: Any = None, data: Any = ("a cat",), tokenizer: Any = TOKENIZER, **more: Any) -> Any:
    return lambda: collect(tiny_models.llama() if of is None else of(), data, tokenizer, **more)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            bad(data="the cat"),
            TypeError,
            "texts must be an iterable of strings, or 'self'; got one",
        ),
        (bad(data=["a", 3]), TypeError, "texts[1] must be a string; got int"),
        (bad(data=[]), ValueError, "texts must have tokens; there were none"),
        (bad(data=["", ""]), ValueError, "texts must have tokens; there were none"),
        (bad(tokenizer=None), TypeError, "tokenizer must be callable; got NoneType"),
        (bad(layers=[2]), ValueError, "layers must be in [0, 1], the 2 blocks of the model; got 2"),
        (bad(layers=[0.5]), TypeError, "layers must be indices of blocks; got 0.5"),
        (bad(layers=[]), ValueError, "layers must be some indices of blocks, 'auto' or None; got"),
        (bad(layers="all"), ValueError, "layers must be one of 'auto'; got 'all'"),
        (bad(tokens=0), ValueError, "tokens must be at least 1; got 0"),
        (bad(tokens=1.5), TypeError, "tokens must be an int; got 1.5"),
        (bad(batch_tokens=0), ValueError, "batch_tokens must be at least 1; got 0"),
        (bad(max_length=1), ValueError, "max_length must be at least 2; got 1"),
        (bad(max_length=65), ValueError, "max_length must be at most 64, the positions of the mod"),
        (bad(seed="0"), TypeError, "seed must be an int; got '0'"),
        (bad(dtype=torch.float16), ValueError, "dtype must be float64 or float32; got torch.float"),
        (bad(dtype="float64"), TypeError, "dtype must be a torch.dtype; got 'float64'"),
        (
            bad(of=lambda: tiny_models.llama().double(), dtype=torch.float32),
            ValueError,
            "dtype must be float64 for a model in float64",
        ),
        (
            bad(of=lambda: broken(torch.nan)),
            NonFiniteError,
            "the keys of model.layers.1.mlp.down_proj (block 1) have NaN or infinity",
        ),
        (
            bad(of=lambda: broken(torch.inf)),
            NonFiniteError,
            "(block 1) have NaN or infinity, or ov",
        ),
        (bad(of=lambda: broken(3e38)), NonFiniteError, "block 1"),
        (bad(of=lambda: broken(torch.nan), data="self"), NonFiniteError, "cannot be sampled from"),
        (bad(of=lambda: nn.Linear(2, 2)), ValueError, "no config with num_hidden_layers"),
        (bad(of=mixtral), ValueError, "is a mixture of experts: which expert holds a fact depends"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 5}, "layer must be one of [0, 1]; got 5"),
        ({"kind": "identity"}, "kind must be one of 'covariance', 'nullspace'; got 'identity'"),
        ({"weight": 0.0}, "weight must be positive and finite; got 0.0"),
        ({"shrinkage": -1.0}, "shrinkage must be 0 or more, and finite; got -1.0"),
        ({"precision": "half"}, "precision must be one of 'float64', 'mixed'; got 'half'"),
        ({"threshold": 1.0}, "threshold has no effect with kind='covariance'; leave it out"),
        ({"l2": 1.0}, "l2 has no effect with kind='covariance'; leave it out"),
        ({"kind": "nullspace"}, "give one of threshold (absolute) and energy"),
        ({"kind": "nullspace", "energy": 0.5, "weight": 2.0}, "weight has no effect with kind='nu"),
        (
            {"kind": "nullspace", "energy": 0.5, "shrinkage": 0.1},
            "shrinkage has no effect with kin",
        ),
        ({"kind": "nullspace", "threshold": 1e-30}, "no direction is free in C of model.layers.0."),
    ],
)
def test_bad_priors(stats: KeyStats, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        stats.prior(**{"layer": 0, **options})


def test_bad_dtype_of_a_file(stats: KeyStats, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="dtype must be one of 'float32', 'float64'; got 'float16'"
    ):
        stats.save(tmp_path, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_hooks_are_gone_after_an_error() -> None:
    model = broken(torch.nan)
    with pytest.raises(NonFiniteError):
        collect(model, texts())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_bar_shows_tokens(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    collect(model, texts(), progress=True)
    assert "statistics of keys" in capsys.readouterr().err
    collect(model, texts())
    assert capsys.readouterr().err == ""
