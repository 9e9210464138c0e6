"""The wheel of a clone, named as a downloaded archive is: only `bivec` is installed, no module is imported twice."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "texts", "engine", "training", "serving", "evaluation", "benchmarks")

# which of our modules are imported, and from where, once everything is
LOADED = f"""
import json, sys
import bivec, bivec.cli, bivec.engine.encoder, bivec.serving.job, bivec.training.data, bivec.kernels.pooling
import bivec.evaluation.tasks, bivec.kernels.attention.operator
files = {{name: getattr(module, "__file__", None) for name, module in sys.modules.items()}}
print(json.dumps({{name: file for name, file in files.items() if file and name.split(".")[0] in {("bivec", *LAYERS)}}}))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "bivec-main"
    names = shutil.ignore_patterns(
        ".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".venv", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=names)
    return folder


@pytest.fixture(scope="module")
def wheel(clone) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."],
        cwd=clone,
        check=True,
    )
    (path,) = (clone / "dist").glob("*.whl")
    return path


def modules_loaded(folder: Path, path: Path) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def check_modules(loaded: dict[str, str], under: Path) -> None:
    assert all(name.split(".")[0] == "bivec" for name in loaded), loaded
    assert all(Path(file).resolve().is_relative_to(under.resolve()) for file in loaded.values())
    files = [Path(file).resolve() for file in loaded.values()]
    assert len(set(files)) == len(files)
    assert "bivec.kernels.pooling" in loaded


def test_wheel_installs_only_bivec(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bivec"}
    for layer in LAYERS:
        sources = {f"bivec/{file.relative_to(ROOT)}" for file in (ROOT / layer).rglob("*.py")}
        assert sources <= set(names)
        assert sources
    model = ROOT / "engine" / "default_model"
    files = {f"bivec/engine/default_model/{path.relative_to(model)}" for path in model.rglob("*") if path.is_file()}
    assert {"bivec/py.typed", "bivec/engine/default_model/model.safetensors"} | files <= set(names)
    assert {"bivec/kernels/attention/tiles.json", "bivec/engine/published.json"} <= set(names)

    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), str(wheel)], check=True
    )
    check_modules(modules_loaded(tmp_path, tmp_path), tmp_path)


def test_source_tree_on_the_path_sees_the_same_modules(clone):
    check_modules(modules_loaded(clone, clone), clone)


def test_kernels_is_no_module_of_its_own(clone):
    assert not (clone / "kernels" / "__init__.py").exists()
    assert not (clone / "__init__.py").exists()
    for layer in LAYERS:
        assert os.readlink(clone / "bivec" / layer) == f"../{layer}"
