# A Spack recipe, to be used in a clone of this repository:
#   spack repo add tools/spack && spack dev-build incubate@main
import os

from spack.package import *


class Incubate(Package):
    """Deep Incubation (arXiv 2212.04129) for clusters: train a large Vision Transformer module by module over MPI."""

    homepage = "https://arxiv.org/abs/2212.04129"
    license("MIT")
    version("main")

    depends_on("c", type="build")
    depends_on("cxx", type="build")
    depends_on("rust@1.89:", type="build")
    # The JPEG decoder is built from source, including its assembly.
    depends_on("cmake", type="build")
    depends_on("nasm", type="build")
    # The MPI bindings are generated with libclang.
    depends_on("llvm+clang", type="build")
    depends_on("openmpi@4:")
    depends_on("hdf5~mpi")
    # The Rust bindings need this version of libtorch.
    depends_on("py-torch@2.11.0")

    def setup_build_environment(self, env):
        cmake = self.spec["py-torch"].package.cmake_prefix_paths[0]  # …/torch/share/cmake
        env.set("LIBTORCH", os.path.dirname(os.path.dirname(cmake)))
        env.set("HDF5_DIR", self.spec["hdf5"].prefix)
        env.set("MPICC", self.spec["openmpi"].prefix.bin.mpicc)
        env.set("LIBCLANG_PATH", self.spec["llvm"].prefix.lib)

    def install(self, spec, prefix):
        which("cargo")("install", "--locked", "--root", prefix, "--path", ".")
