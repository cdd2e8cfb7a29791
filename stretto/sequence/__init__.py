"""Sequences as integers: which rank holds which tokens, which of them see each other, which documents share a row."""

from stretto.sequence.deal import deal, local_length, work
from stretto.sequence.packing import Piece, pack, waste
from stretto.sequence.tiles import Run, Tile, arranged, pairs, runs_of, tiles

__all__ = [
    "Piece",
    "Run",
    "Tile",
    "arranged",
    "deal",
    "local_length",
    "pack",
    "pairs",
    "runs_of",
    "tiles",
    "waste",
    "work",
]
