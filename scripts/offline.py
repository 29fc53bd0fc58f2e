"""Start vLLM's engine without a server, with the settings of the server, and run requests on it."""

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts import dialect, errors, fit, gpu, snapshot, variants
from scripts.settings import Settings

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput, SamplingParams

# Requests that vLLM is given ahead of those that it works on, so that a batch is always full.
_AHEAD = 1024


def prepare(settings: Settings) -> tuple[Settings, Path]:
    """Check model and GPUs as the server does; return the fitted settings and the model's folder.

    Raises:
        StackError: what `serve` would be refused for.
    """
    settings.check_files()
    variants.require_model(variants.load()[settings.variant], settings.model_id)
    gpus = gpu.require(settings)
    where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
    weights = snapshot.load(where).weights
    quicker = _quicker(settings, gpus, where, weights)
    fitted, lines = fit.of_folder(quicker, gpus, where, weights)
    _say("\n  ".join(["what fits:", *lines]))
    gpu.require_memory(fitted, gpus[: fitted.tensor_parallel_size], weights)
    return fitted, where


def _quicker(settings: Settings, gpus: list[gpu.Gpu], where: Path, weights: int) -> Settings:
    """Return the settings with the arguments that make vLLM quicker without a server.

    They are left out where VLLM_ARGS decide, or where with them less context fits than is asked
    for: V0 then takes prompts whole.
    """
    more = dialect.of(settings).offline
    if not more or fit.sets_batching(settings):
        return settings
    quicker = dataclasses.replace(settings, vllm_args=(*more, *settings.vllm_args))
    any_context = dataclasses.replace(quicker, max_model_len=0)
    try:
        fitted, _ = fit.of_folder(any_context, gpus, where, weights)
    except errors.StackError:
        return settings
    return quicker if fitted.max_model_len >= settings.max_model_len else settings


class Engine:
    """vLLM's engine in this process, ready.

    `settings` are those that `prepare` returned. Of VLLM_ARGS, what is the server's is left out;
    `checked` must be arguments of the engine.
    """

    def __init__(self, settings: Settings, where: Path, checked: Sequence[str] = ()) -> None:
        # Before vLLM is imported: it reads its environment then, and warns of a name like its own.
        os.environ.pop("VLLM_ARGS", None)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.update(dialect.environment(settings, os.environ))
        if settings.tensor_parallel_size == 1:
            # A second process would import everything again, and a fork of this one may hang.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        began = time.monotonic()
        self._engine = _start(_arguments(settings, where), checked)
        _say(f"ready after {time.monotonic() - began:.0f} s")
        self.most_tokens = settings.max_model_len
        self._number = 0

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers makes it."""
        found = self._engine.get_tokenizer()
        return getattr(found, "tokenizer", found) if not hasattr(found, "encode") else found

    def run(
        self, requests: Iterable[tuple[Any, list[int], "SamplingParams"]]
    ) -> Iterator[tuple[Any, "RequestOutput"]]:
        """Yield (key, output) of each (key, token ids, sampling) when it is finished.

        Requests are taken from the iterable as there is room, so it may be long.
        """
        from vllm.sampling_params import RequestOutputKind

        running: dict[str, Any] = {}
        left = iter(requests)
        more = True
        while more or running:
            while more and len(running) < _AHEAD:
                try:
                    key, tokens, sampling = next(left)
                except StopIteration:
                    more = False
                    break
                sampling.output_kind = RequestOutputKind.FINAL_ONLY
                name = str(self._number)
                self._number += 1
                self._engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
                running[name] = key
            if not running:
                break
            for output in self._engine.step():
                if output.finished:
                    yield running.pop(output.request_id), output

    def close(self) -> None:
        """End the engine's processes, where it has any."""
        core = getattr(self._engine, "engine_core", None)
        if core is not None:
            core.shutdown()


def _say(text: str) -> None:
    print(f"offline: {text}", file=sys.stderr, flush=True)


def _arguments(settings: Settings, where: Path) -> list[str]:
    return [
        *("--model", str(where)),
        *dialect.engine_arguments(settings),
        *settings.vllm_args,
    ]


def _start(arguments: list[str], checked: Sequence[str]) -> "LLMEngine":
    from vllm import EngineArgs, LLMEngine

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    unknown = parser.parse_known_args(list(checked))[1]
    if unknown:
        raise errors.SettingInvalid(
            f"vLLM's engine does not know {' '.join(unknown)}",
            "arguments of `vllm serve` that are not the server's",
            "correct them",
        )
    known, ignored = parser.parse_known_args(arguments)
    if ignored:
        # VLLM_ARGS may have arguments of the server.
        _say(f"without {' '.join(ignored)}")
    chosen = dataclasses.replace(EngineArgs.from_cli_args(known), disable_log_stats=True)
    _say(f"loading vLLM's engine: {' '.join(arguments)}")
    try:
        return LLMEngine.from_engine_args(chosen)
    except (RuntimeError, ValueError) as error:
        raise errors.ServeFailed(
            f"vLLM's engine did not start: {error}", "an engine", "read vLLM's own error above"
        ) from error
