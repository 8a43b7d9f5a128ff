"""The kernels compile for every architecture: each family, code, batch, format and choice of table is in some case."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch
from msq.kernels.cuda.compiler import ARCHITECTURES, compile_source
from msq.kernels.cuda.dequantize import source as dequantize_source
from msq.kernels.cuda.limits import Limits
from msq.kernels.cuda.tuning import Tuning, launch_for
from msq.kernels.cuda.tuning_choice import tune
from msq.kernels.specs import DEFAULT_STATE_BITS, every_quantizer
from msq.profiles.options import parse_palette

SPECS = {spec.label: spec for spec in every_quantizer()}
LIMITS = Limits(multiprocessors=84, shared_bytes=99 << 10)  # of a consumer card

CASES = [
    ("int-4", 1, torch.float16, None),
    ("int-8", 8, torch.bfloat16, Tuning(8, splits=2)),
    ("nuq-2", 1, torch.float16, None),
    ("nuq-3", 1, torch.float16, None),
    ("nuq-3", 8, torch.bfloat16, None),  # of halves
    ("nuq-7", 4, torch.bfloat16, None),
    ("vq-2", 2, torch.float16, None),
    ("vq-2", 16, torch.bfloat16, None),
    ("vq-6", 16, torch.float16, None),
    ("tcq-2.5", 1, torch.bfloat16, None),
    ("tcq-5", 8, torch.float16, None),
    ("half-tcq-3.25", 2, torch.float16, None),  # of one hash and of two
    ("tcq-2.5-hyb", 16, torch.bfloat16, None),
    ("half-tcq-1.75-hyb", 1, torch.float16, Tuning(8, replicas=8)),
    ("half-tcq-4.25-hyb", 2, torch.bfloat16, None),
]


def instructions(cubin):
    """The first halves of a compiled file's instructions, of 16 bytes each."""
    headers, size, count = (*struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<2H", cubin, 58))
    for n in range(count):
        flags, _, start, length = struct.unpack_from("<4Q", cubin, headers + n * size + 8)
        if flags & 4:  # machine code
            yield from (word for word, _ in struct.iter_unpack("<2Q", cubin[start : start + length]))


def check_copies(cubin):
    opcodes = {word & 0xFFF for word in instructions(cubin)}
    assert 0xFAE in opcodes  # LDGSTS, what becomes of cp.async
    assert 0xDAE not in opcodes  # of an address that is partly uniform: with a cache hint it is no valid instruction


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("label", "batch", "dtype", "tuning"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_decode_kernels_compile(label, batch, dtype, tuning, arch):
    chosen = tuning or tune(SPECS[label], 4096, 4096, batch, LIMITS)
    assert chosen is not None
    launch = launch_for(SPECS[label], 4096, 4096, batch, dtype, LIMITS, chosen)
    assert launch is not None
    assert launch.shared_bytes <= LIMITS.shared_bytes
    check_copies(compile_source(launch.source, arch))


RINGS = [Tuning(ring=2), Tuning(12, ring=2), Tuning(12, rows=1, ring=3), Tuning(8, rows=1, ring=4)]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("label", ["int-3", "nuq-2", "nuq-4", "vq-3", "vq-4", "tcq-3", "half-tcq-3.25"])
def test_rings_compile_to_valid_copies(label, batch):
    for tuning in RINGS if batch == 1 else RINGS[2:3]:
        launch = launch_for(SPECS[label], 4096, 4096, batch, torch.float16, Limits(132, 227 << 10), tuning)
        assert int(dict(launch.source.macros)["RING"]) == tuning.ring
        check_copies(compile_source(launch.source, "sm_90"))


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_a_multiprocessor_takes_as_many_blocks_as_meant_and_no_more(shared_kib, blocks):
    limits = Limits(108, shared_kib << 10)
    for label, tuning in itertools.product(("int-4", "nuq-3"), (Tuning(4, blocks=blocks), Tuning(4, resident=blocks))):
        launch = launch_for(SPECS[label], 4096, 1024, 1, torch.float16, limits, tuning)
        taken = -(-(launch.shared_bytes + 1024) // 128) * 128  # in granules, with what the system takes
        assert (shared_kib + 1) * 1024 // taken == blocks, label


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("label", ["int-6", "nuq-2", "nuq-3", "nuq-5", "vq-2", "vq-3.5", "tcq-4.5", "tcq-4.5-hyb"])
def test_dequantize_kernels_compile(label, arch):
    spec = SPECS[label]
    source, _ = dequantize_source(spec, spec.rates[0], torch.float16)
    assert compile_source(source, arch)[:4] == b"\x7fELF"


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 14336), (152064, 3584), (16, 32)])
def test_common_layers_fit_every_device(shape, shared_kib):
    for spec in parse_palette("*,tcq-?-hyb,half-tcq-*.?5-hyb", DEFAULT_STATE_BITS):
        for batch in (1, 8, 16):
            chosen = tune(spec, *shape, batch, Limits(108, shared_kib << 10))
            assert chosen is not None, (spec.label, batch)
            assert launch_for(spec, *shape, batch, torch.float16, Limits(108, shared_kib << 10), chosen) is not None
