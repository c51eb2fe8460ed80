//! Files that many threads read at the same time without a lock, each at its own offset.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};

/// How many files of one split stay open. Each further file is opened anew for each read. The number is two fifths of the files
/// that this process may have open, but at least 256. So the two splits of a source leave a fifth for other files.
static MOST_OPEN: LazyLock<usize> = LazyLock::new(|| (raised_limit() * 2 / 5).max(256));

/// Raises the process's soft limit of open files (usually 1024) to its hard limit, or to `ENOUGH` if the hard limit is higher.
/// Returns the new soft limit, but at most `ENOUGH`.
fn raised_limit() -> usize {
    /// Enough for the shards of a large pack. On some systems the hard limit is a billion.
    const ENOUGH: libc::rlim_t = 1 << 20;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live rlimit, which the calls fill and read; if they fail, nothing changes.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        let raised = libc::rlimit { rlim_cur: limit.rlim_max.min(ENOUGH).max(limit.rlim_cur), ..limit };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raised) == 0 {
            limit = raised;
        }
    }
    limit.rlim_cur.min(ENOUGH) as usize
}

/// The files of one split, which must not change while they are read.
#[derive(Debug)]
pub struct OpenFiles {
    paths: Vec<PathBuf>,
    /// The files that stay open: the files of the first [`MOST_OPEN`] paths. Each file is opened at its first read.
    open: Vec<OnceLock<File>>,
}

impl OpenFiles {
    pub fn new(paths: Vec<PathBuf>) -> OpenFiles {
        let open = paths.iter().take(*MOST_OPEN).map(|_| OnceLock::new()).collect();
        OpenFiles { paths, open }
    }

    pub fn path(&self, file: usize) -> &Path {
        &self.paths[file]
    }

    /// Replaces the content of `bytes` by `length` bytes of a file. They begin at `offset`.
    pub fn read(&self, file: usize, offset: u64, length: usize, bytes: &mut Vec<u8>) -> std::io::Result<()> {
        bytes.resize(length, 0);
        match self.open.get(file) {
            None => File::open(&self.paths[file])?.read_exact_at(bytes, offset),
            Some(slot) => {
                if slot.get().is_none() {
                    // If another thread has opened the file meanwhile, the other thread's handle stays and this handle is closed.
                    let _ = slot.set(File::open(&self.paths[file])?);
                }
                slot.get().expect("set above").read_exact_at(bytes, offset)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_raised_and_every_file_stays_open() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..300).map(|file| folder.path().join(file.to_string())).collect();
        paths.iter().for_each(|path| std::fs::write(path, path.display().to_string()).unwrap());
        let files = OpenFiles::new(paths.clone());
        let mut bytes = Vec::new();
        for _ in 0..2 {
            for (file, path) in paths.iter().enumerate() {
                let text = path.display().to_string();
                files.read(file, 1, text.len() - 1, &mut bytes).unwrap();
                assert_eq!(bytes, text.as_bytes()[1..]);
            }
        }
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the pointer is to a live rlimit.
        unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
        assert!(limit.rlim_cur == limit.rlim_max || limit.rlim_cur >= 1 << 20);
        if limit.rlim_cur >= 1024 {
            assert!(files.open.len() == 300 && files.open.iter().all(|slot| slot.get().is_some()));
        }
    }
}
