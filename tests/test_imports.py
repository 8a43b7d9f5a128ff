"""The import rules of the architecture, read from the source, and what importing must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "solvers": set(),
    "profiles": {"kernels"},
    "planner": {"profiles", "solvers", "kernels"},
    "experiments": {"planner", "profiles", "solvers", "kernels"},
}
SOURCES = [path.relative_to(ROOT) for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Modules of msq that a file imports, as dotted names inside the package; every import must be relative."""
    found = set()
    package = list(path.parent.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "msq" for alias in node.names), f"{path}: use relative imports"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {module} if node.module else {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "msq", f"{path}: use relative imports"
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_folder_imports_only_what_stands_below_it(path):
    folder = path.parts[0]
    for module in imported_modules(path):
        other = module.split(".")[0]
        if other in MAY_IMPORT and other != folder:
            assert other in MAY_IMPORT[folder], f"{path} imports {module}"


def test_there_are_no_cycles():
    graph = {".".join(path.with_suffix("").parts): imported_modules(path) for path in SOURCES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module in done or module not in graph:
            return
        for other in sorted(graph[module]):
            visit(other, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())
    assert done == set(graph)


def run_python(code: str, tmp_path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_msq_loads_nothing_heavy_and_makes_no_file(tmp_path):
    heavy = "{'torch', 'transformers', 'pandas', 'numpy', 'ortools', 'cvxpy', 'pulp', 'huggingface_hub'}"
    assert run_python(f"import sys, msq; print(sorted({heavy} & set(sys.modules)))", tmp_path) == "[]"
    assert not list(tmp_path.iterdir())


def test_planning_runs_without_torch(tmp_path):
    modules = ["msq.cli", "msq.solvers.registry", "msq.solvers.lagrangian", "msq.planner.solve", "msq.planner.frontier"]
    modules += ["msq.profiles.tables", "msq.profiles.inventory", "msq.experiments.plan_map", "msq.experiments.compare"]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print('torch' in sys.modules)"
    assert run_python(code, tmp_path) == "False"
