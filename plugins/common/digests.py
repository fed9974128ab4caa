"""Digests of rows: equal for equal values, however the arrays that hold them were sliced and put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import xxhash

import sdg
from sdg_plugins.common.unify import is_list
from sdg_plugins.common.values import pick

if TYPE_CHECKING:
    import pyarrow as pa


def digest_of(table: pa.Table, bad: tuple[int, ...]) -> str:
    """A digest of a chunk's rows, followed by the positions of those that could not be read, which it leaves out."""
    import pyarrow as pa

    digest, gone = xxhash.xxh3_128(), set(bad)
    kept = pick(table, [position for position in range(table.num_rows) if position not in gone]) if gone else table
    for name, column in zip(kept.column_names, kept.columns, strict=True):
        digest.update(f"{name}:{column.type}:{len(column)}".encode())
        try:
            arrays = [column.combine_chunks()] if column.num_chunks else []
        except pa.ArrowInvalid:  # more than 2 GiB of text
            arrays = column.chunks
        for array in arrays:
            _add(digest, array)
    return f"{digest.hexdigest()}:{','.join(map(str, bad))}"


def _add(digest: Any, array: pa.Array) -> None:
    """Add an array's values to a digest. Its buffers may have more than them, and a list's offsets begin anywhere."""
    import pyarrow as pa
    import pyarrow.types as t

    array = _plain(array)
    if array.null_count:
        digest.update(_bytes_of(array.is_valid(), pa.uint8()))
    if not (t.is_struct(array.type) or is_list(array.type) or t.is_map(array.type)):
        for buffer in pa.concat_arrays([array]).buffers()[1:]:
            digest.update(b"" if buffer is None else buffer)
        return
    if t.is_struct(array.type):
        for child in array.flatten():
            _add(digest, child)
        return
    if not t.is_fixed_size_list(array.type):
        digest.update(_bytes_of(_lengths(array), pa.int64()))
    if t.is_map(array.type):
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        for child in (array.keys, array.items):
            _add(digest, child.slice(start, end - start))
        return
    _add(digest, array.flatten())


def _lengths(array: pa.Array) -> pa.Array:
    """How many values each list has, or map; 0 for nulls."""
    import pyarrow.compute as pc

    lengths = pc.subtract(array.offsets[1:], array.offsets[:-1])
    return pc.multiply(lengths, array.is_valid().cast(lengths.type))


def _bytes_of(array: pa.Array, kind: pa.DataType) -> Any:
    """The numbers of an array without nulls as bytes. Arrow's way through numpy is closed where that is missing."""
    import pyarrow as pa

    return pa.concat_arrays([array.cast(kind)]).buffers()[1] or b""


def _plain(array: pa.Array) -> pa.Array:
    """An array without its dictionary, because which values that has depends on other rows, too."""
    import pyarrow as pa

    array = array.storage if isinstance(array.type, pa.BaseExtensionType) else array
    if not pa.types.is_dictionary(array.type):
        return array
    values = array.dictionary
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return values.cast(views.get(values.type, values.type)).take(array.indices)  # Arrow cannot take from views


class HasRows(Protocol):
    """A chunk that was read, with its rows."""

    chunk: sdg.Chunk
    table: pa.Table


def same_rows(opened: HasRows, recorded: sdg.Chunk) -> bool:
    """True if the rows of a chunk are those that an earlier process has recorded, as far as that could read them."""
    if recorded.digest is None:  # an earlier version of sdg has recorded none
        return True
    if opened.chunk.count < recorded.count:
        return False
    bad = tuple(int(position) for position in recorded.digest.partition(":")[2].split(",") if position)
    return digest_of(opened.table.slice(0, recorded.count), bad) == recorded.digest
