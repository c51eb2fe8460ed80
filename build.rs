//! Compiles what calls libtorch where tch does not, and bakes the folders of the shared libraries into the binary, so that it runs from anywhere without LD_LIBRARY_PATH.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for variable in ["LIBTORCH", "HDF5_DIR", "MPICC"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let torch = PathBuf::from(std::env::var_os("LIBTORCH").unwrap_or_default());
    if !rpath(&torch.join("lib")) {
        println!(
            "cargo::error=no libtorch in {} (LIBTORCH): run tools/setup.sh first, or point LIBTORCH at a libtorch 2.11.0",
            torch.display()
        );
        return;
    }
    const SHIM: &str = "src/libtorch.cpp";
    println!("cargo::rerun-if-changed={SHIM}");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file(SHIM)
        // As system folders: their warnings are not ours.
        .flag("-isystem")
        .flag(torch.join("include"))
        .flag("-isystem")
        .flag(torch.join("include/torch/csrc/api/include"))
        .compile("incubate_libtorch");
    // Only what the user points at: the system's own libraries are found without help.
    if let Some(hdf5) = std::env::var_os("HDF5_DIR") {
        rpath(&PathBuf::from(hdf5).join("lib"));
    }
    if let Some(mpicc) = std::env::var_os("MPICC") {
        // Open MPI's and MPICH's wrappers both answer -show with the compiler line.
        let line = Command::new(mpicc).arg("-show").output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        for folder in line.unwrap_or_default().split_whitespace().filter_map(|word| word.strip_prefix("-L")) {
            rpath(Path::new(folder));
        }
    }
}

/// Whether the folder is there; a link in it may be replaced later, so the binary keeps the real folder.
fn rpath(folder: &Path) -> bool {
    let Ok(folder) = folder.canonicalize() else { return false };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", folder.display());
    true
}
