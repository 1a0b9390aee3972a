"""`generate` prints prompt and continuation, at once or as it comes."""

from __future__ import annotations

from typing import Any


def test_the_text_follows_the_prompt(command: Any, api: Any) -> None:
    done = command("generate", "m", "hello", "--max-tokens", "2", "--temperature", "0.5", "--seed", "4")
    assert done.out == "hello world\n"
    arguments = api.arguments
    assert (arguments["max_tokens"], arguments["temperature"], arguments["seed"]) == (2, 0.5, 4)
    assert arguments["on_text"] is None


def test_a_stream_is_printed_piece_by_piece_and_once(command: Any, api: Any) -> None:
    answer = api.answers["generate"]

    def pieces(**arguments: Any) -> Any:
        for piece in (" wo", "rld"):
            arguments["on_text"](piece)
        return answer

    api.answers["generate"] = pieces
    assert command("generate", "m", "hello", "--stream").out == "hello world\n"


def test_a_stream_as_json_is_a_conflict(command: Any, api: Any) -> None:
    done = command("generate", "m", "hello", "--stream", "--json")
    assert (done.status, done.out, api.calls) == (2, "", [])
    assert "--stream and --json" in done.err


def test_brackets_in_a_text_are_no_markup(command: Any, api: Any) -> None:
    assert command("generate", "m", "x[bold]").out == "x[bold] world\n"
