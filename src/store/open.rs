//! Opening a store: which files, how far the index reaches, and bringing it up to the log.
//!
//! The log decides. Whatever is wrong with the index, the answer is to build it again; what is wrong with the log is
//! told, cut off where a write was torn, and otherwise stepped over.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::protocol::EventId;

use super::StoreError;
use super::dir::{DataDir, Generation, write_atomically};
use super::embedded::{Files, Options, WriterState};
use super::fault;
use super::index::bloom::Bloom;
use super::index::buffer::BufferedIndex;
use super::index::sled::SledIndex;
use super::index::{Change, IndexError, Key, Value};
use super::log::{Erasure, HEADER_LEN, Log, Step};
use super::record::{Record, Removed, StoredEvent};
use super::schema::{self, Place, SCHEMA_VERSION};

/// Entries that are read from the index at a time.
const KEYS_A_READ: usize = 4096;
/// Changes that are replayed at a time.
const REPLAY_CHANGES: usize = 4096;
/// Bytes of log between two reports of progress.
const PROGRESS_BYTES: u64 = 1 << 20;

/// What opening found and did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Why the index was built from the whole log, if it was.
    pub rebuilt: Option<String>,
    /// Records that were replayed into the index.
    pub replayed: u64,
    /// Stretches of the log that hold no record: offset and length.
    pub damaged: Vec<(u64, u64)>,
    /// Bytes of an interrupted write that were cut off the end.
    pub torn_bytes: u64,
}

pub(super) struct Opened {
    pub(super) files: Files,
    pub(super) state: WriterState,
    pub(super) report: Report,
}

/// What `index.meta` says: bincode of this, then its CRC-32.
#[derive(bincode::Encode, bincode::Decode, Clone, Copy, Debug, PartialEq, Eq)]
struct IndexMeta {
    schema_version: u32,
    log_id: [u8; 16],
    /// The index holds everything that lies before this byte of the log.
    indexed_up_to: u64,
}

/// Opens the current generation.
pub(super) fn open(dir: &DataDir, options: &Options) -> Result<Opened, StoreError> {
    let generation = match dir.current()? {
        Some(generation) => generation,
        None => first_generation(dir)?,
    };
    dir.remove_other_generations(&generation)?;
    let log = Log::open(&generation.log())?;
    let mut report = Report::default();
    let (engine, meta) = match usable_index(&generation, &log, options)? {
        Ok(found) => found,
        Err(reason) => {
            if log.end() > HEADER_LEN {
                tracing::warn!("building the index again from the log: {reason}");
                report.rebuilt = Some(reason);
            }
            fresh_index(&generation, &log, options)?
        }
    };
    let bloom = saved_bloom(&generation, meta);
    let bloom_is_saved = bloom.is_some();
    let bloom = Arc::new(bloom.unwrap_or_default());
    let index = buffered(engine, &generation, &log, &bloom, options)?;
    if !bloom_is_saved {
        fill_bloom(&index, &bloom)?;
    }
    replay(&log, &index, &bloom, meta.indexed_up_to, options, &mut report)?;
    let state = WriterState::load(&index)?;
    Ok(Opened {
        files: Files { log, index, bloom, generation, base: 0, retired: AtomicBool::new(false) },
        state,
        report,
    })
}

/// Makes an empty generation beside the current one, with room in its filter for `events`; see [`Log::create`].
pub(super) fn new_generation(
    dir: &DataDir,
    options: &Options,
    events: u64,
    dictionary: Option<Vec<u8>>,
) -> Result<Files, StoreError> {
    let generation = dir.new_generation()?;
    let log = Log::create(&generation.log(), secp256k1::rand::random(), dictionary)?;
    let bloom = Arc::new(Bloom::with_capacity(events));
    let index = buffered(open_engine(&generation, options)?, &generation, &log, &bloom, options)?;
    Ok(Files { log, index, bloom, generation, base: 0, retired: AtomicBool::new(false) })
}

