"""Bring the stack up on this host, down again, and show how it is."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dotenv import dotenv_values

from scripts import (
    compose,
    doctor,
    errors,
    fit,
    gpu,
    host,
    plan,
    presets,
    prompts,
    snapshot,
    variants,
)
from scripts.compose import ComposeRuntime
from scripts.host import HostRuntime
from scripts.plan import Plan
from scripts.settings import DEFAULT_MODEL

# Loading 18 GB from a slow disk takes minutes; a server that needs longer has a problem.
_READY_SECONDS = 1800
_SAY_EVERY = 5.0


def _say(text: str) -> None:
    print(f"up: {text}", flush=True)


def up(chosen: Plan) -> int:
    """Check, build, download, start, and wait until the endpoint answers."""
    began = time.monotonic()
    for reason in chosen.reasons:
        _say(reason)
    doctor.require(chosen)
    runtime = doctor.runtime_of(chosen)
    _say("checks passed; building")
    runtime.build()
    _say("downloading")
    runtime.download()
    _say("starting vLLM")
    runtime.start()
    _wait(runtime)
    runtime.open()
    _wait(runtime)
    _say(f"ready after {time.monotonic() - began:.0f} s")
    name = chosen.settings.served_model_name
    auth = "-H 'Authorization: Bearer <key>' " if chosen.settings.open_to_others else ""
    print(
        f"""
  endpoint  {chosen.endpoint}/v1   (OpenAI-compatible, model {name})
  try       curl {chosen.endpoint}/v1/chat/completions -H 'Content-Type: application/json' {auth}\\
              -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "你好"}}]}}'
  logs      {runtime.logs_hint()}
  stop      make down
"""
    )
    return 0


def _wait(runtime: ComposeRuntime | HostRuntime) -> None:
    """Wait for readiness, showing the server's last log line now and then.

    Raises:
        ServeFailed: the server ended, or was not ready in time.
    """
    began = said = time.monotonic()
    while True:
        name, detail = runtime.state()
        now = time.monotonic()
        if name == "ready":
            return
        late = now - began > _READY_SECONDS
        if name == "ended" or late:
            raise errors.ServeFailed(
                f"the server is not ready ({detail}) after {now - began:.0f} s; its last lines:\n"
                + runtime.tail(40),
                "a vLLM that answers",
                f"look for vLLM's own error above; the whole log: {runtime.logs_hint()}",
            )
        if now - said >= _SAY_EVERY:
            said = now
            last = (runtime.tail(1).splitlines() or [""])[-1]
            _say(f"{now - began:3.0f} s  {detail}  {last[:100]}")
        time.sleep(1)


def build(chosen: Plan) -> int:
    """Build what the plan runs."""
    runtime = doctor.runtime_of(chosen)
    runtime.check_tools()
    runtime.check_room()
    runtime.build()
    return 0


def build_all(runtime: str) -> int:
    """Build every variant, each in a process of its own; go on when one cannot be built."""
    known = list(variants.load().values())
    failed = []
    for variant in known:
        print(f"build: {variant.name}", flush=True)
        command = [sys.executable, "-m", "scripts.stack", "build", "--cuda", variant.short]
        command += ["--runtime", runtime] if runtime else []
        if subprocess.run(command).returncode:
            failed.append(variant.name)
    if failed:
        raise errors.BuildFailed(
            f"{', '.join(failed)} could not be built, {len(known) - len(failed)} others were",
            "the hosts that their lock files name",
            "read each one's own error above",
        )
    return 0


def download(chosen: Plan) -> int:
    """Bring the model."""
    runtime = doctor.runtime_of(chosen)
    runtime.build()
    runtime.download()
    return 0


def generate(chosen: Plan, given: str, output: str, words: list[str]) -> int:
    """Answer the prompts of a file into a file, or those of `words` onto the terminal."""
    runtime = _ready(chosen)
    if not given:
        return runtime.tool("generate", *words)
    source = Path(given)
    target = Path(output) if output else source.with_suffix(".results.jsonl")
    if not source.is_file():
        raise errors.SettingInvalid(f"INPUT={given}", "a file of prompts", "see README.md")
    with prompts.results(target) as results, source.open("rb") as stdin:
        shown = {"--finished": target}
        code = runtime.tool("generate", *words, shown=shown, stdin=stdin, stdout=results)
        if code:
            # Not to be put in order yet: the next run goes on here.
            raise SystemExit(code)
    print(f"generate: the results are in {target}", flush=True)
    return 0


def measure(chosen: Plan, service: str, words: list[str]) -> int:
    """Run a measurement; keep its document, and draw it, in the folder `results`."""
    from scripts import chart

    if service == "bench-serve":
        url = next((runtime.url() for runtime in _running("", "")), chosen.endpoint)
        words = words if "--url" in words else [*words, "--url", url]
        runtime = doctor.runtime_of(_client(chosen))
        runtime.build()
    else:
        runtime = _ready(chosen)
    folder = plan.ROOT / "results"
    folder.mkdir(exist_ok=True)
    when = time.strftime("%Y%m%d-%H%M%S")
    path = folder / f"{service}-{chosen.variant.name}-{when}.json"
    with path.open("w", encoding="utf-8") as stream:
        code = runtime.tool(service, *words, stdout=stream)
    if not path.stat().st_size:
        path.unlink()
        return code or 1
    picture = path.with_suffix(".png")
    chart.draw(json.loads(path.read_text(encoding="utf-8")), picture)
    shown = " and ".join(str(file.relative_to(plan.ROOT)) for file in (path, picture))
    print(f"{service}: {shown} have it", flush=True)
    return code


def _client(chosen: Plan) -> Plan:
    """Return the plan whose vLLM can make load: the variant's own from 0.20 on, or cpu's."""
    variant = chosen.variant
    if variants.number(variant.vllm) < variants.number("0.20"):
        _say(f"vLLM {variant.vllm} has no client for load; cpu's is used")
        os.environ["MODEL_ID"] = chosen.settings.model_id
        chosen = plan.make("cpu", chosen.runtime)
    chosen.environ["BENCH_VARIANT"] = chosen.variant.name
    return chosen


def _ready(chosen: Plan) -> ComposeRuntime | HostRuntime:
    """Return the runtime with its images and the model, for a one-shot."""
    runtime = doctor.runtime_of(chosen)
    runtime.check_tools()
    runtime.build()
    runtime.download()
    return runtime


def models(chosen: Plan, remove: str) -> int:
    """List the models of the volume, or remove one."""
    print(
        doctor.runtime_of(chosen).job("models", *(["--remove", remove] if remove else [])), end=""
    )
    return 0


def pin(chosen: Plan) -> int:
    """Write the manifest of the model on the volume to where the next download looks for it."""
    manifest = doctor.runtime_of(chosen).job("models", "--pin")
    path = snapshot.pin(chosen.settings.model_id)
    path.write_text(manifest, encoding="utf-8")
    print(f"pinned in {path.relative_to(plan.ROOT)}; downloads must match it from now on")
    return 0


def show_fit(chosen: Plan, card: str) -> int:
    """Print how much context fits, with the sum, on a card by its name or on this host's."""
    if card:
        memory, capability = presets.card(card)
        gpus = [gpu.Gpu(0, card, capability, memory, memory)]
    else:
        gpus = gpu.require(chosen.settings)
    shape, weights = _shape(chosen)
    _, lines = fit.resolve(chosen.settings, gpus, shape, weights)
    print(f"{chosen.settings.model_id} on {gpus[0] if gpus else 'a CPU'}, {chosen.variant.name}:")
    print("\n".join(lines))
    return 0


