#!/bin/sh
# Builds the fake driver and the fake NCCL into a folder, for LD_LIBRARY_PATH.
set -eu
here=$(dirname "$0")
cc -Wall -Werror -shared -fPIC -pthread -Wl,-soname,libcuda.so.1 -o "$1/libcuda.so.1" "$here/cuda.c"
# The linker expands $ORIGIN.
# shellcheck disable=SC2016
cc -Wall -Werror -shared -fPIC -pthread -Wl,-soname,libnccl.so.2 -Wl,-rpath,'$ORIGIN' -o "$1/libnccl.so.2" \
  "$here/nccl.c" "$1/libcuda.so.1"
