"""Makes the helpers beside the tests importable (``--import-mode=importlib`` adds no folder to ``sys.path``), and leaves tests
that need a GPU out of a run where there is none: they are deselected, not skipped, so that a skip stays a sign of something missing.
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]
