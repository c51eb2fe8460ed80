#!/usr/bin/env bash
# Checks the formatting and lints all code: shell scripts, Python, Rust and its documentation. Installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh --tests
PATH=$HOME/.cargo/bin:$PATH

shellcheck tools/*.sh tests/fake/*.sh slurm/*.sbatch slurm/downstream/*.sbatch .ci/run
# The template becomes a script when its {fields} are filled in.
sed -E -e 's/^\{(options|setup)\}$/:/' -e "s/^\{steps\}$/step \"\$config\"/" -e 's/\{[a-z_]+\}/word/g' \
  slurm/templates/job.sh | shellcheck -
.deps/ruff check --quiet

# rustup's minimal profile leaves out both components, and a Rust from elsewhere has no rustup to add them.
have() { cargo "$1" --version >/dev/null 2>&1 || { echo "lint: skipped cargo $1, which is not installed" >&2; false; }; }
! have fmt || cargo fmt --check
! have clippy || cargo clippy --release --locked --all-targets --quiet -- -D warnings
# Without the private items, a public page that links to one of them is an error too.
for items in --document-private-items ""; do
  RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --quiet ${items:+"$items"}
done
