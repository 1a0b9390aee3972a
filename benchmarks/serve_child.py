"""One serving engine with one model in a process of its own, which runs the loads that it is told.

Each engine has an environment of its own, so this file imports nothing of the project but in the branches
that measure the project. A line of JSON in, a list of requests ``[arrival in seconds, prompt, new tokens]``
and the most that may run at once; a line out: ``times``, for each request the seconds at which its tokens
were there, from the beginning of the load on, and ``cached_tokens``, how many tokens of its prompts were
found in a cache. Tokens are the likeliest ones, and no text ends early.

`generate` is `tailorbird generate`'s own loop without text, one request after the other; `http` is
`tailorbird serve`, of whose streams, one after the other, only the first and the last moment are told.

    python serve_child.py ENGINE MODEL SEQUENCES
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

THREADS = 2
#: Tokens that a step reads at most, where an engine lets one choose.
STEP = 512
#: Keys and values of so many tokens have room: of the long mix, all that run at once.
ROOM = 36_864


class Server:
    """An engine that takes requests while it runs."""

    def add(self, number: int, prompt: list[int], new: int) -> None:
        """Begin a request."""
        raise NotImplementedError

    def step(self) -> list[tuple[int, int]]:
        """Go on for a moment; numbers of requests that got tokens, and how many."""
        raise NotImplementedError

    def cached_tokens(self) -> int:
        """Of all prompts so far, tokens that were found in a cache; 0 for good where the cache is off."""
        return 0

    def end(self) -> None:
        """Let go of what runs beside, if anything does."""


class Tailorbird(Server):
    def __init__(self, model: str, sequences: int) -> None:
        from tailorbird.serve.engine import Engine, EngineOptions
        from tailorbird.serve.request import Request, Sampling

        # Random weights repeat themselves, so that guesses from the text would be right too often.
        options = EngineOptions(
            model, max_sequences=sequences, step_tokens=STEP, threads=THREADS, speculative=False
        )
        self.engine = Engine(options)
        self.request, self.sampling = Request, Sampling(temperature=0, ignore_end=True)

    def add(self, number: int, prompt: list[int], new: int) -> None:
        self.engine.add(self.request(str(number), tuple(prompt), new, self.sampling))

    def step(self) -> list[tuple[int, int]]:
        return [(int(output.id), len(output.tokens)) for output in self.engine.step()]

    def cached_tokens(self) -> int:
        return int(self.engine.stats()["cached_tokens"])


class Generate(Server):
    """The loop of `tailorbird.run.generate.generate` without its text."""

    def __init__(self, model: str, sequences: int) -> None:
        import torch

        from tailorbird.model.load import load
        from tailorbird.run.generate import decode, likeliest

        torch.set_num_threads(THREADS)
        self.model, self.decode, self.likeliest, self.tensor = load(model), decode, likeliest, torch.tensor
        self.waiting: list[tuple[int, list[int], int]] = []
        self.decoding: Any = None

    def add(self, number: int, prompt: list[int], new: int) -> None:
        self.waiting.append((number, prompt, new))

    def step(self) -> list[tuple[int, int]]:
        number, prompt, new = self.waiting[0]
        if self.decoding is None:
            self.decoding, self.left = self.decode(self.model, len(prompt) + new), new
            self.fed = self.tensor([prompt])
        token = int(self.likeliest(self.decoding.read(self.fed)))
        self.fed, self.left = self.tensor([[token]]), self.left - 1
        if self.left == 0:
            del self.waiting[0]
            self.decoding = None
        return [(number, 1)]


class Http(Server):
    """A server in processes of its own, which guesses nothing."""

    def __init__(self, model: str, sequences: int) -> None:
        import subprocess

        import httpx

        options = f"{model!r}, max_sequences={sequences}, step_tokens={STEP}, threads={THREADS}"
        code = (
            "from tailorbird.serve.interface import EngineOptions\n"
            "from tailorbird.serve.server import serve\n"
            f"serve(EngineOptions({options}, speculative=False), port=0)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        said = (json.loads(line) for line in self.process.stderr)
        ready = next((one for one in said if one["event"] == "ready"), None)
        if ready is None:
            raise SystemExit(f"the server ended with status {self.process.wait()}")
        self.model, self.client = model, httpx.Client(base_url=ready["url"], timeout=600)
        self.waiting: list[tuple[int, list[int], int]] = []
        self.events: Iterator[dict[str, Any]] | None = None
        self.cached = 0

    def add(self, number: int, prompt: list[int], new: int) -> None:
        self.waiting.append((number, prompt, new))

    def stream(self, prompt: list[int], new: int) -> Iterator[dict[str, Any]]:
        """What the server sends."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    def step(self) -> list[tuple[int, int]]:
        number, prompt, new = self.waiting[0]
        if self.events is None:
            self.events = self.stream(prompt, new)
            next(self.events)
            return [(number, 1)]
        usage = [event["usage"] for event in self.events if event.get("usage")][-1]
        if usage["completion_tokens"] != new:
            raise SystemExit(f"the server wrote {usage['completion_tokens']} tokens instead of {new}")
        self.cached += usage["prompt_tokens_details"]["cached_tokens"]
        del self.waiting[0]
        self.events = None
        return [(number, new - 1)]

    def cached_tokens(self) -> int:
        return self.cached

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate()


