//! Opening a store: which files, how far the index reaches, and bringing it up to the log.
//!
//! The log decides. Whatever is wrong with the index, the answer is to build it again; what is wrong with the log is
//! told, cut off where a write was torn, and otherwise stepped over.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::StoreError;
use super::dir::{DataDir, Generation, write_atomically};
use super::embedded::{Files, Options, WriterState};
use super::fault;
use super::index::bloom::Bloom;
use super::index::buffer::BufferedIndex;
use super::index::room::WithRoom;
use super::index::{Change, Engine, Index, IndexError, Key};
use super::log::{Erasure, HEADER_LEN, Log, Step, io_at};
use super::record::Record;
use super::replay::Replay;
use super::schema::{self, SCHEMA_VERSION};

/// Entries that are read from the index at a time.
const KEYS_A_READ: usize = 4096;
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
    engine: Engine,
    log_id: [u8; 16],
    /// The index holds everything that lies before this byte of the log.
    indexed_up_to: u64,
}

impl IndexMeta {
    fn new(log: &Log, engine: Engine, indexed_up_to: u64) -> Self {
        IndexMeta { schema_version: SCHEMA_VERSION, engine, log_id: log.id(), indexed_up_to }
    }
}

/// Opens the current generation.
pub(super) fn open(dir: &DataDir, options: &Options) -> Result<Opened, StoreError> {
    let generation = match dir.current()? {
        Some(generation) => generation,
        None => first_generation(dir)?,
    };
    // First: what CURRENT names must prove to be a log before anything else is deleted.
    let log = Log::open(&generation.log())?;
    dir.remove_other_generations(&generation)?;
    let mut report = Report::default();
    let mut counts_right = true;
    let (engine, meta) = match usable_index(&generation, &log, options)? {
        Ok(found) => {
            counts_right = !generation.rebuild_mark().exists();
            found
        }
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
    let mut state = WriterState::load(&index)?;
    if !counts_right {
        state.events = count_again(&index, &log, &state)?;
    }
    let log = log.with_hot_bytes(options.hot_bytes);
    Ok(Opened { files: Files::new(generation, log, index, bloom), state, report })
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
    Ok(Files::new(generation, log.with_hot_bytes(options.hot_bytes), index, bloom))
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
    for found in dir.generations()? {
        let len = fs::metadata(found.log()).map_err(io_at("look at", &found.log()))?.len();
        if len > HEADER_LEN {
            return Err(StoreError::Damaged(format!(
                "{} holds events, and the file CURRENT that should name its folder is missing; see `sledge repair`",
                found.log().display()
            )));
        }
    }
    let generation = dir.new_generation()?;
    Log::create(&generation.log(), secp256k1::rand::random(), None)?;
    dir.switch_to(&generation)?;
    Ok(generation)
}

type Usable = Result<(Arc<dyn Index>, IndexMeta), String>;

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
    if meta.engine != options.engine {
        return Ok(Err(format!("it is kept by {}, and the settings ask for {}", meta.engine, options.engine)));
    }
    if meta.log_id != log.id() {
        return Ok(Err("it belongs to another log".to_owned()));
    }
    if meta.indexed_up_to > log.end() {
        return Ok(Err("it reaches further than the log".to_owned()));
    }
    match open_engine(generation, options) {
        Ok(engine) if meta.indexed_up_to > HEADER_LEN && !has_counters(&*engine) => {
            Ok(Err("its files are gone, or empty".to_owned()))
        }
        Ok(engine) => Ok(Ok((engine, meta))),
        Err(error @ IndexError::Io { .. }) => Err(error.into()),
        Err(error) => Ok(Err(error.to_string())),
    }
}

/// Whether an index was ever written to: the counters are in the first run.
fn has_counters(engine: &dyn Index) -> bool {
    matches!(engine.get(&schema::counter(schema::Counter::CountedUpTo)), Ok(Some(_)))
}

fn fresh_index(
    generation: &Generation,
    log: &Log,
    options: &Options,
) -> Result<(Arc<dyn Index>, IndexMeta), StoreError> {
    fault::point("rebuild.begin");
    generation.remove_index()?;
    fault::point("rebuild.index_removed");
    if log.end() > HEADER_LEN {
        write_atomically(&generation.rebuild_mark(), b"see store::open\n")?;
    }
    let meta = IndexMeta::new(log, options.engine, HEADER_LEN);
    let engine = open_engine(generation, options)?;
    fault::point("rebuild.index_made");
    Ok((engine, meta))
}

fn open_engine(generation: &Generation, options: &Options) -> Result<Arc<dyn Index>, IndexError> {
    options.engine.open(&generation.index(), options.cache_bytes, options.index_open_timeout)
}

/// Puts the write buffer in front of the engine; after each run it notes how far the index reaches.
fn buffered(
    engine: Arc<dyn Index>,
    generation: &Generation,
    log: &Log,
    bloom: &Arc<Bloom>,
    options: &Options,
) -> Result<BufferedIndex, StoreError> {
    let index_dir = generation.index();
    let (generation, bloom) = (generation.clone(), Arc::clone(bloom));
    let meta = IndexMeta::new(log, options.engine, HEADER_LEN);
    let end_at_opening = log.end();
    let on_merged = move |indexed_up_to: u64| {
        let meta = IndexMeta { indexed_up_to, ..meta };
        let save = || {
            save_bloom(&generation, &bloom, meta)?;
            fault::point("meta.bloom_saved");
            write_checked(&generation.index_meta(), &meta_bytes(meta))?;
            fault::point("meta.written");
            if indexed_up_to > end_at_opening {
                // What opening counted again was there before anything new, so it is in the index now.
                let _ = fs::remove_file(generation.rebuild_mark());
            }
            Ok(())
        };
        save().map_err(|error: StoreError| match error {
            StoreError::DiskFull => std::io::ErrorKind::StorageFull.into(),
            error => std::io::Error::other(error.to_string()),
        })
    };
    let engine = Arc::new(WithRoom::new(engine, &index_dir));
    Ok(BufferedIndex::new(engine, options.run_entries_max, Box::new(on_merged))?)
}

