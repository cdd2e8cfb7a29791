"""Faults of hand-written kernels of the loss and of the update."""

from __future__ import annotations

from verify_fault import Fault, Said

KERNELS_LOSS = Said(
    "tests/kernels/test_kernels_cross_entropy.py",
    Fault(
        "a sum that is not rescaled when a higher logit comes",
        "kernels/cross_entropy.py",
        "total = total * _exp(gap) + ",
        "total = total + ",
    ),
    Fault(
        "words after the last whole group left out",
        "kernels/cross_entropy.py",
        " + tl.sum(_exp(x - highest), 0))",
        ")",
    ),
    Fault(
        "padding between rows that is written",
        "kernels/cross_entropy.py",
        "share, capped), mask=end < words)",
        "share, capped), mask=end <= words)",
    ),
    Fault(
        "the label of another rank that counts as word 0",
        "kernels/cross_entropy.py",
        "tl.where(tl.load(mine + row), tl.load(local + row).to(tl.int32), -1)",
        "tl.load(local + row).to(tl.int32)",
    ),
    Fault(
        "the gradient of the cap lost",
        "kernels/cross_entropy.py",
        "dy * (1 - bent * bent)",
        "dy",
    ),
)

KERNELS_ADAMW = Said(
    "tests/kernels/test_kernels_adamw.py",
    Fault(
        "the end of a vector that is not a whole block left out",
        "kernels/adamw.py",
        "inside = at < size\n",
        "inside = at < size - size % block\n",
    ),
    Fault(
        "what lies behind a vector written",
        "kernels/adamw.py",
        "inside = at < size\n",
        "inside = at < size + 1\n",
    ),
    Fault(
        "a moment that changes by the other's rate",
        "kernels/adamw.py",
        "v += change_second *",
        "v += change_first *",
    ),
    Fault(
        "weights that do not follow their masters",
        "kernels/adamw.py",
        "    if with_rounded:\n",
        "    if not with_rounded:\n",
    ),
    Fault(
        "moments written with the weights alone",
        "kernels/adamw.py",
        "kept = inside & (stored > _FEWEST)",
        "kept = inside",
    ),
)

KERNELS_EMBEDDING = Said(
    "tests/kernels/test_kernels_embedding.py",
    Fault(
        "tokens of a word beyond those read at a time left out",
        "kernels/embedding.py",
        "            going = tl.min(same.to(tl.int32), 0)\n",
        "            going = 0\n",
    ),
    Fault(
        "each token of a word adds what follows it",
        "kernels/embedding.py",
        "(key < rows) & (key != before)",
        "key < rows",
    ),
    Fault(
        "what is another rank's added",
        "kernels/embedding.py",
        "torch.where(mine, ids, rows)",
        "ids",
    ),
)
