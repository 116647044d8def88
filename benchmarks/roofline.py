"""What a decode step cannot avoid: reading the decoder's weights and the cached tokens once."""

from __future__ import annotations

from lmi_multi.checkpoint.artifact import Artifact


def step_bytes(artifact: Artifact, batch: int, prompt: int, new: int) -> int:
    """Bytes that the mean decode step of `new` tokens after a prompt of `prompt` must read."""
    return weight_bytes(artifact) + int(batch * cache_bytes(artifact, prompt, new))


def weight_bytes(artifact: Artifact) -> int:
    """Bytes of the weights that every decode step multiplies with.

    Left out: embedding rows, position tables, and the encoder with the projections of its output,
    which are used once a prompt. A tied head is the embedding.
    """
    by_name = {tensor.name: tensor.nbytes(1) for tensor in artifact.stored}
    used = {name: size for name, size in by_name.items() if _every_step(name)}
    head = 0 if "head.weight" in used else by_name["embed.weight"]
    return head + sum(used.values())


def _every_step(name: str) -> bool:
    module = name.rsplit(".", 1)[0]
    if module.endswith((".cross_kv", ".relative")):
        return False
    return module.startswith("decoder.") or module in ("head", "project_in", "project_out")


def cache_bytes(artifact: Artifact, prompt: int, new: int) -> float:
    """Bytes of keys and values that one row reads in the mean step.

    Steps 2 to `new` feed back one token each: their own context is `new / 2` on average.
    """
    spec = artifact.spec
    item = 4 if artifact.dtype == "fp32" else 2
    own = new / 2 + (1 if spec.kind == "encoder-decoder" else 0)
    return 2.0 * spec.decoder_layers * spec.kv_heads * spec.head_dim * item * (prompt + own)
