"""``CompressedLinear``: same logits as dense with zeros, under ``torch.compile`` and ``state_dict`` too."""

from __future__ import annotations

import kernel_cases as ref
import pytest
import torch
from comptrust.kernels.formats import FORMATS, pack, packed_bytes
from comptrust.kernels.modules import CompressedLinear, packed_matmul, swap
from torch import nn


def linear(format: str, *, bias=True, shape=(48, 64), dtype=torch.float32):
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    W, kw = ref.weight(shape, format, dtype=dtype, group_size=16)
    layer.weight.data = W
    return layer, kw


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_same_as_dense(format, bias):
    layer, kw = linear(format, bias=bias)
    packed = CompressedLinear(pack(layer.weight, format, **kw), layer.bias)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert packed(x[:0]).shape == (0, 3, 48)
    assert packed.kernel(1) == "torch"
    stored = sum(t.numel() * t.element_size() for n, t in packed.named_buffers() if n != "bias")
    assert stored == packed_bytes(packed.packed)
    assert not list(packed.parameters())


def test_torch_compile_without_a_graph_break():
    layer, kw = linear("2:4+int4")
    model = nn.Sequential(CompressedLinear(pack(layer.weight, "2:4+int4", **kw), layer.bias), nn.ReLU())
    x = torch.randn(4, 64)
    want = nn.functional.relu(layer(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(x[:2]), want[:2], rtol=1e-5, atol=1e-5)


def test_custom_op_is_sound():
    """torch's own checks: schema, fake against real, dynamic shapes."""
    layer, kw = linear("2:4")
    m = CompressedLinear(pack(layer.weight, "2:4", **kw), layer.bias)
    tensors = [getattr(m, name) for name in m.names]
    args = (torch.randn(2, 3, 64), tensors, ",".join(m.names), "2:4", "rows", 48, 0, "auto")
    torch.library.opcheck(packed_matmul, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_state_dict_round_trip():
    layer, kw = linear("int4")
    m = CompressedLinear(pack(layer.weight, "int4", **kw), layer.bias)
    other, other_kw = linear("int4")
    n = CompressedLinear(pack(other.weight, "int4", **other_kw), other.bias)
    n.load_state_dict(m.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(m(x), n(x))


def test_dtype_conversion_is_refused():
    layer, kw = linear("2:4")
    m = CompressedLinear(pack(layer.weight, "2:4", **kw), layer.bias)
    with pytest.raises(ValueError, match="keeps its dtype"):
        m.half()


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("x", [torch.zeros(2, 60), torch.zeros(2, 68), torch.zeros(2, 64).half()])
def test_x_of_another_width_or_dtype_is_refused(format, x):
    layer, kw = linear(format)
    m = CompressedLinear(pack(layer.weight, format, **kw), layer.bias)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\] torch.float32, got \(2, "):
        m(x)


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("format", ["2:4", "8:16", "bitmap"])
def test_swapped_model_gives_the_logits_of_the_masked_one(format):
    model = tiny_llama()
    tokens = torch.randint(0, 97, (2, 9))
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            mask = ref.pattern_mask(tuple(module.weight.shape), format, len(packed))
            module.weight.data = torch.where(mask, module.weight.data, 0.0)
            packed[name] = pack(module.weight, format)
    with torch.no_grad():
        want = model(tokens).logits
        assert set(swap(model, packed).values()) == {"dense"}  # auto: nothing is measured on a CPU
        assert torch.equal(model(tokens).logits, want)
        assert swap(model, packed, backend="torch") == dict.fromkeys(packed, "torch")
        assert sum(isinstance(m, CompressedLinear) for m in model.modules()) == 14
        torch.testing.assert_close(model(tokens).logits, want, rtol=1e-5, atol=1e-5)
        out = model.generate(tokens[:1], max_new_tokens=3, do_sample=False)
    assert out.shape[1] == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, p: swap(m, {"nowhere": p}), "'nowhere' is no module"),
        (lambda m, p: swap(m, {"1": p}), "'1' is ReLU, not an nn.Linear"),
        (lambda m, p: swap(m, {"2": p}), r"2: the packed weight is \(48, 64\) torch.float32, the layer \(8, 48\)"),
        (lambda m, p: swap(m, {"0": p}, backend="triton"), "cannot run here"),
        (lambda m, p: CompressedLinear(p, backend="sp24_mma"), "needs float16 or bfloat16"),
        (lambda m, p: CompressedLinear(p, backend="cuda"), "unknown backend 'cuda'"),
    ],
)
def test_bad_input(change, message):
    layer, _ = linear("2:4")
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(48, 8))
    with pytest.raises(ValueError, match=message):
        change(model, pack(layer.weight, "2:4"))
    assert isinstance(model[0], nn.Linear)  # a refused swap changes nothing
