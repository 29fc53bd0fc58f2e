"""Answer many prompts without a server; an interrupted run goes on where it was."""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from scripts import errors, offline, presets, prompts, report, snapshot
from scripts.prompts import Prompt
from scripts.settings import Settings

if TYPE_CHECKING:
    from vllm import SamplingParams

# vLLM's own default of 16 tokens is a trap, the model's own of 128,000 is another.
_MAX_TOKENS = 1024
# Bad lines that are told one by one.
_MOST_TOLD = 20


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="generate", description=__doc__)
    made.add_argument("prompts", nargs="*", help="prompts; without any they come from --input")
    made.add_argument("--input", default="-", help="a file of prompts, - for standard input")
    made.add_argument(
        "--format",
        default="auto",
        choices=["auto", "text", "jsonl"],
        help="a prompt a line, or JSON: a string, {prompt}, {messages}, or OpenAI's batch form",
    )
    made.add_argument("--output", default="-", help="a file of results, - for standard output")
    made.add_argument("--finished", type=Path, help="results of an earlier run, to go on after")
    made.add_argument(
        "--no-chat-template",
        action="store_true",
        help="take a prompt as it is, not as what a user says",
    )
    for name in ("temperature", "top-p", "min-p", "repetition-penalty", "presence-penalty"):
        made.add_argument(f"--{name}", type=float)
    for name in ("max-tokens", "top-k", "seed"):
        made.add_argument(f"--{name}", type=int)
    made.add_argument("--stop", action="append", help="a text that ends an answer; repeatable")
    made.add_argument("--stop-token-ids", type=_numbers, help="with commas between")
    made.add_argument("--ignore-eos", action="store_true", default=None)
    return made


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def defaults(settings: Settings, where: Path) -> dict[str, Any]:
    """Return the model's own sampling: generation_config.json, and the stop ids of its preset."""
    try:
        config = json.loads((where / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    found = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    preset = presets.of(settings.model_id)
    stops = list(preset.stop_token_ids) if preset else config.get("eos_token_id")
    if isinstance(stops, list):
        found["stop_token_ids"] = stops
    return {"max_tokens": _MAX_TOKENS, **found}


def _read(options: argparse.Namespace, settings: Settings) -> tuple[list[Prompt], int]:
    """Return the prompts and the number of bad lines, which are told."""
    names = settings.served_model_name, settings.model_id
    with contextlib.ExitStack() as stack:
        if options.prompts:
            # An argument may have newlines.
            lines, form = [json.dumps(text) for text in options.prompts], "jsonl"
        else:
            lines, form = stack.enter_context(_opened(options.input)), options.format
        good: list[Prompt] = []
        bad = 0
        for one in prompts.read(lines, form, names):
            if isinstance(one, Prompt):
                good.append(one)
            else:
                bad += 1
                _skip(*one, bad)
    return good, bad


@contextlib.contextmanager
def _opened(name: str) -> Iterator[TextIO]:
    """Open the input; what is not UTF-8 is replaced, so that one bad line is one bad line."""
    if name == "-":
        yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", errors="replace")
        return
    try:
        text = Path(name).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise errors.SettingInvalid(
            f"{name}: {error.strerror}", "a file of prompts", "give another --input"
        ) from None
    yield io.StringIO(text)


def _say(text: str) -> None:
    print(f"generate: {text}", file=sys.stderr, flush=True)


def _skip(line: int, why: str, count: int) -> None:
    if count <= _MOST_TOLD:
        _say(f"line {line} is skipped: {why}")
    elif count == _MOST_TOLD + 1:
        _say("more lines are skipped, and only counted")


def _unfinished(
    found: list[Prompt], common: dict[str, Any], where: str, path: Path | None
) -> list[tuple[Prompt, str]]:
    """Return the prompts that `path` has no result of, with their digests.

    Raises:
        SettingInvalid: it has results of other prompts, or of the same asked in another way.
    """
    done = prompts.finished(path)
    result = []
    for prompt in found:
        digest = prompt.digest(common, where)
        if prompt.line not in done:
            result.append((prompt, digest))
        elif done[prompt.line] != digest:
            raise errors.SettingInvalid(
                f"the results there are answers to something else from line {prompt.line} on",
                "the prompts, sampling settings and model that they were made with",
                "give another file for the results, or move the old ones away",
            )
    return result


class _Asker:
    """Turns prompts into what the engine takes, and counts those that it cannot take."""

    def __init__(
        self, engine: offline.Engine, settings: Settings, ends: list[int] | None, template: bool
    ) -> None:
        self._ends = ends
        self._tokenizer = engine.tokenizer
        self._most = engine.most_tokens
        self._template = template
        self._own = settings.chat_template
        if self._own and "{" not in self._own:
            self._own = Path(self._own).read_text(encoding="utf-8")
        self.bad = 0

    def ask(
        self, wanted: list[tuple[Prompt, str]], common: dict[str, Any]
    ) -> Iterator[tuple[Any, list[int], "SamplingParams"]]:
        from vllm import SamplingParams

        for prompt, digest in wanted:
            try:
                tokens = self._tokens(prompt)
                room = self._most - len(tokens)
                if room < 1:
                    raise prompts.BadLine(
                        f"{len(tokens)} tokens, and MAX_MODEL_LEN is {self._most} with the answer"
                    )
                chosen = {**common, **prompt.sampling}
                if chosen.get("ignore_eos") and chosen.get("stop_token_ids") == self._ends:
                    # The model's own, which are its ends of text.
                    del chosen["stop_token_ids"]
                if isinstance(chosen["max_tokens"], int):
                    chosen["max_tokens"] = min(chosen["max_tokens"], room)
                sampling = SamplingParams(**chosen)
            # The template is the model's program, and says what it likes.
            except Exception as error:
                self.bad += 1
                _skip(prompt.line, " ".join(str(error).split())[:300], self.bad)
                continue
            yield (prompt, digest), tokens, sampling

    def _tokens(self, prompt: Prompt) -> list[int]:
        messages = list(prompt.messages)
        raw = prompt.url.endswith("/v1/completions") or (not prompt.url and not self._template)
        if not messages and raw:
            return list(self._tokenizer(prompt.text).input_ids)
        # As vLLM's server does it: the text first, for not every tokenizer returns a flat list.
        text = self._tokenizer.apply_chat_template(
            messages or [{"role": "user", "content": prompt.text}],
            tokenize=False,
            add_generation_prompt=True,
            **({"chat_template": self._own} if self._own else {}),
        )
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def main(argv: list[str] | None = None) -> int:
    """Answer every prompt that has no result yet; bad lines are told and skipped.

    Raises:
        SettingInvalid: nothing to answer, or the results there are of something else.
        StackError: what `serve` would be refused for.
    """
    output = report.claim_output()
    errors.end_on_sigterm()
    options = parser().parse_args(argv)
    settings = Settings.from_environ()
    where = snapshot.require(settings.models, settings.model_id, settings.model_revision)
    given = {name: getattr(options, name) for name in prompts.SAMPLING if hasattr(options, name)}
    given = {name: value for name, value in given.items() if value is not None}
    common = {**defaults(settings, where), **given}
    found, bad = _read(options, settings)
    if not found:
        raise errors.SettingInvalid("no prompt", "at least one good line", "see --help")
    with contextlib.ExitStack() as stack:
        path = options.finished
        if options.output != "-":
            path = path or Path(options.output)
            output = stack.enter_context(prompts.results(Path(options.output)))
        asked = [settings.model_id, snapshot.load(where).revision, not options.no_chat_template]
        wanted = _unfinished(found, common, json.dumps(asked), path)
        if len(wanted) < len(found):
            _say(f"{len(found) - len(wanted)} of {len(found)} prompts have their result already")
        bad += _answer(settings, options, wanted, common, output) if wanted else 0
    skipped = f", {bad} bad lines are skipped" if bad else ""
    _say(f"every good prompt has its result{skipped}")
    return 0


def _answer(
    settings: Settings,
    options: argparse.Namespace,
    wanted: list[tuple[Prompt, str]],
    common: dict[str, Any],
    output: TextIO,
) -> int:
    """Write a result for each prompt, and return how many could not be asked."""
    from tqdm import tqdm

    fitted, where = offline.prepare(settings)
    engine = offline.Engine(fitted, where)
    # vLLM's engine may have set its own.
    errors.end_on_sigterm()
    ends = defaults(settings, where).get("stop_token_ids")
    asker = _Asker(engine, settings, ends, not options.no_chat_template)
    tokens = 0
    live = sys.stderr.isatty()
    try:
        with tqdm(
            total=len(wanted),
            desc="generate",
            unit="prompt",
            mininterval=0.5 if live else 5,
            maxinterval=5,
            dynamic_ncols=live,
        ) as bar:
            for (prompt, digest), answer in engine.run(asker.ask(wanted, common)):
                first = answer.outputs[0]
                count = len(first.token_ids)
                line = prompts.record(
                    prompt,
                    digest,
                    settings.served_model_name,
                    first.text,
                    first.finish_reason,
                    first.stop_reason,
                    (len(answer.prompt_token_ids or ()), count),
                )
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
                output.flush()
                tokens += count
                rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update()
    finally:
        engine.close()
    return asker.bad


if __name__ == "__main__":
    errors.run(main)
