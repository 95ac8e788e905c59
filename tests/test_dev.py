"""The developer tools, without network or ComfyUI."""

import io
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tools import comfy_server, environment
from tools.comfy_server import PACK_FOLDER, ComfyError, child_environment, free_port, make_base
from tools.dev import PHOTO, SCALE, WORKFLOW, _call, png_size
from tools.environment import (
    Environment,
    SetupError,
    cache_dir,
    environment_key,
    extract_comfyui,
    requirements,
)

ROOT = Path(__file__).resolve().parents[1]


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_png_size(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.new("L", (75, 141)).save(path)
    assert png_size(path) == (75, 141)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\0" * 40])
def test_png_size_refuses_other_files(tmp_path: Path, data: bytes):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(ComfyError, match="Expected a PNG file"):
        png_size(path)


def test_environment_key_follows_requirements_and_python():
    key = environment_key(["a==1", "b"], "cpython-311 x86_64")
    assert key == environment_key(["b", "a==1"], "cpython-311 x86_64")
    assert key != environment_key(["a==2", "b"], "cpython-311 x86_64")
    assert key != environment_key(["a==1", "b"], "cpython-312 x86_64")
    assert len(key) == 16


def test_requirements_hold_those_of_the_pack():
    pack = (ROOT / "requirements.txt").read_text().split()
    assert pack
    assert set(pack) < set(requirements())


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [
        ("linux", "XDG_CACHE_HOME", "here/comfyui-infdit"),
        ("win32", "LOCALAPPDATA", "here/comfyui-infdit"),
        ("darwin", "HOME", "here/Library/Caches/comfyui-infdit"),
    ],
)
def test_cache_dir_of_the_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, tail: str
):
    monkeypatch.delenv("INFDIT_CACHE", raising=False)
    monkeypatch.setattr(environment.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path / "here"))
    assert cache_dir() == tmp_path / tail


def test_cache_dir_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("INFDIT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


def test_interrupted_setup_starts_afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("INFDIT_CACHE", str(tmp_path))
    calls = []

    def make(made: Environment):
        assert not made.python.exists()
        calls.append(made)
        made.python.parent.mkdir(parents=True)
        made.python.touch()
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(environment, "_make", make)
    with pytest.raises(KeyboardInterrupt):
        environment.environment()
    first = environment.environment()
    assert environment.environment() == first
    assert len(calls) == 2
    first.python.unlink()  # as when the Python that it links to is uninstalled
    assert environment.environment() == first
    assert len(calls) == 3


def test_failed_step_shows_the_end_of_its_output(tmp_path: Path):
    command = [sys.executable, "-c", "print('x\\n' * 99 + 'no such package'); raise SystemExit(3)"]
    with pytest.raises(SetupError, match=r"'packages' failed with code 3:[\s\S]*no such package"):
        environment._run("packages", command, {}, tmp_path / "log")


def test_second_setup_waits_for_the_lock(tmp_path: Path):
    path = tmp_path / "lock"
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tools.environment import _try_lock\n"
        f"file = open({str(path)!r}, 'a+b')\n"
        "sys.exit(_try_lock(file.fileno()))"
    )
    with environment._lock(path):
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 1


def test_extract_takes_comfyui_alone(tmp_path: Path):
    files = {
        "p-1/vendor/ComfyUI/main.py": b"main",
        "p-1/vendor/ComfyUI/comfy/ops.py": b"ops",
        "p-1/vendor/Other/main.py": b"other",
        "p-1/setup.py": b"setup",
    }
    extract_comfyui(archive(tmp_path / "a.tar.gz", files), tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.py")}
    assert found == {"main.py", "comfy/ops.py"}


def test_extract_refuses_to_leave_its_folder(tmp_path: Path):
    hostile = archive(tmp_path / "a.tar.gz", {"p-1/vendor/ComfyUI/../../../bad.py": b"bad"})
    with pytest.raises(SetupError, match="Expected file names inside"):
        extract_comfyui(hostile, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("bad.py"))


def test_extract_wants_comfyui(tmp_path: Path):
    with pytest.raises(SetupError, match=r"Expected vendor/ComfyUI/main\.py"):
        extract_comfyui(archive(tmp_path / "a.tar.gz", {"p-1/setup.py": b""}), tmp_path / "out")


def test_base_links_this_pack_again_and_again(tmp_path: Path):
    for _ in range(2):
        folder = make_base(tmp_path) / "custom_nodes"
        assert [p.name for p in folder.iterdir()] == [PACK_FOLDER]
        assert (folder / PACK_FOLDER / "__init__.py").samefile(ROOT / "__init__.py")


def test_base_holds_a_copy_where_links_do_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*_, **__):
        raise OSError

    monkeypatch.setattr(comfy_server.Path, "symlink_to", refuse)
    source = tmp_path / "pack"
    (source / ".git").mkdir(parents=True)
    (source / "__init__.py").write_text("first")
    for text in ("first", "second"):
        (source / "__init__.py").write_text(text)
        comfy_server._link(source, tmp_path / "link")
        assert {p.name: p.read_text() for p in (tmp_path / "link").iterdir()} == {
            "__init__.py": text
        }


def test_free_port_leaves_a_taken_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) not in (0, port)


def test_demo_has_its_photograph_and_workflow():
    assert min(png_size(PHOTO)) * SCALE >= 128
    assert f'"{PHOTO.name}"' in WORKFLOW.read_text()


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["demo", "x"], 2)])
def test_command_line(arguments: list[str], code: int):
    command = [sys.executable, str(ROOT / "tools" / "dev.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr


def test_exit_code_of_the_tests_is_passed_on():
    assert _call([sys.executable, "-c", "raise SystemExit(7)"], ROOT, child_environment()) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_terminated_command_lets_its_child_clean_up(tmp_path: Path):
    """Else a terminated test run leaves its ComfyUI behind."""
    child = (
        "import time\n"
        "try:\n    print('up', flush=True); time.sleep(60)\n"
        f"except KeyboardInterrupt: open({str(tmp_path / 'cleaned')!r}, 'w')"
    )
    script = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import signal\n"
        "from tools.dev import _call\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"_call([sys.executable, '-c', {child!r}], '.', dict(os.environ))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(30) == 143
    assert (tmp_path / "cleaned").exists()
