"""Draw what a benchmark found, from its document."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts import errors, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# 1200 pixels wide.
_WIDTH, _DPI = 8.0, 150
_INK, _GRAY, _FAINT = "#1f2328", "#6b7280", "#e5e7eb"
# Told apart by people who do not see every colour, and in print (Okabe and Ito).
_BLUE, _ORANGE, _RED = "#0072b2", "#d55e00", "#b3261e"
_PHASES = ("#0072b2", "#56b4e9", "#009e73", "#8fcfb8", "#f0e442", "#e69f00", "#d55e00", "#cc79a7")
_STYLE = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _INK,
    "axes.edgecolor": _GRAY,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture (PNG) of a document of bench, bench-serve or bench-start.

    Raises:
        SettingInvalid: the document is of another job.
    """
    drawings: dict[str, Callable[[dict[str, Any]], Figure]] = {
        "bench": _bench,
        "bench-serve": _bench_serve,
        "bench-start": _bench_start,
    }
    if found.get("job") not in drawings:
        raise errors.SettingInvalid(
            f"a document of {found.get('job')!r}",
            f"one of {', '.join(drawings)}",
            "draw what `make bench`, `make bench-serve` or `make bench-start` wrote",
        )
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        drawings[found["job"]](found).savefig(path, format="png", dpi=_DPI)


