"""The Triton tier: readable kernels, a module a stage.

Importing this package does not import Triton. The modules below do, so that `import flashmla` works
where Triton is not installed, and whoever asks for a kernel there gets Triton's own ImportError:

- `flashmla.triton.mha`: dense attention over packed sequences (stage 01)
- `flashmla.triton.mla`: MLA decoding over a paged cache (stages 02 and 03)
- `flashmla.triton.paged_kv`: tokens written into a paged cache (stage 03)
- `flashmla.triton.split_kv`: the split plan, combine and merge (stage 04)
- `flashmla.triton.fp8`: tokens of the FP8 cache, written and read (stage 05)
- `flashmla.triton.dsa`: the indexer's scores (stage 06), with `topk`, the choice, and `sparse`,
  attention over chosen tokens and over an FP8 cache
"""
