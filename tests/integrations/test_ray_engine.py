"""Merges on Ray nodes of this machine: bit-equal to the local ones, also when a node dies."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from merge_cases import contents, family, recipe, save, tensors, write_recipe
from merge_cases import plan as make_case

from cl_fast.checkpoints.remote import State
from cl_fast.cli import main
from cl_fast.errors import CheckpointError, Interrupted, NonFiniteError, OutputError
from cl_fast.integrations import ray as module
from cl_fast.integrations.ray import RayEngine
from cl_fast.merging import execute, make_plan, parse_recipe

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'cl_fast[ray]')")

SHARD = 100_000
"""Six files of weights. With `unit=1` every tensor is a task of its own."""

QUIET = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each; this process is connected to them."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=QUIET)
    cluster.add_node(**QUIET)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def both(models: Path, tmp_path: Path, method: str, **options: Any) -> Any:
    """Merges locally and on the cluster, compares every file, and returns the latter's result."""
    plan = make_case(models, tmp_path / "local" / "out", method, shard=SHARD)
    execute(plan, threads=1, fsync=False)
    plan = make_case(models, tmp_path / "ray" / "out", method, shard=SHARD)
    result = execute(plan, fsync=False, **{"engine": RayEngine(unit=1)} | options)
    assert contents(result.output) == contents(tmp_path / "local" / "out")
    return result


@pytest.mark.parametrize("method", ["ties", "ties paper", "dare_ties"])
def test_the_output_has_the_bytes_of_a_local_merge(
    cluster: Any, models: Path, tmp_path: Path, method: str
) -> None:
    result = both(models, tmp_path, method)
    assert result.backend.endswith("on 2 Ray nodes")
    assert result.shards == 6


def test_weights_that_come_from_inner_products(cluster: Any, models: Path, tmp_path: Path) -> None:
    content = {
        "merge_method": "model_stock",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / name)} for name in ("one", "two", "three")],
    }
    outputs = []
    for name, options in {"local": {}, "ray": {"engine": RayEngine(unit=1)}}.items():
        plan = make_plan(parse_recipe(content), tmp_path / name / "out", out_shard_size=SHARD)
        outputs.append(contents(execute(plan, fsync=False, **options).output))
    assert outputs[0] == outputs[1]


