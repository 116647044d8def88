"""From a checkpoint's bytes to the weights of each rank.

`source` finds a checkpoint, `formats` opens it with the `reader` of its layout (Hugging Face's, or
`fastertransformer`'s), `plan` matches its tensors to canonical ones, `convert` writes an artifact,
`artifact` opens it, `cache` converts once and remembers.
"""
