from __future__ import annotations

import torch
from comptrust.actors.compress import compress
from comptrust.actors.compress.awq import AwqConfig, loss_of, round_scaled, search_clip, search_scale, solve
from comptrust.actors.compress.base import Inputs
from comptrust.actors.compress.structure import Fold, clone, decoder_blocks, discover, share_heads
from small_models import make_llama, skewed_inputs


def problem():
    X = skewed_inputs(300, 64)
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = Inputs(["w"], [24], gram=(X.T @ X).float(), mean_abs=X.abs().mean(0).float(), fold=Fold("norm", "norm"))
    return X, W, inputs


def test_search_finds_the_scale_with_the_least_output_error():
    """Against running the layer in float64 at every point of the grid."""
    X, W, inputs = problem()
    config = AwqConfig(bits=3, group_size=16, clip=False)
    got = search_scale(W.float(), inputs, config).double()
    x = X.abs().mean(0)
    a = W.abs().view(24, 4, 16)
    w = (a / (a.amax(2, keepdim=True) + 1e-6)).view(24, 64).mean(0)
    losses = {}
    for k in range(20):
        s = (x ** (k / 20) / (w ** (1 - k / 20) + 1e-4)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        Q = round_scaled((W * s).float(), 3, 16, False)[0].view(24, 64).double() / s
        losses[k] = (float((X @ (Q - W).T).square().sum()), s)
    best = min(losses.values(), key=lambda v: v[0])
    assert torch.allclose(got, best[1], rtol=1e-4)
    plain = round_scaled(W.float(), 3, 16, False)[0].view(24, 64).double()
    assert best[0] < 0.8 * float((X @ (plain - W).T).square().sum())


def test_loss_by_half_of_a_symmetric_matrix_is_the_trace():
    generator = torch.Generator().manual_seed(0)
    for inputs in (64, 258, 576):  # whole; in blocks; in equal blocks
        X = torch.randn(700, inputs, generator=generator, dtype=torch.float64)
        D = torch.randn(30, inputs, generator=generator, dtype=torch.float64)
        loss = loss_of((X.T @ X).float())(D.float())
        torch.testing.assert_close(loss, float((D @ X.T).square().sum()), rtol=1e-5, atol=0)


def test_clipping_never_raises_a_groups_own_error():
    X, W, inputs = problem()
    config = AwqConfig(bits=3, group_size=16)
    share = search_clip(W.float(), inputs.gram, config)
    assert share.shape == (24, 4, 1) and share.min() > 0.5 and share.max() == 1
    for p in (1.0, share):
        Q = round_scaled(W.float(), 3, 16, False, p)[0].double() - W.view(24, 4, 16)
        loss = torch.stack([(X[:, g * 16 : g * 16 + 16] @ Q[:, g].T).square().sum(0) for g in range(4)], 1)
        if isinstance(p, float):
            before = loss
    assert (loss <= before * (1 + 1e-5)).all() and loss.sum() < 0.98 * before.sum()


def test_nothing_to_fold_into_means_no_scale():
    _, W, inputs = problem()
    inputs.fold = None
    assert solve(W.float(), inputs, AwqConfig(group_size=16)).input_scale is None


def test_reference_leaves_attention_output_of_shared_heads_and_ranges_alone(llama, tokens):
    done = compress(llama, "awq", {"group_size": 32, "variant": "reference"}, tokens)
    rtn = compress(llama, "rtn", {"group_size": 32, "symmetric": False})
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(done.stored[name].codes, rtn.stored[name].codes)
    assert not torch.equal(done.stored["model.layers.0.mlp.down_proj"].codes, rtn.stored["model.layers.0.mlp.down_proj"].codes)


def test_scales_are_shared_by_heads_that_read_one_value_head():
    s = share_heads(torch.tensor([1.0, 2, 4, 8, 3, 3, 3, 3]), Fold("v", "linear", repeat=2, head_dim=2))
    assert torch.allclose(s, torch.tensor([2.0, 4, 2, 4, 3, 3, 3, 3]))


def test_folding_leaves_no_scale_and_the_weights_on_their_grid(llama, tokens):
    done = compress(llama, "awq", {"bits": 4, "group_size": 32}, tokens)
    for name, stored in done.stored.items():
        assert stored.input_scale is None
        assert torch.equal(done.model.get_submodule(name).weight, stored.dequantise())
    assert not torch.equal(done.model.model.layers[0].input_layernorm.weight, llama.model.layers[0].input_layernorm.weight)
    logits, dense = done.model(tokens).logits, llama(tokens).logits
    rtn = compress(llama, "rtn", {"bits": 4, "group_size": 32, "symmetric": False}).model(tokens).logits
    assert (logits - dense).norm() < (rtn - dense).norm()


def test_gemma_stores_its_norm_minus_one_and_still_folds(tokens):
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    model = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
        )
    ).eval()
    done = compress(model, "awq", {"bits": 8, "group_size": 16}, tokens)
    assert all(s.input_scale is None for s in done.stored.values())
    assert not torch.equal(done.model.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)
    assert (done.model(tokens).logits - model(tokens).logits).norm() < 0.02 * model(tokens).logits.norm()


def test_a_norm_minus_one_is_told_from_a_plain_one_in_16_bits(tokens):
    """Weights far above 1 are nearly weights - 1; Gemma 2's norm behind each half of a block hides what is left of the difference."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "layernorm" in name:
            p.copy_((torch.randn(p.shape) * 0.8).exp() * 10 - 1)
    model = model.bfloat16()
    _, blocks = decoder_blocks(copy := clone(model))
    folds = [g.fold for g in discover(copy, blocks, tokens[:1, :8], folds=True).of(blocks[0])]
    assert [f and f.kind for f in folds] == ["norm+1", "linear", "norm+1", "linear"]


def test_biases_fold_too(tokens):
    done = compress(make_llama(layers=1, attention_bias=True), "awq", {"group_size": 32}, tokens)
    assert all(s.input_scale is None for s in done.stored.values())
