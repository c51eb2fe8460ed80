//! Switches TF32 on: an NVIDIA GPU then rounds the factors of fp32 matrix products to 10 bits of mantissa.
//!
//! libtorch's switch is a C++ method that tch does not bind. It is called by its symbol name in libtorch 2.11.0, to which this
//! program is linked. Under the Itanium C++ ABI a method is a function whose first argument is the object.

use anyhow::{Context, Result};
use libloading::os::unix::Library;
use std::ffi::c_void;

/// Lets libtorch use TF32 for matrix products on all GPUs, for the rest of the process.
pub fn allow() -> Result<()> {
    set(true)
}

fn set(allowed: bool) -> Result<()> {
    let program = Library::this();
    // SAFETY: the types match `at::Context& at::globalContext()` and `void at::Context::setAllowTF32CuBLAS(bool)`; the
    // context lives as long as the process.
    unsafe {
        let context = program
            .get::<unsafe extern "C" fn() -> *mut c_void>(b"_ZN2at13globalContextEv\0")
            .context("this libtorch has no global context")?;
        let set = program
            .get::<unsafe extern "C" fn(*mut c_void, bool)>(b"_ZN2at7Context18setAllowTF32CuBLASEb\0")
            .context("this libtorch has no switch for TF32; set run.precision = \"fp32\"")?;
        set(context(), allowed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_allowed() -> bool {
        let program = Library::this();
        // SAFETY: as in `set`; the second type matches `bool at::Context::allowTF32CuBLAS() const`.
        unsafe {
            let context = program.get::<unsafe extern "C" fn() -> *mut c_void>(b"_ZN2at13globalContextEv\0").unwrap();
            let get =
                program.get::<unsafe extern "C" fn(*const c_void) -> bool>(b"_ZNK2at7Context15allowTF32CuBLASEv\0");
            get.unwrap()(context())
        }
    }

    #[test]
    fn tf32_is_off_until_it_is_allowed() {
        assert!(!is_allowed());
        allow().unwrap();
        assert!(is_allowed());
        set(false).unwrap();
    }
}
