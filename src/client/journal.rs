//! An append-only file of small JSON records: what must survive a power cut and is read as a whole at the start.
//!
//! In: records, in batches. Out: the records of former runs. A batch is on disk when [`Journal::append`] returns, or it is
//! not there at all. Knows nothing of what the records mean.
//!
//! ```text
//! header   "sledge journal 1\n"
//! record   payload length u32 LE · CRC-32 of length and payload u32 LE · payload (JSON)
//! ```
//!
//! What a crash tore off the end is cut off. Damage before that, which only a failing disk makes, is stepped over: the
//! bytes are kept beside the journal and the caller is told, since they were somebody's words.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::store::StoreError;
use crate::store::dir::sync_dir;
use crate::store::fault::{self, is_due};
use crate::store::log::io_at;

const HEADER: &[u8] = b"sledge journal 1\n";
/// Length and checksum.
const FRAME_BYTES: usize = 8;
/// Bytes of one record; an event has at most some hundred thousand.
const RECORD_BYTES_MAX: usize = 16 << 20;

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    len: u64,
    /// A write failed and could not be taken back: what is on disk is not known.
    poisoned: Option<String>,
}

/// What opening found.
#[derive(Debug)]
pub struct Opened<T> {
    /// The journal, ready to be appended to.
    pub journal: Journal,
    /// All records, oldest first.
    pub records: Vec<T>,
    /// Bytes of damage before the last record; a copy lies beside the journal.
    pub damaged_bytes: u64,
}

impl Journal {
    /// Opens a journal, making an empty one where there is none. Only its owner may read the file.
    ///
    /// # Errors
    /// When the system refuses, or the file is no journal of this version.
    pub fn open<T: DeserializeOwned>(path: &Path) -> Result<Opened<T>, StoreError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(io_at("open", path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io_at("read", path))?;
        // A crash while the file was made leaves a part of the header.
        if bytes.len() < HEADER.len() && HEADER.starts_with(&bytes) {
            file.set_len(0).and_then(|()| file.rewind()).map_err(io_at("write", path))?;
            file.write_all(HEADER).and_then(|()| file.sync_all()).map_err(io_at("write", path))?;
            sync_dir(path.parent().unwrap_or(Path::new(".")))?;
            bytes = HEADER.to_vec();
        }
        let Some(body) = bytes.strip_prefix(HEADER) else {
            return Err(StoreError::Damaged(format!("{} is no journal that this version can read", path.display())));
        };
        let found = read_records(body);
        let damaged_bytes = keep_damage(path, body, &found.damaged)?;
        let len = (HEADER.len() + found.end) as u64;
        file.set_len(len).map_err(io_at("cut", path))?;
        file.seek(SeekFrom::Start(len)).map_err(io_at("read", path))?;
        let journal = Journal { path: path.to_owned(), file, len, poisoned: None };
        Ok(Opened { journal, records: found.records, damaged_bytes })
    }

    /// Appends records, all or none; with `durable` they survive a power cut when this returns.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] and other refusals of the system: nothing was appended then. After a failure that leaves
    /// the disk's state unknown, [`StoreError::Poisoned`] until the next start.
    pub fn append<T: Serialize>(&mut self, records: &[T], durable: bool) -> Result<(), StoreError> {
        if let Some(reason) = &self.poisoned {
            return Err(StoreError::Poisoned(reason.clone()));
        }
        let mut bytes = Vec::new();
        for record in records {
            push_record(&mut bytes, record)?;
        }
        let written = self.write(&bytes, durable);
        if let Err(error) = written {
            let taken_back = self.file.set_len(self.len).and_then(|()| self.file.seek(SeekFrom::Start(self.len)));
            if let Err(worse) = taken_back {
                self.poisoned = Some(worse.to_string());
            }
            return Err(match error.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => StoreError::DiskFull,
                _ => io_at("write", &self.path)(error),
            });
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], durable: bool) -> std::io::Result<()> {
        fault::point("outbox.append");
        if is_due("outbox.half_written") {
            self.file.write_all(&bytes[..bytes.len() / 2])?;
            std::process::abort();
        }
        self.file.write_all(bytes)?;
        fault::point("outbox.written");
        if durable {
            self.sync()?;
            fault::point("outbox.synced");
        }
        Ok(())
    }

    /// Makes everything durable. After a failure nothing is known of what the disk has, whatever a second attempt says.
    fn sync(&mut self) -> std::io::Result<()> {
        let synced = self.file.sync_data();
        if let Err(error) = &synced {
            self.poisoned = Some(error.to_string());
        }
        synced
    }

    /// Replaces all records, all or nothing: for a journal that has grown beyond what it says.
    ///
    /// # Errors
    /// When the system refuses; the journal is as before then.
    pub fn replace<T: Serialize>(&mut self, records: &[T]) -> Result<(), StoreError> {
        let mut bytes = HEADER.to_vec();
        for record in records {
            push_record(&mut bytes, record)?;
        }
        let new = self.path.with_extension("new");
        // One that a crash left behind would keep its mode and owner.
        let _ = std::fs::remove_file(&new);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let write = || -> std::io::Result<File> {
            let mut file = options.open(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fault::point("outbox.shortened");
            std::fs::rename(&new, &self.path)?;
            fault::point("outbox.replaced");
            Ok(file)
        };
        self.file = write().map_err(io_at("write", &self.path))?;
        self.len = bytes.len() as u64;
        sync_dir(self.path.parent().unwrap_or(Path::new(".")))
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.len
    }
}

