"""The `fast` backend: a decoding loop of our own, on CUDA one graph launch per token.

In the order of reading: backend.py hands a batch to our loop or to Hugging Face's, as suitability.py says. loop.py
takes a batch from the prompts to the last token, step.py holds its tensors and extends it by one token, and
cuda_graph.py captures that step. On the side: cache.py (keys and values), attention.py (one token against the cache),
decoded.py (our way through given tokens, for trials), and fused.py with modules.py and counterparts.py (the same model
with fewer kernels).
"""
