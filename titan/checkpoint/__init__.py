"""Checkpoints: tensors as safetensors shards (`storage`), and many files made one step in one instant (`commit`)."""
