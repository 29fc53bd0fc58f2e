"""Compute how much context fits on a GPU: its memory less weights, working memory and graphs.

The sum is the one that vLLM makes at its start, from a few numbers of the model's config.json:

    share of the card - weights - libraries - working memory - CUDA graphs = room for the KV cache
    KV cache of a token = 2 (key, value) x layers x KV heads x head size x bytes of a number

The constants come from an H100 with GLM-4-9B's shape, and are on the safe side by 0.1 to 0.2 % of
the cache there; tests/unit/test_fit.py has the figures.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from scripts import errors, presets, variants
from scripts.gpu import BFLOAT16_SINCE, Gpu
from scripts.settings import Settings
from scripts.variants import Variant

_GIB = 1 << 30
# Bytes of cuBLAS, NCCL and what else the engine loads onto the card; V1 counts CUDA's own too.
_LIBRARIES = {"V0": int(0.80 * _GIB), "V1": int(0.95 * _GIB)}
# Bytes of graphs that vLLM counts within its share since 0.21; before, they come on top of it.
_GRAPHS, _GRAPHS_COUNTED_SINCE = 1 * _GIB, "0.21"
# Bytes that the sampler takes for each sequence and word of the vocabulary.
_SAMPLER = {"V0": 24, "V1": 8}
# What vLLM was seen to take beyond the largest tensors (in V1 the compiler's own memory at a first
# start), as a factor on the activations.
_BEYOND = {"V0": 1.08, "V1": 1.07}
# Bytes of the kernels' own that numbers of 8 bits need, be they weights or cache.
_FP8 = int(0.35 * _GIB)
# vLLM serves a context in blocks of so many tokens; ours is rounded down to larger steps.
_BLOCK, _STEP = 16, 256
# The share of the card that vLLM takes by default, and the most that was seen to start.
_SHARE, _MOST_SHARE = 0.90, 0.95
# Context that a person expects at least, before a larger share or more cards are tried.
_DECENT = 4096
# Free memory that is left to others when a card is shared.
_MARGIN = 300 << 20
# A context that holds nobody's cache but one: what is left to error in this sum.
_SAFETY = 0.98
_CPU_CONTEXT = 8192
# V0 makes ready for a whole prompt of the longest context at once, unless it takes prompts in
# pieces; it does so by itself for models without images, which it thinks GLM-4 is not. Its kernel
# for pieces does not compile for cards before sm_80.
_PIECE, _PIECES_SINCE = 2048, (8, 0)
_IN_PIECES = ("--enable-chunked-prefill", "--max-num-batched-tokens", str(_PIECE))
# Arguments of a user who decides that alone.
_BATCHING = ("--enable-chunked-prefill", "--max-num-batched-tokens", "--num-scheduler-steps")
# Without pieces, nobody has tried our sum beyond this; a longer context is for who sets it.
_WHOLE_MOST = 32768
# What a start takes after others have failed: part of the context, and a smaller share of the card.
_STEPS = ((1.0, 0.0), (0.5, 0.0), (0.25, 0.04))


@dataclass(frozen=True)
class Shape:
    """What decides a decoder's memory: counts, sizes in elements, and its own limit in tokens."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    longest: int
    dtype: str
    # Elements of the cache a token and layer, where it has no heads (multi-head latent attention).
    latent: int = 0

    @classmethod
    def parse(cls, config: dict) -> "Shape":
        """Read a config.json of transformers or of ChatGLM.

        Raises:
            SettingInvalid: it lacks what the sum needs.
        """
        config = {**config, **(config.get("text_config") or {})}

        def first(*names: str) -> int:
            for name in names:
                if isinstance(config.get(name), int) and not isinstance(config[name], bool):
                    return config[name]
            raise errors.SettingInvalid(
                f"config.json of the model has none of {', '.join(names)}",
                "a decoder model with the usual keys",
                "set MAX_MODEL_LEN in .env (and TENSOR_PARALLEL_SIZE for more than one GPU)",
            )

        heads = first("num_attention_heads", "n_head", "n_heads")
        hidden = first("hidden_size", "n_embd", "d_model")
        kv_heads = heads
        if config.get("multi_query_attention", True) and "multi_query_group_num" in config:
            kv_heads = first("multi_query_group_num")
        elif config.get("num_key_value_heads") or config.get("num_kv_heads"):
            kv_heads = first("num_key_value_heads", "num_kv_heads")
        latent = config.get("kv_lora_rank") or 0
        head_size = config.get("head_dim") or config.get("kv_channels") or hidden // heads
        return cls(
            layers=first("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            feed_forward=first("intermediate_size", "ffn_hidden_size", "n_inner", "hidden_size"),
            vocabulary=first("vocab_size", "padded_vocab_size"),
            longest=first("max_position_embeddings", "seq_length", "n_positions"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            latent=latent + (config.get("qk_rope_head_dim") or 0) if latent else 0,
        )

    def in_fp8(self, weights: int) -> int:
        """Return what is left of 16-bit weights, in bytes, when vLLM makes 8 bits of them.

        The embeddings at both ends stay as they are.
        """
        ends = min(2 * self.vocabulary * self.hidden * 2, weights)
        return (weights - ends) // 2 + ends

    def token_bytes(self, number: int, gpus: int) -> int:
        """Return the bytes of one token's cache on one GPU, for numbers of `number` bytes."""
        if self.latent:
            return self.layers * self.latent * number
        return 2 * self.layers * math.ceil(self.kv_heads / gpus) * self.head_size * number


@dataclass(frozen=True)
class Fit:
    """What fits: the share of each card, its sum in bytes, tokens of cache, longest context."""

    gpus: int
    share: float
    terms: tuple[tuple[str, int], ...]
    token: int
    tokens: int
    context: int

    def lines(self) -> list[str]:
        """Return the sum, a line each, for a person to check."""
        rows = [f"{name:<58} {size / _GIB:7.2f} GiB" for name, size in self.terms]
        room = sum(size for _, size in self.terms)
        rows.append(f"{'= room for the KV cache':<58} {room / _GIB:7.2f} GiB")
        rows.append(f"/ {self.token} bytes a token = {self.tokens} tokens")
        rows.append(f"context {self.context} tokens ({_SAFETY:.0%} of it, or the model's limit)")
        return rows


def _batch(variant: Variant, card: int, context: int, pieces: bool) -> tuple[int, int]:
    """Return the tokens and sequences of the largest batch that vLLM makes ready for.

    https://github.com/vllm-project/vllm, config.py of 0.6.3 and engine/arg_utils.py of V1.
    """
    if variant.engine == "V0":
        return _PIECE if pieces else max(context, 5120), 256
    return (8192, 1024) if card >= 70 * _GIB else (2048, 256)


def compute(
    shape: Shape,
    weights: int,
    card: int,
    variant: Variant,
    *,
    gpus: int = 1,
    share: float = _SHARE,
    context: int = 0,
    kv_bytes: int = 2,
    pieces: bool = False,
    fp8: bool = False,
) -> Fit:
    """Return what fits on each of `gpus` cards of `card` bytes, at most `context` (0: any) tokens.

    `weights` are the bytes of the model's files; `share` is vLLM's gpu_memory_utilization;
    `pieces` tells that V0 takes prompts in pieces, `fp8` that vLLM makes the weights 8 bits.
    """
    token = shape.token_bytes(kv_bytes, gpus)
    limit = context or shape.longest

    def at(length: int) -> Fit:
        batch, sequences = _batch(variant, card, length, pieces)
        layer = batch * (3 * shape.feed_forward // gpus + 2 * shape.hidden) * 2
        sampler = sequences * shape.vocabulary * _SAMPLER[variant.engine]
        beyond = _BEYOND[variant.engine]
        if variant.engine == "V0":
            working = int(layer * beyond) + sampler
        else:
            working = int(max(layer, sampler) * beyond)
        counted = variants.number(variant.vllm) >= variants.number(_GRAPHS_COUNTED_SINCE)
        terms = [
            (f"{share:.2f} of the card's {card / _GIB:.2f} GiB", int(share * card)),
            (f"- weights{f', a part of {gpus}' if gpus > 1 else ''}", -(weights // gpus)),
            ("- CUDA libraries", -_LIBRARIES[variant.engine]),
            (f"- working memory for {batch} tokens, {sequences} requests", -working),
        ]
        if counted:
            terms.append(("- CUDA graphs", -_GRAPHS))
        if kv_bytes == 1 or fp8:
            terms.append(("- kernels of 8 bits", -_FP8))
        tokens = max(sum(size for _, size in terms), 0) // token // _BLOCK * _BLOCK
        fits = int(tokens * _SAFETY)
        fits = min(length, fits if fits >= length else fits // _STEP * _STEP)
        return Fit(gpus, share, tuple(terms), token, tokens, fits)

    # A longer context may need more working memory, so the longest one that fits is looked for.
    best = at(limit)
    if best.context < limit:
        lengths = range(_STEP, limit, _STEP)
        fitting = (fit for length in reversed(lengths) if (fit := at(length)).context == length)
        best = next(fitting, dataclasses.replace(best, context=0))
    return best


def _kv_bytes(settings: Settings) -> int:
    words = " ".join(settings.vllm_args).replace("=", " ").replace("_", "-")
    return 1 if "--kv-cache-dtype fp8" in words else 2


def _share(settings: Settings, gpus: list[Gpu], most: float, step: int) -> float:
    """Return the share to take of each card: what is asked for, or what is free of the most."""
    if settings.gpu_memory_utilization:
        return settings.gpu_memory_utilization
    free = min((gpu.free - _MARGIN) / gpu.total for gpu in gpus)
    return math.floor(min(most, free) * 100) / 100 - _STEPS[step][1]


def dtype(settings: Settings, shape: Shape, gpus: list[Gpu]) -> str:
    """Return the number type: the one asked for, or the model's own if the cards have it."""
    if settings.dtype != "auto":
        return settings.dtype
    own = "float16" if shape.dtype == "float16" else "bfloat16"
    lacking = any(gpu.capability < BFLOAT16_SINCE for gpu in gpus)
    return "float16" if lacking else own


def read(where: Path) -> Shape:
    """Return the shape of the model in a folder."""
    try:
        return Shape.parse(json.loads((where / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise errors.SnapshotMissing(
            f"{where / 'config.json'} cannot be read: {error}",
            "the config.json of a model",
            "check MODEL_ID",
        ) from error


def vocabulary(where: Path) -> int:
    """Return the number of token ids of the model in a folder, or 0 where that is not told."""
    try:
        return read(where).vocabulary
    except errors.StackError:
        return 0


def of_folder(
    settings: Settings, gpus: list[Gpu], where: Path, weights: int, step: int = 0
) -> tuple[Settings, list[str]]:
    """Return what `resolve` does for the model in a folder.

    One whose config.json cannot be understood is served with what the user has set.
    """
    try:
        shape = read(where)
    except errors.SettingInvalid as error:
        if not settings.max_model_len:
            raise
        set_by_hand = dataclasses.replace(
            settings,
            gpu_memory_utilization=settings.gpu_memory_utilization or _SHARE,
            tensor_parallel_size=settings.tensor_parallel_size or 1,
        )
        return set_by_hand, [f"no sum: {error.found}"]
    return resolve(settings, gpus, shape, weights, step)


def resolve(
    settings: Settings, gpus: list[Gpu], shape: Shape, weights: int, step: int = 0
) -> tuple[Settings, list[str]]:
    """Return the settings with a value for every `auto`, and the lines that explain them.

    `step` is how many starts have failed, at most 2: the next one takes less.

    Raises:
        GpuMemoryShort: not even a short context fits.
    """
    variant = variants.load()[settings.variant]
    known = [gpu for gpu in gpus if gpu.total]
    context = settings.max_model_len
    if not variant.cuda or not known:
        # A CPU, or a part of a card that does not tell its memory.
        chosen = dataclasses.replace(
            settings,
            dtype=dtype(settings, shape, gpus),
            max_model_len=context or min(shape.longest, _CPU_CONTEXT),
            gpu_memory_utilization=settings.gpu_memory_utilization or _SHARE,
            tensor_parallel_size=settings.tensor_parallel_size or 1,
        )
        return chosen, [f"context {chosen.max_model_len} tokens, {chosen.dtype}"]
    pieces = _pieces(settings, known, variant)
    files = weights
    if settings.quantization == "fp8":
        weights = shape.in_fp8(files)
    best = _best(settings, known, shape, weights, variant, step)
    lines = best.lines()
    if not best.context:
        raise errors.GpuMemoryShort(
            f"{known[0]}: {known[0].room}; the sum:\n  " + "\n  ".join(lines),
            "room for the weights and a cache",
            _smaller(known, variant),
        )
    if context and context > best.context:
        lines.append(
            f"MAX_MODEL_LEN={context} is more than fits by this sum; MAX_MODEL_LEN=auto would be"
            f" {best.context}"
        )
    if best.context < _most(shape, variant, pieces) and not settings.quantization and not context:
        more = dataclasses.replace(settings, quantization="fp8")
        other = _best(more, known, shape, shape.in_fp8(files), variant, step)
        if other.context > best.context:
            lines.append(f"QUANTIZATION=fp8 would make it {other.context} tokens")
    chosen = dataclasses.replace(
        settings,
        dtype=dtype(settings, shape, known),
        max_model_len=context or max(int(best.context * _STEPS[step][0]), min(best.context, 2048)),
        gpu_memory_utilization=best.share,
        tensor_parallel_size=best.gpus,
        vllm_args=(*(_IN_PIECES if pieces else ()), *settings.vllm_args),
    )
    lines.append(
        f"so: {chosen.dtype}, MAX_MODEL_LEN={chosen.max_model_len},"
        f" GPU_MEMORY_UTILIZATION={best.share:.2f}, TENSOR_PARALLEL_SIZE={best.gpus}"
    )
    return chosen, lines


def _pieces(settings: Settings, gpus: list[Gpu], variant: Variant) -> bool:
    """Tell whether vLLM is asked to take prompts in pieces, which V1 does by itself."""
    capable = all(gpu.capability >= _PIECES_SINCE for gpu in gpus)
    return variant.engine == "V0" and capable and not sets_batching(settings)


def sets_batching(settings: Settings) -> bool:
    """Tell whether VLLM_ARGS decide how batches are made."""
    words = " ".join(settings.vllm_args).replace("_", "-")
    return any(flag in words for flag in _BATCHING)


def _most(shape: Shape, variant: Variant, pieces: bool) -> int:
    """Return the longest context that `auto` takes."""
    whole = variant.engine == "V0" and not pieces
    return min(shape.longest, _WHOLE_MOST) if whole else shape.longest


def _best(
    settings: Settings, gpus: list[Gpu], shape: Shape, weights: int, variant: Variant, step: int
) -> Fit:
    """Return the first of more cards and larger shares that gives a decent context, or the last."""
    wanted = settings.max_model_len
    pieces = _pieces(settings, gpus, variant)
    counts = [settings.tensor_parallel_size] if settings.tensor_parallel_size else [1, 2, 4, 8]
    best = None
    for count in counts:
        if count > len(gpus) or shape.heads % count:
            continue
        cards = gpus[:count]
        for most in (_SHARE, _MOST_SHARE):
            share = _share(settings, cards, most, step)
            card = min(gpu.total for gpu in cards)
            fit = compute(
                shape,
                weights,
                card,
                variant,
                gpus=count,
                share=share,
                context=min(wanted, shape.longest) or _most(shape, variant, pieces),
                kv_bytes=_kv_bytes(settings),
                pieces=pieces,
                fp8=settings.quantization == "fp8",
            )
            best = fit if best is None or fit.context > best.context else best
            if fit.context >= min(wanted or _DECENT, shape.longest):
                return fit
    if best is None:
        raise errors.GpuUnsupported(
            f"TENSOR_PARALLEL_SIZE={counts[0]}, {len(gpus)} GPU and {shape.heads} attention heads",
            "a number of GPUs that are there, by which the heads can be divided",
            "set TENSOR_PARALLEL_SIZE=auto in .env",
        )
    return best


def _smaller(gpus: list[Gpu], variant: Variant) -> str:
    """Return what to do when a model does not fit: the presets that would, and how far."""
    fitting = []
    for preset in presets.load().values():
        if variants.number(preset.least_vllm) > variants.number(variant.vllm):
            continue
        card = min(gpu.total for gpu in gpus)
        found = compute(Shape.parse(preset.config), preset.weights, card, variant)
        if found.context:
            fitting.append(f"MODEL={preset.name} ({found.context} tokens)")
    more = "more GPUs (TENSOR_PARALLEL_SIZE=auto takes them), " if len(gpus) == 1 else ""
    smaller = f"; of the presets, {', '.join(fitting)} would fit" if fitting else ""
    return f"use a GPU with more memory, {more}or a quantised model{smaller}"
