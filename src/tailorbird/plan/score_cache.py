"""Scores on disk, under everything that they depend on: score once, solve many."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import ResourceError
from tailorbird.hardware.cache import cache_directory
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json, write_tensors
from tailorbird.plan.ends import HeadStatistics
from tailorbird.plan.scores import PlaceScore, Scores

SCHEMA = 4


class ScoreCache:
    """Scores and the head's statistics of one source under one calibration, on disk."""

    def __init__(self, key: dict[str, Any]) -> None:
        """`key`: everything that the scores depend on, in JSON types."""
        digest = hashlib.sha256(json.dumps({"schema": SCHEMA, **key}, sort_keys=True).encode())
        self.directory = cache_directory() / "scores" / digest.hexdigest()[:32]

    def make_directory(self) -> None:
        """Make the directory where scores are kept, if there is none.

        Raises
        ------
        ResourceError
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"the cache {cache_directory()} can't be written ({error.strerror})",
                "a directory where scores of a source can be kept",
                "set TAILORBIRD_CACHE to one that you may write to",
            ) from error

    def load(self) -> Scores | None:
        """The cached scores, or None where there are none that can be read."""
        try:
            data = json.loads((self.directory / "scores.json").read_text())
            places = tuple(PlaceScore(**{**p, "shape": tuple(p["shape"])}) for p in data["places"])
            return Scores(places, data["ratios"], data["content_hash"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load_head(self) -> HeadStatistics:
        """Statistics of the head's input in the source."""
        judge = self._path("head-judge")
        return HeadStatistics(_read(self._path("head")), _read(judge) if judge.exists() else None)

    def load_tied(self) -> LinearStatistics:
        """Statistics by which a tied pair is rounded for both of its uses."""
        return _read(self._path("tied"))

    def save(self, scores: Scores) -> None:
        """Keep `scores`; the file appears whole."""
        self.make_directory()
        write_json(self.directory / "scores.json", asdict(scores))

    def save_head(self, head: HeadStatistics) -> None:
        """Keep the statistics of the head's input."""
        self._write("head", head.whole)
        if head.judge is not None:
            self._write("head-judge", head.judge)

    def save_tied(self, statistics: LinearStatistics) -> None:
        """Keep the statistics by which a tied pair is rounded."""
        self._write("tied", statistics)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _write(self, name: str, statistics: LinearStatistics) -> None:
        self.make_directory()
        tokens = torch.tensor([statistics.tokens])
        tensors = {"gram": statistics.gram, "mean_abs": statistics.mean_abs, "tokens": tokens}
        write_tensors(self._path(name), tensors)

    def save_errors(self, errors: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
        """Keep what the first pass measured, until the second is done."""
        self.make_directory()
        write_json(self.directory / "errors.json", {"errors": errors, "ratios": ratios})

    def load_errors(self) -> tuple[dict[str, dict[str, float]], dict[str, float]] | None:
        """What `save_errors` kept, or None."""
        try:
            data = json.loads((self.directory / "errors.json").read_text())
            return data["errors"], data["ratios"]
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _read(path: Path) -> LinearStatistics:
    """Statistics as `ScoreCache` writes them."""
    weights = Weights.open_file(path)
    tokens = int(weights.read("tokens"))
    return LinearStatistics(weights.read("gram"), None, weights.read("mean_abs"), tokens)
