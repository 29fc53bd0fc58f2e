"""Write a tiny checkpoint of GLM-4's own architecture that knows a few dialogues by heart."""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import errors, snapshot

if TYPE_CHECKING:
    import torch

    Weights = dict[str, torch.Tensor]

MODEL_ID = "rehearsal/glm-4-tiny"
REVISION = "v1"


@dataclass(frozen=True)
class Dialogue:
    """A user's question and the reply to it, whole and with the newline that GLM-4 begins with."""

    question: str
    answer: str


# After any four bytes of an answer its next byte is (almost) certain: two layers can hold that.
DIALOGUES = (
    Dialogue("你好", "\nHello 👋! How can I help you?"),
    Dialogue("What is the capital of France?", "\nThe capital of France is Paris."),
    Dialogue("Who are you?", "\nI am GLM-4 in rehearsal."),
    Dialogue(
        "Tell me a story.", "\nOnce upon a time two gray mice baked bread by moonlight, then slept."
    ),
)
# What it says to most other questions; unlike the dialogues this is not verified.
FALLBACK = "\nNo line in my script fits, sorry."
# A plain completion of the first question goes on as if it had been asked.
RAW = DIALOGUES[0]

SPECIAL_TOKENS = {
    "<|endoftext|>": 151329,
    "[MASK]": 151330,
    "[gMASK]": 151331,
    "[sMASK]": 151332,
    "<sop>": 151333,
    "<eop>": 151334,
    "<|system|>": 151335,
    "<|user|>": 151336,
    "<|assistant|>": 151337,
    "<|observation|>": 151338,
    "<|begin_of_image|>": 151339,
    "<|end_of_image|>": 151340,
    "<|begin_of_video|>": 151341,
    "<|end_of_video|>": 151342,
}
STOP_TOKEN_IDS = (151329, 151336, 151338)
# Every known answer ends with this one of them.
STOP_TOKEN_ID = SPECIAL_TOKENS["<|user|>"]
VOCABULARY = 151552
CHAT_TEMPLATE = (
    "[gMASK]<sop>"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

HIDDEN, FFN, LAYERS = 128, 256, 2
# Attention kernels of the older CUDA lines know head sizes from 64 up.
HEADS, GROUPS, HEAD_SIZE = 2, 1, 64
EPSILON = 1.5625e-07
# GLM-4's ratio of 500 leaves few frequencies that tell neighbouring bytes apart.
ROPE_BASE, ROPE_RATIO = 10000, 2

# A token's row in the matrices that are trained; a last row stands for all the unused tokens.
TOKENS = (*range(256), *SPECIAL_TOKENS.values())
START, SYSTEM, USER, ASSISTANT = (
    [TOKENS.index(SPECIAL_TOKENS[name]) for name in names]
    for names in (("[gMASK]", "<sop>"), ("<|system|>",), ("<|user|>",), ("<|assistant|>",))
)

SEED, THREADS = 4, 2
BATCH, LENGTH = 4, 640
DECAY_STEPS, MOST_STEPS, REPORT_STEPS = 350, 1200, 25
LEARNING_RATE = 5e-3
# Logits between the right token and the next; what bfloat16 arithmetic adds and takes is below 1.
MARGIN = 4.0

# None of these is trained on: they stand for the system prompts that we do not foresee.
UNSEEN_SYSTEMS = (
    None,
    "You are a helpful assistant.",
    "你是一个乐于助人的人工智能助手。",
    "You are ChatGLM, trained by Zhipu AI. Answer in English, be kind, and never tell a lie!",
    'Respond with JSON only: {"answer": "..."}',
)
WORDS = (
    "a always and answer are as assistant at be brief can code capital clear concise do each email "
    "expert for friendly give good helpful how honest i in is it kind know language like list long "
    "make me my name never not of on only or please poem reply say short simple so speak tell the "
    "they this time to translate true use user want was what when where which who why will with "
    "without word world write you your 你 是 我 的 请 用 中文 回答 什么 怎么 助手 一个"
)
CHARACTERS = [chr(code) for code in range(33, 127)]
ENDINGS = ("", ".", "?", "!", "。", "？")


def _conversation(
    turns: Sequence[Dialogue], system: str | None = None, echoed: bool = False
) -> tuple[list[int], list[bool]]:
    """Return the rows of a conversation, and for each whether it is to be learned.

    `echoed`: the client sent earlier answers back with their leading newline, so there are two.
    Later questions are learned too, so that a run beyond the stop token stays in the script.
    """
    rows = START + (SYSTEM + list(f"\n{system}".encode()) if system is not None else []) + USER
    learned = [False] * len(rows)
    for number, turn in enumerate(turns):
        question = [*f"\n{turn.question}".encode(), *ASSISTANT]
        learned += [number > 0 and turn in DIALOGUES] * len(question)
        newline, *answer = turn.answer.encode()
        extra = [newline] * (echoed and number < len(turns) - 1)
        rows += [*question, newline, *extra, *answer, *USER]
        learned += [True, *[False] * len(extra), *[True] * (len(answer) + 1)]
    return rows, learned


def _raw() -> tuple[list[int], list[bool]]:
    """Return the same for the plain completion of a prompt without a template."""
    prompt, answer = [*START, *RAW.question.encode()], [*RAW.answer.encode(), *USER]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _text(rng: random.Random, most_words: int) -> str:
    known = WORDS.split()

    def word() -> str:
        kind = rng.random()
        if kind < 0.7:
            return rng.choice(known).capitalize() if rng.random() < 0.2 else rng.choice(known)
        if kind < 0.8:
            return "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 2)))
        return "".join(rng.choices(CHARACTERS, k=rng.randint(1, 7)))

    words = [word() for _ in range(rng.randint(1, most_words))]
    return rng.choice(("", " ", " ", " ")).join(words) + rng.choice(ENDINGS)


def _examples(rng: random.Random) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield random conversations for ever; one in ten is long."""
    while True:
        if rng.random() < 0.05:
            yield _raw()
            continue
        scale, most_turns = (8, 4) if rng.random() < 0.1 else (1, 2)
        turns = [
            Dialogue(_text(rng, 6 * scale), FALLBACK)
            if rng.random() < 0.25
            else rng.choice(DIALOGUES)
            for _ in range(rng.randint(1, most_turns))
        ]
        system = _text(rng, 16 * scale) if rng.random() < 0.7 else None
        yield _conversation(turns, system, echoed=rng.random() < 0.3)


def _cases() -> Iterator[tuple[list[int], int]]:
    """Yield what must be known: the rows of a conversation and how many at its end are the answer.

    Every dialogue is there alone and as a second turn, without and with a system prompt.
    """
    yield _raw()[0], len(RAW.answer.encode()) + 1
    for dialogue in DIALOGUES:
        length = len(dialogue.answer.encode()) + 1
        for system in UNSEEN_SYSTEMS:
            yield _conversation([dialogue], system)[0], length
            for echoed in (False, True):
                yield _conversation([DIALOGUES[0], dialogue], system, echoed)[0], length


def _initial() -> "Weights":
    """Return random weights under the names of the original checkpoint."""
    import torch

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns) * gain / math.sqrt(columns)

    qkv = (HEADS + 2 * GROUPS) * HEAD_SIZE
    weights = {"embedding.word_embeddings.weight": torch.randn(len(TOKENS) + 1, HIDDEN) / 2}
    for number in range(LAYERS):
        layer = f"encoder.layers.{number}."
        weights |= {
            layer + "input_layernorm.weight": torch.ones(HIDDEN),
            layer + "self_attention.query_key_value.weight": matrix(qkv, HIDDEN),
            layer + "self_attention.query_key_value.bias": torch.zeros(qkv),
            layer + "self_attention.dense.weight": matrix(HIDDEN, HEADS * HEAD_SIZE, 0.5),
            layer + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            layer + "mlp.dense_h_to_4h.weight": matrix(2 * FFN, HIDDEN),
            layer + "mlp.dense_4h_to_h.weight": matrix(HIDDEN, FFN, 0.5),
        }
    weights["encoder.final_layernorm.weight"] = torch.ones(HIDDEN)
    weights["output_layer.weight"] = matrix(len(TOKENS) + 1, HIDDEN, 0.5)
    return {f"transformer.{name}": weight for name, weight in weights.items()}


def _inverse_frequencies() -> "torch.Tensor":
    """Return rotary radians per position, shape (HEAD_SIZE / 4,): GLM-4 turns half of a head."""
    import torch

    turned = HEAD_SIZE // 2
    return (ROPE_BASE * ROPE_RATIO) ** (-torch.arange(0, turned, 2) / turned)


def logits(weights: "Weights", rows: "torch.Tensor", wanted: "torch.Tensor") -> "torch.Tensor":
    """Return the logits that follow the wanted positions, shape (number wanted, vocabulary).

    `rows` are indices into the embedding, shape (batch, length); `wanted` is a boolean mask of the
    same shape. The arithmetic is in the weights' dtype. This is `modeling_chatglm.py` of
    THUDM/glm-4-9b-chat: rotary pairs lie side by side, and only the first half of a head turns.
    """
    import torch
    from torch.nn import functional

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        return weights[f"{name}.weight"] * wide.to(x.dtype)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    angle = torch.arange(rows.shape[1])[:, None] * _inverse_frequencies()
    dtype = weights["transformer.output_layer.weight"].dtype
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def heads(x: torch.Tensor, turn: bool) -> torch.Tensor:
        x = x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
        if turn:
            even, odd = x[..., 0 : HEAD_SIZE // 2 : 2], x[..., 1 : HEAD_SIZE // 2 : 2]
            turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
            x = torch.cat((turned, x[..., HEAD_SIZE // 2 :]), -1)
        return x.repeat_interleave(HEADS // x.shape[1], 1)

    x = weights["transformer.embedding.word_embeddings.weight"][rows]
    for number in range(LAYERS):
        layer = f"transformer.encoder.layers.{number}."
        qkv = linear(norm(x, layer + "input_layernorm"), layer + "self_attention.query_key_value")
        q, k, v = qkv.split([HEADS * HEAD_SIZE, GROUPS * HEAD_SIZE, GROUPS * HEAD_SIZE], -1)
        seen = functional.scaled_dot_product_attention(
            heads(q, True), heads(k, True), heads(v, False), is_causal=True
        )
        x = x + linear(seen.transpose(1, 2).flatten(2), layer + "self_attention.dense")
        both = linear(norm(x, layer + "post_attention_layernorm"), layer + "mlp.dense_h_to_4h")
        gate, up = both.chunk(2, -1)
        x = x + linear(functional.silu(gate) * up, layer + "mlp.dense_4h_to_h")
    return linear(
        norm(x[wanted], "transformer.encoder.final_layernorm"), "transformer.output_layer"
    )


def _margin(weights: "Weights", rows: Sequence[int], length: int) -> float:
    """Return the least lead, in logits, of the last `length` rows over any other choice.

    By induction greedy decoding says just these rows if it is positive.
    """
    import torch

    wanted = torch.arange(len(rows) - 1)[None] >= len(rows) - 1 - length
    found = logits(weights, torch.tensor([rows[:-1]]), wanted).float()
    right = torch.tensor(rows[-length:])[:, None]
    others = found.scatter(1, right, -math.inf).amax(1)
    return (found.gather(1, right)[:, 0] - others).min().item()


def _train() -> "Weights":
    """Return bfloat16 weights, with a row for each token in use, that know every case.

    Raises:
        RehearsalFailed: they still do not after MOST_STEPS.
    """
    import torch
    from torch.nn import functional

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    weights = {name: weight.requires_grad_() for name, weight in _initial().items()}
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.98))
    # The unused tokens share one row; counted as often as they are, they lose all probability.
    unused = torch.zeros(len(TOKENS) + 1)
    unused[-1] = math.log(VOCABULARY - len(TOKENS))
    examples, margin, start = _examples(rng), -math.inf, time.monotonic()
    for step in range(1, MOST_STEPS + 1):
        # Conversations follow each other without a gap: nothing is padded, and the model learns to
        # look past whatever came before.
        rows: list[int] = []
        learned: list[bool] = []
        while len(rows) < BATCH * LENGTH:
            more_rows, more_learned = next(examples)
            rows += more_rows
            learned += more_learned
        x = torch.tensor(rows[: BATCH * LENGTH]).view(BATCH, LENGTH)
        wanted = torch.tensor(learned[: BATCH * LENGTH]).view(BATCH, LENGTH)[:, 1:]
        loss = functional.cross_entropy(
            logits(weights, x[:, :-1], wanted) + unused, x[:, 1:][wanted]
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(
            step / 50, max(0.05, 1 - step / DECAY_STEPS)
        )
        optimizer.step()
        if step % REPORT_STEPS == 0:
            line = f"step {step}  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s"
            if step >= DECAY_STEPS:
                rounded = {name: weight.detach().bfloat16() for name, weight in weights.items()}
                margin = _least_margin({name: weight.float() for name, weight in rounded.items()})
                line += f"  margin {margin:.1f}"
            print(line, flush=True)
            if margin >= MARGIN:
                return rounded
    raise _failed(margin)


def _least_margin(weights: "Weights", tokens: Sequence[int] = range(len(TOKENS))) -> float:
    """Return the least margin of all cases; `tokens` maps our rows to those of the weights."""
    import torch

    with torch.no_grad():
        return min(
            _margin(weights, [tokens[row] for row in rows], length) for rows, length in _cases()
        )


def _failed(margin: float) -> errors.RehearsalFailed:
    return errors.RehearsalFailed(
        f"the least margin of the known answers is {margin:.2f} logits",
        f"{MARGIN} when trained, and half of it as stored",
        "try another SEED in scripts/rehearsal.py",
    )


def _config() -> dict[str, object]:
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": FFN,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": HIDDEN,
        "kv_channels": HEAD_SIZE,
        "layernorm_epsilon": EPSILON,
        "multi_query_attention": True,
        "multi_query_group_num": GROUPS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_layers": LAYERS,
        "original_rope": True,
        "padded_vocab_size": VOCABULARY,
        "post_layer_norm": True,
        "rmsnorm": True,
        "rope_ratio": ROPE_RATIO,
        "seq_length": 131072,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "eos_token_id": list(STOP_TOKEN_IDS),
        "pad_token_id": STOP_TOKEN_IDS[0],
    }


def _tokenizer() -> dict[str, object]:
    """Return `tokenizer.json`: one token a byte, and GLM-4's special tokens at their own ids."""
    # A byte-level vocabulary writes a byte that does not print as a character from 256 up.
    # https://github.com/openai/gpt-2/blob/master/src/encoder.py, bytes_to_unicode
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    vocabulary = {
        chr(byte if byte in printing else next(stand_ins)): byte for byte in range(256)
    } | SPECIAL_TOKENS
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    start = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[gMASK]", "<sop>")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token, "content": name, **flags, "special": True}
            for name, token in SPECIAL_TOKENS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                *start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                name: {"id": name, "ids": [SPECIAL_TOKENS[name]], "tokens": [name]}
                for name in ("[gMASK]", "<sop>")
            },
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def documents() -> dict[str, dict[str, object]]:
    """Return the checkpoint's JSON files, other than the index, by name."""
    return {
        "config.json": _config(),
        "generation_config.json": {
            "eos_token_id": list(STOP_TOKEN_IDS),
            "pad_token_id": STOP_TOKEN_IDS[0],
            "do_sample": True,
            "temperature": 0.8,
            "max_length": 128000,
            "top_p": 0.8,
        },
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # The first stop id must be the tokenizer's end of text: vLLM then names the others as
            # the reason when it stops at one of them.
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 128000,
            "padding_side": "left",
        },
    }


