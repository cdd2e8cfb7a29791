"""Device and processes follow from the GPUs of this machine where nobody says them.

Each test names the fault that it catches.
"""

from __future__ import annotations

import pytest

from stretto.arguments import ConfigError, Resolved, parse

pytestmark = pytest.mark.pure


def resolved(words: str, gpus: int, **more: object) -> Resolved:
    return parse(words.split(), env={}, files=False, fallback="demo", gpus=lambda: gpus, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [1, 2, 5, 8])
@pytest.mark.parametrize("words", ["", "--device cuda"])
def test_on_gpus_a_run_takes_them_all(gpus: int, words: str) -> None:
    """Catches: the eight processes of the demo for CPUs on one GPU, and a batch that does not divide by five."""
    run = resolved(words, gpus)
    assert (run.args.run.device, run.args.run.nproc, run.args.run.dtype) == ("cuda", gpus, "bf16")
    assert (run.layout.size("tp"), run.layout.size("pp"), run.layout.size("dp")) == (1, 1, gpus)
    assert run.fallback == "demo-gpu"
    assert "GPUs of this machine" in str(run.sources["run.nproc"])


def test_without_gpus_nothing_changes() -> None:
    run = resolved("", 0)
    assert (run.args.run.device, run.args.run.nproc, run.fallback) == ("cpu", 8, "demo")


@pytest.mark.parametrize("words", ["--device cpu", "--nproc 8"])
def test_what_is_said_goes_before(words: str) -> None:
    """Catches: a run of eight processes that is moved to a machine's one GPU."""
    run = resolved(words, 1)
    assert (run.args.run.device, run.args.run.nproc, run.fallback) == ("cpu", 8, "demo")


def test_the_layout_that_is_said_stays() -> None:
    run = resolved("--tp 2", 8)
    assert (run.layout.size("tp"), run.layout.size("dp"), run.args.run.nproc) == (2, 4, 8)
    run = resolved("--preset gpt2-small", 8)
    assert (run.args.run.device, run.args.run.nproc, run.args.batch.global_batch) == ("cuda", 8, 512)
    assert resolved("--preset gpt2-small --dp 2", 8).args.run.nproc == 2
    assert resolved("--tp 3 --heads 9 --hidden 576 --kv-heads 9", 8).args.run.nproc == 3, "8 do not divide by 3"


def test_a_launcher_knows_better() -> None:
    """Catches: processes that were started elsewhere and count for this machine."""
    run = resolved("--device cuda", 4, world_size=8)
    assert run.args.run.nproc == 8


@pytest.mark.parametrize(
    "words", ["--device cuda --nproc 16", "--device cuda --tp 4 --dp 4", "--device cuda --pp 8 --layers 8"]
)
def test_more_processes_than_gpus_are_rejected_at_once(words: str) -> None:
    """Catches: a run that starts sixteen processes on four GPUs and dies when one finds none."""
    with pytest.raises(ConfigError) as caught:
        resolved(words, 4)
    (found,) = caught.value.violations
    assert "but this machine has 4 GPUs" in found.problem
    assert "at most 4, several nodes with torchrun or srun, or --device cpu" in str(found)


@pytest.mark.parametrize(
    ("home", "words", "cache"),
    [
        ("/scratch/me", "", "/scratch/me/stretto"),
        ("/scratch/me", "--cache /here", "/here"),
        ("", "", "~/.cache/stretto"),
        ("relative", "", "~/.cache/stretto"),
    ],
)
def test_caches_are_where_the_user_has_them(home: str, words: str, cache: str) -> None:
    """Catches: gigabytes of tokens in a small home directory, though the user has named a place for caches."""
    run = parse(words.split(), env={"XDG_CACHE_HOME": home}, files=False, fallback="demo")
    assert run.args.data.cache == cache
    assert str(run.sources["data.cache"]).endswith("XDG_CACHE_HOME") == cache.startswith("/scratch")
