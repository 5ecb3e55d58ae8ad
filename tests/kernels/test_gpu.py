"""On a GPU: every kernel at real shapes against float64, the one-tile probe of ``mma.sp``, repeatability, modules, compile."""

from __future__ import annotations

import kernel_cases as ref
import pytest
import torch
from comptrust.kernels.dispatch import KERNELS, reachable, unreachable
from comptrust.kernels.formats import pack
from comptrust.kernels.layouts import arrange
from comptrust.kernels.matmul import matmul
from comptrust.kernels.modules import CompressedLinear, swap
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PAIRS = [(k.name, f) for k in KERNELS.values() for f in k.formats]


def on_gpu(shape, format, dtype, **kw):
    W, args = ref.weight(shape, format, dtype=dtype, group_size=128, **kw)
    return W, pack(W.cuda(), format, **{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in args.items()})


def test_one_tile_of_mma_sp():
    """All 512 positions of a 16 x 32 tile, one at a time: fragment map and order of the index words as the hardware reads them."""
    x = torch.tensor([(k + 1.0) * (-1) ** k for k in range(32)]).half().cuda()[None]
    wrong = []
    for n in range(16):
        for k in range(32):
            W = torch.zeros(16, 32).half().cuda()
            W[n, k] = 1
            y = matmul(x, pack(W, "2:4"), "sp24_mma")
            if y[0, n] != x[0, k] or y.count_nonzero() != 1:
                wrong.append((n, k))
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "format"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (3, 1000, 1376), (16, 5120, 2048), (64, 333, 4096), (100, 256, 512)])
def test_against_float64(kernel, format, dtype, shape):
    T, O, I = shape
    if KERNELS[kernel].tokens < T:
        pytest.skip(f"{kernel} takes up to {KERNELS[kernel].tokens} tokens")
    W, packed = on_gpu((O, I), format, dtype)
    if reason := unreachable(KERNELS[kernel], packed, T, torch.device("cuda")):
        pytest.skip(reason)  # a width the library does not take
    x = torch.randn(T, I).to(dtype)
    y = matmul(x.cuda(), packed, kernel)
    assert ref.error(y, x, W) < ref.BOUND[str(dtype)]


@pytest.mark.parametrize(("kernel", "format"), PAIRS)
def test_probes_and_repeats(kernel, format):
    for W, x, want in ref.probes(128, 8):
        if kernel == "cusparselt":  # takes whole multiples of 16 rows only
            W, want = W[:128], want[:, :128]
        scale = {k: v.cuda() for k, v in ref.identity_scale(W.shape[0], format).items()}
        assert torch.equal(matmul(x.cuda(), pack(W.cuda(), format, **scale), kernel).cpu(), want)
    _, packed = on_gpu((512, 4096), format, torch.bfloat16)
    if reason := unreachable(KERNELS[kernel], packed, 1, torch.device("cuda")):
        pytest.skip(reason)
    packed = arrange(packed, KERNELS[kernel].layout)
    x = torch.randn(min(4, KERNELS[kernel].tokens), 4096).bfloat16().cuda()
    first = matmul(x, packed, kernel)
    for _ in range(10):
        assert torch.equal(matmul(x, packed, kernel), first)


@pytest.mark.parametrize("format", ["2:4", "8:16", "bitmap", "int4", "2:4+int4"])
def test_module_logits_and_compile(format):
    W, kw = ref.weight((512, 1024), format, dtype=torch.bfloat16, group_size=128)
    layer = nn.Linear(1024, 512, dtype=torch.bfloat16).cuda()
    layer.weight.data = W.cuda()
    kw = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    packed = pack(layer.weight, format, **kw)
    x = torch.randn(2, 2, 1024).bfloat16().cuda()
    want = layer(x)
    model = nn.Sequential(layer)
    assert swap(model, {"0": packed}, backend="triton") == {"0": reachable(packed, 1, x.device)[0].name}
    assert isinstance(model[0], CompressedLinear)
    torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-2 * float(want.abs().mean()))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
