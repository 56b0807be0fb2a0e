"""The CUDA tier: hand-written kernels for Hopper (sm_90a), built from ``csrc/`` and called through
tvm-ffi, so that the library depends on neither torch's nor Python's binary interface."""