/// Calls `each` for every key in a range.
pub(super) fn for_each_key(
    index: &BufferedIndex,
    from: Key,
    to: Key,
    mut each: impl FnMut(&Key),
) -> Result<(), StoreError> {
    let mut next = Some(from);
    let mut keys = Vec::new();
    while let Some(from) = next {
        keys.clear();
        index.scan(&from, &to, KEYS_A_READ, &mut keys)?;
        keys.iter().for_each(|(key, _)| each(key));
        next = keys.last().filter(|_| keys.len() == KEYS_A_READ).and_then(|(key, _)| key.successor());
    }
    Ok(())
}

fn first_generation(dir: &DataDir) -> Result<Generation, StoreError> {
    let generation = dir.new_generation()?;
    Log::create(&generation.log(), secp256k1::rand::random(), None)?;
    dir.switch_to(&generation)?;
    Ok(generation)
}

type Usable = Result<(SledIndex, IndexMeta), String>;

/// The index on disk, or why it cannot be used.
fn usable_index(generation: &Generation, log: &Log, options: &Options) -> Result<Usable, StoreError> {
    let Some(meta) = read_meta(&generation.index_meta()) else {
        return Ok(Err("there is no index, or nothing readable is known of it".to_owned()));
    };
    if meta.schema_version > SCHEMA_VERSION {
        return Err(StoreError::Damaged(format!(
            "the index has schema {}, and this sledge knows up to {SCHEMA_VERSION}; use a newer sledge, or delete {}",
            meta.schema_version,
            generation.index_meta().display()
        )));
    }
    if meta.schema_version < SCHEMA_VERSION {
        return Ok(Err(format!("it has schema {}, and this sledge uses {SCHEMA_VERSION}", meta.schema_version)));
    }
    if meta.log_id != log.id() {
        return Ok(Err("it belongs to another log".to_owned()));
    }
    if meta.indexed_up_to > log.end() {
        return Ok(Err("it reaches further than the log".to_owned()));
    }
    match open_engine(generation, options) {
        Ok(engine) => Ok(Ok((engine, meta))),
        Err(error @ IndexError::Io { .. }) => Err(error.into()),
        Err(error) => Ok(Err(error.to_string())),
    }
}

fn fresh_index(generation: &Generation, log: &Log, options: &Options) -> Result<(SledIndex, IndexMeta), StoreError> {
    generation.remove_index()?;
    let meta = IndexMeta { schema_version: SCHEMA_VERSION, log_id: log.id(), indexed_up_to: HEADER_LEN };
    Ok((open_engine(generation, options)?, meta))
}

fn open_engine(generation: &Generation, options: &Options) -> Result<SledIndex, IndexError> {
    SledIndex::open(&generation.index(), options.cache_bytes, options.index_open_timeout)
}

/// Puts the write buffer in front of the engine; after each run it notes how far the index reaches.
fn buffered(
    engine: SledIndex,
    generation: &Generation,
    log: &Log,
    bloom: &Arc<Bloom>,
    options: &Options,
) -> Result<BufferedIndex, StoreError> {
    let (generation, bloom, log_id) = (generation.clone(), Arc::clone(bloom), log.id());
    let on_merged = move |indexed_up_to: u64| {
        let meta = IndexMeta { schema_version: SCHEMA_VERSION, log_id, indexed_up_to };
        let save = || {
            save_bloom(&generation, &bloom, meta)?;
            fault::point("meta.bloom_saved");
            write_checked(&generation.index_meta(), &meta_bytes(meta))?;
            fault::point("meta.written");
            Ok(())
        };
        save().map_err(|error: StoreError| std::io::Error::other(error.to_string()))
    };
    Ok(BufferedIndex::new(Arc::new(engine), options.run_entries_max, Box::new(on_merged))?)
}

