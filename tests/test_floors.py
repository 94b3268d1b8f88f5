"""The floors: a file imports from lower floors only, and models run where there are no notebooks and no plots."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
FLOORS = "A file imports from lower floors only"
LOOP = "The steps and the loop know neither guidance nor posteriors nor operators"
HEADLESS = "Models, data, training and sampling need neither notebooks nor plots"


def contracts() -> dict[str, dict]:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {contract["name"]: contract for contract in listed}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package in `folder` under the contracts of the pyproject.toml there."""
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, timeout=120)


def copy_of_the_sources(folder: Path) -> Path:
    shutil.copytree(ROOT / "course_lib", folder / "course_lib", ignore=lambda _, names: [n for n in names if n == "__pycache__"])
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "course_lib"


def test_the_contracts_are_kept() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in (FLOORS, LOOP, HEADLESS):
        assert f"{name} KEPT" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("types.py", "import course_lib.sample", "course_lib.types is not allowed to import course_lib.sample"),
        ("gaussians.py", "from course_lib.denoisers import batched", "gaussians is not allowed to import course_lib.denoisers"),
        # a neighbour on the same floor
        ("schedules.py", "from course_lib import gaussians", "schedules is not allowed to import course_lib.gaussians"),
        # an import inside a function
        ("training.py", "def f():\n    from course_lib import zoo", "training is not allowed to import course_lib.zoo"),
        # a module that was given no floor
        ("a_new_module.py", "", "- course_lib.a_new_module"),
        ("sample.py", "from course_lib.guidance import cfg", "sample is not allowed to import course_lib.guidance"),
        ("steps.py", "import course_lib.guidance", "steps is not allowed to import course_lib.guidance"),
        ("worlds/digits.py", "import matplotlib.pyplot", "worlds is not allowed to import matplotlib"),
        ("zoo/__init__.py", "from IPython.display import display", "zoo is not allowed to import IPython"),
    ],
)
def test_the_linter_sees_a_breach(tmp_path: Path, file: str, line: str, said: str) -> None:
    path = copy_of_the_sources(tmp_path) / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert said in result.stdout


def test_the_loop_contract_names_every_wrapper_that_exists() -> None:
    wrappers = {f"course_lib.{name}" for name in ("guidance", "posterior", "operators") if _exists(name)}
    contract = contracts()[LOOP]
    assert set(contract["forbidden_modules"]) == wrappers
    layers = [layer.split(" | ") for layer in contracts()[FLOORS]["layers"]]
    first, last = (next(i for i, layer in enumerate(layers) if name in layer) for name in ("stochastic", "steps"))
    ways_to_move = {f"course_lib.{name}" for layer in layers[first : last + 1] for name in layer} - wrappers
    loops = {f"course_lib.{name}" for name in ("sample", "adaptive", "parallel", "gddim")}
    assert set(contract["source_modules"]) == ways_to_move | loops


def _exists(name: str) -> bool:
    return (ROOT / "course_lib" / f"{name}.py").exists() or (ROOT / "course_lib" / name).is_dir()


def test_models_run_without_notebooks_and_plots() -> None:
    """As on a GPU machine that has torch and diffusers only: the forbidden packages cannot be imported at all."""
    absent = contracts()[HEADLESS]["forbidden_modules"]
    program = f"""
import sys
absent = {absent!r}
for name in absent:
    sys.modules[name] = None  # importing it now raises ModuleNotFoundError
import torch
import course_lib.training, course_lib.zoo
from course_lib.sample import sample
from course_lib.worlds import digits
for name in course_lib.zoo.names():
    course_lib.zoo.recipe(name)
images, labels = digits.load("train")
x = sample(lambda x, sigma: 0 * x, images[:2], torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
assert x.shape == images[:2].shape
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_importing_the_models_loads_no_notebook_and_no_plotting_package() -> None:
    """Also where they are installed: nothing below imports them on its own or through another package."""
    program = """
import sys
import course_lib.sample, course_lib.training, course_lib.worlds.digits, course_lib.zoo
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    loaded = set(result.stdout.split())
    assert {"torch", "course_lib"} <= loaded
    absent = set(contracts()[HEADLESS]["forbidden_modules"])
    assert not {name for name in loaded if name in absent or name.startswith("jupyter")}
