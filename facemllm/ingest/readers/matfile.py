"""Numeric arrays out of a MATLAB 5 file (.mat as MATLAB 5 to 7.2 writes it), and nothing else out of it.

A general reader also builds cells, structures, objects and functions; here they are passed over unread, so that a
hostile file can build nothing but arrays of numbers of bounded size. Compressed variables are inflated up to a limit.
Layout: MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from facemllm.ingest.reader import Refuse

MAX_INFLATED = 2**20
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x800
_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def arrays(data: bytes, names: Collection[str]) -> dict[str, NDArray[np.float64]]:
    """The two-dimensional numeric arrays of those names that are in the file. Raises Refuse when it is damaged, is of
    MATLAB 4 or 7.3, or holds one of them in another form."""
    if len(data) < _HEADER or data[126:128] not in (b"IM", b"MI"):
        raise Refuse("no MATLAB 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    if struct.unpack_from(f"{order}H", data, 124)[0] != 0x0100:
        raise Refuse("no MATLAB 5 file; one of MATLAB 7.3 has to be saved again with -v7")
    found: dict[str, NDArray[np.float64]] = {}
    for kind, content in _elements(data[_HEADER:], order):
        if kind == _COMPRESSED:
            kind, content = next(_elements(_inflated(content), order), (0, b""))
        if kind == _MATRIX:
            name, array = _array(content, order, names)
            if array is not None:
                found[name] = array
    return found


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise Refuse("the MATLAB file is cut short")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # type and size share four bytes, and the content the next four
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise Refuse("the MATLAB file is cut short")
        yield kind, data[start : start + size]
        at = start + size
        if kind != _COMPRESSED:
            at += -at % 8


def _inflated(data: bytes) -> bytes:
    try:
        inflated = zlib.decompressobj().decompress(data, MAX_INFLATED + 1)
    except zlib.error as error:
        raise Refuse(f"the MATLAB file is damaged ({error})") from None
    if len(inflated) > MAX_INFLATED:
        raise Refuse(f"a variable of the MATLAB file inflates to more than {MAX_INFLATED:,} bytes")
    return inflated


def _array(content: bytes, order: str, names: Collection[str]) -> tuple[str, NDArray[np.float64] | None]:
    parts = _elements(content, order)
    flags, shape, name = (next(parts, (0, b""))[1] for _ in range(3))
    if len(flags) != 8:
        raise Refuse("the MATLAB file is damaged (a variable without flags)")
    called = name.decode("ascii", "replace")
    if called not in names:
        return called, None
    flag = struct.unpack_from(f"{order}I", flags)[0]
    kind, numbers = next(parts, (0, b""))
    if flag & 0xFF not in _NUMERIC_CLASSES or flag & _COMPLEX or kind not in _DTYPES or len(shape) != 8:
        raise Refuse(f"{called} is no matrix of real numbers")
    rows, columns = struct.unpack(f"{order}ii", shape)
    dtype = np.dtype(order + _DTYPES[kind])
    if rows < 0 or columns < 0 or rows * columns * dtype.itemsize != len(numbers):
        raise Refuse(f"{called} does not hold {rows} x {columns} numbers")
    return called, np.frombuffer(numbers, dtype).astype(np.float64).reshape((rows, columns), order="F")
