"""The loss in three Triton kernels per layer and micro-batch (`window`: two), on the router's logits.

The plain path (balance.py, attach.py) takes the router's scores, [T, E] numbers that somebody has to compute, keep and
differentiate. Here the loss is attached to the logits before the top-k: its backward gets the gradient of the routing and adds
the loss' in one pass, working the scores out anew. Nothing of size [T, E] is kept but the logits.

choice          which forwards go this way; the plain path is the reference, and takes all others
score_functions s and its slope, in a kernel
count_kernel    forward: selections and summed scores of valid tokens
vector_kernel   backward: E numbers, the gradient with respect to a token's scores
logits_kernel   backward: the gradient of the logits
launch          starts these three
counted         a forward that was counted by them; one class per scope
attach          an identity on the logits whose backward adds the gradient
"""
