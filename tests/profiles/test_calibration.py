"""Calibration tokens: text that the model writes, and what users may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from msq.kernels.specs import Family, QuantizerSpec
from msq.profiles import sampling
from msq.profiles.calibration import calibration, parse_source
from msq.profiles.errors import ProfileError
from msq.profiles.job import ProfileSettings, run_profile
from msq.profiles.model_source import EMBEDDED
from msq.profiles.models import choose_device, load_model
from msq.profiles.sampling import self_written
from msq.profiles.schema import TokenSource

CPU = choose_device("cpu")


def test_what_a_model_writes_depends_on_the_seed_alone(tiny_model, monkeypatch):
    model = load_model(tiny_model, CPU)
    whole = self_written(model, 5, 12, 0)
    assert whole.shape == (5, 12) and whole.dtype == torch.int64
    assert (whole[:, 0] == model.config.bos_token_id).all() and len({tuple(row.tolist()) for row in whole}) == 5
    monkeypatch.setattr(sampling, "_CACHED_TOKENS", 24)  # two windows at a time
    assert torch.equal(self_written(model, 5, 12, 0), whole)
    assert not torch.equal(self_written(model, 5, 12, 1), whole)


def test_without_a_first_token_of_its_own_a_window_begins_at_random(tiny_llama):
    model = load_model(tiny_llama, CPU)
    model.config.bos_token_id = None
    assert len(set(self_written(model, 8, 2, 0)[:, 0].tolist())) > 1


def test_tokens_follow_the_distribution_of_the_model(tiny_llama):
    model = load_model(tiny_llama, CPU)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely
    draws = torch.rand(3, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(self_written(model, 3, 10, 4)[:, 1:], (draws * model.config.vocab_size).long())
    sure = load_model(tiny_llama, CPU)
    with torch.no_grad():
        sure.lm_head.weight *= 1e4  # only one is
        written = self_written(sure, 3, 10, 4)
        assert torch.equal(sure(written).logits.argmax(-1)[:, :-1], written[:, 1:])


def test_the_model_finds_its_own_text_far_more_likely_than_random_tokens():
    trained = EMBEDDED / "ref-tiny-3m"
    model = load_model(trained, CPU)

    def loss(source: TokenSource) -> float:
        windows = calibration(trained, None, tokens=96, window=32, seed=0, source=source).windows
        with torch.no_grad():
            logits = model(windows).logits
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))

    assert loss(TokenSource.SELF) < 5
    assert loss(TokenSource.RANDOM) > 8


def test_a_profile_says_where_its_tokens_come_from(tiny_llama, tmp_path):
    specs = (QuantizerSpec(Family.NUQ, 2),)
    settings = ProfileSettings(specs=specs, tokens=64, window=32, batch_sizes=(), source=TokenSource.SELF)
    written = run_profile(tiny_llama, tmp_path / "self", settings, name="tiny")
    random = run_profile(
        tiny_llama, tmp_path / "random", ProfileSettings(specs=specs, tokens=64, window=32, batch_sizes=()), name="tiny"
    )
    assert written.manifest.loss.source is TokenSource.SELF and random.manifest.loss.source is TokenSource.RANDOM
    assert not written.layers["sensitivity"].equals(random.layers["sensitivity"])


def test_what_users_may_ask_for():
    assert parse_source("random", None) is TokenSource.RANDOM
    assert parse_source("self", None) is TokenSource.SELF
    assert parse_source("random", Path("a.txt")) is TokenSource.TEXT
    with pytest.raises(ProfileError, match="random or self"):
        parse_source("text", None)
    with pytest.raises(ProfileError, match="exclude each other"):
        parse_source("self", Path("a.txt"))