/// Counts events where a rebuild was broken off and went on later. What a removal names was counted if it lay before the
/// place where the replay goes on, and a rebuild breaks this rule: the event may have been erased long before, and was
/// then never counted.
fn count_again(index: &BufferedIndex, log: &Log, state: &WriterState) -> Result<u64, StoreError> {
    let (from, to) = schema::all_ids();
    let mut events = 0;
    for_each_key(index, from, to, |_| events += 1)?;
    let changes: Vec<Change> = schema::counters(events, state.dead_bytes, log.end()).into_iter().collect();
    index.apply(&changes, log.end())?;
    Ok(events)
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
    let mut told = from;
    let mut sound_end = log.end();
    let mut looked_for_half_erased = false;
    while let Some(step) = reader.next()? {
        match step {
            Step::Record(offset, len, record) => {
                report.replayed += 1;
                replay.take(offset, len, &record)?;
                if report.rebuilt.is_some() {
                    fault::point("rebuild.replaying");
                }
            }
            Step::Damaged { offset, len } => {
                if !std::mem::replace(&mut looked_for_half_erased, true) && mend_half_erased(log, offset)? {
                    reader = log.reader(offset);
                    continue;
                }
                replay.close_group(offset);
                replay.cause = None;
                report.damaged.push((offset, len));
            }
            Step::TornTail { offset, .. } => sound_end = offset,
        }
        let done = reader.offset();
        if done >= told + PROGRESS_BYTES {
            told = done;
            (options.progress)(done, log.end());
        }
    }
    let end = replay.end_that_counts(sound_end);
    if end < log.end() {
        report.torn_bytes = log.end() - end;
        tracing::warn!("cut {} bytes of an unfinished write off the event log", report.torn_bytes);
        log.cut(end)?;
    }
    replay.flush()?;
    finish_erasures(log, index, &replay.erasures, report)?;
    for (offset, len) in &report.damaged {
        tracing::error!("{len} damaged bytes in the event log at byte {offset} were passed over; run `sledge verify`");
    }
    Ok(())
}

/// Finishes erasures behind `from` that were interrupted in the middle of a record. A replay needs the id in it: the
/// event may be the cause of removals. Returns whether there were any.
fn mend_half_erased(log: &Log, from: u64) -> Result<bool, StoreError> {
    let mut reader = log.reader(from);
    let mut damaged = Vec::new();
    let mut half_erased = Vec::new();
    while let Some(step) = reader.next()? {
        match step {
            Step::Record(_, _, Record::Remove(removed)) if removed.why.erases() => {
                let end = removed.offset + u64::from(removed.len);
                if damaged.iter().any(|(offset, damaged_end)| *offset <= removed.offset && end <= *damaged_end) {
                    half_erased.push(Erasure { id: removed.id, offset: removed.offset, len: removed.len });
                }
            }
            Step::Damaged { offset, len } => damaged.push((offset, offset + len)),
            Step::Record(..) | Step::TornTail { .. } => {}
        }
    }
    if !half_erased.is_empty() {
        log.erase(&half_erased)?;
    }
    Ok(!half_erased.is_empty())
}

/// Overwrites what a removal promised to erase and a crash may have left; damage there is a half-done erasure.
fn finish_erasures(
    log: &Log,
    index: &BufferedIndex,
    erasures: &[Erasure],
    report: &mut Report,
) -> Result<(), StoreError> {
    let mut buffer = Vec::new();
    let mut left = Vec::new();
    for erasure in erasures {
        let stored_at = index.get(&schema::by_id(&erasure.id))?.as_ref().and_then(schema::place);
        if stored_at.is_some_and(|place| place.offset == erasure.offset) {
            continue; // it stays, since the cause of its removal was lost
        }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::EventId;
    use crate::store::Removal;
    use crate::store::record::Removed;
    use crate::store::record::{push_put, push_remove};
    use crate::store::testing::{assert_sound, close, contents, log_of, note, open};

    /// A removal whose cause was lost takes nothing away, neither from the index nor from the log; one that names
    /// nothing, as compaction may leave it, does nothing.
    #[test]
    fn removals_without_cause_or_target_do_nothing() {
        let folder = tempfile::tempdir().unwrap();
        close(open(folder.path()));
        let log = Log::open(&log_of(folder.path())).unwrap();
        let mut bytes = Vec::new();
        push_put(&mut bytes, &note(1, "stays"));
        let len = bytes.len() as u32;
        let put = bytes.clone();
        let Ok((Record::Put(event), _)) = crate::store::record::decode(&put) else { panic!("an event") };
        let lost = Some(EventId([7; 32]));
        push_remove(&mut bytes, &Removed::new(&event, lost, HEADER_LEN, len, Removal::Deleted), [].iter());
        let nothing = Removed::new(&event, None, 0, 0, Removal::Operator);
        push_remove(&mut bytes, &nothing, [].iter());
        log.append(&bytes).unwrap();
        for _ in 0..2 {
            let store = open(folder.path());
            assert_eq!(contents(&store), ["stays"]);
            assert_sound(&store);
            close(store);
        }
    }
}
