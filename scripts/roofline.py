"""Compute how fast a card's memory lets a model decode: the limit beside every measured figure.

Each decoding step reads every weight once for the whole batch, and every sequence's own cache:

    bytes of a step = weights - embedding table + batch x (context + 1) x KV bytes of a token
    limit = batch / sum over the steps of (bytes of a step / bandwidth)

The embedding table is not streamed, only a row for each sequence is; where it is the output layer
too, it is read there. The first step reads the prompts, and counts as one that reads the weights
once: its arithmetic is left out, so the limit is a little higher than any engine could reach.
Williams, Waterman, Patterson: Roofline, CACM 52 (2009), https://doi.org/10.1145/1498765.1498785;
Pope et al.: Efficiently Scaling Transformer Inference, https://arxiv.org/abs/2211.05102, section 2.
"""

import json
from pathlib import Path

from scripts import fit


def streamed_weights(where: Path, weights: int, *, fp8: bool = False, number: int = 2) -> int:
    """Return the bytes of weights that a step reads, for numbers of `number` bytes.

    `weights` are the bytes of the model's files in `where`, which have the model's own numbers.
    """
    shape = fit.read(where)
    config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    own = {"float32": 4}.get(shape.dtype, 2)
    total = weights * number // own if not config.get("quantization_config") else weights
    if fp8:
        total = shape.in_fp8(total)
    # transformers' default, which ChatGLM's own code does not have.
    tied = config.get("tie_word_embeddings", config.get("model_type") != "chatglm")
    return total - (0 if tied else shape.vocabulary * shape.hidden * number)


def least_seconds(
    weights: int, token: int, batch: int, prompt: int, answer: int, bandwidth: float
) -> float:
    """Return the least seconds in which `batch` prompts get an answer each, of so many tokens.

    `weights` are the bytes a step streams, `token` the bytes of a token's cache, `bandwidth` bytes
    a second.
    """
    contexts = range(prompt, prompt + answer)
    cache = sum(batch * (context + 1) * token for context in contexts)
    return (answer * weights + cache) / bandwidth
