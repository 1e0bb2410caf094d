"""What a patched Megatron-LM asks of the package: two calls that do nothing unless a flag was given, and nothing twice."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest
from test_flags import arguments

from megatron_global_lbl import flags, registry


@pytest.fixture
def command_line(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda *given: monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *given])


@pytest.fixture
def registered(monkeypatch):
    """What would have been registered, without Megatron."""
    calls: list[dict] = []
    handle = SimpleNamespace(takeover_is_said=False)

    def register(**settings):
        if not calls:
            calls.append(settings)
            monkeypatch.setattr(registry, "active", lambda: handle)
        return handle

    monkeypatch.setattr(registry, "register", register)
    return calls


def test_the_launcher_on_a_patched_tree_adds_the_flags_once():
    parser = flags.add_arguments(argparse.ArgumentParser())
    before = parser.format_help()
    assert flags.add_arguments(parser) is parser and parser.format_help() == before


def test_without_a_flag_nothing_happens(command_line, registered, capsys):
    command_line("--num-layers", "2")
    assert flags.activate(arguments(num_experts=None, global_batch_size=None)) is None
    assert registered == [] and capsys.readouterr().out == ""


def test_scope_micro_is_said_when_it_is_given(command_line, registered, capsys):
    command_line("--moe-lbl-scope=micro")
    flags.activate(arguments("--moe-lbl-scope", "micro"))
    assert "> moe-lbl: scope micro" in capsys.readouterr().out


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_activating_twice_is_activating_once(command_line, registered, capsys, scope):
    command_line("--moe-lbl-scope", scope)
    args = arguments("--moe-lbl-scope", scope)
    flags.activate(args)
    first = dict(vars(args))
    flags.activate(args)
    assert len(registered) == 1 and vars(args) == first
    assert capsys.readouterr().out.count(f"> moe-lbl: scope {scope}") == 1


def test_a_flag_that_needs_a_scope_is_not_ignored(command_line, registered):
    command_line("--moe-lbl-group-size", "4")
    with pytest.raises(SystemExit):
        flags.activate(arguments("--moe-lbl-group-size", "4"))


@pytest.mark.parametrize("yaml", [["--yaml-cfg", "x.yaml"], ["--yaml-cfg=x.yaml"]])
def test_yaml_would_drop_the_flags(command_line, capsys, yaml):
    command_line(*yaml, "--moe-lbl-scope=global")
    with pytest.raises(SystemExit) as exit:
        flags.add_arguments(argparse.ArgumentParser())
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--moe-lbl-scope=global has no effect with --yaml-cfg" in line and line.endswith("remove one of the two")
    command_line(*yaml)
    flags.add_arguments(argparse.ArgumentParser())


def test_keys_in_the_yaml_file_would_be_dropped_too(command_line, capsys, tmp_path):
    """At any depth: Megatron nests arguments there."""
    file = tmp_path / "config.yaml"
    command_line("--yaml-cfg", str(file))
    file.write_text("language_model:\n  num_moe_experts: 8\n")
    flags.add_arguments(argparse.ArgumentParser())
    file.write_text("language_model:\n  num_moe_experts: 8\n  moe_lbl_scope: global\n")
    with pytest.raises(SystemExit):
        flags.add_arguments(argparse.ArgumentParser())
    assert "moe_lbl_scope has no effect with --yaml-cfg" in capsys.readouterr().err
