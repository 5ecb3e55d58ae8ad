"""comptrust: which compressed version of an LLM is safe to deploy.

Public names load on first use (PEP 562), so that ``comptrust.kernels`` and the compression engine import with torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "run_sweep": "sweep.launch",
    "load_results": "sweep.results",
    "pareto": "sweep.frontier",
    "compress": "actors.api",
    "evaluate": "actors.api",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
