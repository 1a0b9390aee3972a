"""Where a model is looked for, and what is said when it isn't there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tailorbird.errors import CheckpointError, ModelNotFound, SettingsError
from tailorbird.model.location import DEMO, _wanted_files, demo_text, locate

ASK = """
import socket, sys, threading, time
from tailorbird.errors import ModelNotFound
import os
server = socket.socket()
server.bind(("127.0.0.1", 0))
server.listen(8)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
os.environ.pop("HF_HUB_OFFLINE", None)
answer = sys.argv[1].encode().replace(b"|", b"\\r\\n")
held = []
def serve():
    while True:
        connection, _ = server.accept()
        held.append(connection)
        request = b""  # read to its end: a socket closed over unread bytes resets the connection
        while b"\\r\\n\\r\\n" not in request and (part := connection.recv(4096)):
            request += part
        if answer:
            end = b"\\r\\nConnection: close\\r\\nContent-Length: 0\\r\\n\\r\\n"
            connection.sendall(b"HTTP/1.1 " + answer + end)
            connection.shutdown(socket.SHUT_WR)
threading.Thread(target=serve, daemon=True).start()
from tailorbird.model import location
location._HUB_SECONDS = 1
import huggingface_hub
began = time.monotonic()
try:
    location.locate("some-org/some-model")
except ModelNotFound as error:
    print(error)
print(f"{time.monotonic() - began:.1f}")
"""


def ask(answer: str, home: Path) -> tuple[str, float]:
    """What `locate` says to a Hub that gives this answer (none: it never does), and after how long."""
    environment = {**os.environ, "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", ASK, answer], capture_output=True, text=True, check=True, env=environment
    )
    *words, seconds = done.stdout.split("\n")[:-1]
    return "\n".join(words), float(seconds)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("404 Not Found|X-Error-Code: RepoNotFound", "no model of this id"),
        ("403 Forbidden|X-Error-Code: GatedRepo", "gated"),
        ("500 Broken", "cannot be reached"),
        ("", "cannot be reached"),
    ],
    ids=["unknown", "gated", "broken", "silent"],
)
def test_the_hub_saying_no_or_nothing_is_answered_quickly(tmp_path: Path, answer: str, words: str) -> None:
    message, seconds = ask(answer, tmp_path)
    assert words in message
    assert "some-org/some-model" in message
    assert seconds < 15


def test_offline_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="demo") as caught:
        locate("no-such-org-here/no-such-model")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "model",
    [
        "",
        " ",
        "no/such/path",
        "./no-such",
        "/no/such",
        "no-such-name",
        "a//b",
        "../a",
        "x\0y",
        "é/a",
        "a" * 5000,
    ],
)
def test_what_is_neither_path_nor_id_is_no_question_to_the_hub(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tailorbird.model.location._fetch", lambda name: pytest.fail(f"asked the Hub for {name}")
    )
    with pytest.raises(ModelNotFound):
        locate(model)


def test_a_file_is_answered_with_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelNotFound, match="is a file") as caught:
        locate(str(file))
    assert str(tmp_path) in caught.value.remedy


def test_a_directory_is_found_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/name") == Path("org/name")
    (tmp_path / "demo").mkdir()
    assert locate("./demo").resolve() == tmp_path / "demo"
    assert locate(DEMO).resolve() != tmp_path / "demo"


def test_only_what_a_checkpoint_consists_of_is_fetched() -> None:
    names = ["config.json", "README.md", "tokenizer.json", "chat_template.jinja", "LICENSE"]
    other = [
        "modeling_x.py",
        "pytorch_model.bin",
        "consolidated.pth",
        "onnx/model.onnx",
        "original/x.safetensors",
        "x.gguf",
    ]
    single = [*names, *other, "model.safetensors", "consolidated.safetensors"]
    assert set(_wanted_files("o/m", single)) == {*names, "model.safetensors"}
    sharded = [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert set(_wanted_files("o/m", [*names, *other, *sharded])) == {*names, *sharded}
    with pytest.raises(CheckpointError, match="pickled weights only"):
        _wanted_files("o/m", [*names, *other])


def test_demo_text_names_its_parts() -> None:
    assert demo_text("calibration").parent == demo_text("held_out").parent == locate(DEMO)
    with pytest.raises(SettingsError, match="held_out"):
        demo_text("heldout")
