"""The loss, the counts and the collectives: what a registration does, without a symbol of Megatron.

loss        the mathematics: one pure function
chunk       the main idea: counted in the forward, one all-reduce per micro-batch, read in the backward
forward     one router forward: write the row, attach the loss
attach      an identity whose backward adds the gradient
fused       the same by Triton kernels, on the router's logits
step        steps of several models begin, end or fail
recompute   which of the two forwards of a recomputed layer counts
collective  the only place that issues a collective
router      what the hook tells about a router
observer    what the metrics are told
"""
