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
options=(--bind-to none --oversubscribe --quiet)
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
# mpirun kills its ranks a second after Ctrl-C or TERM, whatever they write. In a session of its own it does not hear of
# them: the ranks do, as USR2, and write a checkpoint.
setsid mpirun "${options[@]}" -n 2 target/release/incubate run "$config" "$@" &
# A second one waits for nothing.
signal=USR2
trap 'kill -s "$signal" $!; signal=TERM' INT TERM HUP QUIT USR2
# A signal ends `wait` early.
until wait $!; code=$?; ! kill -0 $! 2>/dev/null; do :; done
exit "$code"
