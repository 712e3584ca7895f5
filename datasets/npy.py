"""npy files as bytes: read by their header alone, so that nothing is ever unpickled, and written the same way each time."""

import io
import math
from typing import BinaryIO

import numpy as np

MAX_HEADER_BYTES = 1 << 14


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, type) of a npy file, read up to its first value. ValueError when it is none."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"npy version {version}")
    return read[version](file)


def npy_array(payload: bytes) -> np.ndarray:
    """The array of plain numbers in a npy file. ValueError for any other."""
    buffer = io.BytesIO(payload)
    shape, is_fortran, dtype = npy_header(buffer)
    if dtype.kind not in "fiub" or min(shape, default=1) < 0:
        raise ValueError(f"{dtype} of shape {shape}, not plain numbers")
    if math.prod(shape) * dtype.itemsize != len(payload) - buffer.tell():
        raise ValueError(f"{len(payload) - buffer.tell()} bytes for {dtype} of shape {shape}")
    return np.frombuffer(payload, dtype, offset=buffer.tell()).reshape(shape, order="F" if is_fortran else "C")


def npy_file(array: np.ndarray) -> bytes:
    """An array as a npy file."""
    array, header = np.ascontiguousarray(array), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue() + array.tobytes()
