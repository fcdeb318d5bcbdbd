"""The shape of the house: which package may import which, and what stays light enough for `--help`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "rubric_data": {"rubric_data"},
    "configs": {"configs", "rubric_data"},
    "rm": {"rm", "rubric_data"},
    "policy": {"policy", "rm", "rubric_data", "configs"},
}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate"}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that ``path`` imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}:{node.lineno}: write imports in full, not relative"
            found.add((node.module or "").partition(".")[0])
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    assert modules(package), f"{package}/ has no modules: the test looks in the wrong place"
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package]
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in modules(package)
        if (names := imported_packages(path) & forbidden)
    }
    assert not wrong


def test_nothing_that_ships_imports_what_does_not():
    wrong = [
        path for package in MAY_IMPORT for path in modules(package) if imported_packages(path) & {"tests", "benchmarks"}
    ]
    assert not wrong


def test_the_data_package_never_imports_model_libraries():
    wrong = {path.name: names for path in modules("rubric_data") if (names := imported_packages(path) & HEAVY)}
    assert not wrong


@pytest.mark.parametrize("module", ["policy.cli", "policy.config", "rm.config", "rubric_data.config", "configs"])
def test_what_help_needs_loads_no_model_library(module):
    probe = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = HEAVY | {"numpy", "pandas", "pyarrow", "datasets", "openai"}
    assert not heavy & {name.partition(".")[0] for name in loaded.stdout.split()}


def test_every_module_says_what_it_owns():
    undocumented = [
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in modules(package)
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not undocumented


def test_the_readme_has_a_line_for_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [path for package in (*MAY_IMPORT, "benchmarks") for path in (ROOT / package).rglob("*.[pch]*")]
    names = [path.relative_to(ROOT).as_posix() for path in files if path.suffix in (".py", ".c", ".h")]
    assert [name for name in names if not name.endswith("__init__.py") and f"`{name}`" not in readme] == []