def test_what_keeps_being_lost_ends_the_run_and_can_be_resumed(
    cluster: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_case(models, tmp_path / "out", "ties", shard=SHARD)
    writing = module._write

    def dies(token: Any, settings: Any, driver: str, unit: Any, codes: Any) -> Any:
        if unit.number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return writing(token, settings, driver, unit, codes)

    monkeypatch.setattr(module, "_write", dies)
    with (
        pytest.warns(RuntimeWarning, match="WorkerCrashed"),
        pytest.raises(OutputError, match=r"model-00006-of-00006.*was lost 2 times") as caught,
    ):
        execute(plan, engine=RayEngine(retries=1), fsync=False)
    assert "--resume" in "".join(caught.value.__notes__)
    monkeypatch.undo()
    result = execute(plan, engine=RayEngine(), resume=True, fsync=False)
    assert 0 < result.resumed < 6
    execute(make_case(models, tmp_path / "local" / "out", "ties", shard=SHARD), fsync=False)
    assert contents(result.output) == contents(tmp_path / "local" / "out")


def test_an_interrupt_ends_the_tasks_and_keeps_what_is_finished(
    cluster: Any, models: Path, tmp_path: Path
) -> None:
    plan = make_case(models, tmp_path / "out", "ties", shard=SHARD)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "merge" and 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted"):
        execute(plan, engine=RayEngine(unit=1), progress=progress, fsync=False)
    assert not plan.output.exists()
    until = time.monotonic() + 10
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert ray.available_resources()["CPU"] == 2  # nothing is at work any more
    assert execute(plan, engine=RayEngine(), resume=True, fsync=False).resumed > 0


def test_an_error_of_a_task_is_the_error_of_the_merge(
    cluster: Any, models: Path, tmp_path: Path
) -> None:
    state = tensors(1)
    state["model.norm.weight"][3] = float("nan")
    save(tmp_path / "bad", state | {"model.ids": torch.arange(7)})
    content = recipe(models)
    content["models"][1]["model"] = str(tmp_path / "bad")
    plan = make_plan(parse_recipe(content), tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"bad.*model\.norm\.weight of model bad holds 1 NaN"):
        execute(plan, engine=RayEngine(unit=1), fsync=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_nodes_that_do_not_see_the_same_files_are_refused_before_any_work(
    cluster: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_case(models, tmp_path / "out", "ties", shard=SHARD)
    # The file that tells shared storage is there for the driver alone.
    monkeypatch.setattr(module, "sync_file", lambda path: path.rename(path.with_name("elsewhere")))
    with pytest.raises(OutputError, match=r"node .* does not see .*without shared storage"):
        execute(plan, engine=RayEngine())
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []

    seen = module._Token(tmp_path / "token", "text")
    seen.path.write_text("text")
    [path] = {header.path for header in plan.inputs[1].files}
    size, mtime = Path(path).stat().st_size, Path(path).stat().st_mtime_ns
    for files, words in (
        ({str(tmp_path / "none"): State(1, 1, "")}, "node x does not see this input"),
        ({path: State(size + 1, mtime, "")}, "node x sees another file there"),
        ({path: State(size, mtime + 1, "")}, "node x sees another file there"),
    ):
        refused = module._look(seen, "node x", files, "native")
        assert isinstance(refused, CheckpointError)
        assert words in str(refused)
        assert "without shared storage" in str(refused)
    assert isinstance(module._look(seen, "node x", {path: State(size, mtime, "")}, "eager"), dict)


@pytest.mark.parametrize(
    ("engine", "options", "changed", "words"),
    [
        ("auto", {"threads": 2}, {}, "no node of the cluster has 2 CPUs, the largest has 1"),
        ("10.0.0.1:6379", {}, {}, "connected to the cluster at .* already, not to 10.0.0.1:6379"),
        ("auto", {}, {"__version__": "0.0"}, "has cl_fast .*, this machine 0.0"),
    ],
)
def test_clusters_that_do_not_fit(
    cluster: Any,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    options: dict[str, Any],
    changed: dict[str, Any],
    words: str,
) -> None:
    for name, value in changed.items():
        monkeypatch.setattr(module, name, value)
    plan = make_case(models, tmp_path / "out", "ties", shard=SHARD)
    with pytest.raises(OutputError, match=words):
        execute(plan, engine=RayEngine(engine), **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: Connection refused"),
        ("head", "'head' is no address of a cluster; give HOST:PORT"),
        ("head:99999", "is no address of a cluster"),
        ("ray://head:10001", "address of a Ray client"),
    ],
)
def test_addresses_without_a_cluster(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    plan = make_case(models, tmp_path / "out", "ties", shard=SHARD)
    with pytest.raises(OutputError, match=words):
        execute(plan, engine=RayEngine(address))
    assert list(tmp_path.iterdir()) == []


def test_the_command_merges_on_the_cluster(
    cluster: Any, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "recipe.yml", recipe(models))
    assert main(["merge", str(path), str(tmp_path / "out"), "--engine", "ray", "--no-fsync"]) == 0
    assert "on 2 Ray nodes)" in capsys.readouterr().out
    execute(make_plan(parse_recipe(recipe(models)), tmp_path / "local" / "out"), fsync=False)
    mine, local = contents(tmp_path / "out"), contents(tmp_path / "local" / "out")
    # The manifest has the recipe, whose source is a file here; all else is equal.
    assert {name for name in mine if mine[name] != local[name]} <= {"cl_fast_merge.json"}
    code = main(["merge", str(path), str(tmp_path / "two"), "--ray-address", "auto"])
    assert code == 1
    assert "--ray-address goes with --engine ray" in capsys.readouterr().err


def test_settings_of_the_engine_are_checked() -> None:
    for settings, words in (
        ({"address": " "}, "address must be"),
        ({"unit": 0}, "unit must be at least 1 byte"),
        ({"retries": -1}, "retries must not be negative"),
    ):
        with pytest.raises(ValueError, match=words):
            RayEngine(**settings)


def test_a_node_that_dies_in_mid_run_changes_nothing(
    cluster: Any, models: Path, tmp_path: Path
) -> None:
    doomed = cluster.add_node(**QUIET)
    raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
    killed = threading.Event()

    def freeze() -> None:
        """Its workers take tasks and never finish them."""
        while not killed.is_set():
            with contextlib.suppress(psutil.Error):
                for worker in raylet.children(recursive=True):
                    worker.send_signal(signal.SIGSTOP)
            time.sleep(0.02)

    def kill() -> None:
        cluster.remove_node(doomed, allow_graceful=False)
        killed.set()

    started = list[threading.Thread]()

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "merge" and len(started) < 2:
            started.append(
                threading.Thread(target=freeze) if not started else threading.Timer(0.5, kill)
            )
            started[-1].start()

    try:
        with pytest.warns(RuntimeWarning, match="Ray lost a node or a worker"):
            both(models, tmp_path, "ties", progress=progress)
    finally:
        killed.set()
        for thread in started:
            thread.join()
    assert len(started) == 2
