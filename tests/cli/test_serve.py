"""`serve` hands on what was said, takes keys from two places, and tells at the end what was served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_flags_reach_the_call(command: Any, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILORBIRD_API_KEY", "third")
    monkeypatch.setenv("TAILORBIRD_ADMIN_KEY", "fifth")
    flags = (
        "--host 0.0.0.0 --port 0 --api-key one --api-key two --adapter a=x/y=z --adapter b=y --memory 4GiB "
        "--adapter-directory d --max-sequences 3 --context 99 --threads 1 --queue 0 --timeout 2.5 "
        "--requests-per-minute 30 --swap-memory 1GiB --swap-disk 2GiB --hang-limit 90 --draft d2 "
        "--adapter-bits 8 --bits 6 --admin-key fourth"
    )
    done = command("serve", "m", *flags.split())
    assert done.status == 0
    assert api.arguments == {
        "model": "m", "host": "0.0.0.0", "port": 0, "keys": ["one", "two", "third"], "memory": "4GiB",
        "adapters": {"a": "x/y=z", "b": "y"}, "adapter_directory": "d", "max_sequences": 3, "context": 99,
        "draft": "d2", "threads": 1, "queue": 0, "timeout": 2.5, "requests_per_minute": 30.0,
        "hang_limit": 90.0, "device": "cpu", "swap_memory": "1GiB", "swap_disk": "2GiB", "adapter_bits": 8,
        "bits": 6, "admin_keys": ["fourth", "fifth"],
    }  # fmt: skip
    for fact in ("http://127.0.0.1:8000", "1234", "1 min"):
        assert fact in done.out


def test_nothing_said_lets_in_only_this_machine(
    command: Any, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TAILORBIRD_API_KEY", "TAILORBIRD_ADMIN_KEY"):
        monkeypatch.delenv(variable, raising=False)
    command("serve", "m")
    assert api.arguments["host"] == "127.0.0.1"
    assert api.arguments["keys"] == api.arguments["admin_keys"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["--adapter", "a"], ["--adapter", "=b"], ["--adapter", "a="],
        ["--adapter", "a=b", "--adapter", "a=c"],
        ["--port", "65536"], ["--port", "-1"], ["--queue", "-1"], ["--timeout", "0"],
        ["--max-sequences", "0"], ["--hang-limit", "1"],
    ],
)  # fmt: skip
def test_wrong_flags_exit_2_before_any_work(command: Any, api: Any, wrong: list[str]) -> None:
    done = command("serve", "m", *wrong)
    assert (done.status, api.calls) == (2, [])


def test_a_size_that_is_none_is_refused_before_anything_is_started() -> None:
    from tailorbird import api
    from tailorbird.errors import SettingsError

    with pytest.raises(SettingsError, match="4G"):
        api.serve("demo", memory="4G", port=0)


def test_adapters_have_eight_bits_or_what_they_were_stored_with(tmp_path: Path) -> None:
    from tailorbird import api
    from tailorbird.errors import SettingsError

    for bits in (4, 0, 16):
        with pytest.raises(SettingsError, match=f"adapters of {bits} bits .* 8, or none"):
            api.serve("demo", adapter_bits=bits, port=0)
        with pytest.raises(SettingsError, match=f"adapters of {bits} bits .* 8, or none"):
            api.batch("demo", tmp_path / "in", tmp_path / "out", adapter_bits=bits)


def test_no_adapter_has_the_models_name(tmp_path: Path) -> None:
    from tailorbird import api
    from tailorbird.errors import SettingsError

    adapters = {"demo": str(tmp_path)}
    with pytest.raises(SettingsError, match="an adapter called demo"):
        api.serve("demo", adapters=adapters, port=0)
    with pytest.raises(SettingsError, match="an adapter called demo"):
        api.batch("demo", tmp_path / "in", tmp_path / "out", adapters=adapters)
