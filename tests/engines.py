"""Engines of small models that are watched, and what a text is without an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compressed import save_compressed
from tailorbird.formats.packed import Coding, IntegerCoding
from tailorbird.model.layout import BlockLayout, ModelLayout
from tailorbird.run.fused import FusedModel
from tailorbird.run.generate import FusedDecoding, ModuleDecoding
from tailorbird.serve.engine import Engine
from tailorbird.serve.guess.tree import Guess
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Output, Request, Sampling
from tiny import BASE, DECODER, byte_tokenizer, make_model

FOUR_BITS = IntegerCoding(4, 32, symmetric=True)
WINDOWED = {**DECODER, "head_dim": 16, "sliding_window": 16}
#: architectures without compiled blocks
OTHERS: dict[str, dict[str, Any]] = {
    "cohere2": WINDOWED,
    "gpt_bigcode": {**BASE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_oss": {**WINDOWED, "num_local_experts": 4},
    "granite": DECODER,
    "mixtral": {**DECODER, "num_local_experts": 4},
    "phi": DECODER,
}


def served(
    directory: Path,
    architecture: str = "llama",
    coding: Coding = FOUR_BITS,
    rounds: bool = False,
    **config: Any,
) -> str:
    """A compressed model with a tokenizer; with `rounds` its linears round their inputs to bytes."""

    def layout(stated: ModelLayout) -> ModelLayout:
        modules = {name: replace(module, rounds=rounds) for name, module in stated.modules.items()}
        return replace(stated, modules=modules)

    save_compressed(directory, make_model(architecture, **config), coding, layout=layout)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def pruned(directory: Path) -> str:
    """A compressed model whose second block has half the heads of its first, with a tokenizer."""
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Linear(64, 32, bias=False)
    attention.k_proj, attention.v_proj = (nn.Linear(64, 16, bias=False) for _ in range(2))
    attention.o_proj = nn.Linear(32, 64, bias=False)
    blocks = {1: BlockLayout(num_attention_heads=2, num_key_value_heads=1)}
    save_compressed(directory, model.eval(), FOUR_BITS, blocks=blocks, tokenizer=byte_tokenizer())
    return str(directory)


def saved(directory: Path, architecture: str, **changes: Any) -> str:
    """A random model of one of `OTHERS`, with a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**OTHERS[architecture], **changes})
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


#: enough for what is tested, and little beside what engines that wait to be collected still hold
PAGE_BYTES = 256 << 20


def engine(path: str, **options: Any) -> Engine:
    options = {"memory_bytes": PAGE_BYTES} | options
    return Engine(EngineOptions(path, **options), log=lambda _: None)


class Watched:
    """An engine, all that it said, and the logits after each token of each text, guesses that branch too."""

    def __init__(self, made: Engine) -> None:
        self.engine = made
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finish: dict[tuple[str, int], str] = {}
        self.logits: dict[tuple[str, int, int], Tensor] = {}
        self.outputs: list[Output] = []
        step = made.runner.step

        def watched(pieces: Any) -> list[Tensor]:
            found = step(pieces)
            for piece, rows in zip((p for p in pieces if p.chooses), found, strict=True):
                for node, row in enumerate(rows, -1):
                    text = piece.sequence.tokens + _path(piece.guess, node)
                    self.logits[piece.sequence.request.id, len(text), hash(tuple(text))] = row.clone()
            return found

        made.runner.step = watched  # type: ignore[method-assign]

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs.append(output)
            self.tokens.setdefault((output.id, output.index), []).extend(output.tokens)
            if output.finish is not None:
                assert (output.id, output.index) not in self.finish
                self.finish[output.id, output.index] = output.finish

    def run(self) -> None:
        for _ in range(20_000):
            if not self.engine.busy:
                return
            self.step()
        raise AssertionError("it doesn't end")


def _path(guess: Guess, node: int) -> list[int]:
    """Tokens from a sequence's last one, which is -1, to a guess and with it."""
    return [] if node < 0 else [*_path(guess, guess.parent(node)), guess.tokens[node]]


def alone(made: Engine, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens of one text, and the logits from which each was taken."""
    model = made.model
    decoding = FusedDecoding(FusedModel(model)) if made.runner.path == "fused" else ModuleDecoding(model)
    fed, tokens, rows = torch.tensor([prompt]), [], []
    for _ in range(count):
        rows.append(decoding.read(fed)[0])
        tokens.append(int(rows[-1].argmax()))
        fed = torch.tensor([tokens[-1:]])
    return tokens, rows


def greedy(id: str, prompt: tuple[int, ...], count: int, **more: Any) -> Request:
    return Request(id, prompt, count, Sampling(temperature=0, ignore_end=True), **more)
