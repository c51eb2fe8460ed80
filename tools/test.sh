#!/usr/bin/env bash
# Runs the tests: installs what is missing, builds, and runs the whole suite. Arguments are passed on to the test runner.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh --tests
# Debian puts Slurm's daemons into a folder that is only in root's PATH.
PATH=$HOME/.cargo/bin:$PATH:/usr/sbin:/sbin
exec cargo nextest run --release --locked --no-fail-fast "$@"
