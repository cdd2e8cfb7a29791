"""The mutation test of the tests: put each fault into a copy of the package, and say which check notices it.

python tests/verify/verify_mutants.py [WORD ...]      faults whose name has one of the words; all without words
"""

from __future__ import annotations

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

from verify_faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]

# What the package imports, so that each copy needs to load only itself. The package must not be among them.
PRELOAD = ("numpy", "tokenizers", "torch", "torch.distributed.checkpoint", "torch._dynamo", "tyro", "rich.console")


@dataclass(frozen=True)
class Outcome:
    """Which check noticed a fault, by what; neither when none did."""

    check: str = ""
    quantity: str = ""


def main(words: list[str]) -> int:
    """Try the faults, print a line for each; 1 if one was not noticed."""
    for name in PRELOAD:
        importlib.import_module(name)
    chosen = [f for f in FAULTS if not words or any(w in f.name for w in words)]
    width, missed, since = max((len(f.name) for f in chosen), default=0), 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stretto-mutants-") as directory:
        sound = Path(directory, "sound")  # a copy, so that whoever edits the package meanwhile does no harm
        _copy(ROOT / "stretto", sound)
        outcome = Outcome() if words else attempt(sound, None)
        if outcome.check:
            print(f"the package itself fails {outcome.check!r}: {outcome.quantity}")
            return 1
        for fault in chosen:
            outcome = attempt(sound, fault)
            missed += not outcome.check
            print(f"{fault.name:{width}}  {outcome.check or 'NOT NOTICED'}: {outcome.quantity}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults noticed in {time.monotonic() - since:.0f} s")
    return 1 if missed or not chosen else 0


def attempt(package: Path, fault: Fault | None) -> Outcome:
    """Run the checks on a copy of `package` that has the fault."""
    with tempfile.TemporaryDirectory(prefix="stretto-mutant-") as directory:
        faulty = Path(directory, "stretto")
        _copy(package, faulty)
        if fault is not None:
            fault.put_into(faulty)
        return _in_a_fork(Path(directory))


def _copy(package: Path, to: Path) -> None:
    shutil.copytree(package, to)  # with compiled files: they go by the time of the source, which is copied too


def _in_a_fork(directory: Path) -> Outcome:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            theirs.send(_judge(directory))
        except BaseException as error:  # noqa: BLE001  # sent to the parent, and then the process ends
            traceback.print_exc()
            theirs.send(Outcome("import", repr(error)))
        os._exit(0)
    theirs.close()
    outcome: Outcome = ours.recv()
    os.waitpid(pid, 0)
    return outcome


def _judge(directory: Path) -> Outcome:
    """In the fork: import the copy, and run check after check until one fails."""
    sys.path.insert(0, str(directory))
    import stretto

    assert stretto.__file__ is not None
    assert Path(stretto.__file__).is_relative_to(directory), "another stretto was imported before the copy"
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


def run_check(world: object, number: int) -> str:
    """Check `number`, on one rank."""
    from verify_checks import CHECKS

    return CHECKS[number].run(world)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
