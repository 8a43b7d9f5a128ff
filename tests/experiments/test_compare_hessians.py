"""The comparison of ways to build a plan: its rows, and that an interrupted one goes on."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace

import pytest
from msq.experiments import compare_hessians
from msq.experiments.compare_hessians import builds, parse_build
from msq.planner.executor.manifest import TuneMethod
from msq.profiles.errors import ProfileError
from msq.profiles.schema import TokenSource


def test_builds_are_named_as_users_type_them():
    assert parse_build("plain") == (None, None)
    assert parse_build("plain+layers") == (None, TuneMethod.LAYERS)
    assert parse_build("self+model") == (TokenSource.SELF, TuneMethod.MODEL)
    for wrong in ("plain+blocks", "own", "self-blocks"):
        with pytest.raises(ProfileError, match="a build is one of plain, random, self, text"):
            parse_build(wrong)


def test_proxy_errors_are_only_for_builds_under_hessians():
    asked = Namespace(
        budgets=["memory=2bpw"], builds=["plain", "text"], profile_kinds=["weights", "proxy"], solvers=["exact"]
    )
    assert [(build.profile, build.name) for build in builds(asked)] == [
        ("weights", "plain"),
        ("weights", "text"),
        ("proxy", "text"),
    ]


def test_rows_that_are_there_are_not_measured_again(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_hessians, "_WINDOW", 128)  # the model reads no more than 256 tokens
    text, out = tmp_path / "text.txt", tmp_path / "rows.csv"
    text.write_text("Some words to calibrate on, many times over. " * 400)
    arguments = [
        "--model",
        tiny_llama,
        "--text",
        text,
        "--measure",
        text,
        "--windows",
        "1",
        "--work",
        tmp_path / "work",
    ]
    arguments += ["--palette", "nuq-[24]", "--budgets", "memory=4.5bpw", "--solvers", "exact", "--out", out]
    arguments += ["--tokens", "1024", "--profile-tokens", "512", "--commit", "c"]

    def run(*names: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", ["compare_hessians", *map(str, arguments), "--builds", *names])
        compare_hessians.main()
        with out.open(newline="") as file:
            return list(csv.DictReader(file))

    (first,) = run("self")
    assert first["built"] == "self" and float(first["kl"]) > 0 and first["calibration_tokens"] == "1024"
    both = run("plain", "self")
    assert [row["built"] for row in both] == ["plain", "self"] and both[1] == first
    assert float(both[0]["kl"]) != float(first["kl"])
    assert "perplexity" in capsys.readouterr().out
