"""The torch tier: blocked, vectorised torch for machines with no GPU that Triton serves.

It splits and merges as the kernels do, computes in float32, and takes CPU and CUDA tensors alike.
Nothing here records gradients: dense prefill has a backward function, the rest none.
"""
