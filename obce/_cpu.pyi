"""Compiled engine (csrc/). Addresses are integers; 0 is "not given". Contracts: csrc/ph0_cpu.h, ph0_cpu_sketch.h."""

from collections.abc import Callable
from typing import Any

_Progress = Callable[[float], Any] | None
_Cells = tuple[int, int, int, int]  # level, base, low, high

def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def forest_merges(edges: int, m: int, n: int, merges: int, /) -> None: ...
def lines_r_f_float32(
    values: int,
    row_stride: int,
    value_stride: int,
    B: int,
    n: int,
    lengths: int,
    out: int,
    threads: int,
    progress: _Progress,
    /,
) -> None: ...
def lines_r_f_float64(
    values: int,
    row_stride: int,
    value_stride: int,
    B: int,
    n: int,
    lengths: int,
    out: int,
    threads: int,
    progress: _Progress,
    /,
) -> None: ...
def lines_deaths_float32(
    values: int,
    row_stride: int,
    value_stride: int,
    B: int,
    n: int,
    lengths: int,
    deaths: int,
    threads: int,
    progress: _Progress,
    /,
) -> None: ...
def lines_deaths_float64(
    values: int,
    row_stride: int,
    value_stride: int,
    B: int,
    n: int,
    lengths: int,
    deaths: int,
    threads: int,
    progress: _Progress,
    /,
) -> None: ...
def clouds_h0_float32(
    points: int,
    B: int,
    n: int,
    d: int,
    lengths: int,
    metric: int,
    p: float,
    deaths: int,
    edges: int,
    algorithm: int,
    threads: int,
    progress: _Progress,
    /,
) -> None: ...
def clouds_h0_float64(
    points: int,
    B: int,
    n: int,
    d: int,
    lengths: int,
    metric: int,
    p: float,
    deaths: int,
    edges: int,
    algorithm: int,
    threads: int,
    progress: _Progress,
    /,
) -> None: ...
def matrices_h0_float32(
    entries: int,
    B: int,
    n: int,
    lengths: int,
    condensed: bool,
    check: bool,
    deaths: int,
    edges: int,
    threads: int,
    progress: _Progress,
    /,
) -> int: ...
def matrices_h0_float64(
    entries: int,
    B: int,
    n: int,
    lengths: int,
    condensed: bool,
    check: bool,
    deaths: int,
    edges: int,
    threads: int,
    progress: _Progress,
    /,
) -> int: ...
def graph_h0_float32(
    ends_a: int, ends_b: int, weights: int, m: int, n: int, deaths: int, edges: int, progress: _Progress, /
) -> None: ...
def graph_h0_float64(
    ends_a: int, ends_b: int, weights: int, m: int, n: int, deaths: int, edges: int, progress: _Progress, /
) -> None: ...
def cells_update(
    values: int, row_stride: int, m: int, texts: int, cells: _Cells, rows: int, n_cells: int, threads: int, /
) -> None: ...
def cells_merge(into: _Cells, from_: _Cells, rows: int, n_cells: int, threads: int, /) -> None: ...
def cells_regrid(cells: _Cells, rows: int, n_cells: int, level: int, base: int, threads: int, /) -> None: ...
def cells_gaps(
    cells: _Cells, rows: int, n_cells: int, gap: int, bound: int, texts: int, extremes: int, threads: int, /
) -> None: ...
def sums_update(
    values: int, row_stride: int, m: int, rows: int, positive: int, negative: int, squares: int, threads: int, /
) -> None: ...
def sums_add(values: int, m: int, rows: int, sums: int, digits: int, first: int, threads: int, /) -> None: ...
def sums_means(sums: int, count: int, rows: int, out: int, threads: int, /) -> None: ...
def sums_deviations(sums: int, squares: int, count: int, rows: int, out: int, threads: int, /) -> None: ...
def token_sums(
    tokens: int,
    text_stride: int,
    token_stride: int,
    lengths: int,
    B: int,
    width: int,
    sums: int,
    squares: int,
    least: int,
    greatest: int,
    threads: int,
    team: int,
    /,
) -> int: ...
