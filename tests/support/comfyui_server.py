"""Runs a real ComfyUI server on loopback with this pack in it, and talks to it as a client does."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import websocket
from comfyui_install import ROOT

TEST_NODES = Path(__file__).resolve().parent / "turbo_test_nodes"
START_SECONDS = 180
RUN_SECONDS = 1800
PLAYED_CARD = "TURBO_TEST_CARD"  # what the test nodes play, an environment variable
OUTCOMES = ("execution_success", "execution_error", "execution_interrupted")


class ServerError(RuntimeError):
    """The server did not start, or ended while it was needed; carries the end of its log."""


class RejectedError(RuntimeError):
    """ComfyUI's validation refused a workflow: `status` (HTTP) and `node_errors` say why."""

    def __init__(self, status: int, body: dict):
        super().__init__(f"HTTP {status}: {json.dumps(body)}")
        self.status = status
        self.node_errors = body.get("node_errors", {})


@dataclass
class Run:
    """How one queued workflow ended."""

    prompt_id: str
    outcome: str = ""
    message: str = ""
    cached: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    outputs: dict[str, dict] = field(default_factory=dict)  # what nodes show, by their id
    seconds: float = 0.0


class ComfyServer:
    """A server process for a `with` block.

    base: folder for its models, output, user and temp data; the ComfyUI folder is not written to.
    model_folders: further folders to search, by ComfyUI's folder name.
    output: where results go, a folder in `base` if None.
    options: further ones for ComfyUI's command line.
    card: an older card that our kernels run as, see older_cards.py.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        model_folders: dict[str, list[Path]] | None = None,
        output: Path | None = None,
        options: tuple[str, ...] = (),
        card: str | None = None,
    ):
        self.comfyui = comfyui
        self.base = base
        self.model_folders = model_folders or {}
        self.output = output or base / "output"
        self.options = options
        self.card = card
        self.log_file = base / "server.log"
        self.client_id = uuid.uuid4().hex

    def __enter__(self) -> "ComfyServer":
        self.base.joinpath("custom_nodes").mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.log = self.log_file.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            self.command(port),
            cwd=self.comfyui,
            env=server_environment() | ({PLAYED_CARD: self.card} if self.card else {}),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def command(self, port: int) -> list[str]:
        paths = self.base / "search_paths.yaml"
        paths.write_text(search_paths(self.model_folders), encoding="utf-8")
        options = ["--port", str(port), "--base-directory", str(self.base)]
        options += ["--output-directory", str(self.output)]
        options += ["--extra-model-paths-config", str(paths)]
        options += ["--disable-all-custom-nodes"]
        options += ["--whitelist-custom-nodes", ROOT.name, TEST_NODES.name]
        options += ["--disable-api-nodes", "--disable-auto-launch"]
        options += ["--database-url", "sqlite:///:memory:"]
        if not torch.cuda.is_available():
            options += ["--cpu"]
        return [sys.executable, str(self.comfyui / "main.py"), *options, *self.options]

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.check_pack_loaded()
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer in {START_SECONDS} s\n{self.log_tail()}")

    def check_pack_loaded(self) -> None:
        if "TurboLoader" not in self.object_info():
            raise ServerError(f"ComfyUI runs without this pack's nodes\n{self.log_tail(80)}")

    def check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"ComfyUI ended with exit code {code}\n{self.log_tail()}")

    def log_text(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def get(self, path: str) -> dict:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
            raise ServerError(f"GET {path}: HTTP {error.code}\n{self.log_tail(80)}") from None

    def post(self, path: str, body: dict, timeout: float = 60) -> dict:
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.loads(response.read() or b"{}")

    def object_info(self, node: str = "") -> dict:
        return self.get(f"/object_info/{node}" if node else "/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def queue(self, workflow: dict) -> str:
        """Queue an API-format workflow; its prompt id, or RejectedError."""
        body = {"prompt": workflow, "client_id": self.client_id}
        try:
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RejectedError(error.code, json.load(error)) from None

    def run(self, workflow: dict, on_event: Callable[[str, dict], None] | None = None) -> Run:
        """Queue `workflow` and follow it to its end; `on_event(type, data)` sees every message."""
        started = time.monotonic()
        with contextlib.closing(self.open_websocket()) as events:
            run = Run(self.queue(workflow))
            self.follow(events, run, on_event or (lambda kind, data: None))
        run.seconds = time.monotonic() - started
        run.outputs = self.get(f"/history/{run.prompt_id}")[run.prompt_id]["outputs"]
        run.files = self.output_files(run.outputs)
        return run

    def open_websocket(self) -> websocket.WebSocket:
        url = f"ws://{self.address}/ws?clientId={self.client_id}"
        return websocket.create_connection(url, timeout=5)

    def follow(self, events: websocket.WebSocket, run: Run, on_event: Callable) -> None:
        """Read messages until the server is done with the run, its history written."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            kind, data = self.next_event(events)
            if data.get("prompt_id") != run.prompt_id:
                continue
            on_event(kind, data)
            if kind == "execution_cached":
                run.cached = data["nodes"]
            elif kind in OUTCOMES:
                run.outcome, run.message = kind, data.get("exception_message", "")
            elif kind == "executing" and data["node"] is None:
                return
        raise ServerError(f"the workflow did not end in {RUN_SECONDS} s\n{self.log_tail()}")

    def next_event(self, events: websocket.WebSocket) -> tuple[str, dict]:
        """The next text message; an empty one when it was a preview or none came in 5 s."""
        try:
            message = events.recv()
        except websocket.WebSocketTimeoutException:
            self.check_alive()
            return "", {}
        except (websocket.WebSocketException, ConnectionError):
            self.check_alive()
            raise
        if isinstance(message, bytes):
            return "", {}
        event = json.loads(message)
        return event["type"], event["data"]

    def output_files(self, outputs: dict[str, dict]) -> list[Path]:
        """The files in the output folder that a finished run saved."""
        saved = [entry for output in outputs.values() for entry in output.get("images", [])]
        return [self.output / entry["subfolder"] / entry["filename"] for entry in saved]


def search_paths(model_folders: dict[str, list[Path]]) -> str:
    """Config for --extra-model-paths-config (JSON is YAML): the pack, the test nodes, models."""
    folders = {"custom_nodes": [ROOT.parent, TEST_NODES.parent], **model_folders}
    return json.dumps({"tests": {k: "\n".join(map(str, v)) for k, v in folders.items()}})


def server_environment() -> dict[str, str]:
    """This process's environment less Triton's interpreter, which only kernel tests want."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node_inputs(workflow: dict, class_type: str) -> dict:
    """The inputs of the only node of that class in an API-format workflow, to read or change."""
    (node,) = (node for node in workflow.values() if node["class_type"] == class_type)
    return node["inputs"]


def combo_options(node_info: dict, name: str) -> list[str]:
    """The choices of a combo input; ComfyUI describes them in two ways."""
    inputs = {**node_info["input"]["required"], **node_info["input"].get("optional", {})}
    kind, *options = inputs[name]
    return kind if isinstance(kind, list) else options[0]["options"]
