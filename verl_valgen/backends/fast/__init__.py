"""The `fast` backend: a decoding loop of our own, on CUDA one graph launch per token.

In the order of reading: backend.py decides whether a request suits the loop, and hands the others to Hugging Face's.
loop.py takes a batch from the prompts to the last token, step.py holds its tensors and extends it by one token, and
cuda_graph.py captures that step. On the side: cache.py (keys and values), attention.py (one token against the cache)
and fused.py (the same model with fewer kernels).
"""
