"""Recipes: what a line or a file says is what is built, and what is wrong is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tailorbird import api
from tailorbird.compress.blocks.signround import SignRound
from tailorbird.compress.recipe import make_recipe, parse_recipe, planned_recipe, recipe_of_plan
from tailorbird.compress.whole.distil import Distil
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    Coding,
    DoubleCoding,
    IntegerCoding,
    TableCoding,
)
from tailorbird.kernels.reference import SIMULATED
from tailorbird.linear import FoldMethod
from tailorbird.linear.correct.eora import Eora
from tailorbird.linear.quantize.awq import Awq
from tailorbird.linear.quantize.bcq import Bcq
from tailorbird.linear.quantize.billm import Billm
from tailorbird.linear.quantize.decoupleq import Decoupleq
from tailorbird.linear.quantize.fptq import Fptq
from tailorbird.linear.quantize.ganq import Ganq
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.higgs import Higgs
from tailorbird.linear.quantize.leanquant import Leanquant
from tailorbird.linear.quantize.quantease import Quantease
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.linear.quantize.smoothing import Smoothing
from tailorbird.linear.rotate.hadamard import Hadamard
from tailorbird.plan.planfile import Method, Plan


@pytest.mark.parametrize(
    ("line", "method", "coding", "fold"),
    [
        ("gptq:bits=4,group=64", Gptq(), IntegerCoding(4, 64), None),
        ("rtn:bits=8,group=0,symmetric=true,clip_search=false", Rtn(False), IntegerCoding(8, 0, True), None),
        ("awq+gptq:bits=4,group=64", Gptq(), IntegerCoding(4, 64), Awq()),
        ("awq+rtn:bits=3,group=128", Rtn(), IntegerCoding(3, 128), Awq()),
        ("quantease:bits=3,sweeps=4,start=rtn", Quantease(sweeps=4, start="rtn"), IntegerCoding(3, 64), None),
        ("leanquant:bits=3,exponent=3.0", Leanquant(exponent=3.0), IntegerCoding(3, 64), None),
        ("awq+decoupleq:bits=2,group=64,rounds=2", Decoupleq(rounds=2), IntegerCoding(2, 64), Awq()),
        ("rtn:codebook=nf4,group=32", Rtn(), CodebookCoding("nf4", 32), None),
        ("fptq+rtn:codebook=fp4,group=128", Rtn(), CodebookCoding("fp4", 128), Fptq()),
        ("smoothing+rtn:bits=8,smoothing.alpha=0.8", Rtn(), IntegerCoding(8, 64), Smoothing(0.8)),
        ("ganq:table=3", Ganq(), TableCoding(3), None),
        ("bcq:table=2,rounds=0", Bcq(rounds=0), TableCoding(2), None),
        ("rtn:codebook=nf4,double=true", Rtn(), DoubleCoding("nf4", 64), None),
        ("rtn:codebook=fp4,group=32,double=true", Rtn(), DoubleCoding("fp4", 32), None),
        ("rtn:codebook=nf4,group=32,double=false", Rtn(), CodebookCoding("nf4", 32), None),
        ("leanquant:table=2,exponent=3.0", Leanquant(exponent=3.0), TableCoding(2), None),
        ("billm:binary=true,group=128", Billm(), BinaryCoding(128), None),
        (
            "billm:binary=true,group=128,static_groups=true",
            Billm(static_groups=True),
            BinaryCoding(128),
            None,
        ),
        ("rtn:binary=true,table_dtype=float16", Rtn(), BinaryCoding(64, "float16"), None),
        ("rtn:table=4,table_dtype=float16", Rtn(), TableCoding(4, "float16"), None),
        ("gptq:codebook=nf4,scale_dtype=float16", Gptq(), CodebookCoding("nf4", 64, "float16"), None),
    ],
)
def test_a_line(line: str, method: object, coding: Coding, fold: FoldMethod | None) -> None:
    recipe = parse_recipe(line)
    assert (recipe.method, recipe.coding, recipe.fold) == (method, coding, fold)
    assert recipe.name == line.partition(":")[0]


def test_a_file_says_the_same_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: gptq\nfold: awq\ncoding: {bits: 4, group_size: 64}\n")
    assert parse_recipe(str(path)) == parse_recipe("awq+gptq:bits=4,group=64")
    path.write_text("method: gptq\nfold: awq\nfold_settings: {grid: 7}\ncoding: {bits: 4}\n")
    assert parse_recipe(str(path)).fold == Awq(grid=7)
    path.write_text("method: rtn\ncoding: {codebook: nf4}\nembedding: {codebook: nf4, group_size: 32}\n")
    recipe = parse_recipe(str(path))
    assert (recipe.coding, recipe.embedding) == (CodebookCoding("nf4", 64), CodebookCoding("nf4", 32))


def test_rounded_inputs_are_asked_for_in_a_line_and_in_a_file(tmp_path: Path) -> None:
    line = parse_recipe("smoothing+gptq:bits=8,group=0,activation=int8")
    assert (line.activation, parse_recipe("gptq:bits=8").activation) == ("int8", None)
    assert [parse_recipe(f"gptq:bits=8,activation={to}").activation for to in SIMULATED] == list(SIMULATED)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "method: gptq\nfold: smoothing\ncoding: {bits: 8, group_size: 0}\nactivation: int8\n"
        "fold_settings: {alpha: 0.5}\n"
    )
    assert parse_recipe(str(path)) == line


def test_settings_stand_behind_the_method_that_they_belong_to(tmp_path: Path) -> None:
    line = parse_recipe("gptq+signround+distil:bits=3,damping=0.1,signround.steps=7,distil.steps=9")
    assert (line.method, line.block, line.whole) == (Gptq(damping=0.1), SignRound(steps=7), Distil(steps=9))
    corrected = parse_recipe("awq+gptq+eora+signround:bits=3,eora.rank=4")
    assert (corrected.fold, corrected.correction) == (Awq(), Eora(rank=4))
    path = tmp_path / "recipe.yaml"
    path.write_text("method: gptq\ncorrection: eora\ncorrection_settings: {rank: 4}\ncoding: {bits: 3}\n")
    assert parse_recipe(str(path)) == parse_recipe("gptq+eora:bits=3,eora.rank=4")
    path.write_text(
        "method: gptq\nsettings: {damping: 0.1}\nblock: signround\nblock_settings: {steps: 7}\n"
        "whole: distil\nwhole_settings: {steps: 9}\ncoding: {bits: 3}\n"
    )
    assert parse_recipe(str(path)) == line


def test_a_rotation_stands_before_all_else(tmp_path: Path) -> None:
    line = parse_recipe("hadamard+awq+gptq+signround:bits=3,group=64,hadamard.seed=7")
    assert (line.rotation, line.fold, line.method) == (Hadamard(seed=7), Awq(), Gptq())
    assert line.rotation_facts == {"name": "hadamard", "seed": 7}
    assert parse_recipe("gptq:bits=3").rotation_facts is None
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "rotation: hadamard\nrotation_settings: {seed: 7}\nfold: awq\nmethod: gptq\nblock: signround\n"
        "coding: {bits: 3, group_size: 64}\n"
    )
    assert parse_recipe(str(path)) == line


def test_a_fold_brings_its_needs_and_is_part_of_the_description() -> None:
    folded, plain = make_recipe("awq+rtn"), make_recipe("rtn")
    assert (folded.needs, plain.needs) == ({"gram"}, frozenset())
    assert make_recipe("awq+gptq").needs == make_recipe("gptq").needs == {"gram", "cross"}
    descriptions = [
        recipe.describe() for recipe in (folded, plain, make_recipe("awq+rtn", fold_settings={"grid": 3}))
    ]
    assert all(descriptions.count(description) == 1 for description in descriptions)


def test_every_method_of_rounding_can_stand_in_a_recipe() -> None:
    rows = api.methods("quantize")
    assert {row.name for row in rows if row.kind == "fold"} == {
        "awq", "smoothing", "fptq", "cfp", "outliertune",
    }  # fmt: skip
    joined = {"fold": "{}+gptq", "block method": "gptq+{}", "model method": "gptq+{}"}
    for row in rows:
        name = "rtn+flatquant" if row.name == "flatquant" else joined.get(row.kind, "{}").format(row.name)
        assert make_recipe(name).name == name


@pytest.mark.parametrize(
    "name",
    ["gptq", "awq+rtn", "leanquant+signround", "awq+decoupleq+signround+distil", "hadamard+awq+rtn"],
)
def test_a_plan_gives_back_the_recipe(name: str) -> None:
    recipe = make_recipe(name, fold_settings={"grid": 3} if "awq" in name else None)
    plan = Plan.model_construct(method=Method.model_validate(recipe.describe()))
    assert recipe_of_plan(plan) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("awq:bits=4", "`awq`, in which nothing rounds"),
        ("awq+signround:bits=4", "in which nothing rounds"),
        ("gptq+awq:bits=4", r"`awq` in `gptq\+awq`.*in that order"),
        ("awq+hadamard+gptq:bits=4", r"`hadamard` in `awq\+hadamard\+gptq`.*in that order"),
        ("gptq+hadamard:bits=4", "`hadamard` in .*in that order"),
        ("hadamard:bits=4", "`hadamard`, in which nothing rounds"),
        ("hadamard+gptq:bits=4,hadamard.sed=1", "setting `sed` of hadamard.*did you mean `seed`"),
        ("gptq:bits=4,hadamard.seed=1", "setting `hadamard.seed` of gptq"),
        ("gptq+distil+signround:bits=4", "`signround` in .*in that order"),
        ("awk+gptq:bits=4", "method `awk`.*awq"),
        ("awq+awq+gptq:bits=4", r"`awq` in `awq\+awq\+gptq`"),
        ("gptq+signround:bits=4,signround.step=3", "setting `step` of signround.*did you mean `steps`"),
        ("gptq+signround:bits=4,signround.steps=0", "steps 0 of signround"),
        ("gptq:bits=4,signround.steps=5", "setting `signround.steps` of gptq"),
        ("gptq:bits=4,gptq.damping=5.0", "setting `gptq.damping` of gptq"),
        ("awq+gtpq:bits=4", "gtpq.*gptq"),
        ("+gptq:bits=4", "method ``"),
        ("awq+gptq:bits=4,grid=5", r"setting `grid` of awq\+gptq"),
        ("gptq+signround:bits=4,static_groups=false", "act_order and without static_groups.*what learns"),
        ("gptq", "no bits"),
        ("gptq:bits=8,activation=int6", "activation 'int6'.*`int8`, `int4`, `fp8`"),
        ("gptq:bits=8,activation=8", "activation 8 .*`int8`"),
        ("gptq:bits=8,activatoin=int8", "`activatoin` of gptq.*did you mean `activation`"),
        ("ganq:table=3,activation=int8", "activation int8 beside weights of table3.*leave out activation"),
        ("smoothing+gptq:bits=8,smoothing.alpha=2.0", "alpha 2.0 of smoothing"),
        ("fptq+gptq:bits=8,fptq.alpha=0.5", "setting `alpha` of fptq"),
        ("outliertune+gptq:bits=8,outliertune.alpha=0.5", "setting `alpha` of outliertune"),
        ("gptq:bits=4,grup=64", "`grup` of gptq.*did you mean `group`"),
        ("gptq:bit=4,group=64", "`bit` of gptq.*did you mean `bits`"),
        ("rtn:bits=4,clip_serch=true", "`clip_serch` of rtn.*did you mean `clip_search`"),
        ("rtm:bit=4", "method `rtm` is unknown.*did you mean `rtn`"),
        ("rtn:codebook=nf5", "codebook 'nf5'.*one of nf4"),
        ("rtn:codebook=gauss2x5", "codebook 'gauss2x5'.*gauss2x4"),
        ("rtn:codebook=gauss2x4,double=true", "double with gauss2x4"),
        ("rtn:codebok=nf4", "`codebok` of rtn.*did you mean `codebook`"),
        ("rtn:codebook=nf4,bits=4", "'bits'.*`codebook`"),
        ("rtn:codebook=nf4,symmetric=true", "'symmetric'"),
        ("ganq:bits=4", "`ganq` for codes of int4 g64.*table=4"),
        ("bcq:bits=4", "`bcq` for codes of int4 g64.*table=4"),
        ("ganq:codebook=nf4", "`ganq` for codes of nf4 g64"),
        ("gptq:codebook=nf4,double=true", "`gptq` for codes of nf4 g64 double.*take rtn"),
        ("rtn:bits=4,double=true", "double without a codebook.*codebook=nf4,group=64,double=true"),
        ("rtn:codebook=nf4,double=2", "double 2.*true or false"),
        ("rtn:codebook=nf4,double=true,scale_dtype=float16", "'scale_dtype'.*`double`"),
        ("awq+rtn:codebook=nf4,double=true", "`awq.rtn` with codes for scales.*leave out the fold"),
        ("rtn+signround:codebook=nf4,double=true", "`rtn.signround` with codes for scales"),
        ("rtn:codebook=nf4,double=true,activation=int8", "activation int8 beside weights of nf4 g64 double"),
        ("billm:bits=2,group=64", "`billm` for codes of int2 g64.*binary=true"),
        ("gptq:binary=true", "`gptq` for codes of binary g64.*bits=4.*rtn or billm"),
        ("billm:binary=false", "binary False.*leave it out"),
        ("billm:binary=true,bits=2", "binary and bits 2"),
        ("billm:binary=true,group=48", "group_size 48"),
        ("awq+rtn:binary=true", "`awq.rtn` with signs and magnitudes.*leave out the fold"),
        ("rtn+signround:binary=true", "`rtn.signround` with signs and magnitudes.*leave out what learns"),
        ("billm:binary=true,activation=int8", "activation int8 beside weights of binary g64"),
        ("ganq:table=5", "bits 5.*one of 2, 3, 4"),
        ("ganq:table=3,group=64", "'group_size'.*`table`"),
        ("ganq:table=3,bits=3", "table 3 and bits 3"),
        ("ganq:table=3,scale_dtype=float16", "'scale_dtype'.*did you mean `table_dtype`"),
        ("ganq:rounds=3", "`ganq` for codes of int4 g64.*table=4"),
        ("gptq:table=3", "`gptq` for codes of table3.*bits=4.*rtn, leanquant, ganq or bcq"),
        ("awq+leanquant:table=3", "`awq.leanquant` with tables.*leave out the fold"),
        ("ganq+signround:table=3", "`ganq.signround` with tables.*leave out what learns"),
        ("leanquant+distil:table=3", "`leanquant.distil` with tables"),
        ("rtn:bits=[4", r"'\[4'.*one of 2, 3, 4"),
        ("rtn:bits=4,group=", "`group=` in recipe.*name=value"),
        ("rtn:bits=" + "9" * 5000, "`bits` of 5000 digits"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("method: gptq\nfold_settings: {grid: 5}", "fold_settings"),
        ("method: gptq\nfold: gptq", "`gptq` in `gptq.gptq`"),
        ("method: gptq\nfold: awq\nfold_settings: {grid: 5.5}", "grid: 5.5"),
        ("method: gptq\nfold: awq\nfold_settings: {grid: 0}", "grid 0"),
        ("method: gptq\nfold: awq\nfold_settings: {gird: 5}", "gird.*grid"),
        ("method: gptq\nfold: awq\nfold_settings: 5", "settings 5 of awq"),
        ("method: gptq\nsettings: [1]", "settings .1. of gptq"),
        ("method: gptq\nfolds: awq", "folds.*fold"),
        ("method: gptq\nembedding: {bits: 8, grup: 64}", "grup.*did you mean `group_size`"),
        (
            "method: 'gptq",
            "recipe.yaml is not YAML.*line 3, column 1, inside what begins at line 1, column 9 .*`name:",
        ),
        ("method: gptq\n\tsettings: {}", "not YAML.*line 2, column 1"),
        (
            "method: gptq\nsettings: {act_order: true",
            "not YAML.*line 3, column 7, inside .* line 2, column 11 ",
        ),
        ("method: gptq\nsettings: {name: b\x07}", "not YAML.*line 2, column 19 "),
        ("method: !!python/name:os.system ''", "the tag .* at line 1, column 9 .*plain values"),
        ("method: gptq\nmethod: rtn", "the key `method` twice at line 2, column 1 .*each key once"),
        ("method: gptq\nsettings: 2020-99-99", "settings '2020-99-99'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(body + "\ncoding: {bits: 4}\n")
    with pytest.raises(SettingsError, match=message):
        parse_recipe(str(path))


def test_the_documented_file_is_a_recipe(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(example, "utf-8")
    recipe = parse_recipe(str(path))
    assert (recipe.method, recipe.fold) == (Gptq(), Awq(grid=20))
    assert (recipe.coding, recipe.embedding) == (IntegerCoding(4, 64), IntegerCoding(8, 64))


def test_numbers_are_read_as_in_a_file() -> None:
    assert parse_recipe("gptq:bits=4, damping=2e-3").method == Gptq(damping=0.002)


def test_tables_are_for_linears_and_stated_alike_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: ganq\ncorrection: eora\ncoding: {table: 3}\nembedding: {bits: 8}\n")
    recipe = parse_recipe(str(path))
    assert (recipe.coding, recipe.embedding) == (TableCoding(3), IntegerCoding(8, 64))
    path.write_text("method: ganq\ncoding: {kind: table, bits: 3, table_dtype: float16}\n")
    assert parse_recipe(str(path)).coding == TableCoding(3, "float16")
    path.write_text("method: ganq\ncoding: {table: 3}\nembedding: {table: 4}\n")
    with pytest.raises(SettingsError, match="tables at embedding and head"):
        parse_recipe(str(path))
    path.write_text("method: billm\ncoding: {binary: true, group_size: 128}\n")
    assert parse_recipe(str(path)).coding == BinaryCoding(128)
    path.write_text("method: rtn\ncoding: {bits: 4}\nembedding: {binary: true}\n")
    with pytest.raises(SettingsError, match="signs and magnitudes at embedding and head"):
        parse_recipe(str(path))


@pytest.mark.parametrize(
    ("name", "method"), [("leanquant", Leanquant()), ("ganq", Ganq()), ("higgs", Higgs())]
)
def test_a_budget_chooses_among_the_codings_of_a_method(name: str, method: object) -> None:
    assert planned_recipe(name).method == method


@pytest.mark.parametrize("name", ["ganq+signround", "awq+ganq", "ganq+distil", "higgs+signround"])
def test_what_learns_or_folds_is_refused_beside_codes_without_integers(name: str) -> None:
    with pytest.raises(SettingsError, match=r"with (tables|codebook)"):
        planned_recipe(name)