def configure(chosen: Plan) -> int:
    """Write what was chosen into .env, with a comment each; a line that is there stays."""
    path = plan.ROOT / ".env"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    there = dotenv_values(path) if path.exists() else {}
    reasons = iter(chosen.reasons)
    wanted = {"VARIANT": (chosen.variant.name, next(reasons))}
    if not chosen.variant.cuda:
        wanted["CONTAINER_RUNTIME"] = ("runc", "a CPU needs no other")
    if chosen.rehearsal:
        for name, value in dotenv_values(plan.REHEARSAL).items():
            wanted.setdefault(name, (value, "of rehearsal.env"))
    else:
        for name in ("MODEL_ID", "SERVED_MODEL_NAME", "PORT"):
            wanted[name] = (
                str(getattr(chosen.settings, name.lower())),
                "as `make up` would run it",
            )
    added = {name: pair for name, pair in wanted.items() if name not in there}
    lines = [f"# {why}\n{name}={value}\n" for name, (value, why) in added.items()]
    if text and not text.endswith("\n"):
        text += "\n"
    path.write_text(text + "".join(lines), encoding="utf-8")
    print(f"wrote {', '.join(added) or 'nothing new'} to {path.name}; what was there stays")
    return 0


def key(chosen: Plan, arguments: list[str]) -> int:
    """Create, list or revoke keys."""
    return doctor.runtime_of(chosen).key(*arguments)


