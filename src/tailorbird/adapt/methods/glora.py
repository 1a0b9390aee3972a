"""GLoRA: weight and bias are scaled and shifted, each linear in a form of its own, found by evolution.

Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning" (arXiv:2306.07967).

    y = (W + W ⊙ A + B) x + W C + D ⊙ b + E + b

The products with `A` and `D` are elementwise, as in the authors' code. `C`, `D` and `E` change the bias `b`,
and are there where the linear has one, as in PEFT. Each tensor has a form: ``lora``, a product of rank `r`;
``vector``, a number per row; ``scalar``, one number; or ``none``. Forms share their numbers: the vector is
the first column of the product's left factor, the scalar its first entry. Left factors, `D` and `E` begin at
zero, right factors uniform in Xavier's bounds.

A tensor whose form is ``any`` gets another one in each linear at each step. Before the last steps, those that
settle, the forms are searched for: of a population of random ones, those with the least losses are kept,
and their mutations and crossings are tried in turn. The best of all stand from then on. The losses are those
of the step's own examples; the authors take a validation set. Their limit of the numbers is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tailorbird.adapt.methods.adapter import OWN_TYPE, Addition, Attached, Place
from tailorbird.adapt.methods.checks import require, require_fit
from tailorbird.adapt.methods.draws import draw_seed, step_generator
from tailorbird.adapt.methods.hydra import xavier_rows
from tailorbird.adapt.methods.low_rank import attach_each

FORMS = ("none", "scalar", "vector", "lora")
NONE, SCALAR, VECTOR, LORA = range(4)
ANY = "any"
#: the forms that each tensor may have
ALLOWED = {"a": FORMS, "b": FORMS, "c": ("none", "vector", "lora"), "d": FORMS[:3], "e": FORMS[:3]}
#: a mutation draws each form anew with this probability, as the authors' does
MUTATED = 0.2
PREFIX = "base_model.model."
#: PEFT's name of the method
PEFT_TYPE = "GLORA"


class Generalized(Addition):
    """``(W ⊙ A + B) x + W C + D ⊙ b + E`` for the forms that stand.

    Attributes
    ----------
    forms : Tensor[5]
        int64: of `A`, `B`, `C`, `D` and `E`, indices into `FORMS`.
    a_up, b_up : Parameter[out_features, rank]
    a_down, b_down : Parameter[rank, in_features]
    c_up : Parameter[in_features, rank]
        This one and those below where the linear has a bias.
    c_down : Parameter[rank, 1]
    d, e : Parameter[out_features]
    """

    forms: Tensor

    def __init__(self, place: Place, rank: int, forms: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self._place = place
        bias: Any = place.module.bias
        self.biased = bias is not None
        self.register_buffer("forms", torch.tensor(forms))
        for name in ("a", "b"):
            down = xavier_rows(rank, place.in_features, generator)
            self._learn(name, torch.zeros(place.out_features, rank), down)
        if self.biased:
            down = xavier_rows(1, rank, generator).T.contiguous()
            self._learn("c", torch.zeros(place.in_features, rank), down)
            self.d = nn.Parameter(torch.zeros(place.out_features))
            self.e = nn.Parameter(torch.zeros(place.out_features))

    def _learn(self, name: str, up: Tensor, down: Tensor) -> None:
        self.register_parameter(f"{name}_up", nn.Parameter(up))
        self.register_parameter(f"{name}_down", nn.Parameter(down))

    def forward(self, x: Tensor) -> Tensor:
        delta, shift = self._changes()
        return functional.linear(x, delta.to(x.dtype), None if shift is None else shift.to(x.dtype))

    def factors(self) -> None:
        return None

    def delta(self) -> Tensor:
        return self._changes()[0].detach()

    def bias_delta(self) -> Tensor | None:
        shift = self._changes()[1]
        return None if shift is None else shift.detach()

    def _changes(self) -> tuple[Tensor, Tensor | None]:
        """Of the weight ``[out_features, in_features]``, and of a bias ``[out_features]``."""
        weight = self._place.weight().to(self.get_parameter("a_up"))
        a, b = self._product("a"), self._product("b")
        delta = torch.zeros_like(weight) if a is None else weight * a
        delta = delta if b is None else delta + b
        if not self.biased:
            return delta, None
        bias: Any = self._place.module.bias
        c = self._product("c")
        shift = weight.new_zeros(len(weight)) if c is None else (weight @ c)[:, 0]
        d, e = (self.forms[3], self.d), (self.forms[4], self.e)
        return delta, shift + _spread(*d) * bias.detach().to(shift) + _spread(*e)

    def _product(self, name: str) -> Tensor | None:
        """`a`, `b` or `c` as a matrix; None where it's nothing."""
        form = int(self.forms["abc".index(name)])
        pair = _factors(form, self.get_parameter(f"{name}_up"), self.get_parameter(f"{name}_down"))
        return None if pair is None else pair[0] @ pair[1]

    def written(self) -> dict[str, Tensor]:
        """The tensors in PEFT's layout."""
        return in_widest_forms(self.forms, dict(self.named_parameters()))


