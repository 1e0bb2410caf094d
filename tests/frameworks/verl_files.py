"""Writes a tiny random Qwen3-MoE, its tokenizer, and conversations of uneven length. usage: verl_files.py FOLDER"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import tokenizers
from safetensors.numpy import save_file

WORDS = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", *(f"w{number}" for number in range(59))]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, EXPERTS, EXPERT_HIDDEN = 2, 32, 4, 2, 8, 8, 32


def write_model(folder: Path) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "moe_intermediate_size": EXPERT_HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return (0.1 * generator.standard_normal(shape)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": normal(len(WORDS), HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": normal(len(WORDS), HIDDEN),
    }
    for layer in range(LAYERS):
        own = {
            "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            "self_attn.q_norm.weight": np.ones(HEAD, np.float32),
            "self_attn.k_norm.weight": np.ones(HEAD, np.float32),
            "self_attn.q_proj.weight": normal(HEADS * HEAD, HIDDEN),
            "self_attn.k_proj.weight": normal(KV_HEADS * HEAD, HIDDEN),
            "self_attn.v_proj.weight": normal(KV_HEADS * HEAD, HIDDEN),
            "self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD),
            "mlp.gate.weight": normal(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            own |= {
                f"mlp.experts.{expert}.gate_proj.weight": normal(EXPERT_HIDDEN, HIDDEN),
                f"mlp.experts.{expert}.up_proj.weight": normal(EXPERT_HIDDEN, HIDDEN),
                f"mlp.experts.{expert}.down_proj.weight": normal(HIDDEN, EXPERT_HIDDEN),
            }
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in own.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "chat_template": TEMPLATE}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_conversations(path: Path, number: int) -> None:
    choose = random.Random(7)

    def sentence() -> str:
        return " ".join(choose.choice(WORDS[5:]) for _ in range(choose.randint(2, 12)))

    roles = ("user", "assistant")
    rows = [[{"role": role, "content": sentence()} for role in roles] for _ in range(number)]
    parquet.write_table(pa.table({"messages": rows}), path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "model").mkdir()
    write_model(folder / "model")
    write_tokenizer(folder / "model")
    write_conversations(folder / "conversations.parquet", 48)
