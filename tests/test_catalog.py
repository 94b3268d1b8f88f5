"""Every entry of the catalog is true: its functions import, its tests exist, its lecture is there, its claim is not empty."""

import importlib
import re

import pytest

from course_lib import catalog
from course_lib.grading.paths import ROOT, sources

SYSTEMS = catalog.systems()


@pytest.mark.parametrize("system", SYSTEMS, ids=[system.id for system in SYSTEMS])
def test_entry(system):
    for dotted in system.functions:
        parts = dotted.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            try:
                target = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            for part in parts[cut:]:
                target = getattr(target, part)
            assert target.__doc__, f"{dotted} has no docstring"
            break
        else:
            pytest.fail(f"{dotted} does not import")
    for node in system.tests:
        path, _, name = node.partition("::")
        text = (ROOT / path).read_text()
        assert not name or re.search(rf"^(def|class) {name.split('[')[0]}\b", text, re.M), node
    assert system.lecture in sources("lectures")
    assert re.fullmatch(r"(\d{4}\.\d{4,5}|)", system.arxiv)
    assert system.tests and system.functions and system.claim.endswith(".") and system.measured
    assert 1900 < system.year < 2100 and system.paper and system.authors


def test_ids_are_unique():
    ids = [system.id for system in SYSTEMS]
    assert len(set(ids)) == len(ids) > 0


def test_a_wrong_entry_is_named(tmp_path):
    path = tmp_path / "catalog.toml"
    path.write_text('[[system]]\nid = "x"\n')
    with pytest.raises(ValueError, match=r"entry 1 \(x\): missing or unknown"):
        catalog.systems(path)
