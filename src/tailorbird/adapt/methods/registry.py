"""The methods by name, and their settings checked by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from tailorbird.adapt.methods.adapter import Method
from tailorbird.adapt.methods.allora import Allora
from tailorbird.adapt.methods.badam import BAdam
from tailorbird.adapt.methods.density import Density
from tailorbird.adapt.methods.eigenlorax import Eigenlorax
from tailorbird.adapt.methods.elalora import Elalora
from tailorbird.adapt.methods.emloc import Emloc
from tailorbird.adapt.methods.full import Full
from tailorbird.adapt.methods.glora import Glora
from tailorbird.adapt.methods.goat import Goat
from tailorbird.adapt.methods.hydra import Hydra
from tailorbird.adapt.methods.ir_qlora import IrQlora
from tailorbird.adapt.methods.ist import Ist
from tailorbird.adapt.methods.kasa import Kasa
from tailorbird.adapt.methods.lamda import Lamda
from tailorbird.adapt.methods.lisa import Lisa
from tailorbird.adapt.methods.loca import Loca
from tailorbird.adapt.methods.loldu import Loldu
from tailorbird.adapt.methods.lomo import Lomo
from tailorbird.adapt.methods.loqt import Loqt
from tailorbird.adapt.methods.lora_pro import LoraPro
from tailorbird.adapt.methods.lora_xs import LoraXs
from tailorbird.adapt.methods.low_rank import Lora
from tailorbird.adapt.methods.meft import Meft
from tailorbird.adapt.methods.mixlora import Mixlora
from tailorbird.adapt.methods.mos import Mos
from tailorbird.adapt.methods.nora import Nora
from tailorbird.adapt.methods.peft import OF_PEFT
from tailorbird.adapt.methods.prefix_tuning import PrefixTuning
from tailorbird.adapt.methods.prompt_tuning import PromptTuning
from tailorbird.adapt.methods.qdylora import Qdylora
from tailorbird.adapt.methods.rslora import RsLora
from tailorbird.adapt.methods.signal_to_noise import Spectrum
from tailorbird.adapt.methods.slimfit import SlimFit
from tailorbird.adapt.methods.triadaptlora import Triadaptlora
from tailorbird.adapt.methods.zeroth import OF_ZEROTH_ORDER
from tailorbird.adapt.setting_types import check_types
from tailorbird.errors import SettingsError, nearest

#: every method of this folder; those that wrap another have it as their setting `method`
METHODS: dict[str, type] = {
    kind.name: kind
    for kind in (
        Lora,
        RsLora,
        LoraXs,
        Nora,
        Lamda,
        Loldu,
        Kasa,
        Mos,
        Allora,
        LoraPro,
        IrQlora,
        Elalora,
        Triadaptlora,
        Qdylora,
        Hydra,
        Glora,
        Loca,
        Eigenlorax,
        Mixlora,
        Goat,
        Ist,
        Density,
    )
}

#: those that change the model's own weights: what they make is a checkpoint
OF_WEIGHTS: dict[str, type] = {kind.name: kind for kind in (Full, Lisa, BAdam, Lomo, Spectrum, SlimFit)}

#: those that learn beside weights, which take that in time and again: what they make is a checkpoint, too
OF_MERGES: dict[str, type] = {Loqt.name: Loqt}

#: those that change what stands before a text, and no weight
OF_BEGINNINGS: dict[str, type] = {kind.name: kind for kind in (PromptTuning, PrefixTuning)}

#: those that learn beside another model than the one that they learn for
OF_STAND_INS: dict[str, type] = {Emloc.name: Emloc}

#: those that let the blocks of the model run in another way
OF_BLOCKS: dict[str, type] = {Meft.name: Meft}

#: every method of tuning
KNOWN: dict[str, type] = (
    METHODS | OF_STAND_INS | OF_BLOCKS | OF_PEFT | OF_BEGINNINGS | OF_WEIGHTS | OF_MERGES | OF_ZEROTH_ORDER
)


def method_named(name: str, **settings: Any) -> Method:
    """A method with settings.

    Parameters
    ----------
    name : str
    **settings
        Fields of the method. For a method that wraps another, `method` may be a name, and settings that
        the wrapper doesn't have go to it.

    Raises
    ------
    SettingsError
        There is no such method or setting, or a value is of another type or out of range.
    """
    if name not in KNOWN:
        raise SettingsError(f"method `{name}`", "a method of tuning", nearest(name, KNOWN))
    kind = KNOWN[name]
    known = [field.name for field in dataclasses.fields(kind)]
    inner = settings.get("method")
    if "method" in known and isinstance(inner, str):
        passed = {setting: settings.pop(setting) for setting in set(settings) - set(known)}
        settings["method"] = method_named(inner, **passed)
    for setting in settings:
        if setting not in known:
            raise SettingsError(
                f"setting `{setting}` of {name}",
                "one of " + ", ".join(f"`{field}`" for field in known),
                nearest(setting, known),
            )
    check_types(name, kind, settings)
    method: Method = kind(**settings)
    return method
