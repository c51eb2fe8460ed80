#!/usr/bin/env bash
# Disturbs tiny runs in the ways of a cluster, and compares their files with those of undisturbed runs. Installs what is
# missing and builds, unless a binary is given.
#   tools/torture.sh [HOURS] [--binary FILE] [--seed N] [--count N] [--only KIND,…] [--jobs N]        default: one hour
set -euo pipefail
root=$(dirname "$0")/..
case " $* " in
  *" --binary"* | *" --help "* | *" -h "*) ;;
  *)
    "$root/tools/setup.sh" --tests
    PATH=$HOME/.cargo/bin:$PATH
    (cd "$root" && cargo build --release --locked)
    ;;
esac
exec python3 "$root/tools/torture.py" "$@"
