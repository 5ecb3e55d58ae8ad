"""Makes the helpers beside the tests importable (``--import-mode=importlib`` adds no folder to ``sys.path``), and leaves tests
that need a GPU out of a run where there is none: they are deselected, not skipped, so that a skip stays a sign of something missing.
"""

import pathlib
import sys
import types

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
try:
    import comptrust  # noqa: F401
except ModuleNotFoundError:  # a bare GPU machine: the checkout is the package
    package = types.ModuleType("comptrust")
    package.__path__ = [str(pathlib.Path(__file__).parents[2])]
    sys.modules["comptrust"] = package


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
