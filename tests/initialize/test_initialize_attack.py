"""Who can reach the rendezvous store can write to it: nothing that lies there is ever run.

Faults to catch: a report of a failure that is unpickled; a watching thread that ends in silence at a value it cannot
read; a store that listens on all addresses though a loopback address was asked for; control sequences that reach the
terminal; objects between ranks by pickle.
"""

from __future__ import annotations

import ast
import json
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stretto
from stretto.initialize.failure_watch import FIRST
from stretto.initialize.failures import LONGEST, Failure
from stretto.initialize.stores import address_of, listen, serve_on, tcp_store

pytestmark = pytest.mark.gloo

STRETTO = Path(stretto.__file__).parent


class Touch:
    """A pickle that makes a file as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


VICTIM = """
import sys, time
from torch.distributed.distributed_c10d import PrefixStore
from stretto.initialize.stores import tcp_store
from stretto.initialize.failure_watch import failing_with_peers
store = PrefixStore("0", tcp_store("127.0.0.1", int(sys.argv[1])))
with failing_with_peers(store, 0, 2):
    print("ready", flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize(
    "written", ["pickle", "deep", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("hex", "json"))]
)
def test_a_stranger_who_writes_to_the_store_runs_nothing(written: str, tmp_path: Path) -> None:
    """And every rank ends, saying what it found."""
    touched = tmp_path / "touched"
    evil = pickle.dumps(Touch(touched))
    value = {"pickle": evil, "hex": evil.hex().encode(), "json": b'{"rank": "0"}', "deep": b"[" * 50_000}[written]
    server = serve_on(listen("127.0.0.1", 0, several_hosts=False))
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(server.port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    assert victim.stdout.readline() == "ready\n"
    begun = time.monotonic()
    tcp_store("127.0.0.1", server.port).set(f"0/{FIRST}", value)
    _, errors = victim.communicate(timeout=25)
    assert victim.returncode == 1
    assert time.monotonic() - begun < 15
    assert "some program other than the ranks of this job" in errors
    assert not touched.exists()


def test_what_a_rank_reports_comes_back_without_control_characters() -> None:
    error = ValueError("a \x1b[2Jb\x07 line\nand another\ttab")
    failure = Failure.of(3, error)
    again = Failure.decode(failure.encode())
    assert (again.rank, again.consequence, again.finding, again.pickled) == (3, False, False, b"")
    assert "\x1b" not in again.text + again.summary
    assert "\x07" not in again.text
    assert "and another\ttab" in again.text


def test_the_longest_report_of_the_widest_characters_is_still_one() -> None:
    wide = "\N{GRINNING FACE}" * LONGEST
    again = Failure.decode(Failure(0, wide, wide, consequence=False).encode())
    assert (again.summary, again.text) == (wide, wide)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[]", b"{}", json.dumps({"rank": True}).encode(), b"9" * 2**22, b'{"rank":' * 10_000]
)
def test_what_is_no_report_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        Failure.decode(data)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_on_loopback_listens_there_alone(host: str) -> None:
    with listen(host, 0, several_hosts=False) as listener:
        assert address_of(listener) in ("127.0.0.1", "::1")
        assert listener.getsockname()[0] == address_of(listener)


def test_other_hosts_come_in_where_the_name_is_loopback_here() -> None:
    with listen("localhost", 0, several_hosts=True) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")


def test_a_port_in_use_is_an_error() -> None:
    with (
        listen("127.0.0.1", 0, several_hosts=False) as first,
        pytest.raises(OSError, match="in use") as caught,
    ):
        listen("127.0.0.1", first.getsockname()[1], several_hosts=False)
    assert isinstance(caught.value, socket.error)


def test_pickle_is_for_the_pool_of_the_tests() -> None:
    """Two more modules write one: a failure for that pool, `.metadata` for plain PyTorch. Nothing else reads any."""
    allowed = {"testing/fresh.py", "testing/pool.py", "testing/worker.py", "initialize/failures.py"}
    loading = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"}
    loading |= {f"state_dict_{each}" for each in ("loader", "saver")}  # which pass pickles from rank to rank
    found = set()
    for path in STRETTO.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            called = node.attr if isinstance(node, ast.Attribute) else ""
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if path.name == "pickled.py" and names == {"pickle"}:
                continue
            if names & {"pickle", *loading} or text in loading or called.endswith(("_object", "_object_list")):
                found.add(str(path.relative_to(STRETTO)))
    assert found <= allowed
