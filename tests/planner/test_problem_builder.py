from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from msq.planner.budget import parse_budgets
from msq.planner.errors import PlanError
from msq.planner.problem_builder import BuiltProblem, build_problem
from msq.profiles.schema import ROLES, ProfileManifest
from msq.profiles.tables import Profile, save_profile

Tables = dict[str, pd.DataFrame]
Columns = dict[tuple[object, ...], tuple[float, ...]]


def built_columns(built: BuiltProblem) -> Columns:
    """{(layers, quantizer, implementation or None): (loss, use of every resource)}"""
    problem, names = built.problem, (*built.implementations, None)
    found = {
        (
            tuple(built.profile.layer_names[i] for i in built.covered(c)),
            built.labels[problem.choice[c]],
            names[built.implementation[c]],
        ): (float(problem.loss[c]), *problem.usage[:, c].tolist())
        for c in range(problem.columns)
    }
    assert len(found) == problem.columns
    return found


def cost(profile: Profile, tables: Tables, names: tuple[str, ...], label: str) -> tuple[float, float]:
    """(loss, bytes) of layers under a quantizer, from the tables row by row."""
    quantizer = tables["quantizers"].set_index("quantizer").loc[label]
    loss = size = 0.0
    for name in names:
        layer = tables["layers"].set_index("layer").loc[name]
        measured = tables["errors"].query("layer == @name and quantizer == @label")
        if len(measured):
            error, bytes_ = measured["error"].item(), measured["size_bytes"].item()
        else:
            weights = layer["out_features"] * layer["in_features"]
            error = quantizer["gaussian_error"]
            bytes_ = weights * quantizer["bits_per_weight"] / 8 + quantizer["table_bytes"]
        loss += layer["sensitivity"] * error
        size += bytes_
    return loss, size


def expected_columns(
    profile: Profile, tables: Tables, batches: list[int], implementations: tuple[str, ...], *, fusion: bool
) -> Columns:
    """All kernels with a row at every batch size, by exhaustive search over subsets of every group."""
    key = ["pattern", "out_features", "in_features", "quantizer", "implementation", "batch_size"]
    measured = tables["latency"].set_index(key)["latency_us"].to_dict()
    found: Columns = {}
    for _, group in tables["layers"].groupby("fusion_group"):
        rows = list(group.itertuples())
        for size in range(1, len(rows) + 1 if fusion else 2):
            for members in itertools.combinations(rows, size):
                kernel = (
                    "+".join(m.role for m in members),
                    sum(m.out_features for m in members),
                    members[0].in_features,
                )
                for label, name in itertools.product(profile.labels, implementations):
                    times = [measured.get((*kernel, label, name, batch)) for batch in batches]
                    if None not in times:
                        names = tuple(m.layer for m in members)
                        loss, size_bytes = cost(profile, tables, names, label)
                        found[names, label, name] = (loss, size_bytes, *times)
    return found


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("implementations", [("tensor_core", "cuda_core"), ("tensor_core",)])
@pytest.mark.parametrize("batches", [[1], [8], [8, 1]])
def test_latency_columns(
    profile: Profile, tables: Tables, batches: list[int], implementations: tuple[str, ...], fusion: bool
) -> None:
    budgets = parse_budgets(["memory=3bpw", *(f"latency=1ms@{batch}" for batch in batches)])
    built = build_problem(profile, budgets, implementations=implementations, fusion=fusion)
    expected = expected_columns(profile, tables, batches, implementations, fusion=fusion)
    found = built_columns(built)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-12)
    assert built.problem.base.tolist() == [0.0, *({1: 20.0, 8: 30.0}[batch] for batch in batches)]
    assert built.problem.resource_names == ("memory", *(f"latency@{batch}" for batch in batches))


def test_unmeasured_batch_takes_a_kernel_out(profile: Profile) -> None:
    offered = [
        {key[1:] for key in built_columns(build_problem(profile, parse_budgets([f"latency=1ms@{batch}"])))}
        for batch in (1, 8)
    ]
    assert offered[0] - offered[1] == {("vq-3", "cuda_core")}


def test_memory_columns(profile: Profile, tables: Tables) -> None:
    built = build_problem(profile, parse_budgets(["memory=3bpw"]), quantizers="tcq-*,nuq-4")
    assert built.labels == ("nuq-4", "tcq-2", "tcq-4")
    expected = {
        ((name,), label, None): cost(profile, tables, (name,), label)
        for name in profile.layer_names
        for label in built.labels
    }
    found = built_columns(built)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-12)
    weights = int((tables["layers"]["out_features"] * tables["layers"]["in_features"]).sum())
    assert built.problem.caps.tolist() == [3 * weights / 8]


