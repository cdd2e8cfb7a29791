"""The mutation test of the tests: put each fault into a copy of the package, and say which check notices it.

    python tests/verify/verify_mutants.py [WORD ...]      faults whose name has one of the words; all without words

The faults of `verify_faults` go through the checks of `verify_checks`; those that a test file says it catches, in
`verify_said`, through that file, its nightly tests left out. The exit code is 1 if one is not noticed, or does not fit
the source any more.
"""

from __future__ import annotations

import compileall
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verify_fault import Fault
from verify_faults import FAULTS
from verify_said import SAID

ROOT = Path(__file__).parents[2]

# What the package imports, so that each copy needs to load only itself. The package must not be among them.
PRELOAD = (
    "numpy",
    "tokenizers",
    "torch",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "shtab",
    "rich.console",
    "pytest",
)


LONGEST = 240
"""Characters of a line."""


@dataclass(frozen=True)
class Outcome:
    """Which check noticed a fault, by what; neither when none did."""

    check: str = ""
    quantity: str = ""


def main(words: list[str]) -> int:
    """Try the faults, print a line for each; 1 if one was not noticed."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: no fault is looked for on a GPU
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, as in the tests' own processes
    for name in PRELOAD:
        importlib.import_module(name)
    every = [(fault, "") for fault in FAULTS] + [(fault, said.test) for said in SAID for fault in said.faults]
    chosen = [(fault, test) for fault, test in every if not words or any(word in fault.name for word in words)]
    width, bad, since = max((len(fault.name) for fault, _ in chosen), default=0), 0, time.monotonic()
    passes: dict[str, bool] = {}  # tests that have noticed a fault: whether they do without one
    with tempfile.TemporaryDirectory(prefix="stretto-mutants-") as directory:
        sound = Path(directory)  # a copy, so that whoever edits the package meanwhile does no harm
        for name in ("stretto", "tests", "docs"):
            shutil.copytree(ROOT / name, sound / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", sound)
        compileall.compile_dir(sound / "stretto", quiet=1)  # once: it goes by the time of the source, copied too
        outcome = Outcome() if words else attempt(sound, None, "")
        if outcome.check:
            print(f"the package itself fails {outcome.check!r}: {outcome.quantity}")
            return 1
        for fault, test in chosen:
            outcome = judge(sound, fault, test, passes)
            bad += not outcome.check
            line = f"{fault.name:{width}}  {outcome.check or 'NOT NOTICED'}: {outcome.quantity}"
            print(f"{line[:LONGEST]}..." if len(line) > LONGEST else line, flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults noticed in {time.monotonic() - since:.0f} s")
    return 1 if bad or not chosen else 0


def judge(sound: Path, fault: Fault, test: str, passes: dict[str, bool]) -> Outcome:
    """Which check notices a fault, or which test of a file; the test must pass without the fault, here too."""
    try:
        outcome = attempt(sound, fault, test)
    except ValueError as stale:
        return Outcome(quantity=f"the fault does not fit the source: {stale}")
    if not (test and outcome.check):
        return outcome
    if outcome.check not in passes:
        passes[outcome.check] = attempt(sound, None, outcome.check) == Outcome()
    return outcome if passes[outcome.check] else Outcome(quantity=f"{outcome.check} fails without the fault too")


def attempt(sound: Path, fault: Fault | None, test: str) -> Outcome:
    """Run a test file, or the checks where none is named, on a copy of `sound` that has the fault.

    Raises ValueError when the fault does not fit the source.
    """
    with tempfile.TemporaryDirectory(prefix="stretto-mutant-") as directory:
        faulty = Path(directory)
        shutil.copytree(sound / "stretto", faulty / "stretto")
        if fault is not None:
            fault.put_into(faulty / "stretto")
        if test:
            for name in ("pyproject.toml", "docs"):  # tests that hold pages against the package
                (faulty / name).symlink_to(sound / name)
            shutil.copytree(sound / "tests", faulty / "tests")
        return _in_a_fork(faulty, test)


def _in_a_fork(directory: Path, test: str) -> Outcome:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            sys.path.insert(0, str(directory))
            os.environ["PYTHONPATH"] = str(directory)  # programs that a test starts have the fault, too
            theirs.send(_tested(directory, test) if test else _judged(directory))
        except BaseException as error:  # noqa: BLE001  # sent to the parent, and then the process ends
            traceback.print_exc()
            theirs.send(Outcome("" if test else "import", repr(error)))
        os._exit(0)
    theirs.close()
    try:
        outcome: Outcome | None = ours.recv()
    except EOFError:
        outcome = None
    _, status = os.waitpid(pid, 0)
    return outcome or Outcome(test or "the process", f"ended without a word: {os.waitstatus_to_exitcode(status)}")


def _judged(directory: Path) -> Outcome:
    """In the fork: import the copy, and run check after check until one fails."""
    _import_from(directory)
    from verify_checks import CHECKS

    from stretto.testing import Pool

    with Pool(max(check.ranks for check in CHECKS)) as pool:
        for number, check in enumerate(CHECKS):
            try:
                wrong = next(filter(None, pool.run(check.ranks, run_check, number, timeout=60.0)), "")
            except Exception as error:  # noqa: BLE001  # whatever it is, the fault did not go unnoticed
                wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if wrong:
                return Outcome(check.name, wrong)
    return Outcome()


def _tested(directory: Path, test: str) -> Outcome:
    """In the fork: run a test file of the copy until one of its tests fails."""
    import pytest

    _import_from(directory)
    os.chdir(directory)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    heard = _Failure()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not nightly", test], plugins=[heard])
    if code == pytest.ExitCode.OK:
        return Outcome()
    if code != pytest.ExitCode.TESTS_FAILED:
        return Outcome("", f"pytest ended with {code!r}")
    return Outcome(heard.test, heard.message)


class _Failure:
    """A plugin of pytest: the first test that fails, and how."""

    test = message = ""

    def pytest_collection(self) -> None:
        """One failing example is enough: nobody reads a smaller one."""
        from hypothesis import Phase, settings

        settings.register_profile("mutants", settings.default, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep it."""
        if report.failed and not self.test:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.test, self.message = report.nodeid, (getattr(crash, "message", "") or "failed").splitlines()[0]


def _import_from(directory: Path) -> None:
    import stretto

    assert stretto.__file__ is not None
    assert Path(stretto.__file__).is_relative_to(directory), "another stretto was imported before the copy"


def run_check(world: object, number: int) -> str:
    """Check `number`, on one rank."""
    from verify_checks import CHECKS

    return CHECKS[number].run(world)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
