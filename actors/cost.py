"""What a cell costs: memory at its peak, prefill and decode speed, the machine it ran on."""

from __future__ import annotations

import contextlib
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PREFILL_TOKENS = 128
DECODE_TOKENS = 16


class PeakMemory:
    """Peak bytes between ``start`` and ``read``: allocated memory on the visible GPUs (each at its own peak), resident
    set of this process on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def start(self) -> None:
        if self.device.startswith("cuda"):
            for gpu in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(gpu)
        else:
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
                f.write("5")  # Linux: reset the high-water mark VmHWM

    def read(self) -> int:
        if self.device.startswith("cuda"):
            return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s+(\d+) kB", f.read()).group(1)) * 1024


@torch.inference_mode()
def speed(model: Any) -> tuple[float, float]:
    """(prefill tokens/s, decode tokens/s) of one sequence: best of two passes each, KV cache on, greedy, batch 1."""
    from transformers import DynamicCache

    from .compress.experts import joined

    device = next(model.parameters()).device
    vocab = model.config.get_text_config().vocab_size
    ids = (torch.arange(PREFILL_TOKENS, device=device) * 7919 % vocab).unsqueeze(0)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    best_prefill = best_decode = 0.0
    with joined(model):
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            start = clock()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            best_prefill = max(best_prefill, PREFILL_TOKENS / (clock() - start))
            token = out.logits[:, -1:].argmax(-1)
            start = clock()
            for _ in range(DECODE_TOKENS):
                token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            best_decode = max(best_decode, DECODE_TOKENS / (clock() - start))
    return best_prefill, best_decode


def device_name(device: str) -> str:
    """``NVIDIA H100 80GB HBM3``, or the CPU's model name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        if match := re.search(r"model name\s*:\s*(.+)", f.read()):
            return f"{match.group(1)} ({torch.get_num_threads()} threads)"
    return platform.machine()


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    out = {"python": platform.python_version()}
    for name in ("comptrust", "torch", "transformers", "bitsandbytes", "triton", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            out[name] = version(name)
    if torch.version.cuda:
        out["cuda"] = torch.version.cuda
    return out
