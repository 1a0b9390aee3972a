"""Train the model that ships as ``demo``: a small Llama that writes Python.

Data: the source text of Python's own standard library, read from the interpreter that runs this
script. Held out are the modules whose file name has an md5 that is 0 modulo 40. The optimizer is
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices inside the
blocks and AdamW for the embedding and the norms; the learning rate is constant and falls linearly
to zero over the last third of the steps.

Every step is a function of (seed, step) alone, and the state is saved every ``--save-every`` steps,
so the same command continues a run that was stopped. The last third may also be started earlier:
run it again with a smaller ``--steps`` that is still beyond the saved step and not past its decay.

    python scripts/train_demo_model.py --out build/demo --steps 3000
    python scripts/train_demo_model.py --out build/demo --publish src/tailorbird/model/demo
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 512
END = "<|endoftext|>"
LARGEST_MODULE_BYTES = 400_000  # longer files are generated tables
DECAY = 1 / 3


def is_held_out(path: Path) -> bool:
    """True where the md5 of the module's file name is 0 modulo 40."""
    return int(hashlib.md5(path.name.encode()).hexdigest(), 16) % 40 == 0


def standard_library() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) lists of (path relative to the library, source text)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "__pycache__"} & set(path.parts):
            continue
        if path.stat().st_size > LARGEST_MODULE_BYTES:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < 64:
            continue
        target = held_out if is_held_out(path) else training
        target.append((path.relative_to(root).as_posix(), text))
    return training, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of `VOCABULARY` tokens; token 0 ends a module."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one row of token ids (uint16), each ended by `END`."""
    rows = []
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch(texts[start : start + 64]):
            rows.append(np.array([*encoding.ids, 0], dtype=np.uint16))
    return np.concatenate(rows)


def prepare(out: Path, seed: int) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Tokenizer, training tokens and held-out tokens; made once and kept in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_file, tokens_file = out / "tokenizer.json", out / "tokens.npz"
    if not tokens_file.exists():
        training, held_out = standard_library()
        order = np.random.default_rng(seed).permutation(len(training))
        tokenizer = train_tokenizer([text for _, text in training])
        tokenizer.save(str(tokenizer_file))
        arrays = {
            "training": encode(tokenizer, [training[i][1] for i in order]),
            "held_out": encode(tokenizer, [text for _, text in held_out]),
        }
        np.savez(out / "tokens.tmp.npz", **arrays)
        os.replace(out / "tokens.tmp.npz", tokens_file)
    with np.load(tokens_file) as arrays:
        return Tokenizer.from_file(str(tokenizer_file)), arrays["training"], arrays["held_out"]


