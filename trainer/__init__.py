"""Masked vision-language pretraining on shards: order, masks, models, training loop.

Reads datasets through `pipeline.manifest` and never imports `ray` or `pyarrow`.
"""
