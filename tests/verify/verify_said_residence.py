"""As `verify_said`: masters with a remainder, and state that lies in the host's memory."""

from __future__ import annotations

from verify_fault import Fault, Said

RESIDENCE = Said(
    "tests/distributed/test_distributed_residence.py",
    Fault("a remainder that does not carry", "distributed/remainder.py", "bits + HALF, bits", "bits, bits"),
    Fault("ties that round to zero", "distributed/remainder.py", "HALF: Final = 0x8000", "HALF: Final = 0x7FFF"),
    Fault(
        "a NaN that becomes a number",
        "distributed/remainder.py",
        "torch.where(masters == masters, bits + HALF, bits)",
        "(bits + HALF)",
    ),
    Fault(
        "a chunk that is not written back",
        "distributed/residence.py",
        "                _copy(job.vectors, held)\n",
        "                _copy(job.vectors[:1], held[:1])\n",
    ),
    Fault(
        "a slot that is filled before it was emptied",
        "distributed/residence.py",
        "min(n + SLOTS, len(jobs))",
        "min(n + SLOTS + 1, len(jobs))",
    ),
    Fault(
        "moments of another chunk",
        "distributed/optimizer.py",
        "tuple(end(vector, within, size) for vector in vectors)",
        "tuple(end(vector, within if vector is vectors[0] else slice(0, len(part)), size) for vector in vectors)",
    ),
    Fault(
        "a gradient of another chunk",
        "distributed/optimizer.py",
        "bucket.shard[job.part], bucket.grad[job.part]",
        "bucket.shard[job.part], bucket.grad[: job.part.stop - job.part.start]",
    ),
    Fault(
        "masters that are lent and not taken back",
        "distributed/optimizer.py",
        "        self._masters.take_back()\n",
        "        self._masters.forget()\n",
    ),
)
