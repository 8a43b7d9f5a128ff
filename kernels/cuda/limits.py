"""What a CUDA device offers a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..errors import KernelError

RESERVED_BYTES = 1024
"""Shared memory that the system takes of every block's."""
_GRANULE_BYTES = 128
"""In which shared memory is given out."""
_FIRST_CLUSTERS = (9, 0)


@dataclass(frozen=True)
class Limits:
    """What a device offers.

    Attributes:
        multiprocessors: how many it has.
        shared_bytes: dynamic shared memory that a block may have.
        has_clusters: whether neighbouring blocks can reach each other's shared memory.
    """

    multiprocessors: int
    shared_bytes: int
    has_clusters: bool = False

    def bytes_for_each(self, blocks: int) -> int:
        """Dynamic shared memory of a block with which `blocks` of them fit a multiprocessor."""
        return (self.shared_bytes + RESERVED_BYTES) // blocks - RESERVED_BYTES

    def bytes_for_at_most(self, blocks: int) -> int:
        """Dynamic shared memory of a block with which no more than `blocks` of them fit a multiprocessor."""
        return self.bytes_for_each(blocks + 1) + _GRANULE_BYTES


def device_index(device: torch.device) -> int:
    """Index of a CUDA device; that of the current one for ``torch.device("cuda")``."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def device_limits(index: int) -> Limits:
    """What CUDA device `index` offers."""
    from cuda.bindings import driver

    found = torch.cuda.get_device_properties(index)
    wanted = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    status, shared_bytes = driver.cuDeviceGetAttribute(wanted, index)
    if int(status) != 0:
        raise KernelError(f"cuda:{index} doesn't tell its shared memory: {status}.")
    return Limits(found.multi_processor_count, int(shared_bytes), (found.major, found.minor) >= _FIRST_CLUSTERS)
