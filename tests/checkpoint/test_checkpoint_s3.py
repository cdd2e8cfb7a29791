"""An object store that speaks S3 over a socket: save, kill, go on, list, verify, prune.

It runs where `moto` (its server) and `s3fs` are installed: `pip install 'moto[server]' s3fs`.

Catches: a marker that is there before what it names; a save that needs a rename, or a directory; a writer process that
does not find the store; a listing that is kept, which does not show what the writer process has written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from stretto.checkpoint import CheckpointError, Saver, latest_complete, load
from stretto.checkpoint.places import place
from stretto.cli.checkpoint import main
from stretto.params import Slice
from stretto.world import World

pytestmark = [pytest.mark.gloo, pytest.mark.filterwarnings("ignore")]

HERE = World.single()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket of a server at 127.0.0.1."""
    server_of: Any = pytest.importorskip("moto.server", reason="moto[server] is optional").ThreadedMotoServer
    s3fs: Any = pytest.importorskip("s3fs", reason="s3fs is optional")
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    said = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem(endpoint_url=said["AWS_ENDPOINT_URL"]).mkdir("runs")
        yield "s3://runs"
    server.stop()


def state(step: int) -> list[Slice]:
    """Of 4 MB; what it holds says the step."""
    x = torch.full((1024, 1024), float(step))
    return [Slice("model/w", x, tuple(x.shape), (0, 0), True)]


def held(path: Path | None) -> float:
    assert path is not None
    wanted = state(-1)
    load(path, wanted, HERE)
    values = wanted[0].tensor.unique().tolist()
    assert len(values) == 1
    return float(values[0])


def test_a_run_on_an_object_store(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"{bucket}/one"
    saver = Saver(HERE)
    for step in (1, 2):
        saver.begin(where, step, state(step), {"step": step})
    saver.finish()
    newest = latest_complete(place(where)).path
    assert held(newest) == 2
    assert main(["list", where]) == 0
    said = capsys.readouterr().out
    assert "step-00000001" in said
    assert "step-00000002" in said
    assert main(["verify", where, "--all"]) == 0
    assert "whole; 1 tensors" in capsys.readouterr().out

    # The writer is killed at some point of the third save; what is left of it is no checkpoint, or the whole of it.
    for delay in (0.0, 0.02, 0.1):
        saver.begin(where, 3, state(3), {"step": 3})
        time.sleep(delay)
        writer: Any = saver._writer
        os.kill(writer.pid, 9)
        with suppress(CheckpointError):
            saver.finish()
        saver.close()
        found = latest_complete(place(where)).path
        assert held(found) == (3.0 if found is not None and found.name == "step-00000003" else 2.0)
        saver = Saver(HERE)

    saver.begin(where, 3, state(3), {"step": 3})  # the run goes on from there, and saves the step again
    saver.finish()
    saver.close()
    assert held(latest_complete(place(where)).path) == 3
    damaged = place(where) / "step-00000001" / "COMPLETE"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert main(["verify", where, "--all"]) == 1
    assert "is damaged" in capsys.readouterr().out
    assert main(["prune", where, "--keep", "1"]) == 0
    assert [path.name for path in place(where).iterdir() if (path / "COMPLETE").exists()].count("step-00000003") == 1
    assert not (place(where) / "step-00000002" / "COMPLETE").exists()
