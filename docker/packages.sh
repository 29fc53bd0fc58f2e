# Install the Debian packages named on standard input; where a compiler is among them, see to the
# headers of this image's Python too. Variables: DEBIAN_MIRROR, scheme and host of a mirror.
set -eu
packages=$(cat)
if [ -n "${DEBIAN_MIRROR:-}" ]; then
  # A mirror takes the host's place in apt's own sources.
  find /etc/apt -name '*.list' -o -name '*.sources' | xargs sed -i -E \
    "s#https?://[^/ ]+/#${DEBIAN_MIRROR%/}/#"
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -q -y --no-install-recommends "$@"; }
apt-get update -q || {
  echo "error: Debian's packages cannot be fetched; DEBIAN_MIRROR names a mirror" >&2
  exit 1
}
# shellcheck disable=SC2086
install $packages
if command -v gcc > /dev/null; then
  headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
  # Official Python images have them, a base image of Debian's packages has not.
  [ -e "$headers/Python.h" ] || install libpython3-dev
  # Static libraries, and what only -flto and -fsanitize would call.
  find /usr/lib -name '*.a' -not -name 'libgcc*.a' -not -name 'libc_nonshared.a' -delete
  find /usr/lib/gcc -name 'lto1' -delete
  find /usr/lib /usr/libexec -regex '.*/lib\(a\|t\|l\|ub\|hwa\)san.*' -delete
fi
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /usr/share/doc/* /usr/share/man/*
