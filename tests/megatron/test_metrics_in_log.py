"""The balance in Megatron's own log: its line, TensorBoard and W&B say the same as the record, over a resume, too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from launch import train

from megatron_global_lbl.metrics import read

BLOCK = 32768  # of LevelDB's log
LAYOUT = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--ckpt-format", "torch"]


def wandb_rows(directory: Path) -> list[dict[str, float]]:
    """What an offline run of W&B holds. Its file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB, and in them
    pieces of crc (4), length (2), type (1: whole, 2 to 4: first, middle, last) and data."""
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.rglob("*.wandb")
    data, at, record, rows = path.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while len(data) - at >= 7:
        left = BLOCK - at % BLOCK
        if left < 7:  # a block's padding
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            parsed = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_log_line_tensorboard_wandb_and_record_agree(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    checkpoint, balance = tmp_path / "checkpoint", tmp_path / "balance"
    common = [*LAYOUT, "--moe-lbl-scope", "global", "--moe-lbl-metrics-dir", str(balance), "--log-interval", "2"]
    wandb = ["--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", str(tmp_path)]
    save = ["--save", str(checkpoint), "--save-interval", "3"]
    whole = train(tmp_path, *common, *wandb, *save, processes=4)

    (run,) = read(balance)
    assert run.notes == [] and run.layers == ["0", "1"]
    assert (run.iterations.tolist(), run.steps.tolist()) == ([2, 4, 6], [2, 2, 2])
    # Of 4 micro-batches of 2 sequences the first stage counts 2, 3, 4 and 4, the second 1, 2, 3 and 4: 2.875 on average.
    assert run.sequences.tolist() == [5.75] * 3 and run.tokens.tolist() == [184] * 3
    assert (run.header["log_interval"], run.header["data_parallel"], run.header["micro_batches"]) == (2, 2, 4)
    assert run.header["alpha"] == 0.05 and run.header["settings"]["metrics"] == "brief"
    np.testing.assert_allclose(run.load([0, 1, 2]).mean(axis=2), 1, rtol=1e-3)

    expected = {
        "moe_lbl/lbl_global": run.metrics["lbl_global"].mean(axis=1),
        "moe_lbl/lbl_micro": run.metrics["lbl_micro"].mean(axis=1),
        "moe_lbl/max_vio": run.metrics["max_vio"].mean(axis=1),
        "moe_lbl/max_vio_worst": run.metrics["max_vio"].max(axis=1),
        "moe_lbl/entropy": run.metrics["entropy"].mean(axis=1),
        "moe_lbl/dead": run.metrics["dead"].sum(axis=1),
        "moe_lbl/balance_sequences": run.sequences,
    }
    rows = {row["_step"]: row for row in wandb_rows(tmp_path)}
    for key, values in expected.items():
        scalars = whole.scalars(key)
        assert list(scalars) == [2, 4, 6]
        in_line = [float(value) for value in re.findall(rf" {key}: (\S+) \|", whole.output)]
        assert len(in_line) == 3 * (key in ("moe_lbl/max_vio", "moe_lbl/dead", "moe_lbl/balance_sequences"))
        for index, iteration in enumerate((2, 4, 6)):
            for found in (scalars[iteration], rows[iteration][key], *in_line[index : index + 1]):
                assert found == pytest.approx(values[index], rel=2e-6), (key, iteration)
    # The loss that Megatron logs itself, of the last iteration of each interval, is that of a step; ours of two.
    losses = whole.scalars("load_balancing_loss")
    assert abs(losses[6] - run.metrics["lbl_global"][2].mean()) < 0.1

    resumed = train(tmp_path / "resumed", *common, "--load", str(checkpoint), "--ckpt-step", "3", processes=4)
    assert resumed.curve() == {step: whole.curve()[step] for step in (4, 5, 6)}
    (continued,) = read(balance)
    # Iteration 4 was trained again: its first course is void, and 3 keeps the mean over both.
    assert (continued.iterations.tolist(), continued.steps.tolist()) == ([2, 3, 4, 6], [2, 1, 1, 2])
    np.testing.assert_array_equal(continued.metrics["max_vio"][[0, 1, 3]], run.metrics["max_vio"])
    assert (continued.metrics["max_vio"][2] != run.metrics["max_vio"][1]).any()
    (note,) = continued.notes
    assert note.startswith("iterations 4 to 6 were recorded again after a resume")
    assert continued.id == run.id
