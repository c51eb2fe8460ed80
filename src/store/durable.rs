//! Durable writing: a temporary file beside the path is written, synced and renamed, and then the folder is synced. A reader sees
//! the whole old file or the whole new file, even after a kill or a power cut.

use super::full_disk::FullDisk;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Calls `write` with the path of a temporary file beside `path`, then syncs that file and renames it to `path`.
pub fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    replace_if(path, write, || Ok(()))
}

/// Replaces a file as [`replace`] does, but calls `check` after the temporary file is synced and before it is renamed. If `check`
/// fails, the old file stays.
pub fn replace_if(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<()>,
    check: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let beside = beside(path)?;
    let done = write(&beside).and_then(|()| Ok(File::open(&beside)?.sync_all()?)).and_then(|()| {
        check()?;
        fs::rename(&beside, path)?;
        File::open(folder(path))?.sync_all()?;
        Ok(())
    });
    if done.is_err() {
        // Only the first error is reported. If the file cannot be removed now, a write of the same path at least an hour later
        // removes it.
        let _ = fs::remove_file(&beside);
    }
    done.with_context(|| format!("cannot write {}", path.display()))
}

/// Renames a file within its folder, and syncs the folder.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .and_then(|()| File::open(folder(to))?.sync_all())
        .with_context(|| format!("cannot rename {}", from.display()))
}

/// Replaces the content of a file by these bytes, as [`replace`] does.
pub fn replace_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |beside| {
        let mut file = File::create(beside)?;
        file.write_all(bytes)?;
        // NFS reports an exceeded quota only through the file descriptor that has written. `replace` syncs another descriptor.
        Ok(file.sync_all()?)
    })
}

/// Fails if the file system of `path` has no room for this many more bytes.
pub fn require_space(path: &Path, bytes: u64) -> Result<()> {
    let free = free_space(folder(path))?;
    if free < bytes {
        let text = format!(
            "not enough space for {}: it needs {:.1} MB and {:.1} MB are free; free some, or choose another --run-dir",
            path.display(),
            bytes as f64 / 1e6,
            free as f64 / 1e6
        );
        return Err(FullDisk(text).into());
    }
    Ok(())
}

/// The free bytes of the file system that holds `folder`.
pub fn free_space(folder: &Path) -> Result<u64> {
    let name = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes())?;
    // SAFETY: statvfs only writes into the zeroed struct of its own type, and the name is NUL-terminated.
    let stat = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        if libc::statvfs(name.as_ptr(), &mut stat) != 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("{}: cannot ask for its free space", folder.display()));
        }
        stat
    };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The type and the mount point of the file system that holds an existing path, such as `lustre (/scratch)`.
pub fn file_system(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounted(&mounts, &path)
}

/// The type and the mount point of the mount that holds a path, from the lines of `mountinfo` (proc(5)). It is the mount with the
/// longest mount point. If several mounts have this mount point, it is the last, which hides the others.
fn mounted(mounts: &str, path: &Path) -> Option<String> {
    let parse = |line: &str| -> Option<(PathBuf, String)> {
        let (mount, system) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?.replace("\\040", " ");
        Some((point.into(), system.split(' ').next()?.to_string()))
    };
    let of_path = mounts.lines().filter_map(parse).filter(|(point, _)| path.starts_with(point));
    let (point, system) = of_path.max_by_key(|(point, _)| point.components().count())?;
    Some(format!("{system} ({})", point.display()))
}

/// Whether an exclusive lock on a file can be taken now.
pub fn can_lock(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| file.try_lock().is_ok())
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A temporary file that is older than this counts as left behind by a killed process. A younger file may belong to a living
/// process.
const ABANDONED: Duration = Duration::from_secs(3600);

/// A new name beside `path` for a temporary file. Also removes temporary files of `path` that killed processes have left.
fn beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().context("a file name is needed")?.to_string_lossy().into_owned();
    let prefix = format!(".{name}.partial-");
    for entry in fs::read_dir(folder(path)).with_context(|| format!("cannot write {}", path.display()))?.flatten() {
        let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if entry.file_name().to_string_lossy().starts_with(&prefix) && age().is_some_and(|age| age > ABANDONED) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(path.with_file_name(format!("{prefix}{}", unique())))
}

/// A text that is unique among all writers on all nodes. A process ID alone is unique only on one node.
pub(super) fn unique() -> String {
    let host = super::process::host().replace('/', "-");
    let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::time::Instant::now());
    format!("{host}-{}-{random:016x}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        replace_bytes(&path, b"old").unwrap();
        let failed = replace(&path, |beside| {
            fs::write(beside, b"half")?;
            bail!("interrupted")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("interrupted"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn two_writers_of_one_file_never_write_into_the_same_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        assert!(beside(&path).unwrap() != beside(&path).unwrap());
        let name = beside(&path).unwrap().file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.starts_with(".a.txt.partial-") && name.contains(&super::super::process::host()), "{name}");
    }

    #[test]
    fn the_file_system_of_a_path_is_that_of_its_innermost_mount() {
        let mounts = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      40 21 0:50 / /scratch\\040x rw shared:7 - lustre mgs:/s rw\n\
                      41 21 0:51 / /home rw - nfs4 server:/home rw\n\
                      42 41 0:52 / /home rw - autofs map rw\n";
        let of = |path: &str| mounted(mounts, Path::new(path)).unwrap();
        assert_eq!(of("/scratch x/run"), "lustre (/scratch x)");
        assert_eq!((of("/home/me"), of("/homes")), ("autofs (/home)".into(), "ext4 (/)".into()));
        assert!(file_system(Path::new(".")).is_some());
    }

    #[test]
    fn a_killed_writers_temporary_file_is_removed_later_but_never_one_that_is_being_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let [abandoned, being_written] = [1, 2].map(|pid| folder.path().join(format!(".a.txt.partial-{pid}")));
        fs::write(&being_written, b"half").unwrap();
        fs::write(&abandoned, b"torn").unwrap();
        let long_ago = std::time::SystemTime::now() - 2 * ABANDONED;
        File::options().write(true).open(&abandoned).unwrap().set_modified(long_ago).unwrap();
        replace_bytes(&path, b"new").unwrap();
        assert!(!abandoned.exists() && being_written.exists());
    }
}
