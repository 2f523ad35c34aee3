//! Reading a backup: checking it, and making a store of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::manifest::{Manifest, lock_to_read};
use super::{STRIDE_BYTES, carry_out_erasures, erasure_of, make_folder};
use crate::store::StoreError;
use crate::store::damage::{Stretch, look_through, named_stretch};
use crate::store::dir::{DataDir, Generation, free_bytes_at};
use crate::store::log::{Erasure, HEADER_LEN, Log, Step, io_at};
use crate::store::record::{self, Record};
use crate::store::state;

/// Problems that are described one by one; further ones are only counted.
const PROBLEMS_MAX: usize = 1000;
/// Bytes of log between two reports of progress.
const PROGRESS_BYTES: u64 = 1 << 20;

/// What a look through a backup found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BackupCheck {
    /// Bytes of log that the backup is said to have.
    pub log_bytes: u64,
    /// Records in it.
    pub records: u64,
    /// Those that hold an event; some of these are removed by later records.
    pub events: u64,
    /// Damage that the store had already when the backup was made.
    pub damaged_in_store: Vec<Stretch>,
    /// What is wrong with the backup, a line each; at most a thousand are described.
    pub problems: Vec<String>,
    /// How many problems there are in all.
    pub problem_count: u64,
}

impl BackupCheck {
    fn problem(&mut self, text: String) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(text);
        }
    }
}

/// Reads a whole backup and checks every record of it.
///
/// `progress` is told bytes done and bytes in all.
///
/// # Errors
/// When there is no backup, or its manifest or the head of its copy cannot be relied on. Damage further in is not an
/// error but in the result.
pub fn check_backup(dest: &Path, progress: &dyn Fn(u64, u64)) -> Result<BackupCheck, StoreError> {
    let _lock = lock_to_read(dest)?;
    let manifest = Manifest::read(dest)?;
    let log = manifest.open_log(dest)?;
    read_through(&manifest, &log, &mut |_| Ok(()), progress)
}

/// Makes a store of a backup. The folder must be empty or not be there; the index is built when it is first opened.
///
/// With `accept_damage`, what is sound in a damaged backup is restored.
///
/// # Errors
/// [`StoreError::Damaged`] when the backup is; [`StoreError::InUse`] when the folder is not empty. Nothing is left in it
/// then.
pub fn restore(
    dest: &Path,
    store_dir: &Path,
    accept_damage: bool,
    progress: &dyn Fn(u64, u64),
) -> Result<BackupCheck, StoreError> {
    let _lock = lock_to_read(dest)?;
    let manifest = Manifest::read(dest)?;
    let log = manifest.open_log(dest)?;
    make_folder(store_dir)?;
    if fs::read_dir(store_dir).map_err(io_at("read", store_dir))?.next().is_some() {
        return Err(StoreError::InUse(format!(
            "{} is not empty; name a new folder, or delete this one if an interrupted restore left it",
            store_dir.display()
        )));
    }
    let (needed_bytes, free_bytes) = (manifest.log_bytes, free_bytes_at(store_dir)?);
    if free_bytes < needed_bytes {
        return Err(StoreError::NoRoom { needed_bytes, free_bytes });
    }
    let dir = DataDir::take(store_dir)?;
    let generation = dir.new_generation()?;
    let restored = restore_log(&manifest, &log, &generation, accept_damage, progress)
        .and_then(|check| state::copy_all(dest, store_dir).map(|()| check))
        .and_then(|check| dir.switch_to(&generation).map(|()| check));
    if restored.is_err() {
        // Leaves the folder as empty as it was. What stays is no store, since CURRENT is not there.
        let _ = generation.remove();
        let _ = fs::remove_dir_all(store_dir.join(state::FOLDER));
        let _ = dir.remove_lock_file();
    }
    restored
}