/// Brings the index up to the log and cuts a torn write off its end.
fn replay(
    log: &Log,
    index: &BufferedIndex,
    bloom: &Bloom,
    from: u64,
    options: &Options,
    report: &mut Report,
) -> Result<(), StoreError> {
    let mut replay = Replay::new(index, bloom, from)?;
    let mut reader = log.reader(from);
    let mut erasures = Vec::new();
    let mut told = from;
    let mut torn_at = None;
    while let Some(step) = reader.next()? {
        match step {
            Step::Record(offset, len, record) => {
                report.replayed += 1;
                if let Record::Remove(removed) = &record
                    && removed.why.erases()
                {
                    erasures.push(Erasure { id: removed.id, offset: removed.offset, len: removed.len });
                }
                replay.take(offset, len, &record)?;
            }
            Step::Damaged { offset, len } => {
                replay.cause = None;
                report.damaged.push((offset, len));
            }
            Step::TornTail { offset, len } => {
                report.torn_bytes = len;
                torn_at = Some(offset);
            }
        }
        let done = reader.offset();
        if done >= told + PROGRESS_BYTES {
            told = done;
            (options.progress)(done, log.end());
        }
    }
    if let Some(offset) = torn_at {
        tracing::warn!("cut {} bytes of an unfinished write off the event log", report.torn_bytes);
        log.cut(offset)?;
    }
    replay.flush()?;
    finish_erasures(log, &erasures, report)?;
    for (offset, len) in &report.damaged {
        tracing::error!("{len} damaged bytes in the event log at byte {offset} were passed over; run `sledge verify`");
    }
    Ok(())
}

/// Overwrites what a removal promised to erase and a crash may have left; damage there is a half-done erasure.
fn finish_erasures(log: &Log, erasures: &[Erasure], report: &mut Report) -> Result<(), StoreError> {
    let mut buffer = Vec::new();
    let mut left = Vec::new();
    for erasure in erasures {
        match log.read(erasure.offset, erasure.len as usize, &mut buffer) {
            Ok((Record::Erased(_), _)) => {}
            Ok((Record::Put(event), _)) if event.id != erasure.id => {}
            Ok(_) | Err(StoreError::Damaged(_)) => left.push(*erasure),
            Err(error) => return Err(error),
        }
    }
    report.damaged.retain(|(offset, _)| !left.iter().any(|erasure| erasure.offset == *offset));
    if left.is_empty() { Ok(()) } else { log.erase(&left) }
}

/// Turns log records back into index changes.
pub(super) struct Replay<'i> {
    index: &'i BufferedIndex,
    bloom: &'i Bloom,
    changes: Vec<Change>,
    /// Log offset behind the last record taken.
    end: u64,
    events: u64,
    dead_bytes: u64,
    /// Records before this are counted already.
    counted_up_to: u64,
    /// The event put last. A removal counts only behind the event that caused it: a power cut may keep the removal
    /// and lose the cause, and then the removed event is the one to keep.
    cause: Option<EventId>,
}

impl<'i> Replay<'i> {
    pub(super) fn new(index: &'i BufferedIndex, bloom: &'i Bloom, from: u64) -> Result<Self, StoreError> {
        let state = WriterState::load(index)?;
        Ok(Replay {
            index,
            bloom,
            changes: Vec::new(),
            end: from,
            events: state.events,
            dead_bytes: state.dead_bytes,
            counted_up_to: state.counted_up_to,
            cause: None,
        })
    }

    pub(super) fn take(&mut self, offset: u64, len: u32, record: &Record<'_>) -> Result<(), StoreError> {
        let counts = offset >= self.counted_up_to;
        match record {
            Record::Put(event) => {
                self.put(event, Place::new(offset, len));
                self.events += u64::from(counts);
            }
            Record::Erased(id) => self.cause = Some(*id),
            Record::Packed(_) | Record::Dictionary(_) => {} // readers unpack; the dictionary is the log's own business
            Record::Gone(gone) => self.changes.push((schema::gone_version(gone), Some(Value::new(&[])))),
            Record::Remove(removed) => {
                let was_there = self.remove(removed)?;
                if counts {
                    self.events = self.events.saturating_sub(u64::from(was_there));
                    self.dead_bytes += u64::from(removed.len) + u64::from(len);
                }
            }
        }
        self.end = offset + u64::from(len);
        if self.changes.len() >= REPLAY_CHANGES { self.flush() } else { Ok(()) }
    }

