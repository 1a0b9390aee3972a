"""Generation that goes on for long takes no more memory than at its beginning."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from compressed import save_compressed
from tailorbird.formats.packed import IntegerCoding
from tailorbird.hardware.memory import resident_bytes
from tailorbird.model.load import load
from tailorbird.run.generate import generate
from tiny import byte_tokenizer, make_model

#: What the allocator may keep for itself.
SLACK = 24 << 20


@pytest.mark.full
def test_memory_stays_where_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_compressed(directory, make_model("llama"), IntegerCoding(4, 32), tokenizer=byte_tokenizer())
    tokenizer = byte_tokenizer()

    def work(loads: int, texts: int) -> int:
        for _ in range(loads):
            model = load(str(directory))
            for seed in range(texts):
                generate(model, tokenizer, "a prompt", max_tokens=100, temperature=1.0, seed=seed, stop=())
        gc.collect()
        return resident_bytes()

    before = work(3, 20)
    assert work(20, 40) < before + SLACK
