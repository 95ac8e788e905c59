"""A real ComfyUI as a subprocess, and a client of its HTTP interface.

Shared by `tools/dev.py demo` and the `comfy_server` fixture of the tests.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACK_FOLDER = "comfyui-infdit"
_HOST = "127.0.0.1"
_BOOT_SECONDS = 900
_STOP_SECONDS = 15
_REQUEST_SECONDS = 60
_POLL_SECONDS = 0.2
_FIRST_POLL_SECONDS = 0.02
_LOG_LINES = 25

Workflow = dict[str, Any]
Outputs = dict[str, Any]


class ComfyError(RuntimeError):
    """ComfyUI did not start, refused a workflow or failed in a node; the text says which."""


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment without the Python paths of another installation."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    # Threads that wait must sleep: beside other work they take its processors and all wait longer.
    return {"OMP_WAIT_POLICY": "passive"} | kept | extra


def free_port(preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else a port that the system picks."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise ComfyError(f"Expected a free port on {_HOST}; the system gave none.")


def make_base(base: Path, comfyui: Path | None = None) -> Path:
    """A folder for `--base-directory` whose custom_nodes hold this pack and nothing else.

    With `comfyui`, the source folder, its input holds the pictures of the example workflows:
    ComfyUI's own `example.png`, which every installation has, and our photograph.
    """
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    _link(ROOT, base / "custom_nodes" / PACK_FOLDER)
    if comfyui is not None:
        photo = ROOT / "examples" / "demo_photo.png"
        (base / "input" / "photos").mkdir(exist_ok=True)
        for source, name in (
            (comfyui / "input" / "example.png", "example.png"),
            (photo, photo.name),
            (photo, f"photos/{photo.name}"),
        ):
            if not (target := base / "input" / name).exists():
                shutil.copyfile(source, target)
    return base


def _link(source: Path, link: Path) -> None:
    """Symlink; on Windows, where that needs rights, a junction; a copy where neither works."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        # A junction is removed by rmdir, which leaves its target alone; a copy is a full folder.
        try:
            link.rmdir()
        except OSError:
            shutil.rmtree(link)
    try:
        link.symlink_to(source, target_is_directory=True)
        return
    except OSError:
        pass
    if sys.platform == "win32":
        junction = ["cmd", "/c", "mklink", "/J", str(link), str(source)]
        if subprocess.run(junction, capture_output=True, check=False).returncode == 0:
            return
    shutil.copytree(source, link, ignore=shutil.ignore_patterns(".*", "output", "runs"))


def server_command(python: Path, source: Path, base: Path, port: int) -> list[str]:
    """Command line of a ComfyUI from `source` that keeps all its files under `base`."""
    database = (base / "user" / "comfyui.db").as_posix()
    command = [str(python), str(source / "main.py"), "--listen", _HOST, "--port", str(port)]
    return [*command, "--base-directory", str(base), "--database-url", f"sqlite:///{database}"]


