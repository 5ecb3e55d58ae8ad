"""Answers and likelihoods from a causal language model: batched, shared prefixes computed once, the same for any batch size.

Prefill runs in packs without padding (``packing.py``); in decoding, rows that end make room for the next ones. Greedy answers
take the largest logit. Sampled answers take argmax(logit / temperature + Gumbel noise), an exact draw from the softmax
(Gumbel-max), the noise being a pure function of (seed, item, sample, step): no batch, order or device changes it, and a compressed
model meets the same noise as its dense one, which makes their comparison sharper.

In 16-bit types rounding decides many answers, and it depends on the shapes of the matrix products. So those shapes do not depend
on the batch size: packs hold so many tokens whatever it is, a decoding step computes so many rows, of which the batch fills the first,
and rows begin at slot 0 of keys and values whose number is rounded up.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import CellError
from .attention import attending, blocks, ours
from .packing import Pack, SlotCache, packs
from .protocol import Decoding

#: Below this difference of the two best scores (nats), rounding may decide: such answers are counted, not trusted to be equal.
NEAR_TIE = 1e-4
#: New tokens of a pack, and the least when memory runs out. On a CPU a larger pack loses more in attention (each token is multiplied
#: with all others of its block) than it gains in the linear layers.
PACK_TOKENS, LEAST_TOKENS = {"cpu": 256, "cuda": 4096}, 64
#: Answers decoded at once, and rows of a step in 16-bit types at least: on a GPU they wait for the weights, not for arithmetic.
BATCH = {"cpu": 32, "cuda": 128}
#: Slots of keys and values in use are a multiple of this, so that attention works on whole tiles.
TILE = 64
#: Share of a batch that must have ended before its keys and values are moved together and new rows taken in.
RENEW = 0.25
#: Memory for keys and values of a batch: bytes on a CPU, share of free memory on a GPU.
CPU_KEYS_VALUES, GPU_KEYS_VALUES = 512 * 2**20, 0.4
#: Attention that takes the slot of a key for its position (ALiBi, masks of its own): in a pack or a batch it would be wrong.
_OWN_POSITIONS = ("bloom", "gpt_neo", "mpt")
#: Models that carry a state from token to token, or compute every token anew; those with ``layer_types`` say so there.
_NO_KEYS_VALUES = ("openai-gpt", "rwkv", "xlstm")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")


class Prompt(NamedTuple):
    id: str  # keys the sampling noise
    tokens: tuple[int, ...]


class Answer(NamedTuple):
    text: str
    finish_reason: str  # "stop" (end of turn or a stop string) or "length"
    tokens: tuple[int, ...]  # without the end-of-turn token
    margin: float  # smallest difference of the two best scores at any step, nats


class Likelihood(NamedTuple):
    logprob: float  # sum over the continuation, nats
    greedy: bool  # whether every token of the continuation is the most likely one
    margin: float  # smallest distance of a continuation token's logit from its best rival; its sign says which is larger


@dataclass
class Stats:
    """What a generator did. ``reused_tokens``: prompt tokens not computed because another prompt had begun the same way."""

    prefill_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    near_ties: int = 0
    truncated: int = 0


@dataclass
class _Row:
    """One answer in the making."""

    slot: int  # where it goes in the results
    item: str
    sample: int
    cache: SlotCache
    row: int  # in ``cache``
    path: np.ndarray  # slots in ``cache`` of all its tokens but the last
    tokens: list[int] = field(default_factory=list)
    margin: float = float("inf")


def noise(seed: int, item: str, sample: int, step: int, size: int) -> np.ndarray:
    """float32 [size], uniform on (0, 1): Philox, key from SHA-256 of (seed, item, sample), counter from the step."""
    key = hashlib.sha256(f"{seed}\x1f{item}\x1f{sample}".encode()).digest()[:16]
    bits = np.random.Philox(key=np.frombuffer(key, np.uint64), counter=[0, 0, step, 0]).random_raw((size + 1) // 2)
    return (bits.view(np.uint32)[:size].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)


class Generator:
    """A model with its tokenizer, ready to answer. ``batch_size`` rows are decoded at once; it is halved when memory runs out.

    Works with any transformers model whose attention keeps keys and values; others (Mamba) are a ``CellError``.
    ``tokenizer`` may be None where only ``score`` is used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.config = model.config.get_text_config()
        self.device = model.get_input_embeddings().weight.device
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        self.batch_size, self.pack_tokens = batch_size or BATCH[kind], PACK_TOKENS[kind]
        self.least_rows = max(self.batch_size, BATCH[kind]) if model.dtype.itemsize == 2 and ours(self.config) else 0
        self.stats = Stats()
        self.limit = _context(self.config)
        self.ends = _end_tokens(model, tokenizer)
        self._layer_types = set(_setting(self.config, "layer_types") or ())
        if why := cannot_answer(self.config):
            raise CellError(why)
        windowed = self._layer_types or _setting(self.config, "sliding_window")
        windowed = windowed and _setting(self.config, "use_sliding_window", True)
        self._window = getattr(self.config, "sliding_window", None) if windowed else None
        self.progress: Callable[[int], None] = lambda done: None

    # -- answers ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Answer]:
        """``decoding.samples`` answers a prompt, prompt by prompt. Equal prompts are computed once.

        Prompts too long for the model lose their first tokens (counted in ``stats.truncated``). NaN logits are a ``CellError``.
        """
        if decoding.samples > 1 and decoding.temperature == 0:
            raise ValueError(f"{decoding.samples} samples need a temperature above 0")
        of: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            of.setdefault(self._fit(prompt.tokens, decoding.max_new_tokens), []).append(i)
        answers: list[Answer | None] = [None] * (len(prompts) * decoding.samples)

        def missing(sequence: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
            for i in of[sequence]:
                for sample in range(decoding.samples):
                    if answers[slot := i * decoding.samples + sample] is None:
                        yield slot, i, sample

        def run(batch_size: int) -> None:
            left = [s for s in of if any(missing(s))]

            def begun() -> Iterator[_Row]:
                """Rows that have their first token and want more, longest prompts of a pack first; packs run as rows are taken."""
                for sequences, cache, paths, logits_KV in self._prefill(left, [len(s) - 1 for s in left]):
                    fresh = [
                        (_Row(slot, prompts[i].id, sample, cache, 0, paths[k]), k)
                        for k, s in enumerate(sequences)
                        for slot, i, sample in missing(s)
                    ]
                    going = []
                    for start in range(0, len(fresh), batch_size):
                        part = fresh[start : start + batch_size]
                        going += self._step([r for r, _ in part], logits_KV[[k for _, k in part]], decoding, answers)
                    yield from sorted(going, key=lambda r: -len(r.path))

            self._decode(begun(), batch_size, decoding, answers)

        self._within_memory(run)
        self.stats.near_ties += sum(a.margin < NEAR_TIE for a in answers)  # type: ignore[union-attr]
        return answers  # type: ignore[return-value]

    def _fit(self, tokens: tuple[int, ...], room: int) -> tuple[int, ...]:
        if not tokens:
            raise ValueError("an empty prompt has no last position to continue from")
        if self.limit and room >= self.limit:
            raise CellError(f"an answer of {room} tokens does not fit the model's context of {self.limit}")
        if self.limit and len(tokens) + room > self.limit:
            self.stats.truncated += 1
            return tokens[room - self.limit :]
        return tokens

    def _step(self, rows: list[_Row], logits_BV: torch.Tensor, decoding: Decoding, answers: list[Answer | None]) -> list[_Row]:
        """Give each row its next token; rows that end go to ``answers``, the others are returned."""
        scores_BV = logits_BV.float()
        if decoding.temperature > 0:
            uniform = np.stack([noise(self.seed, r.item, r.sample, len(r.tokens), scores_BV.shape[-1]) for r in rows])
            # -log(-log(1 - v)) is Gumbel; log1p keeps it exact for the small v that win
            exponential_BV = torch.log1p(-torch.from_numpy(uniform).to(scores_BV.device)).neg_()
            scores_BV = scores_BV / decoding.temperature - exponential_BV.log_()
        # Equal logits are common in 16-bit types; argmax takes the first of them, as transformers does, topk any.
        best, tokens = scores_BV.topk(2, dim=-1).values.tolist(), scores_BV.argmax(-1).tolist()
        going = []
        for row, (first, second), token in zip(rows, best, tokens, strict=True):
            if first != first or first == float("inf"):
                raise CellError(f"the model's logits are {first} (item {row.item}): its weights are broken")
            row.margin = min(row.margin, first - second)
            text = None
            if token not in self.ends:
                row.tokens.append(token)
                if decoding.stop:
                    text = _cut(self._text(row.tokens), decoding.stop)
                if text is None and len(row.tokens) < decoding.max_new_tokens:
                    going.append(row)
                    continue
            reason = "stop" if token in self.ends or text is not None else "length"
            answers[row.slot] = Answer(self._text(row.tokens) if text is None else text, reason, tuple(row.tokens), row.margin)
            self.progress(1)
        return going

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode(self, begun: Iterator[_Row], batch_size: int, decoding: Decoding, answers: list[Answer | None]) -> None:
        """Continue all rows to their ends, at most ``batch_size`` at once."""
        batch: list[_Row] = []  # rows of the cache; those that ended keep theirs until the batch is renewed
        rows: list[_Row] = []  # those still going
        cache, lengths_B = SlotCache(capacity=0), torch.empty(0, device=self.device)
        next_row = next(begun, None)
        while rows or next_row:
            if len(rows) <= (1 - RENEW) * len(batch):
                while next_row and len(rows) < batch_size and self._fits([*rows, next_row], decoding):
                    rows.append(next_row)
                    next_row = next(begun, None)
                batch = list(rows)
                capacity = _tiles(max(len(r.path) for r in rows) + decoding.max_new_tokens)
                cache = SlotCache.gather([(r.cache, r.row, r.path) for r in rows], capacity)
                lengths_B = torch.tensor([len(r.path) for r in rows], device=self.device)
                for i, r in enumerate(rows):
                    r.cache, r.row = cache, i
            start = time.perf_counter()
            logits_B1V = self._run_step([r.tokens[-1] for r in batch], lengths_B, cache)
            lengths_B = lengths_B + 1
            for r in rows:
                r.path = np.arange(len(r.path) + 1)
            self.stats.decode_tokens += len(rows)
            rows = self._step(rows, logits_B1V[[r.row for r in rows], 0], decoding, answers)
            self.stats.decode_s += time.perf_counter() - start

    def _run_step(self, tokens: list[int], lengths_B: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """Logits [B', 1, V], B' >= B, of one more token of each row; copies of the first row stand behind them."""
        used = _tiles(int(lengths_B.max()) + 1)
        slots_N = torch.arange(used, device=self.device)
        padding = max(0, self.least_rows - len(tokens))
        distance_BN = lengths_B.unsqueeze(1) - slots_N
        positions_B = lengths_B.clamp(max=self.limit - 1) if self.limit else lengths_B  # rows that ended are carried beyond it
        with attending(self.config, len(tokens)):
            return self._forward(
                torch.tensor(tokens + tokens[:1] * padding, device=self.device).unsqueeze(1),
                torch.cat([positions_B, positions_B[:1].expand(padding)]).unsqueeze(1),
                (distance_BN >= 0)[:, None, None],
                distance_BN[:, None, None],
                cache.at(lengths_B, used),
                1,
            )

    def _fits(self, rows: list[_Row], decoding: Decoding) -> bool:
        """Whether the keys and values of these rows, padded to the longest, stay within the memory set aside; one row always does."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)  # in torch's own cache
            limit = GPU_KEYS_VALUES * (torch.cuda.mem_get_info(self.device)[0] + unused)
        else:
            limit = CPU_KEYS_VALUES
        slots = _tiles(max(len(r.path) for r in rows) + decoding.max_new_tokens)
        return len(rows) == 1 or len(rows) * slots * rows[-1].cache.bytes_a_slot <= limit

    # -- likelihoods --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Log-likelihood of each (context, continuation), both non-empty token ids. Shared contexts are computed once.

        A pair too long for the model loses the first tokens of its context.
        """
        of: dict[tuple[int, ...], list[int]] = {}
        targets: list[tuple[int, ...]] = []
        for i, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ValueError(f"pair {i}: context and continuation need at least one token each")
            targets.append(tuple(continuation))
            if self.limit and len(continuation) > self.limit:
                raise CellError(
                    f"a continuation of {len(continuation)} tokens does not fit the model's context of {self.limit}"
                )
            of.setdefault(self._fit((*context, *continuation[:-1]), 0), []).append(i)
        results: list[Likelihood | None] = [None] * len(pairs)

        def run(batch_size: int) -> None:
            left = [s for s, members in of.items() if results[members[0]] is None]
            first = [len(s) - max(len(targets[i]) for i in of[s]) for s in left]
            for sequences, _, _, logits_KV in self._prefill(left, first, every=True):
                start = 0
                for s in sequences:
                    width = max(len(targets[i]) for i in of[s])
                    for i in of[s]:
                        n = len(targets[i])
                        results[i] = _likelihood(logits_KV[start + width - n : start + width], targets[i])
                    start += width
                    self.progress(len(of[s]))

        self._within_memory(run)
        return results  # type: ignore[return-value]

    # -- the model ----------------------------------------------------------------------------------------------------

    def _prefill(
        self, sequences: Sequence[tuple[int, ...]], first: Sequence[int], every: bool = False
    ) -> Iterator[tuple[list[tuple[int, ...]], SlotCache, list[np.ndarray], torch.Tensor]]:
        """(sequences, cache, slots of each sequence, logits [K, V] of the last position each; ``every``: from ``first`` on)."""
        before: SlotCache | None = None
        for pack in packs(sequences, first, self.pack_tokens):
            start = time.perf_counter()
            base = len(pack.base)
            before = cache = SlotCache.extend(before, pack.base, base + pack.size)
            wanted = [s - base for i, slots, _ in pack.members for s in (slots[first[i] :] if every else slots[-1:])]
            logits_1KV = self._run_pack(pack, cache, wanted)
            self.stats.prefill_tokens += pack.size
            self.stats.reused_tokens += sum(shared for _, _, shared in pack.members)
            self.stats.prefill_s += time.perf_counter() - start
            if not cache.layers:
                raise CellError(f"{self.config.model_type} keeps no keys and values: only key-value attention is supported")
            yield [sequences[i] for i, _, _ in pack.members], cache, [slots for _, slots, _ in pack.members], logits_1KV[0]

    def _run_pack(self, pack: Pack, cache: SlotCache, wanted: list[int]) -> torch.Tensor:
        base = len(pack.base)
        positions_T = torch.tensor(pack.positions, device=self.device)
        positions_S = torch.cat([torch.arange(base, device=self.device), positions_T])
        mask_TS = pack.mask_TS()
        with attending(self.config, blocks(mask_TS, self.device)):
            return self._forward(
                torch.tensor([pack.tokens], device=self.device),
                positions_T.unsqueeze(0),
                torch.from_numpy(mask_TS).to(self.device)[None, None],
                (positions_T[:, None] - positions_S)[None, None],
                cache,
                wanted,
            )

    def _forward(
        self,
        tokens_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        seen_B1TN: torch.Tensor,
        distance_B1TN: torch.Tensor,
        cache: SlotCache,
        wanted_K: int | list[int],
    ) -> torch.Tensor:
        """Logits [B, K, V] at positions ``wanted_K``, or the last ``wanted_K``; keys and values of the tokens go to ``cache``.

        Positions are a list, not a tensor, because the last layer may lie on another device than the first.
        """

        def additive(seen: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device)
            return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)

        near = seen_B1TN & (distance_B1TN < self._window) if self._window else seen_B1TN
        if self._layer_types:
            masks: Any = {"full_attention": additive(seen_B1TN)}
            masks["sliding_attention"] = additive(near) if self._window else masks["full_attention"]
        else:
            masks = additive(near)
        return self.model(
            input_ids=tokens_BT,
            attention_mask=masks,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=wanted_K,
        ).logits

    def _within_memory(self, run: Callable[[int], None]) -> None:
        """Run with half the batch and packs half as large each time memory runs out; what is finished stays finished."""
        # Not accelerate's find_executable_batch_size itself: it collects garbage at every call, which costs more than a task.
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            try:
                return run(self.batch_size)
            except RuntimeError as e:
                smallest = self.batch_size == 1 and self.pack_tokens <= LEAST_TOKENS
                if smallest or not should_reduce_batch_size(e):
                    raise
            self.batch_size, self.pack_tokens = max(1, self.batch_size // 2), max(LEAST_TOKENS, self.pack_tokens // 2)
            clear_device_cache(garbage_collection=True)


def cannot_answer(config: Any) -> str | None:
    """Why a model of this (text) configuration cannot answer here, or None."""
    if unknown := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers of type {sorted(unknown)}: only key-value attention is supported"
    if config.model_type in _NO_KEYS_VALUES:
        return f"{config.model_type} keeps no keys and values: only key-value attention is supported"
    if getattr(config, "cross_attention_layers", None):
        return f"{config.model_type} has layers that attend to images: only key-value attention to text is supported"
    if config.model_type in _OWN_POSITIONS or getattr(config, "alibi", False):
        return f"{config.model_type} tells positions by the place of keys in memory, which this engine moves"
    return None


def _setting(config: Any, name: str, default: Any = None) -> Any:
    """What ``config`` says of ``name``, if its architecture knows that: a Llama made of a Qwen may keep Qwen's windows in its config.json,
    and transformers passes over them. Configurations of a model's own code tell not what they know: all of it counts."""
    kind = type(config)
    known = hasattr(kind, name) or name in kind.attribute_map or not kind.__module__.startswith("transformers.")
    return getattr(config, name, default) if known else default


def _context(config: Any) -> int | None:
    """Tokens that a model takes. With LongRoPE (Phi-3) only as many as it has one set of frequencies for: a longer sequence changes them
    for all of its tokens, and for those of every other sequence computed with it."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(r for r in rope.values() if isinstance(r, Mapping))]  # one for all layers, or one a type of layers
    short = [r["original_max_position_embeddings"] for r in kinds if r.get("rope_type") == "longrope"]
    return min([getattr(config, "max_position_embeddings", None), *short], key=lambda n: n or float("inf"))


def _tiles(slots: int) -> int:
    return -(-slots // TILE) * TILE


def _likelihood(logits_KV: torch.Tensor, targets: tuple[int, ...]) -> Likelihood:
    logits_KV = logits_KV.float()
    index_K1 = torch.tensor(targets, device=logits_KV.device).unsqueeze(1)
    picked_K = logits_KV.gather(1, index_K1)[:, 0]
    logprob = float((picked_K - logits_KV.logsumexp(-1)).double().sum())
    if logprob != logprob:
        raise CellError("the model's logits are NaN: its weights are broken")
    best_K2 = logits_KV.topk(2, dim=-1).values
    mine_K = logits_KV.argmax(-1) == index_K1[:, 0]  # of equal logits the first, as in answers
    margin_K = picked_K - torch.where(mine_K, best_K2[:, 1], best_K2[:, 0])
    return Likelihood(logprob, bool(mine_K.all()), float(margin_K.min()))


def _cut(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the earliest stop string, or None if none occurs."""
    found = [text.index(s) for s in stops if s in text]
    return text[: min(found)] if found else None


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: of the generation config, the tokenizer, and the end-of-turn tokens of known chat formats."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    out = set(ends if isinstance(ends, list) else [ends])
    if tokenizer is not None:
        out.add(tokenizer.eos_token_id)
        special = tokenizer.get_added_vocab()
        out |= {special[t] for t in _TURN_ENDS if t in special}
    return frozenset(t for t in out if t is not None)
