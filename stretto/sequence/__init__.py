"""Sequences as integers: which rank holds which tokens, which of them see each other, which documents share a row."""

from stretto.sequence.deal import deal, local_length, work
from stretto.sequence.packing import Piece, pack, waste
from stretto.sequence.tiles import Run, Tile, Which, arranged, pairs, runs_of, squares, tiles

__all__ = [
    "Piece",
    "Run",
    "Tile",
    "Which",
    "arranged",
    "deal",
    "local_length",
    "pack",
    "pairs",
    "runs_of",
    "squares",
    "tiles",
    "waste",
    "work",
]
