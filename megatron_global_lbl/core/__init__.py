"""The loss, the counts and the collectives: what a registration does, without a symbol of Megatron.

loss            the mathematics: one pure function
balance         the main idea: counted in the forward, read in the backward; one class per scope
awaited         a forward that was counted is trained on
layers          a row of counts per MoE layer, in one tensor for all layers
window          the last steps' counts, for scope `window`
recompute       which forward of a recomputed layer is counted
attach          an identity whose backward adds the gradient
fused           the same by Triton kernels, on the router's logits
observe         what a forward leaves for what looks on
whole_graph     a CUDA graph that holds forwards and their backwards
collective      the only place that issues a collective
router_info     what the hook tells of a router
router_forward  one forward, and what may look on
saved           what of a layer travels in a checkpoint
engine          what happens in the course of a step
"""