    fn put(&mut self, event: &StoredEvent<'_>, place: Place) {
        self.cause = Some(event.id);
        self.bloom.insert(&event.id.0);
        schema::named_ids(event).for_each(|id| self.bloom.insert(&id.0));
        self.changes.extend(schema::entries(event, place));
    }

    /// Takes out what a removal names; false when it was not there, or stays because its cause was lost.
    fn remove(&mut self, removed: &Removed<'_>) -> Result<bool, StoreError> {
        self.flush()?;
        if !self.has_cause(removed)? {
            return Ok(false);
        }
        let mut was_there = false;
        for key in removed.keys() {
            if !schema::holds_a_place(&key) {
                self.changes.push((key, None));
            } else if self
                .index
                .get(&key)?
                .as_ref()
                .and_then(schema::place)
                .is_some_and(|at| at.offset == removed.offset)
            {
                self.changes.push((key, None));
                was_there = true;
            }
        }
        Ok(was_there)
    }

    fn has_cause(&self, removed: &Removed<'_>) -> Result<bool, StoreError> {
        match removed.by {
            None => Ok(true),
            Some(by) if self.cause == Some(by) => Ok(true),
            // Replay may begin between a cause and its removals.
            Some(by) => Ok(self.index.get(&schema::by_id(&by))?.is_some()),
        }
    }

    pub(super) fn flush(&mut self) -> Result<(), StoreError> {
        self.counted_up_to = self.counted_up_to.max(self.end);
        self.changes.extend(schema::counters(self.events, self.dead_bytes, self.counted_up_to));
        self.index.apply(&self.changes, self.end)?;
        self.changes.clear();
        Ok(())
    }
}

fn fill_bloom(index: &BufferedIndex, bloom: &Bloom) -> Result<(), StoreError> {
    for (from, to) in [schema::all_ids(), schema::all_deleted_ids()] {
        for_each_key(index, from, to, |key| {
            if let Some(half) = schema::id_half(key) {
                let mut id = [0; 32];
                id[16..].copy_from_slice(&half);
                bloom.insert(&id);
            }
        })?;
    }
    Ok(())
}

fn read_meta(path: &Path) -> Option<IndexMeta> {
    let bytes = read_checked(path)?;
    let (meta, _) = bincode::decode_from_slice(&bytes, bincode::config::standard()).ok()?;
    Some(meta)
}

fn meta_bytes(meta: IndexMeta) -> Vec<u8> {
    bincode::encode_to_vec(meta, bincode::config::standard()).expect("a struct of numbers always encodes")
}

/// The saved filter, if it covers what the index covers. It may hold more ids: that does no harm.
fn saved_bloom(generation: &Generation, meta: IndexMeta) -> Option<Bloom> {
    if meta.indexed_up_to == HEADER_LEN {
        return Some(Bloom::default());
    }
    let bytes = read_checked(&generation.bloom())?;
    let (saved_for, used): (IndexMeta, usize) = bincode::decode_from_slice(&bytes, bincode::config::standard()).ok()?;
    let covers = saved_for.log_id == meta.log_id && saved_for.indexed_up_to >= meta.indexed_up_to;
    if covers { Bloom::from_bytes(bytes.get(used..)?).ok() } else { None }
}

fn save_bloom(generation: &Generation, bloom: &Bloom, meta: IndexMeta) -> Result<(), StoreError> {
    let mut bytes = meta_bytes(meta);
    bytes.extend_from_slice(&bloom.to_bytes());
    write_checked(&generation.bloom(), &bytes)
}

fn write_checked(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let crc = crc32fast::hash(bytes);
    write_atomically(path, &[bytes, &crc.to_le_bytes()].concat())
}

fn read_checked(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let crc = bytes.split_off(bytes.len().checked_sub(4)?);
    (crc32fast::hash(&bytes).to_le_bytes()[..] == crc[..]).then_some(bytes)
}
