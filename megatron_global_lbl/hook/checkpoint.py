"""The window in Megatron's own checkpoint (`megatron.training.checkpointing`, 0.14 to 0.19).

It travels as one more plain entry of the state dict, beside the iteration and the learning-rate schedule: loading without
this plugin ignores it. Every file that holds plain entries gets the whole window, all pipeline stages gathered, so a run can
be resumed with another layout. Replaced are

    generate_state_dict     called with an iteration when saving (without one it only describes what to load)
    _load_base_checkpoint   returns the state dict that was read
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_global_lbl.engine import Engine
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.settings import ConfigError

CHECKPOINTING = "megatron.training.checkpointing"
ENTRY = "moe_lbl_window"
FORMATS = ("torch", "torch_dist")


def install(patches: Patches, engine: Engine) -> None:
    """Save and load the window of `engine` with Megatron's checkpoints."""
    window = engine.window
    assert window is not None

    def wrap_generate(original):
        def generate_state_dict(args, *positional, iteration=None, **kwargs):
            state_dict = original(args, *positional, iteration=iteration, **kwargs)
            if iteration is not None:
                if args.ckpt_format not in FORMATS:
                    raise ConfigError(
                        f"--ckpt-format {args.ckpt_format} cannot carry --moe-lbl-scope window; allowed: {', '.join(FORMATS)}"
                    )
                state_dict[ENTRY] = _all_stages(window.state())
            return state_dict

        return generate_state_dict

    def wrap_load(original):
        def _load_base_checkpoint(load_dir, args, *positional, **kwargs):
            result = original(load_dir, args, *positional, **kwargs)
            state_dict = result[0]
            rank0 = kwargs.get("rank0", positional[0] if positional else False)
            # With rank0 only the arguments are wanted.
            if state_dict is not None and not rank0 and not args.finetune:
                if ENTRY in state_dict:
                    window.load(state_dict[ENTRY])
                    steps = max((len(steps) for steps in state_dict[ENTRY].values()), default=0)
                    _say(f"window continues with {min(steps, window.steps)} steps from the checkpoint")
                else:
                    _say("the checkpoint holds no window: it starts anew (f is uniform in the first step)")
            return result

        return _load_base_checkpoint

    patches.wrap(CHECKPOINTING, "generate_state_dict", wrap_generate)
    patches.wrap(CHECKPOINTING, "_load_base_checkpoint", wrap_load)


def _all_stages(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The windows of all pipeline stages; a collective over the pipeline group, whose ranks all save."""
    from megatron.core import parallel_state

    stages: list[dict[str, torch.Tensor] | None]
    stages = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, state, group=parallel_state.get_pipeline_model_parallel_group())
    return {key: steps for stage in stages if stage is not None for key, steps in stage.items()}


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"> moe-lbl: {text}", flush=True)
