"""The Triton tier: readable kernels, a module a stage.

Importing this package does not import Triton. The modules below do, so that
`import flashmla` works where Triton is not installed, and whoever asks for a
kernel there gets Triton's own ImportError:

- `flashmla.triton.mha`: dense attention over packed sequences (stage 01)
- `flashmla.triton.mla`: MLA decoding over a paged cache (stages 02 and 03)
- `flashmla.triton.split_kv`: the split plan, combine and merge (stage 04)
"""
