//! Repair: makes a damaged store whole again as far as that goes, and says what is lost.
//!
//! 1. `CURRENT` and the log's header are written again where they can be told from the rest.
//! 2. The index is built again from the log.
//! 3. Events that are whole inside damaged records are stored again, under the rules for any event.
//! 4. Where the log has damage, a new generation gets every sound record that is still stored.
//!
//! A crash at any moment leaves the damaged generation or the new one, and repair can be run again.
//!
//! Where a damaged event had replaced another one, the other one comes back.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::protocol::{Event, EventId, Verified};

use super::compact::{CompactReport, Damage, Pace, compact_with};
use super::damage::{Found, Stretch, indexed_in, look_through, named_stretch};
use super::dir::{DataDir, Generation, free_bytes_at, sync_dir};
use super::embedded::{EmbeddedStore, Options};
use super::log::{HEADER_LEN, Log, Step, io_at};
use super::record::{Record, record_len};
use super::schema::{self, Place};
use super::verify::verify;
use super::{Removal, Store, StoreError};

/// Bytes of log between two reports of progress.
const PROGRESS_BYTES: u64 = 1 << 20;
/// How long closing may take, when the index is written; what is not done is done at the next start.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(600);

/// What is asked of a repair.
pub struct Wish<'w> {
    /// Keep a copy of the damaged log in the data directory.
    pub keep: bool,
    /// The time, seconds since 1970: events that are expired by now are not stored again.
    pub now: u64,
    /// Told what is being done, bytes done, and bytes in all.
    pub progress: &'w dyn Fn(&'static str, u64, u64),
}

/// What a look at a store's log found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Survey {
    /// Bytes of the event log.
    pub log_bytes: u64,
    /// Sound records in it.
    pub records: u64,
    /// What cannot be read as it stands. The last one may be a write that was cut off and never acknowledged.
    pub damaged: Vec<Stretch>,
    /// Events in those that are whole and can be stored again: their ids.
    pub whole: Vec<String>,
}

/// What a repair did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RepairReport {
    /// `CURRENT` was written again, and names this generation.
    pub current_mended: Option<String>,
    /// The header of the log was written again.
    pub header_mended: bool,
    /// Why the index was built again, if it was.
    pub index_rebuilt: Option<String>,
    /// Events that a newer version had replaced, taken out again, since the record of their removal was lost.
    pub replaced_again: u64,
    /// Sizes before and after, where the log had to be written again.
    pub rewritten: Option<CompactReport>,
    /// Events that were read out of damaged records and stored again.
    pub saved: Vec<String>,
    /// What could not be saved.
    pub lost: Vec<Stretch>,
    /// Where the damaged log was copied to.
    pub kept: Option<PathBuf>,
    /// Events in the store now.
    pub events: u64,
    /// What is still wrong; empty when all is well.
    pub problems: Vec<String>,
}

/// Looks through the log of a store that nobody else has, and changes nothing.
///
/// # Errors
/// When there is no log to be found, or it cannot be read.
pub fn survey(dir: &Path, progress: &dyn Fn(u64, u64)) -> Result<Survey, StoreError> {
    let dir = DataDir::take(dir)?;
    let (generation, _) = generation_of(&dir)?;
    let scan = Scan::of(&Log::open_read_only(&generation.log())?, progress)?;
    Ok(Survey {
        log_bytes: scan.log_bytes,
        records: scan.records,
        damaged: scan.named(&BTreeMap::new()),
        whole: scan.found.values().flat_map(|found| found.whole.keys().map(EventId::to_hex)).collect(),
    })
}

