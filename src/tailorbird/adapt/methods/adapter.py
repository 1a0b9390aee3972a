"""What every way of tuning is to the step and to the disk.

A `Method` is a frozen dataclass of settings, one file each. Called with a model it attaches itself and gives
an `Attached`: the parameters that are learned, and what happens around each update. Most methods add
something to the output of linears:

    y = W x + addition(x)

An `Addition` is that for one linear. It begins as nothing, so that tuning begins at the model as it is, where
the method's `needs` don't say otherwise. It can say which change of the weight it is (`delta`), in factors
where its rank is low (`factors`): what merging, serving and other tools need. One that chooses by its input
(a mixture of experts) is no change of the weight: it `merges` not, and says so when asked for `delta`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from tailorbird.errors import SettingsError

if TYPE_CHECKING:
    from tailorbird.adapt.optimizers.rule import Rule
    from tailorbird.model.weights import Weights

#: How gradients are shortened that are there one tensor at a time: by the norm of all of them, for which they
#: are computed twice; each by its own norm; or value by value.
Clipping = Literal["all", "tensor", "value"]

#: `peft_type` of an adapter that is the tensors of its method.
OWN_TYPE = "TAILORBIRD"


class Addition(nn.Module, ABC):
    """What one linear's output gains: a linear function of its input and maybe a constant, if it `merges`.

    Parameters are float32 whatever the model's dtype; `forward` computes in the dtype of its input.

    Attributes
    ----------
    merges : bool
        Whether weight and bias of the linear can take the addition in; where not, `factors` gives None and
        `delta` raises.
    needs_output : bool
        Whether `forward` takes the linear's own output, bias included, as second argument ``output``.
    """

    merges: ClassVar[bool] = True
    needs_output: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of `x`."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``up [out_features, rank]`` and ``down [rank, in_features]``, float32, whose product is `delta`.

        None where the change isn't of low rank.
        """

    def delta(self) -> Tensor:
        """The change of the weight, ``[out_features, in_features]`` float32.

        Raises
        ------
        SettingsError
            The addition is no change of the weight (`merges` is False).
        """
        if not self.merges:
            raise SettingsError(
                f"a merge of {type(self).__name__}",
                "an addition that is a linear function of its input",
                "keep it beside the weight, or tune with a method that merges",
            )
        factors = self.factors()
        if factors is None:
            raise NotImplementedError
        up, down = factors
        return up @ down

    def bias_delta(self) -> Tensor | None:
        """The change of the linear's bias, ``[out_features]`` float32; None where there is none."""
        return None


@dataclass(frozen=True)
class Place:
    """A linear to which something may be added.

    Attributes
    ----------
    path : str
        Of the module in the model.
    role : str
        As of the anatomy: ``q k v o gate up down fc1 fc2 …``.
    block : int
    in_features, out_features : int
    module : nn.Module
        `nn.Linear` or `CompressedLinear`; reading ``module.weight`` of the latter dequantizes it.
    transposed : bool
        The weight is stored as ``[in_features, out_features]``, as GPT-2's.
    """

    path: str
    role: str
    block: int
    in_features: int
    out_features: int
    module: nn.Module
    transposed: bool = False

    def weight(self) -> Tensor:
        """``[out_features, in_features]`` float32, no gradient; dequantized where it's packed."""
        weight: Any = self.module.weight
        if self.transposed:
            weight = weight.T
        return weight.detach().as_subclass(Tensor).float()


