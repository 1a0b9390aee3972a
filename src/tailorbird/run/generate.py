"""Text from a loaded model: one prompt continued as a stream, or many sequences sampled at once.

Both walk the same way: the prompt goes through the model once, then one token per sequence and step, with
keys and values kept. Randomness is one uniform number per token, drawn on the CPU from the seed and turned
into a token by inverting the distribution, so that neither batch nor device changes which numbers a sequence
gets.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.kernels import sampling
from tailorbird.progress import Progress, Silent
from tailorbird.run.fused import FusedModel, obstacle
from tailorbird.run.graphs import GraphDecoding
from tailorbird.run.pages import Pages

logger = logging.getLogger("tailorbird")

#: What a decoder writes for bytes that are no UTF-8, such as the first half of a character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Tokens that a stream of text holds back, and how many of them may still belong to a character.
MOST_PENDING, STILL_OPEN = 16, 8


@dataclass(frozen=True)
class Generation:
    """One continued prompt.

    Attributes
    ----------
    text : str
        What was generated, without the prompt and special tokens.
    tokens : list of int
        Generated token ids, without the stop token that ended them.
    seconds : float
        From the first token read to the last one written.
    """

    text: str
    tokens: list[int]
    seconds: float


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, dense or compressed.
    tokenizer : transformers.PreTrainedTokenizerBase
    prompt : str
    max_tokens : int
        Most tokens to generate.
    temperature : float
        0 takes the likeliest token each time; otherwise tokens are drawn from softmax(logits / temperature).
    seed : int
        Of the draws; the same seed gives the same text.
    stop : collection of int, optional
        Token ids that end the text; by default the end tokens of model and tokenizer.
    on_text : callable, optional
        Called with each new piece of text as soon as it consists of whole characters. The pieces together
        are the text.

    Returns
    -------
    Generation

    Raises
    ------
    SettingsError
        Empty prompt, prompt and `max_tokens` beyond the model's context, or a setting out of range.
    CheckpointError
        The model's logits aren't finite.
    """
    _check_temperature(temperature)
    _check_positive("max_tokens", max_tokens)
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        raise SettingsError(f"prompt {prompt!r}", "a prompt of at least one token", "give a longer prompt")
    context = context_length(model)
    if context is not None and len(ids) + max_tokens > context:
        room = context - len(ids)
        raise SettingsError(
            f"a prompt of {len(ids)} tokens and max_tokens {max_tokens}",
            f"at most {context} tokens together, the context of this model",
            f"set max_tokens to {room} or less" if room > 0 else "shorten the prompt",
        )
    ends = stop_tokens(model, tokenizer) if stop is None else set(stop)
    draws = _uniform(1, max_tokens, seed)
    text = TextStream(tokenizer)
    tokens: list[int] = []
    pieces: list[str] = []

    def emit(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    start = time.perf_counter()
    decoding = decode(model, len(ids) + max_tokens)
    fed = torch.tensor([ids])
    for step in range(max_tokens):
        token = int(choose(decoding.read(fed), temperature, draws[:, step]))
        if token in ends:
            break
        tokens.append(token)
        emit(text.push(token))
        fed = torch.tensor([[token]])
    emit(text.finish())
    return Generation("".join(pieces), tokens, time.perf_counter() - start)


def sample_text(
    model: Any,
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Sample text from the model itself at temperature 1.

    Each sequence starts with the tokenizer's begin token, or with a random one where it has none. Special
    tokens and ids that the tokenizer doesn't know are never drawn, so that no sequence ends early.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    sequences, length : int
        How many, of how many tokens each (the first one included).
    seed : int
    batch : int
        Sequences that go through the model together; which uniform numbers a sequence gets doesn't depend
        on it.
    progress : Progress, optional
        One stage, one step per token position and batch.

    Returns
    -------
    LongTensor ``[sequences, length]``

    Raises
    ------
    SettingsError
        A number below 1, or `length` beyond the model's context.
    CheckpointError
        The model's logits aren't finite.
    """
    for name, value in (("sequences", sequences), ("length", length), ("batch", batch)):
        _check_positive(name, value)
    context = context_length(model)
    if context is not None and length > context:
        raise SettingsError(
            f"sequences of {length} tokens",
            f"at most {context} tokens, the context of this model",
            f"set the length to {context} or less",
        )
    progress = progress or Silent()
    groups = range(0, sequences, batch)
    progress.stage("sample text", len(groups) * length)
    vocabulary = model.config.get_text_config().vocab_size
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[: min(vocabulary, len(tokenizer))] = True
    allowed[[i for i in tokenizer.all_special_ids if i < vocabulary]] = False
    draws = _uniform(sequences, length, seed)
    ids = torch.empty(sequences, length, dtype=torch.long)
    begin = tokenizer.bos_token_id
    for start in groups:
        rows = slice(start, min(start + batch, sequences))
        if begin is None:
            ordinary = allowed.nonzero()[:, 0]
            ids[rows, 0] = ordinary[(draws[rows, 0] * len(ordinary)).long()]
        else:
            ids[rows, 0] = begin
        progress.advance()
        decoding = decode(model, length)
        for position in range(1, length):
            logits = decoding.read(ids[rows, position - 1 : position])
            logits.masked_fill_(~allowed, -math.inf)
            ids[rows, position] = choose(logits, 1.0, draws[rows, position])
            progress.advance()
    return ids


class Decoding(Protocol):
    """A model part-way through some sequences: what it has read so far is kept as keys and values."""

    def read(self, ids: Tensor) -> Tensor:
        """Read more tokens of each sequence.

        Parameters
        ----------
        ids : LongTensor ``[sequences, tokens]``
            What follows the tokens read before.

        Returns
        -------
        float32 Tensor ``[sequences, vocab]``
            Logits of the next token, on the CPU.
        """


def decode(model: Any, capacity: int | None = None) -> Decoding:
    """A fresh decoding: compiled blocks where a compressed model allows it, else its modules.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    capacity : int, optional
        Most tokens of a sequence. Where it is given, the modules of a model on a CUDA device are replayed
        from a graph (`graphs`), and longer sequences refused; compiled blocks make room for it beforehand.
    """
    if capacity is not None and _on_one_gpu(model):
        return GraphDecoding(model, capacity)
    reason = obstacle(model)
    if reason is None:
        return FusedDecoding(FusedModel(model), capacity or 0)
    logger.info("decoding through the model's modules: %s", reason)
    return ModuleDecoding(model)


def _on_one_gpu(model: Any) -> bool:
    tensors = itertools.chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and devices.pop().type == "cuda"


class FusedDecoding:
    """Decoding through compiled blocks, of sequences of which so many tokens are foreseen."""

    def __init__(self, model: FusedModel, capacity: int = 0) -> None:
        self.model, self.capacity = model, capacity
        self.pages: Pages | None = None
        self.length = 0
        # of single tokens, which read keeps from step to step
        self._positions = self._sequences = torch.empty(0, dtype=torch.int32, device="cpu")

    def read(self, ids: Tensor) -> Tensor:
        """See `Decoding`."""
        sequences, tokens = ids.shape
        if self.pages is None:
            self.pages = self.model.pages(sequences, self.capacity)
            self._positions = torch.empty(sequences, dtype=torch.int32, device="cpu")
            self._sequences = torch.arange(sequences, dtype=torch.int32, device="cpu")
        start, self.length = self.length, self.length + tokens
        self.pages.reach(self.length)
        ids = ids.reshape(-1)
        if tokens == 1:
            self._positions.numpy().fill(start)
            return self.model.step(ids, self._positions, self._sequences, self.pages, reach=self.length)
        positions = torch.arange(start, self.length, dtype=torch.int32, device="cpu").repeat(sequences)
        wanted = torch.arange(1, sequences + 1, device="cpu") * tokens - 1
        owners = self._sequences.repeat_interleave(tokens)
        return self.model.step(ids, positions, owners, self.pages, wanted, reach=self.length)


class ModuleDecoding:
    """Decoding through the model's own modules."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """See `Decoding`."""
        output = self.model(
            input_ids=ids.to(self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float().cpu()


def choose(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
    """The next token of each sequence.

    Parameters
    ----------
    logits : float32 Tensor ``[sequences, vocab]``
        −inf forbids a token.
    temperature : float
        0 takes the likeliest.
    draws : float64 Tensor ``[sequences]``
        Uniform in [0, 1): where `temperature` isn't 0, the token is the first at which the cumulated
        probability exceeds it.

    Returns
    -------
    LongTensor ``[sequences]``

    Raises
    ------
    CheckpointError
        A sequence's largest logit isn't finite.
    """
    if temperature == 0 and sampling.available():
        # PyTorch's max and argmax take ten times as long.
        rules = [sampling.Rule(temperature=0.0) for _ in range(len(logits))]
        found = sampling.choose(logits, rules, torch.get_num_threads())
        if any(chosen.problem is not None for chosen in found):
            raise _not_finite()
        return torch.tensor([chosen.token for chosen in found], device="cpu")
    largest = logits.max(-1, keepdim=True).values
    if not bool(torch.isfinite(largest).all()):
        raise _not_finite()
    if temperature == 0:
        return logits.argmax(-1)
    # The largest is taken off before the division, which a tiny temperature would let overflow.
    weights = ((logits - largest).double() / temperature).exp()
    cumulated = weights.cumsum(-1)
    targets = draws[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, targets, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest next token of each sequence; the rest is as of `choose`."""
    return choose(logits, 0.0, torch.empty(0, dtype=torch.float64, device="cpu"))


def _not_finite() -> CheckpointError:
    return CheckpointError(
        "this model's logits are not finite",
        "finite logits for every token read",
        "compare the checkpoint with its source (`tailorbird evaluate`) and make it again",
    )


class TextStream:
    """Turns tokens into text as they come, holding back what may still change.

    A token may end in the middle of a UTF-8 character, and some decoders treat the first word of a sequence
    differently. So each new piece is what decoding adds to the text of the tokens before it, with the last
    piece's tokens as context, and waits for as long as the text ends in a replacement character. Of bytes
    that never become a character, all but the last few tokens are settled once `MOST_PENDING` wait.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Take one token; return the text that is certain now, often none."""
        self._pending.append(token)
        piece = self._piece()
        if piece and not piece.endswith(REPLACEMENT):
            return self._accept(piece)
        return self._settled() if len(self._pending) > MOST_PENDING else ""

    def finish(self) -> str:
        """Return what was held back: bytes that never became a character show as replacement characters."""
        return self._accept(self._piece())

    def _settled(self) -> str:
        """What later tokens can't change: a character has at most four bytes."""
        settled, waiting = self._pending[:-STILL_OPEN], self._pending[-STILL_OPEN:]
        known, until = (len(self._decode(self._context + tokens)) for tokens in ([], settled))
        text = self._decode(self._context + self._pending)[known:until]
        self._context, self._pending = settled, waiting
        return text

    def _piece(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _accept(self, piece: str) -> str:
        if piece:
            self._context, self._pending = self._pending, []
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def context_length(model: Any) -> int | None:
    """Most tokens that the config of a model or checkpoint allows, or None where it states no limit."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a text, from the generation config, the config and the tokenizer together."""
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    for stated in (getattr(config, "eos_token_id", None) for config in configs):
        found.update(stated if isinstance(stated, list | tuple) else [] if stated is None else [stated])
    return found


def _uniform(rows: int, columns: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 ``[rows, columns]``."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name} {value!r}", "a whole number of at least 1", f"set {name} to 1 or more")


def _check_temperature(value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise SettingsError(
            f"temperature {value!r}",
            "0 for the likeliest token each time, or a positive number",
            "set it between 0 and 2",
        )
