//! Bakes the folder of libtorch into the binary, so that it runs from anywhere without LD_LIBRARY_PATH.

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-changed=build.rs");
    let folder = PathBuf::from(std::env::var_os("LIBTORCH").unwrap_or_default());
    // The link in .deps may be replaced by a later set-up: the binary keeps the real folder.
    match folder.join("lib").canonicalize() {
        Ok(lib) => println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display()),
        Err(_) => println!(
            "cargo::error=no libtorch in {} (LIBTORCH): run tools/setup.sh first, or point LIBTORCH at a libtorch 2.11.0",
            folder.display()
        ),
    }
}
