"""Llama 3: config.py, model.py and sharding.py. model.py alone needs torch."""
