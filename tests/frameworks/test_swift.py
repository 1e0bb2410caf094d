"""ms-swift trains with the plugin: its own `megatron pt`, data, optimizer and checkpoints, on two ranks without a GPU."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from common import environment

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".frameworks" / "swift"
SEQUENCES = 8  # of an optimizer step
# A model of two MoE layers, in bf16 on gloo; what needs a GPU or the network is off.
ARGUMENTS = f"""--model_type qwen3_moe --template default --ddp_backend gloo --ddp_timeout 300 --train_iters 2 --lr 1e-2
    --lr_decay_style constant --micro_batch_size 2 --global_batch_size {SEQUENCES} --max_length 32
    --moe_aux_loss_coeff 1e-2 --logging_steps 1 --report_to report
    --perform_initialization true --use_cpu_initialization true --attention_backend unfused --padding_free false
    --recompute_granularity none --moe_grouped_gemm false --masked_softmax_fusion false --bias_dropout_fusion false
    --add_version false --save_safetensors false --check_model false
    --dataloader_num_workers 0 --dataloader_persistent_workers false""".split()
ARGUMENTS += ["--megatron_extra_kwargs", '{"persist_layer_norm": false}']
REPORT = str(HERE / "swift_report.py")

pytestmark = pytest.mark.skipif(
    not FOLDER.exists() or find_spec("megatron.training") is None,
    reason="needs ms-swift in .frameworks (make test-frameworks) and megatron.training",
)


def write_model_and_data(folder: Path) -> None:
    """What `--model` and `--dataset` name: a configuration, a tokenizer of 64 words, sequences of 9 to 32 tokens."""
    config = {
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16"},
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "rms_norm_eps": 1e-6},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu", "rope_theta": 10000.0},
        **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 64, "max_position_embeddings": 64},
        **{"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0},
    }
    words = ["<eos>", *(f"w{number}" for number in range(63))]
    end = {"id": 0, "content": "<eos>", "special": True, "normalized": False}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    tokenizer = {
        **{"version": "1.0", "added_tokens": [end], "pre_tokenizer": {"type": "WhitespaceSplit"}},
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
        "model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<eos>"},
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<eos>")}
    for file, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", names)):
        (folder / f"{file}.json").write_text(json.dumps(content))
    draw = random.Random(7)
    texts = [" ".join(draw.choices(words[1:], k=draw.randint(8, 31))) for _ in range(64)]
    lines = [json.dumps({"messages": [{"role": "assistant", "content": text}]}) for text in texts]
    (folder / "data.jsonl").write_text("\n".join(lines))


class Training(NamedTuple):
    log: str
    steps: list[dict]
    parameters: str  # a checksum of the model at the end, the same on both ranks


class Swift:
    """`swift_train.py`, and what its trainings left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model_and_data(folder)
        caches = {name: str(folder / "cache") for name in ("MODELSCOPE_CACHE", "HF_HOME")}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "swift_train.py")],
            env=environment(FOLDER) | caches | {"HF_HUB_OFFLINE": "1"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "imports.log").open("w"),
        )

    def train(self, name: str, plugin: str = "", *extra: str) -> Training:
        """One training whose output folder is `name`, and whose `--external_plugins` has the text of `plugin`."""
        file, log = self.folder / f"{name}.py", self.folder / f"{name}.log"
        file.write_text(plugin)
        arguments = [*ARGUMENTS, "--model", str(self.folder), "--dataset", str(self.folder / "data.jsonl")]
        arguments += ["--output_dir", str(self.folder / name), "--external_plugins", str(file), REPORT]
        arguments += extra
        self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "imports.log").read_text()
        assert not json.loads(answer), json.loads(answer)
        *steps, checksums = map(json.loads, (self.folder / name / "report.jsonl").read_text().splitlines())
        (parameters,) = set(checksums)
        return Training(log.read_text(), steps, parameters)


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    trainer = Swift(tmp_path_factory.mktemp("swift"))
    yield trainer
    trainer.process.stdin.close()
    trainer.process.wait(timeout=60)


@pytest.fixture(scope="module")
def plain(swift):
    return swift.train("plain")


def register(settings: str) -> str:
    return f"import megatron_global_lbl as lbl\n\nlbl.register({settings})\n"


def test_micro_is_ms_swift_as_it_is(swift, plain):
    assert swift.train("micro", register('scope="micro"')).parameters == plain.parameters


def test_global(swift, plain):
    training = swift.train("global", register('scope="global", metrics="brief"'))
    assert training.parameters != plain.parameters
    for step, without in zip(training.steps, plain.steps, strict=True):
        # What ms-swift logs is the loss of the whole batch, counted in float64 from what the routers saw; without the plugin
        # it is not.
        assert step["logged"] == pytest.approx(step["global"], rel=1e-6)
        assert without["logged"] != pytest.approx(without["global"], rel=1e-4)
        assert step["metrics"]["moe_lbl/lbl_global"] == pytest.approx(step["global"], rel=1e-6)
        # A mean over the step's micro-batches, of which f counts those so far: 2 ranks, 2 micro-batches of 2 sequences.
        assert step["metrics"]["moe_lbl/balance_sequences"] == SEQUENCES * 3 / 4
        assert step["tokens"] / 2 < step["metrics"]["moe_lbl/balance_tokens"] < step["tokens"]


def test_the_callback_without_a_registration_is_refused(swift):
    with pytest.raises(AssertionError, match="--callbacks moe_lbl needs megatron_global_lbl.register"):
        swift.train("forgotten", "import megatron_global_lbl.frameworks.swift\n", "--callbacks", "moe_lbl")
