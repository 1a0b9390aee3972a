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

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

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


def register() -> None:
    """Enter both classes in transformers' tables; does nothing when they are there."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(TailorbirdConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(TailorbirdQuantizer)


register()
