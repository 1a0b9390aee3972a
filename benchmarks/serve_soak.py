"""Hours of bad luck in ten minutes: a server on the demo model under clients that do everything wrong.

`tailorbird serve` runs in a process of its own. Clients send requests of at most 8 tokens, and by chance hang
up in the middle of a stream, send what is no JSON, prompts beyond the context, unknown models, and load,
replace and unload adapters; now and then the engine's process is killed with SIGKILL. It ends after 100,000
requests or ten minutes. Reported: requests, what they were answered with, restarts and how long each took,
and the growth of anonymous memory and swap of both processes after the first minute.

    python benchmarks/serve_soak.py [--minutes 10] [--clients 24]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from machine import write_result
from serve_adapters import write_adapter

MOST_REQUESTS = 100_000
#: Seconds until memory is looked at first, between two looks, and between two kills.
WARM_UP, LOOK, KILL = 60.0, 5.0, 45.0
PROMPTS = (
    "def read_lines(path):",
    "import os\n",
    "class A:\n    def",
    "for i in range(",
    "return [x for x in",
)
MOST_TOKENS = 8
#: Of the numbers in adapters: large enough for each of them to say something else.
DEVIATION = 0.3
#: What clients do: how often of a hundred times, and the statuses that may come of it.
KINDS = {
    "plain": (45, {200}),
    "sampled": (15, {200}),
    "adapter": (15, {200, 404}),  # 404 while it isn't loaded
    "whole stream": (10, {200}),
    "hang up": (5, {200}),
    "load": (1, {200}),
    "unload": (1, {200, 404}),
    "no JSON": (2, {400}),
    "beyond the context": (2, {400}),
    "unknown model": (2, {404}),
    "negative limit": (2, {400}),
}


def memory_of(process: int) -> int:
    """Anonymous memory and swap of a process, bytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    return 1024 * (int(fields["Anonymous"]) + int(fields["Swap"]))


