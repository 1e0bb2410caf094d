"""The only room that knows Megatron's symbols and versions.

patching     the five steps of replacing a symbol, and their undo
versions     which Megatron-Core is installed, which are supported
router       the router forward: selections, scores, padding mask -> Engine.route
scores       the scores of the auxiliary loss, without upstream's own selection
step         the end of a step: `finalize_model_grads` -> Engine.end_step
rerun        iterations that Megatron runs again -> Engine.repeat_step
checkpoint   the window in Megatron's checkpoint
log          what is said in Megatron's log
arguments    Megatron's parser and its validation -> flags.py
"""
