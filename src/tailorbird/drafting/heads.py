"""Drafting heads: small networks that guess tokens from what leaves a model's last norm.

Head `k` guesses the k-th token after one that is known already. It sees the hidden state ``h`` from which the
known token was chosen, and the embeddings ``e`` of the known token and of the guesses before its own, as
Hydra's heads do (https://arxiv.org/abs/2402.05109); what it adds to ``h`` begins as nothing, as in Medusa's
(https://arxiv.org/abs/2401.10774), and the model's own head reads the sum:

    z = h + out · silu(in · [h, e(known), e(guess 1), …, e(guess k−1)])

On disk: ``heads.json`` with the sizes and the model they were trained on, and ``heads.safetensors`` with
``<k>.in [width, (k + 1) · width]`` and ``<k>.out [width, width]``, float32, k from 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.model.checkpoint import write_json, write_tensors
from tailorbird.model.json_file import read_json
from tailorbird.model.weights import Weights
from tailorbird.run.fused import FusedModel

#: Files of a directory of heads.
DESCRIPTION, TENSORS = "heads.json", "heads.safetensors"
VERSION = 1


class Heads(nn.Module):
    """Heads of one model.

    Parameters
    ----------
    width : int
        Of the model's hidden states.
    count : int
        Heads, and so the places for which they guess.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width, self.count = width, count
        self.inward = nn.ModuleList(
            nn.Linear((head + 2) * width, width, bias=False) for head in range(count)
        )  # fmt: skip
        self.outward = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        for tensor in self.outward.parameters():
            nn.init.zeros_(tensor)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.parameters())

    def forward(self, head: int, hidden: Tensor, embedded: list[Tensor]) -> Tensor:
        """What the model's head reads for the guess of head `head`, counted from 0.

        Parameters
        ----------
        head : int
        hidden : Tensor[..., width]
        embedded : list of Tensor[..., width]
            The known token's embedding, and those of `head` guesses.
        """
        seen = torch.cat([hidden, *embedded[: head + 1]], dim=-1)
        return hidden + self.outward[head](nn.functional.silu(self.inward[head](seen)))

    def tensors(self) -> dict[str, Tensor]:
        """By their names on disk."""
        pairs = zip(self.inward.parameters(), self.outward.parameters(), strict=True)
        found: dict[str, Tensor] = {}
        for head, (inward, outward) in enumerate(pairs, 1):
            found |= {f"{head}.in": inward.detach(), f"{head}.out": outward.detach()}
        return found

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors in, which `tensors` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


def model_facts(model: FusedModel) -> dict[str, int]:
    """What a model must share with the one on which heads were trained."""
    return {"hidden_size": model.width, "vocab_size": int(model.head.weight.rows)}


def is_heads(directory: str | Path) -> bool:
    """Whether a directory holds heads."""
    return (Path(directory) / DESCRIPTION).is_file()


def write_heads(directory: Path, heads: Heads, facts: dict[str, Any]) -> None:
    """Write heads into a directory that exists; where the description is, the tensors are whole."""
    write_tensors(directory / TENSORS, heads.tensors())
    write_json(directory / DESCRIPTION, {"version": VERSION, "heads": heads.count, **facts})


def read_heads(directory: Path, model: FusedModel) -> Heads:
    """Read heads for a model.

    Raises
    ------
    CheckpointError
        The files are damaged or of a later version.
    SettingsError
        They were trained on a model of another size.
    """
    described = read_json(directory / DESCRIPTION)
    if described.get("version") != VERSION or not isinstance(described.get("heads"), int):
        raise CheckpointError(
            f"{directory / DESCRIPTION} of version {described.get('version')}", f"version {VERSION}",
            "train the heads again (`tailorbird draft`)",
        )  # fmt: skip
    facts = model_facts(model)
    if any(described.get(name) != value for name, value in facts.items()):
        raise SettingsError(
            f"heads in {directory} for a model of {({name: described.get(name) for name in facts})}",
            f"heads for {facts}", "train heads on this model (`tailorbird draft`)",
        )  # fmt: skip
    heads = Heads(model.width, described["heads"])
    stored = Weights.open_file(directory / TENSORS)
    wanted = heads.tensors()
    for name, tensor in wanted.items():
        if name not in stored or tuple(stored.info(name).shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{directory / TENSORS} without `{name}` {list(tensor.shape)}", "the tensors of whole heads",
                "train the heads again (`tailorbird draft`)",
            )  # fmt: skip
    heads.take({name: stored.read(name) for name in wanted})
    return heads.eval()
