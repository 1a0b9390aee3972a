"""The optimizers by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from tailorbird.adapt.optimizers.adafactor import Adafactor
from tailorbird.adapt.optimizers.adahessian import AdaHessian
from tailorbird.adapt.optimizers.adamw import AdamW
from tailorbird.adapt.optimizers.adamw8bit import AdamW8bit
from tailorbird.adapt.optimizers.apollo import Apollo
from tailorbird.adapt.optimizers.apollo_mini import ApolloMini
from tailorbird.adapt.optimizers.galore import GaLore
from tailorbird.adapt.optimizers.galore_dct import GaLoreDct
from tailorbird.adapt.optimizers.grass import Grass
from tailorbird.adapt.optimizers.lamb import Lamb
from tailorbird.adapt.optimizers.lars import Lars
from tailorbird.adapt.optimizers.lion import Lion
from tailorbird.adapt.optimizers.rule import Rule
from tailorbird.adapt.optimizers.sgd import Sgd
from tailorbird.adapt.optimizers.sgg import Sgg
from tailorbird.adapt.optimizers.soap import Soap
from tailorbird.adapt.setting_types import check_types
from tailorbird.errors import SettingsError, nearest

OPTIMIZERS: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        AdamW,
        AdamW8bit,
        Lion,
        Adafactor,
        Soap,
        AdaHessian,
        Lamb,
        Lars,
        Sgd,
        GaLore,
        GaLoreDct,
        Apollo,
        ApolloMini,
        Grass,
        Sgg,
    )
}


def optimizer_named(name: str, **settings: Any) -> Rule:
    """An optimizer's settings.

    Parameters
    ----------
    name : str
    **settings
        Fields of its class; others have their defaults. ``inner`` of a wrapper may be a name.

    Raises
    ------
    SettingsError
        For a name or a setting that there isn't, or a value that makes no sense.
    """
    if name not in OPTIMIZERS:
        raise SettingsError(f"optimizer `{name}`", "an optimizer's name", nearest(name, OPTIMIZERS))
    kind: Any = OPTIMIZERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in known:
            raise SettingsError(f"setting `{setting}` of {name}", "one that it has", nearest(setting, known))
    if isinstance(settings.get("inner"), str):
        settings["inner"] = optimizer_named(settings["inner"])
    check_types(name, kind, settings)
    rule: Rule = kind(**settings)
    return rule
