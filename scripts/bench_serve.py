"""Measure a served endpoint under load with vLLM's own client, one concurrency after another.

The prompts are random tokens, other ones at each concurrency: a server would have those of the one
before in its prefix cache. The next run has the same ones again, unless --seed is another.
"""

import argparse
import collections
import contextlib
import http.client
import ipaddress
import json
import os
import re
import shlex
import signal
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scripts import errors, report, snapshot, variants
from scripts.settings import Settings

# Older ones have no `vllm bench`, or one that cannot warm up (vllm-project/vllm#26943).
_LEAST_VLLM = "0.20"
# What an objective may be about, and in the table; all in milliseconds.
_OBJECTIVES = ("ttft", "tpot", "e2el")
_LATENCIES = ("ttft", "tpot", "itl")
_LOOK_SECONDS = 30
_END_SECONDS = 10
# Of an error's text; vLLM gives some of them as a whole traceback.
_LONGEST_ERROR = 200


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="bench-serve", description=__doc__.splitlines()[0])
    made.add_argument("--url", type=_url, help="by default where HOST and PORT say")
    made.add_argument(
        "--concurrency",
        type=_concurrencies,
        default=[1, 4, 16, 64],
        help="requests at once, with commas between (1,4,16,64)",
    )
    made.add_argument(
        "--num-prompts", type=_count, help="requests at each (4 times the concurrency, 16 at least)"
    )
    made.add_argument(
        "--num-warmups", type=int, help="requests before them (as many as the concurrency)"
    )
    made.add_argument("--input-len", type=_count, default=256, help="tokens of a prompt")
    made.add_argument("--output-len", type=_count, default=128, help="tokens of an answer")
    made.add_argument("--seed", type=int, default=2024, help="of the prompts; 0 to 99999")
    made.add_argument(
        "--slo",
        type=_objectives,
        default="ttft:1000,tpot:50",
        help="what a good request keeps to, in ms, of ttft, tpot and e2el (ttft:1000,tpot:50)",
    )
    made.add_argument(
        "--tokenizer", help="a folder, or the id of another model on the volume, to make prompts"
    )
    made.add_argument("--insecure", action="store_true", help="take any certificate")
    made.add_argument("--limit", type=float, default=3600, help="seconds that each may take")
    return made


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _concurrencies(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _objectives(text: str) -> dict[str, float]:
    found = {}
    for part in filter(None, text.replace(",", " ").split()):
        name, _, value = part.partition(":")
        if name not in _OBJECTIVES or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
            raise argparse.ArgumentTypeError(
                f"{part!r} is not like ttft:1000, tpot:50 or e2el:9000"
            )
        found[name] = float(value)
    return found


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise argparse.ArgumentTypeError("it must be like http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")


def _say(text: str) -> None:
    print(f"bench-serve: {text}", file=sys.stderr, flush=True)


def own_url(settings: Settings) -> str:
    """Return the URL of this host's own endpoint."""
    address = ipaddress.ip_address(settings.host)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{settings.port}"


def insecure(settings: Settings, url: str, asked: bool) -> bool:
    """Whether to take any certificate: of this host's own endpoint, or where that is asked for."""
    parts = urlsplit(url)
    own = parts.hostname in ("127.0.0.1", "::1", "localhost", settings.host)
    return parts.scheme == "https" and (asked or (own and bool(settings.tls_cert)))


def require_client(found: str | None) -> None:
    """Raise SettingInvalid when this vLLM (its version, None without one) cannot make the load."""
    if found is None or variants.number(found) < variants.number(_LEAST_VLLM):
        raise errors.SettingInvalid(
            f"vLLM {found} is here" if found else "there is no vLLM here",
            f"{_LEAST_VLLM} or newer, whose `vllm bench serve` makes the load",
            "BENCH_VARIANT=cpu, which is the default; it measures an endpoint of any variant",
        )


def look(url: str, key: str, any_certificate: bool = False) -> dict[str, int]:
    """Return the models that an endpoint offers, and the most tokens of each (0: it does not say).

    Raises:
        SettingInvalid: it wants a key, or another one.
        ServeFailed: it does not answer, or not as an endpoint does.
    """
    if not re.fullmatch(r"[!-~]*", key):
        # Not shown, for it may be a key with something behind it.
        raise errors.SettingInvalid(
            "OPENAI_API_KEY has blanks or foreign characters", "a key", "correct OPENAI_API_KEY"
        )
    request = urllib.request.Request(f"{url}/v1/models")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    context = ssl._create_unverified_context() if any_certificate else None
    opener = urllib.request.build_opener(
        # A proxy would be measured along with the endpoint.
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=context),
    )
    try:
        with opener.open(request, timeout=_LOOK_SECONDS) as answer:
            offered = json.load(answer)["data"]
            return {model["id"]: model.get("max_model_len") or 0 for model in offered}
    except urllib.error.HTTPError as error:
        raise _refused(url, error, key) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        trust = isinstance(reason, ssl.SSLCertVerificationError)
        raise errors.ServeFailed(
            f"{url} does not answer: {reason}",
            "an endpoint that is up",
            "--insecure, if you know whose certificate that is"
            if trust
            else "make up (docker compose up -d --wait); or name the one meant: --url"
            " (make bench-serve URL=…), or HOST, PORT and TLS_CERT in .env",
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise errors.ServeFailed(
            f"{url}/v1/models is no list of models: {error!r}",
            "an OpenAI-compatible endpoint",
            "give its base URL, such as http://127.0.0.1:8000",
        ) from None


def _refused(url: str, error: urllib.error.HTTPError, key: str) -> errors.StackError:
    with contextlib.suppress(Exception):
        told = json.loads(error.read(10_000))["error"]["message"]
        error.msg = f"{error.msg}: {told}"
    if error.code == 401:
        return errors.SettingInvalid(
            f"{url} does not know the key in OPENAI_API_KEY" if key else f"{url} wants a key",
            "a key of this endpoint",
            "OPENAI_API_KEY=sk-… in .env or the shell (make key NAME=bench makes one)",
        )
    return errors.ServeFailed(
        f"{url}/v1/models answers {error.code} {error.msg[:_LONGEST_ERROR]}",
        "a list of models",
        "wait until KEY_RATE lets it in again"
        if error.code == 429
        else "wait until the endpoint is ready (make status, make logs), or give another --url",
    )


def require_model(offered: dict[str, int], name: str, tokens: int) -> None:
    """Raise SettingInvalid when the model is not offered, or is too small for a request."""
    if name not in offered:
        raise errors.SettingInvalid(
            f"the endpoint offers {', '.join(offered) or 'nothing'}",
            f"the model {name}",
            f"SERVED_MODEL_NAME={next(iter(offered), '…')}",
        )
    if 0 < offered[name] < tokens:
        raise errors.SettingInvalid(
            f"{tokens} tokens of prompt and answer",
            f"{offered[name]} at most, the endpoint's MAX_MODEL_LEN",
            "smaller --input-len and --output-len",
        )


def environment(folder: Path) -> dict[str, str]:
    """Return what the client needs: caches in a folder of its own, no hub, no proxy."""
    caches = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TIKTOKEN_CACHE_DIR")
    caches += ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {
        **{name: str(folder / "caches") for name in caches},
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }


def _folder(settings: Settings, given: str | None) -> Path:
    """Return the folder of the tokenizer: the model's own, or the one asked for."""
    if not given:
        return snapshot.require(settings.models, settings.model_id, settings.model_revision)
    for where in (Path(given), snapshot.folder(settings.models, given)):
        if where.is_dir():
            return where
    raise errors.SettingInvalid(
        f"--tokenizer {given}",
        f"a folder, or the id of a model in {settings.models}",
        "run `make models`, which lists them",
    )


def tokenizer(settings: Settings, where: Path, folder: Path) -> Path:
    """Return a folder whose tokenizer works here: `where`, or one that is made in `folder`.

    GLM-4's own tokenizer is code for transformers before 4.45. Its vocabulary is of the form of
    tiktoken, and makes the same tokens without that code.

    Raises:
        SettingInvalid: neither of the two works.
    """
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(where, trust_remote_code=settings.trust_remote_code)
        own.encode("你好", add_special_tokens=False)
    # It may be the model's code.
    except Exception as error:
        why = " ".join(str(error).split())[:_LONGEST_ERROR] or type(error).__name__
    else:
        return where
    try:
        made = _converted(where, folder)
    except Exception as error:
        raise errors.SettingInvalid(
            f"the tokenizer in {where} does not work here: {why}",
            "a tokenizer that this transformers can use; its vocabulary alone would do, and cannot"
            f" be read either: {error}",
            "--tokenizer with another model of the volume: the prompts are random anyway",
        ) from error
    _say(f"the model's own tokenizer fails here ({why}); its vocabulary is used without its code")
    return made


def _converted(where: Path, folder: Path) -> Path:
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    config = json.loads((where / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = config.get("added_tokens_decoder", {})
    special = [added[number]["content"] for number in sorted(added, key=int)]
    converter = TikTokenConverter(str(where / "tokenizer.model"), extra_special_tokens=special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), extra_special_tokens=special
    )
    target = folder / "tokenizer"
    made.save_pretrained(target)
    # vLLM looks for a model there, and again after two seconds.
    kind = json.loads((where / "config.json").read_text(encoding="utf-8"))["model_type"]
    (target / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    return target


def command(
    settings: Settings,
    options: argparse.Namespace,
    url: str,
    tokens: Path,
    concurrency: int,
    result: Path,
) -> list[str]:
    """Return vLLM's command line for one concurrency, which writes the file `result`.

    The key is not in it: the client reads OPENAI_API_KEY, and every process sees arguments.
    """
    prompts = options.num_prompts or max(4 * concurrency, 16)
    warmups = concurrency if options.num_warmups is None else options.num_warmups
    made = [str(Path(sys.executable).with_name("vllm")), "bench", "serve"]
    made += ["--backend", "openai", "--endpoint", "/v1/completions", "--base-url", url]
    made += ["--model", settings.served_model_name, "--tokenizer", str(tokens)]
    made += ["--trust-remote-code"] if settings.trust_remote_code else []
    made += ["--insecure"] if insecure(settings, url, options.insecure) else []
    made += ["--dataset-name", "random", "--seed", str(options.seed * 10_000 + concurrency)]
    made += ["--random-input-len", str(options.input_len)]
    made += ["--random-output-len", str(options.output_len)]
    # Every answer has all its tokens, and they are the same ones at every concurrency.
    made += ["--ignore-eos", "--temperature", "0"]
    made += ["--num-prompts", str(prompts), "--num-warmups", str(warmups)]
    made += ["--max-concurrency", str(concurrency)]
    made += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"]
    if options.slo:
        made += ["--goodput", *(f"{name}:{value:g}" for name, value in options.slo.items())]
    # In detail, for the errors are among the details.
    made += ["--save-result", "--save-detailed"]
    return [*made, "--result-dir", str(result.parent), "--result-filename", result.name]


def run(words: list[str], limit: float) -> None:
    """Run the client, which prints onto standard error.

    Raises:
        ServeFailed: it ended with an error, or took longer than `limit` seconds.
    """
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        # Ctrl-C in a terminal must not reach it by two ways.
        start_new_session=True,
    )
    why = ""
    try:
        if code := process.wait(timeout=limit):
            why = f"ended with code {code}"
    except subprocess.TimeoutExpired:
        why = f"took longer than {limit:g} s"
    finally:
        _end_group(process)
    if why:
        raise errors.ServeFailed(
            f"`vllm bench serve` {why}",
            "a measurement",
            "read its own words above; --limit gives it more time",
        )


def _end_group(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_END_SECONDS)


def level(result: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's own result without its lists of requests, and with its errors counted."""
    texts = [str(text).strip() for text in result.get("errors") or ()]
    lines = [text.splitlines()[-1][:_LONGEST_ERROR] for text in texts if text]
    short = {name: value for name, value in result.items() if not isinstance(value, list | dict)}
    short.setdefault("failed", result["num_prompts"] - result["completed"])
    return {**short, "errors": dict(collections.Counter(lines).most_common())}


def table(found: dict[str, Any]) -> str:
    """Return a document as a table for people, with what became of what failed."""
    rows = []
    for one in found["levels"]:
        answered = bool(one["completed"])

        def number(name: str, one: dict = one, answered: bool = answered) -> str:
            # Where nothing was answered vLLM writes 0.
            value = one.get(name)
            return f"{value:.2f}" if answered and value is not None else "–"

        times = [
            " / ".join(number(f"{part}_{name}_ms") for part in ("mean", "p50", "p99"))
            for name in _LATENCIES
        ]
        rows.append(
            [
                one["max_concurrency"],
                *(number(f"{name}_throughput") for name in ("request", "output", "total_token")),
                *times,
                number("request_goodput"),
                f"{one['failed']} of {one['num_prompts']}",
            ]
        )
    head = ["at once", "requests/s", "output tokens/s", "tokens/s, in and out"]
    head += [f"{name.upper()} in ms: mean / p50 / p99" for name in _LATENCIES]
    slo = ", ".join(f"{name} ≤ {value:g} ms" for name, value in found["slo"].items())
    lines = [
        f"{found['served_model_name']} at {found['url']}, load from {report.title(found)}",
        report.table([*head, "goodput/s", "failed"], rows),
    ]
    lines += [f"goodput: requests/s with {slo}"] if slo else []
    for one in found["levels"]:
        lines += [
            f"{count} failed at {one['max_concurrency']} at once: {text}"
            for text, count in one["errors"].items()
        ]
    return "\n".join(lines)


def require_answers(levels: Sequence[dict[str, Any]]) -> None:
    """Raise StackError when not one request of a level was answered."""
    lost = [one for one in levels if not one["completed"]]
    if lost:
        raise errors.StackError(
            "; ".join(
                f"at {one['max_concurrency']} at once no request was answered"
                f" ({next(iter(one['errors']), 'no reason given')})"
                for one in lost
            ),
            "an endpoint that answers under this load",
            "lower --concurrency, or raise what bounds it in .env: KEY_RATE, KEY_CONCURRENCY,"
            " QUEUE_LENGTH, QUEUE_SECONDS (README.md); then read its log: make logs",
        )


def _measure_all(
    options: argparse.Namespace, words: Callable[[int, Path], list[str]], folder: Path
) -> tuple[list[dict[str, Any]], errors.StackError | None]:
    """Return the levels, and the error that ended them early: what was measured is not lost."""
    levels: list[dict[str, Any]] = []
    for concurrency in options.concurrency:
        result = folder / f"{concurrency}.json"
        _say(f"{concurrency} at once")
        try:
            run(words(concurrency, result), options.limit)
        except errors.StackError as error:
            return levels, error
        levels.append(level(json.loads(result.read_text(encoding="utf-8"))))
    return levels, None


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write the document to standard output.

    Raises:
        SettingInvalid: no vLLM that can do it, a key, model or tokenizer that does not fit.
        ServeFailed: the endpoint or the client failed.
        StackError: not one request of a level was answered.
    """
    output = report.claim_output()
    errors.end_on_sigterm()
    options = parser().parse_args(argv)
    settings = Settings.from_environ()
    require_client(report.versions().get("vllm"))
    url = options.url or own_url(settings)
    key = os.environ.get("OPENAI_API_KEY", "")
    offered = look(url, key, insecure(settings, url, options.insecure))
    require_model(offered, settings.served_model_name, options.input_len + options.output_len)
    where = _folder(settings, options.tokenizer)
    with tempfile.TemporaryDirectory(prefix="bench-serve-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ.update(environment(folder))
        tokens = tokenizer(settings, where, folder)
        levels, failure = _measure_all(
            options,
            lambda concurrency, result: command(
                settings, options, url, tokens, concurrency, result
            ),
            folder,
        )
    if failure and not levels:
        raise failure
    document = report.document(
        "bench-serve",
        settings,
        command=shlex.join(["python", "-m", "scripts.bench_serve", *(argv or sys.argv[1:])]),
        url=url,
        served_model_name=settings.served_model_name,
        slo=options.slo,
        tokenizer={"folder": str(where), "without_its_code": tokens != where},
        settings={name: getattr(options, name) for name in ("input_len", "output_len", "seed")},
        levels=levels,
    )
    print(table(document), file=sys.stderr, flush=True)
    report.write(output, document)
    if failure:
        raise failure
    require_answers(levels)
    return 0


if __name__ == "__main__":
    errors.run(main)
