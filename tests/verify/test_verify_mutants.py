"""A few faults put into the package, each noticed; `make mutants` tries all."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  # the optimizer imports it: once here, not in each worker
from verify_checks import CHECKS, Check
from verify_faults import FAULTS
from verify_mutants import run_check
from verify_said import SAID

from stretto.testing import Pool

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("pool")]  # worlds of its own

ROOT = Path(__file__).parents[2]

# One of each kind: of the loss, which a commit has alone; of a norm, of the pipeline, of data parallelism, of the
# optimizer, of the start.
FEW = (
    "the loss is divided by the tokens of the microbatch",
    "gradients of norms are not summed under sequence parallelism",
    "a gradient meets another microbatch's graph",
    "a microbatch's gradient overwrites the one before",
    "gradients are not clipped",
    "initial values follow the element's place on its rank",
)


def test_every_fault_still_fits_the_source() -> None:
    """Catches a fault whose line was rewritten: the table must follow the source."""
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25
    every = [*FAULTS, *(fault for said in SAID for fault in said.faults)]
    assert {f.name: n for f in every if (n := f.times(ROOT / "stretto")) != 1} == {}
    page = " ".join((ROOT / "docs" / "verify.md").read_text().split())
    assert f"{len(every)} faults are put into a copy" in page
    assert f"{len(FAULTS)} of them ([verify_faults]" in page


def test_what_a_docstring_says_that_its_tests_catch_is_put_in() -> None:
    """Catches a claim that nobody tries: the same words, in every test file that has such a list."""
    claims = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        if found := re.search(r"^Faults to catch: (.+?)\.(\n\n|$)", said, re.DOTALL | re.MULTILINE):
            claims[str(path.relative_to(ROOT))] = " ".join(found[1].split()).split("; ")
        else:
            other = re.search(r"to (catch|show up)\b[^.]*:", " ".join(said.split()))
            assert not other, f"{path.name}: write `Faults to catch: a; b.`"
    assert claims == {said.file: [fault.name for fault in said.faults] for said in SAID}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_package_passes_every_check(pool: Pool, check: Check) -> None:
    assert set(pool.run(check.ranks, run_check, CHECKS.index(check), timeout=140.0)) == {""}


@pytest.mark.parametrize("names", [FEW[:1], pytest.param(FEW[1:], marks=pytest.mark.nightly)], ids=len)
def test_faults_are_noticed(names: tuple[str, ...]) -> None:
    command = [sys.executable, str(Path(__file__).with_name("verify_mutants.py")), *names]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(names)} of {len(names)} faults noticed" in done.stdout
