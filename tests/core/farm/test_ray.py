"""The farm on real Ray clusters, whose processes and machines are killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infdit_core.__main__ import main
from tests.core.farm.small import put_pictures
from tools.comfy_server import ROOT

COUNT = 200
OPTIONS = ["--steps", "6", "--solver", "euler"]
"""So many steps that there is a middle to kill something in."""
PATIENCE = 400
"""Seconds for what takes one fifth of that on two processors that have nothing else to do."""
WORKER = "ray::MapWorker"


@pytest.fixture
def folder(tmp_path) -> Path:
    put_pictures(tmp_path / "in", COUNT)
    return tmp_path / "in"


@pytest.fixture
def start(model, folder, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `infdit farm` in a process of its own; nothing of it is left behind."""
    started: list[subprocess.Popen] = []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(*options: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "infdit_core", "farm", folder, tmp_path / "out"]
        command += [*OPTIONS, "--model", model, *options]
        process = subprocess.Popen(
            [*map(str, command)],
            env=environment | variables,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        end(process.pid)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for sockets, whose names may not be long."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def end(pid: int) -> None:
    """Kill a process with all that it started."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "nothing has come for a long time"
        time.sleep(0.02)


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    return said


def workers(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if process.cmdline()[0].startswith(WORKER):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def results(folder: Path) -> dict[str, bytes]:
    """What was written, hidden files too."""
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


def count(folder: Path) -> int:
    return len([*folder.glob("*.png")])


def expected(model: Path, folder: Path, target: Path) -> dict[str, bytes]:
    """The command line's results."""
    command = ["upscale", folder, "-o", target, *OPTIONS, "--model", model, "--device", "cpu"]
    assert main([*map(str, command)]) == 0
    assert len(results(target)) == COUNT
    return results(target)


def test_a_worker_that_is_killed_costs_no_picture(model, folder, start, tmp_path):
    out = tmp_path / "out"
    farm = start("--workers", "2")
    until(lambda: count(out) > 20, farm)
    victim = workers(farm.pid)[0]
    victim.kill()
    assert count(out) < COUNT - 20
    started = psutil.Process(farm.pid).children(recursive=True)
    assert f"{COUNT} of {COUNT} pictures made" in finish(farm)
    assert results(out) == expected(model, folder, tmp_path / "expected")
    assert not psutil.wait_procs(started, timeout=30)[1]  # Ray ended with it


@pytest.mark.slow
def test_a_machine_and_then_the_head_are_lost(model, folder, start, tmp_path, short, monkeypatch):
    """Two machines of one processor; one dies, later the head with the program; then once more."""
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # every machine needs the package
    from ray.cluster_utils import Cluster

    # nobody else's ray.init() shall find these clusters
    monkeypatch.setattr("ray._private.utils.write_ray_address", lambda *_: None)
    out = tmp_path / "out"
    variables = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

    head = {"num_cpus": 1, "temp_dir": str(short), "dashboard_agent_listen_port": None}

    first = Cluster(True, head_node_args=head)
    try:
        lost = first.add_node(num_cpus=1)
        farm = start("--address", first.address, **variables)
        until(lambda: count(out) > 20, farm)
        first.remove_node(lost, allow_graceful=False)
        seen = count(out)
        until(lambda: count(out) > seen + 20, farm)
        farm.send_signal(signal.SIGKILL)
    finally:
        left = psutil.Process().children(recursive=True)
        first.shutdown()
    assert not psutil.wait_procs(left, timeout=60)[1]  # nobody writes any more
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 40 < len(kept) < COUNT
    second = Cluster(True, head_node_args=head)
    try:
        said = finish(start("--address", second.address, **variables))
    finally:
        second.shutdown()
    assert f"{len(kept)} results are there already" in said
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    made = {name: data for name, data in results(out).items() if name.endswith(".png")}
    assert made == expected(model, folder, tmp_path / "expected")
