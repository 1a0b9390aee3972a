"""A made-up content of report.json in the shape that `fit` writes; the numbers mean nothing."""

from __future__ import annotations

import math
from typing import Any

ROLES = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)} | {
    "gate": (768, 256),
    "up": (768, 256),
    "down": (256, 768),
}


def wobble(i: int) -> float:
    """A number between 0 and 1 that looks random and never changes."""
    return (math.sin(12.9898 * i + 4.1) * 43758.5453) % 1.0


def sample(blocks: int = 8, with_frontier: bool = True) -> dict[str, Any]:
    """A complete report of a small model with `blocks` blocks."""
    places, sensitivity = [], []
    choices = [(2, 32), (3, 64), (4, 64), (4, 128), (5, 64), (6, 64), (8, 128)]
    for block in range(blocks):
        for i, (role, (out_features, in_features)) in enumerate(ROLES.items()):
            n = block * len(ROLES) + i
            depth = 1.5 * math.exp(-block / 2) + 0.4 * math.exp((block - blocks) / 1.5)
            coefficient = 0.04 * (0.3 + depth) * (1.8 if role in ("v", "down") else 0.7) * (0.6 + wobble(n))
            bits, group = choices[min(6, int(2.2 + math.log10(coefficient / 0.02) * 3 + wobble(n + 7)))]
            error = 0.9 * 4.0**-bits * (0.7 + wobble(n + 3))
            name = f"model.layers.{block}.{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj"
            places.append(
                {
                    "name": name,
                    "role": role,
                    "block": block,
                    "shape": [out_features, in_features],
                    "coding": {
                        "kind": "integer",
                        "bits": bits,
                        "group_size": group,
                        "symmetric": False,
                        "scale_dtype": "bfloat16",
                    },
                    "bytes": out_features * in_features * bits // 8
                    + out_features * (in_features // group) * 3,
                    "predicted": {"error": error, "kl": coefficient * error},
                    "measured": {"error": error * (0.8 + 0.55 * wobble(n + 11))},
                }
            )
            sensitivity.append({"name": name, "block": block, "role": role, "coefficient": coefficient})
    places.append(
        {
            "name": "model.embed_tokens",
            "role": "embedding",
            "block": None,
            "shape": [4096, 256],
            "coding": {"kind": "integer", "bits": 8, "group_size": 64, "symmetric": False},
            "bytes": 4096 * 256 + 4096 * 4 * 3,
            "predicted": {"error": 2e-5, "kl": 4e-5},
            "measured": {"error": 2.2e-5},
        }
    )
    sensitivity.append({"name": "model.embed_tokens", "block": None, "role": "embedding", "coefficient": 1.9})
    weight_bytes = sum(place["bytes"] for place in places) + 2 * 256 * (2 * blocks + 1)
    parameters = sum(place["shape"][0] * place["shape"][1] for place in places) + 256 * (2 * blocks + 1)
    kv_bytes = 2 * 128 * 2 * blocks * 512
    edges = [10 ** (-7 + 0.2 * i) for i in range(41)]
    counts = [round(4000 * math.exp(-((i - 21) ** 2) / 38) * (0.85 + 0.3 * wobble(i))) for i in range(40)]
    frontier = None
    if with_frontier:
        frontier = [
            {
                "bytes": round(parameters * bpw / 8),
                "predicted_kl": 1.3 * 2.9**-bpw,
                "measured_kl": 1.5 * 2.9**-bpw * (0.9 + 0.2 * wobble(round(10 * bpw))),
                "label": f"{bpw:g} bpw",
            }
            for bpw in (2.5, 3.0, 3.5, 4.25, 5.0, 6.5)
        ]
    return {
        "result": {
            "output": "out/python-8m",
            "budget_bytes": weight_bytes + kv_bytes + 21_000,
            "total_bytes": weight_bytes + kv_bytes,
            "weight_bytes": weight_bytes,
            "kv_bytes": kv_bytes,
            "bits_per_weight": 8 * weight_bytes / parameters,
            "perplexity_before": 5.8132,
            "perplexity_after": 5.9417,
            "kl_mean": 0.01834,
            "kl_p99": 0.2164,
            "top1_agreement": 0.9471,
            "predicted": {"kl": 0.0161, "peak_rss_bytes": 412_000_000, "seconds": 66.0},
            "seconds": 71.3,
            "peak_rss_bytes": 420_500_000,
            "checks": [
                {
                    "name": "stored tensors",
                    "passed": True,
                    "detail": "57 places within 1.5×",
                },
                {"name": "unquantized tensors", "passed": True, "detail": "17 tensors bit-equal"},
                {
                    "name": "tokenizer",
                    "passed": True,
                    "detail": "equal ids and strings",
                },
                {"name": "total KL", "passed": True, "detail": "0.0183 ≤ 3 × 0.0161 + 0.001"},
            ],
            "speed": {
                "source_decode_tokens_per_s": 182.0,
                "result_decode_tokens_per_s": 341.0,
                "ratio": 1.8736,
                "paths": {"int4 planes": 31, "int8 rows": 9, "reference": 17},
            },
            "report": "out/python-8m/report.html",
            "warnings": [],
        },
        "plan": {
            "schema": 1,
            "tailorbird": "0.1.0",
            "source": {
                "model": "/models/python-8m",
                "architecture": "llama",
                "parameters": parameters,
                "licence": "apache-2.0",
                "fingerprint": "9b1c54f2aa08d4e3" * 4,
                "content_hash": "01fe77c2b9d0a386" * 4,
            },
            "budget": {
                "text": "30%",
                "total_bytes": 4_000_000,
                "kv_bytes": kv_bytes,
                "context": 512,
                "concurrency": 1,
            },
            "method": {
                "name": "gptq",
                "block_size": 128,
                "damping": 0.01,
                "act_order": True,
                "asymmetric": True,
            },
            "target": None,
            "calibration": {
                "source": "data/python",
                "tokens": 32768,
                "sequences": 64,
                "length": 512,
                "documents": 41,
                "licence": "PSF-2.0",
                "fingerprint": "aa" * 32,
            },
            "evaluation": {
                "source": "data/python-heldout",
                "tokens": 32768,
                "sequences": 64,
                "length": 512,
                "documents": 12,
            },
            "machine": {},
            "versions": {
                "tailorbird": "0.1.0",
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "python": "3.11.9",
            },
            "seed": 0,
            "places": places,
        },
        "kl_histogram": {"edges": edges, "counts": counts},
        "frontier": frontier,
        "sensitivity": sensitivity,
        "candidates": {},
        "probe": {
            "cores": 2,
            "simd": ["avx2", "avx512f", "avx512_vnni"],
            "memory_bytes": 25_200_000_000,
            "read_bandwidth": 18.2e9,
            "copy_bandwidth": 11.4e9,
            "disk_bandwidth": 1.6e9,
            "matmul": {"float32": 118e9, "bfloat16": 310e9, "int8": 420e9},
            "devices": [],
        },
        "calibration_halves_kl": 0.00212,
        "command": "tailorbird fit models/python-8m --memory 30% --context 512 -o out/python-8m --frontier",
        "stages": [
            {
                "name": name,
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "predicted_seconds": 0.9 * seconds,
                "seconds": seconds,
            }
            for name, predicted, measured, seconds in (
                ("statistics", 298_000_000, 291_000_000, 11.2),
                ("sensitivity", 391_000_000, 399_000_000, 24.0),
                ("allocate", 210_000_000, 208_000_000, 0.31),
                ("compress", 352_000_000, 360_000_000, 22.5),
                ("gate", 412_000_000, 420_500_000, 13.3),
            )
        ],
    }


def hostile() -> dict[str, Any]:
    """A refused result whose every text tries to be markup, with most optional parts missing."""
    attack = "<script>alert('x')</script>\"'><img src=http://example.org/x onerror=alert(1)>"
    report = sample(blocks=2)
    report["plan"]["source"]["model"] = attack
    report["plan"]["calibration"]["source"] = attack
    report["plan"]["versions"] = {attack: attack}
    report["command"] = f"tailorbird fit {attack}"
    report["result"]["warnings"] = [attack, f"SLOWER than its source: {attack}"]
    report["result"]["checks"][0] = {"name": attack, "passed": False, "detail": attack, "place": attack}
    report["result"]["speed"] = {"ratio": 0.5, "paths": [attack]}
    for entry in [*report["plan"]["places"], *report["sensitivity"]]:
        entry["name"] = attack
        entry["role"] = attack + "$\\frac{$"
    for point in report["frontier"]:
        point["label"] = attack + "$x_{$"
    report["stages"][0]["name"] = attack
    return report
