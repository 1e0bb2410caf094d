"""`register` and its undo on the installed Megatron-Core; each case in a process of its own, as a user's script is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_global_lbl.hook.versions import SUPPORTED

SYMBOLS = """
import importlib
router = importlib.import_module("megatron.core.transformer.moe.router")
finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
ddp = importlib.import_module("megatron.core.distributed.distributed_data_parallel")
random = importlib.import_module("megatron.core.tensor_parallel.random")
def symbols():
    classes = router.TopKRouter, ddp.DistributedDataParallel, random.CheckpointFunction
    methods = {f"{cls.__name__}.{name}": value for cls in classes for name, value in vars(cls).items()}
    return {**vars(router), **vars(finalize), **methods}
before = symbols()
"""


def python(code: str, path: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def test_register_remove_and_context_manager():
    result = python(
        SYMBOLS
        + """
import pytest
import megatron_global_lbl as lbl
assert symbols() == before, "importing patches nothing"
handle = lbl.register(scope="global")
assert len(handle.hooked) == 15 and symbols() != before
assert lbl.register(scope="global") is handle, "the same settings twice are fine"
with pytest.raises(lbl.ConfigError, match="registered already with other settings"):
    lbl.register(scope="dp")
with lbl.registered(scope="global") as inner:
    assert inner is handle
assert symbols() != before, "the context manager must not undo what was there before it"
handle.remove()
handle.remove()
assert symbols() == before, "every symbol is the original again"
with pytest.raises(RuntimeError, match="inside"):
    with lbl.registered(scope="global"):
        assert symbols() != before
        raise RuntimeError("inside")
assert symbols() == before
with pytest.raises(lbl.ConfigError, match="--moe-lbl-metrics-dir /dev/null/balance: Not a directory; give every training"):
    lbl.register(scope="global", metrics_dir="/dev/null/balance")
assert symbols() == before, "refused before anything is replaced"
assert lbl.register(scope="micro").hooked == [] and symbols() == before
print("all held")
"""
    )
    assert result.stdout.endswith("all held\n"), result.stderr


def test_a_training_loop_that_is_imported_later():
    """`register` first, then `from megatron.training import pretrain`: the same places in the end, and none after the undo."""
    result = python(
        """
import sys
import megatron_global_lbl as lbl
def waiting():
    return [finder for finder in sys.meta_path if type(finder).__module__ == "megatron_global_lbl.hook.imports"]
arguments = {"scope": "global", "metrics": "brief"}
lbl.register(**arguments).remove()
assert not waiting()
handle = lbl.register(**arguments)
before = set(handle.hooked)
assert len(waiting()) == 1 and not any(path.startswith("megatron.training.") for path in before)
import megatron.training
from megatron.training import training
late = set(handle.hooked)
assert not waiting() and training.__loader__ is training.__spec__.loader
assert type(training.__loader__) is type(megatron.training.__loader__)
assert handle._metrics.is_in_log
handle.remove()
assert training.training_log.__module__ == "megatron.training.training" and not hasattr(training.training_log, "__wrapped__")
handle = lbl.register(**arguments)
assert set(handle.hooked) == late and len(late - before) == 1, late - before
print("all held")
"""
    )
    assert result.stdout.endswith("all held\n"), result.stderr


def test_remove_leaves_to_others_what_they_replaced_since():
    result = python(
        SYMBOLS
        + """
import pytest
import megatron_global_lbl as lbl
handle = lbl.register(scope="global")
router.TopKRouter.routing = theirs = lambda self: None
with pytest.raises(RuntimeError, match="TopKRouter.routing"):
    handle.remove()
assert router.TopKRouter.routing is theirs
assert symbols()["topk_routing_with_score_function"] is before["topk_routing_with_score_function"]
print("all held")
"""
    )
    assert result.stdout.endswith("all held\n"), result.stderr


REGISTER = "import megatron_global_lbl as lbl; lbl.register(scope='global')"


def fake_megatron(folder: Path, version: str) -> str:
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (folder / "megatron" / "__init__.py").write_text("")
    (core / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return str(folder)


@pytest.mark.parametrize("version", ["0.13.1", "0.21.0"])
def test_unsupported_megatron(tmp_path, version):
    result = python(REGISTER, fake_megatron(tmp_path, version))
    last = result.stderr.strip().splitlines()[-1]
    assert last.endswith(f"UnsupportedMegatron: Megatron-Core {version} is not supported; supported: {SUPPORTED}")


def test_missing_symbol_is_named(tmp_path):
    result = python(REGISTER, fake_megatron(tmp_path, "0.19.2"))
    last = result.stderr.strip().splitlines()[-1]
    assert "megatron.core.transformer.moe.router.TopKRouter.routing is not where it should be" in last
    assert "0.19.2" in last and "0.14 to 0.19" in last


def test_what_a_module_of_megatron_needs_is_named(tmp_path):
    """And not the module: it is where it should be."""
    path = fake_megatron(tmp_path, "0.19.2")
    moe = tmp_path / "megatron" / "core" / "transformer" / "moe"
    moe.mkdir(parents=True)
    (moe / "router.py").write_text("import not_there\n")
    result = python(REGISTER, path)
    assert result.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'not_there'"


def test_the_launcher_shows_where_a_library_fails(tmp_path):
    path = fake_megatron(tmp_path, "0.19.2")
    (tmp_path / "megatron" / "training").mkdir()
    (tmp_path / "megatron" / "training" / "arguments.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    (tmp_path / "script.py").write_text("")
    launch = f"import sys; from megatron_global_lbl.__main__ import main; main([{str(tmp_path / 'script.py')!r}])"
    result = python(launch, path)
    assert "arguments.py" in result.stderr and result.stderr.strip().endswith("ImportError: libcudart.so.12: no such file")


def test_no_megatron_at_all(tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("")
    (tmp_path / "script.py").write_text("")
    launch = f"import sys; from megatron_global_lbl.__main__ import main; main([{str(tmp_path / 'script.py')!r}])"
    result = python(launch, str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.strip().startswith("megatron_global_lbl: error: no Megatron-Core found")
    assert len(result.stderr.strip().splitlines()) == 1
