"""Which names Megatron's training loop logs for a type of load-balancing loss: the lines that choose them, executed."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace


def logged_names(loss_type: str) -> list[str] | None:
    """In a worker. The names, or None where no training loop lies beside this Megatron-Core."""
    folder = _training_folder()
    if folder is None:
        return None
    tree = ast.parse((folder / "training.py").read_text(encoding="utf-8"))
    log = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "training_log")
    lines = [node for node in ast.walk(log) if isinstance(node, ast.If) and _appends_a_name(node)]
    lines.sort(key=lambda node: node.lineno)
    names: list[str] = []
    args = SimpleNamespace(moe_router_load_balancing_type=loss_type)
    module = ast.Module(body=list(lines), type_ignores=[])
    exec(compile(module, str(folder / "training.py"), "exec"), {"args": args, "track_names": names})
    return names


def _appends_a_name(node: ast.If) -> bool:
    return "moe_router_load_balancing_type" in ast.unparse(node.test) and "track_names" in ast.unparse(node.body[0])


def _training_folder() -> Path | None:
    """The folder of `megatron.training` beside the installed `megatron.core`; one of another release does not count."""
    core = importlib.util.find_spec("megatron.core")
    if core is None or core.origin is None:
        return None
    folder = Path(core.origin).parent.parent / "training"
    return folder if (folder / "training.py").is_file() else None
