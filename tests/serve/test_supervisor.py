"""An engine in its own process: asked, refused, killed, and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from fake_engine import DEADLY, FAILING, HANGING, LONG, REFUSED, SILENT, SLOW
from tailorbird.errors import CheckpointError, EngineError, GateRefused, SettingsError
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Grammar, Output, Request, Sampling
from tailorbird.serve.supervisor import MOST_ATTEMPTS, Supervisor, _Child

ENDLESS = Sampling(ignore_end=True)


def endless(id: str, first: int = 1) -> Request:
    return Request(id, (first, 2), max_tokens=1 << 20, sampling=ENDLESS)


def run(
    work: Callable[[Supervisor], Awaitable[None]],
    engine: str = "fake_engine:paced",
    max_sequences: int = 4,
    hang_seconds: float = 60,
) -> list[str]:
    """Let `work` use an engine; what the supervisor logged."""
    said: list[str] = []

    async def main() -> None:
        options = EngineOptions("m", {"first": "a"}, max_sequences=max_sequences)
        supervisor = Supervisor(options, engine, said.append, hang_seconds)
        await supervisor.start()
        try:
            async with asyncio.timeout(30):
                await work(supervisor)
        finally:
            await supervisor.close()
        assert supervisor.in_flight == 0
        assert not supervisor.ready

    asyncio.run(main())
    return said


async def collect(supervisor: Supervisor, *requests: Request) -> list[Output]:
    return [output async for output in supervisor.submit(*requests)]


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_what_an_engine_warns_of_is_told_where_the_log_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    async def work(supervisor: Supervisor) -> None:
        assert supervisor.ready

    assert "pages come back damaged" in run(work, "fake_engine:warning")
    assert "damaged" not in capfd.readouterr().err


def test_outputs_of_several_requests_come_back_whole_and_apart() -> None:
    async def work(supervisor: Supervisor) -> None:
        outputs = await collect(supervisor, Request("a", (5, 6, 7), n=2), Request("b", (8,), max_tokens=1))
        for id, index, tokens, finish in (
            ("a", 0, (5, 6, 7), "stop"),
            ("a", 1, (5, 6, 7), "stop"),
            ("b", 0, (8,), "length"),
        ):
            mine = [output for output in outputs if (output.id, output.index) == (id, index)]
            assert sum((output.tokens for output in mine), ()) == tokens
            assert [output.finish for output in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].finish == finish
        await until(lambda: supervisor.stats.get("running") == 0)
        assert supervisor.stats["memory_bytes"] > 0

    assert run(work) == ["loaded"]


def test_a_request_that_is_refused_or_fails_when_added_fails_alone() -> None:
    async def work(supervisor: Supervisor) -> None:
        other = asyncio.create_task(collect(supervisor, Request("c", tuple(range(1, 40)))))
        with pytest.raises(SettingsError, match="refused"):
            await collect(supervisor, Request("a", (REFUSED,)))
        with pytest.raises(EngineError, match="ZeroDivisionError") as failed:
            await collect(supervisor, Request("b", (FAILING,)))
        assert "secret" not in str(failed.value)
        assert (await other)[-1].finish == "stop"
        assert supervisor.restarts == 0

    run(work)


def test_a_consumer_that_leaves_cancels_its_request() -> None:
    async def work(supervisor: Supervisor) -> None:
        async with aclosing(supervisor.submit(endless("a"), endless("b"))) as outputs:
            await anext(outputs)
            assert supervisor.in_flight == 2
            await until(lambda: supervisor.stats.get("running") == 2)
        assert supervisor.in_flight == 0
        await until(lambda: supervisor.stats.get("running") == 0)

    run(work)


def test_a_killed_engine_ends_what_had_begun_and_repeats_the_rest() -> None:
    async def work(supervisor: Supervisor) -> None:
        async with aclosing(supervisor.submit(endless("begun"))) as begun:
            await anext(begun)
            # Only one sequence runs at a time, so this one waits.
            waiting = asyncio.create_task(collect(supervisor, Request("waiting", (7, 8, 9))))
            call = asyncio.create_task(supervisor.load_adapter("later", "b"))
            await call
            killed = time.monotonic()
            os.kill(supervisor.info["process"], signal.SIGKILL)
            await until(lambda: not supervisor.ready)
            assert time.monotonic() - killed < 5
            late = asyncio.create_task(supervisor.embed([1], None))
            rest = [output async for output in begun]
        assert rest[-1].finish == "lost"
        assert "signal 9" in (rest[-1].error or "")
        assert await late == [1.0, 0.5, -1.0]  # of the next engine
        outputs = await waiting
        assert sum((output.tokens for output in outputs), ()) == (7, 8, 9)
        assert outputs[-1].finish == "stop"
        assert supervisor.ready
        assert supervisor.restarts == 1
        assert supervisor.adapters == ["first", "later"]
        assert await supervisor.embed([1, 2], "later") == [2.0, 0.5, 1.0]

    assert any("signal 9" in line for line in run(work, max_sequences=1))


def test_an_adapter_is_published_while_others_write_and_a_caller_that_leaves_ends_it() -> None:
    async def work(supervisor: Supervisor) -> None:
        async with aclosing(supervisor.submit(endless("a"))) as outputs:
            published = await supervisor.publish_adapter("b", "dir/xx", [((1, 2), 1)])
            assert (published["loss"], published["loss_before"]) == (2.0, None)
            with pytest.raises(GateRefused, match="loss of 3"):
                await supervisor.publish_adapter("b", "dir/xxx", [((1, 2), 1)])
            assert supervisor.adapters == ["first", "b"]
            endless_one = asyncio.create_task(supervisor.publish_adapter("c", "x", [((SILENT, 2), 1)]))
            for _ in range(3):
                await anext(outputs)
            endless_one.cancel()
            with pytest.raises(asyncio.CancelledError):
                await endless_one
            assert await supervisor.rollback_adapter("b") == 1  # jobs that were dropped
            await anext(outputs)
            assert supervisor.adapters == ["first", "b"]

    run(work)


def test_an_engine_that_dies_while_it_publishes_changes_nothing() -> None:
    async def work(supervisor: Supervisor) -> None:
        publishing = asyncio.create_task(supervisor.publish_adapter("b", "x", [((SILENT, 2), 1)]))
        await supervisor.rollback_adapter("first")  # answered after what was asked before
        os.kill(supervisor.info["process"], signal.SIGKILL)
        with pytest.raises(EngineError, match="signal 9"):
            await publishing
        await until(lambda: supervisor.ready)
        assert supervisor.adapters == ["first"]

    run(work)


def test_a_request_that_kills_every_engine_is_given_up_and_others_go_on() -> None:
    async def work(supervisor: Supervisor) -> None:
        outputs = await collect(supervisor, Request("deadly", (DEADLY,)))
        assert [output.finish for output in outputs] == ["error"]
        assert supervisor.restarts >= MOST_ATTEMPTS - 1
        assert (await collect(supervisor, Request("fine", (3,))))[-1].finish == "stop"

    run(work)


def test_an_engine_that_hangs_is_replaced_and_others_go_on() -> None:
    limit = 1.5

    async def work(supervisor: Supervisor) -> None:
        hanging = asyncio.create_task(collect(supervisor, Request("hanging", (HANGING,))))
        started = time.monotonic()
        await until(lambda: not supervisor.ready)
        assert limit <= time.monotonic() - started < limit + 5
        waiting = asyncio.create_task(collect(supervisor, Request("waiting", (7, 8, 9))))
        hanging.cancel()
        assert sum((output.tokens for output in await waiting), ()) == (7, 8, 9)

    assert any("hung" in line for line in run(work, max_sequences=1, hang_seconds=limit))


def test_an_engine_that_is_stopped_from_outside_is_replaced() -> None:
    async def work(supervisor: Supervisor) -> None:
        os.kill(supervisor.info["process"], signal.SIGSTOP)
        await until(lambda: supervisor.restarts == 1 and supervisor.ready)
        assert (await collect(supervisor, Request("fine", (3,))))[-1].finish == "stop"

    run(work, hang_seconds=1.5)


def test_neither_rest_nor_a_long_step_that_gets_on_is_taken_for_a_hang() -> None:
    async def work(supervisor: Supervisor) -> None:
        outputs = await collect(supervisor, Request("long", (LONG, 4)))
        assert sum((output.tokens for output in outputs), ()) == (LONG, 4)
        await asyncio.sleep(3.5)  # more than the limit, with nothing to do
        assert supervisor.ready
        assert supervisor.restarts == 0

    run(work, hang_seconds=2.5)


def test_others_go_on_while_a_grammar_is_compiled_and_a_client_may_leave_meanwhile() -> None:
    slow = Sampling(grammar=Grammar("json"))

    async def work(supervisor: Supervisor) -> None:
        waiting = [
            asyncio.create_task(collect(supervisor, Request(id, (SLOW, 5), sampling=slow))) for id in "ab"
        ]
        await until(lambda: supervisor.stats.get("compiling") == 2)
        assert (await collect(supervisor, Request("fine", (3,))))[-1].finish == "stop"
        assert not any(task.done() for task in waiting)
        waiting[0].cancel()
        assert sum((output.tokens for output in await waiting[1]), ()) == (SLOW, 5)
        await until(lambda: supervisor.stats.get("compiling") == supervisor.stats.get("running") == 0)
        assert supervisor.in_flight == 0

    run(work)


@pytest.mark.parametrize("turns", range(4))
def test_a_server_that_closes_at_the_moment_at_which_its_engine_dies_is_not_kept_from_it(turns: int) -> None:
    async def main() -> None:
        died: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def wait() -> int:
            return await died

        process: Any = SimpleNamespace(wait=wait, kill=lambda: None)
        writer: Any = SimpleNamespace(close=lambda: None)
        ending = asyncio.create_task(_Child(process, asyncio.StreamReader(), writer).end())
        for _ in range(3):
            await asyncio.sleep(0)
        died.set_result(-9)
        for _ in range(turns):
            await asyncio.sleep(0)
        if ending.cancel():  # it hadn't ended yet
            with pytest.raises(asyncio.CancelledError):
                await ending

    asyncio.run(main())


def test_what_waits_when_the_server_closes_ends_with_an_error() -> None:
    async def work(supervisor: Supervisor) -> None:
        silent = asyncio.create_task(collect(supervisor, endless("a", SILENT)))
        await until(lambda: supervisor.stats.get("running") == 1)
        await supervisor.close()
        assert [output.finish for output in await silent] == ["error"]

    run(work)


def test_a_model_that_cannot_be_loaded_is_the_error_of_the_start() -> None:
    async def work(supervisor: Supervisor) -> None:
        raise AssertionError

    with pytest.raises(CheckpointError, match="damaged"):
        run(work, engine="fake_engine:unloadable")
    with pytest.raises(EngineError):
        run(work, engine="fake_engine:missing")


def test_the_engine_leaves_signals_of_the_terminal_to_its_parent_and_ends_with_the_socket() -> None:
    async def work(supervisor: Supervisor) -> None:
        process = supervisor.info["process"]
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process, number)
        assert (await collect(supervisor, Request("a", (3,))))[-1].finish == "stop"
        await supervisor.close()
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)

    run(work)
