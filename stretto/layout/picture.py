"""Rectangles and words, written as SVG or PNG."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
INK: Colour = (28, 32, 40)
GREY: Colour = (112, 120, 134)
LINE: Colour = (206, 211, 220)


@dataclass(frozen=True)
class Rect:
    """A rectangle with corners of a radius, filled, with an edge if `stroke` is wider than 0; in pixels.

    `title` is what a browser shows of it under the pointer.
    """

    x: float
    y: float
    width: float
    height: float
    fill: Colour | None
    radius: float = 0.0
    edge: Colour = INK
    stroke: float = 0.0
    title: str = ""


@dataclass(frozen=True)
class Words:
    """A line of text; `x` is its start, middle or end, `y` its vertical middle, `size` its height in pixels."""

    x: float
    y: float
    text: str
    size: float
    colour: Colour = INK
    bold: bool = False
    anchor: Literal["start", "middle", "end"] = "start"


@dataclass(frozen=True)
class Picture:
    """Shapes on white, drawn in order; sizes in pixels."""

    width: float
    height: float
    shapes: tuple[Rect | Words, ...]

    def save(self, path: Path) -> None:
        """Write to a file whose name ends in `.svg` or `.png`.

        Raises `ValueError` for another ending.
        """
        match path.suffix.lower():
            case ".svg":
                path.write_text(self.svg(), encoding="utf-8")
            case ".png":
                self._save_png(path)
            case ending:
                raise ValueError(f"{path}: a picture is written as .svg or .png, not {ending or 'without ending'!r}")

    def svg(self) -> str:
        """The picture as a document of its own."""
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Inter, Helvetica, Arial, sans-serif">'
        paper = f'<rect width="{self.width:g}" height="{self.height:g}" fill="#ffffff"/>'
        return "\n".join([head, paper, *map(_svg, self.shapes), "</svg>", ""])

    def _save_png(self, path: Path, scale: int = 2) -> None:
        """Twice as many dots as pixels, so that small print stays sharp."""
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{path}: PNG needs the package pillow (pip install 'stretto[png]'); SVG does not"
            ) from error
        image = Image.new("RGB", (round(self.width * scale), round(self.height * scale)), WHITE)
        pen = ImageDraw.Draw(image)
        anchors = {"start": "lm", "middle": "mm", "end": "rm"}
        for shape in self.shapes:
            if isinstance(shape, Rect):
                corners = [shape.x, shape.y, shape.x + shape.width, shape.y + shape.height]
                pen.rounded_rectangle(
                    [corner * scale for corner in corners],
                    shape.radius * scale,
                    shape.fill,
                    shape.edge if shape.stroke else None,
                    round(shape.stroke * scale),
                )
            else:
                font = ImageFont.load_default(shape.size * scale)
                weight = 0.6 if shape.bold else 0.0  # the built-in font has no bold: draw it with an edge
                place = (shape.x * scale, shape.y * scale)
                pen.text(place, shape.text, shape.colour, font, anchors[shape.anchor], stroke_width=weight * scale / 2)
        image.save(path)


def blend(a: Colour, b: Colour, share: float) -> Colour:
    """A colour between two: `share` 0 is `a`, 1 is `b`."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def readable(on: Colour) -> Colour:
    """White or dark, whichever can be read on this colour."""
    luminance = 0.299 * on[0] + 0.587 * on[1] + 0.114 * on[2]
    return INK if luminance > 140 else WHITE


def _hex(colour: Colour | None) -> str:
    return "none" if colour is None else "#{:02x}{:02x}{:02x}".format(*colour)


def _svg(shape: Rect | Words) -> str:
    if isinstance(shape, Rect):
        edge = f' stroke="{_hex(shape.edge)}" stroke-width="{shape.stroke:g}"' if shape.stroke else ""
        return (
            f'<rect x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}" '
            f'rx="{shape.radius:g}" fill="{_hex(shape.fill)}"{edge}'
            + (f"><title>{escape(shape.title)}</title></rect>" if shape.title else "/>")
        )
    weight = ' font-weight="600"' if shape.bold else ""
    return (
        f'<text x="{shape.x:g}" y="{shape.y:g}" font-size="{shape.size:g}" fill="{_hex(shape.colour)}"{weight} '
        f'text-anchor="{shape.anchor}" dominant-baseline="central">{escape(shape.text)}</text>'
    )
