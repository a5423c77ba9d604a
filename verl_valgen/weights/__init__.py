"""The trainer's weights, as a model that `generate` can run on."""
