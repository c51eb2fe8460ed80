//! If the disk is full when a phase stops or ends, the program waits for space, because the trained weights must not be lost.

use anyhow::{Error, Result};
use std::io;
use std::time::{Duration, Instant};

/// A file does not fit on the disk.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FullDisk(pub String);

/// The first pause before a write is tried again. Each pause is twice as long as the pause before, up to [`LONGEST_PAUSE`].
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between two tries.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The longest wait for space, over all tries.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// The interval at which [`insist`] tells its caller why it waits, so that the caller can write heartbeats.
const TELLING: Duration = Duration::from_secs(1);

/// Whether a write failed because the disk is full or the user's quota is used up.
pub fn is_full(error: &Error) -> bool {
    let by_number = |cause: &io::Error| matches!(cause.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
    let is_known = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<FullDisk>() || cause.downcast_ref::<io::Error>().is_some_and(by_number)
    };
    error.chain().any(is_known) || words(error).is_some()
}

/// The system's words for a full disk, if the text of an error contains them. An error of HDF5 has no [`io::Error`] as its cause,
/// only a long text that contains these words.
fn words(error: &Error) -> Option<&'static str> {
    let text = format!("{error:#}");
    ["No space left on device", "Disk quota exceeded"].into_iter().find(|words| text.contains(words))
}

/// The error of a full disk in one line, for people.
pub fn reason(error: &Error) -> String {
    words(error).map_or_else(|| format!("{error:#}"), |words| format!("{error}: {words}"))
}

/// Calls `write`. While the disk is full, waits and tries again, for up to an hour. During the wait it calls `tell` with the reason
/// every second. At the end it calls `tell` with `None`.
///
/// # Errors
/// The last error of `write`.
pub fn insist<T>(mut write: impl FnMut() -> Result<T>, tell: &mut dyn FnMut(Option<&str>)) -> Result<T> {
    let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
    loop {
        match write() {
            Err(error) if is_full(&error) && began.elapsed() < LONGEST_WAIT => {
                let left = (LONGEST_WAIT - began.elapsed()).as_secs().div_ceil(60);
                let text =
                    format!("{}; free some space: it waits and tries again, for {left} min at most", reason(&error));
                log::error!("{text}");
                let until = Instant::now() + pause;
                while Instant::now() < until {
                    tell(Some(&text));
                    std::thread::sleep(TELLING.min(pause));
                }
                pause = (2 * pause).min(LONGEST_PAUSE);
            }
            written => {
                tell(None);
                return written;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn only_a_full_disk_is_waited_for() {
        let full = || Error::new(io::Error::from_raw_os_error(libc::EDQUOT)).context("cannot write meta.h5");
        let mut tries = 0;
        let mut reasons = Vec::new();
        let write = || {
            tries += 1;
            if tries == 1 { Err(full()) } else { Ok(tries) }
        };
        assert_eq!(insist(write, &mut |text| reasons.push(text.map(str::to_string))).unwrap(), 2);
        assert!(reasons[0].as_ref().unwrap().starts_with("cannot write meta.h5: "), "{reasons:?}");
        assert_eq!(reasons.last(), Some(&None));
        let mut tries = 0;
        let lost = || -> Result<()> {
            tries += 1;
            Err(anyhow!("another process has taken it over"))
        };
        assert!(insist(lost, &mut |_| ()).is_err() && tries == 1);
        let of_hdf5 =
            anyhow!("errno = 28,\n error message = 'No space left on device'").context("cannot write meta.h5");
        assert!(is_full(&of_hdf5) && reason(&of_hdf5) == "cannot write meta.h5: No space left on device");
        assert!(is_full(&Error::new(FullDisk("2 MB are free".into())).context("cannot write")));
    }
}
