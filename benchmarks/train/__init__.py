"""Stretto and its peers on the same devices in one run: `python -m benchmarks.train --shape D1 --peers stretto,torch`.

    __main__   the command line
    conductor  starts the workers of every peer, takes them in turns, saves after every turn
    worker     one rank of one peer: sets up, measures chunks of steps, traces one
    peers      what is measured, one file each, behind one Protocol
    shapes flops ceiling waterfall memory report    plain data and arithmetic about it

The conventions are in docs/performance.md.
"""
