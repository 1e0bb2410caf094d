"""MEGATRON_GLOBAL_LBL as text, and when the import hook calls back. With Megatron: tests/megatron has the rest."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megatron_global_lbl import startup
from megatron_global_lbl.hook.imports import when_imported
from megatron_global_lbl.settings import ConfigError, Settings

ROOT = Path(__file__).parents[2]


def test_keys_are_those_of_register():
    asked = startup.parse("scope=global metrics_dir='/a b/c' start_iter=5 micro_coeff=1e-4 group_size=4 metrics=detailed")
    assert asked == Settings.create(
        scope="global", metrics_dir="/a b/c", start_iter=5, micro_coeff=1e-4, group_size=4, metrics="detailed"
    )
    assert startup.parse("metrics_dir=d") == Settings.create(scope="micro", metrics_dir="d")


@pytest.mark.parametrize(
    "text, message",
    [
        ("scope=Global", "scope=Global: unknown; allowed: micro, dp, global; did you mean global?"),
        ("scop=global", "scop=global: unknown key; allowed: scope, micro_coeff, "),
        ("scop=global", "; did you mean scope?"),
        ("global", 'global: not KEY=VALUE; write MEGATRON_GLOBAL_LBL="scope=global metrics_dir=DIR"'),
        ("scope=dp scope=global", "scope=global: given twice; remove one"),
        ("scope=global start_iter=-1", "start_iter=-1: not allowed; allowed: an integer >= 0"),
        ("scope=micro micro_coeff=0.1", "micro_coeff=0.1 has no effect with scope=micro "),
        ("scope=global metrics_dir=", "metrics_dir is empty"),
        ("scope=global metrics_dir='a b", "No closing quotation; put quotes around a value with spaces, and close them"),
    ],
)
def test_bad_values_are_named(text, message):
    with pytest.raises(ConfigError) as error:
        startup.parse(text)
    assert str(error.value).startswith("MEGATRON_GLOBAL_LBL=") and message in str(error.value)
    assert text.split()[-1].strip("'") in str(error.value) and "\n" not in str(error.value) and "--moe" not in str(error.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """a imports b half-way, which imports the router half-way, as Megatron's packages do; c needs all of a."""
    for name, text in {
        "a/__init__": "",
        "a/a": "import fake.b.b\nDONE = True",
        "b/b": "import fake.router\nDONE = True",
        "router": "DONE = True",
        "broken": "import fake.router\nraise ImportError('broken')",
        "last": "",
    }.items():
        file = tmp_path / "fake" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake"]:
        del sys.modules[name]


def test_calls_back_when_the_outermost_import_has_ended(package):
    calls = []

    def then():
        assert importlib.import_module("fake.a.a").DONE and importlib.import_module("fake.b.b").DONE
        import fake.last  # noqa: F401  # does not come here again

        calls.append(sorted(name for name in sys.modules if name.startswith("fake.")))

    before = len(sys.meta_path)
    when_imported("fake.router", then)
    import fake.a.a  # noqa: F401

    assert calls == [["fake.a", "fake.a.a", "fake.b", "fake.b.b", "fake.last", "fake.router"]]
    assert len(sys.meta_path) == before, "it waits no more"
    module = sys.modules["fake.router"]
    assert module.__loader__ is module.__spec__.loader and module.__loader__.get_code("fake.router")
    when_imported("fake.router", lambda: calls.append("at once"))
    assert calls[1:] == ["at once"]


def test_an_error_is_that_of_the_import_and_comes_again(package):
    """Frameworks catch errors around their imports."""
    wrong = []

    def then():
        if not wrong:
            raise ConfigError("wrong")

    when_imported("fake.router", then)
    for _ in range(2):
        with pytest.raises(ConfigError, match="wrong"):
            import fake.a.a
    wrong.append("no more")
    import fake.a.a  # noqa: F401


def test_an_import_that_fails_leaves_it_waiting(package):
    calls = []
    when_imported("fake.router", lambda: calls.append("called"))
    with pytest.raises(ImportError, match="broken"):
        import fake.broken
    assert calls == []
    import fake.last  # noqa: F401

    assert calls == ["called"]


def test_costs_nothing_where_the_variable_is_not_set(monkeypatch):
    monkeypatch.delenv(startup.VARIABLE, raising=False)
    code = (ROOT / "megatron_global_lbl.pth").read_text()
    assert code.count("\n") == 1, "one line: site.py runs each line that begins with import"
    imported = set(sys.modules)
    exec(code)
    assert set(sys.modules) == imported and not startup.is_watching()
