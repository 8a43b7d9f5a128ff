"""The memory that applying a plan takes does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
from msq.profiles.model_source import EMBEDDED

SMALL, LARGE = 2, 10


def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    config = json.loads((EMBEDDED / "ref-tiny-3m" / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 1536, "dtype": "float32", "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "msq.experiments.bench_apply", "--model", str(tmp_path / "config.json")]
    command += ["--blocks", str(SMALL), str(LARGE), "--palette", "nuq-[234]", "--shard-mib", "32"]
    subprocess.run([*command, "--out", str(tmp_path / "out.csv")], check=True, cwd=tmp_path)
    rows = pd.read_csv(tmp_path / "out.csv").set_index("blocks")
    assert (rows["packed_bytes"] == rows["promised_bytes"]).all()
    assert rows["model_mib"][LARGE] - rows["model_mib"][SMALL] > 80
    assert rows["peak_resident_mib"][LARGE] - rows["peak_resident_mib"][SMALL] < 16
