"""Predictions: grow with the model and the text, and stop what can't fit with the change that would help."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tailorbird.calibrate import kept
from tailorbird.formats.packed import FloatCoding, IntegerCoding
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.plan import predict as module
from tailorbird.plan.predict import Prediction, Workload, predict
from tiny import save_model

CODINGS = (IntegerCoding(4, 64), FloatCoding())
#: Room that no disk has.
NEVER = 1 << 60


def foresee(
    directory: Path,
    windows: int = 4,
    needs: frozenset[str] = frozenset({"gram"}),
    gradients: bool = False,
    corrects: bool = False,
    output: Path | None = None,
    block_updates: tuple[int, int] = (0, 0),
    whole_updates: tuple[int, int] = (0, 0),
    whole_bytes: int = 0,
    together: int = 1,
    again: int = 0,
    static_inputs: frozenset[str] = frozenset(),
) -> Prediction:
    checkpoint = open_checkpoint(str(directory))
    anatomy = read_anatomy(checkpoint)
    shape, few = (windows, 64), (min(windows, 8), 64)
    return predict(
        Workload(
            anatomy,
            checkpoint.weights,
            shape,
            few,
            few,
            gradients,
            needs,
            corrects,
            block_updates,
            whole_updates,
            whole_bytes,
            CODINGS,
            output or directory,
            True,
            together,
            again,
            static_inputs,
        )
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "num_hidden_layers": 1}
    return save_model(tmp_path_factory.mktemp("wide"), "llama", **changes)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine at every prediction."""
    monkeypatch.setattr(module, "resident_bytes", lambda: 400 << 20)
    monkeypatch.setattr(module, "matmul_rate", lambda: 1e11)


@pytest.mark.usefixtures("steady")
def test_learning_takes_time_by_its_updates_and_memory_by_its_windows(small: Path) -> None:
    def compress(**updates: tuple[int, int]) -> tuple[float, int]:
        stages = {stage.name: stage for stage in foresee(small, **updates).stages}  # type: ignore[arg-type]
        return stages["compress"].seconds, stages["compress"].peak_rss_bytes

    plain = compress()
    for kind in ("block_updates", "whole_updates"):
        few, often, wide = (compress(**{kind: pair}) for pair in ((10, 4), (20, 4), (10, 256)))
        assert often[0] - plain[0] == pytest.approx(2 * (few[0] - plain[0]))
        assert plain[0] < few[0]
        assert few[1] == often[1]
        assert wide[1] > few[1] > plain[1]


@pytest.mark.usefixtures("steady")
def test_windows_of_blocks_take_memory_by_their_size_and_time_by_their_overlap(small: Path) -> None:
    def compress(**settings: int) -> tuple[float, int]:
        stages = foresee(small, block_updates=(10, 4), **settings).stages  # type: ignore[arg-type]
        return stages[2].seconds, stages[2].peak_rss_bytes

    plain = {stage.name: stage.seconds for stage in foresee(small).stages}["compress"]
    one, apart, again = compress(), compress(together=2), compress(together=2, again=1)
    assert apart[1] == again[1] > one[1]
    assert apart[0] == one[0]
    assert again[0] - plain == pytest.approx(2 * (one[0] - plain))


