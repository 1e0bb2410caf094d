"""The window in Megatron's own checkpoint (`megatron.training.checkpointing`, 0.14 to 0.19).

It travels as one more plain entry of the state dict, beside the iteration and the learning-rate schedule: loading without
this plugin ignores it. Every file that holds plain entries gets the whole window, each layer's from the pipeline stage that
has the layer, so a run can be resumed with another layout. Replaced are

    generate_state_dict     called with an iteration when saving (without one it only describes what to load)
    unwrap_model            called first when loading: says for which model
    _load_base_checkpoint   returns the state dict that was read

The format of Megatron FSDP, `fsdp_dtensor`, would take the entry apart and reads only what it is asked for: there the entry is
one sequence of bytes, and asked for where a checkpoint has it.
"""

from __future__ import annotations

import importlib
import io
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from megatron_global_lbl.core.collective import gather_objects
from megatron_global_lbl.core.engine import Engine
from megatron_global_lbl.hook import refusals
from megatron_global_lbl.hook.models import routers_of
from megatron_global_lbl.hook.patching import Patches

CHECKPOINTING = "megatron.training.checkpointing"
ENTRY = "moe_lbl_window"
FSDP_FORMAT = "fsdp_dtensor"


def install(patches: Patches, engine: Engine) -> None:
    """Save and load the window of `engine` with Megatron's checkpoints."""
    last_unwrapped: list[weakref.ref[nn.Module]] = []

    def wrap_generate(original):
        def generate_state_dict(args, model, *positional, iteration=None, **kwargs):
            state_dict = original(args, model, *positional, iteration=iteration, **kwargs)
            if iteration is not None:
                refusals.refuse_checkpoint_format(args.ckpt_format, "--moe-lbl-scope window")
                window = of_all_stages(engine.state(routers_of(model)))
                state_dict[ENTRY] = _to_bytes(window) if args.ckpt_format == FSDP_FORMAT else window
            return state_dict

        return generate_state_dict

    def wrap_unwrap(original):
        def unwrap_model(model, *args, **kwargs):
            last_unwrapped[:] = map(weakref.ref, model if isinstance(model, (list, tuple)) else [model])
            return original(model, *args, **kwargs)

        return unwrap_model

    def wrap_load(original):
        def _load_base_checkpoint(load_dir, args, *positional, **kwargs):
            rank0 = kwargs.get("rank0", positional[0] if positional else False)
            if not rank0 and args.ckpt_format == FSDP_FORMAT and _is_in_checkpoint(args):
                kwargs["sharded_state_dict"][ENTRY] = None
            result = original(load_dir, args, *positional, **kwargs)
            state_dict = result[0]
            # With rank0 only the arguments are wanted.
            if state_dict is not None and not rank0 and not args.finetune:
                if ENTRY in state_dict:
                    saved = _from_bytes(state_dict[ENTRY])
                    model = [chunk for reference in last_unwrapped if (chunk := reference()) is not None]
                    engine.load(saved, routers_of(model))
                    steps = max((len(layer.get("counts", ())) for layer in saved.values()), default=0)
                    say(f"window continues with {min(steps, engine.settings.window_steps)} steps from the checkpoint")
                else:
                    say("the checkpoint holds no window: it starts anew (f is uniform in the first step)")
            return result

        return _load_base_checkpoint

    patches.wrap(CHECKPOINTING, "generate_state_dict", wrap_generate)
    patches.wrap(CHECKPOINTING, "unwrap_model", wrap_unwrap)
    patches.wrap(CHECKPOINTING, "_load_base_checkpoint", wrap_load)


def of_all_stages(state: dict[str, dict]) -> dict[str, dict]:
    """What the layers of all pipeline stages save; a collective over the pipeline group, whose ranks all save."""
    from megatron.core import parallel_state

    stages = gather_objects(state, parallel_state.get_pipeline_model_parallel_group())
    return {name: entry for stage in stages for name, entry in stage.items()}


def _is_in_checkpoint(args) -> bool:
    """Whether a checkpoint of the format `fsdp_dtensor` has the entry: to ask for one that is not there may be an error."""
    path = importlib.import_module(CHECKPOINTING).get_load_checkpoint_path_by_args(args)
    try:
        return ENTRY in FileSystemReader(path).read_metadata().state_dict_metadata
    except FileNotFoundError:  # no checkpoint: Megatron says so
        return False


def _to_bytes(window: dict[str, dict]) -> bytes:
    stream = io.BytesIO()
    torch.save(window, stream)
    return stream.getvalue()


def _from_bytes(entry: dict[str, dict] | bytes) -> dict[str, dict]:
    return torch.load(io.BytesIO(entry), weights_only=True) if isinstance(entry, bytes) else entry


def say(text: str) -> None:
    """Rank 0 says it."""
    if dist.get_rank() == 0:
        print(f"> moe-lbl: {text}", flush=True)
