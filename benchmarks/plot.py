"""Draws the rows of obce bench (growth curves, one bar a peer for every case) and the memory of a sketched stream.

    python benchmarks/plot.py [CSV] [--out FOLDER]

Writes .png and .svg beside the CSV. Needs matplotlib (`pip install .[bench]`).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from obce.bench import Row, growth, read_rows

# Okabe and Ito's colours, told apart by the colour-blind; markers and line styles repeat the difference.
VERMILION, BLUE = "#D55E00", "#0072B2"
LOOKS = {
    "obce": (VERMILION, "o"),
    "numba Prim": (BLUE, "s"),
    "quitefastmst": ("#009E73", "^"),
    "fastcluster": ("#CC79A7", "D"),
    "scikit-learn": ("#E69F00", "v"),
    "hdbscan": ("#56B4E9", "P"),
    "scipy": ("#000000", "X"),
    "ripser": ("#999999", "*"),
    "mlpack": ("#F0E442", "h"),
    "genieclust": ("#7F7F00", "d"),
}
WIDTH = 3.5  # inches: one column
OURS = "obce"
STYLE = {
    "font.size": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "obce",  # the same CSV draws the same bytes
}
LABELS = {
    "n": ("points in a cloud, n", "n"),
    "d": ("coordinates of a point, d", "d"),
    "B": ("clouds in a batch, B", "B"),
    "cloud n": ("points in one cloud, n", "cloud_n"),
}
SHOWN = 7  # lines that a reader can still tell apart


def tool_of(peer: str) -> str:
    """The tool without the name of its method, where it has several."""
    return next((tool for tool in LOOKS if peer.startswith(tool)), peer)


def save(figure: Any, folder: Path, name: str) -> None:
    for suffix, facts in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        figure.savefig(folder / (name + suffix), dpi=300, metadata=facts)
    plt.close(figure)
    print(folder / name)


def shape_of(rows: list[Row], axis: str) -> str:
    """What stays the same along a curve: "20 clouds, 8 coordinates"."""
    row = rows[0]
    parts = []
    if axis != "B" and row["B"] != "1":
        parts.append(f"{int(row['B']):,} clouds")
    if axis != "n":
        parts.append(f"{int(row['n']):,} points")
    if axis != "d":
        parts.append(f"{row['d']} coordinates")
    return ", ".join(parts)


def curves(rows: list[Row], series: str, folder: Path) -> None:
    """Log-log time against the axis of a series: ours, and the peers that are fastest at its far end."""
    axis = series.rsplit(maxsplit=1)[-1]
    here = [row for row in rows if row["series"] == series and row["status"] == "ok" and row["threads"] == "1"]
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in here:
        at = (float(row[axis]), *(float(row[f"wall_p{p}"]) for p in (50, 20, 80)))
        found.setdefault(row["peer"], []).append(at)
    found = {peer: sorted(points) for peer, points in found.items() if len(points) > 1}
    if not found:
        return

    def end(peer: str) -> tuple[float, float]:
        x, y = found[peer][-1][:2]
        return -x, y

    best: dict[str, str] = {}
    for peer in sorted(found, key=end):
        if tool_of(peer) in LOOKS:
            best.setdefault(tool_of(peer), peer)
    fastest = [peer for tool, peer in best.items() if tool != OURS]
    known = [peer for peer in ("ripser", "scipy linkage") if peer in fastest]
    chosen = [peer for peer in fastest if peer not in known][: SHOWN - len(known)] + known
    exponents = growth(here)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    for peer in [OURS, *sorted(chosen, key=end)]:
        if peer not in found:
            continue
        x, middle, low, high = zip(*found[peer], strict=True)
        colour, marker = LOOKS[tool_of(peer)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            x,
            middle,
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1.8 if peer == OURS else 0.9,
            zorder=3 if peer == OURS else 2,
            label=f"{peer.removesuffix(', 40 lines')} ({exponents[series, peer, '1']:.2f})",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    measured = sorted({point[0] for points in found.values() for point in points})
    axes.set_xticks(measured, [f"{x:,.0f}" for x in measured])
    axes.minorticks_off()
    axes.set_xlabel(LABELS[series][0])
    axes.set_ylabel("time, seconds (wall, 1 thread)")
    axes.set_title(f"{shape_of(here, axis)}; in brackets p of time ~ {axis}$^p$", fontsize=7, loc="left")
    axes.grid(which="major", linewidth=0.3, color="#dddddd")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=6.5, handlelength=1.6, columnspacing=1.2)
    save(figure, folder, f"h0_growth_{LABELS[series][1]}")


def bars(rows: list[Row], folder: Path) -> None:
    """For every case, the time of the fastest peers as a multiple of ours; shorter than 1 is faster than ours."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if not row["series"] and row["threads"] == "1" and row["ratio"]:
            cases.setdefault(row["case"], []).append(row)
    picked: list[tuple[str, list[tuple[str, float]]]] = []
    for case, some in cases.items():
        peers = sorted((float(r["ratio"]), r["peer"]) for r in some if not r["peer"].startswith(OURS))
        if peers:
            shown = peers[:3] + [p for p in peers[3:] if p[1] == "ripser"]
            picked.append((case, [(peer, ratio) for ratio, peer in shown]))
    if not picked:
        return
    count = sum(len(peers) + 1.6 for _, peers in picked)
    height = 0.6 + 0.125 * count
    figure, axes = plt.subplots(figsize=(WIDTH, height))
    figure.subplots_adjust(left=0.36, right=0.92, bottom=0.45 / height, top=1 - 0.1 / height)
    beside = axes.get_yaxis_transform()
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    y = 0.0
    largest = max(ratio for _, peers in picked for _, ratio in peers)
    smallest = min(1.0, *(ratio for _, peers in picked for _, ratio in peers))
    for case, peers in picked:
        axes.text(-0.56, y, case, weight="bold", va="center", transform=beside, bbox=blank)
        for peer, ratio in peers:
            y += 1
            axes.barh(y, ratio - 1, left=1, height=0.7, color=BLUE if ratio >= 1 else VERMILION, linewidth=0)
            axes.text(-0.02, y, peer, ha="right", va="center", transform=beside)
            axes.text(max(ratio, 1) * 1.2, y, f"{ratio:,.3g}" if ratio < 1000 else f"{ratio:,.0f}", va="center")
        y += 1.6
    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.5, largest * (largest / smallest) ** 0.25)  # room for the longest bar's number
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(y - 0.8, -0.8)
    axes.xaxis.set_major_locator(mpl.ticker.LogLocator(numticks=4))
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axes.minorticks_off()
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time of the peer / time of obce (wall, 1 thread)")
    axes.grid(axis="x", which="major", linewidth=0.3, color="#dddddd")
    axes.set_axisbelow(True)
    save(figure, folder, "h0_ratios")


