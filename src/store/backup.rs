//! Backup: a copy of the event log up to some record, taken while another process serves and writes the store.
//!
//! ```text
//! LOCK                held while a backup runs
//! MANIFEST            a line of JSON, see `Manifest`, and a line with its CRC-32 in hex
//! events-000001.log   the copy that MANIFEST names
//! state/              the store's small blobs, see [`super::state`], as they were when the copy was put in force
//! ```
//!
//! Any prefix of the log is a database, so a backup goes on where the one before ended. Compaction makes another log;
//! then a copy from its beginning is made beside the old copy, and `MANIFEST` switches. What MANIFEST does not name or
//! reach does not count, so a backup that was interrupted leaves the one before.
//!
//! What was erased in the store is erased in the copy as well: the removal in the log says where. The copy has no
//! checksum of the whole, since it would have to be made anew with each erasure: every record has its own, and their
//! number and length are in the manifest.

mod manifest;
mod restore;

pub use restore::{BackupCheck, check_backup, restore};

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::protocol::EventId;

use super::StoreError;
use super::dir::{DataDir, free_bytes_at, sync_dir};
use super::fault;
use super::log::{Erasure, FORMAT_VERSION, HEADER_LEN, Log, Step, io_at};
use super::record::Record;
use super::state;
use manifest::{Manifest, copies_in, hex, lock_to_write, remove_copy};

/// Copied bytes that are written at a time.
const STRIDE_BYTES: usize = 1 << 20;
/// The copy's end must agree with the store for this many bytes before anything is added. A write that the store took
/// back may have been copied; it is shorter than this.
const COMPARED_BYTES: u64 = 64 << 20;
/// Erasures that are carried out at a time.
const ERASURES_AT_ONCE: usize = 4096;
/// A record that is no record may be in the middle of being written or erased: it is looked at this often.
const LOOKS_MAX: u32 = 20;
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);
/// How often the current generation is looked up, should compaction delete the one just found.
const OPEN_ATTEMPTS_MAX: u32 = 100;

/// What a backup run came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BackupReport {
    /// Why the copy was begun anew; `None` when only what was new has been added.
    pub begun_anew: Option<String>,
    /// Bytes of log that this run copied.
    pub bytes_copied: u64,
    /// Bytes of log in the backup.
    pub log_bytes: u64,
    /// Records in the backup.
    pub records: u64,
    /// Records of events removed since that this run erased in the backup.
    pub erased: u64,
    /// Stretches that are damaged in the store, and so in the backup: offset and length.
    pub damaged: Vec<(u64, u64)>,
}

/// Makes or renews the backup in `dest` of the store in `store_dir`, which another process may have and write.
///
/// Everything acknowledged before the call is in the backup, except what was removed meanwhile. `progress` is told the
/// bytes done and the bytes in all.
///
/// # Errors
/// [`StoreError::NoRoom`] and [`StoreError::DiskFull`] speak of the disk of `dest`. The backup before stays good
/// whatever goes wrong.
pub fn backup(store_dir: &Path, dest: &Path, progress: &dyn Fn(u64, u64)) -> Result<BackupReport, StoreError> {
    let source = open_current(store_dir)?;
    if dest.join("CURRENT").exists() {
        return Err(StoreError::InUse(format!("{} is a store; name another folder for the backup", dest.display())));
    }
    make_folder(dest)?;
    let _lock = lock_to_write(dest)?;
    let report = copy_log(dest, &source, progress)?;
    state::copy_all(store_dir, dest)?;
    Ok(report)
}

fn copy_log(dest: &Path, source: &Log, progress: &dyn Fn(u64, u64)) -> Result<BackupReport, StoreError> {
    let reason = match Manifest::read(dest) {
        Ok(manifest) => match copy_to_extend(dest, &manifest, source)? {
            Ok(log) => return extend(dest, source, &log, manifest, progress),
            Err(reason) => reason,
        },
        Err(StoreError::Damaged(reason)) => reason,
        Err(error) => return Err(error),
    };
    begin_anew(dest, source, reason, progress)
}

fn make_folder(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(io_at("create", path))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync_dir(parent.unwrap_or(Path::new(".")))
}