def test_memory_only_with_named_kernels(profile: Profile) -> None:
    built = build_problem(profile, parse_budgets(["memory=3bpw"]), implementations=["cuda_core"])
    assert {key[1] for key in built_columns(built)} == {"nuq-2", "nuq-4", "vq-3"}  # tcq has no such kernel
    free = build_problem(profile, parse_budgets(["memory=3bpw"]), implementations=["cuda_core", "reference"])
    assert {key[1] for key in built_columns(free)} == set(profile.labels)


def test_layer_facts_are_group_major(profile: Profile) -> None:
    problem = build_problem(profile, parse_budgets(["memory=3bpw"])).problem
    assert problem.group_sizes.tolist() == [3, 1, 2, 1] * 2
    assert problem.layer_weights is not None
    assert problem.layer_weights.tolist()[:4] == [4096, 2048, 2048, 4096]
    assert problem.layer_sensitivity is not None
    assert problem.layer_sensitivity.tolist() == profile.layers["sensitivity"].tolist()
    assert problem.column_bits is not None
    assert set(problem.column_bits.tolist()) == {2.0, 3.0, 4.0}


@pytest.mark.parametrize(("budgets", "arguments", "message"), [
    (["latency=5ms@4"], {}, "not measured at batch size 4; measured: 1, 8"),
    (["memory=3bpw"], {"implementations": ["tensor-core"]}, "no implementation 'tensor-core'; near .*tensor_core"),
    (["memory=3bpw"], {"implementations": []}, "expected at least one implementation"),
    (["memory=3bpw"], {"quantizers": "tqc-*"}, r"no quantizer matches 'tqc-\*'; near matches: tcq"),
    (["memory=3bpw"], {"quantizers": " , "}, "got an empty one"),
    (["latency=5ms"], {"quantizers": "tcq-*", "implementations": ["cuda_core"]},
     r"no candidate is left for b0.q_proj \(64 x 64\): .* at batch size 1"),
    (["memory=3bpw"], {"quantizers": "tcq-*", "implementations": ["cuda_core"]}, "no candidate is left for b0.q_proj"),
])  # fmt: skip
def test_wrong_selections(profile: Profile, budgets: list[str], arguments: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build_problem(profile, parse_budgets(budgets), **arguments)


def test_latency_budget_without_latency(memory_profile: Profile) -> None:
    with pytest.raises(PlanError, match="the profile of small has no latency; measure it with"):
        build_problem(memory_profile, parse_budgets(["memory=3bpw", "latency=5ms"]))
    with pytest.raises(PlanError, match="no implementation 'tensor_core'; near matches: reference"):
        build_problem(memory_profile, parse_budgets(["memory=3bpw"]), implementations=["tensor_core"])
    built = build_problem(memory_profile, parse_budgets(["memory=3bpw"]), implementations=["reference"])
    assert built.problem.columns == 14 * 5


def test_a_layer_without_kernel_is_named(tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> None:
    tables["latency"] = tables["latency"].query("pattern not in ('up_proj', 'gate_proj+up_proj')")
    profile = save_profile(tmp_path / "p", manifest, **tables)
    with pytest.raises(PlanError, match=r"no candidate is left for b0.up_proj \(96 x 64\)"):
        build_problem(profile, parse_budgets(["latency=5ms"]))


def test_kernels_of_another_shape_are_no_candidates(tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> None:
    other = tables["latency"].query("pattern == 'q_proj+k_proj'").assign(out_features=128, latency_us=0.5)
    tables["latency"] = pd.concat([tables["latency"], other])
    profile = save_profile(tmp_path / "p", manifest, **tables)
    built = build_problem(profile, parse_budgets(["memory=3bpw", "latency=1ms"]))
    expected = expected_columns(profile, tables, [1], ("tensor_core", "cuda_core"), fusion=True)
    found = built_columns(built)
    assert found.keys() == expected.keys()
    assert min(values[2] for values in found.values()) > 0.5


def test_many_columns(tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> None:
    """A hundred thousand columns take seconds at most: nothing loops over them."""
    blocks = 1000
    one = tables["layers"].iloc[: len(ROLES)]
    layers = pd.concat([one] * blocks, ignore_index=True)
    block = np.repeat(np.arange(blocks), len(ROLES))
    layers = layers.assign(
        block=block,
        layer=[f"b{b}.{role}" for b, role in zip(block, layers["role"], strict=True)],
        fusion_group=[f"b{b}.{name[3:]}" for b, name in zip(block, layers["fusion_group"], strict=True)],
    )
    model = manifest.model.model_copy(update={"blocks": blocks})
    profile = save_profile(
        tmp_path / "p", manifest.model_copy(update={"model": model}), **(tables | {"layers": layers})
    )
    started = time.perf_counter()
    built = build_problem(profile, parse_budgets(["memory=3bpw", "latency=1s"]))
    assert time.perf_counter() - started < 10
    assert built.problem.columns == blocks * 12 * 8
    weights = math.fsum(profile.layer_weights.tolist())
    assert built.problem.caps[0] == pytest.approx(3 * weights / 8)
