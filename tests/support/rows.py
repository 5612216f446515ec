"""Random rows of a batch, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from tokenreduce.layout import NEWLINE, PLAIN, TIMESTAMP, WRAPPER

Row = list[tuple[int, int, int, int, bool]]
"""Per token: slot, frame, medium, marker, protected."""


@st.composite
def rows(draw: st.DrawFn, text_only: bool = False) -> Row:
    """Text, then one to three media with text between them; frames of growing or falling size, markers and protection."""
    small = st.integers(0, 2)
    text = (-1, -1, -1, PLAIN, False)
    row: Row = [text] * draw(small)
    for medium in range(0 if text_only else draw(st.integers(1, 3))):
        patches, newlines, wrapped, stamped = (
            draw(st.integers(1, 5)),
            draw(st.booleans()),
            draw(st.booleans()),
            draw(small) == 2,
        )
        for frame in range(draw(st.integers(1, 6))):
            size = max(1, patches - draw(st.integers(0, 1)) * frame)
            row += [(*text[:3], TIMESTAMP, False)] * stamped
            row += [(7, frame, medium, WRAPPER, False)] * wrapped
            row += [(slot, frame, medium, PLAIN, draw(st.integers(0, 9)) == 9) for slot in range(size)]
            row += [(8, frame, medium, NEWLINE, False)] * newlines
        row += [text] * draw(small)
    return [*row, *[text] * draw(st.integers(1, 2))]
