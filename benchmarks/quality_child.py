"""Rounds the linears of a model with one program in a process of its own, and says what it took.

Peers have environments of their own, so this file imports nothing of the project but in the branch that runs
the project. A peer gets the calibration windows as tokens, and leaves the values that its linears stand for,
in float32, in ``linears.safetensors``, with what else it changed; the project leaves its checkpoint. The last
line on standard output is JSON: seconds, peak memory, and the bits that a weight inside the blocks takes,
scales and zeros counted. Linears that transformers stores as ``[in, out]`` are handed over as others are.

    python quality_child.py SETTINGS
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import k_quants

#: Calibration windows in an update, or a call, of those who want to know it.
BATCH = 8
#: A scale, or a zero point that isn't rounded, where a program keeps it in the model's dtype.
FLOAT_BITS = 16
#: Subjects that aren't called as their recipe is: that, with the width and the weights of a group put in.
RECIPES = {
    "rsq": "gptq:bits={bits},group={group},least_token=0.01",
    "gptq-plain": "gptq:bits={bits},group={group},asymmetric=false",
    "ganq": "ganq:table={bits}",
    "bcq": "bcq:table={bits}",
    "leanquant-tables": "leanquant:table={bits}",
    "higgs": "higgs:codebook=gauss{bits},group={group}",
    "higgs-pairs": "higgs:codebook=gauss{bits}x2,group={group}",
    "double-rounding": "double-rounding:bits=8,group={group}",
    "billm": "billm:binary=true,group={double_group}",
    "billm-static": "billm:binary=true,group={double_group},static_groups=true",
    "rtn+omniquant-transform": "rtn+omniquant:bits={bits},group={group},omniquant.transform=true",
}


def recipe_of(name: str, bits: int, group: int) -> str:
    """A method of the project with codes of so many bits."""
    recipe = RECIPES.get(name, name + ":bits={bits},group={group}")
    return recipe.format(bits=bits, group=group, double_group=2 * group)


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


def load(settings: dict[str, Any]) -> Any:
    """transformers' model in float32, with plain linears in place of those stored as ``[in, out]``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    for name in settings["transposed"]:
        stored = model.get_submodule(name)
        linear = torch.nn.Linear(*stored.weight.shape)
        linear.weight.data, linear.bias.data = stored.weight.data.T.contiguous(), stored.bias.data
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, linear)
    return model


def calibration_ids(settings: dict[str, Any]) -> Any:
    """LongTensor ``[windows, length]``."""
    from safetensors.torch import load_file

    return load_file(settings["ids"])["ids"]


def autoround_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What AutoRound is told beside the grid and the text: nothing, or what its README has for most accuracy.

    That is 1,000 updates of each block, and at 2 bits the extension of its algorithm (version 0.16.1).
    """
    best = settings["subject"] == "autoround-best"
    told = {"iters": 1000} if best else {}
    if settings["steps"] is not None:
        told["iters"] = settings["steps"]
    return told | ({"enable_alg_ext": True} if best and settings["bits"] == 2 else {})


def run_autoround(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """AutoRound with zero points, at its own settings but for the calibration text.

    Linears with inputs or outputs that are no multiple of 32 it leaves alone: they count 16 bits.
    """
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids, model = calibration_ids(settings), load(settings)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in settings["linears"]}
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(settings["model"]), bits=settings["bits"],
        group_size=settings["group"], sym=False, nsamples=len(ids), seqlen=ids.shape[1], batch_size=BATCH,
        dataset=list(ids.split(BATCH)), device_map="cpu", low_gpu_mem_usage=False,
        **autoround_settings(settings),
    )  # fmt: skip
    found = rounding.quantize()
    modules = dict((found[0] if isinstance(found, tuple) else found).named_modules())
    weights = {name: modules[name].weight for name in settings["linears"]}
    left = {name for name, weight in weights.items() if weight.equal(before[name].to(weight.dtype))}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    bits = sum(
        (FLOAT_BITS if name in left else integer_bits(settings)) * size for name, size in sizes.items()
    )
    return weights, bits / sum(sizes.values())


def run_llmcompressor_gptq(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """GPTQ of llm-compressor with zero points, at its own settings but for the calibration text."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    rounding = GPTQModifier(ignore=["lm_head"], **integer_groups(settings))
    return by_llmcompressor(load(settings), settings, [rounding]), integer_bits(settings)


