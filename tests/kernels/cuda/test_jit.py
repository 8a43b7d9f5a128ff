"""Compiling without a GPU, and a cache that survives whatever happens to it."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from msq.kernels.cuda import compiler, cubin_cache, jit
from msq.kernels.cuda.jit import ARCHITECTURES, Source, compile_cubin, compiler_version
from msq.kernels.cuda.launcher import _in_clusters
from msq.kernels.errors import KernelError

pytest.importorskip("cuda.core", reason='kernels are compiled by cuda-core: pip install "msq[cuda]"')

HEADER = "#define FACTOR 2.0f\n"
CODE = """#include "factor.cuh"
extern "C" __global__ void scale(float* x, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) x[i] *= FACTOR + EXTRA;
}
"""


@pytest.fixture
def source(tmp_path):
    """A kernel with a header and a macro."""
    (tmp_path / "factor.cuh").write_text(HEADER)
    (tmp_path / "scale.cu").write_text(CODE)
    return Source("scale.cu", "scale", {"EXTRA": 1}, tmp_path)


@pytest.fixture
def compilations(monkeypatch):
    """What the compiler was asked for."""
    asked = []
    real = jit.compile_source
    monkeypatch.setattr(jit, "compile_source", lambda *args: asked.append(args) or real(*args))
    return asked


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_for_every_architecture_without_a_gpu(source, arch):
    assert compile_cubin(source, arch)[:4] == b"\x7fELF"
    (source.root / "plain.cu").write_text('extern "C" __global__ void plain(int* x) { *x = 1; }')
    assert compile_cubin(Source("plain.cu", "plain", root=source.root), arch)[:4] == b"\x7fELF"


def test_a_kernel_is_compiled_once_for_all_processes(source, compilations, cache, tmp_path):
    first = compile_cubin(source, "sm_90")
    assert compile_cubin(source, "sm_90") == first and len(compilations) == 1
    (stored,) = cache.iterdir()
    assert stored.suffix == ".cubin" and jit.cache_size() == (1, stored.stat().st_size)
    arguments = ("scale.cu", "scale", {"EXTRA": 1})
    code = f"""
import sys
from pathlib import Path
from msq.kernels.cuda import jit
jit.compile_source = lambda *_: sys.exit("compiled again")
print(len(jit.compile_cubin(jit.Source(*{arguments}, Path({str(tmp_path)!r})), "sm_90")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(len(first)), done.stderr


def test_whatever_decides_the_code_is_in_its_digest(source, tmp_path, monkeypatch):
    digests = [source.digest("sm_90"), source.digest("sm_80")]
    digests.append(Source("scale.cu", "scale", {"EXTRA": 2}, tmp_path).digest("sm_90"))
    digests.append(Source("scale.cu", "scale", {"EXTRA": 1, "MORE": 1}, tmp_path).digest("sm_90"))
    (tmp_path / "factor.cuh").write_text(HEADER.replace("2", "3"))
    digests.append(source.digest("sm_90"))
    (tmp_path / "scale.cu").write_text(CODE + "\n")
    digests.append(source.digest("sm_90"))
    monkeypatch.setattr(compiler, "compiler_version", lambda: "99.0")
    digests.append(source.digest("sm_90"))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_compiled_anew(source, compilations, cache, damage):
    whole = compile_cubin(source, "sm_90")
    (stored,) = cache.iterdir()
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content if damage is None else damage)
    assert compile_cubin(source, "sm_90") == whole and len(compilations) == 2
    assert compile_cubin(source, "sm_90") == whole and len(compilations) == 2


def test_processes_that_compile_at_once_leave_one_whole_file(source, cache, tmp_path):
    code = f"""
from pathlib import Path
from msq.kernels.cuda.jit import Source, compile_cubin
for _ in range(20):
    code = compile_cubin(Source("scale.cu", "scale", {{"EXTRA": 1}}, Path({str(tmp_path)!r})), "sm_90")
    for path in Path({str(cache)!r}).glob("*.cubin"):
        path.unlink(missing_ok=True)
compile_cubin(Source("scale.cu", "scale", {{"EXTRA": 1}}, Path({str(tmp_path)!r})), "sm_90")
"""
    crowd = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(3)]
    assert [process.wait() for process in crowd] == [0, 0, 0]
    assert all(path.suffix == ".cubin" for path in cache.iterdir())
    assert cubin_cache.read(source.digest("sm_90")) in (None, compile_cubin(source, "sm_90"))


def test_a_cache_that_cannot_be_written_warns_and_goes_on(source, cache):
    cache.parent.write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="MSQ_CACHE_DIR"):
        assert compile_cubin(source, "sm_90")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/msq/kernels"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/msq/kernels"),
        ("linux", {"XDG_CACHE_HOME": "{}/xdg"}, "xdg/msq/kernels"),
        ("darwin", {}, "home/Library/Caches/msq/kernels"),
        ("linux", {"MSQ_CACHE_DIR": "{}/mine"}, "mine/kernels"),
    ],
)
def test_the_cache_lies_where_the_platform_keeps_caches(tmp_path, monkeypatch, platform, variables, expected):
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("MSQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert jit.cache_directory() == tmp_path / expected


def test_an_error_shows_the_log_and_the_source_line(source, tmp_path):
    (tmp_path / "scale.cu").write_text(CODE.replace("EXTRA", "nonsense"))
    with pytest.raises(KernelError) as failure:
        compile_cubin(source, "sm_90")
    message = str(failure.value)
    assert "scale.cu:scale -DEXTRA=1 doesn't compile for sm_90" in message
    assert 'scale.cu(4): error: identifier "nonsense" is undefined' in message
    assert "x[i] *= FACTOR + nonsense;" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [('#include "gone.cuh"\n', "gone.cuh can't be read"), ("#include <cuda_fp16.h>\n", "includes <cuda_fp16.h>")],
)
def test_sources_include_only_what_lies_beside_them(source, tmp_path, text, expected):
    (tmp_path / "factor.cuh").write_text(text)
    with pytest.raises(KernelError, match=expected):
        compile_cubin(source, "sm_90")


def test_missing_packages_and_devices_are_named(source, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(KernelError, match="expected a CUDA device"):
            jit.load(source, torch.device("cuda"))
    with pytest.raises(KernelError, match="expected a CUDA device"):
        jit.load(source, torch.device("cpu"))
    compiler.cuda_core.cache_clear()
    compiler_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(KernelError, match=r"need the package cuda-core .*pip install"):
        compile_cubin(source, "sm_90")
    monkeypatch.undo()


def test_the_cost_of_a_first_use_is_logged(source, caplog, cache):
    compile_cubin(source, "sm_80")  # loads NVRTC
    with caplog.at_level(logging.INFO, logger="msq.kernels.cuda.jit"):
        begun = time.perf_counter()
        compile_cubin(source, "sm_90")
        compiled, begun = time.perf_counter() - begun, time.perf_counter()
        compile_cubin(source, "sm_90")
        cached = time.perf_counter() - begun
        logging.getLogger("msq.kernels.cuda.jit").info(
            "first use %.1f ms, cached %.2f ms", 1e3 * compiled, 1e3 * cached
        )
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("compiled scale.cu:scale -DEXTRA=1 for sm_90 in")


def test_a_grid_of_blocks_is_counted_in_clusters():
    assert _in_clusters(16, 8) == (2,) and _in_clusters((16, 3), 4) == (4, 3)
    with pytest.raises(KernelError, match="a multiple of 8 blocks; got 12"):
        _in_clusters(12, 8)
