"""Two hosts with four ranks each, as srun starts them: they meet, or each says in time why they cannot."""

from __future__ import annotations

import json

import hosts_program
import pytest

from stretto.testing import Fresh

pytestmark = pytest.mark.gloo

ALL = range(8)


@pytest.mark.parametrize(
    ("what", "seconds", "said"),
    [
        ("all well", 10, dict.fromkeys(ALL, "sum 8")),
        pytest.param(
            "killed rank",
            15,
            # One process in two network namespaces: each sees the other's state under the number that it knows.
            dict.fromkeys(set(ALL) - {5}, "rank 5 does not answer: its process"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "link cut",  # the first host has the store, and the other one nobody to ask
            40,
            dict.fromkeys(range(4), "4 ranks do not answer (on ")
            | dict.fromkeys(range(4, 8), "the rendezvous store, on host "),
            marks=pytest.mark.nightly,
        ),
        (
            "port in use",
            10,
            {0: "rank 0 cannot serve the rendezvous: port 23456 of"}
            | dict.fromkeys(
                range(1, 8), "MASTER_ADDR=10.211.0.1 MASTER_PORT=23456 does not speak as a rendezvous store"
            ),
        ),
        (
            "first host missing",
            10,
            dict.fromkeys(range(4, 8), "nothing answered at MASTER_ADDR=10.211.0.1 MASTER_PORT=23456 within 3 s"),
        ),
        (
            "second host missing",
            10,
            dict.fromkeys(range(4), "4 of 8 ranks arrived within 3 s; missing: 4-7. Arrived: 4 on"),
        ),
        ("wrong world size", 5, dict.fromkeys(ALL, "of 12 ranks in all, but rank 0 of 8")),
        (
            "no such name",
            10,
            {0: "1 of 8 ranks arrived within 3 s; missing: 1-7"}
            | dict.fromkeys(range(1, 8), "the name MASTER_ADDR=no-such-host.invalid did not resolve within 3 s"),
        ),
    ],
)
def test_two_hosts_of_four_ranks(
    fresh: Fresh, hosts: tuple[str, str], what: str, seconds: float, said: dict[int, str]
) -> None:
    ended = fresh.run(hosts_program.main, hosts, what)
    assert "Traceback" not in ended.err  # what torch remarks of broken connections aside
    heard = {rank: (text, took) for rank, text, took in map(json.loads, ended.out.splitlines())}
    assert heard.keys() == said.keys()
    for rank, (text, took) in heard.items():
        assert said[rank] in text, (rank, text)
        assert took < seconds, (rank, text)
