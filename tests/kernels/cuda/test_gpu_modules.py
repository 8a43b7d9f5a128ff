"""Modules and operators on a device: tracing, CUDA graphs, streams, several GPUs; run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from msq.kernels.cuda import hadamard, jit
from msq.kernels.cuda.linear import KernelLinear, separate_workspace
from msq.kernels.cuda.rotation_plan import rotation_tables
from msq.kernels.errors import KernelError, QuantizerError
from msq.kernels.linear import IMPLEMENTATIONS, FusedLinear
from msq.kernels.quantize import dequantize, quantize
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from torch.library import opcheck

pytestmark = pytest.mark.gpu
SPECS = [
    QuantizerSpec(Family.INT, 4),
    QuantizerSpec(Family.NUQ, 3),
    QuantizerSpec(Family.TCQ, 2.5, 12),
    QuantizerSpec(Family.TCQ, 2.5, 12, code=TrellisCode.HYB),
    QuantizerSpec(Family.HALF_TCQ, 2.75, 12),
]
ROWS, COLUMNS = (64, 48, 80), 768


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.label)
def weights(request):
    """Three quantized layers of one input, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, COLUMNS, generator=generator) for rows in ROWS]
    return [quantize(weight, request.param, rotation_seed=9) for weight in made]


def error(found, x, weight, bias=None):
    expected = x.double() @ dequantize(weight).double().to(x.device).T
    expected = expected if bias is None else expected + bias.double()
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5, 16, 17, 300])
def test_a_layer_is_its_dequantized_weight(weights, dtype, batch):
    bias = torch.randn(ROWS[0], device="cuda")
    module = KernelLinear(weights[0], bias.cpu()).cuda()
    x = torch.randn(batch, COLUMNS, device="cuda").to(dtype)
    found = module(x)
    assert found.dtype == dtype
    assert error(found, x, weights[0], bias) < (2e-3 if dtype is torch.float16 else 8e-3)
    assert torch.equal(module(x.view(1, batch, COLUMNS))[0], found)


def test_fused_layers_hand_out_their_rows(weights):
    fused = FusedLinear(weights, [None] * 3, IMPLEMENTATIONS["tensor_core"]).cuda()
    x = torch.randn(2, COLUMNS, device="cuda").half()
    for weight, part in zip(weights, fused.slices(), strict=True):
        assert error(part(x), x, weight) < 2e-3


def test_other_dtypes_are_refused(weights):
    with pytest.raises((KernelError, QuantizerError), match=r"float32"):
        KernelLinear(weights[0]).cuda()(torch.ones(1, COLUMNS, device="cuda"))


def test_a_graph_replays_what_was_captured(weights):
    model = torch.nn.Sequential(*(KernelLinear(w) for w in weights[:1]), torch.nn.SiLU()).cuda()
    x = torch.randn(2, COLUMNS, device="cuda").half()
    model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        expected = model(x)
        for _ in range(20):
            graph.replay()
        assert torch.equal(y, expected)


def test_loading_during_capture_is_refused_with_the_remedy():
    x, tables = torch.randn(1, 832, device="cuda").half(), rotation_tables(832, 0, torch.device("cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(KernelError, match="run the module once before"), torch.cuda.graph(graph):
        hadamard.rotate(x, tables)
    hadamard.rotate(x, tables)  # and works afterwards


def test_operators_keep_torchs_rules_here_too(weights):
    module = KernelLinear(weights[0]).cuda()
    x = torch.randn(3, COLUMNS, device="cuda").half()
    tables = rotation_tables(COLUMNS, 9, x.device)
    signs, matrices = tables.signs, list(tables.matrices)
    opcheck(torch.ops.msq.rotate.default, (x, signs, matrices))
    opcheck(torch.ops.msq.rotate_normed.default, (x, x[0].clone(), 1e-5, signs, matrices))
    opcheck(torch.ops.msq.rotate_gated.default, (x, x.flip(0), signs, matrices))
    spec = module.spec
    units = [module.get_buffer(name) for name in module._unit_names]
    fields = (str(spec.family), spec.bits, spec.state_bits)
    opcheck(torch.ops.msq.multiply.default, (x, units, module.scales, module.codebook, None, module.workspace, *fields))
    opcheck(torch.ops.msq.dequantize.default, (units, module.scales, module.codebook, COLUMNS, torch.float16, *fields))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_model_is_compiled_whole(weights, mode):
    model = torch.nn.Sequential(KernelLinear(weights[0]), torch.nn.SiLU(), torch.nn.Linear(64, 8).half()).cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(2, COLUMNS, device="cuda").half()
            found, expected = compiled(x).clone(), model(x)  # a sum may be small, its terms' rounding isn't
            assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_work_goes_to_the_current_stream(weights):
    model = torch.nn.Sequential(KernelLinear(weights[0])).cuda()
    separate_workspace(model)
    x = torch.randn(1, COLUMNS, device="cuda").half()
    expected = model(x)
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the input arrives late on this stream: a launch on another one reads zeros
        late.copy_(x)
        found = model(late)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_work_goes_to_the_device_of_its_arguments(weights):
    x = torch.randn(2, COLUMNS).half()
    first, second = (KernelLinear(weights[0]).to(f"cuda:{index}") for index in (0, 1))
    assert torch.cuda.current_device() == 0
    assert torch.equal(second(x.to("cuda:1")).cpu(), first(x.to("cuda:0")).cpu())
    assert torch.cuda.current_device() == 0


def test_launch_errors_are_named():
    kernel = jit.load(hadamard.sources(64, False, torch.float16)[0], torch.device("cuda"))
    with pytest.raises(KernelError, match="takes 12 arguments; got 1"):
        kernel.launch(1, 32, (None,))
    with pytest.raises(KernelError, match="bytes of shared memory"):
        kernel.launch(1, 32, (None,) * 12, shared_bytes=1 << 20)