class ComfyServer:
    """Client of one running ComfyUI; made by `running_server`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, base: Path, output: Path):
        self.process = process
        self.url = f"http://{_HOST}:{port}"
        self.models_dir = base / "models"
        self.input_dir = base / "input"
        self.output_dir = output
        self.log_path = base / "server.log"
        # Proxies of the environment must not see requests to this machine.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def log(self) -> str:
        """All that the server has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def system_stats(self) -> dict[str, Any]:
        """What ComfyUI says of its devices and their memory."""
        return self._json("/system_stats")

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """Schemas by node id: of all nodes, or of `node` alone (empty if there is none)."""
        return self._json(f"/object_info/{node}" if node else "/object_info")

    def upload_image(self, path: Path) -> str:
        """Put a picture into the input folder; returns the name for LoadImage."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"'
            "\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        overwrite = (
            f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"'
            f"\r\n\r\ntrue\r\n--{boundary}--\r\n"
        )
        body = head.encode() + path.read_bytes() + overwrite.encode()
        kind = f"multipart/form-data; boundary={boundary}"
        return self._json("/upload/image", body, kind)["name"]

    def queue(self, workflow: Workflow, client_id: str = "") -> str:
        """Queue a workflow in the API format and return its prompt id without waiting.

        `client_id` is that of the websocket that is to hear of it. Raises ComfyError with each
        node's complaint if ComfyUI does not accept it.
        """
        body = json.dumps({"prompt": workflow, "client_id": client_id}).encode()
        return self._json("/prompt", body)["prompt_id"]

    def wait(
        self,
        prompt_id: str,
        timeout: float | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Outputs:
        """Outputs by node id, once the prompt is done.

        `timeout` in seconds; `progress` is called at every poll with the seconds so far. Raises
        ComfyError if a node fails, the prompt is interrupted, the server dies or time runs out.
        """
        start = time.monotonic()
        while prompt_id not in (history := self._json(f"/history/{prompt_id}")):
            elapsed = time.monotonic() - start
            if timeout is not None and elapsed > timeout:
                raise ComfyError(f"Expected the workflow to end within {timeout:g} s.")
            if progress is not None:
                progress(elapsed)
            # Soon after a short job, seldom in a long one
            time.sleep(min(_POLL_SECONDS, max(_FIRST_POLL_SECONDS, elapsed / 10)))
        entry = history[prompt_id]
        if entry["status"]["status_str"] != "success":
            raise ComfyError(_execution_error(entry["status"]["messages"]))
        return entry["outputs"]

    def submit(self, workflow: Workflow, timeout: float | None = None) -> Outputs:
        """`queue` and `wait`."""
        return self.wait(self.queue(workflow), timeout)

    def output_files(self, outputs: Outputs) -> list[Path]:
        """Where the pictures of the SaveImage nodes among `outputs` lie."""
        return [
            self.output_dir / image["subfolder"] / image["filename"]
            for node in outputs.values()
            for image in node.get("images", [])
            if image["type"] == "output"
        ]

    def interrupt(self) -> None:
        """Cancel what runs now."""
        self._request("/interrupt", b"{}")

    def wait_until_up(self) -> None:
        """Return when the server answers; raises ComfyError with the end of its log if it dies."""
        deadline = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise ComfyError(
                    f"Expected ComfyUI to start; it ended with code {code}.\n{self._log_tail()}"
                )
            try:
                self._request("/system_stats")
                return
            except ComfyError:
                time.sleep(_POLL_SECONDS)
        raise ComfyError(f"Expected ComfyUI to start within {_BOOT_SECONDS} s.\n{self._log_tail()}")

    def check_pack(self, node: str) -> None:
        """Raise ComfyError with the reason from the log if this pack did not load.

        `node` is the id of a node that it must have brought along.
        """
        log = self.log()
        if "IMPORT FAILED" in log or node not in self.object_info(node):
            end = log.find("\n", log.find("Cannot import"))
            start = max(log.rfind("Traceback", 0, end), 0)
            raise ComfyError(f"Expected ComfyUI to load this pack.\n{log[start:end].strip()}")

    def stop(self) -> None:
        """End the server, by force if it does not listen."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-_LOG_LINES:])

    def _json(self, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        return json.loads(self._request(path, body, kind))

    def _request(
        self, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        try:
            with self._open(request, timeout=_REQUEST_SECONDS) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise ComfyError(_refusal(error.read(), f"{path}: {error}")) from None
        except (OSError, http.client.HTTPException) as error:
            raise ComfyError(
                f"Expected an answer from {self.url}{path}; got: {error}\n{self._log_tail()}"
            ) from None


@contextmanager
def running_server(
    python: Path,
    source: Path,
    base: Path,
    output: Path | None = None,
    arguments: Sequence[str] = (),
    threads: int | None = None,
) -> Iterator[ComfyServer]:
    """A ComfyUI from `source` with this pack in it, up while the block runs.

    `python` has the requirements installed; `base` receives every file that ComfyUI writes, except
    pictures if `output` is given; `arguments` go to main.py; `threads` limits torch's CPU threads.
    """
    make_base(base)
    output = output or base / "output"
    output.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = server_command(python, source, base, port)
    command += ["--output-directory", str(output), "--disable-auto-launch", "--disable-api-nodes"]
    limits = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment = child_environment(PYTHONUNBUFFERED="1", PYTHONUTF8="1", **limits)
    with open(base / "server.log", "wb") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=source,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = ComfyServer(process, port, base, output)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.stop()


def _refusal(body: bytes, fallback: str) -> str:
    """What ComfyUI says about a workflow that it does not accept, one complaint a line."""
    try:
        answer = json.loads(body)
        lines = [answer["error"]["message"]]
        for node_id, node in answer["node_errors"].items():
            lines += [
                f"  {node['class_type']} (node {node_id}): {e['message']}: {e['details']}"
                for e in node["errors"]
            ]
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return fallback


def _execution_error(messages: list[tuple[str, dict[str, Any]]]) -> str:
    """The node and its message, from the history of a failed prompt."""
    for event, data in messages:
        if event == "execution_error":
            text = data["exception_message"].strip()
            where = f"{data['node_type']} (node {data['node_id']})"
            return f"{where} failed: {data['exception_type']}: {text}"
        if event == "execution_interrupted":
            return f"{data['node_type']} (node {data['node_id']}) was interrupted."
    return f"The workflow failed without a reason: {messages}"
