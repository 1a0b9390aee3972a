"""Loads compressed checkpoints through transformers' own `from_pretrained`.

Two classes stand in transformers' tables of quantizers: the config, which is the layout in
`config.json`, and the quantizer, which rebuilds the empty model before the weights are read. Stored
codes, scales and zeros keep their dtypes and bits whatever dtype is asked for; only float tensors are
cast. This module imports transformers; `registration.py` decides when.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tailorbird.errors import CheckpointError
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.model.layout import METHOD, ModelLayout
from tailorbird.model.skeleton import rebuild

#: in transformers' loader these are never extra: buffers that older files hold
_NEVER_EXTRA = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class TailorbirdConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint.

    Parameters
    ----------
    **data
        The keys of `ModelLayout.to_dict`.

    Raises
    ------
    CheckpointError
        As `ModelLayout.from_dict`.
    """

    quant_method = METHOD

    def __init__(self, **data: Any) -> None:
        self.layout = ModelLayout.from_dict({"quant_method": METHOD, **data})

    def to_dict(self) -> dict[str, Any]:
        """The layout in JSON types."""
        return self.layout.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class TailorbirdQuantizer(HfQuantizer):
    """Builds the modules of a compressed checkpoint; never quantizes anything itself."""

    requires_calibration = True  # a dense model can't be compressed while it is loaded
    is_trainable = False

    @property
    def layout(self) -> ModelLayout:
        """What the checkpoint's config states."""
        return self.quantization_config.layout

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        rebuild(model, self.layout)
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            check_tensors(model, checkpoint_files)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes what was loaded."""
        return True


def check_tensors(model: Any, files: list[str]) -> None:
    """Compare names, shapes and packed dtypes in `files` with what the rebuilt, empty `model` expects.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    files : list of str
        safetensors files.

    Raises
    ------
    CheckpointError
        A tensor is missing, unexpected, or has another shape, or a packed one another dtype. A model
        class other than the checkpoint's own may lack tensors or have more.
    """
    from safetensors import safe_open

    expected = dict(model.state_dict())
    packed = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, CompressedLinear | CompressedEmbedding)
        for name, _ in module.named_buffers(recurse=False)
    }
    prefix = model.base_model_prefix + "."
    found: set[str] = set()
    extra: list[str] = []
    ignored = [*_NEVER_EXTRA, *(model._keys_to_ignore_on_load_unexpected or ())]
    for file in files:
        with safe_open(file, framework="pt") as content:
            for stored in content.keys():  # noqa: SIM118 - the handle is no mapping
                candidates = (stored, prefix + stored, stored.removeprefix(prefix))
                name = next((name for name in candidates if name in expected), None)
                if name is None:
                    if not any(re.search(pattern, stored) for pattern in ignored):
                        extra.append(stored)
                    continue
                found.add(name)
                entry = content.get_slice(stored)
                _check_entry(stored, entry, expected[name], name in packed)
    missing = expected.keys() - found - model.all_tied_weights_keys.keys()
    architectures = getattr(model.config, "architectures", None) or [type(model).__name__]
    if type(model).__name__ not in architectures:
        missing &= packed
        extra = []
    for names, state in ((sorted(missing), "is missing"), (sorted(extra), "belongs to no module")):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"tensor `{names[0]}` {state}{others}",
                "exactly the tensors that config.json and its layout state",
                "copy the checkpoint again, or compress the model again",
            )


def _check_entry(name: str, entry: Any, expected: torch.Tensor, packed: bool) -> None:
    shape, dtype = list(entry.get_shape()), entry.get_dtype()
    names = {torch.uint8: "U8", torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if shape != list(expected.shape) or (packed and dtype != names.get(expected.dtype)):
        wanted = f" of {expected.dtype}" if packed else ""
        raise CheckpointError(
            f"tensor `{name}` {shape} of {dtype}",
            f"{list(expected.shape)}{wanted}, as config.json and its layout state",
            "copy the checkpoint again, or compress the model again",
        )


def register() -> None:
    """Enter both classes in transformers' tables; does nothing when they are there."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(TailorbirdConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(TailorbirdQuantizer)


register()