class Attached(nn.Module):
    """A method on a model: what is learned, and what happens around an update; every hook may stay as it is.

    The module's parameters are those that are learned. Its buffers and parameters, by `state_dict`, with
    `extra`, are all that changes while tuning: what a checkpoint keeps. `take_extra` comes before
    `load_state_dict`, so that shapes that changed are there when the tensors come.

    Attributes
    ----------
    additions : nn.ModuleDict
        `Addition` by the path of its linear, dots replaced by ``/``.
    rule : Rule or None
        The optimizer where none is chosen; None for the one that adapters get.
    clipping : Clipping or None
        How gradients are shortened where each parameter is updated as soon as its gradient is there, which is
        then freed; None where all are updated together.
    prompt_tokens, prefix_tokens : int
        Learned tokens that each example begins with, which the model reads (`prompt`), and learned places
        before each example's first one, of which there are only keys and values (`prefix`).
    weighs_tokens : bool
        Whether `penalty` depends on all tokens that are read, so that none may be added to them.
    reversible : bool
        Whether blocks compute their inputs from their outputs: none then keeps an input to be computed again,
        and no example is read in chunks, whose keys and values would need gradients of their own.
    """

    rule: Rule | None = None
    clipping: Clipping | None = None
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    weighs_tokens: bool = False
    reversible: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.additions = nn.ModuleDict()

    def addition(self, path: str) -> Addition | None:
        """Of one linear, or None."""
        found: Any = dict(self.additions.items()).get(path.replace(".", "/"))
        return found

    def add(self, path: str, addition: Addition) -> None:
        """Take in what a linear's output gains."""
        self.additions[path.replace(".", "/")] = addition

    def learned(self) -> list[nn.Parameter]:
        """All parameters that are learned at some step."""
        return [one for one in self.parameters() if one.requires_grad]

    def learned_at_once(self) -> list[nn.Parameter]:
        """Those that are learned in one step, where they are most: the optimizer has states of no others."""
        return self.learned()

    def changed(self) -> Mapping[str, Tensor] | None:
        """The model's own tensors that change, by their names in the model.

        None for a method that leaves them as they are, and whose result is an adapter.
        """
        return None

    def low_rank_parts(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What a checkpoint with `changed` tensors gets beside packed linears: up and down, by path."""
        return {}

    def prompt(self) -> Tensor | None:
        """Embeddings of the tokens that each example begins with, ``[prompt_tokens, width]``, or None."""
        return None

    def prefix(self) -> Tensor | None:
        """Keys and values that each example's tokens see before their own, or None.

        ``[blocks, 2, prefix_tokens, kv_heads, head_dim]``, keys as they are scored: already rotated.
        """
        return None

    def begin(self, read: Callable[[int], None], weights: Weights) -> None:
        """Before all, and again where a tuning goes on: the model may be changed by what it reads.

        Parameters
        ----------
        read : callable
            Runs the model over so many tokens of the examples, the first ones in order, without gradients.
        weights : Weights
            The model's files.
        """

    def conclude(self) -> bool:
        """Tuning is over, and what was best is in place.

        True where model and additions were changed since, so that the losses on the way aren't theirs.
        """
        return False

    def explore(self, step: int, loss: Callable[[], float]) -> None:
        """Before `before_step`; `loss` is the model's on a batch, without gradients.

        Costs nothing where a method doesn't call it.
        """

    def before_step(self, step: int, steps: int) -> None:
        """A step begins, the first being 0 of `steps`."""

    def before_trial(self) -> None:
        """After `before_step`, where a pass is only tried: what takes the most memory shall be learned."""

    def forgotten(self) -> Iterable[nn.Parameter]:
        """Parameters whose states the optimizer drops now; asked after each `before_step`."""
        return ()

    def penalty(self) -> Tensor | None:
        """What is added to the mean loss of what was just read, a scalar with a gradient, or None."""
        return None

    def after_gradients(self, step: int) -> None:
        """All gradients of a step are there; they may be changed, and parameters be chosen by them."""

    def after_update(self, step: int) -> None:
        """The optimizer has updated the parameters."""

    def resized(self) -> Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]] | None:
        """Parameters that `after_update` or `take_extra` replaced by others of another shape, or None.

        Old to new ones, each with the rows of the old one that the new one kept, int64: the optimizer's
        states follow. The kept rows are the first ones of the new parameter, in that order; those after
        them are new. Asked once after each of both.
        """
        return None

    def extra(self) -> dict[str, Any]:
        """Numbers and texts beyond the tensors that resuming needs, in JSON types."""
        return {}

    def take_extra(self, extra: Mapping[str, Any]) -> None:
        """Restore what `extra` gave."""

    def files(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and config of an adapter's directory in PEFT's layout.

        None where its changes are of low rank and nothing else is learned: then it's written as a LoRA.
        """
        return None


class Method(Protocol):
    """A way of tuning: settings, and `attach`.

    Attributes
    ----------
    name : str
    family, kind : str
        ``adapter``, or ``full`` where the model's own weights change; what is learned, in a few words.
    paper : str
        Authors, year and address.
    needs : str
        ``nothing``, ``gradients of …``, ``text`` …
    """

    name: ClassVar[str]
    family: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str]

    def attach(self, places: Mapping[str, Place], generator: torch.Generator) -> Attached:
        """What is learned for these linears, by their paths; random numbers come from `generator`.

        All tensors lie on the CPU, whatever device holds the model, and may be moved from there.
        """
        ...


class ModelMethod(Protocol):
    """A way of tuning that changes modules of the model by itself; attributes as of `Method`."""

    name: ClassVar[str]
    family: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str]

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """What is learned for these linears of the model, which is changed for it and stays so."""
        ...
