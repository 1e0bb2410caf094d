"""The structure of the package: who imports whom, and where Megatron and the collectives are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_global_lbl"
# Each folder with the folders that it may import; "top" is every module of the package itself but the settings.
FOLDERS = {
    "settings": set(),
    "core": {"settings"},
    "metrics": {"settings", "core"},
    "hook": {"settings", "core"},
    "specialise": {"settings", "core", "metrics", "hook", "top"},
    "report": {"metrics", "specialise"},
    "command": {"settings", "hook", "top", "metrics", "report", "specialise"},
    "top": {"settings", "core", "metrics", "hook"},
    "frameworks": {"settings", "hook", "top"},
}
COLLECTIVES = {
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single", "barrier"),
    *(
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "new_group",
        "recv",
        "reduce",
        "reduce_scatter",
        "scatter",
    ),
    *("reduce_scatter_tensor", "scatter_object_list", "send"),
}


def modules() -> dict[str, ast.Module]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert len(files) > 30
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text()) for file in files}


def folder_of(module: str) -> str:
    parts = module.split(".")[1:]
    return parts[0] if parts and parts[0] in FOLDERS else "top"


def imported(tree: ast.Module, known: set[str], *, for_types: bool = False) -> set[str]:
    """Modules that are imported anywhere in a file, in functions too; those only for type checkers on demand."""
    only_for_types = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if node in only_for_types and not for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
    return found


def test_no_arrow_upwards():
    trees = modules()
    for module, tree in trees.items():
        used = {folder_of(name) for name in imported(tree, set(trees), for_types=True) if name.split(".")[0] == PACKAGE}
        assert used <= {folder_of(module)} | FOLDERS[folder_of(module)], f"{module} imports from {used}"


def test_no_circle():
    trees = modules()
    arrows = {module: imported(tree, set(trees)) & set(trees) for module, tree in trees.items()}
    while arrows:
        leaves = {module for module, targets in arrows.items() if not targets & set(arrows)}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {module: targets for module, targets in arrows.items() if module not in leaves}


def test_only_the_hook_and_the_commands_know_megatron():
    trees = modules()
    knows = {
        module
        for module, tree in trees.items()
        if any(name.split(".")[0] == "megatron" for name in imported(tree, set(trees), for_types=True))
    }
    assert {folder_of(module) for module in knows} == {"hook", "frameworks"}, knows
    # A framework's module knows that framework; Megatron-Core is the hook's.
    for module in knows:
        names = {name for name in imported(trees[module], set(trees), for_types=True) if name.split(".")[0] == "megatron"}
        assert folder_of(module) == "hook" or all(name.startswith(f"megatron.{module.split('.')[-1]}.") for name in names), (
            module
        )


def test_a_folders_docstring_names_its_files():
    for name in ("core", "hook"):
        folder = ROOT / PACKAGE / name
        listed = re.findall(r"^(\w+)  ", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), re.MULTILINE)
        there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
        assert sorted(listed) == sorted(there - {"__init__"})


def test_one_place_issues_collectives():
    found = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in COLLECTIVES
        if ast.unparse(node.func.value) in ("dist", "torch.distributed")
    }
    assert found == {f"{PACKAGE}.core.collective"}


def test_cpu_mode_does_not_need_the_plugin():
    for file in (ROOT / "megatron_cpu").rglob("*.py"):
        assert PACKAGE not in {name.split(".")[0] for name in imported(ast.parse(file.read_text()), set())}, file
