"""Makes the helpers beside the tests importable: ``--import-mode=importlib`` adds no folder to ``sys.path``."""

import pathlib
import sys
import types

sys.path.insert(0, str(pathlib.Path(__file__).parent))
try:
    import comptrust  # noqa: F401
except ModuleNotFoundError:  # a bare GPU machine: the checkout is the package
    package = types.ModuleType("comptrust")
    package.__path__ = [str(pathlib.Path(__file__).parents[2])]
    sys.modules["comptrust"] = package
