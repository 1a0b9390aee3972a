"""Compressed checkpoints for tests, made by plain rounding from small random models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tailorbird.formats.packed import (
    SCALE_DTYPES,
    BinaryCoding,
    CodebookCoding,
    Coding,
    DoubleCoding,
    EntropyCoding,
    FloatCoding,
    IntegerCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
)
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.quantize.clusters import clustered, nearest_values
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.checkpoint import write_json, write_tensors
from tailorbird.model.layout import BlockLayout, ModelLayout, ModuleLayout

INT4 = IntegerCoding(4, 32)


def pack(weight: torch.Tensor, coding: Coding, order: torch.Tensor | None = None) -> PackedWeight:
    """Round `weight` `[out, in]` to nearest; `order` permutes the stored columns."""
    if isinstance(coding, FloatCoding):
        return PackedWeight.from_float(weight, coding)
    if isinstance(coding, EntropyCoding):
        return PackedWeight.from_bfloat16(weight)
    weight = weight.detach().float()
    if order is not None:
        weight = weight[:, order]
    out, n = weight.shape
    if isinstance(coding, TableCoding):
        tables = clustered(weight, coding)
        return PackedWeight.from_tables(nearest_values(weight, tables), tables, coding, order)
    if isinstance(coding, DoubleCoding | VectorCoding | BinaryCoding):
        packed = Rtn()(weight, None, coding)
        tensors = packed.tensors if order is None else {**packed.tensors, "order": order.to(torch.int32)}
        return PackedWeight(coding, out, n, tensors)
    groups, size = group_layout(n, coding.group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * size - n)).view(out, groups, size)
    top = (1 << coding.bits) - 1
    middle = 1 << (coding.bits - 1)
    if isinstance(coding, CodebookCoding):
        scales = (padded.abs().amax(-1) / 127).clamp(min=1e-4).to(SCALE_DTYPES[coding.scale_dtype]).float()
        distances = (padded / scales.unsqueeze(-1))[..., None] - coding.levels.float()
        codes = distances.abs().argmin(-1).view(out, -1)[:, :n].to(torch.uint8)
        return PackedWeight.from_codes(codes, scales, None, coding, order)
    if coding.symmetric:
        width = padded.abs().amax(-1) / (middle - 1)
    else:
        width = (padded.amax(-1).clamp(min=0) - padded.amin(-1).clamp(max=0)) / top
    scales = width.clamp(min=1e-4).to(SCALE_DTYPES[coding.scale_dtype]).float()
    zeros = None
    if not coding.symmetric:
        zeros = (-padded.amin(-1).clamp(max=0) / scales).round().clamp(0, top)
    shift = middle if zeros is None else zeros.unsqueeze(-1)
    codes = ((padded / scales.unsqueeze(-1)).round() + shift).clamp(0, top)
    codes = codes.view(out, -1)[:, :n].to(torch.uint8)
    return PackedWeight.from_codes(
        codes, scales, None if zeros is None else zeros.to(torch.uint8), coding, order
    )


def linears(model: Any, head: bool = False) -> dict[str, nn.Module]:
    """Linears of the blocks by path, and the head where `head`."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (head or module is not output)
    }


def oriented(module: nn.Module) -> torch.Tensor:
    """The module's weight as `[out, in]`."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def save_compressed(
    directory: Path,
    model: Any,
    coding: Coding | Callable[[str], Coding | None] = INT4,
    *,
    embedding: Coding | None = None,
    ordered: bool = False,
    blocks: Mapping[int, BlockLayout] | None = None,
    tokenizer: Any = None,
    layout: Callable[[ModelLayout], ModelLayout] = lambda layout: layout,
) -> Any:
    """Write `model` with packed linears; returns `model`, its weights replaced by the rounded ones.

    Parameters
    ----------
    coding : Coding or function of the module's path
        None leaves a linear as it is.
    embedding : Coding, optional
        For the token embedding, and so for a tied head.
    ordered : bool
        Store the columns of every linear in another order.
    blocks : mapping, optional
        For the layout; the shapes are those that the model's modules have.
    """
    directory.mkdir(parents=True, exist_ok=True)
    choose = coding if callable(coding) else lambda _: coding
    tensors = dict(model.state_dict())
    modules: dict[str, ModuleLayout] = {}
    names = {module: name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is table.weight
    if tied:
        del tensors[names[head] + ".weight"]
    places = linears(model, head=not tied)
    if embedding is not None:
        places[names[table]] = table
    for i, (name, module) in enumerate(places.items()):
        chosen = embedding if module is table else choose(name)
        if chosen is None:
            continue
        weight = oriented(module)
        generator = torch.Generator().manual_seed(i)
        permute = ordered and module is not table
        order = torch.randperm(weight.shape[1], generator=generator) if permute else None
        packed = pack(weight, chosen, order)
        modules[name] = ModuleLayout(
            *weight.shape, packed.coding, getattr(module, "bias", None) is not None, order is not None
        )
        with torch.no_grad():
            oriented(module).copy_(packed.dequantize())
        stored = tensors.pop(name + ".weight")
        if not isinstance(chosen, FloatCoding):
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
        else:
            transposed = isinstance(module, Conv1D)
            value = packed.tensors["weight"]
            tensors[name + ".weight"] = (value.T if transposed else value).contiguous()
            assert tensors[name + ".weight"].shape == stored.shape
    stated = ModelLayout(modules, names[table], names[head], tied, blocks or {})
    write_tensors(directory / "model.safetensors", {k: v.contiguous() for k, v in tensors.items()})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(model.parameters()).dtype
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = layout(stated).to_dict()
    write_json(directory / "config.json", config)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return model
