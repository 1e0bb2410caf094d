"""The flags of the measurement, and what a training's arguments become so that nothing is trained, saved or logged.

The user gives the arguments of the training: the model must be built as it was. Every check that needs no model is made here.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_global_lbl import flags
from megatron_global_lbl.hook.evaluation import Domain
from megatron_global_lbl.settings import ConfigError, Settings

DOMAINS = "--moe-lbl-domains"
SAMPLED_TOKENS = "--moe-lbl-sampled-tokens"
EXAMPLE = "name=PREFIX, for example code=/data/code_text_document"

# What an evaluation is, in Megatron's arguments; those a release does not have are left out.
EVALUATION: dict[str, Any] = {
    "skip_train": True,
    "exit_on_missing_checkpoint": True,
    "no_load_optim": True,
    "no_load_rng": True,
    # Only the domains are read; each becomes `valid_data_path` in its turn.
    "mock_data": False,
    "data_path": None,
    "data_args_path": None,
    "train_data_path": None,
    "test_data_path": None,
    "per_split_data_args_path": None,
    "multiple_validation_sets": False,
    "validation_set_names": None,
    # Nothing is written, and nothing ends it early.
    "save": None,
    "log_progress": False,
    "tensorboard_dir": None,
    "wandb_project": "",
    "exit_interval": None,
    "exit_duration_in_mins": None,
    # A replayed graph runs no Python, so nothing would be recorded.
    "cuda_graph_impl": "none",
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
}
# Each with the reason why what it does to the model is not looked through.
REFUSED = {
    "use_megatron_fsdp": "it shards the experts' weights",
    "use_torch_fsdp2": "it shards the experts' weights",
    "moe_router_force_load_balancing": "it routes at random",
    "perform_rl_step": "it evaluates with rollouts of its own",
    "full_validation": "Megatron has it for several validation sets only; --eval-iters says how much is read",
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags beside those of the training, which the user's command may have."""
    parser = flags.add_arguments(parser)
    group = parser.add_argument_group(title="specialisation of experts")
    group.add_argument(
        DOMAINS,
        nargs="+",
        metavar="NAME=DATA",
        help="Domains of text to evaluate on: a name, and data as --valid-data-path takes it, parts of a blend separated by "
        "commas (code=PREFIX, or code=0.7,PREFIX,0.3,PREFIX).",
    )
    group.add_argument(
        SAMPLED_TOKENS,
        default=256,
        metavar="N",
        help="Tokens of each domain on which every expert is run, to compare their outputs, over all ranks (at least one per "
        "rank and micro-batch). Default: 256.",
    )
    return parser


def parse_sampled_tokens(given: str | int) -> int:
    """The value of the flag.

    Raises:
        ConfigError: it is no integer above 0.
    """
    try:
        number = int(given)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{SAMPLED_TOKENS} {given}: not allowed; allowed: an integer >= 1")
    return number


def parse_domains(given: list[str] | None) -> list[Domain]:
    """The domains of the flag.

    Raises:
        ConfigError: there is none, two have one name, or one has no data.
    """
    if not given:
        raise ConfigError(f"{DOMAINS}: not given; allowed: one or more of {EXAMPLE}")
    domains: dict[str, Domain] = {}
    for text in given:
        name, _, data = text.partition("=")
        parts = tuple(part for part in data.split(",") if part)
        if not name or not parts:
            raise ConfigError(f"{DOMAINS} {text}: not allowed; allowed: {EXAMPLE}")
        if name in domains:
            raise ConfigError(
                f"{DOMAINS} {text}: a second domain {name}; allowed: every name once, a blend as name=PREFIX,PREFIX"
            )
        for part in parts:
            if not (_is_number(part) or "://" in part or Path(part).exists() or Path(f"{part}.idx").exists()):
                raise ConfigError(
                    f"{DOMAINS} {text}: there is no {part}.idx; allowed: what --data-path takes, a dataset without .bin or .idx"
                )
        domains[name] = Domain(name, parts)
    return list(domains.values())


def prepare(args: argparse.Namespace) -> Path:
    """Make an evaluation of a training's arguments, before Megatron validates them.

    Returns:
        The directory in which the result is written.

    Raises:
        SystemExit: after one line on stderr, if they cannot be one.
    """
    try:
        domains = parse_domains(args.moe_lbl_domains)
        parse_sampled_tokens(args.moe_lbl_sampled_tokens)
        if not args.load:
            raise ConfigError("--load: not given; allowed: the directory of the checkpoint to look at")
        if not args.moe_lbl_metrics_dir:
            raise ConfigError(
                "--moe-lbl-metrics-dir: not given; allowed: the directory in which specialisation.json is written"
            )
        for dest, reason in REFUSED.items():
            if getattr(args, dest, False):
                raise ConfigError(f"--{dest.replace('_', '-')}: not supported here, because {reason}: remove it")
        if getattr(args, "dataloader_type", None) == "external":
            raise ConfigError(
                "--dataloader-type external: not supported here, its data is not named by a path; allowed: single"
            )
        if not args.eval_iters:
            raise ConfigError(
                f"--eval-iters {args.eval_iters}: not allowed here; allowed: how many batches of each domain to read"
            )
        if not getattr(args, "num_experts", None):
            raise ConfigError("--num-experts: not given; allowed: a mixture-of-experts model (or --use-checkpoint-args)")
    except ConfigError as error:
        raise flags.end_run(str(error)) from None
    for dest, value in EVALUATION.items():
        if hasattr(args, dest):
            setattr(args, dest, value)
    args.valid_data_path = list(domains[0].data)
    directory = Path(args.moe_lbl_metrics_dir)
    for name, setting in Settings.__dataclass_fields__.items():
        # A patched Megatron-LM turns on what its own flags say: nothing, and the training's record is left alone.
        off = {"scope": "micro", "metrics": "off"}.get(name, setting.default)
        setattr(args, f"moe_lbl_{name}", off)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"> moe-lbl: evaluation of {args.load} on {len(domains)} domains: {', '.join(domain.name for domain in domains)}. "
            "What these arguments say of training data, saving and logging has no effect.",
            flush=True,
        )
    return directory


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
