//! Small named blobs beside the events: what the layers above decide and must not forget, such as who is banned.
//!
//! In: whole blobs, each a few kilobytes to a few megabytes. Out: the last one that was saved under the name, also after
//! a power cut. One file each in the folder `state` of the data directory, readable by its owner only, since one of
//! them may be a secret key. Never events, and never written so often that a file for each write would matter.

use std::fs;
use std::path::Path;

use bytes::Bytes;

use super::StoreError;
use super::dir::{sync_dir, write_private};
use super::log::io_at;

/// The folder in the data directory, and in a backup.
pub const FOLDER: &str = "state";

/// Longest name of a blob.
const NAME_CHARS_MAX: usize = 32;

/// Bytes that are read back at most: far above what any blob has, and far below what would hurt.
const BYTES_MAX: u64 = 256 << 20;

/// Refuses what could be a path or the name of a file that is being written.
///
/// # Errors
/// [`StoreError::Damaged`], naming the name.
pub fn check_name(name: &str) -> Result<(), StoreError> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.bytes().all(is_plain) {
        return Err(StoreError::Damaged(format!("{name:?} cannot name a blob: small letters, digits and - can")));
    }
    Ok(())
}

/// Reads a blob below `dir`; `None` where none was saved.
///
/// # Errors
/// When it cannot be read, or is larger than any blob.
pub fn load(dir: &Path, name: &str) -> Result<Option<Bytes>, StoreError> {
    check_name(name)?;
    let path = dir.join(FOLDER).join(name);
    match fs::metadata(&path) {
        Ok(found) if found.len() > BYTES_MAX => {
            return Err(StoreError::Damaged(format!("{} is larger than it can be", path.display())));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        _ => {}
    }
    Ok(Some(fs::read(&path).map_err(io_at("read", &path))?.into()))
}

/// Saves a blob below `dir`, atomically and durably.
///
/// # Errors
/// When it cannot be written; the one before is still there then.
pub fn save(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    check_name(name)?;
    let folder = dir.join(FOLDER);
    if !folder.is_dir() {
        fs::create_dir_all(&folder).map_err(io_at("create", &folder))?;
        sync_dir(dir)?;
    }
    write_private(&folder.join(name), bytes)
}

/// Copies every blob below `from` to below `to`, as each is at that moment.
///
/// # Errors
/// When one cannot be read or written.
pub fn copy_all(from: &Path, to: &Path) -> Result<(), StoreError> {
    let folder = from.join(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io_at("read", &folder))?,
    };
    for entry in entries {
        let name = entry.map_err(io_at("read", &folder))?.file_name();
        // What is being written has a name that no blob may have.
        let Some(name) = name.to_str().filter(|name| check_name(name).is_ok()) else { continue };
        if let Some(bytes) = load(from, name)? {
            save(to, name, &bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// The last one saved counts, nobody else may read it, and names that are paths are none.
    #[test]
    fn blobs_are_kept_privately_under_plain_names() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        assert_eq!(load(dir, "policy").unwrap(), None);
        save(dir, "policy", b"one").unwrap();
        save(dir, "policy", b"two").unwrap();
        save(dir, "relay-key", b"").unwrap();
        assert_eq!(load(dir, "policy").unwrap().as_deref(), Some(&b"two"[..]));
        assert_eq!(load(dir, "relay-key").unwrap().as_deref(), Some(&b""[..]));
        let mode = fs::metadata(dir.join("state/policy")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for name in ["", "..", "a/b", "A", "a.new", &"x".repeat(33)] {
            assert!(save(dir, name, b"").is_err() && load(dir, name).is_err(), "{name}");
        }
    }

    /// A copy holds every blob and nothing that was half written.
    #[test]
    fn a_copy_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(&to).unwrap();
        copy_all(&from, &to).unwrap();
        fs::create_dir_all(&from).unwrap();
        save(&from, "policy", b"decided").unwrap();
        fs::write(from.join("state/other.new"), b"half").unwrap();
        copy_all(&from, &to).unwrap();
        assert_eq!(load(&to, "policy").unwrap().as_deref(), Some(&b"decided"[..]));
        assert_eq!(fs::read_dir(to.join("state")).unwrap().count(), 1);
    }
}
