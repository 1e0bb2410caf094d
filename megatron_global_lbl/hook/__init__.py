"""The only place with Megatron's symbols and versions.

patching        replaces and restores a symbol
imports         waits for a module that is not imported yet
versions        which Megatron-Core is installed, which are supported
compatibility   what differs between the supported releases
refusals        what cannot be right, each once
router          the router forward: selections, scores, padding mask; routers that do not report
scores          the scores of the auxiliary loss, without upstream's own selection
recompute       checkpointed calls
models          the routers of a model
step            a chunk's forward; a model's step: `zero_grad_buffer`, `finalize_model_grads`, a CUDA graph of all of it
rerun           iterations that Megatron runs again
announcement    logs what the routers did
metrics_log     the metrics in Megatron's log line, TensorBoard and W&B
loss_log        the losses in Megatron's log, and the message about a replaced `global_aux_loss`
arguments       Megatron's parser and its validation
experts         a MoE layer's experts, one by one, for specialise
evaluation      evaluation by domain, for specialise
"""