class Transformers(Server):
    def __init__(self, model: str, sequences: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        torch.set_num_threads(THREADS)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        settings = ContinuousBatchingConfig(
            page_size=32, num_blocks=ROOM // 32, max_batch_tokens=STEP, max_requests_per_batch=sequences,
            allow_block_sharing=False,
        )  # fmt: skip
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=64)
        self.manager = self.model.init_continuous_batching(generation, settings)
        self.manager.start()
        self.got: dict[int, int] = {}

    def add(self, number: int, prompt: list[int], new: int) -> None:
        self.manager.add_request(prompt, str(number), max_new_tokens=new, streaming=True)

    def step(self) -> list[tuple[int, int]]:
        found = []
        result = self.manager.get_result(timeout=0.005)
        while result is not None:
            number, have = int(result.request_id), len(result.generated_tokens)
            found.append((number, have - self.got.get(number, 0)))
            self.got[number] = have
            result = self.manager.get_result(timeout=0)
        if not self.manager.is_running():
            raise SystemExit("the manager stopped")
        return found

    def end(self) -> None:
        self.manager.stop(block=True)


class LlamaCpp(Server):
    """Its batch interface: a step takes a token of each text that is being written, and prompts beside."""

    def __init__(self, model: str, sequences: int) -> None:
        import ctypes

        import llama_cpp as api
        import numpy as np

        self.api, self.numpy = api, np
        self.quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p())
        loaded = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = ROOM, 2048, STEP
        settings.n_seq_max, settings.kv_unified = sequences, True
        settings.n_threads = settings.n_threads_batch = THREADS
        self.context = api.llama_init_from_model(loaded, settings)
        self.batch = api.llama_batch_init(2048, 0, 1)
        self.free = list(range(sequences))
        self.texts: dict[int, dict[str, Any]] = {}

    def add(self, number: int, prompt: list[int], new: int) -> None:
        self.texts[number] = {"slot": self.free.pop(), "feed": prompt, "at": 0, "left": new}

    def step(self) -> list[tuple[int, int]]:
        batch, count, writing = self.batch, 0, []
        for number, text in sorted(self.texts.items(), key=lambda item: len(item[1]["feed"])):
            part = text["feed"][: STEP - count]
            for index, token in enumerate(part):
                batch.token[count], batch.pos[count] = token, text["at"] + index
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, text["slot"]
                batch.logits[count] = index == len(text["feed"]) - 1
                count += 1
            text["at"] += len(part)
            text["feed"] = text["feed"][len(part) :]
            if part and not text["feed"]:
                writing.append((number, count - 1))
        batch.n_tokens = count
        if self.api.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        for number, row in writing:
            text = self.texts[number]
            logits = self.api.llama_get_logits_ith(self.context, row)
            token = int(self.numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())
            text["feed"], text["left"] = [token], text["left"] - 1
            if text["left"] == 0:
                self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), text["slot"], -1, -1)
                self.free.append(text["slot"])
                del self.texts[number]
        return [(number, 1) for number, _ in writing]


class OpenVino(Server):
    def __init__(self, model: str, sequences: int) -> None:
        import numpy as np
        import openvino
        import openvino_genai as genai

        self.genai, self.tensor, self.numpy = genai, openvino.Tensor, np
        settings = genai.SchedulerConfig()
        settings.max_num_seqs, settings.max_num_batched_tokens = sequences, STEP
        settings.cache_size, settings.dynamic_split_fuse = 2, True
        settings.enable_prefix_caching = False
        self.pipeline = genai.ContinuousBatchingPipeline(
            model, settings, "CPU", {"INFERENCE_NUM_THREADS": THREADS}
        )
        self.handles: dict[int, Any] = {}

    def add(self, number: int, prompt: list[int], new: int) -> None:
        settings = self.genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos = new, True
        ids = self.tensor(self.numpy.array([prompt], self.numpy.int64))
        self.handles[number] = self.pipeline.add_request(number, ids, settings)

    def step(self) -> list[tuple[int, int]]:
        self.pipeline.step()
        found = []
        for number, handle in list(self.handles.items()):
            while handle.can_read():
                found.append((number, sum(len(part.generated_ids) for part in handle.read().values())))
            if handle.get_status() != self.genai.GenerationStatus.RUNNING:
                del self.handles[number]
        return found


ENGINES = {
    "tailorbird": Tailorbird, "generate": Generate, "http": Http, "transformers": Transformers,
    "llama.cpp": LlamaCpp, "openvino": OpenVino,
}  # fmt: skip


def run(server: Server, requests: list[tuple[float, list[int], int]], most: int) -> list[list[float]]:
    """Times of every request's tokens."""
    waiting = list(enumerate(requests))[::-1]
    times: list[list[float]] = [[] for _ in requests]
    running: dict[int, int] = {}
    base = run.requests_so_far  # type: ignore[attr-defined]
    run.requests_so_far += len(requests)  # type: ignore[attr-defined]
    began = time.perf_counter()
    while waiting or running:
        now = time.perf_counter() - began
        while waiting and len(running) < most and waiting[-1][1][0] <= now:
            number, (_, prompt, new) = waiting.pop()
            running[number] = new
            server.add(base + number, prompt, new)
        if not running:
            time.sleep(max(0.0, waiting[-1][1][0] - now))
            continue
        for number, count in server.step():
            now = time.perf_counter() - began
            times[number - base] += [now] * count
            running[number - base] -= count
            if running[number - base] <= 0:
                del running[number - base]
    return times


run.requests_so_far = 0  # type: ignore[attr-defined]


def main() -> None:
    engine, model, sequences = sys.argv[1:]
    out = sys.stdout
    sys.stdout = sys.stderr  # engines may print
    server: Server = ENGINES[engine](model, int(sequences))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        requests, most = json.loads(line)
        before = server.cached_tokens()
        times = run(server, [tuple(request) for request in requests], most)
        found = {"times": times, "cached_tokens": server.cached_tokens() - before}
        print(json.dumps(found), file=out, flush=True)
    server.end()


if __name__ == "__main__":
    main()
