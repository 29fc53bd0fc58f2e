#!/bin/sh
# Runs the unpacked images on a host without Docker, as any user, and without a chroot:
#
#   run start | stop | status | logs | key add NAME | key list | key revoke NAME
#
# Settings are in the file `env` beside it; variables of the shell win.
set -eu

own=$(cd "$(dirname "$0")" && pwd)
root=$own/root
state=$own/state
python=$root/opt/venv/bin/python
pidfile=$state/supervise.pid

# The images' own loader and C library: the host's may be older.
loader=$root/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2
libraries=$root/usr/local/lib:$root/usr/lib/x86_64-linux-gnu

launcher() { # file, program
  mkdir -p "$(dirname "$1")"
  rm -f "$1"
  printf '#!/bin/sh\nexec "%s" --argv0 "%s" --library-path "%s" "%s" "$@"\n' \
    "$loader" "$1" "$libraries" "$2" > "$1"
  chmod 0755 "$1"
}

# Python starts every other Python by the name of its own file, so that this one stays.
prepare() {
  config=$root/opt/venv/pyvenv.cfg
  home=$(sed -n 's/^home = //p' "$config")
  launcher "$python" "$root$home/python3.11"
  for name in python3 python3.11; do ln -sf python "$root/opt/venv/bin/$name"; done
  sed -i "s#^home = .*#home = $root$home#" "$config"
  # As pip writes them where a path is too long for a first line of that kind.
  for file in "$root"/opt/venv/bin/*; do
    head -n 1 "$file" | grep -qa '^#!/opt/venv/bin/python' || continue
    {
      printf '%s\n' "#!/bin/sh" "'''exec' \"$python\" \"\$0\" \"\$@\"" "' '''"
      tail -n +2 "$file"
    } > "$file.new"
    chmod 0755 "$file.new"
    mv "$file.new" "$file"
  done
  launcher "$own/bin/haproxy" "$root/usr/sbin/haproxy"
  prepare_compiler
}

# Triton compiles at run time; the host's compiler is as good.
prepare_compiler() {
  if command -v gcc > /dev/null 2>&1 || [ ! -e "$root/usr/bin/gcc" ]; then return; fi
  mkdir -p "$own/lib"
  for stem in isl mpc mpfr gmp z zstd bfd opcodes ctf sframe jansson; do
    for file in "$root/usr/lib/x86_64-linux-gnu/lib$stem"[.-]*so*; do
      [ ! -e "$file" ] || ln -sf "$file" "$own/lib/"
    done
  done
  printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" --sysroot="%s" -B"%s" "$@"\n' \
    "$own/lib" "$root/usr/bin/gcc" "$root" "$root/usr/bin/" > "$own/bin/gcc"
  chmod 0755 "$own/bin/gcc"
}

settings() {
  while IFS= read -r line; do
    name=${line%%=*}
    case $line in \#* | "") continue ;; esac
    # What the shell has set wins.
    printenv "$name" > /dev/null || export "$name=${line#*=}"
  done < "$own/env"
  export MODELS_DIR="$state/models" CACHES_DIR="$state/caches" KEYS_DIR="$state/keys"
  export RUN_DIR="$state/run" METRICS_BIND_INSIDE="$state/run/metrics.sock"
  export REPLICA_HOST=127.0.0.1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
  export AGENT_PORT="${AGENT_PORT:-8090}" REPLICA_PORT="${REPLICA_PORT:-8001}"
  export PATH="$own/bin:$root/opt/venv/bin:$PATH"
  mkdir -p "$MODELS_DIR" "$CACHES_DIR" "$KEYS_DIR" "$state/log" "$RUN_DIR"
  # Only for this user: the settings may hold a key.
  chmod 0700 "$RUN_DIR"
  cd "$root/app"
}

# A pid file outlives a crash, and its number may be another process's by now.
runs() {
  [ -e "$pidfile" ] && grep -qa scripts.supervise "/proc/$(cat "$pidfile")/cmdline" 2> /dev/null
}

answers() {
  "$python" -m scripts.health > /dev/null 2>&1 && "$python" -c "
import os, ssl, urllib.request as u
scheme = 'https' if os.environ.get('TLS_CERT') else 'http'
host = {'0.0.0.0': '127.0.0.1'}.get(h := os.environ.get('HOST') or '127.0.0.1', h)
url = f'{scheme}://{host}:{os.environ.get(\"PORT\") or 8000}/health'
handlers = u.ProxyHandler({}), u.HTTPSHandler(context=ssl._create_unverified_context())
u.build_opener(*handlers).open(url, timeout=5)" 2> /dev/null
}

start() {
  settings
  runs && { echo "run: it runs already (pid $(cat "$pidfile"))"; return; }
  "$python" -m scripts.download
  setsid "$python" -m scripts.supervise --gateway --log "$state/log/vllm.log" \
    > "$state/log/supervise.log" 2>&1 < /dev/null &
  echo $! > "$pidfile"
  echo "run: starting vLLM; its log: $state/log/vllm.log"
  until answers; do
    runs || { tail -n 30 "$state/log/supervise.log" >&2; exit 12; }
    sleep 1
  done
  echo "run: ready at ${HOST:-127.0.0.1}:${PORT:-8000}"
}

stop() {
  runs || { echo "run: nothing runs"; return 0; }
  kill "$(cat "$pidfile")"
  while runs; do sleep 1; done
  rm -f "$pidfile"
  echo "run: stopped"
}

status() {
  settings
  runs || { echo "run: nothing runs"; exit 1; }
  "$python" -m scripts.health
}

case ${1:-} in
  prepare | start | stop | status) "$1" ;;
  logs) exec tail -n 100 -F "$state/log/vllm.log" "$state/log/supervise.log" ;;
  key) shift; settings; exec "$python" -m scripts.key "$@" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
