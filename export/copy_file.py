"""Copying a file of many gigabytes without reading it: a clone where the file system can, else by the kernel, holes
kept as holes.
"""

from __future__ import annotations

import errno
import os
from fcntl import ioctl
from pathlib import Path

FICLONE = 0x40049409  # Linux: share the blocks of another file until one of the two is written
CHUNK = 1 << 30


def copy_sparse(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as write:
        try:
            ioctl(write.fileno(), FICLONE, read.fileno())
            return
        except OSError:
            pass  # another file system, or one that cannot clone
        size = os.fstat(read.fileno()).st_size
        os.ftruncate(write.fileno(), size)
        start = 0
        while start < size:
            try:
                start = os.lseek(read.fileno(), start, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO and os.fstat(read.fileno()).st_size == size:  # a hole up to the end
                    return
                raise
            end = os.lseek(read.fileno(), start, os.SEEK_HOLE)
            _copy_range(read.fileno(), write.fileno(), start, end)
            start = end


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        sent = os.sendfile(target, source, start, min(CHUNK, end - start))
        if sent == 0:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        start += sent
