"""Developer commands: `python3 tools/dev.py demo | test | comfyui`.

Needs Python 3.11 or newer and nothing else: the first call makes an environment with a real
ComfyUI outside this checkout (see tools/environment.py), later calls reuse it.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(f"tools/dev.py: expected Python 3.11 or newer; got {sys.version.split()[0]}.")

import argparse
import hashlib
import json
import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.comfy_server import (
    ROOT,
    ComfyError,
    free_port,
    make_base,
    running_server,
    server_command,
)
from tools.environment import Environment, SetupError, cache_dir, environment

PHOTO = ROOT / "examples" / "demo_photo.png"
WORKFLOW = ROOT / "tests" / "workflows" / "upscale_picture.json"
SCALE = 4
_COMFYUI_PORT = 8188
_PROGRESS_SECONDS = 10
_TEST_SECONDS = 900
_TEST_PROCESSES = 2


def main() -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tools/dev.py", description="Runs this pack in a real ComfyUI of its own."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="upscale the example photograph in a real ComfyUI")
    commands.add_parser("test", help="run the tests; further arguments go to pytest")
    commands.add_parser("comfyui", help="start ComfyUI; further arguments go to its main.py")
    options, extra = parser.parse_known_args()
    if extra and options.command == "demo":
        parser.error(f"demo takes no arguments; got {' '.join(extra)}")

    # A terminated command must end its ComfyUI as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        made = environment()
        if options.command == "demo":
            return demo(made)
        return test(made, extra) if options.command == "test" else comfyui(made, extra)
    except (ComfyError, SetupError) as error:
        print(f"tools/dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tools/dev.py: interrupted", file=sys.stderr)
        return 130


def demo(made: Environment) -> int:
    """Upscale the example photograph through ComfyUI's HTTP interface and check the result."""
    if not PHOTO.exists():
        raise ComfyError(f"Expected the example photograph at {PHOTO}; there is none.")
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    width, height = png_size(PHOTO)
    start = time.monotonic()

    shown = 0.0

    def progress(elapsed: float) -> None:
        nonlocal shown
        if elapsed - shown >= _PROGRESS_SECONDS:
            shown = elapsed
            print(f"  {elapsed:.0f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="infdit-demo-", ignore_cleanup_errors=True) as base:
        print("Starting ComfyUI ...", flush=True)
        with running_server(
            made.python, made.comfyui, Path(base), ROOT / "output", device_arguments(made)
        ) as server:
            server.check_pack("InfDiTSampler")
            print(f"ComfyUI is up after {time.monotonic() - start:.0f} s.", flush=True)
            name = server.upload_image(PHOTO)
            for node in workflow.values():
                if node["class_type"] == "LoadImage":
                    node["inputs"]["image"] = name
            print(f"Upscaling {name}, {width}x{height}, by {SCALE} ...", flush=True)
            outputs = server.wait(server.queue(workflow), progress=progress)
            pictures = server.output_files(outputs)

    expected = (width * SCALE, height * SCALE)
    if not pictures:
        raise ComfyError("Expected the workflow to save a picture; it saved none.")
    for picture in pictures:
        size = png_size(picture)
        if size != expected:
            raise ComfyError(
                f"Expected {expected[0]}x{expected[1]} px in {picture}; got {size[0]}x{size[1]}."
            )
        print(f"Done in {time.monotonic() - start:.0f} s: {expected[0]}x{expected[1]} px")
        print(picture)
    return 0


def test(made: Environment, extra: list[str]) -> int:
    """Run pytest with the arguments `extra`; without -m, the slow and GPU tests stay out."""
    # pytest takes the last of a repeated option, so the caller's come after ours.
    defaults = ["-m", "not slow and not gpu", "--timeout", str(_TEST_SECONDS)]
    if not any(a.startswith("-m") for a in extra):  # slow tests take the whole memory, one by one
        defaults += ["-n", str(_TEST_PROCESSES), "--dist", "loadfile"]
    command = [made.python, "-m", "pytest", *defaults, *extra]
    # Networks of tests are so small that threads cost more than they give.
    return _call(command, ROOT, {"OMP_NUM_THREADS": "1"} | made.variables())


def comfyui(made: Environment, extra: list[str]) -> int:
    """Start the interface with this pack; its models, input and workflows stay between calls."""
    checkout = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    base = make_base(cache_dir() / "base" / checkout, made.comfyui)
    command = server_command(made.python, made.comfyui, base, free_port(_COMFYUI_PORT))
    command += [*device_arguments(made), *extra]
    print(f"Models, input and output are under {base}", flush=True)
    return _call(command, made.comfyui, made.variables())


def _call(command: Sequence[str | Path], folder: Path, variables: dict[str, str]) -> int:
    """Run a command in the terminal's foreground, to its own end; returns its exit code."""
    # A shell ignores SIGINT for what it starts in the background, and the command would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=folder, env=variables) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # Ctrl-C reached the command too: let it stop what it has started
            except SystemExit:  # SIGTERM reached this process alone
                process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
                raise


def device_arguments(made: Environment) -> list[str]:
    """`--cpu` for main.py if torch finds no GPU."""
    query = "import torch, sys; sys.exit(not torch.accelerator.is_available())"
    found = subprocess.run([made.python, "-c", query], env=made.variables(), check=False)
    return [] if found.returncode == 0 else ["--cpu"]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG file. Raises ComfyError."""
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ComfyError(f"Expected a PNG file at {path}; got: {error}") from None
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise ComfyError(f"Expected a PNG file at {path}; it starts with {head[:8]!r}.")
    return struct.unpack(">II", head[16:24])


if __name__ == "__main__":
    sys.exit(main())
