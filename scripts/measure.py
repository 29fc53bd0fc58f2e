"""Time one way to generate on this machine: vLLM, transformers, or what memory alone allows."""

import argparse
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from scripts import dialect, errors, hf, offline, report
from scripts.settings import DTYPES, Settings

# Tokens that prompts are made of: plain ones in every vocabulary we know of.
_FIRST, _LAST = 0, 255
# Bytes that are copied to find a memory's bandwidth: far beyond any cache.
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}


def prompts(options: argparse.Namespace, run: int) -> list[list[int]]:
    """Return the prompts of a run as token ids, shape (num_prompts, input_len).

    Every backend gets the same; every run gets others, or a cache of prefixes would answer.
    """
    rng = random.Random(options.seed + run)
    return [
        [rng.randint(_FIRST, _LAST) for _ in range(options.input_len)]
        for _ in range(options.num_prompts)
    ]


def _device(settings: Settings) -> str:
    return "cpu" if settings.variant == "cpu" else "cuda"


def _vllm(options: argparse.Namespace, settings: Settings) -> Callable[[list[list[int]]], list]:
    """Return what generates with vLLM; the texts are decoded, as a user would have them."""
    fitted, where = offline.prepare(settings)
    engine = offline.Engine(fitted, where, shlex.split(options.checked))
    from vllm import SamplingParams

    def generate(asked: list[list[int]]) -> list[int]:
        requests = (
            (
                None,
                tokens,
                SamplingParams(
                    temperature=1.0, top_p=1.0, ignore_eos=True, max_tokens=options.output_len
                ),
            )
            for tokens in asked
        )
        return [len(output.outputs[0].token_ids) for _, output in engine.run(requests)]

    return generate


def _hf(options: argparse.Namespace, settings: Settings) -> Callable[[list[list[int]]], list]:
    """Return what generates with transformers: batches of prompts of one length, PyTorch's sdpa."""
    # Only the checks and the folder: no share of the card is taken.
    fitted, where = offline.prepare(settings)
    os.environ.update(dialect.environment(fitted, os.environ))
    import torch
    import transformers

    device = _device(settings)
    dtype = getattr(torch, fitted.dtype)
    dummy = "dummy" in settings.vllm_args
    model = hf.load(where, dtype, device, dummy=dummy, trust=settings.trust_remote_code)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        where, trust_remote_code=settings.trust_remote_code
    )
    chosen = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=options.output_len,
        # Every answer is as long as vLLM's.
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    if options.compile:
        chosen.cache_implementation = "static"
        if int(transformers.__version__.split(".")[0]) < 5:
            # Later ones compile by themselves.
            model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    model.generation_config = chosen
    size = options.hf_max_batch_size or options.num_prompts

    def generate(asked: list[list[int]]) -> list[int]:
        counts: list[int] = []
        for start in range(0, len(asked), size):
            batch = torch.tensor(asked[start : start + size], device=device)
            with torch.inference_mode():
                found = model.generate(batch, attention_mask=torch.ones_like(batch))
            tokenizer.batch_decode(found[:, batch.shape[1] :], skip_special_tokens=True)
            counts += [found.shape[1] - batch.shape[1]] * len(batch)
        return counts

    return generate


def bandwidth(device: str, repeats: int = 5) -> list[float]:
    """Return the bytes a second that copies within a device's memory read and write."""
    import torch

    size = _COPIED[device]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    found = []
    for _ in range(repeats + 1):
        wait()
        begin = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        wait()
        found.append(10 * 2 * size / (time.perf_counter() - begin))
    return found[1:]


def _measure(options: argparse.Namespace, settings: Settings, output: TextIO) -> None:
    """Write a line of JSON when ready, and one for each timed run.

    Raises:
        ServeFailed: an answer is not as long as asked for.
    """

    def tell(**values: object) -> None:
        output.write(json.dumps(values) + "\n")
        output.flush()

    began = time.monotonic()
    generate = {"vllm": _vllm, "hf": _hf}[options.backend](options, settings)
    tell(load_seconds=time.monotonic() - began)
    for run in range(options.warmups + options.runs):
        asked = prompts(options, options.first_run + run)
        begin = time.perf_counter()
        counts = generate(asked)
        seconds = time.perf_counter() - begin
        if counts != [options.output_len] * options.num_prompts:
            raise errors.ServeFailed(
                f"{options.backend} gave {sum(counts)} tokens in {len(counts)} answers",
                f"{options.num_prompts} answers of {options.output_len} tokens",
                "look above for what it says itself",
            )
        if run >= options.warmups:
            tell(seconds=seconds)
        else:
            tell(warmup_seconds=seconds)


def parser() -> argparse.ArgumentParser:
    """Return the part of the command line that bench.py has as well."""
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--input-len", type=int, default=64, help="tokens of a prompt")
    made.add_argument("--output-len", type=int, default=128, help="tokens of an answer")
    made.add_argument("--num-prompts", type=int, default=25)
    made.add_argument("--seed", type=int, default=2024)
    made.add_argument("--dtype", default="float16", choices=DTYPES)
    made.add_argument("--max-model-len", type=int, default=512)
    made.add_argument("--hf-max-batch-size", type=int, default=0, help="0 for all prompts at once")
    made.add_argument("--runs", type=int, default=5, help="timed runs of a round")
    made.add_argument("--warmups", type=int, default=1, help="runs before them, not counted")
    return made


def main(argv: list[str] | None = None) -> int:
    """Measure one backend and print JSON lines; what else is said goes to standard error."""
    output = report.claim_output()
    made = argparse.ArgumentParser(description=__doc__, parents=[parser()])
    made.add_argument("backend", choices=["vllm", "hf", "copy"])
    made.add_argument("--compile", action="store_true", help="hf: static cache and torch.compile")
    made.add_argument("--checked", default="", help="vllm: arguments that it must know")
    made.add_argument("--first-run", type=int, default=0, help="prompts of which run come first")
    options = made.parse_args(argv)
    settings = Settings.from_environ()
    if options.backend == "copy":
        device = _device(settings)
        output.write(json.dumps({"bytes_per_second": bandwidth(device)}) + "\n")
        output.flush()
        return 0
    _measure(options, settings, output)
    return 0


def _at_once(code: Any) -> None:
    """End without waiting for what the engines have running: all is written."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    errors.run(main, end=_at_once)
