"""Adapters that came while a server ran are served again by its next engine, with their versions."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from compressed import save_compressed
from peft_adapters import save, wrapped
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Request, Sampling
from tailorbird.serve.supervisor import Supervisor
from tiny import byte_tokenizer, make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters `allowed/0` to `allowed/2`, and one elsewhere."""
    found = tmp_path_factory.mktemp("restart")
    dense = save_compressed(found / "m", make_model("qwen2"), IntegerCoding(4, 32))
    byte_tokenizer().save_pretrained(found / "m")
    for seed, place in enumerate(("allowed/0", "allowed/1", "allowed/2", "elsewhere")):
        made = wrapped(dense, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), seed)
        save(made, found / place)
    return found


async def written(supervisor: Supervisor, adapter: str | None, id: str) -> list[int]:
    request = Request(id, (5, 6, 7), 12, Sampling(temperature=0, ignore_end=True), adapter=adapter)
    return [token async for output in supervisor.submit(request) for token in output.tokens]


def test_a_killed_engine_loses_no_adapter(folder: Path) -> None:
    async def main() -> None:
        allowed = folder / "allowed"
        options = EngineOptions(
            str(folder / "m"),
            {"first": str(folder / "elsewhere"), "gone": str(allowed / "0")},
            adapter_directory=str(allowed),
            threads=1,
        )
        supervisor = Supervisor(options)
        await supervisor.start()
        try:
            async with asyncio.timeout(60):
                await supervisor.load_adapter("x", str(allowed / "0"))
                old = await written(supervisor, "x", "1")
                await supervisor.load_adapter("x", str(allowed / "1"))
                await supervisor.unload_adapter("gone")
                new = await written(supervisor, "x", "2")
                first = await written(supervisor, "first", "3")
                assert len({tuple(tokens) for tokens in (old, new, first)}) == 3
                waits = asyncio.create_task(written(supervisor, "x", "4"))
                assert supervisor._child is not None
                os.kill(supervisor._child.process.pid, signal.SIGKILL)
                assert await waits == new
                assert supervisor.restarts == 1
                assert supervisor.adapters == ["first", "x"]
                assert await written(supervisor, "first", "5") == first
                await supervisor.rollback_adapter("x")
                assert await written(supervisor, "x", "6") == old
                with pytest.raises(SettingsError, match="a path below"):
                    await supervisor.load_adapter("y", str(folder / "elsewhere"))
                assert supervisor.adapters == ["first", "x"]
        finally:
            await supervisor.close()

    asyncio.run(main())


def test_without_a_directory_none_may_come(folder: Path) -> None:
    options = EngineOptions(str(folder / "m"), {"first": str(folder / "elsewhere")})
    made = Engine(options, log=lambda _: None)
    assert made.adapters() == ["first"]
    with pytest.raises(SettingsError, match="--adapter-directory"):
        made.load_adapter("x", str(folder / "allowed" / "0"))


def test_what_was_trusted_stays_so_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    options = EngineOptions(
        str(folder / "m"), {"first": str(folder / "elsewhere")}, adapter_directory=str(folder / "allowed"),
        adapter_state=str(tmp_path / "state.json"),
    )  # fmt: skip
    Engine(options, log=lambda _: None).load_adapter("x", str(folder / "allowed" / "0"))
    other = EngineOptions(
        str(folder / "m"), adapter_directory=str(tmp_path), adapter_state=str(tmp_path / "state.json")
    )
    again = Engine(other, log=lambda _: None)
    assert again.adapters() == ["first", "x"]
    again.embed([1, 2], "first")
    with pytest.raises(SettingsError, match="a path below"):
        again.embed([1, 2], "x")
