//! The backup's folder: its manifest, the copies in it, and its lock.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::store::StoreError;
use crate::store::dir::{sync_dir, write_atomically};
use crate::store::log::{FORMAT_VERSION, HEADER_LEN, Log, io_at};

const LOCK: &str = "LOCK";
const MANIFEST: &str = "MANIFEST";
/// Version of the manifest.
const MANIFEST_FORMAT: u32 = 1;
const CRC_LINE_LEN: usize = 9;

/// What the backup's folder holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    /// Version of the manifest.
    format: u32,
    /// Version of the log's format.
    pub(super) log_format: u32,
    /// Name of the copy.
    pub(super) log: String,
    /// Random mark of the log, in hex.
    pub(super) log_id: String,
    /// What lies behind these many bytes of the copy does not count.
    pub(super) log_bytes: u64,
    /// Records in them.
    pub(super) records: u64,
    /// Removals before this byte have been carried out: what they promise to erase is erased in the copy.
    pub(super) erased_up_to: u64,
    /// Stretches that were damaged in the store when they were copied: offset, length.
    pub(super) damaged: Vec<(u64, u64)>,
}

impl Manifest {
    pub(super) fn new(log: String, source: &Log) -> Self {
        Manifest {
            format: MANIFEST_FORMAT,
            log_format: FORMAT_VERSION,
            log,
            log_id: hex(source.id()),
            log_bytes: HEADER_LEN,
            records: 0,
            erased_up_to: HEADER_LEN,
            damaged: Vec::new(),
        }
    }

    /// Reads the manifest of a backup; [`StoreError::Damaged`] when it cannot be relied on or there is none.
    pub(super) fn read(dest: &Path) -> Result<Self, StoreError> {
        let path = dest.join(MANIFEST);
        let damaged = |what: &str| StoreError::Damaged(format!("{}: {what}", path.display()));
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(StoreError::Damaged(format!("there is no backup in {} yet", dest.display())));
            }
            read => read.map_err(io_at("read", &path))?,
        };
        let (json, crc) = bytes.split_at_checked(bytes.len().wrapping_sub(CRC_LINE_LEN)).unwrap_or_default();
        if crc != crc_line(json).as_bytes() {
            return Err(damaged("the checksum is wrong"));
        }
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(json).map_err(|error| damaged(&error.to_string()))?;
        if format > MANIFEST_FORMAT {
            return Err(StoreError::InUse(format!(
                "{} has backup format {format}, and this sledge knows up to {MANIFEST_FORMAT}; use a newer sledge",
                path.display()
            )));
        }
        let manifest: Manifest = serde_json::from_slice(json).map_err(|error| damaged(&error.to_string()))?;
        match copy_number(&manifest.log) {
            Some(_) => Ok(manifest),
            None => Err(damaged("it names no copy")),
        }
    }

    pub(super) fn write(&self, dest: &Path) -> Result<(), StoreError> {
        let mut text = serde_json::to_string(self).expect("made of texts and numbers") + "\n";
        text += &crc_line(text.as_bytes());
        write_atomically(&dest.join(MANIFEST), text.as_bytes())
    }

    /// Whether there is a manifest, readable or not.
    pub(super) fn exists(dest: &Path) -> bool {
        dest.join(MANIFEST).exists()
    }

    /// Opens the copy for reading.
    pub(super) fn open_log(&self, dest: &Path) -> Result<Log, StoreError> {
        let log = Log::open_read_only(&dest.join(&self.log))?;
        log.check_header()?;
        if hex(log.id()) != self.log_id {
            return Err(StoreError::Damaged(format!("{} is not the log that was copied", log.path().display())));
        }
        Ok(log)
    }
}

fn crc_line(json: &[u8]) -> String {
    format!("{:08x}\n", crc32fast::hash(json))
}

pub(super) fn hex(id: [u8; 16]) -> String {
    faster_hex::hex_string(&id)
}

/// The copies in a folder, the oldest first.
pub(super) fn copies_in(dest: &Path) -> Result<Vec<(u32, String)>, StoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dest).map_err(io_at("read", dest))? {
        let name = entry.map_err(io_at("read", dest))?.file_name();
        let name = name.to_string_lossy().into_owned();
        found.extend(copy_number(&name).map(|number| (number, name)));
    }
    found.sort();
    Ok(found)
}

fn copy_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("events-")?.strip_suffix(".log")?;
    let is_number = digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { digits.parse().ok() } else { None }
}

pub(super) fn remove_copy(dest: &Path, name: &str) -> Result<(), StoreError> {
    let path = dest.join(name);
    fs::remove_file(&path).map_err(io_at("delete", &path))?;
    sync_dir(dest)
}

pub(super) fn lock_to_write(dest: &Path) -> Result<File, StoreError> {
    let path = dest.join(LOCK);
    let mut options = OpenOptions::new();
    let lock = options.write(true).create(true).truncate(false).open(&path).map_err(io_at("open", &path))?;
    locked(lock.try_lock(), path).map(|()| lock)
}

/// Keeps a backup run out while the backup is read. Where there is no lock file to open, as on a copy that cannot be
/// written, nobody is to be kept out.
pub(super) fn lock_to_read(dest: &Path) -> Result<Option<File>, StoreError> {
    let path = dest.join(LOCK);
    let Ok(lock) = File::open(&path) else { return Ok(None) };
    locked(lock.try_lock_shared(), path).map(|()| Some(lock))
}

fn locked(result: Result<(), TryLockError>, path: PathBuf) -> Result<(), StoreError> {
    let dest = path.parent().unwrap_or(Path::new(".")).display().to_string();
    match result {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(format!("another backup to {dest} is under way"))),
        Err(TryLockError::Error(error)) => Err(io_at("lock", &path)(error)),
    }
}
