"""One colour for each coordinate along an axis."""

from __future__ import annotations

from stretto.layout.picture import Colour, blend

# From deep blue over teal and gold to red: neighbours differ in lightness as well as in hue, so that they
# can be told apart in print and by colour-blind eyes.
_STOPS: tuple[Colour, ...] = (
    (43, 60, 133),
    (38, 112, 167),
    (45, 158, 152),
    (126, 190, 98),
    (240, 196, 71),
    (236, 131, 62),
    (196, 62, 76),
)


def colour(index: int, count: int) -> Colour:
    """The colour of coordinate `index` of `count`: the middle of its part of the scale."""
    place = (index + 0.5) / count * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    return blend(_STOPS[low], _STOPS[low + 1], place - low)