def tls(chosen: Plan) -> int:
    """Make a certificate that this host signs itself, unless there is one, and say how to use it.

    Raises:
        HostUnfit: there is no openssl.
    """
    folder = plan.ROOT / ".state" / "tls"
    certificate, private = folder / "cert.pem", folder / "key.pem"
    names = ["localhost", *chosen.settings.allowed_hosts]
    subject = [f"DNS:{name}" for name in names] + ["IP:127.0.0.1"]
    if chosen.settings.host not in ("127.0.0.1", "0.0.0.0", "::"):
        subject.append(f"IP:{chosen.settings.host}")
    if not certificate.exists():
        # The folder keeps other users out; the file is readable, for the gateway is another user.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
        command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "825", "-subj"]
        command += [f"/CN={names[-1]}", "-addext", f"subjectAltName={','.join(subject)}"]
        command += ["-keyout", str(private), "-out", str(certificate)]
        if not shutil.which("openssl"):
            raise errors.HostUnfit("openssl is not installed", "it", "apt-get install openssl")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise errors.StackError(done.stderr.strip(), "a certificate", "see openssl's words")
        private.chmod(0o644)
    show = ["openssl", "x509", "-in", str(certificate), "-noout", "-fingerprint", "-sha256"]
    subprocess.run([*show, "-enddate", "-ext", "subjectAltName"], timeout=60)
    where = folder.relative_to(plan.ROOT)
    print(
        f"TLS_CERT=./{where}/cert.pem and TLS_KEY=./{where}/key.pem in .env turn TLS on;"
        f" clients trust it by curl --cacert {where}/cert.pem"
    )
    return 0


def _shape(chosen: Plan) -> tuple[fit.Shape, int]:
    """Return the model's shape and bytes of weights: the preset's, or what the volume has."""
    preset = presets.of(chosen.settings.model_id)
    if not preset:
        known = json.loads(doctor.runtime_of(chosen).job("models", "--config"))
        return fit.Shape.parse(known["config"]), known["weights"]
    return fit.Shape.parse(preset.config), preset.weights


def _running(cuda: str, wanted: str) -> list[ComposeRuntime | HostRuntime]:
    """Return the runtimes that have something of ours, or the one asked for."""
    found = []
    if wanted == "docker" or (not wanted and compose.is_up()):
        found.append(ComposeRuntime(plan.make(cuda, "docker")))
    if wanted == "host" or (not wanted and host.supervisord()):
        # Not what .env says by now: what the server that runs was told.
        os.environ.update(host.started_with())
        found.append(HostRuntime(plan.make(cuda, "host")))
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=[*PREPARING, *ONE_SHOTS, *RUNNING])
    parser.add_argument("arguments", nargs="*", help="of key, generate and the benches")
    parser.add_argument("--cuda", default="", help="118, 121, 130, cpu, or all (build)")
    parser.add_argument("--runtime", default="", help="docker or host; by default what is there")
    parser.add_argument("--gpu", default="", help="a card by its name, such as rtx3090 (fit)")
    parser.add_argument("--remove", default="", help="the model to remove (models)")
    parser.add_argument("--input", default="", help="a file of prompts (generate)")
    parser.add_argument("--output", default="", help="a file of results (generate)")
    options = parser.parse_args(argv)

    if options.command == "fit":
        cuda = options.cuda
        if options.gpu and not cuda:
            # As with the newest driver: the card is somewhere else.
            fitting = variants.fitting("999", [presets.card(options.gpu)[1]])
            cuda = fitting[0].short if fitting else ""
            os.environ.setdefault("MODEL", DEFAULT_MODEL)
        return show_fit(plan.make(cuda, options.runtime), options.gpu)
    if options.command == "key":
        return key(plan.make(options.cuda, options.runtime), options.arguments or ["list"])
    if options.command == "models":
        return models(plan.make(options.cuda, options.runtime), options.remove)
    if options.command == "generate":
        chosen = plan.make(options.cuda, options.runtime)
        return generate(chosen, options.input, options.output, options.arguments)
    if options.command in MEASUREMENTS:
        chosen = plan.make(options.cuda, options.runtime)
        return measure(chosen, options.command, options.arguments)
    if options.command == "build" and options.cuda == "all":
        return build_all(options.runtime)
    if options.command in PREPARING:
        return PREPARING[options.command](plan.make(options.cuda, options.runtime))
    running = _running(options.cuda, options.runtime)
    if not running:
        print("nothing runs; `make up` starts it", file=sys.stderr)
        return 0 if options.command == "down" else 1
    return max(RUNNING[options.command](runtime) or 0 for runtime in running)


PREPARING = {
    "up": up,
    "build": build,
    "download": download,
    "pin": pin,
    "configure": configure,
    "tls": tls,
}
MEASUREMENTS = ("bench", "bench-serve", "bench-start")
ONE_SHOTS = ("models", "fit", "key", "generate", *MEASUREMENTS)
RUNNING = {
    "down": lambda runtime: runtime.stop(),
    "restart": lambda runtime: runtime.restart(),
    "status": lambda runtime: runtime.status(),
    "logs": lambda runtime: runtime.logs(),
    "url": lambda runtime: print(runtime.url()),
}


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    errors.run(main)
