"""What users get: the archive that .comfyignore leaves, what is in it and what it may do."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.goldens import TINY, random_tensors

ROOT = Path(__file__).resolve().parents[2]

STANDARD = {
    "__future__", "abc", "argparse", "codecs", "collections", "concurrent", "contextlib", "copy",
    "contextvars", "dataclasses", "queue", "signal", "threading",
    "enum", "errno", "functools", "glob", "hashlib", "importlib", "inspect", "io", "itertools",
    "json", "logging", "math", "mmap", "os", "pathlib", "pickletools", "platform", "re", "secrets",
    "shutil", "struct", "sys", "tempfile", "time", "traceback", "types", "typing", "weakref", "xml",
    "zipfile", "zlib",
}  # fmt: skip
"""Of Python's library: nothing that connects, starts a process, loads a pickle or other code."""
PACKAGES = {
    "PIL", "einops", "numpy", "open_clip", "psutil", "safetensors", "torch", "torchvision", "tqdm",
    "triton", "imagecodecs", "tifffile", "pillow_heif",
}  # fmt: skip
FARM, FARM_PACKAGES = "infdit_core/farm/", {"fsspec", "ray"}
"""What connects, for a command that says so and without which they are not even installed."""
COMFYUI = {"comfy", "comfy_api", "folder_paths", "latent_preview", "server"}

EXPECTED_OF_BANDIT = {
    ("B403", "infdit_core/checkpoints/checkpoint.py"),  # names our pickle_reader
    ("B403", "infdit_core/checkpoints/pickle_reader.py"),  # pickletools runs nothing
    ("B408", "infdit_core/pictures/xmp.py"),  # takes no document that declares entities
    ("B318", "infdit_core/pictures/xmp.py"),
    ("B108", "infdit_core/farm/cluster.py"),  # a fresh folder in /tmp: names of sockets are short
}

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "breakpoint", "input", "system", "popen", "spawnv",
    "execv", "fork", "urlopen", "urlretrieve", "connect", "load_state_dict_from_url",
    "download_url_to_file", "hf_hub_download", "create_model_and_transforms", "create_model",
    "import_module", "dlopen", "CDLL", "load_library",
}  # fmt: skip
"""By the last part of their names."""
FORBIDDEN_NAMES = {
    "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "sys.path", "os.environ",
}  # fmt: skip
"""In full."""
ALLOWED_NAMES = {"infdit_core/farm/cluster.py os.environ"}
"""Ray is told by its environment to send no statistics."""


def git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"needs a git checkout: {result.stderr.strip()}")
    return [line for line in result.stdout.split("\0") if line]


@pytest.fixture(scope="module")
def archive() -> list[str]:
    """Files that the registry's archive of this checkout holds."""
    left_out = set(git("ls-files", "-z", "-c", "-i", "-X", ".comfyignore"))
    return [name for name in git("ls-files", "-z") if name not in left_out]


@pytest.fixture(scope="module")
def sources(archive) -> dict[str, ast.Module]:
    return {
        name: ast.parse((ROOT / name).read_text(encoding="utf-8"), name)
        for name in archive
        if name.endswith(".py")
    }


def test_the_archive_holds_the_pack_alone(archive):
    folders = {name.split("/")[0] for name in archive if "/" in name}
    unwanted = {"tests", "tools", "training", "benchmarks", ".ci", ".github", "shared", "runs"}
    assert not folders & unwanted
    assert {"infdit_core", "nodes", "web", "locales", "example_workflows", "models"} <= folders
    suffixes = {Path(name).suffix for name in archive}
    programs = {".so", ".dll", ".exe", ".sh", ".bat", ".pyc", ".whl", ".pt", ".pkl", ".bin"}
    assert not suffixes & programs
    scripts = {name for name in archive if Path(name).suffix == ".js"}
    assert scripts == {"web/choices.js", "web/last_text.js"}
    for name in scripts:  # of the interface and nothing else
        assert "://" not in (ROOT / name).read_text(encoding="utf-8")
    size = sum((ROOT / name).stat().st_size for name in archive)
    assert size < 30e6, f"{size / 1e6:.1f} MB"
    assert not [name for name in archive if (ROOT / name).is_symlink()]


def test_bandit_finds_nothing_else(sources):
    files = [str(ROOT / name) for name in sources]
    command = [sys.executable, "-m", "bandit", "--quiet", "--ignore-nosec", "--format", "json"]
    result = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    report = json.loads(result.stdout)
    assert report["errors"] == []
    assert report["metrics"]["_totals"]["loc"] > 4000, "it must have read them"
    found = {
        (issue["test_id"], Path(issue["filename"]).relative_to(ROOT).as_posix())
        for issue in report["results"]
    }
    assert found == EXPECTED_OF_BANDIT


def test_imports_are_those_on_the_list(sources):
    found = set()
    for name, tree in sources.items():
        here = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                here |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                here.add((node.module or "").split(".")[0])
        found |= here - FARM_PACKAGES if name.startswith(FARM) else here
    foreign = found - STANDARD - PACKAGES - COMFYUI
    assert not foreign, "what neither connects nor runs other code may be added to STANDARD"


def test_nothing_is_called_that_runs_or_fetches_code(sources):
    found, calls = [], set()
    for name, tree in sources.items():
        for node in ast.walk(tree):
            full = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            wrong = full in FORBIDDEN_NAMES and f"{name} {full}" not in ALLOWED_NAMES
            if isinstance(node, ast.Call):
                full = ast.unparse(node.func)
                own = getattr(node.func, "attr", getattr(node.func, "id", ""))
                # Methods of that name are none of Python's functions: model.eval, re.compile
                method = own in ("compile", "eval") and isinstance(node.func, ast.Attribute)
                wrong = own in FORBIDDEN_CALLS and not method
                calls.add(full)
            if wrong:
                found.append(f"{name}:{node.lineno} {full}")
    assert not found
    assert "safe_open" in calls, "it must have seen them"


WATCHED = """
import sys

BAD = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.", "subprocess.", "os.system",
       "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event.startswith(BAD) else None)
from infdit_core.__main__ import main

status = main(sys.argv[1:])
print("SEEN", seen)
sys.exit(status)
"""


def test_a_run_connects_to_nothing_and_starts_nothing(tmp_path):
    from PIL import Image

    save_file(random_tensors(TINY), tmp_path / "tiny.safetensors")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    options = ["--model", str(tmp_path / "tiny.safetensors"), "--steps", "1", "--solver", "euler"]
    options += ["--device", "cpu", "--schedule", "full"]
    arguments = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), *options]
    command = [sys.executable, "-c", WATCHED, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "SEEN []" in result.stdout
    assert (tmp_path / "b.png").exists()


def test_requirements_are_unpinned_and_name_no_index():
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    wanted = [line.split("#")[0].strip() for line in lines]
    assert all(re.fullmatch(r"[a-z_]*", line) for line in wanted)


def test_the_readme_lists_every_dependency_with_its_licence():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Dependencies")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE))
    required = set((ROOT / "requirements.txt").read_text().split())
    assert required <= set(table)
    assert {"pillow", "torchvision", "tqdm"} <= set(table)
    assert all(re.search(r"MIT|BSD|Apache|MPL", licence) for licence in table.values())
