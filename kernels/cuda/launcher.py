"""Launching a loaded kernel on torch's current stream with as little Python as possible.

Wrapping a stream handle and a launch configuration anew costs 14 µs a launch; both are kept, so a launch costs about
4 µs. Inside a CUDA graph it costs nothing but the capture.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .compiler import cuda_core

Argument = Tensor | int | float | None
"""A tensor is passed as its address, an int as 32 bits, a float as 32 bits, None as a null pointer."""
_STATIC_SHARED_LIMIT = 48 << 10
"""Bytes of dynamic shared memory that a kernel may use without asking."""
_FIRST_PROGRAMMATIC = (9, 0)
_bound = threading.local()


def _bind_thread(core: Any, index: int) -> None:
    """Make torch's current device `index` the driver's too in this thread, once: torch does so only when it has to."""
    devices: set[int] = _bound.__dict__.setdefault("devices", set())
    if index not in devices:
        core.Device(index).set_current()
        devices.add(index)


def _current_stream(index: int) -> int:
    """The handle of torch's current stream; what `torch.cuda.current_stream` wraps, at a tenth of its cost."""
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    return handle


class Kernel:
    """One entry of a compiled file on one device.

    Args:
        name: for messages.
        entry: the ``extern "C"`` function.
        cubin: machine code for the device's architecture.
        index: the device.

    Raises:
        KernelError: the driver doesn't take it.
    """

    def __init__(self, name: str, entry: str, cubin: bytes, index: int) -> None:
        from cuda.bindings import driver

        core = cuda_core()
        self.name, self.index = name, index
        self._core, self._driver = core, driver
        self._programmatic = torch.cuda.get_device_capability(index) >= _FIRST_PROGRAMMATIC
        self._shared_bytes = _STATIC_SHARED_LIMIT
        self._streams: dict[int, Any] = {}
        self._configs: dict[tuple[Any, ...], Any] = {}
        with torch.cuda.device(index):
            _bind_thread(core, index)
            try:
                self._kernel = core.ObjectCode.from_cubin(cubin, name=name).get_kernel(entry)
                # Loads the code now rather than at the first launch, which may come inside a graph capture.
                function = self._check(driver.cuKernelGetFunction(self._kernel.handle))
                self._check(driver.cuFuncLoad(function))
            except Exception as cause:  # cuda.core's own error types are not public
                raise KernelError(f"{name} can't be loaded on cuda:{index}: {cause}") from cause
        attributes = self._kernel.attributes[index]
        self._parameters = int(self._kernel.num_arguments)
        self.registers = int(attributes.num_regs)
        self.static_shared_bytes = int(attributes.shared_size_bytes)
        self.spilled_bytes = int(attributes.local_size_bytes)

    def __repr__(self) -> str:
        return f"Kernel({self.name} on cuda:{self.index}, {self.registers} registers)"

    @staticmethod
    def _check(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise KernelError(str(result[0]))
        return result[1] if len(result) > 1 else None

    def allow_shared(self, shared_bytes: int) -> None:
        """Let launches use this much dynamic shared memory; `launch` does it by itself.

        Raises:
            KernelError: the device has less.
        """
        if shared_bytes <= self._shared_bytes:
            return
        driver = self._driver
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = self._check(driver.cuDeviceGet(self.index))
        try:
            self._check(driver.cuKernelSetAttribute(attribute, shared_bytes, self._kernel.handle, device))
        except KernelError as cause:
            raise KernelError(f"{self.name} can't have {shared_bytes} bytes of shared memory: {cause}.") from cause
        self._shared_bytes = shared_bytes

    def blocks_per_multiprocessor(self, threads: int, shared_bytes: int = 0) -> int:
        """How many blocks run on a multiprocessor at once."""
        self.allow_shared(shared_bytes)
        return int(self._kernel.occupancy.max_active_blocks_per_multiprocessor(threads, shared_bytes))

    def launch(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        cluster: int = 1,
        stream: torch.cuda.Stream | None = None,
        programmatic: bool = False,
    ) -> None:
        """Queue the kernel; returns at once.

        Args:
            grid, block: blocks, and threads of a block.
            args: in the order of the kernel's parameters; tensors must live on this device.
            shared_bytes: dynamic shared memory of a block.
            cluster: neighbouring blocks that run at once and reach each other's shared memory; a divisor of the
                grid, and 1 below sm_90.
            stream: None for torch's current stream of this device.
            programmatic: may start before the kernel ahead of it has ended (programmatic dependent launch); the kernel
                must then wait by ``griddepcontrol.wait`` before it reads what that one wrote. Below sm_90, where the
                instruction does not exist, an ordinary launch.

        Raises:
            KernelError: the driver refuses the launch.
        """
        if len(args) != self._parameters:
            raise KernelError(f"{self.name} takes {self._parameters} arguments; got {len(args)}.")
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                self.launch(
                    grid,
                    block,
                    args,
                    shared_bytes=shared_bytes,
                    cluster=cluster,
                    stream=stream,
                    programmatic=programmatic,
                )
            return
        _bind_thread(self._core, self.index)
        handle = _current_stream(self.index) if stream is None else stream.cuda_stream
        wrapped = self._streams.get(handle)
        if wrapped is None:
            wrapped = self._core.Stream.from_handle(handle) if handle else self._core.LEGACY_DEFAULT_STREAM
            self._streams[handle] = wrapped
        shape = (grid, block, shared_bytes, cluster, programmatic)
        config = self._configs.get(shape)
        if config is None:
            config = self._configs[shape] = self._config(*shape)
        try:
            self._core.launch(wrapped, config, self._kernel, *map(_pass, args))
        except Exception as cause:  # cuda.core's own error types are not public
            raise KernelError(
                f"{self.name} can't be launched on cuda:{self.index} (grid {grid}, block {block}, {shared_bytes} bytes "
                f"of shared memory, {self.registers} registers): {cause}"
            ) from cause

    def _config(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        shared_bytes: int,
        cluster: int,
        programmatic: bool,
    ) -> Any:
        self.allow_shared(shared_bytes)
        return self._core.LaunchConfig(
            grid=grid if cluster == 1 else _in_clusters(grid, cluster),
            cluster=None if cluster == 1 else cluster,
            block=block,
            shmem_size=shared_bytes,
            programmatic_stream_serialization=programmatic and self._programmatic,
        )


def _in_clusters(grid: int | tuple[int, ...], cluster: int) -> tuple[int, ...]:
    """A grid of blocks as cuda.core counts it: in clusters, of blocks along the first dimension."""
    first, *further = (grid,) if isinstance(grid, int) else grid
    if first % cluster:
        raise KernelError(f"clusters of {cluster} blocks need a multiple of {cluster} blocks; got {first}.")
    return (first // cluster, *further)


def _pass(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, int):
        if not -(1 << 31) <= argument < 1 << 31:
            raise KernelError(f"a kernel's integer argument must fit 32 bits; got {argument}.")
        return ctypes.c_int32(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if argument is None:
        return 0
    raise KernelError(f"expected tensors, integers, floats and None as a kernel's arguments; got {argument!r}.")
