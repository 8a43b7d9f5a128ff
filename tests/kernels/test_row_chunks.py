"""Quantizing a weight in row chunks gives the whole weight's bits."""

from __future__ import annotations

import pytest
import torch
from msq.kernels import row_chunks as row_chunks_module
from msq.kernels.errors import QuantizerError
from msq.kernels.hessian import Hessian
from msq.kernels.quantize import normalized_error, quantize
from msq.kernels.row_chunks import join_errors, join_rows, row_chunks
from msq.kernels.specs import Family, QuantizerSpec

SPECS = (
    QuantizerSpec(Family.INT, 3),
    QuantizerSpec(Family.NUQ, 2),
    QuantizerSpec(Family.VQ, 1.5),
    QuantizerSpec(Family.TCQ, 2, 8),
    QuantizerSpec(Family.HALF_TCQ, 2.25, 8),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("aware", [False, True])
def test_chunks_join_to_the_whole(spec, aware, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 48, generator=generator)
    inputs = torch.randn(200, 48, generator=generator) * torch.linspace(0.5, 2, 48)
    hessian = Hessian(inputs.T @ inputs, 5) if aware else None
    whole = quantize(weight, spec, rotation_seed=5, hessian=hessian)
    monkeypatch.setitem(row_chunks_module._CHUNK_WEIGHTS, "cpu", 48 * 32)
    chunks = row_chunks(70, 48, "cpu")
    assert len(chunks) > 1
    parts = [quantize(weight[rows], spec, rotation_seed=5, hessian=hessian) for rows in chunks]
    joined = join_rows(parts)
    for (name, one), (other_name, other) in zip(whole.tensors(), joined.tensors(), strict=True):
        assert name == other_name and torch.equal(one, other)
    errors = [normalized_error(weight[rows], part, hessian) for rows, part in zip(chunks, parts, strict=True)]
    powers = [float(weight[rows].double().square().sum()) for rows in chunks]
    assert join_errors(errors, powers) == pytest.approx(normalized_error(weight, whole, hessian), rel=1e-9)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 64, 100, 1000])
@pytest.mark.parametrize("columns", [16, 500, 4096])
def test_chunks_are_whole_tiles_that_cover_all_rows(rows, columns, monkeypatch):
    monkeypatch.setitem(row_chunks_module._CHUNK_WEIGHTS, "cuda", 1 << 14)
    chunks = row_chunks(rows, columns, "cuda")
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    assert all(chunk.start % 16 == 0 for chunk in chunks)
    assert all((chunk.stop - chunk.start) * columns <= max(2 << 14, 16 * columns) for chunk in chunks)


def test_chunks_of_different_layers_are_refused():
    weight = torch.randn(16, 32)
    parts = [quantize(weight, spec, rotation_seed=1) for spec in SPECS[:2]]
    with pytest.raises(QuantizerError, match="row chunks of one layer"):
        join_rows(parts)


def test_an_all_zero_layer_has_no_error():
    assert join_errors([0.0, 0.0], [0.0, 0.0]) == 0.0
