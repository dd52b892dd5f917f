"""Raw image-text corpora to WebDataset shards, as Ray tasks.

Owns everything on the way from a corpus to a dataset directory: sources, images,
captions, tokens, shards and the manifest that describes them. `pipeline.manifest` and
`pipeline.config` are the only modules that other packages import.
"""
