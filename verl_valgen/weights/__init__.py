"""The trainer's weights, as a model that `generate` can run on.

gather.py copies them, whole, to the ranks that generate; plain_copy.py is the model they are copied into, which
empty.py builds, in the dtypes of dtypes.py and with the attention of attention.py, and into which adapters.py merges.
exported.py fills it with what an engine exports, along the routes that conversions.py finds.
sharded.py generates through the trainer's own model instead, where no copy fits one device.
"""
