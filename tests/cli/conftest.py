"""A small corpus, and the options of a run over it that takes a second."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty little texts in a directory."""
    root = tmp_path_factory.mktemp("cli") / "songbook"
    root.mkdir()
    draw = random.Random(0)
    words = ["over", "the", "hills", "and", "far", "away", "a", "piper's", "son"]
    for i in range(60):
        (root / f"{i:02d}.txt").write_text(" ".join(draw.choices(words, k=60)) + "\n")
    return root


@pytest.fixture(scope="session")
def options(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`train` of twelve steps, with saves after 5 and 10, and evaluations after 4 and 8."""
    said = "train --preset tiny --steps 12 --save-every 5 --eval-every 4 --held-out 0.2 --no-tensorboard"
    return [*said.split(), "--data", str(corpus), "--cache", str(tmp_path_factory.mktemp("cache"))]
