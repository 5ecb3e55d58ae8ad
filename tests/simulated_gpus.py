"""GPUs without a GPU: tensors whose numbers lie on the CPU, which say that they are on ``cuda:N`` and refuse to meet others as CUDA's do.

``simulated_gpus()`` makes every ``.to("cuda:N")`` and ``device="cuda:N"`` such a tensor. ``put_on`` moves a model there whole, ``spread``
over two of them with accelerate's hooks, as ``device_map="auto"`` does. torch.inference_mode, which does not go with it, is torch.no_grad.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten._to_copy.default)
_INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default)
_make_tensor, _attention = torch.tensor, torch.nn.functional.scaled_dot_product_attention


def _device(d: torch.device | str) -> torch.device:
    d = torch.device(d)
    return torch.device("cuda", d.index or 0) if d.type == "cuda" else d


class _Moved(torch.autograd.Function):
    """torch's own gradient of a copy would stay where it is: it knows nothing of ``OnGpu.device``."""

    @staticmethod
    def forward(ctx, x, args, kwargs):
        ctx.before = {"device": x.device, "dtype": x.dtype}
        return torch.Tensor.to(x, *args, **kwargs)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(**ctx.before), None, None


class OnGpu(torch.Tensor):
    """``inner``, said to be on ``device``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: self._device)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device | str):
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like, device="meta", requires_grad=False)
        out.inner, out._device = inner, _device(device)
        return out

    def __init__(self, *_) -> None:
        pass

    def __getitem__(self, key):
        on_device = lambda k: OnGpu(_make_tensor(k), self.device) if isinstance(k, list) else k
        return super().__getitem__(tuple(map(on_device, key)) if isinstance(key, tuple) else on_device(key))

    def __deepcopy__(self, memo):
        return memo.get(id(self)) if id(self) in memo else OnGpu(self.inner.clone(), self.device)

    def __repr__(self) -> str:
        return f"OnGpu({self.inner}, {self.device})"

    def to(self, *args, **kwargs):
        return _Moved.apply(self, args, kwargs) if self.requires_grad else super().to(*args, **kwargs)

    def tolist(self):
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _where(func, args, kwargs) -> torch.device:
    """Where the result lies. RuntimeError if CUDA would refuse the arguments."""
    if kwargs.get("device") is not None:
        return _device(kwargs["device"])
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if func in _COPIES:
        return args[0].device
    if func in _INDEXING:
        here, cpu = args[0].device, torch.device("cpu")
        if any(t.device not in (here, cpu) for t in tensors):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({here})")
        return here
    devices = {t.device for t in tensors if t.ndim or t.device.type == "cuda"}  # numbers on the CPU go with any
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, found {devices} in {func}")
    return devices.pop() if devices else torch.device("cpu")


def _run(func, args, kwargs):
    device, known = _where(func, args, kwargs), {}

    def inner(x):
        if not isinstance(x, OnGpu):
            return x
        known[id(x.inner)] = x
        return x.inner

    if func is aten._to_copy.default and (device, kwargs.get("dtype", args[0].dtype)) == (args[0].device, args[0].dtype):
        return args[0]  # torch takes it for a tensor on the meta device, which would have to be copied
    out = func(
        *tree_map(inner, args), **{**tree_map(inner, kwargs), **({"device": "cpu"} if kwargs.get("device") is not None else {})}
    )
    if device.type != "cuda":
        return out
    named = lambda x: known[id(x)] if id(x) in known else OnGpu(x, device)
    return tree_map(lambda x: named(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) else x, out)


def _without_gradients(mode: torch.inference_mode) -> None:
    mode.instead = torch.no_grad()
    mode.instead.__enter__()


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _tensor(data, *, device=None, **kwargs):
    out = _make_tensor(data, **kwargs)
    return out if device is None else out.to(device)


def _attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """By its definition: torch's own has an implementation for every device and asks which."""
    if not isinstance(q, OnGpu):
        return _attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ v


def _parameter(p: torch.Tensor, device: torch.device | str) -> torch.nn.Parameter:
    return torch.nn.Parameter(OnGpu(p.detach().clone(), device), requires_grad=False)


@contextmanager
def simulated_gpus(memory: int = 80 * 2**30, count: int = 1) -> Iterator[None]:
    """Inside, there are ``count`` GPUs with ``memory`` bytes each, too old for our kernels."""
    from accelerate import hooks
    from comptrust.actors.compress import structure

    moved_back = lambda p, home: torch.nn.Parameter(p.detach().to(home), requires_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=memory))
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (memory, memory))
        patch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda _: "simulated")
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1)
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.inference_mode, "__enter__", _without_gradients)
        patch.setattr(torch.inference_mode, "__exit__", lambda mode, *error: mode.instead.__exit__(*error))
        patch.setattr(torch, "tensor", _tensor)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attend)
        patch.setattr(structure, "_moved_back", moved_back)  # a parameter's type is ours here, not nn.Parameter
        patch.setattr(hooks.AlignDevicesHook, "init_hook", lambda self, module: module)  # `put_on` has moved it
        with _Everywhere():
            yield


def put_on(model: torch.nn.Module, place=lambda name: "cuda:0") -> torch.nn.Module:
    """``model`` with each parameter and buffer where ``place(name)`` says; tied ones stay tied."""
    done: dict[int, torch.nn.Parameter] = {}
    for owner, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = done.setdefault(id(p), _parameter(p, place(f"{owner}.{name}")))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = OnGpu(b.clone(), place(f"{owner}.{name}"))
    return model


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """A model of Llama's build over ``cuda:0`` and ``cuda:1``, the lower half of its blocks on the first. Under `simulated_gpus`."""
    from accelerate import hooks

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    half = len(model.model.layers) // 2
    tied = model.config.tie_word_embeddings
    where = {f"model.layers.{i}": first if i < half else second for i in range(2 * half)}
    where |= {
        "model.embed_tokens": first,
        "model.norm": second,
        "model.rotary_emb": second,
        "lm_head": first if tied else second,
    }
    put_on(model, lambda name: next(d for prefix, d in where.items() if name.startswith(f"{prefix}.")))
    hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device={**where, "": first},
        offload=dict.fromkeys(where, False),
        skip_keys=model._skip_keys_device_placement,
    )
    model.hf_device_map = where
    return model
