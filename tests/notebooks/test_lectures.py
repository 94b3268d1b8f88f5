"""Lectures beyond nbval: as a plain script, in fp32 where the processor may not use its bf16 units, in little memory."""

import os
import subprocess
import sys

import pytest

from course_lib.grading.paths import ROOT, sources

LECTURES = sources("lectures")
MEMORY = 2 << 30  # bytes
RUN = """
import pathlib, resource, runpy, sys
import course_lib.devices as devices
assert not devices.bf16_pays("cpu")
runpy.run_path(sys.argv[1], run_name="__main__")
status = pathlib.Path("/proc/self/status")
if status.exists():  # Linux counts to a program's maxrss what the one that started it held
    kilobytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print("peak", kilobytes * 1024)
"""


@pytest.mark.notebook
@pytest.mark.parametrize("number", ["01"])
def test_lecture_runs_as_a_script_in_fp32(number, tmp_path):
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(LECTURES[number])]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split("peak")[-1]) <= MEMORY
    assert not list(tmp_path.iterdir()), "a lecture writes no files"


@pytest.mark.parametrize("path", LECTURES.values(), ids=[f"set_{number}" for number in LECTURES])
def test_lecture_has_its_parts_in_order(path):
    """What every lecture holds (see CONTRIBUTING.md), in this order."""
    text = path.read_text()
    parts = [
        "After it you can",
        "## The picture first",
        "assert ",
        "Explorer(",
        "## What goes wrong",
        "Stable Diffusion",
        "**Exercises.**",
        "## Sources",
    ]
    assert all(part in text for part in parts)
    fixed = [text.index(part) for part in parts if part.startswith(("After", "## ", "**"))]
    assert fixed == sorted(fixed)
    first_formula, picture = text.index("$$"), text.index("## The picture first")
    assert picture < first_formula
    assert str(ROOT) not in text
