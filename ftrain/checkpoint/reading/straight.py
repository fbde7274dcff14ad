"""The usual restore: all tensors of a pack, each whole, into tensors that lie in memory as they do in the file.

It is planned by columns, not tensor by tensor: of tens of thousands the plan would take longer than the copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ftrain._native import column, column_is, column_words, columns_equal
from ftrain.checkpoint.staging.look import host_addresses
from ftrain.checkpoint.state.items import TensorItem
from ftrain.core.layout import TensorSpec
from ftrain.core.manifest import BoxRecord, PackIndex
from ftrain.storage.base import Ranges

_WANTED = (TensorSpec.key, TensorSpec.shape, TensorSpec.shape, TensorSpec.dtype)
_SAVED = (BoxRecord.key, BoxRecord.shape, BoxRecord.box_shape, BoxRecord.dtype)


def add_straight(items: Sequence[TensorItem], index: PackIndex, pack: int, ranges: Ranges) -> bool:
    """Add a range for each item, in their order; False where the items are not just what the pack holds."""
    boxes, specs = index.boxes, column(items, TensorItem.spec)
    if index.frames or not (column_is(specs, TensorSpec.mesh, None) and columns_equal(specs, _WANTED, boxes, _SAVED)):
        return False
    if not (column_is(specs, TensorSpec.private, False) and column_is(boxes, BoxRecord.private, False)):
        return False
    addresses = host_addresses(column(items, TensorItem.local))
    if addresses is None:
        return False
    ranges.files.extend(array("Q", [pack]) * len(boxes))
    ranges.sums.extend(index.box_crc32c)
    ranges.offsets.frombytes(column_words(boxes, BoxRecord.offset))
    ranges.sizes.frombytes(column_words(boxes, BoxRecord.nbytes))
    ranges.addresses.extend(addresses)
    return True
