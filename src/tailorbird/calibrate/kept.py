"""What one pass over a block leaves on disk for the next ones, so that they don't compute it again.

A block is run over all calibration windows once for each group of its linears, as each group is treated
before the input of the next one is known. What runs before such a group gives in each pass what it gave in
the pass before, to the bit: here it is read instead, for as long as there is room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from tailorbird.calibrate.activations import VALUE_BYTES, ActivationFile
from tailorbird.calibrate.ledger import Ledger
from tailorbird.model.anatomy import BlockAnatomy, LinearPlace
from tailorbird.model.outline import replaced_forward

#: Free room on the disk over what is kept on it, at least.
ROOM = 2


def input_bytes(block: BlockAnatomy, tokens: int) -> int:
    """Bytes of all inputs of a block's linears over `tokens`."""
    widths = {place.shares_input: place.in_features for place in block.linears}
    return VALUE_BYTES * tokens * sum(widths.values())


def output_bytes(block: BlockAnatomy, tokens: int) -> int:
    """Bytes of all outputs of a block's linears over `tokens`."""
    return VALUE_BYTES * tokens * sum(place.out_features for place in block.linears)


def has_room(free: int, kept: int) -> bool:
    """Whether so many bytes are kept where so many are free on the disk."""
    return free >= ROOM * kept


class KeptInputs:
    """Inputs of the linears of a block over all windows, from one pass in which the block stays as it is.

    Parameters
    ----------
    ledger : Ledger
        Among whose hidden states the files lie.
    block : BlockAnatomy
    windows, length : int
    """

    def __init__(self, ledger: Ledger, block: BlockAnatomy, windows: int, length: int) -> None:
        widths = {place.shares_input: place.in_features for place in block.linears}
        self._files = {
            key: ledger.new_stream(f"input-{key}", windows, length, width) for key, width in widths.items()
        }

    @contextmanager
    def passing(self, linears: Mapping[str, nn.Module], start: int, stop: int) -> Iterator[None]:
        """While windows `start` to `stop` run through the block, what `linears` read is written.

        `linears` holds, for each input, one of those that share it.
        """

        def write(key: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            file = self._files[key]
            file.write(start, inputs[0].detach().reshape(stop - start, file.length, file.width))

        with ExitStack() as hooks:
            for key in self._files:
                hooks.callback(linears[key].register_forward_pre_hook(partial(write, key)).remove)
            yield

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Input of the linears that share `key`, ``[stop - start, length, in_features]``."""
        return self._files[key].read(start, stop)

    def drop(self) -> None:
        """Delete the files."""
        for file in self._files.values():
            file.drop()


class KeptOutputs:
    """Outputs of those linears of a block that won't change any more.

    The first pass after a linear was handed over writes what it gives, later ones read it. A pass takes all
    windows in order.

    Parameters
    ----------
    ledger, windows, length
        As for `KeptInputs`.
    """

    def __init__(self, ledger: Ledger, windows: int, length: int) -> None:
        self._ledger, self._windows, self._length = ledger, windows, length
        self._modules: dict[str, nn.Module] = {}
        self._files: dict[str, ActivationFile] = {}
        self._written: dict[str, int] = {}

    def keep(self, place: LinearPlace, module: nn.Module) -> None:
        """Hand over a linear that has its final weight."""
        name = place.name
        self._modules[name] = module
        self._files[name] = self._ledger.new_stream(
            f"output-{name}", self._windows, self._length, place.out_features
        )
        self._written[name] = 0

    @contextmanager
    def passing(self, start: int, stop: int) -> Iterator[None]:
        """While windows `start` to `stop` run through the block, linears that were handed over are read."""
        functions: list[Callable[..., Tensor]] = [
            partial(self._output, name, start, stop) for name in self._modules
        ]
        with replaced_forward(list(self._modules.values()), functions):
            yield

    def _output(self, name: str, start: int, stop: int, x: Tensor) -> Tensor:
        file = self._files[name]
        if self._written[name] == self._windows:
            return file.read(start, stop).view(*x.shape[:-1], file.width)
        module = self._modules[name]
        compute: Callable[[nn.Module, Tensor], Tensor] = type(module).forward
        output = compute(module, x)
        file.write(start, output.reshape(stop - start, self._length, file.width))
        self._written[name] = stop
        return output

    def drop(self) -> None:
        """Delete the files."""
        for file in self._files.values():
            file.drop()
