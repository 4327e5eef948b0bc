"""ns-viewer and a browser: over the websocket, what nerfstudio's page does when somebody opens it."""

from __future__ import annotations

import io
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nerfstudio")

import msgspec
from nerfstudio.scripts.viewer import run_viewer
from websockets.sync.client import ClientConnection, connect

SECONDS = 60.0  # to wait for a message; a frame takes well below one


class Browser(threading.Thread):
    """Goes to where one of the photographs was taken, and waits for the first picture from there."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self.picture: np.ndarray | None = None

    def run(self) -> None:
        with connect(f"ws://localhost:{self._port}", max_size=None) as server:
            messages = self._messages(server)
            pose: dict[str, Any] = {}
            while not {"position", "wxyz"} <= pose.keys():
                message = next(messages)
                if message.get("name") == "/cameras/camera_00000":
                    pose.update(message)
            camera = {"type": "ViewerCameraMessage", "position": pose["position"], "wxyz": pose["wxyz"]}
            camera.update(fov=0.9, aspect=4 / 3, look_at=[0.0, 0.0, 0.0], up_direction=[0.0, 0.0, 1.0])
            server.send(msgspec.msgpack.encode(camera))
            jpeg = next(message["rgb_bytes"] for message in messages if message["type"] == "BackgroundImageMessage")
            self.picture = np.asarray(Image.open(io.BytesIO(jpeg)))

    @staticmethod
    def _messages(server: ClientConnection) -> Iterator[dict[str, Any]]:
        while True:
            yield from msgspec.msgpack.decode(server.recv(timeout=SECONDS))


def test_the_viewer_shows_a_trained_run_to_a_browser_until_ctrl_c(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    viewers = []

    class Viewer(run_viewer.ViewerState):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            viewers.append(self)

    browser = Browser(port)

    def wait(seconds: float) -> None:
        """Ctrl-C when the browser is done."""
        if not browser.ident:
            browser.start()
        elif not browser.is_alive():
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(run_viewer, "ViewerState", Viewer)
    monkeypatch.setattr(run_viewer, "time", SimpleNamespace(sleep=wait))
    monkeypatch.setattr(
        sys, "argv", ["ns-viewer", "--load-config", str(tiny_run), "--viewer.websocket-port", str(port)]
    )
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run_viewer.entrypoint()
    for viewer in viewers:
        viewer.viser_server.stop()
    sys.excepthook(interrupt.type, interrupt.value, interrupt.tb)  # what the interpreter does next
    assert capsys.readouterr().err == "interrupted\n"
    assert browser.picture is not None
    height, width, _ = browser.picture.shape
    assert width / height == pytest.approx(4 / 3, rel=0.05)
    assert browser.picture.std() > 1  # not blank


def test_ctrl_c_elsewhere_still_tells_where(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt) as interrupt:
        raise KeyboardInterrupt
    sys.excepthook(interrupt.type, interrupt.value, interrupt.tb)
    assert "test_ctrl_c_elsewhere" in capsys.readouterr().err
