#!/usr/bin/env bash
# Installs everything that building and running incubate needs, except Rust. It is quick if nothing is missing, and safe to run
# again.
#   tools/setup.sh [--tests] [--print]     --tests also installs what only the tests and the linters need: Slurm, munge, python3,
#                                          pgrep, cargo-nextest, shellcheck, ruff
#                                          --print shows every command that would install something, without running it
# If you already have libtorch, MPI or HDF5, for example from Spack or modules, set their paths. Then they are not installed:
#   LIBTORCH=/path/to/libtorch-2.11.0   MPICC=/path/to/mpicc   HDF5_DIR=/path/to/hdf5
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.11.0
RUST=1.89
# The newest cargo-nextest that Rust 1.89 builds.
NEXTEST=0.9.110
RUFF=0.17.6
cache=${INCUBATE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/incubate}
torch_home=$cache/libtorch-$TORCH
print=false tests=false
for argument in "$@"; do
  case "$argument" in
    --print) print=true ;;
    --tests) tests=true ;;
    *) echo "usage: tools/setup.sh [--tests] [--print]" >&2; exit 2 ;;
  esac
done

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }
run() { if $print; then printf '%q ' "$@"; echo; else "$@"; fi; }
there() { local glob; for glob in "$@"; do compgen -G "$glob" >/dev/null && return; done; false; }
have() { command -v "$1" >/dev/null 2>&1; }

# This script does not install Rust.
have cargo || [ ! -x "$HOME/.cargo/bin/cargo" ] || PATH=$HOME/.cargo/bin:$PATH
have cargo || fail "Rust is missing. Install it with rustup (https://rustup.rs), at least $RUST, and start again."
rust=$(rustc --version | cut -d' ' -f2)
[ "$(printf '%s\n' "$RUST" "${rust%%-*}" | sort -V | head -n 1)" = "$RUST" ] ||
  fail "Rust $rust is older than $RUST. Run: rustup update stable"

# Collects the missing packages of Debian and Ubuntu.
packages=()
need() { packages+=("$@"); }
have g++ || need g++
have pkg-config || need pkg-config
# libjpeg-turbo is built from source, including its assembly.
have cmake || need cmake
have nasm || need nasm
# The MPI bindings are generated with libclang.
# (libclang-cpp, which other packages install, is a different library.)
[ -n "${LIBCLANG_PATH:-}" ] || there /usr/lib{/llvm-*/lib,64,,/*-linux-gnu}/libclang{,-[0-9]*}.so* ||
  need libclang-dev clang
[ -n "${MPICC:-}" ] || have mpicc || need libopenmpi-dev
[ -n "${MPICC:-}" ] || have mpirun || need openmpi-bin
[ -n "${HDF5_DIR:-}" ] || pkg-config --exists hdf5 2>/dev/null || need libhdf5-dev
root() { [ "$(id -u)" = 0 ]; }
can_install() { have apt-get && { root || have sudo || $print; }; }
pointed_at_all() { [ -n "${LIBTORCH:-}" ] && [ -n "${MPICC:-}" ] && [ -n "${HDF5_DIR:-}" ]; }
if [ ! -d /usr/share/datasets/fashion-mnist ]; then
  # Only the demo needs the images, and they may lie in another folder.
  if ! can_install || { pointed_at_all && ! root; }; then
    say "warning: no Fashion-MNIST images in /usr/share/datasets/fashion-mnist; the demo needs their four files (such as
train-images-idx3-ubyte.gz) in any folder: tools/demo.sh configs/fashion-mnist.toml --set data.path=DIR"
  else
    need dataset-fashion-mnist
  fi
fi
if $tests; then
  have slurmctld || [ -x /usr/sbin/slurmctld ] || need slurm-wlm
  have munged || [ -x /usr/sbin/munged ] || need munge
  have shellcheck || need shellcheck
  # tools/torture.py uses both.
  have python3 || need python3
  have pgrep || need procps
fi
ruff=$cache/ruff-$RUFF
lacks_libtorch() { [ -z "${LIBTORCH:-}" ] && [ ! -e "$torch_home/complete" ]; }
lacks_ruff() { $tests && [ ! -x "$ruff/bin/ruff" ]; }
if lacks_libtorch || lacks_ruff; then
  have python3 || need python3
  python3 -c 'import ensurepip, venv' 2>/dev/null || need python3-venv
fi
# The wheels that this script fetches are for x86_64.
if [ -z "${LIBTORCH:-}" ] && [ "$(uname -m)" != x86_64 ]; then
  fail "this machine is $(uname -m), and only x86_64's libtorch can be fetched. Install libtorch $TORCH for it (on aarch64:
pip's torch==$TORCH, folder site-packages/torch), set LIBTORCH to its folder, and start again."
fi
if [ ${#packages[@]} -gt 0 ]; then
  have apt-get || fail "there is no apt-get here. Missing, by Debian's names: ${packages[*]}. Install them your system's
way, or load your site's modules and set LIBTORCH, MPICC and HDF5_DIR."
  sudo=()
  if ! root; then
    have sudo || $print || fail "not root and no sudo. Ask for these packages: ${packages[*]}"
    sudo=(sudo)
  fi
  say "installing ${packages[*]}"
  run "${sudo[@]}" apt-get update -qq
  run "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi

# Fetches libtorch from the torch wheel. On a CPU libtorch needs only two small CUDA libraries to load.
# The wheels for all Pythons hold the same libtorch, so any Python with venv can fetch it.
if [ -n "${LIBTORCH:-}" ]; then
  [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] || fail "LIBTORCH=$LIBTORCH holds no lib/libtorch_cpu.so"
  # LIBTORCH may itself be the link that is made below.
  torch=$(readlink -f "$LIBTORCH")
else
  torch=$torch_home/torch
  if [ ! -e "$torch_home/complete" ]; then
    say "fetching libtorch $TORCH (about 600 MB) into $torch_home"
    work=$cache/fetch.$$
    $print || trap 'rm -rf "$work"' EXIT
    run mkdir -p "$cache"
    run python3 -m venv "$work/venv"
    platforms=()
    # pip compares a wheel's glibc exactly, so every version up to the wheel's is named.
    for glibc in {28..17}; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    run "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
      --implementation cp --python-version 3.12 --abi cp312 --abi none "${platforms[@]}" --platform manylinux2014_x86_64 \
      --target "$work/libtorch" "torch==$TORCH" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
    run touch "$work/libtorch/complete"
    run rm -rf "$torch_home"
    run mv "$work/libtorch" "$torch_home"
  fi
fi
run mkdir -p .deps
[ "$(readlink .deps/torch 2>/dev/null)" = "$torch" ] || run ln -sfn "$torch" .deps/torch
if $tests; then
  if lacks_ruff; then
    say "fetching ruff $RUFF into $ruff"
    run python3 -m venv --clear "$ruff"
    run "$ruff/bin/python" -m pip install --quiet --disable-pip-version-check "ruff==$RUFF"
  fi
  [ "$(readlink .deps/ruff 2>/dev/null)" = "$ruff/bin/ruff" ] || run ln -sfn "$ruff/bin/ruff" .deps/ruff
fi
# nextest runs each test in a process of its own. `cargo test` works too, in one process.
if $tests && ! cargo nextest --version >/dev/null 2>&1; then
  say "installing cargo-nextest $NEXTEST (minutes)"
  run cargo install --quiet --locked cargo-nextest --version "$NEXTEST"
fi
$print || say "ready: a plain \`cargo build\` works here now"
