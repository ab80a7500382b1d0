"""The method stands alone: it imports nothing of the package, no model library, and torch only inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kpig_fast.method

FILES = sorted(Path(*kpig_fast.method.__path__).glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_torch_and_the_standard_library_are_imported(file):
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno} imports a neighbour relatively"
            imported.add(node.module or "")
    assert {name.split(".")[0] for name in imported} <= {*sys.stdlib_module_names, "torch"}


def test_importing_the_method_does_not_import_torch():
    modules = ", ".join(f"kpig_fast.method.{file.stem}" for file in FILES if file.stem != "__init__")
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