def _figure(height: float, heading: str, *about: str) -> "Figure":
    """Return an empty figure of so many inches in height, with its heading and what is under it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    lines = [line for text in about for line in textwrap.wrap(text, 115)]
    under = "\n".join(lines)
    # The layout knows of axes only, and must leave room for the text above them.
    inches = 0.42 + 0.16 * len(lines)
    figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 0.98 - inches / height))
    figure.text(0.015, 1 - 0.12 / height, heading, size=13, weight="bold", va="top")
    figure.text(0.015, 1 - 0.38 / height, under, size=8, color=_GRAY, va="top", linespacing=1.4)
    return figure


def _model(found: dict[str, Any]) -> str:
    return found["model"]["id"]


def _bench_serve(found: dict[str, Any]) -> "Figure":
    """Throughput, and the times to the first and the next token, over requests at once."""
    slo = found.get("slo") or {}
    objectives = ", ".join(f"{name.upper()} ≤ {value:g} ms" for name, value in slo.items())
    figure = _figure(
        6.0,
        f"{_model(found)} under load",
        f"{found['url']}" + (f"; a request is good with {objectives}" if slo else ""),
        f"load from {report.title(found)}",
    )
    (tokens, requests), (first, between) = figure.subplots(2, 2)
    levels = found["levels"]
    _lines(tokens, levels, {"output_throughput": ("", _BLUE)}, "Output tokens/s")
    both = {"request_throughput": ("all", _BLUE), "request_goodput": ("good", _ORANGE)}
    _lines(requests, levels, both if slo else {"request_throughput": ("", _BLUE)}, "Requests/s")
    for axes, name, label in (
        (first, "ttft", "Time to first token, ms"),
        (between, "itl", "Time between tokens, ms"),
    ):
        series = {f"p99_{name}_ms": ("p99", _ORANGE), f"p50_{name}_ms": ("p50", _BLUE)}
        _lines(axes, levels, series, label)
    # Only where it does not press the lines down to nothing.
    if "ttft" in slo and slo["ttft"] < 3 * first.get_ylim()[1]:
        _limit_line(first, slo["ttft"], f"TTFT ≤ {slo['ttft']:g}")
    for axes in (first, between):
        axes.set_xlabel("requests at once")
    return figure


def _limit_line(axes: "Axes", value: float, text: str) -> None:
    axes.axhline(value, color=_GRAY, linestyle="--", linewidth=1)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.15 * value))
    axes.annotate(
        text,
        (0, value),
        (2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        size=8,
        color=_GRAY,
    )


def _lines(
    axes: "Axes", levels: list[dict[str, Any]], series: dict[str, tuple[str, str]], title: str
) -> None:
    """Draw each key of the levels as a line with its name at its end.

    A level without an answer has no point. The levels lie side by side: mostly each is a multiple
    of the one before, and a scale would press the first ones together.
    """
    ends = []
    for key, (name, color) in series.items():
        points = [
            (number, one[key])
            for number, one in enumerate(levels)
            if one["completed"] and one.get(key) is not None
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.8)
        ends.append((points[-1], name, color))
        if len(series) == 1:
            for number, value in points:
                axes.annotate(
                    f"{value:,.0f}" if value >= 100 else f"{value:,.1f}",
                    (number, value),
                    (0, 6),
                    textcoords="offset points",
                    ha="right",
                    size=8,
                )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    height = axes.get_ylim()[1]
    taken: list[float] = []
    for (number, value), name, color in sorted(ends, key=lambda end: end[0][1]):
        # Two ends at one place have their names above each other.
        place = max([value, *(other + 0.09 * height for other in taken[-1:])])
        taken.append(place)
        axes.annotate(
            name,
            (number, place),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
            size=8,
            annotation_clip=False,
        )
    axes.set_title(title)
    axes.grid(axis="y")
    axes.set_xlim(-0.35, len(levels) - 0.45 if any(end[1] for end in ends) else len(levels) - 0.65)
    labels = [
        f"{one['max_concurrency']}" + (f"\n{one['failed']} failed" if one["failed"] else "")
        for one in levels
    ]
    axes.set_xticks(range(len(levels)), labels)
    for label, one in zip(axes.get_xticklabels(), levels, strict=True):
        label.set_color(_RED if one["failed"] else _INK)


def _bench(found: dict[str, Any]) -> "Figure":
    """Requests a second of each way to generate, and what the memory allows."""
    rows = found["rows"]
    asked = found["settings"]
    figure = _figure(
        1.9 + 0.55 * len(rows),
        f"{_model(found)}: requests/s",
        report.title(found),
        f"{asked['num_prompts']} requests at once; whiskers: the slowest run and the fastest",
    )
    axes = figure.subplots()
    limit = (found.get("limit") or {}).get("requests_per_second")
    most = max([limit or 0, *(row.get("requests_per_second") or 0 for row in rows)]) or 1
    for number, row in enumerate(rows):
        rate = row.get("requests_per_second")
        if not rate:
            axes.text(0.01 * most, number, "failed", va="center", color=_RED)
            continue
        axes.barh(number, rate, height=0.6, color=_BLUE if number == 0 else "#9db8cc")
        rates = [asked["num_prompts"] / seconds for seconds in row["runs"]]
        axes.errorbar(
            rate,
            number,
            xerr=[[rate - min(rates)], [max(rates) - rate]],
            color=_INK,
            linewidth=1,
            capsize=3,
        )
        share = row.get("roofline_percent")
        text = f"{rate:.1f}" + (f"  ({share:.0f} % of its limit)" if share is not None else "")
        axes.annotate(
            text,
            (max(rates), number),
            (6, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    if limit:
        axes.axvline(limit, color=_GRAY, linestyle="--", linewidth=1)
        axes.annotate(
            f"limit of the memory: {limit:.1f}",
            (limit, -0.55),
            (0, 2),
            ha="center",
            textcoords="offset points",
            size=8,
            color=_GRAY,
            annotation_clip=False,
        )
    axes.set_xlim(0, 1.12 * most)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("requests/s")
    axes.grid(axis="x")
    return figure


def _bench_start(found: dict[str, Any]) -> "Figure":
    """Seconds of each phase of each start, one after the other."""
    starts = found["starts"]
    names = list(dict.fromkeys(name for start in starts for name in start["phases"]))
    heading = f"{_model(found)}: seconds from the start to the first token"
    figure = _figure(2.3 + 0.42 * len(starts), heading, report.title(found))
    axes = figure.subplots()
    most = max(sum(start["phases"].values()) for start in starts)
    for index, name in enumerate(names):
        color, hatch = _PHASES[index % len(_PHASES)], "//" if index >= len(_PHASES) else ""
        for number, start in enumerate(starts):
            seconds = start["phases"].get(name, 0)
            left = sum(start["phases"].get(other, 0) for other in names[:index])
            axes.barh(
                number,
                seconds,
                left=left,
                height=0.66,
                color=color,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.8,
                label=name if number == 0 else None,
            )
            if seconds > 0.06 * most:
                axes.text(
                    left + seconds / 2,
                    number,
                    f"{seconds:.1f}",
                    ha="center",
                    va="center",
                    size=8,
                    color="white" if color in (_BLUE, _ORANGE, "#009e73") else _INK,
                )
    for number, start in enumerate(starts):
        axes.annotate(
            f"{start['seconds']:.1f} s",
            (sum(start["phases"].values()), number),
            (6, 0),
            textcoords="offset points",
            va="center",
            weight="bold",
        )
    axes.set_xlim(0, 1.12 * most)
    axes.set_ylim(len(starts) - 0.45, -0.55)
    axes.set_yticks(range(len(starts)), [start["name"] for start in starts])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds")
    axes.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=min(len(names), 5), frameon=False, fontsize=8)
    return figure
