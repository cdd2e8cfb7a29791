"""Processes that tokenize parts of a corpus side by side: `python -m stretto.data.workers FOLDER` is one of them.

They agree by the locks in the folder alone, and tell the process that started them by lines of JSON how far they are.
When that one dies, the next line cannot be written, and they end.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any, Final

import stretto
from stretto.data.chat import tokenizer_of
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.formats import Piece
from stretto.data.parts import Done, Job, Part, work

_PLAN: Final = "plan.json"


class WorkerEndedError(DataError):
    """A process ended without a word, killed perhaps: the parts that are done serve the next try."""


def run_workers(job: Job, workers: int, done: Done, timeout: float) -> None:
    """Tokenize all parts with so many processes. Raises DataError when one of them fails; the others are ended."""
    plan = {
        "key": job.key,
        "root": str(job.corpus.root.absolute()),
        "text_key": job.corpus.text_key,
        "tokenizer": job.tokenizer.name,
        "chat": job.tokenizer.masks,
        "held_out": job.held_out,
        "timeout": timeout,
        "parts": [[[astuple(piece) for piece in part.pieces], part.size] for part in job.parts],
    }
    written = job.folder / f"{_PLAN}.{os.getpid()}.tmp"
    written.write_text(json.dumps(plan))
    written.replace(job.folder / _PLAN)
    where = str(Path(stretto.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (where, os.environ.get("PYTHONPATH"))))
    # One core each: what is not the tokenizer's (reading, JSON, checks) is then spread over all cores, too.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    with ExitStack() as stack:
        command = [sys.executable, "-m", "stretto.data.workers", str(job.folder)]
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment)
            for _ in range(workers)
        ]
        for process in running:
            stack.callback(_end, process)
        _listen(running, done)


def _listen(running: list[subprocess.Popen[bytes]], done: Done) -> None:
    """Pass on what the workers tell, until all have ended."""
    buffers = dict.fromkeys(running, b"")
    with selectors.DefaultSelector() as selector:
        for process in running:
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, process)
        while buffers:
            for key, _ in selector.select():
                process = key.data
                if raw := os.read(key.fd, 1 << 16):
                    *lines, buffers[process] = (buffers[process] + raw).split(b"\n")
                    for line in lines:
                        _heard(json.loads(line), done)
                    continue
                selector.unregister(key.fileobj)
                del buffers[process]
                if code := process.wait():
                    why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                    raise WorkerEndedError(
                        f"process {process.pid}, which tokenized, has ended ({why}); what is done is kept, so the same "
                        "command goes on from there, with --workers perhaps lower if memory ran out"
                    )


def _heard(said: dict[str, Any], done: Done) -> None:
    if "error" in said:
        raise DataError(said["error"])
    done(said["part"], said["bytes"])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _job(folder: Path) -> tuple[Job, float]:
    said = json.loads((folder / _PLAN).read_text())
    parts = tuple(Part(tuple(Piece(*piece) for piece in pieces), size) for pieces, size in said["parts"])
    corpus = Corpus(folder.name, Path(said["root"]), (), text_key=said["text_key"])
    job = Job(folder, said["key"], corpus, tokenizer_of(said["tokenizer"], chat=said["chat"]), said["held_out"], parts)
    return job, said["timeout"]


def main(folder: str, out: IO[bytes]) -> int:
    """Take parts of the job in `folder` until none is left."""
    for number in (signal.SIGINT, signal.SIGUSR1):  # a Ctrl-C reaches the whole group, and SLURM's warning the whole
        signal.signal(number, signal.SIG_IGN)  # step: who started this one ends it
    told = [0.0]

    def say(**said: object) -> None:
        out.write(json.dumps(said).encode() + b"\n")
        out.flush()

    def done(part: int, size: int) -> None:
        if time.monotonic() - told[0] > 0.1:
            told[0] = time.monotonic()
            say(part=part, bytes=size)

    try:
        job, timeout = _job(Path(folder))
        work(job, done, timeout)
    except BrokenPipeError:
        return 1
    except (DataError, OSError) as error:
        with suppress(BrokenPipeError):
            say(error=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.stdout.buffer))