def run_llmcompressor_awq(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """AWQ of llm-compressor with zero points, as its documentation has it, in the 16 bits of most models.

    It pins batches for an accelerator whether or not there is one; without one they stay where they are.
    """
    import torch
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None
    model = load(settings).to(torch.bfloat16)
    if any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise SystemExit("biases, which AWQ rescales too, and only weights are read here")
    rounding = QuantizationModifier(ignore=["lm_head"], **integer_groups(settings))
    weights = by_llmcompressor(model, settings, [AWQModifier(duo_scaling="both"), rounding])
    norms = {name: module.weight for name, module in model.named_modules() if is_norm(module)}
    return weights | norms, integer_bits(settings)


def integer_groups(settings: dict[str, Any]) -> dict[str, Any]:
    """What llm-compressor calls a scheme: groups of integers with zero points in every linear."""
    grid = {
        "num_bits": settings["bits"], "type": "int", "symmetric": False, "strategy": "group",
        "group_size": settings["group"],
    }  # fmt: skip
    return {"targets": "Linear", "config_groups": {"all": {"targets": ["Linear"], "weights": grid}}}


def integer_bits(settings: dict[str, Any]) -> float:
    """Bits of a weight in such groups: its code, and its part of a scale and a rounded zero point."""
    bits: int = settings["bits"]
    return bits + (FLOAT_BITS + bits) / settings["group"]


def by_llmcompressor(model: Any, settings: dict[str, Any], recipe: list[Any]) -> dict[str, Any]:
    """Linears after a recipe of llm-compressor."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot

    ids = calibration_ids(settings)
    windows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model, recipe=recipe, dataset=Dataset.from_dict(windows), max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )  # fmt: skip
    modules = dict(model.named_modules())
    weights = {}
    for name in settings["linears"]:
        module = modules[name]
        weights[name] = fake_quantize(
            module.weight.float(), module.weight_scale.float(), module.weight_zero_point,
            module.quantization_scheme.weights,
        )  # fmt: skip
    return weights


def is_norm(module: Any) -> bool:
    """Does a module scale its inputs one by one?"""
    return getattr(module, "weight", None) is not None and module.weight.ndim == 1


def run_gptqmodel(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """GPTQModel with zero points, at its own settings but for the calibration text.

    Its pool of threads needs two, and gives itself one on two cores. What it keeps in memory isn't yet what
    it stores, so that the stored model is read.
    """
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    grid = QuantizeConfig(
        bits=settings["bits"], group_size=settings["group"], sym=False, offload_to_disk=False
    )
    model = GPTQModel.load(settings["model"], grid, device="cpu", dtype=torch.float32)
    ids = calibration_ids(settings)
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model.quantize(windows, batch_size=BATCH, backend=BACKEND.TORCH)
    stored = settings["output"] + ".gptqmodel"
    model.save(stored)
    modules = dict(GPTQModel.load(stored, device="cpu", backend=BACKEND.TORCH).model.named_modules())
    weights = {name: modules[name].dequantize_weight().T for name in settings["linears"]}
    return weights, integer_bits(settings)


def run_hqq(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """HQQ, which reads no text."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = load(settings)
    grid = BaseQuantizeConfig(nbits=settings["bits"], group_size=settings["group"], axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=grid, compute_dtype=torch.float32, device="cpu")
    modules = dict(model.named_modules())
    weights = {name: modules[name].dequantize() for name in settings["linears"]}
    return weights, settings["bits"] + 2 * FLOAT_BITS / settings["group"]


def run_bitsandbytes(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """NF4 of bitsandbytes, which reads no text; scales in float32, or of 8 bits (double quantization)."""
    import bitsandbytes.functional as bitsandbytes

    modules = dict(load(settings).named_modules())
    weights, stored = {}, 0
    for name in settings["linears"]:
        codes, state = bitsandbytes.quantize_4bit(
            modules[name].weight.data, blocksize=settings["group"], quant_type="nf4",
            compress_statistics=settings["subject"].endswith("-double"),
        )  # fmt: skip
        weights[name] = bitsandbytes.dequantize_4bit(codes, state)
        parts = [codes, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
        stored += sum(part.nbytes for part in parts)
    return weights, 8 * stored / sum(weight.numel() for weight in weights.values())


def run_bitsandbytes_int8(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Weights of LLM.int8(), a scale in float32 for a row; its rounding of inputs is left out."""
    import bitsandbytes.functional as bitsandbytes

    modules = dict(load(settings).named_modules())
    weights, stored = {}, 0
    for name in settings["linears"]:
        codes, scales, _ = bitsandbytes.int8_vectorwise_quant(modules[name].weight.data)
        weights[name] = bitsandbytes.int8_vectorwise_dequant(codes, scales)
        stored += codes.nbytes + scales.nbytes
    return weights, 8 * stored / sum(weight.numel() for weight in weights.values())


def run_torchao(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Weights alone by torchao, which reads no text: at 4 bits its product on the CPU and HQQ's scales.

    Codes of 2 and 3 bits, each of which lies in a byte of its own, are counted as if they were packed.
    """
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    bits, group = settings["bits"], settings["group"]
    if bits == 4:
        grid = PrototypeInt4WeightOnlyConfig(group_size=group, int4_choose_qparams_algorithm="hqq")
        return by_torchao(settings, grid), bits + 2 * FLOAT_BITS / group
    grid = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(group), MappingType.ASYMMETRIC)
    return by_torchao(settings, grid), integer_bits(settings)


def run_torchao_int8(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Weights alone in 8 bits by torchao, a scale for a row."""
    from torchao.quantization import Int8WeightOnlyConfig

    weights = by_torchao(settings, Int8WeightOnlyConfig())
    rows = sum(len(weight) for weight in weights.values())
    return weights, 8 + FLOAT_BITS * rows / sum(weight.numel() for weight in weights.values())


def by_torchao(settings: dict[str, Any], grid: Any) -> dict[str, Any]:
    """Linears on a grid of torchao, column by column from products: not all of its tensors dequantize."""
    import torch
    from torchao.quantization import quantize_

    model = load(settings)
    quantize_(model, grid, filter_fn=lambda _, name: name in settings["linears"])
    weights = {}
    for name in settings["linears"]:
        linear = model.get_submodule(name)
        linear.bias = None
        weights[name] = linear(torch.eye(linear.in_features)).T
    return weights


def run_quanto(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """optimum-quanto, which reads no text: groups of its own and HQQ's scales, or a scale for a row."""
    from optimum import quanto

    model = load(settings)
    quanto.quantize(
        model, weights=getattr(quanto, f"qint{settings['bits']}"), include=settings["linears"],
        optimizer=None if settings["bits"] == 8 else quanto.HqqOptimizer(),
    )  # fmt: skip
    quanto.freeze(model)
    weights, floats = {}, 0
    for name in settings["linears"]:
        stored = model.get_submodule(name).weight
        weights[name] = stored.dequantize()
        floats += stored._scale.numel() + (stored._shift.numel() if hasattr(stored, "_shift") else 0)
    return weights, settings["bits"] + FLOAT_BITS * floats / sum(w.numel() for w in weights.values())


def run_llamacpp(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """llama.cpp's formats by its own tools."""
    return k_quants.quantize(load(settings), settings, calibration_ids(settings))


PEERS = {
    "autoround": run_autoround,
    "autoround-best": run_autoround,
    "llmcompressor-gptq": run_llmcompressor_gptq,
    "llmcompressor-awq": run_llmcompressor_awq,
    "gptqmodel": run_gptqmodel,
    "hqq": run_hqq,
    "bitsandbytes": run_bitsandbytes,
    "bitsandbytes-double": run_bitsandbytes,
    "bitsandbytes-int8": run_bitsandbytes_int8,
    "torchao": run_torchao,
    "torchao-int8": run_torchao_int8,
    "quanto": run_quanto,
    **dict.fromkeys(k_quants.FORMATS, run_llamacpp),
}


def run_peer(settings: dict[str, Any]) -> dict[str, Any]:
    """A peer, and its dequantized linears."""
    import torch
    from safetensors.torch import save_file

    began = time.perf_counter()
    weights, bits = PEERS[settings["subject"]](settings)
    seconds = time.perf_counter() - began
    output = Path(settings["output"])
    output.mkdir()
    kept = {name: weight.detach().to(torch.float32) for name, weight in weights.items()}
    kept |= {name: kept[name].T for name in settings["transposed"]}
    save_file({name: weight.contiguous() for name, weight in kept.items()}, output / "linears.safetensors")
    parts = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    found = {
        "output": str(output),
        "bits_per_weight": bits,
        "seconds": seconds,
        "peak_rss_bytes": max(resource.getrusage(part).ru_maxrss for part in parts) * 1024,
    }
    return found | ({"peer": k_quants.version()} if settings["subject"] in k_quants.FORMATS else {})


def main() -> None:
    settings = json.loads(sys.argv[1])
    out, sys.stdout = sys.stdout, sys.stderr  # programs may print
    run = run_peer if settings["subject"] in PEERS else run_tailorbird
    print(json.dumps(run(settings)), file=out, flush=True)


if __name__ == "__main__":
    main()
