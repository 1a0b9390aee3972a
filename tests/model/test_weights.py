"""Headers are believed only when they fit the file; bodies arrive exact, finite and by pread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tailorbird.errors import CheckpointError
from tailorbird.model import weights as weights_module
from tailorbird.model.safetensors_header import DTYPES
from tailorbird.model.weights import Weights
from tailorbird.model.writing import tensor_hash, write_tensors


def put(directory: Path, header: Any, body: bytes = b"", name: str = "model.safetensors") -> Path:
    """Write a safetensors file from a header (object or bytes) and a body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / name).write_bytes(len(text).to_bytes(8, "little") + text + body)
    return directory


def entry(shape: list[Any], start: int, end: int, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Weights.open(directory)
    return str(caught.value)


def every_dtype() -> dict[str, torch.Tensor]:
    """One tensor of each dtype with random bits, floats finite."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, dtype in DTYPES.items():
        if dtype == torch.bool:
            tensors[name] = torch.rand(5, 3, generator=generator) > 0.5
        elif dtype.is_floating_point:
            tensors[name] = torch.randn(4, 7, generator=generator).to(dtype)
        else:
            tensors[name] = (
                torch.randint(0, 256, (3, dtype.itemsize * 2), generator=generator)
                .to(torch.uint8)
                .view(dtype)
            )
    return tensors


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {
        **every_dtype(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(3, 0, 2),
        "none": torch.zeros(0),
    }
    save_file(
        tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "words": '{"a": "}"} \u00e9'}
    )
    weights = Weights.open(tmp_path)
    assert weights.names == sorted(tensors)
    assert weights.total_bytes == sum(t.nbytes for t in tensors.values())
    assert weights.recorded_hashes() == {}
    for name, tensor in tensors.items():
        read = weights.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert tensor_hash(read) == tensor_hash(tensor) == weights.hash(name)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64])
def test_cast_in_pieces_equals_cast_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: torch.dtype
) -> None:
    monkeypatch.setattr(weights_module, "CHUNK", 64)
    tensor = torch.randn(37, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.float8_e5m2):
        save_file({"w": tensor.to(dtype)}, tmp_path / "model.safetensors")
        weights = Weights.open(tmp_path)
        assert torch.equal(weights.read("w", target), tensor.to(dtype).to(target))
        assert torch.equal(weights.read_rows("w", 5, 30, target), tensor.to(dtype).to(target)[5:30])
        assert tensor_hash(weights.read_rows("w", 5, 30)) == tensor_hash(tensor.to(dtype)[5:30])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_rows_outside_the_tensor_are_an_index_error(tmp_path: Path, start: int, stop: int) -> None:
    save_file({"w": torch.zeros(4, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(IndexError, match="`w`"):
        Weights.open(tmp_path).read_rows("w", start, stop)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]
)
@pytest.mark.parametrize("cast", [None, torch.float32])
def test_nan_and_inf_are_refused_by_name_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, dtype: torch.dtype, cast: torch.dtype | None
) -> None:
    monkeypatch.setattr(weights_module, "CHUNK", 64)
    values = torch.ones(20, 10)
    values[13, 4] = values[19, 9] = bad
    save_file({"sound": torch.ones(3), "spoilt": values.to(dtype)}, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    weights.read("sound", cast)
    with pytest.raises(CheckpointError, match=r"`spoilt` holds (nan|inf|-inf) at flat index 134"):
        weights.read("spoilt", cast)
    with pytest.raises(CheckpointError, match="index 134"):
        weights.read_rows("spoilt", 13, 14, cast)
    weights.read_rows("spoilt", 0, 13, cast)


def test_values_that_a_narrower_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, 1e6])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"too large for torch\.float16"):
        Weights.open(tmp_path).read("w", torch.float16)


def test_booleans_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {"mask": entry([3], 0, 3, "BOOL")}, b"\x00\x01\x02")
    with pytest.raises(CheckpointError, match="`mask` holds booleans"):
        Weights.open(tmp_path).read("mask")


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor `v`"):
        Weights.open(tmp_path).read("v")


@pytest.mark.parametrize("missing", [1, 4, 100])
def test_truncation_says_how_many_bytes_are_missing(tmp_path: Path, missing: int) -> None:
    save_file({"w": torch.zeros(100)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-missing])
    assert f"truncated: {missing} bytes are missing" in refused(tmp_path)


def test_truncated_header_says_how_many_bytes_are_missing(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[: 8 + length - 7])
    assert "truncated: 7 bytes of the header are missing" in refused(tmp_path)


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
HEADERS: list[tuple[str, Any, int, str]] = [
    ("trailing bytes", {"a": entry([2], 0, 2)}, 5, "3 bytes follow the last tensor"),
    ("overlap", {"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, 6, "`b` overlaps `a`"),
    ("same place", {"a": entry([4], 0, 4), "b": entry([4], 0, 4)}, 4, "overlaps"),
    ("hole", {"a": entry([2], 0, 2), "b": entry([2], 4, 6)}, 6, "`b` leaves a hole after `a`"),
    ("hole at first", {"a": entry([2], 2, 4)}, 4, "`a` leaves a hole after the header"),
    ("span", {"a": entry([2], 0, 3)}, 3, "`a`: its bytes run from 0 to 3"),
    ("backwards", {"a": entry([2], 3, 1)}, 3, "`a`: its bytes run"),
    ("overflow", {"a": entry([1 << 32, 1 << 32], 0, 0)}, 0, "`a`"),
    ("overflow beside zero", {"a": entry([1 << 62, 1 << 62, 0], 0, 0)}, 0, "`a`: shape"),
    ("negative size", {"a": entry([-1, -2], 0, 2)}, 2, "`a`: shape"),
    ("size as text", {"a": entry(["2"], 0, 2)}, 2, "`a`: shape"),
    ("size as bool", {"a": entry([True, 2], 0, 2)}, 2, "`a`: shape"),
    ("size as float", {"a": entry([2.0], 0, 2)}, 2, "`a`: shape"),
    ("endless shape", {"a": entry([1] * 17, 0, 1)}, 1, "`a`: shape"),
    ("huge offset", {"a": entry([2], 1 << 70, (1 << 70) + 2)}, 2, "`a`: data_offsets"),
    ("three offsets", {"a": {**entry([2], 0, 2), "data_offsets": [0, 1, 2]}}, 2, "`a`: data_offsets"),
    ("dtype", {"a": entry([2], 0, 2, "F4")}, 2, "`a`: dtype 'F4'"),
    ("dtype as list", {"a": entry([2], 0, 2, ["U8"])}, 2, "`a`: dtype"),
    ("missing key", {"a": {"dtype": "U8", "shape": [2]}}, 2, "`a`: its entry has the keys"),
    ("extra key", {"a": {**entry([2], 0, 2), "code": "x"}}, 2, "`a`: its entry has the keys"),
    ("nested", {"a": {**entry([2], 0, 2), "x": {}}}, 2, "header"),
    ("entry as list", {"a": []}, 0, "header"),
    ("list", [], 0, "header"),
    ("nothing", {}, 0, "holds no tensor"),
    ("only metadata", {"__metadata__": {"a": "b"}}, 0, "holds no tensor"),
    ("metadata as list", {"__metadata__": []}, 0, "header"),
    ("metadata value", {"__metadata__": {"a": 1}}, 0, "header"),
    ("empty name", {"": entry([2], 0, 2)}, 2, "is called ''"),
    ("escape in name", {"a\x1b[31m": entry([2], 0, 2)}, 2, "printable ASCII"),
    ("twice", b'{"a":' + EMPTY + b',"a":' + EMPTY + b"}", 0, "`a` occurs twice"),
    ("key twice", b'{"a":{"dtype":"U8",' + EMPTY[1:] + b"}", 0, "'dtype' occurs twice"),
    ("second object", b"{}{}", 0, "something follows"),
    ("comma", b'{"a":' + EMPTY + b",}", 0, "header"),
    ("not UTF-8", b'{"\xff":' + EMPTY + b"}", 0, "header"),
    ("endless number", b'{"a":' + EMPTY.replace(b"[0]", b"[" + b"9" * 4000 + b"]") + b"}", 0, "shape"),
    ("unknown hash", {"__metadata__": {"sha256:b": "0" * 64}, "a": entry([2], 0, 2)}, 2, "recorded for `b`"),
    ("no hash", {"__metadata__": {"sha256:b": "x"}, "b": entry([2], 0, 2)}, 2, "`sha256:b`"),
    ("half the hashes", {"__metadata__": {"sha256:a": "0" * 64}, "a": entry([1], 0, 1),
     "b": entry([0], 1, 1)}, 1, "none for `b`"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "body", "words"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_impossible_headers_are_refused_by_name(tmp_path: Path, header: Any, body: int, words: str) -> None:
    put(tmp_path, header, bytes(body))
    assert words in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, b"\xff\xff\xff\x7f\0\0\0\0{}"])
def test_impossible_lengths_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(tmp_path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refused(tmp_path)


def test_a_file_cut_after_opening_is_an_error(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(100)}, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 150)
    with pytest.raises(CheckpointError, match="ends within tensor `w`"):
        weights.read("w")


# --- shards --------------------------------------------------------------------------------------


def shard(directory: Path, places: dict[str, Any], files: dict[str, list[str]]) -> Path:
    """Write shards that hold the named tensors, and an index that claims `places`."""
    for file, names in files.items():
        save_file({name: torch.full((3,), float(len(name))) for name in names}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    shard(
        tmp_path,
        {"a": "x.safetensors", "bb": "y.safetensors"},
        {"x.safetensors": ["a"], "y.safetensors": ["bb"]},
    )
    weights = Weights.open(tmp_path)
    assert weights.names == ["a", "bb"]
    assert [file.name for file in weights.files] == ["x.safetensors", "y.safetensors"]
    assert torch.equal(weights.read("bb"), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("places", "files", "words"),
    [
        ({"a": "x.safetensors"}, {}, "x.safetensors: the file is missing"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, {"x.safetensors": ["a"]}, "`b` is in no shard"),
        ({"a": "x.safetensors"}, {"x.safetensors": ["a", "b"]}, "`b` is not in the index"),
        (
            {"a": "y.safetensors", "b": "x.safetensors"},
            {"x.safetensors": ["a"], "y.safetensors": ["b"]},
            "`a` lies in `x.safetensors`",
        ),
        (
            {"a": "x.safetensors", "b": "y.safetensors"},
            {"x.safetensors": ["a"], "y.safetensors": ["a", "b"]},
            "`a` lies in `x.safetensors` too",
        ),
        ({"a": "../x.safetensors"}, {}, "'../x.safetensors'"),
        ({"a": "/etc/x.safetensors"}, {}, "'/etc/x.safetensors'"),
        ({"a": ".."}, {}, "'..'"),
        ({"a": "model.bin"}, {}, "'model.bin'"),
        ({"a": 3}, {}, "said to lie in 3"),
        ({}, {}, "weight_map"),
    ],
)
def test_contradictions_of_the_index_are_named(
    tmp_path: Path, places: dict[str, Any], files: dict[str, list[str]], words: str
) -> None:
    shard(tmp_path, places, files)
    assert words in refused(tmp_path)


def test_a_directory_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    assert "model.safetensors" in refused(tmp_path)


# --- hashes --------------------------------------------------------------------------------------


def test_verify_finds_each_changed_byte_and_names_the_tensor(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "model.safetensors", {"a": torch.arange(50), "b": torch.arange(9, dtype=torch.uint8)}
    )
    weights = Weights.open(tmp_path)
    weights.verify()
    for name in ("a", "b"):
        info = weights.info(name)
        sound = info.file.read_bytes()
        for place in (info.offset, info.offset + info.nbytes - 1):
            changed = bytearray(sound)
            changed[place] ^= 1
            info.file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=f"the body of tensor `{name}` was changed"):
                Weights.open(tmp_path).verify()
        info.file.write_bytes(sound)


def test_verify_of_a_tensor_without_hash_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    weights = Weights.open(tmp_path)
    weights.verify()
    with pytest.raises(CheckpointError, match="no hash is recorded for tensor `a`"):
        weights.verify(["a"])


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import os, sys
from pathlib import Path
import torch
from tailorbird.errors import TailorbirdError
from tailorbird.model.weights import Weights
torch.set_num_threads(1)
def field(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
def work(directory, dtype):
    try:
        weights = Weights.open(Path(directory))
        if dtype != "headers":
            return weights.read("w", getattr(torch, dtype))
    except TailorbirdError:
        pass
for argument in sys.argv[1:]:
    directory, dtype = argument.split("@")
    if os.fork():
        os.wait()
        continue
    if dtype != "headers":
        work(os.environ["WARM"], dtype)  # the code's own pages
    open("/proc/self/clear_refs", "w").write("5")
    before = field("VmRSS")
    kept = work(directory, dtype)
    print(field("VmHWM") - before, flush=True)
    os._exit(0)
"""


def peaks(warm: Path, *arguments: str) -> list[int]:
    """Peak of resident bytes, file pages included, above what was there before; one process for each."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env={**os.environ, "WARM": str(warm)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in done.stdout.split()]


def test_reading_takes_no_more_than_the_result_and_pieces(tmp_path: Path) -> None:
    values = 40 << 20
    (tmp_path / "warm").mkdir()
    for directory, count in ((tmp_path, values), (tmp_path / "warm", 1000)):
        save_file({"w": torch.ones(count, dtype=torch.bfloat16)}, directory / "model.safetensors")
    wide, same = peaks(tmp_path / "warm", f"{tmp_path}@float32", f"{tmp_path}@bfloat16")
    # a piece, whether it is finite, and what that check makes on the way
    assert values * 4 < wide < values * 4 + 6 * weights_module.CHUNK
    assert values * 2 < same < values * 2 + 6 * weights_module.CHUNK


def many(count: int, pattern: bytes) -> bytes:
    return b",".join(pattern % number for number in range(count))


HOSTILE = {
    "brackets": b"[" * (6 << 20),
    "objects": b'{"a":' * (1 << 20),
    "shape": b'{"a":{"shape":' + b"[" * (6 << 20),
    "string": b'{"' + b'\\"' * (3 << 20) + b'":1}',
    "entries": b"{" + many(100_000, b'"%d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}') + b"}",
    "sizes": b"{"
    + many(60_000, b'"%d":{"dtype":"I8","shape":[0,0,0,0,0,0,0,0],"data_offsets":[0,0]}')
    + b"}",
    "hashes": b'{"__metadata__":{' + many(60_000, b'"sha256:%d":"' + b"0" * 64 + b'"') + b"}}",
    "metadata": b'{"__metadata__":{' + many(500_000, b'"%d":""') + b"}}",
    "wide": b'{"__metadata__":{"a":"' + "é😀".encode() * (1 << 20) + b'"}}',
}


def test_a_hostile_header_takes_less_than_twice_its_file(tmp_path: Path) -> None:
    for name, header in HOSTILE.items():
        (tmp_path / name).mkdir()
        put(tmp_path / name, header)
    measured = dict(
        zip(HOSTILE, peaks(tmp_path, *(f"{tmp_path / name}@headers" for name in HOSTILE)), strict=True)
    )
    over = {name: peak for name, peak in measured.items() if peak > 2 * len(HOSTILE[name]) + (2 << 20)}
    assert not over
