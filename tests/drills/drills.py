"""Drills: ranks of `stretto train` that are stopped or killed at random moments, each with a verdict.

    python tests/drills/drills.py [--count 30] [--seed 0] [--launcher own|torchrun|hand] [--jobs 2] [--moment NAME] ..

Four ranks over Gloo, with small time-outs. A drill passes when everything has ended in time, no rank but the victim is
accused by anybody, the victim is named last on every output, and no traceback is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

RANK = str(Path(__file__).parent / "drill_rank.py")
SIZE = 4
LIMIT = 110.0
"""Seconds for a whole run, which takes 15 s undisturbed; torchrun waits 30 s for a process that is stopped."""

MOMENTS = {
    "rendezvous": 1,
    "default group": 1,
    "groups": 1,
    "agreement": 1,
    "group creation": 3,
    "data": 1,
    "model": 1,
    "output": 1,
    "first step": 1,
    "step": 6,
    "report": 6,
    "save": 2,
    "evaluate": 2,
    "teardown": 1,
    "end": 1,
    "goodbye": 1,
}
"""By moment, the n-th time at most."""

ACCUSED = re.compile(
    r"rank (\d+) does not answer|with rank (\d+) \(pid \d+\)(?:, does not answer| is not heard)"
    r"|[Rr]ank (\d+) of \d+ was (?:stopped|ended by SIGKILL)|ended by SIGKILL.*rank (\d+)"
    r"|^ +(\d+) .*(?:STOPPED|DEAD|MISSING) since|missing: ([\d, -]+)\. Arrived"
    r"|^rank(?:s)? ([\d, ]+) of \d+ did not come|rank (\d+) of \d+ did not come to|rank (0):? .*did not arrive"
    r"|store of rank (0)\b|rank (\d+) failed, and this rank|nothing answered at (MASTER_ADDR)",
    re.MULTILINE,
)
ROOT = "Root Cause (first observed failure):"


@dataclass(frozen=True)
class Drill:
    """What happens to whom, and when."""

    launcher: str
    victim: int
    signal: int
    moment: str
    nth: int
    delay: float
    checked: bool
    command: tuple[str, ...] = ()
    """Run in place of the signal: the link between the two hosts is cut."""

    def __str__(self) -> str:
        name = "link cut by" if self.command else signal.Signals(self.signal).name
        check = " --check-collectives" if self.checked else ""
        return f"{self.launcher:8} {name} rank {self.victim} in {self.moment!r} #{self.nth} + {self.delay:.2f} s{check}"


def draw(rng: random.Random, launchers: Sequence[str], moments: Sequence[str]) -> Drill:
    """A drill at random."""
    moment = rng.choice(moments)
    return Drill(
        launcher=rng.choice(launchers),
        victim=rng.randrange(SIZE),
        signal=rng.choice([signal.SIGSTOP, signal.SIGKILL]),
        moment=moment,
        nth=rng.randint(1, MOMENTS[moment]),
        delay=rng.choice([0.0, round(rng.uniform(0.0, 0.3), 3)]),
        checked=rng.random() < 0.3,
    )


def run(drill: Drill, folder: Path) -> tuple[list[str], float, list[str]]:
    """What is wrong, after how many seconds it ended, and the outputs."""
    folder.mkdir(parents=True)
    hosts: tuple[str, ...] = ()
    if drill.launcher == "hosts":
        hosts = make_hosts(f"dr{os.getpid()}n{folder.name}")
        drill = replace(drill, command=("ip", "-n", hosts[0], "link", "set", "eth0", "down"))
    try:
        return run_on(drill, folder, hosts)
    finally:
        for name in hosts:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def make_hosts(name: str) -> tuple[str, str]:
    """Two network namespaces, 10.211.0.1 and 10.211.0.2, joined by a wire."""
    names = f"{name}a", f"{name}b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    for each in names:
        ip("netns", "add", each)
    ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
    for number, each in enumerate(names, 1):
        ip("-n", each, "addr", "add", f"10.211.0.{number}/24", "dev", "eth0")
        ip("-n", each, "link", "set", "eth0", "up")
        ip("-n", each, "link", "set", "lo", "up")
    return names


def on_host(names: Sequence[str], rank: int) -> list[str]:
    """What runs a rank's command on its host, which is called n1 or n2."""
    host = rank * len(names) // SIZE
    called = f'hostname n{host + 1} && exec "$@"'
    return ["ip", "netns", "exec", names[host], "unshare", "--uts", "sh", "-c", called, "sh"]


