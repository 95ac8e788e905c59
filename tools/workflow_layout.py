"""Where the nodes of an example workflow stand, and the way of the links around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NOTE = "MarkdownNote"
MAX_WIDTH = 1700
"""px; a wider graph opens so small that the interface draws no text."""
SCREEN = 1700, 880
"""px of the canvas that an example fills when it is opened, on a screen of 1800x1000."""
SCALES = 0.65, 1.0
WIDTH, GAP, TITLE_HEIGHT, GROUP_TITLE, LANE = 300, 50, 40, 50, 16


class Row(NamedTuple):
    """Nodes side by side."""

    title: str
    """Of the group around them; none around them if empty."""
    columns: tuple[tuple[str, ...], ...]
    """Ids in the graph from top to bottom, column by column; `NOTE` is the note."""


class Bus(NamedTuple):
    """The way of one output's links around the nodes that lie between."""

    source: tuple[str, int]
    """Id and output."""
    points: list[tuple[float, float]]
    """Where the links bend, the first one for all of them."""
    targets: list[tuple[str, str]]
    """Id and input that a link leaves the bus for after each point but the first."""


def links_of(graph: dict[str, Any]) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """(id, input) of what each (id, output) of an API graph goes to."""
    found: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for key, node in graph.items():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                found.setdefault((value[0], value[1]), []).append((key, name))
    return found


def layout(
    rows: tuple[Row, ...],
    heights: Mapping[str, float],
    links: Mapping[tuple[str, int], list[tuple[str, str]]],
) -> tuple[dict[str, list[float]], list[dict[str, Any]], list[Bus]]:
    """x, y, width and height of each node by its id, the groups around the rows, and the buses.

    A link to the next column needs no way of its own; one beyond it runs above the nodes of its
    row, and one to the next row between the rows.
    """
    at = {
        key: (row, column)
        for row, (_, columns) in enumerate(rows)
        for column, keys in enumerate(columns)
        for key in keys
    }
    within: dict[int, list] = {}
    between: dict[int, list] = {}
    for source, targets in links.items():
        row, column = at[source[0]]
        far = [t for t in targets if at[t[0]][0] == row and at[t[0]][1] > column + 1]
        if far:
            within.setdefault(row, []).append((source, far))
        if below := [t for t in targets if at[t[0]][0] > row]:
            between.setdefault(row, []).append((source, below))

    places, groups, buses, top = {}, [], [], 0.0

    def add_buses(found: list, y: float) -> None:
        for lane, (source, targets) in enumerate(found):
            level, shift = y + lane * LANE, 5 * lane
            points: list[tuple[float, float]] = [
                (at[source[0]][1] * (WIDTH + GAP) + WIDTH + 8 + shift, level)
            ]
            targets = sorted(targets, key=lambda target: at[target[0]][1])
            columns = [at[key][1] * (WIDTH + GAP) for key, _ in targets]
            if columns[0] < points[0][0]:  # back to the left
                targets, columns = targets[::-1], columns[::-1]
            points += [(x - 14 - shift, level) for x in columns]
            buses.append(Bus(source, points, targets))

    for number, row in enumerate(rows):
        start = top + (GROUP_TITLE if row.title else 0)
        add_buses(within.get(number, []), start)
        start += LANE * len(within.get(number, [])) + TITLE_HEIGHT
        bottom = start
        for column, keys in enumerate(row.columns):
            y = start
            for key in keys:
                places[key] = [column * (WIDTH + GAP), y, WIDTH, heights[key]]
                y += heights[key] + TITLE_HEIGHT + GAP / 2
            bottom = max(bottom, y - TITLE_HEIGHT - GAP / 2)
        if row.title:
            width = len(row.columns) * (WIDTH + GAP)
            box = [-GAP / 2, top, width, bottom + GAP / 2 - top]
            groups.append({"title": row.title, "bounding": box, "color": "#3f789e"})
        add_buses(between.get(number, []), bottom + GAP / 2 + LANE)
        top = bottom + GAP + LANE * len(between.get(number, []))
    return places, groups, buses


def view(places: dict[str, list[float]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Scale and offset that show all of it, and text that can be read in any case."""
    left = min(place[0] for place in places.values())
    right, bottom = (max(place[i] + place[i + 2] for place in places.values()) for i in (0, 1))
    tops = [place[1] - TITLE_HEIGHT for place in places.values()]
    top = min(tops + [group["bounding"][1] for group in groups])
    assert right - left <= MAX_WIDTH, right - left
    fit = min(SCREEN[0] / (right - left + 2 * GAP), SCREEN[1] / (bottom - top + GAP))
    scale = min(max(fit, SCALES[0]), SCALES[1])
    # The menu at the left and the bars above cover 60 and 105 px
    return {"scale": scale, "offset": [60 / scale + GAP - left, 110 / scale - top]}
