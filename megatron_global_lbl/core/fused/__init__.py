"""The loss by Triton kernels on the router's logits: two per layer and micro-batch, one for all layers.

The plain path takes the router's scores, [T, E] numbers that somebody has to compute, keep and differentiate. Here
the loss is attached to the logits before the top-k: its backward gets the gradient of the routing and adds the loss' in one
pass, working the scores out anew. Nothing of size [T, E] is kept but the logits.

choice   which forwards go this way; the plain path is the reference, and takes all others
forward  such a forward and its backward
kernels  what runs on the GPU
"""
