#!/usr/bin/env bash
# The main job on real images: installs what is missing, builds, and incubates a Vision Transformer on Fashion-MNIST
# with two MPI ranks. Started again it resumes; `rm -r runs/fashion-mnist` starts afresh.
#   tools/demo.sh [CONFIG] [--set KEY=VALUE]…        default: configs/fashion-mnist.toml
set -euo pipefail
cd "$(dirname "$0")/.."
config=configs/fashion-mnist.toml
case "${1:-}" in '' | --*) ;; *) config=$1; shift ;; esac
tools/setup.sh
PATH=$HOME/.cargo/bin:$PATH
cargo build --release --locked
# A second after Ctrl-C or TERM, mpirun kills; a checkpoint may take longer.
options=(--bind-to none --oversubscribe --quiet --mca odls_base_sigkill_timeout 60)
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
exec mpirun "${options[@]}" -n 2 target/release/incubate run "$config" "$@"