/// Opens the log that is current, read only. The generation may be deleted between the look and the opening.
fn open_current(store_dir: &Path) -> Result<Log, StoreError> {
    let mut attempts = 0;
    loop {
        let Some(generation) = DataDir::current_in(store_dir)? else {
            return Err(StoreError::Damaged(format!("there is no store in {}", store_dir.display())));
        };
        attempts += 1;
        match Log::open_read_only(&generation.log()) {
            Err(StoreError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound && attempts < OPEN_ATTEMPTS_MAX =>
            {
                std::thread::yield_now();
            }
            opened => return opened,
        }
    }
}

/// Adds what is new, and deletes what an interrupted run left.
fn extend(
    dest: &Path,
    source: &Log,
    log: &Log,
    manifest: Manifest,
    progress: &dyn Fn(u64, u64),
) -> Result<BackupReport, StoreError> {
    for (_, name) in copies_in(dest)?.iter().filter(|(_, name)| *name != manifest.log) {
        remove_copy(dest, name)?;
    }
    let before = manifest.log_bytes;
    let mut copy = Copy::new(source, log, manifest, progress);
    if let Err(error) = copy.copy_new() {
        let _ = log.cut(before); // gives the room back; the next run would do so, too
        return Err(error);
    }
    let (manifest, erased) = copy.put_in_force(dest)?;
    Ok(report(None, manifest.log_bytes - before, &manifest, erased))
}

/// Makes a whole copy beside the present one, and switches.
fn begin_anew(
    dest: &Path,
    source: &Log,
    reason: String,
    progress: &dyn Fn(u64, u64),
) -> Result<BackupReport, StoreError> {
    let old = copies_in(dest)?;
    let to_keep = match Manifest::read(dest) {
        Ok(manifest) => Some(manifest.log),
        // Better than nothing until there is a new copy.
        Err(_) if Manifest::exists(dest) => old.last().map(|(_, name)| name.clone()),
        Err(_) => None,
    };
    let (kept, leftovers): (Vec<_>, Vec<_>) = old.iter().partition(|(_, name)| Some(name) == to_keep.as_ref());
    leftovers.iter().try_for_each(|(_, name)| remove_copy(dest, name))?;
    let (needed_bytes, free_bytes) = (source.end(), free_bytes_at(dest)?);
    if free_bytes < needed_bytes {
        return Err(StoreError::NoRoom { needed_bytes, free_bytes });
    }
    let number = old.last().map_or(1, |(number, _)| number + 1);
    let manifest = Manifest::new(format!("events-{number:06}.log"), source);
    let log = Log::create(&dest.join(&manifest.log), source.id(), None)?;
    sync_dir(dest)?;
    let name = manifest.log.clone();
    let mut copy = Copy::new(source, &log, manifest, progress);
    if let Err(error) = copy.copy_new() {
        let _ = remove_copy(dest, &name); // gives the room back; the next run would do so, too
        return Err(error);
    }
    let (manifest, erased) = copy.put_in_force(dest)?;
    kept.iter().try_for_each(|(_, name)| remove_copy(dest, name))?;
    fault::point("backup.old_removed");
    Ok(report(Some(reason), manifest.log_bytes - HEADER_LEN, &manifest, erased))
}

fn report(begun_anew: Option<String>, bytes_copied: u64, manifest: &Manifest, erased: u64) -> BackupReport {
    BackupReport {
        begun_anew,
        bytes_copied,
        log_bytes: manifest.log_bytes,
        records: manifest.records,
        erased,
        damaged: manifest.damaged.clone(),
    }
}

/// The present copy, cut to what counts, if the store goes on where it ends; else why not.
fn copy_to_extend(dest: &Path, manifest: &Manifest, source: &Log) -> Result<Result<Log, String>, StoreError> {
    if manifest.log_id != hex(source.id()) {
        return Ok(Err("the store was compacted since the last backup".to_owned()));
    }
    if manifest.log_format != FORMAT_VERSION {
        return Ok(Err(format!("the last backup has log format {}", manifest.log_format)));
    }
    let log = match Log::open(&dest.join(&manifest.log)) {
        Ok(log) if log.id() == source.id() => log,
        Ok(_) => return Ok(Err("the copy is damaged: its header names another log".to_owned())),
        Err(StoreError::Damaged(reason)) => return Ok(Err(reason)),
        Err(StoreError::Io { source, what }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Err(format!("{what}: {source}")));
        }
        Err(error) => return Err(error),
    };
    if log.end() < manifest.log_bytes {
        return Ok(Err(format!("the copy is cut short: {} bytes of {}", log.end(), manifest.log_bytes)));
    }
    if log.end() > manifest.log_bytes {
        log.cut(manifest.log_bytes)?; // what an interrupted run left
    }
    if source.end() < manifest.log_bytes || !ends_alike(&log, source)? {
        return Ok(Err("the store does not go on where the copy ends".to_owned()));
    }
    Ok(Ok(log))
}

