"""Tokens per second with each kind of guesses beside none, in one engine after the other, in turns.

Prompts are real text: documents of `--text`, each one's beginning. 1, 4 and 16 sequences decode at once,
greedily and at temperature 1, in engines that guess nothing, guess from the text itself, and guess with each
of `--draft` beside that. A run writes texts as long as the context allows, one group of them after the other,
until each sequence has written 1,024 tokens. Every round all engines get the same requests, in alternating
order, and must write the same tokens. What counts is the median over the rounds of the ratio to the engine
that guesses nothing; a second one that guesses nothing shows what chance does. `while all` is the time in
which all sequences of a group are written; `to the end` includes that in which luckier ones have ended.
Checked and right guesses of each guesser stand beside them. Goal: never below 0.95.

    python benchmarks/serve_guess.py [--model demo] [--text FILE] [--draft self:skip HEADS DIR] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.calibrate.documents import read_documents
from tailorbird.model.load import load_tokenizer
from tailorbird.model.location import demo_text
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Request, Sampling

SEQUENCES = (1, 4, 16)
TEMPERATURES = (0.0, 1.0)
PROMPT, NEW = 64, 1024
#: No kind of guesses may be slower than this share of none.
GOAL = 0.95

Prompts = list[tuple[int, ...]]


def prompts_of(model: str, text: Path, count: int) -> Prompts:
    """Beginnings of documents, or of their further pages where these are few."""
    tokenizer = load_tokenizer(model)
    encoded = [tokenizer(document.text)["input_ids"] for document in read_documents(text, tokenizer)]
    found: Prompts = []
    for page in range(10_000):
        pieces = [tuple(ids[page * PROMPT : (page + 1) * PROMPT]) for ids in encoded]
        found += [piece for piece in pieces if len(piece) == PROMPT]
        if len(found) >= count:
            return found[:count]
    raise SystemExit(f"{text} has no {count} pieces of {PROMPT} tokens")


class Served:
    """One engine, and what it wrote."""

    def __init__(self, model: str, draft: str | None, speculative: bool, most: int) -> None:
        options = EngineOptions(model, max_sequences=most, speculative=speculative, draft=draft, threads=None)
        self.engine, self.requests = Engine(options, log=lambda _: None), 0

    def run(self, groups: Sequence[Prompts], temperature: float, new: int) -> dict[str, Any]:
        """Texts of one group after the other, and tokens per second from when all its prompts were read."""
        before, texts = self.engine.stats(), []
        written, seconds = [0, 0], [0.0, 0.0]
        for group in groups:
            found, *parts = self._group(group, temperature, new)
            texts += found
            for part, (tokens, taken) in enumerate(parts):
                written[part] += tokens
                seconds[part] += taken
        after = self.engine.stats()
        rose = {name: after[name] - before[name] for name in after if "/" in name or name == "steps"}
        return {
            "texts": texts, "tokens_per_s": written[0] / seconds[0],
            "tokens_per_s_to_the_end": written[1] / seconds[1], **rose,
        }  # fmt: skip

    def _group(
        self, prompts: Prompts, temperature: float, new: int
    ) -> tuple[list[list[int]], tuple[int, float], tuple[int, float]]:
        """Texts; tokens and seconds while all are written, and to the end."""
        order = {}
        for number, prompt in enumerate(prompts):
            self.requests += 1
            order[str(self.requests)] = number
            sampling = Sampling(temperature=temperature, seed=number, ignore_end=True)
            self.engine.add(Request(str(self.requests), prompt, new, sampling, tenant=str(self.requests)))
        texts: list[list[int]] = [[] for _ in prompts]
        began, written = 0.0, 0
        together: tuple[int, float] | None = None
        while self.engine.busy:
            for output in self.engine.step():
                texts[order[output.id]] += output.tokens
            now, tokens = time.perf_counter(), sum(map(len, texts))
            if not began and all(texts):
                began, written = now, tokens
            if together is None and any(len(text) == new for text in texts):
                together = tokens - written, now - began
        assert together is not None
        return texts, together, (tokens - written, now - began)


def measure(
    engines: dict[str, Served], prompts: Prompts, sizes: Sequence[int], rounds: int, new: int, groups: int
) -> list[dict[str, Any]]:
    """Every engine at every number of sequences and temperature; the first is what others are set beside."""
    rows = []
    for temperature in TEMPERATURES:
        for sequences in sizes:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for number in range(rounds + 1):
                starts = [(number * groups + group) * sequences for group in range(groups)]
                load = [
                    [prompts[(start + one) % len(prompts)] for one in range(sequences)] for start in starts
                ]
                texts = None
                for name in list(engines)[:: 1 if number % 2 else -1]:
                    found = engines[name].run(load, temperature, new)
                    texts = texts or found["texts"]
                    if found.pop("texts") != texts:
                        raise SystemExit(f"guesses of {name} changed what was written")
                    if number:  # the first round warms up, and lets the engine learn what pays
                        runs[name].append(found)
            first = next(iter(runs.values()))
            for name, found in runs.items():
                median = {key: statistics.median(run[key] for run in found) for key in found[0]}
                ratios = {
                    ratio: [run[rate] / none[rate] for run, none in zip(found, first, strict=True)]
                    for ratio, rate in (("ratios", "tokens_per_s"), ("ratios_end", "tokens_per_s_to_the_end"))
                }
                rows.append(
                    {
                        "guesses": name, "temperature": temperature, "sequences": sequences, **median,
                        "ratio": statistics.median(ratios["ratios"]),
                        "ratio_to_the_end": statistics.median(ratios["ratios_end"]), **ratios,
                    }
                )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=demo_text("held_out"), help="where prompts come from")
    parser.add_argument("--draft", nargs="*", default=["self:skip"], help="as `serve --draft`")
    parser.add_argument("--sequences", type=int, nargs="+", default=list(SEQUENCES), help="at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--name", default="serve_guess", help="name of the result file; empty writes none")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy or arguments.quick)
    console, rounds, model, most = Console(), arguments.rounds, arguments.model, max(arguments.sequences)
    engines = {name: Served(model, None, False, most) for name in ("none", "none again")}
    engines["text"] = Served(model, None, True, most)
    engines |= {f"text, {draft}": Served(model, draft, True, most) for draft in arguments.draft}
    new = min(NEW, engines["none"].engine.context - PROMPT)
    groups = -(-NEW // new)
    if arguments.quick:
        rounds, new, groups = 1, 12, 1
    prompts = prompts_of(model, arguments.text, 4 * most)
    rows = measure(engines, prompts, arguments.sequences, rounds, new, groups)
    table = Table(
        "temperature", "sequences", "guesses", "tokens/s", "of none, while all", "to the end",
        "lowest, highest", "right / checked",
    )  # fmt: skip
    for row in rows:
        counts = [
            f"{name.partition('/')[2]} {row[name.replace('drafted', 'accepted')]:.0f} / {row[name]:.0f}"
            for name in row
            if name.startswith("drafted_tokens/") and row[name]
        ]
        table.add_row(
            str(row["temperature"]), str(row["sequences"]), row["guesses"], f"{row['tokens_per_s']:.0f}",
            f"{row['ratio']:.2f}" + (" !" if row["ratio"] < GOAL else ""), f"{row['ratio_to_the_end']:.2f}",
            f"{min(row['ratios']):.2f}, {max(row['ratios']):.2f}", ", ".join(counts),
        )  # fmt: skip
    console.print(table)
    if arguments.name and not arguments.quick:
        facts = {"model": model, "prompt_tokens": PROMPT, "new_tokens": new, "groups": groups}
        written = facts | {"rounds": rounds, "goal": GOAL, "rows": rows}
        write_result(arguments.name, {"others_cores": busy, **written})


if __name__ == "__main__":
    main()
