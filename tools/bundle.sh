#!/usr/bin/env bash
# Makes a tarball of the program, a launcher, the libraries of MPI (with its plug-ins) and HDF5, the configs, the documentation, the
# Slurm scripts and the Python scripts. Unpack it on the shared file system. The program then runs without installation on nodes of
# the same processor family whose C library (glibc) is at least as new as this machine's. So build the bundle on the oldest system
# that you have.
#   tools/bundle.sh [--with-libtorch] [FILE]          default: target/incubate-VERSION-ARCH.tar.gz
# --with-libtorch adds about 500 MB. Without it, set LIBTORCH on the nodes to a libtorch 2.11.0 or to the folder `torch` of a Python
# that has it. To use a site's Open MPI 4 instead of the bundled one, set MPI_LIB to its lib folder.
set -euo pipefail
cd "$(dirname "$0")/.."
libtorch=false file=
for argument in "$@"; do
  case "$argument" in
    --with-libtorch) libtorch=true ;;
    -*) echo "usage: tools/bundle.sh [--with-libtorch] [FILE]" >&2; exit 2 ;;
    *) file=$argument ;;
  esac
done
tools/setup.sh
PATH=$HOME/.cargo/bin:$PATH
cargo build --release --locked
name=incubate-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)-$(uname -m)
file=${file:-target/$name.tar.gz}
torch=$(readlink -f "${LIBTORCH:-.deps/torch}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/$name
mkdir -p "$root/bin" "$root/lib/openmpi" "$root/lib/pmix"
cp target/release/incubate "$root/bin/"
strip --strip-debug "$root/bin/incubate"
cp -r configs docs slurm LICENSE README.md CONTRIBUTING.md CHANGELOG.md "$root/"
mkdir "$root/tools"
cp tools/*.py "$root/tools/"

# Copies all libraries that the program and MPI's plug-ins load, except the C library, and libtorch with its CUDA and OpenMP
# libraries.
plugins() { find "$1" -name '*.so' 2>/dev/null || true; }
mpi=$(ldd target/release/incubate | awk '$1 ~ /^libmpi/ {print $3}')
mpi=$(dirname "$(readlink -f "$mpi")")
for folder in "$mpi" "$mpi"/../.. "$mpi"/../../..; do
  [ -d "$folder/openmpi" ] || [ -d "$folder/openmpi3" ] || continue
  plugins "$folder" | grep '/mca_' | xargs -r -I{} cp -n {} "$root/lib/openmpi/"
  break
done
for folder in /usr/lib/*/pmix*/lib/pmix "$mpi/pmix"; do plugins "$folder" | xargs -r -I{} cp -n {} "$root/lib/pmix/"; done
ldd target/release/incubate "$root"/lib/*/*.so 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u |
  grep -vE "^$torch|/nvidia/|/lib(c|m|dl|rt|pthread|util|resolv|gomp)\.so|/ld-linux" | xargs -I{} cp -nL {} "$root/lib/"
if $libtorch; then
  # Keeps the layout of the folders, on which libtorch's search paths depend, but leaves out headers and Python's files.
  mkdir -p "$root/libtorch"
  folders=(torch/lib)
  [ ! -d "$torch/../nvidia" ] || folders+=(nvidia)
  tar -ch -C "$torch/.." --exclude=torch/include --exclude='libtorch_python*' --exclude='*.py' "${folders[@]}" |
    tar -x -C "$root/libtorch"
fi

cat >"$root/incubate" <<'LAUNCHER'
#!/bin/sh
# Starts the program with the bundled libraries.
here=$(dirname "$(readlink -f "$0")")
torch=${LIBTORCH:-$here/libtorch/torch}
if [ ! -e "$torch/lib/libtorch_cpu.so" ]; then
  echo "incubate: no lib/libtorch_cpu.so in $torch; set LIBTORCH to a libtorch 2.11.0" >&2
  exit 2
fi
export LD_LIBRARY_PATH="${MPI_LIB:+$MPI_LIB:}$here/lib:$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
if [ -z "${MPI_LIB:-}" ]; then
  export OMPI_MCA_mca_base_component_path="$here/lib/openmpi"
  export PMIX_MCA_mca_base_component_path="$here/lib/pmix"
fi
exec "$here/bin/incubate" "$@"
LAUNCHER
chmod +x "$root/incubate"
tar -czf "$file" -C "$work" "$name"
echo "$file: $(du -h "$file" | cut -f1), $(find "$root" -name '*.so*' | wc -l) libraries"