/// Repairs the store in `dir`. It must not be in use.
///
/// # Errors
/// When there is no event log to be found, or the disk cannot hold what is to be written.
pub fn repair(dir: &Path, options: &Options, wish: &Wish<'_>) -> Result<RepairReport, StoreError> {
    let mut report = RepairReport::default();
    let dir = DataDir::take(dir)?;
    let scan = mend_files(&dir, wish, &mut report)?;
    let store = EmbeddedStore::open_in(dir, options)?;
    report.index_rebuilt.clone_from(&store.open_report().rebuilt);
    let indexed = indexed_in(&store.files(), &scan.stretches())?;
    let only_tail = scan.found.keys().all(|stretch| scan.tail == Some(*stretch));
    let is_well = only_tail && check(&store, wish)?.is_empty();
    let store = if is_well || report.index_rebuilt.is_some() {
        store
    } else {
        report.index_rebuilt = Some("it did not agree with the event log".to_owned());
        with_new_index(store, options)?
    };
    let still_damaged: Vec<u64> = store.open_report().damaged.iter().map(|(offset, _)| *offset).collect();
    // What was damaged because its erasure was interrupted has been erased by now, and is not lost.
    let lost = scan.found.keys().filter(|at| still_damaged.contains(&at.0) || scan.tail == Some(**at));
    let lost: Vec<_> = lost.copied().collect();
    report.saved = store_again(&store, &scan, &lost, wish.now)?;
    if !is_well {
        report.replaced_again = replace_again(&store)?;
    }
    report.lost = without_saved(scan.named(&indexed), &lost, &report.saved);
    if !still_damaged.is_empty() {
        let progress = |done, total| (wish.progress)("writing the log again", done, total);
        let pace = Pace::flat_out(&progress);
        report.rewritten = Some(compact_with(&store, &pace, Damage::StepOver)?);
    }
    report.problems = check(&store, wish)?;
    report.events = store.stats().events;
    store.close(Instant::now() + CLOSE_TIME_MAX)?;
    Ok(report)
}

/// What does not need the store to be open: `CURRENT`, the header, and a look through the log before anything is cut.
fn mend_files(dir: &DataDir, wish: &Wish<'_>, report: &mut RepairReport) -> Result<Scan, StoreError> {
    let (generation, is_named) = generation_of(dir)?;
    if !is_named {
        dir.switch_to(&generation)?;
        report.current_mended = Some(generation.name().to_owned());
    }
    report.header_mended = Log::mend_header(&generation.log())?;
    let log = Log::open_read_only(&generation.log())?;
    let scan = Scan::of(&log, &|done, total| (wish.progress)("reading the log", done, total))?;
    if wish.keep && !scan.found.is_empty() {
        report.kept = Some(keep_copy(dir, &generation, log.end())?);
    }
    Ok(scan)
}

/// The generation that `CURRENT` names, or else the only one that has a log; and whether it is named.
fn generation_of(dir: &DataDir) -> Result<(Generation, bool), StoreError> {
    let named = match dir.current() {
        Err(StoreError::Damaged(_)) => None,
        current => current?,
    };
    if let Some(generation) = named.filter(|generation| generation.log().is_file()) {
        return Ok((generation, true));
    }
    let mut found = dir.generations()?;
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok((only, false)),
        (None, _) => Err(StoreError::Damaged(format!("there is no event log in {}", dir.path().display()))),
        (Some(last), false) => Err(StoreError::Damaged(format!(
            "{} has several generations, up to {}, and CURRENT does not say which one counts; write the name of the \
             lowest into CURRENT (compaction deletes it as soon as the next is whole), and keep a copy of all",
            dir.path().display(),
            last.name()
        ))),
    }
}

fn keep_copy(dir: &DataDir, generation: &Generation, needed_bytes: u64) -> Result<PathBuf, StoreError> {
    let free_bytes = free_bytes_at(dir.path())?;
    if free_bytes < needed_bytes {
        return Err(StoreError::NoRoom { needed_bytes, free_bytes });
    }
    let path = dir.path().join(format!("damaged-{}.log", generation.name()));
    fs::copy(generation.log(), &path).map_err(io_at("copy the log to", &path))?;
    File::open(&path).and_then(|copy| copy.sync_all()).map_err(io_at("sync", &path))?;
    sync_dir(dir.path())?;
    Ok(path)
}

/// What damaged stretches of a log hold, by offset and length.
#[derive(Default)]
struct Scan {
    log_bytes: u64,
    records: u64,
    found: BTreeMap<(u64, u64), Found>,
    /// The stretch that ends the log. Opening the store cuts it off.
    tail: Option<(u64, u64)>,
}

