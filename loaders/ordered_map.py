"""A function over many numbers in a pool of threads: results in order, few of them in hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 64  # samples submitted ahead for each thread; those of a whole data set at once would fill the memory
_Result = TypeVar("_Result")


def ordered_map(
    pool: ThreadPoolExecutor, function: Callable[[int], _Result], numbers: range, ahead: int
) -> Iterator[_Result]:
    """``function`` of each of ``numbers`` in order, no more than ``ahead`` of them submitted and not yet taken."""
    pending: deque[Future[_Result]] = deque()
    try:
        for index in numbers:
            if len(pending) == ahead:
                yield pending.popleft().result()
            pending.append(pool.submit(function, index))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
