"""titan: distributed pretraining in native PyTorch, from a laptop's cores to a cluster."""

__version__ = "0.1.0"