def memory(path: Path, folder: Path) -> None:
    """Memory of a sketched stream beside what holding every value would take, from the CSV of bench_sketch.py."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [float(row["texts"]) for row in rows]
    held = [float(row["resident_mb"]) for row in rows]
    every = [4e-6 * float(row["neurons"]) * float(row["texts"]) for row in rows]
    figure, axes = plt.subplots(figsize=(WIDTH, 2.3), layout="constrained")
    axes.plot(texts, every, color="#999999", linewidth=0.9, linestyle="--", label="every value, 4 bytes each")
    axes.plot(
        texts, held, color=VERMILION, marker="o", markersize=3, linewidth=1.8, label="the process with the sketch"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("texts that have passed")
    axes.set_ylabel("resident memory, MB")
    axes.set_title(f"{int(rows[0]['neurons']):,} neurons", fontsize=7, loc="left")
    axes.grid(which="major", linewidth=0.3, color="#dddddd")
    axes.legend(frameon=False)
    save(figure, folder, "sketch_memory")


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="?", default=Path(__file__).parent / "results" / "h0.csv")
    parser.add_argument("--out", type=Path, help="folder (default: beside the CSV)")
    wish = parser.parse_args()
    rows = read_rows(wish.csv)
    if not rows:
        parser.error(f"{wish.csv} has no rows; run: obce bench --out {wish.csv}")
    folder = wish.out or wish.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for series in LABELS:
            curves(rows, series, folder)
        bars(rows, folder)
        stream = wish.csv.with_name("sketch_stream.csv")
        if stream.is_file():
            memory(stream, folder)


if __name__ == "__main__":
    main()
