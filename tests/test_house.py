"""The layout's promises: who imports whom, what imports without Ray, and that Hugging Face's `kernels` keeps its name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = {"kernels": 1, "actors": 2, "sweep": 3}


def _imports(file: Path):
    """(floor folder or None) of each import of ours in a file."""
    package = ("comptrust", *file.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                target = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            else:
                target = tuple((node.module or "").split("."))
            if target[0] == "comptrust":
                names = [target[1]] if len(target) > 1 and target[1] else [a.name for a in node.names]
                yield from names
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("comptrust."))


def test_no_import_runs_upward():
    seen = 0
    for folder, floor in FLOORS.items():
        for file in (ROOT / folder).rglob("*.py"):
            for name in _imports(file):
                seen += 1
                assert FLOORS.get(name, 0) <= floor, f"{file.relative_to(ROOT)} imports {name}"
    assert seen > 50


def test_imports_inside_are_relative():
    for folder in FLOORS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert (node.module or "").split(".")[0] != "comptrust", file


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def _python(code: str, *path: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=path[0] if path else "/"
    )


def test_kernels_and_compression_import_without_ray_wandb_duckdb():
    code = BLOCK.format(blocked={"ray", "wandb", "duckdb"}) + (
        "import comptrust, comptrust.kernels.formats, comptrust.kernels.matmul, comptrust.kernels.modules, comptrust.actors.compress\n"
        "try:\n    import ray\nexcept ImportError: print('blocked')\n"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked"


def test_kernels_import_with_torch_alone():
    code = BLOCK.format(blocked={"ray", "wandb", "duckdb", "transformers", "triton", "pydantic", "pyarrow"}) + (
        "import comptrust.kernels.formats, comptrust.kernels.matmul, comptrust.kernels.modules\n"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_hugging_face_kernels_is_not_shadowed(tmp_path):
    """A regular package `kernels` wins over our folder although the repository root comes first on sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("HERE = 'hugging face'\n")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.HERE)"
    )
    done = _python(code)
    assert done.stdout.strip() == "hugging face", done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names_are_lazy_and_all_there():
    code = (
        "import sys, comptrust\nassert 'torch' not in sys.modules\n"
        "print(*(n for n in comptrust.__all__ if getattr(comptrust, n, None) is None))"
    )
    done = _python(code)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def test_help_teaches_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "comptrust.sweep", "--help"], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    for verb in [
        "run",
        "plan",
        "status",
        "pareto",
        "query",
        "compare",
        "recommend",
        "claims",
        "report",
        "import",
        "rescore",
        "compress",
        "evaluate",
        "export",
        "backends",
        "compact",
        "sync",
        "doctor",
    ]:
        assert verb in done.stdout


def test_every_argument_and_option_says_what_it_is():
    from comptrust.sweep.cli import app
    from typer.main import get_command

    commands = [("", get_command(app))]
    silent = []
    for name, command in commands:
        commands += [(f"{name} {n}", c) for n, c in getattr(command, "commands", {}).items()]
        silent += [f"{name} {p.name}" for p in command.params if not getattr(p, "help", None)]
    assert len(commands) > 20 and silent == []


def test_package_lists_match_the_folders():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tops = ("actors", "sweep", "conf", "kernels")
    found = {
        ".".join(("comptrust", *p.parent.relative_to(ROOT).parts))
        for t in tops
        for p in (ROOT / t).rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert found <= listed, found - listed


def test_a_wheel_holds_all_that_runs(tmp_path):
    """Every module and every data file of the tree is in the wheel, and nothing that an earlier build left: a cluster gets nothing else."""
    import os
    import zipfile

    left = ROOT / "build" / "lib" / "comptrust" / "actors" / "deleted_since.py"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    command = ["make", "-C", str(ROOT), "wheel", f"VENV={sys.prefix}", f"DIST={tmp_path}"]
    offline = {**os.environ, "PIP_NO_BUILD_ISOLATION": "0"}  # pip reads it as: no isolation
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=offline)
    assert done.returncode == 0, done.stderr
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "actors", "sweep", "kernels", "conf"], capture_output=True, text=True, cwd=ROOT
    )
    missing = [f for f in tracked.stdout.split() if f"comptrust/{f}" not in held]
    assert not missing and "comptrust/actors/deleted_since.py" not in held
