"""How the lines of a figure look: colours, dashes and markers."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.report.comparison import Line


@dataclass(frozen=True)
class Stroke:
    """How a line looks."""

    colour: str
    style: str
    marker: str


# Okabe and Ito (2008), whom the colour-blind can tell apart, with Tol's wine for the yellow and the
# black; past seven methods the dashes change.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
STYLES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREYS = ("#333333", "#999999", "#666666")


def strokes_for(lines: Iterable[Line]) -> list[Stroke]:
    """Return one stroke per line, the same in all figures: colours, dotted greys for references."""
    strokes: list[Stroke] = []
    methods = references = 0
    for line in lines:
        if any(run.federated for run in line.runs):
            # Colour and marker count together; each full turn of the palette takes other dashes.
            repeats, index = divmod(methods, len(PALETTE))
            style = STYLES[repeats % len(STYLES)]
            strokes.append(Stroke(PALETTE[index], style, MARKERS[index]))
            methods += 1
        else:
            strokes.append(Stroke(GREYS[references % len(GREYS)], ":", "."))
            references += 1
    return strokes
