"""Inputs and outputs at URLs: the bytes of a local merge, never half a model, errors in words."""

from __future__ import annotations

import functools
import http.server
import json
import logging
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import merge_cases as cases
import pytest

from cl_fast.checkpoints import Checkpoint, remote
from cl_fast.cli import main
from cl_fast.errors import CheckpointError, Interrupted, OutputError, RecipeError
from cl_fast.merging import Plan, execute, make_plan, parse_recipe
from cl_fast.merging.engine import Result
from cl_fast.merging.manifest import NAME
from cl_fast.merging.upload import MARKER, Upload
from cl_fast.merging.verify import verify

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")

INDEX = "model.safetensors.index.json"
SECRET = "wJalrXUtnFEMI"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.family(tmp_path_factory.mktemp("remote"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CL_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of a local S3 server; the environment has keys for it."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def s3(server: str, models: Path) -> Iterator[Any]:
    """A client; the models are in the bucket `models`, and `out` is there for outputs."""
    store, _ = remote.filesystem("s3://models/base")
    for bucket in ("models", "out"):
        store.mkdir(bucket)
    store.put(f"{models}/", "models/", recursive=True)
    yield store
    type(store).clear_instance_cache()


def names_at(store: Any, path: str) -> set[str]:
    store.invalidate_cache()
    return {name.rpartition("/")[2] for name in store.ls(path, detail=False)}


def files_at(store: Any, path: str) -> dict[str, bytes]:
    return {name: store.cat_file(f"{path}/{name}") for name in names_at(store, path)}


@pytest.fixture
def memory(models: Path) -> Iterator[Any]:
    """The same in memory: `memory://models/one`."""
    store = fsspec.filesystem("memory")
    store.put(f"{models}/", "/models/", recursive=True)
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def at(root: str, models: Path, method: str) -> dict[str, Any]:
    """The recipe with URLs below `root` in the place of paths."""
    content = json.dumps(cases.recipe(models, method)).replace(f"{models}/", f"{root}/")
    return dict(json.loads(content))


def local(models: Path, output: Path, method: str = "ties", shard: int = 100_000) -> Result:
    return execute(cases.plan(models, output, method, shard=shard), fsync=False)


def outward(models: Path, url: str, shard: int = 100_000) -> Plan:
    return make_plan(parse_recipe(cases.recipe(models)), url, out_shard_size=shard)


# ------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("method", ["ties", "ties paper"])
def test_inputs_in_a_bucket_give_the_bytes_of_local_ones(
    s3: Any, models: Path, tmp_path: Path, cache: Path, method: str
) -> None:
    recipe = parse_recipe(at("s3://models", models, method))
    result = execute(make_plan(recipe, tmp_path / "out", out_shard_size=100_000), fsync=False)
    assert result.digest == local(models, tmp_path / "local" / "out", method).digest
    here, there = cases.contents(result.output), cases.contents(tmp_path / "local" / "out")
    assert {name for name in here if here[name] != there.get(name)} <= {NAME, "README.md"}
    manifest = json.loads(here[NAME])
    assert manifest["inputs"][0]["path"] == "s3://models/base"
    assert manifest["streams"] == ["one", "two", "three"]
    report = verify(result.output)
    assert report.ok, report.problems
    assert report.inputs == 4
    assert report.recomputed
    # Of weights nothing but headers came to the disk, and those are gone.
    assert not list(cache.rglob("*.safetensors"))
    assert {path.name for path in cache.rglob("config.json")} == {"config.json"}


def test_the_eager_backend_and_a_memory_bound_change_nothing(
    memory: Any, models: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(at("memory://models", models, "dare_ties"))
    digests = {local(models, tmp_path / "local" / "out", "dare_ties").digest}
    for name, options in {"eager": {"backend": "eager"}, "bound": {"memory": 16 << 20}}.items():
        plan = make_plan(recipe, tmp_path / name / "out")
        digests.add(execute(plan, fsync=False, **options).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("method", "models_", "parameters"),
    [("model_stock", ("one", "two", "three"), {}), ("nearswap", ("one",), {"t": 0.01})],
)
def test_methods_that_are_rules(
    memory: Any,
    models: Path,
    tmp_path: Path,
    method: str,
    models_: tuple[str, ...],
    parameters: dict[str, Any],
) -> None:
    digests = set()
    for place, root in {"here": str(models), "there": "memory://models"}.items():
        content = {
            "merge_method": method,
            "base_model": f"{root}/base",
            "models": [{"model": f"{root}/{name}"} for name in models_],
            "parameters": parameters,
        }
        plan = make_plan(parse_recipe(content), tmp_path / place)
        digests.add(execute(plan, fsync=False).digest)
    assert len(digests) == 1


def test_one_file_and_mixed_places(memory: Any, models: Path, tmp_path: Path) -> None:
    content = cases.recipe(models)
    content["models"][0]["model"] = "memory://models/one/model.safetensors"
    content["models"][1]["model"] = f"file://{models}/two"
    result = execute(make_plan(parse_recipe(content), tmp_path / "out"), fsync=False)
    expected = json.loads((local(models, tmp_path / "local" / "out").output / NAME).read_text())
    assert result.digest == expected["digest"]


def test_embeddings_at_a_url_are_cut(memory: Any, models: Path, tmp_path: Path) -> None:
    longer = cases.load(models / "one")
    name = "model.embed_tokens.weight"
    longer[name] = longer[name].repeat(2, 1)[:1010]
    cases.save(tmp_path / "longer", longer)
    memory.put(f"{tmp_path}/longer/", "/models/longer/", recursive=True)
    made = []
    for number, (two, one) in enumerate(
        (
            (models / "two", tmp_path / "longer"),
            ("memory://models/two", "memory://models/longer"),
        )
    ):
        content = {"merge_method": "linear", "models": [{"model": str(two)}, {"model": str(one)}]}
        plan = make_plan(parse_recipe(content), tmp_path / f"out{number}", truncate_embeddings=True)
        made.append(execute(plan, fsync=False).digest)
    assert made[0] == made[1]


def test_a_patch_at_a_url_on_a_base_at_a_url(memory: Any, models: Path, tmp_path: Path) -> None:
    import patch_cases

    name = "model.layers.0.mlp.up_proj"
    case = patch_cases.case_of({name: cases.tensors(0)[f"{name}.weight"]}, 3, seed=0, size=0.1)
    patch = tmp_path / "edits.safetensors"
    case.patch().save(patch)
    memory.put(str(patch), "/models/edits.safetensors")
    digests = set()
    for name, root in {"here": str(models), "there": "memory://models"}.items():
        edits = str(patch) if name == "here" else "memory://models/edits.safetensors"
        content = {
            "merge_method": "task_arithmetic",
            "base_model": f"{root}/base",
            "models": [{"model": edits, "parameters": {"weight": 1.0}}],
        }
        plan = make_plan(parse_recipe(content), tmp_path / name)
        digests.add(execute(plan, fsync=False).digest)
    assert len(digests) == 1


def test_an_adapter_at_a_url_alone_and_with_its_base(
    memory: Any, models: Path, tmp_path: Path
) -> None:
    """Planned twice, so that the second time finds the adapter whole in the cache."""
    import adapter_cases

    made = adapter_cases.factors({"model.layers.0.mlp.up_proj": (300, 401)}, 4)
    adapter = adapter_cases.write(tmp_path / "lora", made)
    memory.put(f"{adapter}/", "/models/lora/", recursive=True)
    root, digests = "memory://models", dict[str, set[str]]()
    for base, lora in ((str(models / "base"), str(adapter)), (f"{root}/base", f"{root}/lora")) * 2:
        alone = {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [{"model": lora, "parameters": {"weight": 1.0}}],
        }
        pair = {
            "merge_method": "linear",
            "models": [{"model": f"{base}+{lora}", "parameters": {"weight": 1.0}}],
        }
        for content in (alone, pair):
            out = tmp_path / f"out{sum(map(len, digests.values()))}{len(digests)}"
            result = execute(make_plan(parse_recipe(content), out), fsync=False, overwrite=True)
            digests.setdefault(content["merge_method"], set()).add(result.digest)
            assert verify(out, sample=4).problems == []
    assert [len(found) for found in digests.values()] == [1, 1]


def test_reading_ahead_keeps_to_its_bound(
    memory: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cl_fast.merging import executors

    case = make_plan(parse_recipe(at("memory://models", models, "ties")), tmp_path / "out")
    sizes = [sum(s.nbytes for s in set(executors.made(t))) for t in case.tensors]
    bound = 2 * max(sizes)
    with executors._ReadAhead(case.tensors, bound) as ahead:
        for tensor, size in zip(case.tensors, sizes, strict=True):
            assert ahead._held <= max(bound - max(sizes), size)
            ready = ahead.take(tensor)
            assert {s: bytes(d) for s, d in ready.items()} == {
                s: bytes(executors.read_stored(s)) for s in executors.made(tensor)
            }
    assert ahead._held == 0


def test_an_input_that_changes_during_the_merge_is_noticed(
    s3: Any, models: Path, tmp_path: Path
) -> None:
    plan = make_plan(parse_recipe(at("s3://models", models, "ties")), tmp_path / "out")
    kept = s3.cat_file("models/one/model.safetensors")

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "merge" and done == total:
            s3.pipe_file("models/one/model.safetensors", kept[:-1] + b"!")

    try:
        with pytest.raises(CheckpointError, match=r"s3://models/one/model\.safetensors: was ch"):
            execute(plan, progress=progress, fsync=False)
    finally:
        s3.pipe_file("models/one/model.safetensors", kept)
    assert not plan.output.exists()


class _Pages(http.server.SimpleHTTPRequestHandler):
    """Files and pages of links to them, as a plain web server has them, with ranges."""

    ranges = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range", "")
        if not (self.ranges and path.is_file() and wanted):
            super().do_GET()
            return
        first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_inputs_at_a_plain_web_server(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    handler = functools.partial(_Pages, directory=str(models))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        try:
            recipe = parse_recipe(at(root, models, "linear"))
            plan = make_plan(recipe, tmp_path / "out", out_shard_size=100_000)
            merged = execute(plan, fsync=False)
            monkeypatch.setattr(_Pages, "ranges", False)
            with pytest.raises(CheckpointError, match="no HTTP ranges"):
                remote.fetch(f"{root}/base/config.json", 8, 4)
        finally:
            server.shutdown()
    assert cases.raw(merged.output) == cases.raw(local(models, tmp_path / "l", "linear").output)


def test_a_store_that_fails_during_a_merge_costs_nothing_that_is_finished(
    memory: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(
        parse_recipe(at("memory://models", models, "ties")), tmp_path / "o", out_shard_size=100_000
    )
    real, gone = type(memory).cat_file, False

    def cat_file(*arguments: Any, **given: Any) -> Any:
        if gone:
            raise ConnectionError
        return real(*arguments, **given)

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal gone
        gone = phase == "merge" and done > total // 2

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    with pytest.raises(CheckpointError, match="the store cannot be reached") as caught:
        execute(plan, fsync=False, progress=progress, memory=16 << 20)
    assert "--resume" in "".join(caught.value.__notes__)
    gone = False
    result = execute(plan, fsync=False, resume=True)
    assert result.resumed > 0
    assert cases.raw(result.output) == cases.raw(local(models, tmp_path / "l").output)


def test_a_report_of_a_merge_to_a_url(
    memory: Any, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(cases.write_recipe(tmp_path / "r.yml", cases.recipe(models)))
    assert main(["merge", recipe, "memory://out/reported", "--quiet", "--report"]) == 1
    assert "--report: give a path, as the output memory://out/reported" in capsys.readouterr().err
    assert not memory.exists("/out/reported")
    page = tmp_path / "page.html"
    assert main(["merge", recipe, "memory://out/reported", "--quiet", "--report", str(page)]) == 0
    assert "memory://out/reported" in page.read_text()


# ------------------------------------------------------------------------------------- outputs


def test_an_output_in_a_bucket_has_the_files_of_a_local_one_and_the_record_last(
    s3: Any, models: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    put = Upload.put

    def spy(self: Upload, path: Path, name: str) -> Any:
        assert MARKER in names_at(s3, "out/first/out")
        there = put(self, path, name)
        order.append(name)
        return there

    monkeypatch.setattr(Upload, "put", spy)
    result = execute(outward(models, "s3://out/first/out/"), fsync=False, reread=True)
    assert result.url == "s3://out/first/out"
    assert files_at(s3, "out/first/out") == cases.contents(local(models, tmp_path / "out").output)
    assert order[-2:] == [INDEX, NAME]
    assert all(name.endswith(".safetensors") for name in order[:6])
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert Checkpoint.open(result.url).tensors.keys() == cases.load(models / "one").keys()


def test_an_upload_that_was_interrupted_goes_on(
    s3: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put = Upload.put

    def third_fails(self: Upload, path: Path, name: str) -> Any:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(name)
        return put(self, path, name)

    plan = outward(models, "s3://out/merged")
    monkeypatch.setattr(Upload, "put", third_fails)
    with pytest.raises(Interrupted) as caught:
        execute(plan, fsync=False)
    assert "--resume" in "".join(caught.value.__notes__)
    left = names_at(s3, "out/merged")
    assert MARKER in left
    assert not left & {NAME, INDEX}
    with pytest.raises(OutputError, match="an unfinished"):
        execute(plan, fsync=False)

    monkeypatch.setattr(Upload, "put", put)
    again: list[str] = []
    monkeypatch.setattr(
        Upload, "put", lambda self, path, name: again.append(name) or put(self, path, name)
    )
    result = execute(plan, fsync=False, resume=True)
    assert result.resumed > 0
    weights = [name for name in again if name.endswith(".safetensors")]
    assert 3 <= len(weights) <= 4  # of the three, one may not have been journalled
    assert files_at(s3, "out/merged") == cases.contents(local(models, tmp_path / "merged").output)


def test_two_merges_to_one_url_are_told(
    memory: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on a machine of its own: no record may stand beside the weights of another."""
    waits = True

    def other(phase: str, done: int, total: int) -> None:
        nonlocal waits
        if waits and phase == "merge" and done == total:
            waits = False
            memory.pipe_file(f"/out/merged/{MARKER}", b'{"fingerprint": "of another"}')

    plan = outward(models, "memory://out/merged")
    with pytest.raises(OutputError, match="was changed during the upload, by another merge"):
        execute(plan, fsync=False, progress=other)
    assert NAME not in names_at(memory, "/out/merged")
    put = Upload.put

    def overwritten(self: Upload, path: Path, name: str) -> Any:
        there = put(self, path, name)
        if name == "config.json":
            weights = next(n for n in names_at(memory, "/out/merged") if n.endswith(".safetensors"))
            memory.pipe_file(f"/out/merged/{weights}", b"other weights")
        return there

    with monkeypatch.context() as patch:
        patch.setattr(Upload, "put", overwritten)
        with pytest.raises(OutputError, match="safetensors: was changed during the upload"):
            execute(plan, fsync=False, resume=True)
    assert NAME not in names_at(memory, "/out/merged")
    execute(plan, fsync=False, resume=True)
    assert files_at(memory, "/out/merged") == cases.contents(
        local(models, tmp_path / "merged").output
    )


def test_a_leftover_is_not_taken_for_what_is_at_the_url_by_now(
    memory: Any, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = "memory://out/merged"
    with monkeypatch.context() as patch:  # killed before the working folder is gone
        patch.setattr("cl_fast.merging.output.OutputFolder.discard", lambda *_: None)
        execute(outward(models, url), fsync=False)
    with monkeypatch.context() as patch:  # another machine replaces it
        patch.setenv("CL_FAST_CACHE", str(tmp_path / "elsewhere"))
        linear = make_plan(parse_recipe(cases.recipe(models, "linear")), url)
        execute(linear, overwrite=True, fsync=False)
    with pytest.raises(OutputError, match="exists and is not empty"):
        execute(outward(models, url), fsync=False, resume=True)


def test_an_existing_output_is_replaced_only_when_asked(
    memory: Any, models: Path, tmp_path: Path
) -> None:
    execute(outward(models, "memory://out/merged", shard=50_000), fsync=False)
    before = set(memory.ls("/out/merged", detail=False))
    with pytest.raises(OutputError, match="memory://out/merged: the output exists"):
        execute(outward(models, "memory://out/merged"), fsync=False)
    assert set(memory.ls("/out/merged", detail=False)) == before

    def progress(phase: str, done: int, total: int) -> None:
        # No old record may stand beside new weights.
        assert not names_at(memory, "/out/merged") & {NAME, INDEX}

    execute(outward(models, "memory://out/merged"), overwrite=True, progress=progress, fsync=False)
    expected = cases.contents(local(models, tmp_path / "merged").output)
    assert files_at(memory, "/out/merged") == expected


def test_nothing_is_left_where_nothing_was_finished(
    memory: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Upload, path: Path, name: str) -> Any:
        raise CheckpointError("no")

    monkeypatch.setattr(Upload, "put", fails)
    with pytest.raises(CheckpointError):
        execute(outward(models, "memory://out/merged"), fsync=False)
    assert not memory.exists("/out/merged") or memory.ls("/out/merged", detail=False) == []


def test_the_command_takes_urls(
    memory: Any, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = at("memory://models", models, "ties")
    recipe = cases.write_recipe(tmp_path / "recipe.yml", content)
    assert main(["merge", str(recipe), "memory://out/x", "--dry-run"]) == 0
    assert "output   memory://out/x, built in" in capsys.readouterr().out
    assert not memory.exists("/out")
    assert main(["merge", str(recipe), "memory://out/x", "--no-fsync"]) == 0
    assert "memory://out/x: 7 tensors in 1 file" in capsys.readouterr().out
    assert memory.exists(f"/out/x/{NAME}")
    assert main(["merge", str(recipe), "memory://out/x"]) == 1
    assert "the output exists" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("model", "output", "kind", "words"),
    [
        ("s3://models/none", "out", CheckpointError, "s3://models/none: nothing is there"),
        ("s3://absent/one", "out", CheckpointError, "s3://absent/one: there is no such bucket"),
        ("gs://models/one", "out", CheckpointError, r"gs://models/one: .*pip install gcsfs"),
        ("nope://models/one", "out", CheckpointError, "nobody here knows the protocol nope://"),
        (f"s3://AKIA:{SECRET}@models/one", "out", CheckpointError, "s3://models/one: carries cred"),
        (f"s3://AK:ab/{SECRET}@models/one", "out", CheckpointError, "s3://models/one: carries cr"),
        (f"s3://AK:a+b/{SECRET}@models/one", "out", CheckpointError, "s3://models/one: carries cr"),
        (f"https://hf_{SECRET}@x.org/m", "out", CheckpointError, "https://x.org/m: carries cred"),
        (f"https://x.org/m#{SECRET}", "out", CheckpointError, "https://x.org/m: what follows"),
        (f"https://[{SECRET}@x.org/m", "out", CheckpointError, "is no URL|carries credentials"),
        ("s3://models/one?x=1", "out", CheckpointError, r"s3://models/one: what follows '\?'"),
        (f"https://x.org/m?token={SECRET}", "out", CheckpointError, "https://x.org/m: carries cr"),
        ("one", f"s3://AKIA:{SECRET}@out/x", OutputError, "s3://out/x: carries credentials"),
        ("one", "s3://absent/x", OutputError, "s3://absent/x.*: there is no such bucket"),
        ("one", "s3://out", OutputError, "s3://out: is the root of a store"),
        ("s3://models/one", "s3://models/one", RecipeError, "is, holds or lies inside the input"),
        ("s3://models/one", "s3://models/one/x", RecipeError, "is, holds or lies inside the input"),
        ("s3://models/one", "s3://models/", OutputError, "is the root of a store"),
    ],
)
def test_wrong_places(
    s3: Any,
    models: Path,
    tmp_path: Path,
    model: str,
    output: str,
    kind: type[Exception],
    words: str,
) -> None:
    content = cases.recipe(models)
    if "://" in model:
        content["models"][0]["model"] = model
    with pytest.raises(kind, match=words) as caught:
        execute(make_plan(parse_recipe(content), output if "://" in output else tmp_path / "o"))
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert SECRET not in told
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == []


def test_refused_credentials(
    s3: Any, server: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_for_keys(after: bytes) -> None:
        url, header = f"{server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        request = urllib.request.Request(url, data=after, headers=header)
        urllib.request.urlopen(request, timeout=10).close()

    content = at("s3://models", models, "ties")
    ask_for_keys(b"0")
    try:
        with pytest.raises(CheckpointError, match=r"s3://models/base: access is denied") as caught:
            make_plan(parse_recipe(content), tmp_path / "out")
        with pytest.raises(OutputError, match="s3://out/x: access is denied") as refused:
            execute(outward(models, "s3://out/x"), fsync=False)
    finally:
        ask_for_keys(b"inf")
    for error in (caught.value, refused.value):
        told = str(error) + "".join(getattr(error, "__notes__", ()))
        assert SECRET not in told
        assert "AKIAEXAMPLE" not in told
        assert "AWS_ACCESS_KEY_ID" in told


def test_a_store_that_cannot_be_reached(
    s3: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    # Another region is another client.
    options = remote._S3_BOUNDS | {"region_name": "us-east-2"}
    monkeypatch.setattr(remote, "_S3_BOUNDS", options)
    with pytest.raises(CheckpointError, match="s3://models/base: the store cannot be reached"):
        make_plan(parse_recipe(at("s3://models", models, "ties")), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.safetensors", lambda data: data[:-10], "memory://models/one/model.safetensors"),
        ("model.safetensors", lambda data: b"\xff" * 8, "the header is said to have"),
        ("model.safetensors", None, "memory://models/one holds no weights"),
        ("config.json", lambda data: b"{", "memory://models/one/config.json: not valid"),
    ],
)
def test_damaged_checkpoints_are_told_by_their_urls(
    memory: Any,
    models: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes] | None,
    words: str,
) -> None:
    path = f"/models/one/{name}"
    data = memory.cat_file(path)
    memory.rm(path)
    if change is not None:
        memory.pipe_file(path, change(data))
    with pytest.raises(CheckpointError, match=words) as caught:
        make_plan(parse_recipe(at("memory://models", models, "ties")), tmp_path / "out")
    assert "shadow" not in str(caught.value)


def test_fsspec_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(CheckpointError, match=r"memory://x: URLs need fsspec.*cl_fast\[remote\]"):
        remote.filesystem("memory://x")


# ----------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on disk with a model in two revisions; nothing can be downloaded."""
    constants = pytest.importorskip("huggingface_hub.constants")
    folder = tmp_path / "hub" / "models--org--tiny"
    for revision, model in (("a" * 40, "one"), ("b" * 40, "two")):
        snapshot = folder / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for path in (models / model).iterdir():
            (snapshot / path.name).symlink_to(path)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    return folder


def test_ids_of_the_hub_are_found_in_its_cache(hub: Path, models: Path, tmp_path: Path) -> None:
    content = cases.recipe(models)
    content["models"][0]["model"] = "org/tiny"
    content["models"][1]["model"] = "org/tiny@v2"
    plan = make_plan(parse_recipe(content), tmp_path / "out", out_shard_size=100_000)
    assert plan.models[:2] == ("tiny", "tiny@v2")
    assert plan.inputs[1].reference == "org/tiny"
    result = execute(plan, fsync=False)
    assert result.digest == local(models, tmp_path / "local" / "out").digest
    assert verify(result.output).inputs == 4


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("org/none", "'org/none' is not a folder here, .* not in the hub's cache.*HF_HUB_OFFLINE"),
        ("org/tiny@v9", "'org/tiny@v9' is not a folder here.*--revision v9"),
    ],
)
def test_ids_that_the_cache_does_not_have(
    hub: Path, models: Path, tmp_path: Path, reference: str, words: str
) -> None:
    content = cases.recipe(models)
    content["models"][0]["model"] = reference
    with pytest.raises(CheckpointError, match=words) as caught:
        make_plan(parse_recipe(content), tmp_path / "out")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "is not on the Hugging Face hub, or is private"),
        ("GatedRepoError", "accepted its terms"),
        ("RevisionNotFoundError", "has no revision 'v9' on the hub"),
        ("HfHubHTTPError", r"cannot be had from the Hugging Face hub \(HfHubHTTPError\)"),
    ],
)
def test_what_the_hub_refuses(
    hub: Path, monkeypatch: pytest.MonkeyPatch, error: str, words: str
) -> None:
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error)

    def refuses(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind, f"Authorization: Bearer hf_{SECRET}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuses)
    from cl_fast.checkpoints.hub import snapshot

    with pytest.raises(CheckpointError, match=words) as caught:
        snapshot("org/tiny@v9")
    assert SECRET not in str(caught.value)


def test_a_folder_goes_before_an_id(
    hub: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(models / "three")
    content = cases.recipe(models)
    content["models"][2]["model"] = "org/tiny"
    plan = make_plan(parse_recipe(content), tmp_path / "out", out_shard_size=100_000)
    assert plan.inputs[3].path == tmp_path / "org" / "tiny"
