"""The card of what was tuned: what it is, where it came from and how to use it, as the Hub shows it.

Its fields are those of https://huggingface.co/docs/hub/model-cards: a base on this machine isn't named among
them, as the Hub takes ids of its own models only. Names may hold anything: fields go through a YAML writer,
texts stand in code spans that they can't leave.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tailorbird.adapt.methods.adapter import OWN_TYPE
from tailorbird.adapt.methods.glora import is_glora
from tailorbird.formats.peft import BEGINNINGS
from tailorbird.model.location import on_hub

#: Kinds of PEFT's adapters that are served.
SERVED = ("LORA", "VERA", "IA3")
#: Licences by the Hub's own names; others are ``other``, with what they call themselves.
_LICENCES = frozenset(
    (
        "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "bsl-1.0", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0",
        "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
        "creativeml-openrail-m", "ecl-2.0", "epl-2.0", "eupl-1.1", "gemma", "gpl", "gpl-2.0", "gpl-3.0",
        "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
        "mit", "mpl-2.0", "openrail", "openrail++", "unlicense", "wtfpl", "zlib",
    )
)  # fmt: skip


def card(origin: Mapping[str, Any], config: Mapping[str, Any], base_name: str) -> str:
    """README.md of an adapter's directory.

    Parameters
    ----------
    origin : mapping
        Content of tailorbird.json: ``base base_licence method data loss_before loss_after tailorbird``.
    config : mapping
        Content of adapter_config.json.
    base_name : str
        What the base was called: a directory, an id or ``demo``.

    Returns
    -------
    str
        The same for the same arguments; the base is named in the front matter if there is no directory of
        its name here.
    """
    return _page(_fields(origin, config, base_name), _sections(origin, config, base_name))


def checkpoint_card(origin: Mapping[str, Any], base_name: str) -> str:
    """README.md of a checkpoint whose own weights were tuned; parameters and result as of `card`."""
    fields = _fields(origin, {}, base_name, library="transformers", relation="finetune")
    return _page(fields, _checkpoint_sections(origin, base_name))


def _page(fields: Mapping[str, Any], sections: Iterator[str]) -> str:
    front = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", *sections]
    return "\n\n".join(parts).encode("utf-8", "replace").decode() + "\n"


def _fields(
    origin: Mapping[str, Any],
    config: Mapping[str, Any],
    base_name: str,
    library: str = "peft",
    relation: str = "adapter",
) -> dict[str, Any]:
    """The front matter."""
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if on_hub(base_name):
        fields |= {"base_model": base_name, "base_model_relation": relation}
    licence = origin.get("base_licence")
    if isinstance(licence, str) and licence:
        known = licence.lower() in _LICENCES
        fields |= {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    kind = str(config.get("peft_type") or "").lower()
    names = ["tailorbird", kind, str(origin["method"]["method"])]
    return fields | {"tags": list(dict.fromkeys(name for name in names if name))}


def _sections(origin: Mapping[str, Any], config: Mapping[str, Any], base_name: str) -> Iterator[str]:
    """The text, part by part."""
    yield f"# Adapter of {_code(base_name)}"
    yield "Tuned with tailorbird. The adapter holds what was learned; it needs the base below."
    yield _losses(origin)
    yield from _base(origin, base_name)
    yield (
        "The identity is a SHA-256 over names, shapes and some rows of the base's tensors. On other weights "
        "of the same shapes the adapter does something else."
    )
    yield from _how(origin, config)
    yield "## Use"
    if config.get("peft_type") == OWN_TYPE:
        yield from _opened(config, base_name)
    else:
        yield from _loaded_by_peft(base_name)
    if config.get("peft_type") in BEGINNINGS:
        yield from _served(base_name)
        yield "It is no change of weights: it can't be merged into them."
    elif config.get("peft_type") != OWN_TYPE:
        yield from _served_and_merged(config, base_name)
    yield f"Written by tailorbird {_code(origin['tailorbird'])}."


def _opened(config: Mapping[str, Any], base_name: str) -> Iterator[str]:
    """How an adapter of a method is used that PEFT doesn't have."""
    yield "By tailorbird, whose own method it is, `path/to/adapter` being this directory:"
    yield _fenced(
        "python",
        "from pathlib import Path\n\nfrom tailorbird.adapt.open import load_adapted\n\n"
        f'model = load_adapted({base_name!r}, Path("path/to/adapter"))',
    )
    if is_glora(config):
        yield "It isn't served."
        yield from _merged(base_name)
    else:
        yield "It isn't served, and `tailorbird adapters merge` doesn't take it."


