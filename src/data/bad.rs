//! Images that cannot be read: each is named; up to a limit the run goes on without them.

use crate::usage;
use anyhow::Result;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// The unreadable images that this process has met.
#[derive(Debug)]
pub struct BadImages {
    limit: usize,
    names: Mutex<BTreeSet<String>>,
}

impl BadImages {
    /// Up to `limit` of them are skipped.
    pub fn new(limit: usize) -> BadImages {
        BadImages { limit, names: Mutex::default() }
    }

    /// Takes note of one; tells when it is a new one.
    ///
    /// # Errors
    /// If it is one too many.
    pub fn skip(&self, name: String, fault: &anyhow::Error) -> Result<()> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.contains(&name) {
            return Ok(());
        }
        if names.len() == self.limit {
            let allowed = match self.limit {
                0 => "restore or remove it, or let some be skipped: data.bad_images".into(),
                limit => format!("data.bad_images = {limit} are skipped already; restore the images or raise it"),
            };
            return Err(usage!("{name}: {fault:#}; {allowed}"));
        }
        log::warn!("{name}: {fault:#}; skipped, {} of at most {}", names.len() + 1, self.limit);
        names.insert(name);
        Ok(())
    }

    /// How many were skipped.
    pub fn count(&self) -> usize {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn as_many_as_the_limit_are_skipped_and_the_same_one_counts_once() {
        let bad = BadImages::new(2);
        for name in ["a", "b", "a"] {
            bad.skip(name.into(), &anyhow!("torn")).unwrap();
        }
        let error = bad.skip("c".into(), &anyhow!("torn")).unwrap_err().to_string();
        assert!(error.starts_with("c: torn") && error.contains("data.bad_images = 2"), "{error}");
        assert_eq!(bad.count(), 2);
    }
}
