"""What was learned, as a directory that others load.

A change of low rank at every place is a LoRA to PEFT, vLLM and `serve`, however it was learned: it is written
in PEFT's layout (https://huggingface.co/docs/peft/developer_guides/checkpoint). ``tailorbird.json`` beside it
says how it came to be, and for which weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tailorbird.adapt.methods.adapter import OWN_TYPE, Addition, Attached, Place
from tailorbird.adapt.methods.glora import is_glora
from tailorbird.adapt.methods.zeroth.moved import Moved
from tailorbird.errors import SettingsError
from tailorbird.formats.peft import CONFIG_FILE, WEIGHTS_FILE, lora_config, lora_tensors
from tailorbird.model.writing import write_json, write_tensors

#: Beside an adapter or a checkpoint: how it came to be, and for which weights.
ORIGIN = "tailorbird.json"


def low_rank_factors(places: Mapping[str, Place], method: Attached) -> dict[str, tuple[Tensor, Tensor]]:
    """Up and down of every linear that changes, by its path, float32; the scaling is in `up`.

    Raises
    ------
    SettingsError
        The change at some place isn't of low rank.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path in places:
        addition = method.addition(path)
        if addition is None:
            continue
        factors = addition.factors()
        if factors is None:
            raise SettingsError(
                f"an adapter whose change of `{path}` isn't of low rank", "one that PEFT's LoRA can hold",
                "merge it into a checkpoint",
            )  # fmt: skip
        up, down = (factor.detach().float().contiguous() for factor in factors)
        if down.shape[0]:
            found[path] = up, down
    return found


def _additions(places: Mapping[str, Place], method: Attached) -> list[Addition]:
    return [one for path in places if (one := method.addition(path)) is not None]


def check_mergeable(name: str, method: Attached) -> None:
    """Refuse a method whose result is neither a LoRA nor a GLoRA, which weights can take in.

    Parameters
    ----------
    name : str
        Of the method.
    method : Attached

    Raises
    ------
    SettingsError
        It changes weights itself, or what it learns is more than a change of weights, or less plain.
    """
    if method.changed() is not None or isinstance(method, Moved):
        raise SettingsError(
            f"a merge of what `{name}` learns, whose result is a checkpoint already", "a method of adapters",
            "leave out --merge",
        )  # fmt: skip
    own = method.files()
    additions = [one for one in method.modules() if isinstance(one, Addition)]
    if own is None and all(one.merges and one.factors() is not None for one in additions):
        return
    if own is not None and own[1].get("peft_type") == "LORA" and not own[1].get("use_dora"):
        return
    if own is not None and is_glora(own[1]):
        return
    raise SettingsError(
        f"a merge of what `{name}` learns", "glora, or one whose adapter is a LoRA, such as lora or pissa",
        "leave out --merge and serve the adapter beside the model, or choose another --method",
    )  # fmt: skip


def write_adapter(
    directory: Path,
    places: Mapping[str, Place],
    method: Attached,
    all_paths: list[str],
    base: str,
    origin: Mapping[str, Any],
) -> int:
    """Write what was learned into a directory that exists; returns the bytes of its tensors.

    What is no change of weights is written as the method's own tensors, for `load_adapted`.

    Raises
    ------
    SettingsError
        As `low_rank_factors`.
    """
    own = method.files()
    if own is None and not all(addition.merges for addition in _additions(places, method)):
        tensors = {name: tensor.contiguous() for name, tensor in method.state_dict().items()}
        config = {"peft_type": OWN_TYPE, "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    elif own is None:
        factors = low_rank_factors(places, method)
        tensors, ranks = lora_tensors(factors), {path: len(down) for path, (_, down) in factors.items()}
        config = lora_config(ranks, base, all_paths, any(places[path].transposed for path in ranks))
    else:
        tensors, config = own[0], {**own[1], "base_model_name_or_path": base}
    write_tensors(directory / WEIGHTS_FILE, tensors)
    write_json(directory / CONFIG_FILE, config)
    write_json(directory / ORIGIN, dict(origin))
    return sum(tensor.nbytes for tensor in tensors.values())