def build_model(seed: int) -> LlamaForCausalLM:
    """5.8 M parameters; residual projections start smaller, as in GPT-2."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def batch_at(tokens: np.ndarray, step: int, batch: int, seed: int) -> torch.Tensor:
    """The windows of one step, `[batch, CONTEXT + 1]`: a fresh permutation and offset per epoch."""
    windows = (len(tokens) - CONTEXT - 1) // CONTEXT
    per_epoch = windows // batch
    epoch, index = divmod(step, per_epoch)
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(CONTEXT))
    chosen = generator.permutation(windows)[index * batch : (index + 1) * batch]
    rows = [tokens[s : s + CONTEXT + 1] for s in (int(w) * CONTEXT + offset for w in chosen)]
    rows = [r if len(r) == CONTEXT + 1 else tokens[-CONTEXT - 1 :] for r in rows]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean nats per token of `[batch, length + 1]` ids."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_perplexity(model: LlamaForCausalLM, tokens: np.ndarray, device: str, limit: int) -> float:
    windows = min(limit, (len(tokens) - 1) // CONTEXT)
    total = 0.0
    for w in range(windows):
        row = tokens[w * CONTEXT : (w + 1) * CONTEXT + 1].astype(np.int64)
        total += float(loss_of(model, torch.from_numpy(row)[None].to(device)))
    return math.exp(total / windows)


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over 50 steps, constant, then linear to zero over the last third."""
    return min(1.0, (step + 1) / 50, (steps - step) / (steps * DECAY))


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    out = Path(arguments.out)
    _, training, held_out = prepare(out, arguments.seed)
    device = arguments.device
    model = build_model(arguments.seed).to(device)
    training_loss = torch.compile(loss_of) if arguments.compile else loss_of
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [group["lr"] for o in optimizers for group in o.param_groups]
    step, seconds = 0, 0.0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        step, seconds = state["step"], state["seconds"]
        if arguments.steps * (1 - DECAY) < step and arguments.steps != state["steps"]:
            print(f"note: the decay of {arguments.steps} steps would have begun before step {step}")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        task = progress.add_task("", total=arguments.steps, completed=step)
        while step < arguments.steps:
            began = time.perf_counter()
            factor = learning_rate_factor(step, arguments.steps)
            groups = [group for o in optimizers for group in o.param_groups]
            for group, rate in zip(groups, base_rates, strict=True):
                group["lr"] = rate * factor
            rows = batch_at(training, step, arguments.batch, arguments.seed).to(device)
            total = 0.0
            for part in rows.split(arguments.micro_batch):
                loss = training_loss(model, part) * (len(part) / len(rows))
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds += time.perf_counter() - began
            progress.update(task, completed=step, description=f"loss {total:.3f}")
            if step % arguments.save_every == 0 or step == arguments.steps:
                perplexity = held_out_perplexity(model, held_out, device, 64)
                record = {
                    "step": step, "tokens": step * arguments.batch * CONTEXT, "seconds": round(seconds),
                    "loss": total, "held_out_perplexity": perplexity,
                }  # fmt: skip
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
                progress.console.print(record)
                state = {
                    "step": step, "seconds": seconds, "steps": arguments.steps,
                    "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                }  # fmt: skip
                torch.save(state, out / "state.tmp")
                os.replace(out / "state.tmp", state_file)


CARD = """# demo

A Llama of {parameters:,} parameters that continues Python source. It ships so that every command
works without a network; it is not meant for anything else.

| | |
|---|---|
| architecture | {layers} blocks, width 256, feed-forward 768, 4 heads of 64 (2 key/value heads), context {context}, tied embeddings, bf16 |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, trained on the same text |
| data | source text of the standard library of Python {python}, {modules:,} modules, {training_tokens:,} tokens |
| held out | the {held_out_modules} modules whose file name has md5 mod 40 = 0, {held_out_tokens:,} tokens |
| tokens seen | {seen:,} ({epochs:.2f} epochs) in {minutes:.0f} minutes on {threads} CPU thread(s) |
| held-out perplexity | {perplexity:.2f} per token, windows of {context}, whole held-out text, bf16 weights |
| licence | weights Apache-2.0; the text they were trained on is under the PSF licence |
| made by | `python scripts/train_demo_model.py --out DIR --steps {steps} --batch {batch} --compile`, seed {seed} |

`calibration.jsonl` and `held_out.jsonl` hold text of the same library (PSF licence): modules that
the model was trained on, and modules that it never saw.
"""


def publish(arguments: argparse.Namespace) -> None:
    """Write the model in Hugging Face layout, its card and its two texts to `--publish`."""
    out, target = Path(arguments.out), Path(arguments.publish)
    target.mkdir(parents=True, exist_ok=True)
    raw, training, held_out = prepare(out, arguments.seed)
    state = torch.load(out / "state.pt", weights_only=True)
    model = build_model(arguments.seed)
    model.load_state_dict(state["model"])
    model = model.to(torch.bfloat16)
    perplexity = held_out_perplexity(model.float(), held_out, "cpu", 1 << 30)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END, bos_token=END, pad_token=END, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(target)
    modules, held_out_modules = standard_library()
    seen = state["step"] * arguments.batch * CONTEXT
    (target / "README.md").write_text(
        CARD.format(
            parameters=model.num_parameters(), layers=model.config.num_hidden_layers,
            context=CONTEXT, vocabulary=VOCABULARY, python=platform.python_version(),
            modules=len(modules), training_tokens=len(training), held_out_modules=len(held_out_modules),
            held_out_tokens=len(held_out), seen=seen, epochs=seen / len(training),
            minutes=state["seconds"] / 60, threads=arguments.threads, perplexity=perplexity,
            steps=state["step"], batch=arguments.batch, seed=arguments.seed,
        )
    )  # fmt: skip
    for name, source, limit in (
        ("calibration", modules, 320_000),
        ("held_out", held_out_modules, 200_000),
    ):
        order = np.random.default_rng(arguments.seed + 1).permutation(len(source))
        kept, size = [], 0
        for i in order:
            path, text = source[i]
            if "/test" in path or path.startswith("test") or not 2_000 < len(text) < 60_000:
                continue
            kept.append(json.dumps({"module": path, "text": text}))
            size += len(text)
            if size > limit:
                break
        (target / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
    print(f"{target}: held-out perplexity {perplexity:.3f}, {len(kept)} held-out documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", required=True, help="working folder: tokens, state, log")
    parser.add_argument("--publish", help="write the finished model here instead of training")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens per step")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (needs a compiler)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    publish(arguments) if arguments.publish else train(arguments)


if __name__ == "__main__":
    main()