def child_of(process: int) -> int | None:
    """The engine's process."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(found[0]) if found else None


class Soak:
    """Clients of one server, and what happened to them."""

    def __init__(self, url: str, server: int, adapters: list[Path], minutes: float) -> None:
        self.url, self.server, self.adapters = url, server, adapters
        self.until = time.monotonic() + 60 * minutes
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self.answers: dict[str, list[str]] = {}
        self.restarts: list[float] = []
        self.memory: list[tuple[float, int]] = []
        self.began = time.monotonic()

    @property
    def over(self) -> bool:
        return self.sent >= MOST_REQUESTS or time.monotonic() >= self.until

    async def client(self, number: int) -> None:
        """Requests one after the other, by chance of every kind."""
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            while not self.over:
                self.sent += 1
                try:
                    await self.one(http, rng)
                except httpx.HTTPError as error:
                    self.unexpected[f"client: {type(error).__name__}"] += 1

    async def one(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        """One request of some kind; what came of it is counted, and so is what shouldn't have."""
        kind = rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
        body: dict[str, Any] = {
            "model": "demo", "prompt": rng.choice(PROMPTS), "max_tokens": rng.randrange(1, MOST_TOKENS + 1),
            "temperature": 0,
        }  # fmt: skip
        if kind in ("whole stream", "hang up"):
            await self.stream(http, body, leaves=kind == "hang up")
            return
        match kind:
            case "no JSON":
                answer = await http.post("/v1/completions", content=b"{nonsense \xff")
            case "load" | "unload":
                name = {"lora_name": f"a{rng.randrange(3)}", "lora_path": str(rng.choice(self.adapters))}
                if kind == "load":
                    name["load_inplace"] = True
                answer = await http.post(f"/v1/{kind}_lora_adapter", json=name)
            case "beyond the context":
                answer = await http.post("/v1/completions", json=body | {"prompt": "x = 1\n" * 2000})
            case "unknown model":
                answer = await http.post("/v1/completions", json=body | {"model": "nobody"})
            case "negative limit":
                answer = await http.post("/v1/completions", json=body | {"max_tokens": -1})
            case "adapter":
                answer = await http.post("/v1/completions", json=body | {"model": f"a{rng.randrange(3)}"})
                if answer.status_code == 200:
                    self.compare_adapter(body["prompt"], answer.json()["choices"][0]["text"])
            case "sampled":
                answer = await http.post("/v1/completions", json=body | {"temperature": 0.8})
            case _:
                answer = await http.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    self.compare(body["prompt"], answer.json()["choices"][0]["text"])
        self.outcomes[f"{kind}: {answer.status_code}"] += 1
        if answer.status_code not in KINDS[kind][1]:
            self.unexpected[f"{kind}: {answer.status_code} {answer.text[:200]}"] += 1

    async def stream(self, http: httpx.AsyncClient, body: dict[str, Any], leaves: bool) -> None:
        """Read a stream to its end, which is `[DONE]` or an error event, or leave after its first event."""
        text, last = "", ""
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if leaves:
                    self.outcomes["hung up"] += 1
                    return
                if line.startswith("data: "):
                    last = line.removeprefix("data: ")
                    if last.startswith('{"id"') and (choices := json.loads(last)["choices"]):
                        text += choices[0]["text"]
        if last == "[DONE]":
            self.outcomes["whole stream: done"] += 1
            self.compare(body["prompt"], text)
        elif '"error"' in last:
            self.outcomes["whole stream: error event"] += 1
        else:
            self.unexpected[f"a stream that ends with {last[:200]!r}"] += 1

    def compare(self, prompt: str, text: str) -> None:
        """The model without adapter says the same always, however far."""
        if not self.answers[prompt][0].startswith(text):
            self.unexpected[f"{text!r} after {prompt!r}, where it was {self.answers[prompt][0]!r}"] += 1

    def compare_adapter(self, prompt: str, text: str) -> None:
        """An adapter says what one of the directories says that its name may stand for."""
        if not any(known.startswith(text) for known in self.answers[prompt][1:]):
            self.unexpected[f"{text!r} of an adapter after {prompt!r}"] += 1

    async def learn(self) -> None:
        """What the model says, and then what each adapter says, to every prompt."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http:
            names = ["demo"]
            for number, path in enumerate(self.adapters):
                names.append(f"known{number}")
                loaded = {"lora_name": names[-1], "lora_path": str(path)}
                (await http.post("/v1/load_lora_adapter", json=loaded)).raise_for_status()
            for prompt in PROMPTS:
                body = {"prompt": prompt, "max_tokens": MOST_TOKENS, "temperature": 0}
                answers = [await http.post("/v1/completions", json=body | {"model": name}) for name in names]
                self.answers[prompt] = [answer.json()["choices"][0]["text"] for answer in answers]

    async def killer(self) -> None:
        """Kill the engine now and then, and see how long it takes until it is ready again."""
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as http:
            while not self.over:
                await asyncio.sleep(min(KILL, max(0.0, self.until - time.monotonic())))
                if self.over:
                    return
                engine = child_of(self.server)
                if engine is None:
                    continue
                os.kill(engine, signal.SIGKILL)
                began = time.monotonic()
                await asyncio.sleep(0.2)
                while (await http.get("/health/ready")).status_code != 200:
                    await asyncio.sleep(0.05)
                self.restarts.append(time.monotonic() - began)

    async def watcher(self) -> None:
        """Memory of both processes."""
        while not self.over:
            await asyncio.sleep(LOOK)
            try:
                engine = child_of(self.server)
                if engine is not None:
                    total = memory_of(self.server) + memory_of(engine)
                    self.memory.append((time.monotonic() - self.began, total))
            except (OSError, KeyError):
                continue  # the engine has just been killed

    async def run(self, clients: int) -> None:
        await self.learn()
        await asyncio.gather(self.killer(), self.watcher(), *(self.client(n) for n in range(clients)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", default="demo", help="served under this name")
    parser.add_argument("--name", default="serve_soak", help="name of the result file")
    arguments = parser.parse_args()
    console = Console()
    from tailorbird.model.location import locate

    with tempfile.TemporaryDirectory(prefix="serve-soak-") as name:
        folder = Path(name)
        source = locate(arguments.model)
        targets = ("self_attn.q_proj", "self_attn.v_proj")
        adapters = [write_adapter(folder / str(n), Path(source), 4, targets, n, DEVIATION) for n in range(4)]
        log = (folder / "log").open("w+")
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("tailorbird")), "serve", arguments.model, "--port", "0",
             "--adapter-directory", str(folder)],
            stderr=log,
        )  # fmt: skip
        url = None
        while url is None:
            time.sleep(0.2)
            assert server.poll() is None, (folder / "log").read_text()
            ready = [json.loads(one) for one in (folder / "log").read_text().splitlines() if '"ready"' in one]
            url = ready[0]["url"] if ready else None
        soak = Soak(url, server.pid, adapters, arguments.minutes)
        asyncio.run(soak.run(arguments.clients))
        seconds = time.monotonic() - soak.began
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=60)
    warm = [total for at, total in soak.memory if at >= min(WARM_UP, 20 * arguments.minutes)]
    third = max(1, len(warm) // 3)
    growth = sum(warm[-third:]) / sum(warm[:third]) - 1
    told = sum(len(set(answers)) for answers in soak.answers.values()) / len(soak.answers)
    console.print(f"{soak.sent} requests in {seconds:.0f} s: {dict(sorted(soak.outcomes.items()))}")
    console.print(f"{soak.unexpected.total()} went wrong: {dict(soak.unexpected.most_common(10))}")
    console.print(f"model and adapters gave {told:.1f} different answers to a prompt")
    console.print(
        f"engine killed {len(soak.restarts)} times, ready after {max(soak.restarts, default=0):.1f} s"
    )
    console.print(f"memory grew {growth:+.2%} after warming up; exit status {status}")
    write_result(
        arguments.name,
        {
            "requests": soak.sent, "seconds": seconds, "outcomes": dict(soak.outcomes),
            "unexpected": dict(soak.unexpected), "different_answers_to_a_prompt": told,
            "ready_again_seconds": soak.restarts, "memory": soak.memory, "growth": growth,
            "exit_status": status,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
