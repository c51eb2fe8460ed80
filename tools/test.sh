#!/usr/bin/env bash
# Passes the tests: installs what is missing, builds, and runs the whole suite. Arguments go to the test runner.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh --tests
# Slurm's daemons lie where only root's PATH looks.
PATH=$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin
exec cargo nextest run --release --locked "$@"
