#!/bin/sh
# Installs what lies beside it on this host and starts it, without any network:
#
#   ./install.sh              into this host's Docker engine
#   ./install.sh --host DIR   into a folder, for a host without one (a bundle made with RUNTIME=host)
#   ./install.sh --check      only compares every file with its checksum
#
# It may be run again at any time: what is there already stays.
set -eu

say() { echo "install: $*"; }

fail() { # code, found, needed, to do
  printf 'error: %s\n  needed: %s\n  to do:  %s\n' "$2" "$3" "$4" >&2
  exit "$1"
}

has() { command -v "$1" > /dev/null 2>&1; }

# A cut list of sums would pass for a whole one.
check_sums() {
  has sha256sum || fail 10 "sha256sum is not there" "it, to check the files" "install coreutils"
  say "checking $(du -shL . | cut -f1) against SHA256SUMS"
  tail -n 1 SHA256SUMS 2> /dev/null | grep -q '^# complete$' \
    || fail 6 "SHA256SUMS is cut off or missing" "the whole folder" "copy it again"
  bad=$(grep -v '^#' SHA256SUMS | LC_ALL=C sha256sum --check --quiet 2> /dev/null) || {
    fail 6 "these files are not as they were packed: $(echo "$bad" \
      | sed -n 's/: FAILED.*//p' | tr '\n' ' ')" \
      "every file as SHA256SUMS has it" "copy them again, and run ./install.sh again"
  }
  say "every file is as it was packed"
}

check_room() { # folder, what for
  free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000) }')
  needed=$(cat NEEDS_MB)
  [ "$free" -ge "$needed" ] \
    || fail 7 "$free MB free in $1" "$needed MB for $2" "make room there, and run this again"
}

make_env() {
  # Yours from then on: it is no part of the checked files.
  [ -e .env ] || cp bundle.env .env
}

into_docker() {
  [ -e images.tar.zst ] || fail 2 "this bundle has no images for Docker" \
    "one made without RUNTIME=host" "./install.sh --host DIR"
  docker info > /dev/null 2>&1 || fail 9 "no Docker engine answers" \
    "a running one that this user may use" "start Docker, or run this as root"
  docker compose version > /dev/null 2>&1 || fail 9 "Docker has no compose" \
    "its plugin" "install docker-compose-plugin"
  runtime=$(sed -n 's/^CONTAINER_RUNTIME=//p' .env)
  runtime=${CONTAINER_RUNTIME:-${runtime:-nvidia}}
  docker info --format '{{range $name, $_ := .Runtimes}}{{$name}} {{end}}' \
    | grep -qw -- "$runtime" || fail 10 "the engine has no runtime $runtime" \
    "the NVIDIA Container Toolkit" "install nvidia-container-toolkit, and run \`nvidia-ctk runtime \
configure --runtime=docker\`; restart Docker"
  # What the bundle is made of is no setting of this shell's, which would win over .env.
  unset IMAGE VERSION VARIANT SERVE_IMAGE DOWNLOAD_IMAGE GATEWAY_IMAGE MODEL MODEL_ID \
    MODEL_REVISION MODEL_SOURCES MODEL_FOLDER
  load_images
  say "bringing the model onto its volume"
  docker compose run --rm --no-deps --no-TTY --pull never download
  say "starting"
  docker compose up --detach --wait --no-build --pull never
  say "ready: http://$(docker compose port gateway 8000)/v1"
}

load_images() {
  missing=
  while read -r name id; do
    there=$(docker image inspect --format '{{.Id}}' "$name" 2> /dev/null) || there=
    [ "$there" = "$id" ] || missing="$missing $name"
  done < IMAGES
  [ -n "$missing" ] || { say "the images are there"; return; }
  check_room "$(docker info --format '{{.DockerRootDir}}')" "the images and the model"
  say "loading$missing"
  docker load --quiet --input images.tar.zst
}

into_folder() {
  [ -e root.tar.zst ] || fail 2 "this bundle has nothing for a host without Docker" \
    "one made with RUNTIME=host" "make bundle RUNTIME=host CUDA=…"
  [ "$(uname -m)" = x86_64 ] || fail 10 "this host is $(uname -m)" "x86_64" "use another host"
  for tool in tar zstd; do
    has "$tool" || fail 10 "$tool is not there" "it, to unpack" "apt-get install $tool"
  done
  # supervisord splits its commands at spaces.
  case $1 in *[!A-Za-z0-9._/+-]*)
    fail 2 "the folder's name is $1" "one of letters, digits, . _ + and -" "choose another" ;;
  esac
  mkdir -p "$1"
  folder=$(cd "$1" && pwd)
  if [ "$(cat "$folder/installed" 2> /dev/null)" != "$(grep root.tar.zst SHA256SUMS)" ]; then
    check_room "$folder" "the programs and the model"
    [ ! -x "$folder/run" ] || "$folder/run" stop
    say "unpacking into $folder"
    rm -rf "$folder/root.part" "$folder/root"
    mkdir "$folder/root.part"
    zstd --quiet --decompress --stdout root.tar.zst \
      | tar --extract --no-same-owner --directory "$folder/root.part"
    mv "$folder/root.part" "$folder/root"
    cp run.sh "$folder/run"
    chmod 0755 "$folder/run"
    "$folder/run" prepare
    grep root.tar.zst SHA256SUMS > "$folder/installed"
  fi
  [ -e "$folder/env" ] || cp bundle.env "$folder/env"
  MODEL_FOLDER=$PWD/model "$folder/run" start
}

main() {
  cd "$(dirname "$0")"
  case ${1:-} in
    "") check_sums && make_env && into_docker ;;
    --check) check_sums ;;
    --host)
      [ -n "${2:-}" ] || fail 2 "--host without a folder" "one" "./install.sh --host DIR"
      target=$2
      case $target in /*) ;; *) target=$OLDPWD/$target ;; esac
      check_sums && into_folder "$target"
      ;;
    *) sed -n '2,8s/^# \{0,1\}//p' install.sh; exit 2 ;;
  esac
}

# Last, so that a cut copy of this file does nothing.
main "$@"
