"""GPT-2: config.py, model.py, sharding.py and hf.py. model.py alone needs torch."""