/// Whether the last records of the copy are the store's, but for those erased there since.
fn ends_alike(copy: &Log, source: &Log) -> Result<bool, StoreError> {
    let start = copy.end().saturating_sub(COMPARED_BYTES).max(HEADER_LEN);
    let mut reader = copy.reader(start);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    while let Some(step) = reader.next()? {
        let (offset, len, ours_id) = match step {
            Step::Record(offset, len, record) => (offset, len, event_of(&record)),
            // The first look may fall into the middle of a record.
            Step::Damaged { offset, .. } if offset == start && start > HEADER_LEN => continue,
            // Damage that was copied is equal, and the records behind it decide; own damage needs a new copy.
            Step::Damaged { offset, len } | Step::TornTail { offset, len } => {
                copy.read_bytes(offset, len as usize, &mut ours)?;
                source.read_bytes(offset, len as usize, &mut theirs)?;
                if ours == theirs {
                    continue;
                }
                return Ok(false);
            }
        };
        ours.clear();
        reader.copy_record(offset, len, &mut ours);
        let same = match source.read(offset, len as usize, &mut theirs) {
            Ok((Record::Erased(id), their_len)) => their_len == len && Some(id) == ours_id,
            Ok((_, their_len)) => their_len == len && theirs.get(..len as usize) == Some(&ours[..]),
            Err(StoreError::Damaged(_)) => true, // the copy is better than the store
            Err(error) => return Err(error),
        };
        if !same {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The event that a record holds or held.
fn event_of(record: &Record<'_>) -> Option<EventId> {
    match record {
        Record::Put(event) => Some(event.id),
        Record::Erased(id) => Some(*id),
        _ => None,
    }
}

/// One run of copying, from where the manifest ends.
struct Copy<'c> {
    source: &'c Log,
    log: &'c Log,
    manifest: Manifest,
    progress: &'c dyn Fn(u64, u64),
    /// Bytes that are not written yet; they belong right behind `manifest.log_bytes - pending.len()`.
    pending: Vec<u8>,
}

impl<'c> Copy<'c> {
    fn new(source: &'c Log, log: &'c Log, manifest: Manifest, progress: &'c dyn Fn(u64, u64)) -> Self {
        Copy { source, log, manifest, progress, pending: Vec::new() }
    }

    /// Copies what is behind the manifest's end. Nothing relies on it yet.
    fn copy_new(&mut self) -> Result<(), StoreError> {
        fault::point("backup.begin");
        let end = self.source.end();
        self.copy_up_to(end)?;
        self.copy_rest(end)?;
        self.write_pending()?;
        fault::point("backup.copied");
        self.log.sync()
    }

    /// Puts the copy in force, and erases what its new records say. Returns how many records that was.
    fn put_in_force(mut self, dest: &Path) -> Result<(Manifest, u64), StoreError> {
        self.manifest.write(dest)?;
        fault::point("backup.in_force");
        let erased = carry_out_erasures(self.log.path(), self.manifest.erased_up_to, self.manifest.log_bytes)?;
        fault::point("backup.erased");
        self.manifest.erased_up_to = self.manifest.log_bytes;
        self.manifest.write(dest)?;
        Ok((self.manifest, erased))
    }

    /// Copies whole records up to where the log ended when this began.
    fn copy_up_to(&mut self, end: u64) -> Result<(), StoreError> {
        let mut looked = (0, 0);
        while self.manifest.log_bytes < end {
            let source = self.source;
            let mut reader = source.reader_until(self.manifest.log_bytes, end);
            while let Some(step) = reader.next()? {
                match step {
                    Step::Record(offset, len, _) => {
                        reader.copy_record(offset, len, &mut self.pending);
                        self.took_record(len)?;
                    }
                    Step::Damaged { offset, .. } if looked != (offset, LOOKS_MAX) => {
                        looked = if looked.0 == offset { (offset, looked.1 + 1) } else { (offset, 1) };
                        std::thread::sleep(LOOK_AGAIN_AFTER);
                        break;
                    }
                    Step::Damaged { offset, len } => self.take_damage(offset, len)?,
                    Step::TornTail { .. } => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// Copies what was being written when the copy began: a record that was cut by its end, and the removals behind the
    /// last event, which belong to it.
    fn copy_rest(&mut self, end: u64) -> Result<(), StoreError> {
        for _ in 0..LOOKS_MAX {
            let source = self.source;
            let mut reader = source.reader_until(self.manifest.log_bytes, source.file_len()?);
            loop {
                match reader.next()? {
                    Some(Step::Record(offset, len, record))
                        if offset < end || matches!(record, Record::Remove(_) | Record::Gone(_)) =>
                    {
                        reader.copy_record(offset, len, &mut self.pending);
                        self.took_record(len)?;
                    }
                    Some(Step::Damaged { .. } | Step::TornTail { .. }) => break,
                    Some(Step::Record(..)) | None => return Ok(()),
                }
            }
            std::thread::sleep(LOOK_AGAIN_AFTER);
        }
        Ok(())
    }

    fn took_record(&mut self, len: u32) -> Result<(), StoreError> {
        self.manifest.log_bytes += u64::from(len);
        self.manifest.records += 1;
        if self.pending.len() >= STRIDE_BYTES { self.write_pending() } else { Ok(()) }
    }

    /// Offsets must stay, so damage is copied as it is.
    fn take_damage(&mut self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.write_pending()?;
        let mut bytes = Vec::new();
        let mut done = 0;
        while done < len {
            let want = (len - done).min(STRIDE_BYTES as u64) as usize;
            self.source.read_bytes(offset + done, want, &mut bytes)?;
            bytes.resize(want, 0);
            self.log.append_unsynced(&bytes)?;
            done += want as u64;
        }
        self.manifest.damaged.push((offset, len));
        self.manifest.log_bytes += len;
        Ok(())
    }

    fn write_pending(&mut self) -> Result<(), StoreError> {
        self.log.append_unsynced(&self.pending)?;
        self.pending.clear();
        fault::point("backup.stride");
        (self.progress)(self.manifest.log_bytes, self.source.end().max(self.manifest.log_bytes));
        Ok(())
    }
}

/// Overwrites in a copy what the removals between two of its bytes promise to erase. Returns how many records that
/// were.
fn carry_out_erasures(copy: &Path, from: u64, to: u64) -> Result<u64, StoreError> {
    let log = &Log::open(copy)?; // a copy just made does not know its own dictionary
    let mut reader = log.reader_until(from, to);
    let mut erasures = Vec::new();
    let mut erased = 0;
    loop {
        let step = reader.next()?;
        let at_end = step.is_none();
        if let Some(Step::Record(_, _, record)) = &step {
            erasures.extend(erasure_of(record));
        }
        if at_end || erasures.len() >= ERASURES_AT_ONCE {
            erasures.retain(|erasure| !is_erased(log, erasure));
            if !erasures.is_empty() {
                log.erase(&erasures)?;
            }
            erased += erasures.len() as u64;
            erasures.clear();
        }
        if at_end {
            return Ok(erased);
        }
    }
}

/// What a record promises to erase.
fn erasure_of(record: &Record<'_>) -> Option<Erasure> {
    match record {
        Record::Remove(removed) if removed.why.erases() && removed.len > 0 => {
            Some(Erasure { id: removed.id, offset: removed.offset, len: removed.len })
        }
        _ => None,
    }
}

/// Whether nothing is left to erase. Damage there is an erasure that was interrupted.
fn is_erased(log: &Log, erasure: &Erasure) -> bool {
    match log.read(erasure.offset, erasure.len as usize, &mut Vec::new()) {
        Ok((Record::Put(event), _)) => event.id != erasure.id,
        Ok(_) => true,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests;