def _loaded_by_peft(base_name: str) -> Iterator[str]:
    """How PEFT loads it."""
    yield "With [PEFT](https://huggingface.co/docs/peft), `path/to/adapter` being this directory:"
    yield _fenced(
        "python",
        "import tailorbird\nfrom peft import PeftModel\n\n"
        f"base = tailorbird.load({base_name!r})\n"
        'model = PeftModel.from_pretrained(base, "path/to/adapter")',
    )


def _served(base_name: str) -> Iterator[str]:
    """How a server has it."""
    yield "As a server that knows it as the model `tuned`:"
    serve = f"tailorbird serve {shlex.quote(base_name)} --adapter tuned=path/to/adapter"
    yield _fenced("sh", serve)


def _served_and_merged(config: Mapping[str, Any], base_name: str) -> Iterator[str]:
    """How a change of weights is used without PEFT, and becomes part of them."""
    if config.get("peft_type") in SERVED:
        yield from _served(base_name)
    if is_glora(config) or (config.get("peft_type") == "LORA" and not config.get("use_dora")):
        yield from _merged(base_name)
    else:
        yield "Merged into the weights of a base that isn't compressed:"
        yield _fenced("python", 'model.merge_and_unload().save_pretrained("path/to/merged")')


def _merged(base_name: str) -> Iterator[str]:
    """How weights take it in."""
    yield "Merged into the weights of the base, dense or packed, and what survives of it measured:"
    base = shlex.quote(base_name)
    merge = f"tailorbird adapters merge {base} path/to/adapter -o path/to/merged --data held-out.jsonl"
    yield _fenced("sh", merge)


def _checkpoint_sections(origin: Mapping[str, Any], base_name: str) -> Iterator[str]:
    """The text of a checkpoint's card, part by part."""
    yield f"# {_code(base_name)}, tuned"
    yield "Tuned with tailorbird. The weights themselves were changed; the base isn't needed."
    yield _losses(origin)
    yield from _base(origin, base_name)
    yield "The identity is a SHA-256 over names, shapes and some rows of the base's tensors."
    yield from _how(origin, {})
    yield "## Use"
    yield "With transformers, `path/to/model` being this directory:"
    yield _fenced(
        "python",
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/model")',
    )
    yield "As a server:"
    yield _fenced("sh", "tailorbird serve path/to/model")
    yield f"Written by tailorbird {_code(origin['tailorbird'])}."


def _losses(origin: Mapping[str, Any]) -> str:
    """What tuning did to the held-out loss."""
    before, after = origin.get("loss_before"), origin.get("loss_after")
    if before is None or after is None:
        return "No examples were held out: its loss on others than those that it learned isn't known."
    loss = f"Held-out loss: {before:.4f} nats per learned token before, {after:.4f} after."
    score = origin.get("score")
    if score is None:
        return loss
    return (
        f"{loss} Of {score['of']} held-out prompts, {score['before']} were completed as expected before, "
        f"{score['after']} after (score `{origin['method']['score']}`)."
    )


def _base(origin: Mapping[str, Any], base_name: str) -> Iterator[str]:
    """What was tuned."""
    yield "## Base"
    yield _list({"name": base_name, "identity": origin["base"], "licence": origin.get("base_licence")})


def _how(origin: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Data and settings."""
    settings, data = dict(origin["method"]), origin["data"]
    yield "## Data"
    counts = (
        "source", "shape", "examples", "tokens", "learned_tokens", "longest", "truncated", "dropped", "bad",
        "fingerprint",
    )  # fmt: skip
    yield _list({name: data.get(name) for name in counts})
    yield "## Settings"
    of_method = settings.pop("method_settings", None) or {}
    method = {"method": settings.pop("method")} | dict(of_method)
    yield _list(method | settings | {name: config.get(name) for name in ("peft_type", "r", "target_modules")})


def _list(entries: Mapping[str, Any]) -> str:
    """A line for each value that there is."""
    shown = {name: value for name, value in entries.items() if value not in (None, [], (), {})}
    return "\n".join(f"- {_plain(name)}: {_code(_text(value))}" for name, value in shown.items())


def _text(value: Any) -> str:
    """A value as JSON, names as they are, integers with their thousands apart."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _plain(name: str) -> str:
    """A name outside of code spans: words only."""
    return re.sub(r"\W+|_", " ", name).strip()


def _code(text: Any) -> str:
    """A code span that shows any text on one line and that it can't leave."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    fence = "`" * (_longest_run(shown) + 1)
    pad = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _fenced(language: str, text: str) -> str:
    """A block of code that the text can't leave."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """The most backticks in a row."""
    return max(map(len, re.findall("`+", text)), default=0)
