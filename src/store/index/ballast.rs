//! Room on the disk that is kept for the moment in which there is no other: a file that can be given up.
//!
//! sled writes when it is opened, so a relay could not start on a full disk, however much it only wants to read. The file
//! is deleted for the time of the opening, which needs no more room afterwards than before, and then made again.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

/// Sizes are multiples of this.
const STEP_BYTES: u64 = 256 * 1024;

/// The file.
pub(super) struct Ballast {
    path: PathBuf,
}

impl Ballast {
    /// The ballast of the index in `dir`, whether it is there or not.
    pub(super) fn of(dir: &Path) -> Ballast {
        Ballast { path: dir.join("ballast") }
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |file| file.len())
    }

    /// Gives its room to others; false when there was none.
    pub(super) fn give_up(&self) -> bool {
        fs::remove_file(&self.path).is_ok()
    }

    /// Makes it as large as `bytes` rounded up, or as large as the disk allows. It never shrinks.
    pub(super) fn fill(&self, bytes: u64) {
        let present = self.bytes();
        let mut wanted = bytes.next_multiple_of(STEP_BYTES);
        if wanted <= present {
            return;
        }
        while wanted > present {
            match self.reserve(wanted) {
                Ok(()) => return,
                Err(error) if is_for_want_of_room(&error) => wanted -= STEP_BYTES,
                Err(error) => {
                    tracing::debug!(%error, path = %self.path.display(), "no room is kept for a full disk");
                    return;
                }
            }
        }
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        let before = self.bytes();
        let file = File::options().create(true).append(true).open(&self.path)?;
        let reserved = fallocate(&file, FallocateFlags::empty(), 0, bytes).map_err(io::Error::from);
        if reserved.is_err() {
            // A file system may leave half of it behind.
            let _ = file.set_len(before);
        }
        reserved
    }
}

/// Whether room on the disk would have helped.
pub(super) fn is_for_want_of_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// It takes the disk's blocks, not just a length; grows, never shrinks, and goes when it is given up.
    #[test]
    fn it_takes_room_until_it_is_given_up() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::of(dir.path());
        assert!(!ballast.give_up());
        ballast.fill(1);
        assert_eq!(ballast.bytes(), STEP_BYTES);
        ballast.fill(STEP_BYTES + 1);
        ballast.fill(7);
        assert_eq!(ballast.bytes(), 2 * STEP_BYTES);
        let blocks = fs::metadata(&ballast.path).unwrap().blocks();
        assert!(blocks * 512 >= 2 * STEP_BYTES || blocks == 0, "{blocks} blocks; a file system without reservation: 0");
        assert!(ballast.give_up() && ballast.bytes() == 0);
    }
}