@pytest.mark.usefixtures("steady")
def test_static_scales_take_two_more_runs_of_the_blocks_that_have_them(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = read_anatomy(open_checkpoint(str(small))).blocks

    def compress(*names: str) -> float:
        return foresee(small, static_inputs=frozenset(names)).stages[2].seconds

    every = [[place.name for place in block.linears] for block in blocks]
    names = [name for block in every for name in block]
    plain, one, all_ = compress(), compress(*every[0]), compress(*names)
    assert plain < one
    assert all_ - plain == pytest.approx(len(blocks) * (one - plain))
    together = compress(*(place.name for place in blocks[0].linears if place.role in ("q", "k", "v")))
    assert together == compress(*(place.name for place in blocks[0].linears if place.role == "q")) < one
    monkeypatch.setattr(module, "SCALE_PASSES", 0)
    weights = sum(place.out_features * place.in_features for block in blocks for place in block.linears)
    runs = 2 * module.forward_flops(4 * 64, weights) / (1e11 * module.EFFICIENCY)
    assert compress(*names) - compress() == pytest.approx(runs)


@pytest.mark.usefixtures("steady")
def test_every_stage_of_a_larger_model_takes_more(small: Path, wide: Path) -> None:
    for a, b in zip(foresee(small).stages, foresee(wide).stages, strict=True):
        assert a.name == b.name
        assert a.peak_rss_bytes < b.peak_rss_bytes
        assert a.disk_bytes < b.disk_bytes
        assert a.seconds < b.seconds


@pytest.mark.usefixtures("steady")
def test_more_text_takes_disk_and_time_but_hardly_memory(wide: Path) -> None:
    few, many = foresee(wide, windows=32), foresee(wide, windows=320)
    for a, b in zip(few.stages, many.stages, strict=True):
        assert b.peak_rss_bytes == a.peak_rss_bytes
        assert b.seconds > a.seconds or a.name in ("sensitivity", "gate")
    assert many.stages[0].disk_bytes == 10 * few.stages[0].disk_bytes


@pytest.mark.usefixtures("steady")
def test_asymmetric_calibration_holds_a_second_stream(wide: Path) -> None:
    plain, paired = (foresee(wide, needs=frozenset(n)) for n in ({"gram"}, {"gram", "cross"}))
    assert paired.stages[2].disk_bytes > plain.stages[2].disk_bytes
    assert paired.stages[2].peak_rss_bytes >= plain.stages[2].peak_rss_bytes


@pytest.mark.usefixtures("steady")
def test_sketches_take_time_memory_and_disk(wide: Path) -> None:
    plain, sketched = (foresee(wide, needs=frozenset(n)) for n in ({"gram"}, {"gram", "sketch"}))
    for a, b in zip(plain.stages, sketched.stages, strict=True):
        assert (b.seconds > a.seconds) == (b.disk_bytes > a.disk_bytes) == (a.name == "compress")
    widths = 512**2, 2048**2
    factors = 4 * (
        2 * widths[0] * 4 + 3 * sum(widths)
    )  # the wide model has as many keys as queries, or fewer
    assert sketched.stages[2].disk_bytes - plain.stages[2].disk_bytes > 0.8 * factors


@pytest.mark.usefixtures("steady")
def test_too_little_memory_is_advised_on(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert foresee(wide).advice is None
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 20)
    prediction = foresee(wide)
    assert prediction.shortage is not None
    assert "of memory" in prediction.shortage
    assert prediction.advice is not None
    assert "free" in prediction.advice


@pytest.mark.usefixtures("steady")
def test_too_little_disk_is_advised_on_with_a_number_that_helps(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "ROOM", NEVER)
    needed = max(stage.disk_bytes for stage in foresee(wide, windows=320).stages)

    class Usage:
        free = needed // 2

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    prediction = foresee(wide, windows=320)
    assert prediction.advice is not None
    assert "--sequences" in prediction.advice
    fewer = int(prediction.advice.split("--sequences ")[1].split(",")[0])
    assert foresee(wide, windows=fewer).shortage is None


@pytest.mark.usefixtures("steady")
def test_gradients_take_less_time_and_more_memory_than_measuring_every_place(wide: Path) -> None:
    measured, gradients = (foresee(wide, gradients=g).stages[1] for g in (False, True))
    assert gradients.seconds < measured.seconds
    assert gradients.peak_rss_bytes > measured.peak_rss_bytes


@pytest.mark.usefixtures("steady")
def test_disk_that_the_unfinished_job_holds_counts_as_free(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    before = foresee(wide, output=tmp_path / "out")
    (tmp_path / "out.partial" / ".job").mkdir(parents=True)
    (tmp_path / "out.partial" / ".job" / "hidden-0").write_bytes(bytes(1 << 20))
    after = foresee(wide, output=tmp_path / "out")
    assert before.disk_free_bytes == 1000
    assert after.disk_free_bytes >= 1000 + (1 << 20)


@pytest.mark.usefixtures("steady")
def test_fewer_sequences_are_advised_only_where_they_help(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "ROOM", NEVER)  # what is kept where there is room leaves no shortage
    for windows, helps in ((1, False), (400, True)):
        stages = foresee(wide, windows=windows).stages
        largest = max(stages, key=lambda stage: stage.disk_bytes)
        free = int(0.9 * largest.disk_bytes)
        with monkeypatch.context() as patched:
            patched.setattr(module.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            advice = foresee(wide, windows=windows).advice or ""
        assert ("--sequences" in advice) == (helps and largest.name != "sensitivity")
        assert "larger disk" in advice


@pytest.mark.usefixtures("steady")
def test_what_would_be_kept_on_the_disk_is_foreseen_only_where_it_fits(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = frozenset({"gram", "cross"})
    roomy = foresee(wide, windows=320, needs=needs).stages[2]
    with monkeypatch.context() as patched:
        patched.setattr(kept, "ROOM", NEVER)
        anew = foresee(wide, windows=320, needs=needs).stages[2]
    assert roomy.disk_bytes > anew.disk_bytes
    assert roomy.seconds < anew.seconds
    assert roomy.peak_rss_bytes <= anew.peak_rss_bytes
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=anew.disk_bytes))
    found = foresee(wide, windows=320, needs=needs)
    assert found.stages[2] == anew
    assert found.shortage is None


@pytest.mark.usefixtures("steady")
def test_learning_a_whole_model_holds_its_states_in_memory_and_on_disk(wide: Path) -> None:
    weights = sum(p.in_features * p.out_features for p in read_anatomy(open_checkpoint(str(wide))).linears())
    none, some, more = (
        foresee(wide, whole_updates=(10, 1) if held else (0, 0), whole_bytes=held).stages[2]
        for held in (0, 1, 100)
    )
    assert none.peak_rss_bytes < some.peak_rss_bytes
    assert more.peak_rss_bytes - some.peak_rss_bytes == 99 * weights
    assert more.disk_bytes >= none.disk_bytes
    assert more.disk_bytes >= 2 * 100 * weights
