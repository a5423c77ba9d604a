"""vLLM as a backend: its engine in the trainer's processes, with the trainer's weights."""
