#!/usr/bin/env bash
# Disturbs tiny runs as a cluster does (kills, full disks, torn files …), and compares their files with those of undisturbed runs.
# Installs what is missing and builds the program, unless --binary names one.
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
