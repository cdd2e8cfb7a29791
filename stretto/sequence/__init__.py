"""Sequences as integers: which rank holds which tokens, which of them see each other, which documents share a row."""

from stretto.sequence.deal import deal, local_length, work
from stretto.sequence.needed import Needed, crossing, needed
from stretto.sequence.packing import Piece, Rows, pack, waste
from stretto.sequence.tiles import Run, Tile, Which, arranged, pairs, runs_of, squares, tiles

__all__ = [
    "Needed",
    "Piece",
    "Rows",
    "Run",
    "Tile",
    "Which",
    "arranged",
    "crossing",
    "deal",
    "local_length",
    "needed",
    "pack",
    "pairs",
    "runs_of",
    "squares",
    "tiles",
    "waste",
    "work",
]
