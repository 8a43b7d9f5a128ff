"""The command line as a user meets it: output, JSON, exit codes, and one sentence for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_type_hints

import pandas as pd
import pytest
import yaml
from msq.cli import main
from msq.planner.plan import load_plan, parse_plan


@pytest.fixture(scope="module")
def profile(tiny_llama, tmp_path_factory) -> Path:
    """A profile made by the command line."""
    out = tmp_path_factory.mktemp("cli") / "profile"
    arguments = ["profile", tiny_llama, "--out", out, "--quantizers", "nuq-[24],vq-3", "--tokens", 64, "--window", 32]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["msq", *map(str, arguments)])
        main()
    assert not stopped.value.code
    return out


def test_the_main_job(msq, profile, tiny_llama, tmp_path):
    plan, checkpoint = tmp_path / "plan.yaml", tmp_path / "checkpoint"
    code, out, _ = msq("plan", "--profile", profile, "--budget", "memory=4.5bpw", "--out", plan, "--json")
    found = json.loads(out)
    assert code == 0 and found["memory_bytes"] * 8 <= 4.5 * found["memory_bytes"] * 8 / found["bits_per_weight"]
    keys = {"status", "objective", "lower_bound", "gap", "memory_bytes", "bits_per_weight", "latency_us", "solver"}
    assert keys | {"solve_seconds", "columns"} <= set(found)
    code, out, err = msq("apply", tiny_llama, "--plan", plan, "--out", checkpoint, "--json")
    assert code == 0 and json.loads(out)["memory_bytes"] == found["memory_bytes"] and "quantizing" in err
    text = tmp_path / "text.txt"
    text.write_text("Some words to measure perplexity on, many times over. " * 50)
    code, out, _ = msq(
        "evaluate", checkpoint, "--text", text, "--reference", tiny_llama, "--window", 32, "--windows", 4, "--json"
    )
    measured = json.loads(out)
    assert code == 0 and measured["kl"] > 0 and measured["tokens"] == 128 and measured["perplexity"] > 1
    code, out, _ = msq("evaluate", tiny_llama, "--text", text, "--reference", tiny_llama, "--window", 32, "--json")
    assert abs(json.loads(out)["kl"]) < 1e-6
    code, out, _ = msq("generate", checkpoint, "--prompt", "The", "--max-tokens", 4, "--json")
    assert code == 0 and json.loads(out)["prompt"] == "The"
    code, out, _ = msq("benchmark", checkpoint, "--batch-size", "1,2", "--context", 8, "--json")
    told = json.loads(out)
    held = told["weight_bytes"] + told["shared_codebook_bytes"]
    assert code == 0 and held == told["promised_bytes"] == found["memory_bytes"]
    assert [step["batch_size"] for step in told["steps"]] == [1, 2] and all(s["step_us"] > 0 for s in told["steps"])
    assert parse_plan(told["plan"], "benchmark") == load_plan(plan)
    code, out, _ = msq("benchmark", tiny_llama / "config.json", "--plan", plan, "--context", 8)
    assert code == 0 and f"; {found['memory_bytes']} promised" in out


def test_hessians_from_profile_to_checkpoint(msq, tiny_llama, tmp_path):
    text, measured, plan = tmp_path / "text.txt", tmp_path / "profile", tmp_path / "plan.yaml"
    text.write_text("Some words to calibrate on, many times over. " * 80)
    arguments = ["--quantizers", "nuq-[24]", "--tokens", 64, "--window", 32, "--batch-sizes", "none"]
    assert msq("profile", tiny_llama, "--out", measured, *arguments, "--error", "proxy")[0] == 0
    assert msq("plan", "--profile", measured, "--budget", "memory=4.5bpw", "--out", plan)[0] == 0
    shared = ["apply", tiny_llama, "--plan", plan, "--json", "--tokens", 320, "--window", 32]
    code, out, err = msq(*shared, "--out", tmp_path / "a")
    assert code == 2 and not out and "--tokens, --window: for Hessians and tuning alone; add --hessian" in err
    code, out, err = msq(*shared, "--out", tmp_path / "a", "--text", text)
    names = "--text, --tokens, --window"
    assert code == 2 and not out and f"{names}: for Hessians and tuning alone; add --hessian or --tune blocks" in err
    code, out, err = msq(*shared, "--out", tmp_path / "a", "--hessian")
    assert code == 0 and json.loads(out)["hessian"] == "random tokens" and "hessians" in err
    code, out, _ = msq(*shared, "--out", tmp_path / "b", "--hessian", "--text", text)
    assert code == 0 and json.loads(out)["hessian"] == "text.txt"
    own = ["--hessian", "--calibration", "self"]
    code, out, err = msq(*shared, "--out", tmp_path / "c", *own, "--text", text)
    assert code == 2 and not out and "exclude each other" in err
    code, out, err = msq(*shared, "--out", tmp_path / "c", *own, "--tune", "blocks")
    found = json.loads(out)
    assert code == 0 and (found["hessian"], found["tuning"]) == ("the model's own text", "blocks") and "tuning" in err
    check = ["check", tmp_path / "c", "--model", tiny_llama, "--profile", measured, "--windows", 2]
    sizes = ["--tokens", 320, "--window", 32]
    code, _, err = msq(*check, *sizes, "--hessian")
    assert code == 2 and "tuned on other tokens than those given" in err
    code, _, err = msq(*check, *sizes)
    assert code == 2 and "tuned on other tokens than those given" in err
    code, out, err = msq(*check, *sizes, *own)
    assert code == 0 or "its KL is" in err  # weights drawn at random: a plan may lose to the uniform scheme
    assert out.startswith("bytes promised")


def test_plan_shows_a_map_and_its_proof(msq, profile):
    code, out, _ = msq("plan", "--profile", profile, "--budget", "latency=1s", "--budget", "memory=5bpw")
    assert code == 0 and "block" in out and "bits per weight" in out and "proven gap" in out


def test_plan_under_side_constraints_and_noise(msq, profile):
    arguments = ["plan", "--profile", profile, "--budget", "memory=4.5bpw", "--json"]
    arguments += ["--constraint", "pin:down_proj=nuq-4", "--robust", 0.9, "--stability", 5]
    code, out, _ = msq(*arguments)
    found = json.loads(out)
    assert code == 0 and found["constraints"] == ["pin:down_proj=nuq-4"] and found["solver"] == "exact"
    assert found["robustness"]["quantile"] == 0.9 and found["robustness"]["quantile_loss"] > found["loss"]
    assert found["stability"]["samples"] == 5 and all(0 <= x <= 1 for x in found["stability"]["changes"].values())
    assert all(share == 0 for layer, share in found["stability"]["changes"].items() if "down_proj" in layer)
    code, out, _ = msq(*arguments[:5], "--constraint", "distinct=1", "--stability", 2)
    assert code == 0 and "shadow price of memory" not in out and "resampled profiles" in out
    code, out, _ = msq("plan", "--profile", profile, "--budget", "memory=4.5bpw")
    assert code == 0 and "shadow price of memory: one more MB saves" in out


def test_frontier_writes_a_table_and_a_chart(msq, profile, tmp_path):
    plan = tmp_path / "plan.yaml"
    assert msq("plan", "--profile", profile, "--budget", "memory=4.5bpw", "--out", plan)[0] == 0
    shared = ["frontier", "--profile", profile, "--json", "--out", tmp_path / "f.csv", "--plot", tmp_path / "f.svg"]
    code, out, _ = msq(*shared, "--resource", "memory", "--at", "4bpw", "--plan", plan)
    table = pd.read_csv(tmp_path / "f.csv", keep_default_na=False)
    assert code == 0 and list(table)[:4] == ["series", "label", "memory_bytes", "bits_per_weight"]
    counts = table["series"].value_counts()
    assert json.loads(out)["points"] == counts["frontier"] and counts["exact"] == counts["plan"] == 1
    assert (tmp_path / "f.svg").read_text().startswith("<?xml")
    code, out, _ = msq(*shared, "--resource", "latency")
    assert code == 0 and json.loads(out)["points"] > 1


def test_frontier_keeps_plans_of_one_name_apart_and_knows_its_profile(msq, profile, tmp_path):
    a, b, c = tmp_path / "a" / "plan.yaml", tmp_path / "b" / "plan.yaml", tmp_path / "other.yaml"
    for path, budget in ((a, "memory=3.5bpw"), (b, "memory=4bpw"), (c, "memory=4.5bpw")):
        path.parent.mkdir(exist_ok=True)
        assert msq("plan", "--profile", profile, "--budget", budget, "--out", path)[0] == 0
    content = yaml.safe_load(c.read_text())
    content["profile"]["digest"] = "0" * 64
    c.write_text(yaml.safe_dump(content))
    arguments = ["frontier", "--profile", profile, "--resource", "memory", "--out", tmp_path / "f.csv"]
    code, _, err = msq(*arguments, "--plan", a, "--plan", b, "--plan", c, "--plan", a)
    table = pd.read_csv(tmp_path / "f.csv", keep_default_na=False)
    assert code == 0 and table.loc[table["series"] == "plan", "label"].tolist() == [str(a), str(b), "other"]
    assert err.splitlines() == [
        f"msq: {c} was made from another profile; what it promises may not compare with this frontier."
    ]


def test_frontier_says_which_plans_break_its_constraints(msq, profile, tmp_path):
    shared = ["plan", "--profile", profile, "--out"]
    low, high = tmp_path / "low.yaml", tmp_path / "high.yaml"
    assert msq(*shared, low, "--budget", "memory=3.5bpw", "--constraint", "pin:down_proj=nuq-2")[0] == 0
    assert msq(*shared, high, "--budget", "memory=5bpw", "--constraint", "pin:down_proj=nuq-4")[0] == 0
    arguments = ["frontier", "--profile", profile, "--resource", "memory", "--out", tmp_path / "f.csv"]
    arguments += ["--plan", low, "--plan", high, "--constraint", "min-bits:down_proj=3"]
    code, _, err = msq(*arguments, "--constraint", "ban:down_proj=*-2", "--constraint", "max-bits:down_proj=4")
    table = pd.read_csv(tmp_path / "f.csv")
    assert code == 0 and table.loc[table["series"] == "plan", "label"].tolist() == ["low", "high"]
    assert err.splitlines() == [
        'msq: low: it breaks "min-bits:down_proj=3", "ban:down_proj=*-2", which the rest of this frontier keeps.'
    ]


def test_frontier_says_which_plans_are_not_proven(msq, profile, tmp_path, monkeypatch):
    from msq.planner import frontier

    def best(built, budget, points, time_limit):
        row = {"series": "feasible", "label": budget.text, "use": 1.0, "loss": time_limit, "lower_bound": 0.0}
        return pd.DataFrame([row])

    monkeypatch.setattr(frontier, "_best", best)
    arguments = ["frontier", "--profile", profile, "--resource", "memory", "--at", "4bpw", "--time-limit", 9]
    code, _, err = msq(*arguments, "--out", tmp_path / "f.csv")
    table = pd.read_csv(tmp_path / "f.csv")
    assert code == 0 and table.loc[table["series"] == "feasible", "loss"].tolist() == [9]
    assert "memory=4bpw: not proven optimal within 9 s" in err


def test_a_plan_is_saved_before_it_is_resampled(msq, profile, tmp_path, monkeypatch):
    from msq.planner import robust
    from msq.planner.errors import PlanError

    def fail(*_, **__):
        raise PlanError("no sample could be planned.")

    monkeypatch.setattr(robust, "stability", fail)
    plan = tmp_path / "plan.yaml"
    arguments = ["plan", "--profile", profile, "--budget", "memory=4.5bpw", "--stability", 2]
    assert msq(*arguments, "--out", plan)[0] == 2 and plan.exists()


@pytest.mark.parametrize("option", [("--robust", 0.9), ("--stability", 2)])
def test_resampling_without_standard_errors_is_refused_before_solving(msq, profile, tmp_path, monkeypatch, option):
    import dataclasses

    from msq import cli_planning
    from msq.planner import solve

    measured = cli_planning.load(profile)
    bare = dataclasses.replace(measured, layers=measured.layers.drop(columns="standard_error"))
    monkeypatch.setattr(cli_planning, "load", lambda _: bare)
    monkeypatch.setattr(solve, "build_problem", lambda *_, **__: pytest.fail("solved"))
    code, out, err = msq("plan", "--profile", profile, "--budget", "memory=4.5bpw", *option)
    assert code == 2 and not out and err.startswith("msq: the profile has no standard errors")


def test_compare_keeps_what_is_done_when_interrupted(msq, profile, tmp_path, monkeypatch):
    from msq.experiments import compare

    solve = compare.solve_isolated

    def interrupted(name, problem, **limits):
        if name == "exact":
            raise KeyboardInterrupt
        return solve(name, problem, **limits)

    monkeypatch.setattr(compare, "solve_isolated", interrupted)
    arguments = ["compare", "--profile", profile, "--budget", "memory=4.5bpw", "--also", "memory=5bpw"]
    arguments += ["--out", tmp_path / "c.csv", "--plot", tmp_path / "c.svg"]
    code, out, err = msq(*arguments, "--solvers", "greedy,exact,uniform", "--json")
    found = json.loads(out)
    assert code == 130 and found["interrupted"] and [row["solver"] for row in found["solvers"]] == ["greedy"]
    assert pd.read_csv(tmp_path / "c.csv")["solver"].tolist() == ["greedy"] and (tmp_path / "c.svg").exists()
    assert "comparing solvers" in err and "interrupted after 1 of 6 solves" in err
    (tmp_path / "c.csv").unlink()
    code, out, err = msq(*arguments, "--solvers", "exact,greedy")
    assert code == 130 and not out and "interrupted after 0 of 4 solves" in err and not (tmp_path / "c.csv").exists()


def test_compare_out_of_reach_exits_with_3_after_writing(msq, profile, tmp_path):
    arguments = ["compare", "--profile", profile, "--out", tmp_path / "c.csv", "--plot", tmp_path / "c.png", "--json"]
    arguments += ["--solvers", "greedy,exact", "--budget", "memory=1bpw"]
    code, out, err = msq(*arguments, "--also", "memory=1.1bpw,latency=1s")
    assert code == 3 and len(json.loads(out)["solvers"]) == len(pd.read_csv(tmp_path / "c.csv")) == 4
    assert (tmp_path / "c.png").exists()
    assert "no plan meets memory=1bpw or memory=1.1bpw latency=1s; `msq plan` says what can be met." in err
    code, out, _ = msq(*arguments, "--also", "memory=4.5bpw")
    assert code == 0 and {row["status"] for row in json.loads(out)["solvers"]} >= {"infeasible", "optimal"}


def test_compare_tells_refusals_from_failures(msq, profile):
    arguments = ["compare", "--profile", profile, "--budget", "memory=4.5bpw", "--constraint", "same:down_proj"]
    code, out, _ = msq(*arguments, "--solvers", "exact,scip", "--json")
    exact, scip = json.loads(out)["solvers"]
    assert code == 0 and scip["status"] == "optimal" and exact["status"] == "refused"
    assert exact["remark"].startswith("solver 'exact' can't handle layers that must share a choice")


def test_compare_runs_every_backend(msq, profile, tmp_path):
    files = ["--out", tmp_path / "c.csv", "--plot", tmp_path / "c.png"]
    budgets = ["--budget", "memory=4.5bpw", "--also", "memory=5bpw,latency=1s"]
    code, out, _ = msq("compare", "--profile", profile, *budgets, *files, "--json")
    rows = json.loads(out)["solvers"]
    assert code == 0 and {row["budgets"] for row in rows} == {"memory=4.5bpw", "memory=5bpw latency=1s"}
    assert len(pd.read_csv(tmp_path / "c.csv")) == len(rows) and (tmp_path / "c.png").stat().st_size > 5000
    for problem in ("memory=4.5bpw", "memory=5bpw latency=1s"):
        own = {row["solver"]: row for row in rows if row["budgets"] == problem}
        assert {"uniform", "water_filling", "lagrangian", "exact", "scip", "highs", "cp_sat", "cbc"} <= set(own)
        assert own["exact"]["status"] == "optimal" and own["exact"]["peak_mb"] > 10
        plans = [row for row in own.values() if row["objective"]]
        assert all(row["within_caps"] and not row["remark"] for row in plans)
        assert all(row["objective"] >= own["exact"]["objective"] * (1 - 1e-6) for row in plans)
    code, out, _ = msq("compare", "--profile", profile, "--budget", "memory=4.5bpw", "--solvers", "exact,greedy")
    assert code == 0 and "greedy" in out and "memory=4.5bpw" in out


def test_doctor_and_version(msq):
    code, out, _ = msq("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0 and findings["solver scip"]["works"] and findings["model ref-tiny-3m"]["works"]
    assert msq("--version")[1].strip() == json.loads(out)["msq"]


def test_an_infeasible_budget_exits_with_3_and_names_what_is_reachable(msq, profile, tmp_path):
    code, out, err = msq(
        "plan", "--profile", profile, "--budget", "memory=1bpw", "--out", tmp_path / "plan.yaml", "--json"
    )
    assert code == 3 and not out and "the least that these quantizers reach is" in err
    assert not (tmp_path / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plan", "--profile", "{p}", "--budget", "memory=4.5bpw", "--solver", "lagrangain"],
            "did you mean lagrangian",
        ),
        (["plan", "--profile", "{p}", "--budget", "memory=4.5bpw", "--quantizers", "nuk-2"], "near matches: nuq-2"),
        (["plan", "--profile", "{p}", "--budget", "memory=4.5"], "the unit is missing"),
        (["plan", "--profile", "{p}", "--budget", "latency=5ms@64"], "not measured at batch size 64"),
        (["plan", "--profile", "{t}/none", "--budget", "memory=4.5bpw"], "none"),
        (["compare", "--profile", "{p}", "--budget", "memory=4bpw", "--solvers", "scpi"], "did you mean scip"),
        (["frontier", "--profile", "{p}", "--resource", "speed", "--out", "{t}/f.csv"], "memory or latency"),
        (["frontier", "--profile", "{p}", "--resource", "memory", "--out", "{t}/a/f.csv"], "does not exist"),
        (["compare", "--profile", "{p}", "--budget", "memory=4bpw", "--plot", "{t}/c.txt"], "to end in .png"),
        (["plan", "--profile", "{p}", "--budget", "memory=4bpw", "--out", "{t}/a/p.yaml"], "does not exist"),
        (["plan", "--profile", "{p}", "--budget", "memory=4bpw", "--constraint", "pin:x"], "expected pin:REGEX"),
        (["plan", "--profile", "{p}", "--budget", "memory=4bpw", "--robust", "2"], "below 1, such as 0.95"),
        (
            ["plan", "--profile", "{p}", "--budget", "memory=4bpw", "--solver", "exact", "--constraint", "distinct=1"],
            "choose scip, highs or cp_sat",
        ),
        (["apply", "{t}/none", "--plan", "{t}/none.yaml", "--out", "{t}/c"], "can't read the plan"),
        (["evaluate", "{t}/none", "--text", "{t}/none.txt"], "no model directory"),
        (["evaluate", "ref-tiny-3m", "--text", "{t}/none.txt"], "can't read the text"),
        (["generate", "{t}/none", "--prompt", "x"], "no model directory"),
        (["generate", "ref-tiny-3m", "--prompt", ""], "expected a prompt of 1 to"),
        (["benchmark", "{t}/none"], "there is none"),
        (["benchmark", "llama-4-8b", "--plan", "{t}/none.yaml"], "can't read the plan"),
        (["profile", "ref-tiny-4m", "--out", "{t}/p"], "near matches: ref-tiny-3m"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--loss", "calibration"], "calibration needs a text"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--loss", "fishy"], "unknown loss method"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--text", "x.txt"], "data-free sensitivities take none"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--error", "kl"], "weights or proxy"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--batch-sizes", "one"], "expected distinct batch sizes"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--device", "cuda:99"], "CUDA"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--state-bits", "30"], "trellis state of 4 to 16 bits; got 30"),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--batch-sizes", "0,1"], "distinct batch sizes of at least 1"),
        (
            ["profile", "ref-tiny-3m", "--out", "{t}/p", "--context", "1024"],
            "below the 1024 tokens",
        ),
        (["profile", "ref-tiny-3m", "--out", "{t}/p", "--loss", "fisher", "--noise", "0.2"], "fisher perturbs nothing"),
        (
            ["profile", "ref-tiny-3m", "--out", "{t}/p", "--batch-sizes", "none", "--context", "8"],
            "--context: --batch-sizes none times no step",
        ),
        (
            ["profile", "llama-3.1-8b", "--out", "{t}/p", "--latency-only", "--no-head", "--tokens", "64"],
            "--tokens, --head: --latency-only measures no losses",
        ),
        (["plan", "--profile", "{p}", "--budget", "memory=4bpw", "--solver", ""], "solver '' doesn't exist"),
        (["benchmark", "{t}/none", "--batch-size", "none"], "expected a batch size to measure"),
        (["profile", "{p}", "--out", "{t}/p"], "config.json"),
        (["compare", "--profile", "{p}", "--budget", "memory=4bpw", "--solvers", ""], "at least one solver"),
        (["compare", "--profile", "{p}", "--budget", "memory=4bpw", "--time-limit", "-1"], "expected seconds above 0"),
        (["plan", "--profile", "{p}", "--budget", "memory=4bpw", "--time-limit", "nan"], "expected seconds above 0"),
        (
            ["frontier", "--profile", "{p}", "--resource", "memory", "--out", "{t}/f.csv", "--time-limit", "0"],
            "expected seconds above 0",
        ),
        (
            ["frontier", "--profile", "{p}", "--resource", "memory", "--out", "{t}/f.svg", "--plot", "{t}/./f.svg"],
            "give the chart another name",
        ),
        (
            ["compare", "--profile", "{p}", "--budget", "memory=4bpw", "--out", "{t}/c.svg", "--plot", "{t}/c.svg"],
            "give the chart another name",
        ),
        (["compare", "--profile", "{p}", "--budget", "memory=4bpw", "--plot", "{t}/a/c.png"], "does not exist"),
        (["plan", "--profile", "{p}", "--budget", "memory=4bpw", "--out", "{p}/profile.yaml"], "would replace what"),
        (["frontier", "--profile", "{p}", "--resource", "memory", "--out", "{p}/./layers.csv"], "would replace what"),
        (["compare", "--profile", "{p}", "--budget", "memory=4bpw", "--out", "{p}/latency.csv"], "would replace what"),
        (
            ["frontier", "--profile", "{p}", "--resource", "memory", "--out", "{t}/a.yaml", "--plan", "{t}/a.yaml"],
            "a.yaml would replace what",
        ),
        (
            ["frontier", "--profile", "{p}", "--resource", "memory", "--out", "{t}/f.csv", "--batch-size", "1"],
            "--batch-size: memory is the same at every batch size; leave it out.",
        ),
        (
            ["frontier", "--profile", "{p}", "--resource", "latency", "--out", "{t}/f.csv", "--batch-size", "8"],
            "a frontier of latency at batch size 8 needs a profile that measured it; this one measured batch size 1.",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(msq, profile, tmp_path, arguments, message):
    code, out, err = msq(*(part.format(p=profile, t=tmp_path) for part in arguments))
    assert code == 2 and not out
    assert message in err and err.startswith("msq: ") and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


_REQUIRED = {
    "profile": ["ref-tiny-3m", "--out", "{t}/p"],
    "combine": ["--loss", "{p}", "--latency", "{p}", "--out", "{t}/p"],
    "plan": ["--profile", "{p}", "--budget", "memory=4bpw"],
    "frontier": ["--profile", "{p}", "--resource", "memory", "--out", "{t}/f.csv"],
    "compare": ["--profile", "{p}", "--budget", "memory=4bpw", "--solvers", "greedy"],
    "apply": ["{t}/none", "--plan", "{t}/none.yaml", "--out", "{t}/c"],
    "check": ["{t}/none", "--model", "{t}/none", "--profile", "{p}"],
    "evaluate": ["{t}/none", "--text", "{t}/none.txt"],
    "benchmark": ["{t}/none"],
    "demo": [],
}


def _path_options() -> list[tuple[str, str]]:
    """Every command and option that takes a path."""
    from msq.cli import app

    found = []
    for command in app.registered_commands:
        hints = get_type_hints(command.callback)
        names = (name for name, hint in hints.items() if hint in (Path, Path | None, list[Path] | None))
        found += [(command.callback.__name__, f"--{name.replace('_', '-')}") for name in names if name != "checkpoint"]
    return found


@pytest.mark.parametrize(("command", "option"), _path_options())
def test_an_empty_path_is_not_the_current_directory(msq, profile, tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    given = [part.format(p=profile, t=tmp_path) for part in _REQUIRED[command]]
    code, out, err = msq(command, *given, option, "")
    assert code == 2 and not out and not list(tmp_path.iterdir())
    assert err == "msq: expected the name of a file or directory, got an empty one; `.` is this directory.\n"


@pytest.mark.parametrize("kind", [[], ["--restart"], ["--latency-only", "--restart"]])
def test_a_profile_does_not_mix_with_other_files(msq, tiny_llama, tmp_path, kind):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.txt").touch()
    options = ["--out", tmp_path, "--quantizers", "nuq-2", "--context", 8, *kind]
    code, out, err = msq("profile", tiny_llama / "config.json" if "--latency-only" in kind else tiny_llama, *options)
    assert code == 2 and not out and [path.name for path in tmp_path.rglob("*")] == ["results", "mine.txt"]
    assert err == f"msq: {tmp_path} holds results and no profile; choose a new or empty directory as --out.\n"


@pytest.mark.parametrize("arguments", [["check", "", "--model", "m", "--profile", "p"], ["benchmark", ""]])
def test_an_empty_checkpoint_is_not_the_current_directory(msq, arguments):
    code, out, err = msq(*arguments)
    assert code == 2 and not out and "got an empty one" in err


def test_a_changed_profile_is_refused(msq, profile, tmp_path):
    import shutil

    damaged = shutil.copytree(profile, tmp_path / "p")
    (damaged / "layers.csv").write_text((damaged / "layers.csv").read_text().replace("q_proj,", "q_proj ,", 1))
    code, _, err = msq("plan", "--profile", damaged, "--budget", "memory=4bpw")
    assert code == 2 and "layers.csv" in err
    manifest = yaml.safe_load((profile / "profile.yaml").read_text()) | {"surprise": 1}
    (damaged / "profile.yaml").write_text(yaml.safe_dump(manifest))
    code, _, err = msq("plan", "--profile", damaged, "--budget", "memory=4bpw")
    assert code == 2 and "surprise" in err


def test_usage_mistakes_exit_with_2(msq):
    assert msq("plan")[0] == 2
    assert msq("no-such-command")[0] == 2
