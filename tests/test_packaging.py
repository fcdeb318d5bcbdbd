"""The built wheel, installed into an environment of its own and used from another folder."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rubric_data", "rm", "policy", "configs")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree: building leaves folders behind, and files that git ignores must not count."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in (*PACKAGES, "tests", "benchmarks"):
        shutil.copytree(ROOT / package, source / package)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """bin/ of a fresh environment that holds the wheel; its dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    # a plain path entry: .pth files behind it, such as an editable install of this very tree, are not followed
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(packages.stdout.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(environment, tmp_path, *command):
    return subprocess.run([environment / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True)


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_carries_the_licence(wheel):
    assert any(name.endswith("LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_command_works_from_another_folder(environment, tmp_path):
    version = run(environment, tmp_path, "rubric-rm", "--version")
    assert version.stdout.startswith("rubric-rm 0.1.0 "), version.stderr
    helped = run(environment, tmp_path, "rubric-rm", "train", "--help")
    assert helped.returncode == 0 and "--learning_rate" in helped.stdout
    # the recipe is found and read before the fault in the options is
    fault = run(environment, tmp_path, "rubric-rm", "calibrate", "--config", "calibrate", "--tokens_per_batch", "x")
    assert fault.stderr == "rubric-rm: error: option '--tokens_per_batch' must be a whole number, got 'x'\n"
    assert fault.returncode == 2


def test_recipes_templates_and_embedded_data_come_from_the_wheel(environment, tmp_path):
    probe = (
        "import configs, jinja2, rm, rubric_data\n"
        "from rubric_data.io import load_data\n"
        "print(configs.recipe_path('quickstart'))\n"
        "for package in ('rm', 'policy', 'rubric_data'):\n"
        "    assert jinja2.PackageLoader(package, 'templates').list_templates(), package\n"
        "print(len(load_data('builtin')))\n"
    )
    done = run(environment, tmp_path, "python", "-c", probe)
    assert done.returncode == 0, done.stderr
    recipe, responses = done.stdout.split()
    assert Path(recipe).is_relative_to(environment.parent)
    assert int(responses) >= 120 * 8
