#!/usr/bin/env bash
# Runs `incubate run` on real images: installs what is missing, builds the program, and trains a Vision Transformer on Fashion-MNIST
# with two MPI ranks. A second start resumes the run; `rm -r runs/fashion-mnist` removes it.
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
# After Ctrl-C or TERM mpirun kills its ranks within a second, even while they write. So mpirun gets a session of its own,
# which Ctrl-C does not reach, and the first signal is passed on as USR2, after which the ranks write a checkpoint.
setsid mpirun "${options[@]}" -n 2 target/release/incubate run "$config" "$@" &
# A second signal is passed on as TERM, which ends the ranks at once.
signal=USR2
trap 'kill -s "$signal" $!; signal=TERM' INT TERM HUP QUIT USR2
# A signal interrupts `wait`, so wait again until the process has ended.
until wait $!; code=$?; ! kill -0 $! 2>/dev/null; do :; done
exit "$code"
