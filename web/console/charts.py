"""Vega-Lite specifications of the console's charts. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from web.console.check_history import BAR_S, Bar, Point

COLORS = {
    "up": "#30a46c", "busy": "#3e63dd", "degraded": "#f5a524", "starting": "#8e4ec6", "down": "#e5484d",
    "unknown": "#8d93a5", "none": "#8d93a533",
}  # fmt: skip
# For colour-blind readers.
MARKS = {"up": "", "busy": "", "degraded": "!", "starting": "…", "down": "✕", "unknown": "?", "none": ""}
LINE, LIMIT = "#3b5bdb", "#e5484d"


@dataclass(frozen=True)
class Trend:
    """One reading over time. `limit`: the threshold of its alert; `limit_name`: the setting with that threshold."""

    title: str
    unit: str
    points: Sequence[Point]
    limit: float | None = None
    limit_name: str = ""
    time_format: str = "%H:%M"


def bars_chart(bars: Sequence[Bar], name: Callable[[Bar], str], description: str) -> dict[str, Any]:
    values = [
        {"at": bar.start * 1000, "end": (bar.start + BAR_S) * 1000, "state": bar.state, "mark": MARKS[bar.state],
         "what": name(bar), "checks": bar.checks}
        for bar in bars
    ]  # fmt: skip
    x = {"field": "at", "type": "temporal", "axis": {"title": None, "grid": False, "format": "%H:%M", "tickCount": 8}}
    tooltip = [
        {"field": "at", "type": "temporal", "format": "%d.%m. %H:%M", "title": "•"},
        {"field": "what", "type": "nominal", "title": "•"},
    ]
    color = {
        "field": "state", "type": "nominal", "legend": None,
        "scale": {"domain": list(COLORS), "range": list(COLORS.values())},
    }  # fmt: skip
    rect = {"mark": {"type": "rect", "stroke": "white", "strokeOpacity": 0.35, "strokeWidth": 0.5},
            "encoding": {"x": x, "x2": {"field": "end"}, "color": color, "tooltip": tooltip}}  # fmt: skip
    letters = {
        "transform": [{"filter": "datum.mark != ''"}, {"calculate": "(datum.at + datum.end) / 2", "as": "middle"}],
        "mark": {"type": "text", "fontSize": 9, "fontWeight": "bold", "color": "white", "tooltip": None},
        "encoding": {"x": {"field": "middle", "type": "temporal"}, "text": {"field": "mark"}},
    }
    return {"data": {"values": values}, "height": 84, "layer": [rect, letters], "description": description}


def trend_chart(trend: Trend, description: str) -> dict[str, Any]:
    values = [{"at": point.at * 1000, "value": point.value} for point in trend.points]
    line = {
        "mark": {"type": "line", "color": LINE, "interpolate": "linear", "invalid": "break-paths-show-domains",
                 "point": {"size": 9, "color": LINE}},
        "encoding": {
            "x": {"field": "at", "type": "temporal", "axis": {"title": None, "grid": False, "tickCount": 5, "format": trend.time_format}},
            "y": {"field": "value", "type": "quantitative", "axis": {"title": trend.unit, "tickCount": 4, "format": ",~f"},
                  "scale": {"domainMin": 0, **({} if any(point.value for point in trend.points) else {"domainMax": 1})}},
            "tooltip": [{"field": "at", "type": "temporal", "format": "%d.%m. %H:%M", "title": "•"},
                        {"field": "value", "type": "quantitative", "format": ".3~f", "title": trend.title}],
        },
    }  # fmt: skip
    layers: list[dict[str, Any]] = [line]
    if trend.limit is not None:
        layers.append({
            "data": {"values": [{"limit": trend.limit}]},
            "mark": {"type": "rule", "color": LIMIT, "strokeDash": [5, 4], "strokeWidth": 1.5},
            "encoding": {"y": {"field": "limit", "type": "quantitative"},
                         "tooltip": [{"field": "limit", "type": "quantitative", "title": trend.limit_name}]},
        })  # fmt: skip
    return {"data": {"values": values}, "height": 170, "layer": layers, "description": description}
