"""Loads compressed checkpoints through transformers' own `from_pretrained`.

Two classes stand in transformers' tables of quantizers: the config, which is the layout in
`config.json`, and the quantizer, which rebuilds the empty model before the weights are read. Stored
codes, scales and zeros keep their dtypes and bits whatever dtype is asked for; only float tensors are
cast. This module imports transformers; `registration.py` decides when.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tailorbird.formats.modules import CompressedLinear
from tailorbird.model.decoding import decode_modules
from tailorbird.model.layout import METHOD, ModelLayout
from tailorbird.model.naming import check_tensors, translate
from tailorbird.model.skeleton import rebuild
from tailorbird.model.weights import Weights


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
        if checkpoint_files:
            _check_files(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear):
                module.check_parts(name)
        if decode_modules(model):
            self.quantization_config.layout = self.layout.decoded()
            if not self.layout.modules and not self.layout.blocks:
                self.remove_quantization_config(model)
        if next(model.parameters(), None) is None:
            model.__class__ = _stating(type(model))
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes what was loaded."""
        return True


def _check_files(model: Any, files: list[str]) -> None:
    """Refuse files whose tensors aren't exactly those of the rebuilt, empty `model`.

    A model class other than the checkpoint's own (`AutoModel`) may lack tensors or have more, about
    which transformers reports.
    """
    own = getattr(model.config, "architectures", None)
    if own and type(model).__name__ not in own:
        return
    expected = dict(model.state_dict())
    weights = translate(Weights.open(Path(files[0]).parent), expected, model.base_model_prefix)
    check_tensors(weights, expected, model.all_tied_weights_keys)


def _stating(of: type) -> type:
    """A class of models that has no parameter, as all are packed and norms have none.

    transformers' properties of the same names ask the first parameter.
    """

    def dtype(self: Any) -> torch.dtype:
        stated: torch.dtype | None = self.config.get_text_config().dtype
        return stated or torch.get_default_dtype()

    def device(self: Any) -> torch.device:
        return next(buffer.device for buffer in self.buffers())

    own = {"dtype": property(dtype), "device": property(device), "__module__": of.__module__}
    return type(of.__name__, (of,), own)


def register() -> None:
    """Enter both classes in transformers' tables; does nothing when they are there."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(TailorbirdConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(TailorbirdQuantizer)


register()
