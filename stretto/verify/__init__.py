"""The proof that the layout does not change the model: inspection of a run, and its comparison with a reference."""

from stretto.verify.activations import Seen
from stretto.verify.compare import ROUNDING, TOLERANCE, Comparison, Difference, Quantity, Trace, differences, trace
from stretto.verify.diagnosis import where_to_look
from stretto.verify.full import gather_full, load_full
from stretto.verify.places import Place, places
from stretto.verify.reference import ONE_PROCESS, against_reference
from stretto.verify.session import Session, build, random_batch, random_weights

__all__ = [
    "ONE_PROCESS",
    "ROUNDING",
    "TOLERANCE",
    "Comparison",
    "Difference",
    "Place",
    "Quantity",
    "Seen",
    "Session",
    "Trace",
    "against_reference",
    "build",
    "differences",
    "gather_full",
    "load_full",
    "places",
    "random_batch",
    "random_weights",
    "trace",
    "where_to_look",
]
