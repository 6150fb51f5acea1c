"""The processes that share a job: one, or those `torchrun` started, through torch.distributed.

Only what scoring needs: everyone learns a small object, arrays are reduced elementwise, one array moves to rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

_WAYS = {"min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM} if dist.is_available() else {}

# Processes find each other within minutes; later one may wait for another one's shards for hours. One that died is
# noticed at once, by its closed connection.
_MEETING, _PATIENCE = timedelta(minutes=5), timedelta(hours=24)
_patient: dist.ProcessGroup | None = None


class World:
    """The process group that is initialised, or this process alone.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        on_gpu = together and dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def _group(self) -> dist.ProcessGroup | None:
        # never held: one that outlives `joined` has threads that want the interpreter while it is going away
        return _patient

    def tell(self, mine: Any) -> list[Any]:
        """What every rank has to say, in the order of ranks, to every rank."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, mine, group=self._group)
        return found

    def from_first(self, mine: Any) -> Any:
        """What rank 0 has, on every rank."""
        if self.size == 1:
            return mine
        held = [mine]
        with _explained():
            dist.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    def reduce(self, array: np.ndarray, way: Literal["min", "max", "sum"]) -> None:
        """Elementwise minimum, maximum or sum over all ranks, in place, on every rank."""
        if self.size == 1:
            return
        # one axis at a time would be as good; blocks keep the copy on a device small
        flat = array.reshape(-1)
        for start in range(0, flat.size, 1 << 24):
            block = torch.from_numpy(flat[start : start + (1 << 24)])
            moved = block.to(self._device)
            with _explained():
                dist.all_reduce(moved, _WAYS[way], group=self._group)
            if moved.data_ptr() != block.data_ptr():
                block.copy_(moved)

    def bring(self, array: np.ndarray | None, owner: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
        """The owner's array on rank 0, None elsewhere; only the owner gives one."""
        if owner == 0:
            return array if self.rank == 0 else None
        if self.rank == owner:
            if array is None or array.shape != shape or array.dtype != dtype:
                raise ValueError(f"array is not of shape {shape} and {dtype}, which rank 0 waits for.")
            with _explained():
                dist.send(torch.from_numpy(np.ascontiguousarray(array)).to(self._device), dst=0, group=self._group)
        elif self.rank == 0:
            held = torch.from_numpy(np.empty(shape, dtype)).to(self._device)
            with _explained():
                dist.recv(held, src=owner, group=self._group)
            return held.cpu().numpy()
        return None


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo and nccl raise it when a peer's connection closes
        raise RuntimeError(
            "another process of this job ended before its work was done: what was finished is kept, start the same "
            f"command again ({' '.join(str(error).split())[:160]})"
        ) from error


@contextmanager
def joined() -> Iterator[World]:
    """The world of a command: the processes `torchrun` started, joined for the `with`, or this one alone.

    Raises:
        ValueError: The environment speaks of several processes but cannot be joined.
    """
    global _patient  # noqa: PLW0603  (a process has one default group, and this one beside it)
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 2 or dist.is_initialized():
        yield World()
        return
    on_gpu = torch.cuda.is_available()
    try:
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_MEETING)
        _patient = dist.new_group(timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"WORLD_SIZE is {size}, but the processes cannot be joined ({' '.join(str(error).split())[:160]}): start "
            "them with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield World()
    finally:
        _patient = None
        dist.destroy_process_group()
