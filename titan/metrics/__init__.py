"""What a run reports: console, metrics.jsonl, TensorBoard; FLOPs and MFU."""