/// Copies the log into a generation. It gets its name when it is whole, so that a part of it is not taken for a store.
fn restore_log(
    manifest: &Manifest,
    log: &Log,
    generation: &Generation,
    accept_damage: bool,
    progress: &dyn Fn(u64, u64),
) -> Result<BackupCheck, StoreError> {
    let part = generation.log().with_extension("part");
    let copy = Log::create(&part, log.id(), None)?;
    let mut pending = Vec::new();
    let mut write = |bytes: &[u8]| {
        pending.extend_from_slice(bytes);
        if pending.len() >= STRIDE_BYTES {
            copy.append_unsynced(&pending)?;
            pending.clear();
        }
        Ok(())
    };
    let check = read_through(manifest, log, &mut write, progress)?;
    copy.append_unsynced(&pending)?;
    if check.problem_count > 0 && !accept_damage {
        let first = check.problems.first().map(String::as_str).unwrap_or_default();
        return Err(StoreError::Damaged(format!(
            "the backup has {} problems, and nothing was restored; the first: {first}",
            check.problem_count
        )));
    }
    copy.sync()?;
    carry_out_erasures(&part, manifest.erased_up_to.min(copy.end()), copy.end())?;
    fs::rename(&part, generation.log()).map_err(io_at("rename", &part))?;
    Ok(check)
}

/// Gives every byte behind the copy's header that counts to `take`, and looks at it.
fn read_through(
    manifest: &Manifest,
    log: &Log,
    take: &mut dyn FnMut(&[u8]) -> Result<(), StoreError>,
    progress: &dyn Fn(u64, u64),
) -> Result<BackupCheck, StoreError> {
    let mut check = BackupCheck { log_bytes: manifest.log_bytes, ..BackupCheck::default() };
    let end = manifest.log_bytes.min(log.end());
    if end < manifest.log_bytes {
        check.problem(format!("{} is cut short: {end} bytes of {}", log.path().display(), manifest.log_bytes));
    }
    let mut damaged = Vec::new();
    let mut being_erased = BTreeMap::new();
    let mut bytes = Vec::new();
    let mut told = 0;
    let mut reader = log.reader_until(HEADER_LEN, end);
    while let Some(step) = reader.next()? {
        match step {
            Step::Record(offset, len, record) => {
                check.records += 1;
                check.events += u64::from(matches!(record, Record::Put(_)));
                match erasure_of(&record) {
                    Some(erasure) if offset >= manifest.erased_up_to => {
                        being_erased.insert(erasure.offset, u64::from(erasure.len));
                    }
                    Some(erasure) => check_erased(log, &erasure, &mut check),
                    None => {}
                }
                log.read_bytes(offset, len as usize, &mut bytes)?;
                if bytes[record::checked_len(&bytes)..].iter().any(|byte| *byte != 0) {
                    check.problem(format!(
                        "{}: the padding before byte {} is damaged",
                        log.path().display(),
                        reader.offset()
                    ));
                }
                take(&bytes)?;
            }
            Step::Damaged { offset, len } | Step::TornTail { offset, len } => {
                damaged.push((offset, len));
                for at in (0..len).step_by(STRIDE_BYTES) {
                    log.read_bytes(offset + at, (len - at).min(STRIDE_BYTES as u64) as usize, &mut bytes)?;
                    take(&bytes)?;
                }
            }
        }
        if reader.offset() >= told + PROGRESS_BYTES {
            told = reader.offset();
            progress(told, manifest.log_bytes);
        }
    }
    // A run that was interrupted while it erased a record is finished by the next one, or by restoring.
    let damaged_in_all = damaged.len();
    damaged.retain(|(offset, len)| being_erased.get(offset) != Some(len));
    check.records += (damaged_in_all - damaged.len()) as u64;
    judge(manifest, log, damaged, &mut check)?;
    Ok(check)
}

fn check_erased(log: &Log, erasure: &Erasure, check: &mut BackupCheck) {
    if let Ok((Record::Put(event), _)) = log.read(erasure.offset, erasure.len as usize, &mut Vec::new())
        && event.id == erasure.id
    {
        check.problem(format!("event {} was removed, and its bytes are still there", event.id));
    }
}

/// Tells the store's damage from the backup's own.
fn judge(manifest: &Manifest, log: &Log, damaged: Vec<(u64, u64)>, check: &mut BackupCheck) -> Result<(), StoreError> {
    if damaged.is_empty() && check.problem_count == 0 && check.records != manifest.records {
        check.problem(format!("{} records are there, and the manifest says {}", check.records, manifest.records));
    }
    for (offset, len) in damaged {
        let stretch = named_stretch(offset, len, &look_through(log, offset, len)?, Vec::new());
        if manifest.damaged.iter().any(|(from, known)| *from <= offset && offset + len <= from + known) {
            check.damaged_in_store.push(stretch);
        } else {
            check.problem(format!("{}: {stretch}", log.path().display()));
        }
    }
    Ok(())
}
