"""The usual restore: all tensors of a pack, each whole, into tensors that lie in memory as they do in the file.

It is planned by columns, not tensor by tensor: of tens of thousands the plan would take longer than the copy.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from ftrain.checkpoint.items import TensorItem
from ftrain.checkpoint.look import host_addresses
from ftrain.core.manifest import PackIndex
from ftrain.storage.base import Ranges

_wanted = operator.attrgetter("key", "shape", "shape", "dtype", "private")
_saved = operator.attrgetter("key", "shape", "box_shape", "dtype", "private")
_mesh = operator.attrgetter("mesh")
_private = operator.attrgetter("private")
_offset = operator.attrgetter("offset")
_nbytes = operator.attrgetter("nbytes")
_spec = operator.attrgetter("spec")
_local = operator.attrgetter("local")


def add_straight(items: Sequence[TensorItem], index: PackIndex, pack: int, ranges: Ranges) -> bool:
    """Add a range for each item, in their order; False where the items are not just what the pack holds."""
    boxes, specs = index.boxes, list(map(_spec, items))
    if index.frames or len(boxes) != len(specs) or list(map(_wanted, specs)) != list(map(_saved, boxes)):
        return False
    if any(map(_private, boxes)) or list(map(_mesh, specs)).count(None) != len(specs):
        return False
    addresses = host_addresses(list(map(_local, items)))
    if addresses is None:
        return False
    ranges.files.extend([pack] * len(boxes))
    ranges.sums.extend(index.box_crc32c)
    ranges.offsets.extend(list(map(_offset, boxes)))
    ranges.sizes.extend(list(map(_nbytes, boxes)))
    ranges.addresses.extend(addresses)
    return True
