"""Rounds the linears of a model with one program in a process of its own, and says what it took.

Peers have environments of their own, so this file imports nothing of the project but in the branch that runs
the project. A peer gets the calibration windows as tokens, and leaves the values that its linears stand for,
in float32, in ``linears.safetensors``; the project leaves its checkpoint. The last line on standard output is
JSON: seconds, peak memory, and the bits that a weight inside the blocks takes, scales and zeros counted.

    python quality_child.py SETTINGS
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

#: Calibration windows in an update, or a call, of those who want to know it.
BATCH = 8
#: A scale, or a zero point that isn't rounded.
FLOAT_BITS = 16
#: Subjects that are a recipe with settings.
VARIANTS = {
    "rtn+omniquant-transform": ("rtn+omniquant", ",omniquant.transform=true"),
    "gptq-plain": ("gptq", ",asymmetric=false"),
    "billm-static": ("billm", ",static_groups=true"),
}


def recipe_of(name: str, bits: int, group: int) -> str:
    """A method of the project with codes of so many bits."""
    name, settings = VARIANTS.get(name, (name, ""))
    if name == "billm":
        return f"{name}:binary=true,group={2 * group}{settings}"
    return f"{name}:table={bits}" if name == "ganq" else f"{name}:bits={bits},group={group}{settings}"


def run_tailorbird(settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe of the project, or an effort within a budget, whether or not the gate likes the result."""
    import tailorbird
    from tailorbird.errors import GateRefused
    from tailorbird.model.json_file import read_json

    common = {
        "calibration": settings["calibration"], "evaluation": settings["evaluation"],
        "sequences": settings["sequences"], "activations": "exact", "measure_speed": False,
        "measure_spread": False,
    }  # fmt: skip
    try:
        if "memory" in settings:
            result = tailorbird.fit(
                settings["model"], settings["memory"], settings["output"], effort=settings["effort"],
                keep=("embedding", "head"), allow_slower=True, **common,
            )  # fmt: skip
        else:
            recipe = recipe_of(settings["subject"], settings["bits"], settings["group"])
            result = tailorbird.compress(settings["model"], settings["output"], recipe=recipe, **common)
    except GateRefused as refused:
        result = refused.result
    report = read_json(Path(result.output) / "report.json")
    inside = [place for place in report["plan"]["places"] if place["block"] is not None]
    weights = sum(place["shape"][0] * place["shape"][1] for place in inside)
    compress = next(stage for stage in report["stages"] if stage["name"] == "compress")
    return {
        "output": result.output,
        "bits_per_weight": 8 * sum(place["bytes"] for place in inside) / weights,
        "seconds": compress["seconds"],
        "seconds_with_scores_and_gate": result.seconds,
        "peak_rss_bytes": compress["measured_bytes"],
        "methods": result.methods,
    }


def load(model: str) -> Any:
    """transformers' model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def calibration_ids(settings: dict[str, Any]) -> Any:
    """LongTensor ``[windows, length]``."""
    from safetensors.torch import load_file

    return load_file(settings["ids"])["ids"]


def run_autoround(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """AutoRound with zero points, at its own settings but for the calibration text."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids = calibration_ids(settings)
    rounding = AutoRound(
        load(settings["model"]), AutoTokenizer.from_pretrained(settings["model"]), bits=settings["bits"],
        group_size=settings["group"], sym=False, nsamples=len(ids), seqlen=ids.shape[1], batch_size=BATCH,
        dataset=list(ids.split(BATCH)), device_map="cpu", low_gpu_mem_usage=False,
        **({} if settings["steps"] is None else {"iters": settings["steps"]}),
    )  # fmt: skip
    found = rounding.quantize()
    modules = dict((found[0] if isinstance(found, tuple) else found).named_modules())
    weights = {name: modules[name].weight for name in settings["linears"]}
    return weights, settings["bits"] + (FLOAT_BITS + settings["bits"]) / settings["group"]


def run_llmcompressor_gptq(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """GPTQ of llm-compressor with zero points, at its own settings but for the calibration text."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    ids = calibration_ids(settings)
    windows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    grid = {
        "num_bits": settings["bits"], "type": "int", "symmetric": False, "strategy": "group",
        "group_size": settings["group"],
    }  # fmt: skip
    groups = {"all": {"targets": ["Linear"], "weights": grid}}
    model = load(settings["model"])
    oneshot(
        model=model, recipe=GPTQModifier(targets="Linear", ignore=["lm_head"], config_groups=groups),
        dataset=Dataset.from_dict(windows), max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
    )  # fmt: skip
    modules = dict(model.named_modules())
    weights = {}
    for name in settings["linears"]:
        module = modules[name]
        weights[name] = fake_quantize(
            module.weight, module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights
        )
    return weights, settings["bits"] + (FLOAT_BITS + settings["bits"]) / settings["group"]


def run_hqq(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """HQQ, which reads no text."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = load(settings["model"])
    grid = BaseQuantizeConfig(nbits=settings["bits"], group_size=settings["group"], axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=grid, compute_dtype=torch.float32, device="cpu")
    modules = dict(model.named_modules())
    weights = {name: modules[name].dequantize() for name in settings["linears"]}
    return weights, settings["bits"] + 2 * FLOAT_BITS / settings["group"]


PEERS = {"autoround": run_autoround, "llmcompressor-gptq": run_llmcompressor_gptq, "hqq": run_hqq}


def run_peer(settings: dict[str, Any]) -> dict[str, Any]:
    """A peer, and its dequantized linears."""
    import torch
    from safetensors.torch import save_file

    began = time.perf_counter()
    weights, bits = PEERS[settings["subject"]](settings)
    seconds = time.perf_counter() - began
    output = Path(settings["output"])
    output.mkdir()
    kept = {name: weight.detach().to(torch.float32).contiguous() for name, weight in weights.items()}
    save_file(kept, output / "linears.safetensors")
    return {
        "output": str(output),
        "bits_per_weight": bits,
        "seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # programs may print
    run = run_peer if settings["subject"] in PEERS else run_tailorbird
    print(json.dumps(run(settings)), file=out, flush=True)


if __name__ == "__main__":
    main()