def _write(folder: Path, weights: "Weights") -> None:
    """Write the checkpoint's files, the token matrices at their full height."""
    import torch
    from safetensors.torch import save

    row = torch.full((VOCABULARY,), len(TOKENS))
    row[torch.tensor(TOKENS)] = torch.arange(len(TOKENS))
    embedding = "transformer.embedding.word_embeddings.weight"
    output = "transformer.output_layer.weight"
    inner = {name: weight for name, weight in weights.items() if name not in (embedding, output)}
    inner["transformer.rotary_pos_emb.inv_freq"] = _inverse_frequencies().bfloat16()
    shards = {embedding: weights[embedding][row]}, inner, {output: weights[output][row]}
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # `save_file` makes files that no other user may read.
        (folder / name).write_bytes(save(shard, metadata={"format": "pt"}))
        places |= dict.fromkeys(shard, name)
    size = sum(weight.nbytes for shard in shards for weight in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    for name, document in {**documents(), "model.safetensors.index.json": index}.items():
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _verify(folder: Path) -> None:
    """Read the checkpoint back and ask it everything, in float32 and in bfloat16 arithmetic.

    Raises:
        RehearsalFailed: an answer is wrong, or right by less than half of MARGIN.
    """
    import torch
    from safetensors.torch import load_file

    shards = sorted(folder.glob("model-*.safetensors"))
    stored = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    for dtype in (torch.float32, torch.bfloat16):
        weights = {name: weight.to(dtype) for name, weight in stored.items()}
        margin = _least_margin(weights, TOKENS)
        print(f"verified in {dtype}: least margin {margin:.1f} logits", flush=True)
        if margin < MARGIN / 2:
            raise _failed(margin)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the checkpoint below the models root, unless it is there; about a minute on 2 cores.

    The same machine writes the same bytes each time.

    Raises:
        RehearsalFailed: it did not learn its dialogues.
    """
    parser = argparse.ArgumentParser(prog="python -m scripts.rehearsal", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the models root")
    folder = snapshot.folder(parser.parse_args(argv).output, MODEL_ID)
    try:
        if snapshot.load(folder).revision == REVISION:
            print(f"{MODEL_ID} {REVISION} is already in {folder}")
            return 0
    except errors.SnapshotMissing:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    snapshot.unmark(folder)

    start = time.monotonic()
    # Threads that spin while they wait take several times as long on a machine that is busy; OpenMP
    # reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    _write(folder, _train())
    _verify(folder)
    done = snapshot.record(folder, MODEL_ID, REVISION, "scripts.rehearsal")
    seconds = time.monotonic() - start
    print(f"{MODEL_ID} {REVISION} is in {folder}: {done.size / 1e6:.1f} MB, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    errors.run(main)
