"""Values of another type than a setting's are refused by its name, whatever the method or optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tailorbird.adapt.methods.registry import KNOWN, method_named
from tailorbird.adapt.optimizers.registry import OPTIMIZERS, optimizer_named
from tailorbird.errors import SettingsError

CASES = [
    (make, name, field)
    for make, kinds in ((method_named, KNOWN), (optimizer_named, OPTIMIZERS))
    for name, kind in sorted(kinds.items())
    for field in dataclasses.fields(kind)
]


@pytest.mark.parametrize(
    ("make", "name", "field"), CASES, ids=[f"{name}-{field.name}" for _, name, field in CASES]
)
def test_what_no_setting_can_be_is_refused(make: Any, name: str, field: dataclasses.Field[Any]) -> None:
    for value in ({"a": 1}, [{}], [None]):
        with pytest.raises(SettingsError, match=rf"^{field.name} .* of {name} "):
            make(name, **{field.name: value})


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("lora", {"rank": "abc"}, r"rank 'abc' of lora · expected: a whole number "),
        ("lora", {"rank": 1.5}, "a whole number"),
        ("lora", {"rank": True}, "a whole number"),
        ("lora", {"alpha": None}, "a number"),
        ("full", {"ends": 1}, "true or false"),
        ("mezo", {"epsilon": "small"}, "a number or null"),
        ("mezo", {"method": 3}, "a name or null"),
        ("ist", {"method": None}, "a name"),
        ("lomo", {"clipping": "some"}, "one of `all`"),
        ("eigenlorax", {"adapters": [1]}, "a list, each text"),
    ],
)
def test_what_was_expected_is_told(method: str, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        method_named(method, **settings)


def test_lists_of_json_and_whole_numbers_are_taken() -> None:
    assert vars(optimizer_named("adamw", betas=[0.5, 0.5], lr=1))["betas"] == [0.5, 0.5]
    with pytest.raises(SettingsError, match="a list of 2, each a number"):
        optimizer_named("adamw", betas=[0.5])
    assert method_named("dora", alpha=8)
