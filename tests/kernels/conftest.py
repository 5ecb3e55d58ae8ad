"""Makes ``kernel_cases`` importable: pytest runs with ``--import-mode=importlib``, which adds no folder to ``sys.path``."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
