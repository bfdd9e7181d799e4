"""Each floor imports only from floors below it (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import lorakit

PACKAGE = Path(lorakit.__file__).parent
FLOORS = {
    "errors": 0,
    "adapters": 1,
    "base": 2, "store": 2,
    "data": 3, "recipes": 3,
    "training": 4, "inference": 4, "merging": 4,
    "planning": 5, "proving": 5, "serving": 5,
    "cli": 6, "web": 6,
}  # fmt: skip
STRANGERS = {4, 5}  # floors whose folders do not know one another
MAY_IMPORT = {
    "adapters": {"torch"},
    "base": {"torch", "transformers", "huggingface_hub"},
    "store": {"torch", "safetensors"},
}
STANDARD = set(__import__("sys").stdlib_module_names)


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_imports_run_downwards() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "lorakit" or len(parts) < 2 or parts[1] == "__version__":
                continue
            other = parts[1]
            assert other in FLOORS, f"{path}: lorakit.{other} has no floor"
            up = FLOORS[other] > FLOORS[own]
            across = other != own and FLOORS[other] == FLOORS[own] and FLOORS[own] in STRANGERS
            if up or across:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_low_floors_know_only_their_libraries() -> None:
    wrong = []
    for folder, allowed in MAY_IMPORT.items():
        for path in (PACKAGE / folder).rglob("*.py"):
            for name in imports(path):
                top = name.split(".")[0]
                if top not in STANDARD | allowed | {"lorakit"}:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_files_have_one_reason_to_change() -> None:
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long