impl Scan {
    fn of(log: &Log, progress: &dyn Fn(u64, u64)) -> Result<Self, StoreError> {
        let mut scan = Scan { log_bytes: log.end(), ..Scan::default() };
        let mut told = 0;
        let mut reader = log.reader(HEADER_LEN);
        while let Some(step) = reader.next()? {
            let stretch = match step {
                Step::Record(..) => {
                    scan.records += 1;
                    None
                }
                Step::Damaged { offset, len } => Some((offset, len)),
                Step::TornTail { offset, len } => {
                    scan.tail = Some((offset, len));
                    scan.tail
                }
            };
            if let Some((offset, len)) = stretch.filter(|stretch| !is_spare_dictionary(log, *stretch)) {
                scan.found.insert((offset, len), look_through(log, offset, len)?);
            }
            if reader.offset() >= told + PROGRESS_BYTES {
                told = reader.offset();
                progress(told, log.end());
            }
        }
        Ok(scan)
    }

    fn stretches(&self) -> Vec<(u64, u64)> {
        self.found.keys().copied().collect()
    }

    fn named(&self, indexed: &BTreeMap<u64, Vec<[u8; 16]>>) -> Vec<Stretch> {
        let halves = |offset| indexed.get(offset).cloned().unwrap_or_default();
        self.found.iter().map(|((offset, len), found)| named_stretch(*offset, *len, found, halves(offset))).collect()
    }
}

/// Whether a damaged stretch is one of the two dictionaries of a log whose other one is sound: nothing is lost then.
fn is_spare_dictionary(log: &Log, (offset, len): (u64, u64)) -> bool {
    let dictionary_len = log.dictionary().map(|dictionary| record_len(dictionary.len()) as u64);
    dictionary_len == Some(len) && (offset == HEADER_LEN || offset == HEADER_LEN + len)
}

fn with_new_index(store: EmbeddedStore, options: &Options) -> Result<EmbeddedStore, StoreError> {
    let generation = store.files().generation.clone();
    let dir = store.into_dir();
    generation.remove_index()?;
    EmbeddedStore::open_in(dir, options)
}

fn check(store: &EmbeddedStore, wish: &Wish<'_>) -> Result<Vec<String>, StoreError> {
    Ok(verify(store, &|done, total| (wish.progress)("checking", done, total))?.problems)
}

/// Stores the whole events of these stretches again, if the rules still want them. Returns those that are there then.
fn store_again(
    store: &EmbeddedStore,
    scan: &Scan,
    stretches: &[(u64, u64)],
    now: u64,
) -> Result<Vec<String>, StoreError> {
    let found = stretches.iter().filter_map(|at| scan.found.get(at));
    let events: Vec<Verified<Event>> = found.flat_map(|found| found.whole.values().cloned()).collect();
    let mut saved = Vec::new();
    for event in &events {
        store.apply(std::slice::from_ref(event), now)?;
        if store.contains(&event.id)? {
            saved.push(event.id.to_hex());
        }
    }
    Ok(saved)
}

/// Takes out the events at whose address there is another one, which came later. Returns how many there were.
fn replace_again(store: &EmbeddedStore) -> Result<u64, StoreError> {
    let files = store.files();
    let mut replaced = Vec::new();
    let mut reader = files.log.reader(HEADER_LEN);
    while let Some(step) = reader.next()? {
        let Step::Record(offset, len, Record::Put(event)) = step else { continue };
        let Some(address) = event.address() else { continue };
        let here = Some(Place::new(offset, len));
        let current = files.index.get(&schema::by_address(&address))?.as_ref().and_then(schema::place);
        if current != here && files.place_of(&event.id)? == here {
            replaced.push(event.id);
        }
    }
    store.remove(&replaced, Removal::Replaced)
}

/// The stretches of which something is lost, without what was saved.
fn without_saved(named: Vec<Stretch>, lost: &[(u64, u64)], saved: &[String]) -> Vec<Stretch> {
    let mut rest = Vec::new();
    for mut stretch in named.into_iter().filter(|stretch| lost.contains(&(stretch.offset, stretch.len))) {
        let before = stretch.events.len();
        stretch.events.retain(|id| !saved.iter().any(|saved| saved.ends_with(id.trim_start_matches('?'))));
        if before == 0 || !stretch.events.is_empty() {
            rest.push(stretch);
        }
    }
    rest
}

#[cfg(test)]
mod tests;
