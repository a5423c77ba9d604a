"""The `fast` backend: a decoding loop of our own, one CUDA graph launch per token."""
