"""The compiled CUDA engine, csrc/ph0_cuda.h: what it is handed, and the memory it works in.

Memory comes from torch and is used on the current stream of the data's device, so torch's allocator orders it. Nothing
here waits for the device or copies from it, so calls may be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

NUMBERS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

# Prim does one edge after the other and keeps one multiprocessor busy; Boruvka pays for launches and shares a cloud
# among all of them. Prim on coordinates that do not fit a multiprocessor reads all of them for every edge, which pays
# only up to a few edges. Estimated from the floors of both, not measured.
PRIM_ALWAYS = 1024
PRIM_CLOUDS = 64
PRIM_IN_MEMORY = 128

_MOST_CLOUDS = 65_535  # blocks of a launch in y


def engine() -> Any:
    """The module obce._cuda."""
    return importlib.import_module("obce._cuda")


def why_not() -> str | None:
    """Why the engine cannot run on this machine, or None."""
    try:
        reason: str = engine().why_not()
    except ImportError as error:
        return f"obce._cuda is not built ({error}); install CUDA's nvcc and reinstall obce with OBCE_CUDA=1"
    if not reason and not engine().emulated and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return reason or None


def on_device(data: Any) -> torch.Tensor:
    """The data as a tensor where the engine can read it: on a CUDA device."""
    if isinstance(data, np.ndarray) and (min(data.strides) < 0 or not data.flags.writeable):
        data = data.copy()  # torch has neither negative strides nor memory that is only read
    tensor = torch.as_tensor(data)
    return tensor if tensor.is_cuda or engine().emulated else tensor.cuda()


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Index of the device and address of its current stream."""
    if not tensor.is_cuda:
        return 0, 0
    index = tensor.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def _bytes(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(max(count, 1), dtype=torch.uint8, device=like.device)


def _halving(B: int, most: int, what: str, part: Callable[[int, int], None], like: torch.Tensor) -> None:
    """Calls part(first, clouds) for all clouds, fewer at a time when memory runs out.

    Raises:
        RuntimeError: memory runs out with one cloud.
    """
    clouds, first = min(B, most), 0
    while first < B:
        clouds = min(clouds, B - first)
        try:
            part(first, clouds)
        except torch.OutOfMemoryError as error:
            if clouds == 1:
                free = torch.cuda.mem_get_info(like.device)[0]
                raise RuntimeError(
                    f"the device has {free} free bytes, too few for {what} ({error}); pass fewer points, or move them "
                    "to the host, where the cpu backend needs less."
                ) from error
            clouds = (clouds + 1) // 2
            continue
        first += clouds


def sorted_values(data: torch.Tensor) -> int:
    """Largest n of `lines_deaths` for values of this dtype on this device."""
    most: int = engine().sorted_values(NUMBERS[data.dtype], _place(data)[0])
    return most


def lines_r_f(data: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """r_f of lines where they lie, whatever their strides.

    Args:
        data: [B, n], float32, float64, float16 or bfloat16.
        lengths: [B] int64 beside the data, or None.

    Returns:
        [B], float64 for float64 and float32 for the others.
    """
    dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
    out = torch.empty(len(data), dtype=dtype, device=data.device)
    _lines(data, lengths, out, "lines_r_f")
    return out


def lines_deaths(data: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """All gaps of lines, ascending.

    Args:
        data: [B, n], float32 or float64, n at most `sorted_values`.
        lengths: as in `lines_r_f`.

    Returns:
        [B, n - 1] in the dtype of data; NaN beyond the length.
    """
    B, n = data.shape
    out = torch.empty((B, n - 1), dtype=data.dtype, device=data.device)
    _lines(data, lengths, out, "lines_deaths")
    return out


def _lines(data: torch.Tensor, lengths: torch.Tensor | None, out: torch.Tensor, call: str) -> None:
    if not out.numel():
        return
    cuda, number, (device, stream) = engine(), NUMBERS[data.dtype], _place(data)
    address = 0 if lengths is None else lengths.data_ptr()
    lines = cuda.Lines(data.data_ptr(), data.stride(0), data.stride(1), *data.shape, address)
    workspace = _bytes(cuda.lines_workspace(lines, number, call == "lines_deaths", device), data)
    getattr(cuda, call)(lines, number, out.data_ptr(), workspace.data_ptr(), device, stream)


def choose(data: torch.Tensor, matrix: bool, name: str) -> str:
    """The algorithm for clouds [B, n, d] or matrices [B, n, n]: "prim" or "boruvka"."""
    if name != "auto":
        return name
    B, n, d = data.shape
    most: int = engine().prim_points()
    if n > PRIM_ALWAYS and not (n <= most and B >= PRIM_CLOUDS):
        return "boruvka"
    job = engine().Trees(0, B, n, 0 if matrix else d, 0, False, 0, 0)
    fits = n <= PRIM_IN_MEMORY or not engine().prim_workspace(job, NUMBERS[data.dtype], _place(data)[0])
    return "prim" if fits else "boruvka"


def trees(
    data: torch.Tensor, lengths: torch.Tensor | None, squared: bool, with_edges: bool, algorithm: str, matrix: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Deaths and edges of clouds or matrices.

    Args:
        data: points [B, n, d] or matrices [B, n, n], float32 or float64.
        lengths: [B] int64 beside the data, or None.
        squared: a death is the squared length.
        with_edges: whether the edges are wanted.
        algorithm: "prim" (n at most prim_points()) or "boruvka".
        matrix: whether the data are matrices.

    Returns:
        (deaths [B, n - 1], edges [B, n - 1, 2] int64 or None).

    Raises:
        RuntimeError: memory runs out with one cloud.
    """
    data = data.contiguous()
    B, n, d = data.shape
    deaths = torch.empty((B, n - 1), dtype=data.dtype, device=data.device)
    edges = torch.empty((B, n - 1, 2), dtype=torch.int64, device=data.device) if with_edges else None
    if not deaths.numel():
        return deaths, edges
    cuda, number, (device, stream) = engine(), NUMBERS[data.dtype], _place(data)
    run = _prim if algorithm == "prim" else _boruvka

    def part(first: int, clouds: int) -> None:
        here = slice(first, first + clouds)
        into = 0 if edges is None else edges[here].data_ptr()
        address = 0 if lengths is None else lengths[here].data_ptr()
        sizes = clouds, n, 0 if matrix else d
        job = cuda.Trees(data[here].data_ptr(), *sizes, address, squared, deaths[here].data_ptr(), into)
        run(job, data, clouds, number, device, stream, matrix)

    most = B if algorithm == "prim" else _MOST_CLOUDS
    _halving(B, most, f"one {'matrix' if matrix else 'cloud'} of {n} points", part, data)
    return deaths, edges


def _prim(job: Any, data: torch.Tensor, clouds: int, number: str, device: int, stream: int, matrix: bool) -> None:
    del clouds, matrix
    workspace = _bytes(engine().prim_workspace(job, number, device), data)
    engine().prim(job, number, workspace.data_ptr(), device, stream)


def _boruvka(job: Any, data: torch.Tensor, clouds: int, number: str, device: int, stream: int, matrix: bool) -> None:
    cuda, n = engine(), data.shape[1]
    workspace = _bytes(cuda.boruvka_workspace(job, number), data)
    order = None
    if not matrix:
        codes = torch.empty((clouds, n), dtype=torch.int64, device=data.device)
        cuda.boruvka_codes(job, number, codes.data_ptr(), workspace.data_ptr(), device, stream)
        order = torch.argsort(codes, 1)
        del codes
    word = torch.int64 if data.dtype == torch.float64 else torch.int32
    words = torch.empty((clouds, n), dtype=word, device=data.device)
    pairs = torch.empty((clouds, n), dtype=torch.int64, device=data.device)
    address = 0 if order is None else order.data_ptr()
    cuda.boruvka(job, number, address, words.data_ptr(), pairs.data_ptr(), workspace.data_ptr(), device, stream)
    # By weight, ties by the pair. The words are unsigned; with the first bit flipped their order is that of the
    # signed type.
    ranks = torch.argsort(pairs, 1)
    keys = torch.bitwise_xor(words.gather(1, ranks), torch.iinfo(word).min)
    ranks = ranks.gather(1, torch.argsort(keys, dim=1, stable=True)).contiguous()
    arrays = ranks.data_ptr(), words.data_ptr(), pairs.data_ptr()
    cuda.boruvka_write(job, number, *arrays, workspace.data_ptr(), device, stream)
