"""A forked child has the parameters as its own, as any tensor, although they lie in memory that processes share.

A DataLoader's worker, for one, would else write into its parent's model. Before the fork the parent copies such
vectors into a file in memory, which the child maps privately where they lay: its values are those of the moment of the
fork, and its own. Children that are forked while nothing has changed share one copy, page by page until they write.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

_MAPS = "/proc/self/maps"  # where there is none, nothing is known of memory, and nothing is done
_FIXED = 0x10  # MAP_FIXED: replaces what is mapped there
_FAILED = ctypes.c_void_p(-1).value  # what mmap returns then


class _Range(NamedTuple):
    """Whole pages that hold a vector: what else lies there is of no use to a child, which is no rank."""

    start: int
    length: int


_owners: weakref.WeakSet[Any] = weakref.WeakSet()
_copies: dict[_Range, int | None] = {}  # the file of each; None: there was no memory for one


def watch(owner: Any) -> None:
    """From now on children have the vectors of `owner.data` and `owner.grads` (by dtype) as their own."""
    _owners.add(owner)


def drop() -> None:
    """Frees the copies: the vectors have changed."""
    while _copies:
        file = _copies.popitem()[1]
        if file is not None:
            os.close(file)


def _before() -> None:
    """In the parent: copies what is shared, unless the last copy is still right."""
    vectors = [v for owner in _owners for part in (owner.data, owner.grads) for v in part.values()]
    due = _shared_pages(vectors)
    for pages in [*_copies.keys() - due]:
        _discard(pages)
    for pages in due:
        if pages in _copies and not _is_right(pages):
            _discard(pages)
        if pages not in _copies:
            _copies[pages] = _copied(pages)


def _after_in_child() -> None:
    libc = _libc()
    for pages, file in _copies.items():
        if file is None:
            libc.mprotect(*pages, mmap.PROT_READ)
        else:
            flags = mmap.MAP_PRIVATE | _FIXED
            if libc.mmap(*pages, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0) != pages.start:
                raise OSError(ctypes.get_errno(), "the parameters of a forked child are its parent's")
    drop()


def _discard(pages: _Range) -> None:
    file = _copies.pop(pages)
    if file is not None:
        os.close(file)


def _copied(pages: _Range) -> int | None:
    memory = memoryview((ctypes.c_char * pages.length).from_address(pages.start)).cast("B")
    file = os.memfd_create("mpilsgd")
    try:
        done = 0
        while done < pages.length:
            done += os.pwrite(file, memory[done:], done)
    except OSError as error:
        os.close(file)
        message = (
            f"no memory for a forked child's own parameters ({error}): it can read its parent's, not write"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return file


def _is_right(pages: _Range) -> bool:
    file, libc = _copies[pages], _libc()
    if file is None:
        return False
    copy = libc.mmap(None, pages.length, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    if copy == _FAILED:
        return False
    same = libc.memcmp(copy, *pages) == 0
    libc.munmap(copy, pages.length)
    return same


def _shared_pages(vectors: Iterable[Tensor]) -> set[_Range]:
    """The pages of those that lie in shared mappings; others are private in a child anyway."""
    page, due = mmap.PAGESIZE, set()
    for vector in vectors:
        if vector.is_cpu and vector.numel():
            start = vector.data_ptr() // page * page
            stop = -(-(vector.data_ptr() + vector.nbytes) // page) * page
            due.add(_Range(start, stop - start))
    if not due or not os.path.exists(_MAPS):
        return set()
    shared: list[tuple[int, int]] = []
    with open(_MAPS) as file:
        for line in file:
            place, permissions = line.split(None, 2)[:2]
            if permissions.endswith("s"):
                start, stop = (int(address, 16) for address in place.split("-"))
                if shared and shared[-1][1] == start:
                    start = shared.pop()[0]
                shared.append((start, stop))
    return {r for r in due if any(a <= r.start and r.start + r.length <= b for a, b in shared)}


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = address
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.munmap.argtypes = (address, size)
    libc.mprotect.argtypes = (address, size, number)
    libc.memcmp.argtypes = (address, address, size)
    return libc


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)
