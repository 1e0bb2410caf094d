"""The only room that knows Megatron's symbols and versions.

patching        the five steps of replacing a symbol, and their undo
imports         waiting for a module that is not imported yet
versions        which Megatron-Core is installed, which are supported
compatibility   what differs between the supported releases
refusals        what cannot be right, each said once
router          the router forward: selections, scores, padding mask -> Engine.begin, Engine.finish
scores          the scores of the auxiliary loss, without upstream's own selection
recomputation   checkpointed calls -> Engine.recomputation
models          the routers of a model
experts         a MoE layer's experts, one by one -> specialise
evaluation      evaluation alone, domain after domain -> specialise
step            a model's step: `zero_grad_buffer`, `finalize_model_grads`, a CUDA graph of all of it -> Engine.begin_step,
                Engine.end_step
rerun           iterations that Megatron runs again -> Engine.repeat_step
checkpoint      the window in Megatron's checkpoint
training_log    the metrics in Megatron's log line, TensorBoard and W&B
log             the losses in Megatron's log, and what taking over `global_aux_loss` changes
arguments       Megatron's parser and its validation -> flags.py
"""
