"""A method around another: everything is the inner one's, but what the outer one changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tailorbird.adapt.methods.adapter import Attached, Method
from tailorbird.errors import SettingsError
from tailorbird.model.weights import Weights


def require_wrappable(name: str, method: Method) -> None:
    """Refuse an inner method that adds nothing to linears by itself.

    Raises
    ------
    SettingsError
        It changes modules of the model instead.
    """
    if not hasattr(method, "attach"):
        raise SettingsError(
            f"{name} around `{method.name}`, which changes the model's modules by itself",
            "a method that adds to linears, such as lora",
            "set another `method`",
        )


class Wrapped(Attached):
    """Passes every hook on to `inner`, whose additions are these.

    Attributes
    ----------
    inner : Attached
    """

    def __init__(self, inner: Attached) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        # not registered, so that no tensor of the inner one stands in the state twice
        self.__dict__["additions"] = inner.additions
        self.prompt_tokens, self.prefix_tokens = inner.prompt_tokens, inner.prefix_tokens
        self.weighs_tokens = self.weighs_tokens or inner.weighs_tokens

    def prompt(self) -> Tensor | None:
        return self.inner.prompt()

    def prefix(self) -> Tensor | None:
        return self.inner.prefix()

    def begin(self, read: Callable[[int], None], weights: Weights) -> None:
        self.inner.begin(read, weights)

    def conclude(self) -> bool:
        return self.inner.conclude()

    def explore(self, step: int, loss: Callable[[], float]) -> None:
        self.inner.explore(step, loss)

    def before_step(self, step: int, steps: int) -> None:
        self.inner.before_step(step, steps)

    def before_trial(self) -> None:
        self.inner.before_trial()

    def penalty(self) -> Tensor | None:
        return self.inner.penalty()

    def after_gradients(self, step: int) -> None:
        self.inner.after_gradients(step)

    def after_update(self, step: int) -> None:
        self.inner.after_update(step)

    def resized(self) -> Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]] | None:
        return self.inner.resized()

    def extra(self) -> dict[str, Any]:
        return self.inner.extra()

    def take_extra(self, extra: Mapping[str, Any]) -> None:
        self.inner.take_extra(extra)

    def files(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.inner.files()