fn push_record<T: Serialize>(bytes: &mut Vec<u8>, record: &T) -> Result<(), StoreError> {
    let payload = serde_json::to_vec(record).expect("records are made of strings, numbers and lists");
    if payload.len() > RECORD_BYTES_MAX {
        return Err(StoreError::Damaged(format!("a record of {} bytes is too large to be kept", payload.len())));
    }
    let len = (payload.len() as u32).to_le_bytes();
    bytes.extend_from_slice(&len);
    bytes.extend_from_slice(&checksum(&len, &payload).to_le_bytes());
    bytes.extend_from_slice(&payload);
    Ok(())
}

fn checksum(len: &[u8; 4], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(len);
    hasher.update(payload);
    hasher.finalize()
}

struct Found<T> {
    records: Vec<T>,
    /// Stretches that hold no record although there is one behind them: start and end.
    damaged: Vec<(usize, usize)>,
    /// Behind the last record.
    end: usize,
}

fn read_records<T: DeserializeOwned>(body: &[u8]) -> Found<T> {
    let mut found = Found { records: Vec::new(), damaged: Vec::new(), end: 0 };
    let mut at = 0;
    while at < body.len() {
        match record_at(&body[at..]) {
            Some((record, len)) => {
                if at > found.end {
                    found.damaged.push((found.end, at));
                }
                found.records.push(record);
                at += len;
                found.end = at;
            }
            // A record may begin at any later byte; behind the last one, nothing does.
            None => at += 1,
        }
    }
    found
}

fn record_at<T: DeserializeOwned>(bytes: &[u8]) -> Option<(T, usize)> {
    let len_bytes: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
    let sum = u32::from_le_bytes(bytes.get(4..FRAME_BYTES)?.try_into().ok()?);
    let len = u32::from_le_bytes(len_bytes) as usize;
    let payload = bytes.get(FRAME_BYTES..FRAME_BYTES.checked_add(len)?)?;
    // Cheap before dear: the search for a record behind damage tries every byte.
    if len > RECORD_BYTES_MAX || payload.first() != Some(&b'{') || checksum(&len_bytes, payload) != sum {
        return None;
    }
    Some((serde_json::from_slice(payload).ok()?, FRAME_BYTES + len))
}

/// Copies what cannot be read to a file beside the journal, which is never deleted here. Returns how much it is.
fn keep_damage(path: &Path, body: &[u8], damaged: &[(usize, usize)]) -> Result<u64, StoreError> {
    if damaged.is_empty() {
        return Ok(0);
    }
    let bytes: Vec<u8> = damaged.iter().flat_map(|(from, to)| &body[*from..*to]).copied().collect();
    let copy = path.with_extension(format!("damaged-{:08x}", crc32fast::hash(&bytes)));
    std::fs::write(&copy, &bytes).map_err(io_at("write", &copy))?;
    tracing::error!("{} bytes of {} cannot be read; they are in {}", bytes.len(), path.display(), copy.display());
    Ok(bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Word {
        word: String,
    }

    fn words(texts: &[&str]) -> Vec<Word> {
        texts.iter().map(|text| Word { word: (*text).to_owned() }).collect()
    }

    fn open(path: &Path) -> Opened<Word> {
        Journal::open(path).unwrap()
    }

    fn written(path: &Path, texts: &[&str]) -> Vec<u8> {
        let mut opened = open(path);
        for word in words(texts) {
            opened.journal.append(&[word], true).unwrap();
        }
        std::fs::read(path).unwrap()
    }

    /// What was appended is there at the next start, and after a replacement only what replaced it. The file is private.
    #[test]
    fn records_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("outbox.journal");
        written(&path, &["one", "two"]);
        let mut opened = open(&path);
        assert_eq!((&opened.records, opened.damaged_bytes), (&words(&["one", "two"]), 0));
        opened.journal.replace(&words(&["three"])).unwrap();
        opened.journal.append(&words(&["four", "five"]), false).unwrap();
        assert_eq!(opened.journal.bytes(), std::fs::metadata(&path).unwrap().len());
        assert_eq!(open(&path).records, words(&["three", "four", "five"]));
        #[cfg(unix)]
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap()) & 0o777, 0o600);
    }

    /// Cut at any byte, the journal opens with the records before the cut, and goes on.
    #[test]
    fn a_torn_end_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let whole = written(&path, &["one", "two", "three"]);
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut opened = open(&path);
            let kept = opened.records.len();
            assert_eq!(opened.records, words(&["one", "two", "three"][..kept]), "cut at {cut}");
            assert_eq!(opened.damaged_bytes, 0);
            opened.journal.append(&words(&["next"]), true).unwrap();
            assert_eq!(open(&path).records.len(), kept + 1, "cut at {cut}");
        }
    }

    proptest! {
        /// One flipped bit costs at most the record that it is in; the bytes are kept, the others are read.
        #[test]
        fn damage_stands_in_nobodys_way(at in 0_usize..1_000, bit in 0_u8..8) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("j");
            let mut bytes = written(&path, &["one", "two", "three", "four"]);
            let at = HEADER.len() + at % (bytes.len() - HEADER.len());
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, &bytes).unwrap();
            let opened = open(&path);
            prop_assert_eq!(opened.records.len(), 3);
            let lost_last = !opened.records.contains(&words(&["four"])[0]);
            prop_assert_eq!(opened.damaged_bytes == 0, lost_last);
            if !lost_last {
                let kept = std::fs::read_dir(dir.path()).unwrap().filter(|entry| {
                    entry.as_ref().unwrap().file_name().to_string_lossy().contains("damaged")
                });
                prop_assert_eq!(kept.count(), 1);
            }
        }
    }

    /// Some other file is neither read as a journal nor overwritten.
    #[test]
    fn a_strange_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        std::fs::write(&path, "my diary").unwrap();
        assert!(Journal::open::<Word>(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"my diary");
    }
}
