"""One engine with one model in a process of its own, which runs what it is told on standard input.

Each engine has an environment of its own, so this file imports nothing of the project but in the branch that
measures the project. A line in, `prefill N`, `decode PROMPT NEW` or `batch SEQUENCES PROMPT NEW`; a line out,
the seconds that it took: of the prompt in the first case, of the tokens after it in the others. Logits are
formed for the last position of every sequence, and the likeliest token is looked for. To the line `memory`
the answer is JSON: bytes that were resident once the engine was imported, before its model was loaded, and
the most that ever were.

    python peer_child.py ENGINE MODEL
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
VOCABULARY = 32_000
#: Tokens for which the engines that want to know it make room.
ROOM = 8192

#: Reads so many tokens of so many sequences, after so many that were read before; 0 begins anew.
Step = Callable[[int, int, int], Any]


class Memory:
    """Resident memory of this process, as Linux counts it.

    Resident are all pages in RAM: the heap, whole large pages of which a part is used, and pages of mapped
    files, which libraries are, and weights that safetensors maps, for as long as they aren't let go. So a
    weight that is laid out anew counts twice while it is read. The peak is VmHWM and not what `getrusage`
    calls the largest resident size, which begins with that of the process that started this one.
    """

    def __init__(self) -> None:
        self.imports_bytes = 0

    def imported(self) -> None:
        """All that is imported is there, and nothing of the model."""
        self.imports_bytes = self._bytes("VmRSS")

    def report(self) -> str:
        """What `memory` is answered with."""
        return json.dumps({"imports_bytes": self.imports_bytes, "peak_bytes": self._bytes("VmHWM")})

    def _bytes(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def import_modules(model: str) -> None:
    """Import what transformers would while it loads such a model."""
    kind = json.loads((Path(model) / "config.json").read_text())["model_type"]
    importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def transformers_step(model: str, memory: Memory) -> Step:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    import_modules(model)
    memory.imported()
    torch.set_num_threads(THREADS)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    state: dict[str, Any] = {}

    @torch.no_grad()
    def step(sequences: int, tokens: int, past: int) -> Any:
        if past == 0:
            state["cache"] = DynamicCache(config=loaded.config)
        ids = torch.randint(3, VOCABULARY, (sequences, tokens))
        output = loaded(ids, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1)

    return step


def tailorbird_step(model: str, memory: Memory) -> Step:
    import torch

    from tailorbird.model.load import load
    from tailorbird.run.generate import decode

    import_modules(model)
    memory.imported()
    torch.set_num_threads(THREADS)
    loaded = load(model)
    state: dict[str, Any] = {}

    def step(sequences: int, tokens: int, past: int) -> Any:
        if past == 0:
            state["decoding"] = decode(loaded)
        return state["decoding"].read(torch.randint(3, VOCABULARY, (sequences, tokens))).argmax(-1)

    return step


def llama_cpp_step(model: str, memory: Memory) -> Step:
    import ctypes

    import llama_cpp as api
    import numpy as np

    memory.imported()
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p())
    loaded = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = ROOM, 2048, 512, 8
    settings.n_threads = settings.n_threads_batch = THREADS
    settings.kv_unified = True
    context = api.llama_init_from_model(loaded, settings)

    def read(sequences: int, tokens: int, past: int, last: bool) -> None:
        batch = api.llama_batch_init(sequences * tokens, 0, 1)
        batch.n_tokens = sequences * tokens
        for index in range(sequences * tokens):
            sequence, position = divmod(index, tokens)
            batch.token[index] = 3 + (7919 * index + past) % (VOCABULARY - 3)
            batch.pos[index] = past + position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = last and position == tokens - 1
        if api.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        api.llama_synchronize(context)
        for sequence in range(sequences if last else 0):
            logits = api.llama_get_logits_ith(context, sequence * tokens + tokens - 1)
            np.ctypeslib.as_array(logits, (VOCABULARY,)).argmax()
        api.llama_batch_free(batch)

    def step(sequences: int, tokens: int, past: int) -> None:
        if past == 0:
            api.llama_memory_clear(api.llama_get_memory(context), True)
        most = 2048 // sequences
        for start in range(0, tokens, most):
            part = min(most, tokens - start)
            read(sequences, part, past + start, start + part == tokens)

    step.kept = quiet  # type: ignore[attr-defined]  # a callback that is collected crashes the process
    return step


def openvino_step(model: str, memory: Memory) -> Step:
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    memory.imported()
    core = openvino.Core()
    graph = core.read_model(model + "/openvino_model.xml")
    head = graph.output("logits").get_node().input_value(0).get_node()
    last = [ops.constant(np.array([value])) for value in (-1, -2, -1, 1)]
    head.input(0).replace_source_output(ops.slice(head.input_value(0), *last).output(0))
    graph.validate_nodes_and_infer_types()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    names = {name for node in graph.inputs for name in node.get_names()}

    def step(sequences: int, tokens: int, past: int) -> Any:
        if past == 0:
            request.reset_state()
        inputs = {
            "input_ids": np.random.randint(3, VOCABULARY, (sequences, tokens)),
            "attention_mask": np.ones((sequences, past + tokens), np.int64),
            "position_ids": np.tile(np.arange(past, past + tokens), (sequences, 1)),
            "beam_idx": np.arange(sequences, dtype=np.int32),
        }
        result = request.infer({name: value for name, value in inputs.items() if name in names})[0]
        return result[:, -1].argmax(-1)

    return step


ENGINES: dict[str, Callable[[str, Memory], Step]] = {
    "transformers": transformers_step,
    "tailorbird": tailorbird_step,
    "llama.cpp": llama_cpp_step,
    "openvino": openvino_step,
}


def seconds(step: Step, words: list[str]) -> float:
    """What an order takes."""
    if words[0] == "prefill":
        began = time.perf_counter()
        step(1, int(words[1]), 0)
        return time.perf_counter() - began
    sequences, prompt, new = (1, *map(int, words[1:])) if words[0] == "decode" else map(int, words[1:])
    step(sequences, prompt, 0)
    began = time.perf_counter()
    for done in range(new):
        step(sequences, 1, prompt + done)
    return time.perf_counter() - began


def main() -> None:
    engine, model = sys.argv[1:]
    out = sys.stdout
    sys.stdout = sys.stderr  # engines may print
    memory = Memory()
    step = ENGINES[engine](model, memory)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        words = line.split()
        print(memory.report() if words == ["memory"] else seconds(step, words), file=out, flush=True)


if __name__ == "__main__":
    main()
