from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from msq.planner.budget import parse_budgets
from msq.planner.errors import PlanError
from msq.planner.plan import Plan, PlanQuantizer, load_plan, save_plan
from msq.planner.solve import find_plan
from msq.profiles.tables import Profile


@pytest.fixture
def plan(profile: Profile) -> Plan:
    return find_plan(profile, parse_budgets(["memory=3bpw", "latency=250us"])).plan


@pytest.fixture
def path(plan: Plan, tmp_path: Path) -> Path:
    save_plan(plan, tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_round_trip(plan: Plan, path: Path) -> None:
    assert load_plan(path) == plan
    text = path.read_text()
    assert "&id" not in text  # no YAML anchors
    assert yaml.safe_load(text)["promised"]["latency_us"] == plan.promised.latency_us


def test_specs(plan: Plan) -> None:
    for label, entry in plan.quantizers.items():
        fields = (entry.bits, entry.state_bits, entry.table_bits, entry.code)
        assert plan.spec(label) == QuantizerSpec(Family(entry.family), *fields)
    with pytest.raises(PlanError, match="the plan has no quantizer 'none'"):
        plan.spec("none")


@pytest.mark.parametrize(("family", "bits"), [("tcq", 4.0), ("half_tcq", 3.25)])
def test_a_trellis_without_a_code_has_the_one_there_was_before_codes(family: str, bits: float) -> None:
    old = PlanQuantizer.model_validate({"family": family, "bits": bits, "state_bits": 12})
    assert old.spec() == QuantizerSpec(Family(family), bits, 12, code=TrellisCode.HYB)
    usual = QuantizerSpec(Family(family), bits, 12)
    written = PlanQuantizer.model_validate(asdict(usual)).model_dump()
    assert written["code"] == TrellisCode.MAD and PlanQuantizer.model_validate(written).spec() == usual


def test_what_is_not_known_is_null(profile: Profile, tmp_path: Path) -> None:
    plan = find_plan(profile, parse_budgets(["memory=3bpw"]), solver="uniform").plan
    assert plan.solver.lower_bound is None
    assert plan.solver.gap is None
    save_plan(plan, tmp_path / "plan.yaml")
    assert "inf" not in (tmp_path / "plan.yaml").read_text()
    assert load_plan(tmp_path / "plan.yaml") == plan


def fused(value: dict[str, Any]) -> dict[str, Any]:
    """The first layer that runs with others."""
    found: dict[str, Any] = next(entry for entry in value["layers"] if len(entry["pattern"]) > 1)
    return found


def partner(value: dict[str, Any]) -> dict[str, Any]:
    """Another member of its pattern."""
    name = next(name for name in fused(value)["pattern"] if name != fused(value)["layer"])
    found: dict[str, Any] = next(entry for entry in value["layers"] if entry["layer"] == name)
    return found


def other_quantizer(value: dict[str, Any]) -> str:
    return next(label for label in value["quantizers"] if label != fused(value)["quantizer"])


def quantizer(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of nuq-4, whether or not a layer has it."""
    found: dict[str, Any] = value["quantizers"].setdefault("nuq-4", {"family": "nuq", "bits": 4.0, "table_bits": 0})
    return found


TRELLIS = {"family": "tcq", "bits": 3.0, "state_bits": 12, "table_bits": 0, "code": "mad"}


def alone(entry: dict[str, Any]) -> None:
    entry["pattern"] = [entry["layer"]]


WRONG: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda v: v.update(schema_version=2), "has schema_version 2, this msq reads 1; upgrade msq"),
    (lambda v: v.update(schema_version="1"), "schema_version should be 1; got '1'"),
    (lambda v: v.update(schema_version=True), "schema_version should be 1; got True"),
    (lambda v: v.update(layer=1), "unknown field 'layer'; did you mean 'layers'"),
    (lambda v: v["solver"].update(statuss=1), "unknown field 'solver.statuss'; did you mean 'status'"),
    (lambda v: v.pop("promised"), "the field 'promised' is missing"),
    (lambda v: v["promised"].update(loss=math.nan), "the field 'promised.loss' is wrong: .*finite"),
    (lambda v: v["promised"]["latency_us"].update({1: math.inf}), "'promised.latency_us.1' is wrong: .*finite"),
    (lambda v: v["promised"].update(memory_bytes=-1), "'promised.memory_bytes' is wrong: .*; got -1"),
    (lambda v: v["solver"].update(status="infeasible"), "'solver.status' is wrong: .*'optimal' or 'feasible'"),
    (lambda v: v.update(layers=[]), "'layers' is wrong"),
    (lambda v: v["layers"].append(v["layers"][0]), "the layer b0.q_proj is planned twice"),
    (lambda v: v["layers"].remove(fused(v)), "holds .*, which is not planned"),
    (lambda v: alone(fused(v)), "is in the pattern of .* and in another one"),
    (lambda v: fused(v).update(pattern=fused(v)["pattern"] * 2), "should name it and every other member once"),
    (lambda v: fused(v).update(pattern=["b1.o_proj"]), "should name it and every other member once"),
    (lambda v: fused(v).update(quantizer=other_quantizer(v)), "run as one kernel, yet differ in quantizer"),
    (lambda v: partner(v).update(implementation="slow"), "run as one kernel, yet differ in quantizer or impl"),
    (lambda v: v["quantizers"].pop(fused(v)["quantizer"]), "which is not among the plan's quantizers"),
    (lambda v: v["quantizers"][fused(v)["quantizer"]].update(bits=9), "quantizers.*: .* comes in .* got 9"),
    (lambda v: v["quantizers"][fused(v)["quantizer"]].update(family="gptq"), "family' is wrong: .*got 'gptq'"),
    (lambda v: quantizer(v).update(bits=3.0), "'nuq-4' has the fields of nuq-3; restore them, or plan anew"),
    (lambda v: quantizer(v).update(family="int"), "the quantizer 'nuq-4' has the fields of int-4"),
    (lambda v: v["quantizers"].update({"tcq-3-L12": TRELLIS | {"state_bits": 10}}), "the fields of tcq-3-L10"),
    (lambda v: v["quantizers"].update({"tcq-3-L12": TRELLIS | {"code": "1mad"}}), "the fields of tcq-3-1mad-L12"),
    (lambda v: v["quantizers"].update({"tcq-3-hyb-L12": TRELLIS}), "'tcq-3-hyb-L12' has the fields of tcq-3-L12"),
    (lambda v: v["profile"].update(digest="abc"), "'profile.digest' is wrong"),
    (lambda v: v["budgets"][0].update(cap=0), "'budgets.0.cap' is wrong: .*greater than 0; got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_wrong_plans_are_refused(path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    value = yaml.safe_load(path.read_text())
    edit(value)
    path.write_text(yaml.safe_dump(value))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(path)
    assert "plan.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["tcq-3-L12", "tcq-3-hyb-L12", "mine"])
def test_labels_from_before_codes_and_of_ones_own_are_read(path: Path, label: str) -> None:
    value = yaml.safe_load(path.read_text())
    value["quantizers"][label] = {"family": "tcq", "bits": 3.0, "state_bits": 12}
    path.write_text(yaml.safe_dump(value))
    assert load_plan(path).spec(label) == QuantizerSpec(Family.TCQ, 3.0, 12, code=TrellisCode.HYB)


@pytest.mark.parametrize(("content", "message"), [
    ("layers: [", "plan.yaml is not valid YAML at line"),
    ("- a\n", "should hold named fields"),
    ("", "got an empty file"),
    ("schema_version: 1\nschema_version: 1\n", "the key 'schema_version' is given twice"),
])  # fmt: skip
def test_corrupt_plans(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "plan.yaml")


def test_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"can't read the plan .*plan.yaml: there is no such file"):
        load_plan(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="it is not a regular file"):
        load_plan(tmp_path)


def test_nowhere_to_save(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the directory .*missing does not exist"):
        save_plan(plan, tmp_path / "missing" / "plan.yaml")