def is_glora(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's config is that of one of this method, in PEFT's layout or in its own form."""
    kind = config.get("peft_type")
    return kind == PEFT_TYPE or (kind == OWN_TYPE and config.get("method") == Glora.name)


@torch.no_grad()
def in_widest_forms(forms: Tensor, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A linear's tensors in PEFT's layout, every form as the widest one there, whose product is the same.

    Parameters
    ----------
    forms : Tensor[5]
    learned : mapping of str to Tensor
        As of `Generalized`, by their names there.
    """
    found: dict[str, Tensor] = {}
    for name, form in zip("ABC", forms[:3].tolist(), strict=True):
        if f"{name.lower()}_up" not in learned:
            continue
        own_up, own_down = (learned[f"{name.lower()}_{side}"] for side in ("up", "down"))
        up, down = torch.zeros_like(own_up), torch.zeros_like(own_down)
        pair = _factors(form, own_up, own_down)
        if pair is not None:
            up[:, : pair[0].shape[1]], down[: len(pair[1])] = pair
        found |= {f"glora_{name}.Xd": up, f"glora_{name}.Xu": down}
    for name, form in zip("DE", forms[3:], strict=True):
        if name.lower() in learned:
            one = learned[name.lower()]
            found[f"glora_{name}.X"] = _spread(form, one).expand_as(one).clone()
    return found


def _factors(form: int, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor] | None:
    """Those whose product is `A`, `B` or `C` in a form; None where it's nothing."""
    if form == NONE:
        return None
    if form == LORA:
        return up, down
    column = up[:, :1] if form == VECTOR else up[:1, :1].expand(len(up), 1)
    return column, torch.ones_like(down[:1])


def _spread(form: Tensor, vector: Tensor) -> Tensor:
    """A vector, its first entry, or zero: what is broadcast over the rows."""
    if int(form) == VECTOR:
        return vector
    return vector[:1] if int(form) == SCALAR else torch.zeros_like(vector[:1])


class AttachedGlora(Attached):
    """GLoRA on a model."""

    seed: Tensor

    def __init__(self, method: Glora, seed: Tensor) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("seed", seed)
        self._steps = 0

    def explore(self, step: int, loss: Callable[[], float]) -> None:
        if self.method.searches and step and step == self._settled():
            self._take(self._search(step_generator(self.seed, step), loss))

    def before_step(self, step: int, steps: int) -> None:
        self._steps = steps
        if self.method.searches and step < self._settled():
            self._take(self._drawn(step_generator(self.seed, step)))

    def before_trial(self) -> None:
        widest = torch.tensor([max(options) for options in self.method.options()])
        self._take(self._possible(widest.repeat(len(self.additions), 1)))

    def extra(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def take_extra(self, extra: Mapping[str, Any]) -> None:
        self._steps = int(extra["steps"])

    def files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """PEFT's where it has the method, for plain linears; else the method's own tensors."""
        linears = self._linears()
        if any(type(one._place.module) is not nn.Linear for one in linears):
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            return tensors, {"peft_type": OWN_TYPE, "method": Glora.name, "task_type": "CAUSAL_LM"}
        tensors = {
            f"{PREFIX}{one._place.path}.{name}": tensor
            for one in linears
            for name, tensor in one.written().items()
        }
        return tensors, {
            "peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
            "r": self.method.rank, "target_modules": sorted(one._place.path for one in linears),
            "config_A_B": "lora", "config_C": "lora", "config_D_E": "vector", "init_weights": True,
        }  # fmt: skip

    def _linears(self) -> list[Generalized]:
        return [one for one in self.additions.values() if isinstance(one, Generalized)]

    def _settled(self) -> int:
        """The first step whose forms stay."""
        return math.ceil((1 - self.method.settled) * self._steps)

    def _take(self, forms: Tensor) -> None:
        for own, one in zip(forms, self._linears(), strict=True):
            one.forms.copy_(own)

    def _possible(self, forms: Tensor) -> Tensor:
        """``[linears, 5]``, with nothing for a bias that isn't there."""
        for own, one in zip(forms, self._linears(), strict=True):
            if not one.biased:
                own[2:] = NONE
        return forms

    def _drawn(self, generator: torch.Generator) -> Tensor:
        """Random forms of all linears, int64 ``[linears, 5]``."""
        count = len(self.additions)
        columns = [
            torch.tensor(options)[torch.randint(len(options), (count,), generator=generator)]
            for options in self.method.options()
        ]
        return self._possible(torch.stack(columns, 1))

    def _search(self, generator: torch.Generator, loss: Callable[[], float]) -> Tensor:
        """The forms with the least loss of all that evolution tries."""
        method = self.method

        def loss_of(forms: Tensor) -> float:
            self._take(forms)
            return loss()

        tried = [self._drawn(generator) for _ in range(method.population)]
        best: list[tuple[float, Tensor]] = []
        for _ in range(method.generations):
            best = sorted([*best, *((loss_of(forms), forms) for forms in tried)], key=lambda one: one[0])
            best = best[: method.kept]
            parents = [best[int(torch.randint(len(best), (), generator=generator))][1] for _ in tried]
            tried = [
                torch.where(torch.rand(one.shape, generator=generator) < MUTATED, self._drawn(generator), one)
                if number % 2
                else torch.where(torch.rand(one.shape, generator=generator) < 0.5, one, parents[number - 1])
                for number, one in enumerate(parents)
            ]
        return best[0][1]


@dataclass(frozen=True)
class Glora:
    """GLoRA.

    Parameters
    ----------
    rank : int
    a, b, c, d, e : str
        The form of each tensor: ``none``, ``scalar`` (not of `c`), ``vector``, ``lora`` (not of `d` and `e`),
        or ``any``, to be searched for in each linear.
    settled : float
        The fraction of all steps, the last ones, with the forms that were found.
    population : int
        Forms of the whole model that are tried at a time.
    generations : int
        How often.
    kept : int
        Those with the least losses, of which the next ones are made.
    """

    name: ClassVar[str] = "glora"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "scales and shifts of weight and bias"
    paper: ClassVar[str] = "Chavan et al. 2023, arXiv:2306.07967"
    needs: ClassVar[str] = "losses of some trials"

    rank: int = 4
    a: str = ANY
    b: str = ANY
    c: str = ANY
    d: str = ANY
    e: str = ANY
    settled: float = 0.5
    population: int = 12
    generations: int = 4
    kept: int = 4

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "at least 1")
        for tensor, forms in ALLOWED.items():
            known = (*forms, ANY)
            form = getattr(self, tensor)
            require(form in known, self.name, tensor, form, "one of " + ", ".join(known))
        require(0 < self.settled < 1, self.name, "settled", self.settled, "above 0 and below 1")
        require(self.population >= 2, self.name, "population", self.population, "at least 2")
        require(self.generations >= 1, self.name, "generations", self.generations, "at least 1")
        within = 1 <= self.kept <= self.population
        require(within, self.name, "kept", self.kept, f"1 to the population, {self.population}")

    @property
    def searches(self) -> bool:
        """Whether there is a form to be found."""
        return any(getattr(self, tensor) == ANY for tensor in ALLOWED)

    def options(self) -> list[list[int]]:
        """Of each tensor the forms that it may take, as indices into `FORMS`."""
        return [
            [FORMS.index(one) for one in (forms if getattr(self, tensor) == ANY else [getattr(self, tensor)])]
            for tensor, forms in ALLOWED.items()
        ]

    def attach(self, places: Mapping[str, Place], generator: torch.Generator) -> Attached:
        """`2 * rank * (out_features + in_features)` learned numbers per linear, and more for a bias."""

        def addition(place: Place) -> Addition:
            require_fit(self.name, self.rank, place)
            return Generalized(place, self.rank, [max(one) for one in self.options()], generator)

        attached = AttachedGlora(self, draw_seed(generator))
        attach_each(places, addition, attached)
        attached.before_trial()
        return attached
