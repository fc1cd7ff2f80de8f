"""Data: tokenizers, token shards, the text they are made from, and the sampler and loader that read them."""
