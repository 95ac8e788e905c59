"""One picture on several devices: processes on the CPU, by gloo."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from infdit_core import InfDiTError
from infdit_core.__main__ import main
from infdit_core.cli.commands import Upscaler, read_picture
from infdit_core.cli.common import UsageError
from infdit_core.cli.jobs import CommandError
from infdit_core.cli.parser import build_parser
from infdit_core.cli.ranks import run_on_ranks
from tests.goldens import TINY, random_tensors
from tools.comfy_server import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_file(random_tensors(TINY), path)
    return path


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The processes import the work that they are given from here.

    Other tests put ComfyUI's folder on the path, whose own `tests` would be found instead.
    """
    others = [path for path in sys.path if not Path(path, "tests", "__init__.py").exists()]
    monkeypatch.setattr(sys, "path", [str(ROOT), *others])


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Seven lines of blocks, uneven in three strips; a wide one; and a single block."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in {"a_tall": (50, 11), "b_wide": (10, 30), "c_small": (7, 5)}.items():
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def upscale(model: Path, *args: object) -> int:
    fixed = ["--steps", "3", "--solver", "heun", "--device", "cpu", "--model", str(model)]
    return main(["upscale", *fixed, *map(str, args)])


@pytest.mark.parametrize("gpus", [2, 3])
def test_the_picture_of_one_process_to_the_bit(model, pictures, tmp_path, gpus, capfd):
    assert upscale(model, pictures, "-o", tmp_path / "one") == 0
    expected = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    capfd.readouterr()
    assert upscale(model, pictures, "-o", tmp_path / "many", "--gpus", gpus) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "many").iterdir()} == expected
    assert len(capfd.readouterr().out.splitlines()) == 3  # said once


def test_several_devices_of_one_process(model, pictures, tmp_path):
    """As a worker of a farm with several GPUs has them."""
    options = ["--steps", "3", "--solver", "heun", "--model", str(model), "--overwrite"]
    cpu = torch.device("cpu")
    for source in pictures.iterdir():
        files = [tmp_path / "one.png", tmp_path / "three.png"]
        for file, devices in zip(files, [(cpu,), (cpu, cpu, cpu)], strict=True):
            asked = ["upscale", str(source), "-o", str(file), *options]
            args = build_parser().parse_args(asked)
            job = read_picture(source, file, lambda size: (4 * size[0], 4 * size[1]), args)
            Upscaler(args, *devices).make(job, source, file)
        assert files[0].read_bytes() == files[1].read_bytes()


def arguments(**given) -> argparse.Namespace:
    return argparse.Namespace(
        gpus=2, device="cpu", schedule="auto", scratch=None, debug=False, **given
    )


def waits(args) -> None:
    """What a process does whose neighbour is gone."""
    torch.distributed.recv(torch.empty(1), 1)


def dies(args):
    if args.ranks.first:
        waits(args)
    os.kill(os.getpid(), signal.SIGKILL)


def refuses(args):
    if args.ranks.first:
        waits(args)
    raise InfDiTError("expected more of this picture")


def is_cancelled(args):
    if args.ranks.first:
        waits(args)
    raise KeyboardInterrupt


def runs_out_once(args):
    ranks = args.ranks
    if ranks.memory_share == 1:
        if ranks.first:
            ranks.finish(Path("done.png"))
            waits(args)
        time.sleep(1)
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert ranks.done == {"done.png"}
    if ranks.first:
        args.marker.write_text(f"{ranks.memory_share}")


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (dies, CommandError, "the process of GPU 1 died of SIGKILL"),
        (refuses, CommandError, "expected more of this picture"),
        (is_cancelled, KeyboardInterrupt, "^$"),
    ],
)
def test_one_that_fails_ends_all_with_its_reason(work, error, message):
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run_on_ranks(work, arguments())
    assert time.monotonic() - began < 120  # none waits for one that is gone


def test_out_of_memory_in_one_is_less_memory_for_all(tmp_path, capsys):
    assert run_on_ranks(runs_out_once, arguments(marker=tmp_path / "marker")) == 0
    assert (tmp_path / "marker").read_text() == "0.7"
    assert "CUDA out of memory; all go on with less" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
def test_an_interrupt_ends_all(model, pictures, tmp_path):
    command = [sys.executable, "-m", "infdit_core", "upscale", str(pictures), "-o", str(tmp_path)]
    options = ["--model", str(model), "--device", "cpu", "--gpus", "2", "--steps", "100000"]
    with subprocess.Popen(
        [*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        time.sleep(8)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert error.strip().splitlines()[-1] == "infdit: interrupted"


def test_what_does_not_go_with_several_processes():
    given = arguments()
    with pytest.raises(UsageError, match="--gpus goes with --schedule auto, full or layer-major"):
        run_on_ranks(waits, argparse.Namespace(**vars(given) | {"schedule": "block-major"}))
    with pytest.raises(UsageError, match="--gpus goes with --device cuda or cpu, got cuda:1"):
        run_on_ranks(waits, argparse.Namespace(**vars(given) | {"device": "cuda:1"}))
    if torch.cuda.device_count() < 2:
        with pytest.raises(CommandError, match="--gpus 2: expected as many CUDA devices"):
            run_on_ranks(waits, argparse.Namespace(**vars(given) | {"device": None}))
