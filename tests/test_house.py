"""The house: requirements and pins agree, the tree stays small, and no file speaks of the machine it was made on."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TREE_LIMIT = 54 * 2**20
WEIGHTS_LIMIT = 40_000_000
NOTEBOOK_LIMIT = 500_000
PINNED_BY_TORCH = re.compile(r"nvidia-|cuda-|triton|pytorch-triton")
NEVER_PINNED = {"diffusion-course", "pip", "setuptools", "wheel"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[Requirement]:
    """The runtime requirements of pyproject.toml and those of `extras`."""
    lines = project()["dependencies"] + [line for extra in extras for line in project()["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def pins() -> dict[str, Version]:
    """constraints.txt: canonical name -> version; fails on a line that is not an exact pin, and on a name given twice."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"constraints.txt has {line!r}; expected name==version, without a local suffix"
        name = canonicalize_name(match[1])
        assert name not in found, f"constraints.txt pins {name} twice"
        found[name] = Version(match[2])
    return found


def tree() -> list[Path]:
    """The files that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    return [ROOT / name for name in sorted(set(names)) if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("requirement", requirements("test", "grade"), ids=lambda requirement: requirement.name)
def test_each_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert version in requirement.specifier, (
        f"constraints.txt pins {requirement.name} {version}; expected {requirement.specifier}"
    )


def test_what_the_requirements_bring_is_pinned_too() -> None:
    todo, seen, floating = requirements("test", "grade"), set(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name in NEVER_PINNED or PINNED_BY_TORCH.match(name):
            continue
        seen.add(key)
        try:
            children = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        if name not in pins():
            floating.add(name)
        extras = [*requirement.extras, ""]
        todo += [one for one in children if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)]
    assert len(seen) > 50
    assert not floating, f"constraints.txt does not pin {', '.join(sorted(floating))}"


def test_torch_is_the_version_of_the_course_and_torchvision_is_not_needed() -> None:
    assert pins()["torch"] == Version("2.13.0")
    named = {canonicalize_name(one.name) for one in requirements("test", "grade", "dev")} | set(pins())
    assert "torchvision" not in named


def test_environment_yml_installs_the_pinned_course() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == project()["name"]
    python = next(line for line in environment["dependencies"] if str(line).startswith("python="))
    assert Version(python.removeprefix("python=")) in Requirement(f"python{project()['requires-python']}").specifier
    assert "pip" in environment["dependencies"]
    (pip_lines,) = (line["pip"] for line in environment["dependencies"] if isinstance(line, dict))
    assert pip_lines == ["-c constraints.txt", "-e .[test]"]


def test_tree_weights_and_notebooks_are_small() -> None:
    sizes = {path: path.stat().st_size for path in tree()}
    weights = sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    assert sum(sizes.values()) < TREE_LIMIT, f"the tree has {sum(sizes.values())} bytes; expected fewer than {TREE_LIMIT}"
    assert weights <= WEIGHTS_LIMIT, f"the weights have {weights} bytes; expected at most {WEIGHTS_LIMIT}"
    large = [f"{path.name}: {size}" for path, size in sizes.items() if path.suffix == ".ipynb" and size > NOTEBOOK_LIMIT]
    assert not large, f"notebooks over {NOTEBOOK_LIMIT} bytes: {', '.join(large)}"


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    # Each literal is put together here, so that this file does not contain it.
    folders = ["/".join(("", *parts)) for parts in (("work", ""), ("opt", "wheels"), ("opt", "pypi"))]
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("deb", "debian", "org"), ("npmjs", "org"))]
    literals = [literal.encode() for literal in folders + hosts]
    guilty = []
    for path in tree():
        data = path.read_bytes()
        if b"\0" not in data:
            guilty += [f"{path.relative_to(ROOT)} contains {one.decode()}" for one in literals if one in data]
    assert not guilty, "\n".join(guilty)
