"""What all commands have in common: help, JSON alone on standard output, exit statuses, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import tailorbird
from tailorbird.errors import CheckpointError, GateRefused

#: each command with the least it needs
COMMANDS = {
    "probe": ["probe"],
    "fit": ["fit", "demo", "--memory", "30%", "-o", "out"],
    "compress": ["compress", "demo", "-o", "out", "--recipe", "gptq:bits=4,group=64"],
    "compare": ["compare", "demo", "--budgets", "3.25bpw", "--methods", "gptq", "-o", "out"],
    "evaluate": ["evaluate", "demo"],
    "speed": ["speed", "demo"],
    "generate": ["generate", "demo", "hello"],
    "tune": ["tune", "demo", "--data", "train.jsonl", "-o", "adapter"],
    "draft": ["draft", "demo", "-o", "heads"],
    "serve": ["serve", "demo"],
    "batch": ["batch", "demo", "in.jsonl", "out.jsonl"],
    "export": ["export", "out", "--to", "dense", "-o", "dense"],
    "methods": ["methods"],
    "formats": ["formats"],
}
each_command = pytest.mark.parametrize("name", COMMANDS)


def test_the_package_itself_can_be_run() -> None:
    run = [sys.executable, "-m", "tailorbird"]
    shown = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"tailorbird {tailorbird.__version__}\n"
    wrong = subprocess.run([*run, "fit"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


@each_command
def test_help_states_the_purpose_and_an_example(command: Any, name: str) -> None:
    shown = command(name, "--help")
    assert shown.status == 0
    assert f"Example: tailorbird {name}" in shown.out


@each_command
def test_the_example_of_the_help_is_accepted(command: Any, api: Any, name: str) -> None:
    import shlex

    help_text = command(name, "--help").out
    example = help_text[help_text.index("Example: tailorbird ") :].splitlines()[0]
    done = command(*shlex.split(example)[2:])
    assert done.status == 0, done.err
    assert [called for called, _ in api.calls] == [name]


@each_command
def test_json_is_one_value_and_alone_on_standard_output(command: Any, api: Any, name: str) -> None:
    answer = api.answers[name]

    def noisy(**arguments: Any) -> Any:
        print("a library that talks")
        if arguments.get("progress") is not None:
            arguments["progress"].stage("work", 2)
            arguments["progress"].advance(note="half")
            arguments["progress"].note("a remark")
            arguments["progress"].done()
        return answer

    api.answers[name] = noisy
    done = command(*COMMANDS[name], "--json")
    assert done.status == 0
    value = json.loads(done.out)
    listed = name in ("methods", "formats", "compare")
    first = value[0] if listed else value
    expected = answer[0] if listed else answer
    assert set(first) == set(expected.__dataclass_fields__)


@each_command
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_a_users_mistake_exits_2_with_what_and_what_to_do(
    command: Any, api: Any, name: str, flags: tuple[str, ...]
) -> None:
    api.answers[name] = CheckpointError("weights.bin is a pickle", "safetensors", "convert it")
    done = command(*COMMANDS[name], *flags)
    assert done.status == 2
    assert done.out == ""
    assert "weights.bin is a pickle" in done.err
    assert "expected: safetensors" in done.err
    assert "what to do: convert it" in done.err
    assert "Traceback" not in done.err


@each_command
@pytest.mark.parametrize("debug", [False, True])
def test_a_failure_of_ours_exits_1_and_shows_its_traceback_only_on_request(
    command: Any, api: Any, name: str, debug: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORBIRD_DEBUG", "1" if debug else "0")
    api.answers[name] = ZeroDivisionError("[bold]by zero[/nothing]")
    done = command(*COMMANDS[name])
    assert done.status == 1
    assert "ZeroDivisionError: [bold]by zero[/nothing]" in done.err
    assert "TAILORBIRD_DEBUG=1" in done.err
    assert tailorbird.__version__ in done.err
    assert ("Traceback" in done.err) == debug


@each_command
def test_an_interruption_exits_130_and_says_whether_work_resumes(command: Any, api: Any, name: str) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    api.answers[name] = interrupt
    done = command(*COMMANDS[name])
    assert done.status == 130
    assert done.out == ""
    resumable = ("fit", "compress", "compare", "tune", "draft", "batch")
    assert ("same command resumes" in done.err) == (name in resumable)


@each_command
@pytest.mark.parametrize(
    "wrong", [["--no-such-flag"], ["--seed", "x"], ["--seed", "-1"], ["one", "two", "three"]]
)
def test_a_wrong_command_line_exits_2_before_any_work(
    command: Any, api: Any, name: str, wrong: list[str]
) -> None:
    done = command(*COMMANDS[name], *wrong)
    assert (done.status, done.out, api.calls) == (2, "", [])


@each_command
def test_a_device_that_is_not_there_is_a_users_mistake(command: Any, api: Any, name: str) -> None:
    for device in ("no-such-device", "cuda:99", "meta"):
        done = command(*COMMANDS[name], "--device", device)
        assert (done.status, done.out, api.calls) == (2, "", [])
        assert device in done.err


@pytest.mark.parametrize("name", ["fit", "compress"])
def test_a_refused_result_is_shown_and_exits_1(command: Any, api: Any, name: str) -> None:
    refused = GateRefused("total KL is 0.5", "at most 0.1", "give more memory")
    refused.result = api.answers[name]  # type: ignore[attr-defined]
    api.answers[name] = refused
    text, as_json = command(*COMMANDS[name]), command(*COMMANDS[name], "--json")
    assert text.status == as_json.status == 1
    assert "perplexity" in text.out
    assert as_json.out == ""
    assert "total KL is 0.5" in text.err
    assert "total KL is 0.5" in as_json.err


def test_every_command_of_the_program_is_tested_here(command: Any) -> None:
    from tailorbird.cli.main import app

    assert {info.name or info.callback.__name__ for info in app.registered_commands} == set(COMMANDS)


def test_the_version_is_printed(command: Any) -> None:
    done = command("--version")
    assert (done.status, done.out) == (0, f"tailorbird {tailorbird.__version__}\n")


def test_an_unknown_command_exits_2(command: Any) -> None:
    assert command("fitt").status == 2


def test_help_comes_without_loading_torch() -> None:
    code = (
        "import sys; from tailorbird.cli.main import run; status = run(['--help'])\n"
        "sys.exit(status or any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib', 'jinja2')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    code = "import sys; sys.argv = ['tailorbird', '--help']; from tailorbird.cli.main import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_errors_keep_square_brackets_as_they_are(command: Callable[..., Any], api: Any) -> None:
    api.answers["methods"] = CheckpointError("tensor [red]w[/red] has shape [3, 4]", "[4, 3]", "see [docs]")
    done = command("methods")
    assert "tensor [red]w[/red] has shape [3, 4]" in done.err
    assert "expected: [4, 3]" in done.err
