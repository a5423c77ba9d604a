"""The `fast` backend: a decoding loop of our own with rows that are refilled, on CUDA one graph launch per token.

In the order of reading: backend.py hands requests to our loop or to Hugging Face's, as suitability.py says. loop.py
takes all requests of a kind from the prompts to the last token; rows.py says which row answers which, step.py holds the
rows' tensors and extends each by one token, and cuda_graph.py captures that step. together.py has batches that are not
refilled, for processors that a graph cannot hold. On the side: cache.py (keys and values), attention.py (one token
against the cache), choice.py (the next token), stops.py (stop strings), decoded.py (our way through given tokens, for
trials), fused.py with modules.py, fused_attention.py and counterparts.py (the same model with fewer kernels), and
kernels/ (Triton's).
"""