def run_on(drill: Drill, folder: Path, hosts: Sequence[str]) -> tuple[list[str], float, list[str]]:
    """The same, with the hosts made."""
    words = "train --preset tiny --steps 8 --save-every 3 --eval-every 3 --held-out 0.2 --tp 2 --pp 2 --dp 1"
    words += " --no-tensorboard --sample-tokens 0 --timeout 4 --start-timeout 8"
    train = [*words.split(), "--out", str(folder / "run"), "--data", corpus(folder.parent)]
    train += ["--cache", str(folder.parent / "cache")] + ["--check-collectives"] * drill.checked
    env = os.environ | {"DRILL": json.dumps(asdict(drill)), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    python = [sys.executable, "-W", "ignore"]
    if drill.launcher == "own":
        commands = [([*python, RANK, *train, "--nproc", str(SIZE)], env)]
    elif drill.launcher == "torchrun":
        agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
        commands = [([*python, *agent, RANK, *train], env)]
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1"}
        ranks = [common | {"RANK": str(r), "LOCAL_RANK": str(r), "MASTER_PORT": str(port)} for r in range(SIZE)]
        if hosts:
            two = {"LOCAL_WORLD_SIZE": str(SIZE // 2), "MASTER_ADDR": "10.211.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
            ranks = [each | two | {"LOCAL_RANK": str(r % (SIZE // 2))} for r, each in enumerate(ranks)]
        where = [on_host(hosts, r) if hosts else [] for r in range(SIZE)]
        commands = [([*where[r], *python, RANK, *train], env | each) for r, each in enumerate(ranks)]
    files = [(folder / f"err{n}").open("w+") for n in range(len(commands))]
    began = time.monotonic()
    running = [
        subprocess.Popen(command, env=each, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
        for (command, each), file in zip(commands, files, strict=True)
    ]
    hung = []
    for n, process in enumerate(running):
        if drill.launcher == "hand" and n == drill.victim:
            continue
        try:
            process.wait(max(0.1, began + LIMIT - time.monotonic()))
        except subprocess.TimeoutExpired:
            hung.append(n)
    seconds = time.monotonic() - began
    for process in running:
        end_session(process.pid)
        process.wait()
    outputs = []
    for file in files:
        file.seek(0)
        outputs.append(file.read())
        file.close()
    codes = [process.returncode for process in running]
    return verdict(drill, outputs, codes, hung), seconds, outputs


def end_session(session: int) -> None:
    """Kill all processes of a session that this program has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == session:
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            pass


def verdict(drill: Drill, outputs: list[str], codes: list[int], hung: list[int]) -> list[str]:
    """What is wrong with how it ended."""
    wrong = [f"process {n} never ended" for n in hung]
    if not any("drill:" in text for text in outputs):
        return [*wrong, "the moment did not come"] if hung or any(codes) else ["void: the moment did not come"]
    for n, (text, code) in enumerate(zip(outputs, codes, strict=True)):
        if drill.command:
            wrong += [f"output {n}: {each}" for each in of_cut_link(drill, n, text, code)]
        elif drill.launcher != "hand" or n != drill.victim:
            wrong += [f"output {n}: {each}" for each in of_lost_rank(drill, text, code)]
    return wrong


def accused_in(text: str) -> set[int]:
    """All ranks that a text blames. An address without an answer is rank 0's."""
    found = [part for each in ACCUSED.findall(text) for part in each]
    return {0 for part in found if part == "MASTER_ADDR"} | {int(r) for part in found for r in re.findall(r"\d+", part)}


def of_lost_rank(drill: Drill, text: str, code: int) -> list[str]:
    """What is wrong with what a rank other than the victim said, or a launcher of all."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("drill:", "[W"))]
    accused, root = accused_in(text), text.partition(ROOT)[2]
    wrong = [f"accuses {sorted(accused)}"] if accused - {drill.victim} else []
    said = text.partition("torch/distributed/elastic/multiprocessing/api.py")[0]  # before torchrun's own words
    if "Traceback (most recent call last)" in said + root:
        wrong.append("has a traceback")
    if code == 0:  # fine only where it had all that it needed of the victim
        return (
            wrong if drill.launcher == "hand" and drill.moment in ("end", "goodbye", "teardown") else ["ended with 0"]
        )
    if drill.launcher == "hand" and not lines and code == 1 and drill.victim:
        return wrong  # the verdict of a rendezvous, which rank 0 tells
    if drill.launcher == "torchrun":
        killed = f"rank      : {drill.victim} " in root and drill.signal == signal.SIGKILL
        return wrong if killed or drill.victim in accused_in(root) else [*wrong, "its root cause is another rank"]
    if not accused_in("\n".join(lines[-2:])) and not re.search("STOPPED|DEAD", text):
        wrong.append("does not end with who it was")
    return wrong


def of_cut_link(drill: Drill, n: int, text: str, code: int) -> list[str]:
    """What is wrong with what a rank of one of the two hosts said."""
    here, there = ("n1", "n2") if n < SIZE // 2 else ("n2", "n1")
    last = [line for line in text.splitlines() if line.strip()][-1:]
    if code == 0:  # only where it had all that it needed of the others
        return [] if drill.moment in ("end", "goodbye") else ["ended with 0"]
    if "within 8 s; missing: 2-3" in text or "within 8 s; missing: 2" in text or "MASTER_ADDR=10.211.0.1" in text:
        return []  # the ranks had not met: nobody knows a host yet
    if (
        n == 1
        and code == 1
        and not [line for line in text.splitlines() if line and not line.startswith(("[W", "drill: "))]
    ):
        return []  # rank 0 speaks for its host
    if "at 10.211.0.1" in text:
        return []
    if not last or there not in last[0] or f"on {here}" in last[0] or f"host {here}" in last[0]:
        return [f"does not end with the host {there} that is not heard: {last}"]
    return ["has a traceback"] * ("Traceback" in text)


def corpus(folder: Path) -> str:
    """Sixty little texts."""
    root = folder / "songs"
    if not root.exists():
        root.mkdir(parents=True)
        words = ["over", "the", "hills", "and", "far", "away"]
        for n in range(60):
            (root / f"{n}.txt").write_text(" ".join(random.Random(n).choices(words, k=60)) + "\n")
    return str(root)


def main() -> int:
    """The number of drills that failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="drills at a time")
    parser.add_argument("--launcher", action="append", choices=["own", "torchrun", "hand", "hosts"])
    parser.add_argument("--moment", action="append", choices=list(MOMENTS))
    parser.add_argument("--victim", type=int)
    parser.add_argument("--signal", choices=["STOP", "KILL"])
    parser.add_argument("--checked", type=int)
    parser.add_argument("--keep", type=Path, help="directory for the outputs of drills that fail")
    parser.add_argument("--show", action="store_true", help="the outputs of drills that fail")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    drills = [
        draw(rng, args.launcher or ["own", "torchrun", "hand"], args.moment or list(MOMENTS)) for _ in range(args.count)
    ]
    fixed = {}
    if args.victim is not None:
        fixed["victim"] = args.victim
    if args.signal:
        fixed["signal"] = getattr(signal, f"SIG{args.signal}")
    if args.checked is not None:
        fixed["checked"] = bool(args.checked)
    drills = [Drill(**{**asdict(d), **fixed}) for d in drills]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="drills-") as scratch, ThreadPoolExecutor(args.jobs) as pool:
        corpus(Path(scratch))
        done = pool.map(lambda n: run(drills[n], Path(scratch) / str(n)), range(len(drills)))
        for drill, (wrong, seconds, outputs) in zip(drills, done, strict=True):
            void = wrong and wrong[0].startswith("void")
            failed += bool(wrong) and not void
            mark = "void" if void else "FAIL" if wrong else "ok"
            sys.stdout.write(f"{mark:4} {seconds:5.1f} s  {drill}  {'; '.join(wrong)}\n")
            if wrong and not void and args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                for n, text in enumerate(outputs):
                    (args.keep / f"{drills.index(drill)}.{n}").write_text(text)
            if wrong and not void and args.show:
                for n, text in enumerate(outputs):
                    sys.stdout.write(f"---- output {n}\n{text[-3500:]}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(drills) - failed} of {len(drills)} passed\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
