//! Finds and loads libtorch's libraries in the folders in which the dynamic linker looks for them.
//!
//! The path of libtorch may be a symbolic link, because some package managers link to files in their cache. libtorch needs other
//! libraries, some of which are in other Python packages. These libraries may lie beside the link and not beside the real file. The
//! linker's search path leads to them.

use anyhow::{Context, Result, ensure};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::{CStr, c_char, c_uint, c_void};
use std::path::{Path, PathBuf};

/// `Dl_serinfo` of `dlfcn.h`, without the list of paths at its end.
#[repr(C)]
#[derive(Default)]
struct Head {
    size: usize,
    count: c_uint,
}

/// `Dl_serpath` of `dlfcn.h`: one folder of the search path.
#[repr(C)]
#[derive(Clone, Copy)]
struct SearchPath {
    name: *const c_char,
    flags: c_uint,
}

/// The folders in which the linker looks for the libraries that a loaded library needs, in the linker's order.
pub fn searched_by(library: &str) -> Result<Vec<PathBuf>> {
    // SAFETY: a library that is loaded already runs no initialiser.
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | libc::RTLD_NOLOAD) };
    let handle = loaded.with_context(|| format!("{library} is not loaded"))?.into_raw();
    let mut head = Head::default();
    // SAFETY: the handle is live, and this request fills a `Head`.
    let status = unsafe { libc::dlinfo(handle, libc::RTLD_DI_SERINFOSIZE, (&raw mut head).cast()) };
    ensure!(status == 0, "the linker does not tell where {library} finds its libraries");
    let mut memory = vec![0u64; head.size.div_ceil(size_of::<u64>())];
    let start: *mut c_void = memory.as_mut_ptr().cast();
    // SAFETY: `memory` is aligned and has the size that the linker asked for. The first call fills its head, as the second
    // requires.
    let status = unsafe {
        libc::dlinfo(handle, libc::RTLD_DI_SERINFOSIZE, start);
        libc::dlinfo(handle, libc::RTLD_DI_SERINFO, start)
    };
    ensure!(status == 0, "the linker does not tell where {library} finds its libraries");
    // SAFETY: `count` paths follow the head, and their texts lie in `memory`.
    let paths =
        unsafe { std::slice::from_raw_parts(start.add(size_of::<Head>()).cast::<SearchPath>(), head.count as usize) };
    // SAFETY: the texts end with a zero.
    let text = |path: &SearchPath| unsafe { CStr::from_ptr(path.name) }.to_string_lossy().into_owned();
    Ok(paths.iter().map(|path| PathBuf::from(text(path))).collect())
}

/// The first file whose name begins with `name_start`: in the order of the folders, and within a folder in the order of the names.
pub fn find(folders: &[PathBuf], name_start: &str) -> Option<PathBuf> {
    folders.iter().find_map(|folder| {
        let entries = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
        let matches =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(name_start));
        entries.filter(matches).min()
    })
}

/// Loads a library for the rest of the process and lets all other libraries use its symbols.
pub fn load(path: &Path) -> Result<()> {
    // SAFETY: the initialisers of NVIDIA's and libtorch's libraries only register their own functions.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorchs_libraries_are_found_where_the_linker_looks_for_them() {
        let folders = searched_by("libtorch_cpu.so").unwrap();
        assert!(find(&folders, "libc10.so").is_some(), "{folders:?}");
        // This library comes from another Python package or from the system, and libtorch itself needs it.
        let runtime = find(&folders, "libcudart").or_else(|| find(&folders, "libgomp")).unwrap();
        assert!(runtime.exists());
        assert_eq!(find(&folders, "libno-such-library.so"), None);
        assert!(searched_by("libno-such-library.so").is_err());
    }

    #[test]
    fn a_library_that_is_reached_through_links_is_searched_for_beside_the_links() {
        let folder = tempfile::tempdir().unwrap();
        let [cache, site] = ["cache", "site"].map(|name| folder.path().join(name));
        [&cache, &site].into_iter().for_each(|path| std::fs::create_dir(path).unwrap());
        let built = std::process::Command::new("cc")
            .args(["-shared", "-nostdlib", "-x", "c", "/dev/null", "-Wl,-rpath,$ORIGIN/../wheel", "-o"])
            .arg(cache.join("liblinked-for-a-test.so"))
            .status();
        assert!(built.unwrap().success());
        let link = site.join("liblinked-for-a-test.so");
        std::os::unix::fs::symlink(cache.join("liblinked-for-a-test.so"), &link).unwrap();
        load(&link).unwrap();
        let folders = searched_by(link.to_str().unwrap()).unwrap();
        assert!(folders.contains(&site.join("../wheel")), "{folders:?}");
    }
}
