"""The wheel holds the whole package: installed into an empty environment, every module imports from there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "solvers", "profiles", "planner", "experiments")
CODE = """
import importlib, json, pkgutil, msq
modules = [name for _, name, _ in pkgutil.walk_packages(msq.__path__, "msq.")]
for name in modules:
    importlib.import_module(name)
from msq.kernels.codebooks import codebook
from msq.kernels.cuda.compiler import SOURCES
from msq.kernels.specs import Family, QuantizerSpec
from msq.profiles.inventory import inventory
from msq.profiles.model_source import resolve_model
print(json.dumps([msq.__file__, len(modules), len(codebook(QuantizerSpec(Family.VQ, 6))),
                  sorted(path.name for path in SOURCES.iterdir()),
                  len(inventory(resolve_model("ref-tiny-3m")).layers)]))
"""


def test_the_wheel_is_whole(tmp_path):
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "demo")
    shutil.copytree(ROOT, source, ignore=skipped, symlinks=True)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("msq-*.whl")
    home = tmp_path / "empty"
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    # Dependencies come from here; a path file adds the folder without its own path files, so not the editable msq.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run([python, "-I", "-c", CODE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    place, modules, entries, sources, layers = __import__("json").loads(done.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(site)
    assert modules >= sum(len(list((ROOT / folder).rglob("*.py"))) for folder in FOLDERS)
    assert entries == 4096 and layers == 28
    assert sources == sorted(path.name for path in (ROOT / "kernels" / "cuda" / "sources").iterdir())
