//! Compaction: a new generation that holds only what is stored, then an atomic switch, while reads and writes go on.
//!
//! 1. Copy what is stored up to the log's present end, in its order; the new index is built on the way.
//! 2. Copy what was written meanwhile, record by record, until little is left. Nothing is left out here, so records
//!    keep their distance from the end and [`Position`](super::Position)s taken meanwhile stay true.
//! 3. Hold the writer for a moment, copy the rest, make all durable, let `CURRENT` name the new generation.
//!
//! A crash at any moment leaves either the old generation or the new one current, and both are whole. Queries that
//! have begun go on reading the old files, which are deleted when the last of them is done.

use std::sync::{Arc, TryLockError};
use std::time::{Duration, Instant};

use super::embedded::{EmbeddedStore, Files, WriterGuard, WriterState};

use super::fault;
use super::index::Key;
use super::log::{Erasure, HEADER_LEN, Step};
use super::open;
use super::pack::{self, Packer};
use super::record::{self, Record, Removed};
use super::replay::Replay;
use super::schema::{self, Place};
use super::{Store, StoreError};

/// The writer is held for at most about this many bytes of log.
const REST_BYTES_MAX: u64 = 1 << 20;
/// After so many rounds of catching up the writer is held for what is left, however much that is.
const ROUNDS_MAX: u32 = 20;
/// Stretches of the log that samples for a dictionary are taken from, and how long each is.
const SAMPLE_PLACES: u64 = 64;
const SAMPLE_PLACE_BYTES: u64 = 100 * 1024;
/// Bytes of the new log that are written at a time, and after which a pace is kept.
const STRIDE_BYTES: usize = 1 << 20;
/// Longest rest between two strides.
const REST_MAX: Duration = Duration::from_secs(1);

/// How hard compaction works.
pub struct Pace<'p> {
    /// Share of the time in which it works rather than rests: 1.0 for a command, less beside a serving relay.
    pub share: f64,
    /// Told how far it has come: bytes of the old log done, and in all.
    pub progress: &'p dyn Fn(u64, u64),
    /// Rests for so long, which may be no time; false: give up.
    pub rest: &'p dyn Fn(Duration) -> bool,
}

impl<'p> Pace<'p> {
    /// Works without a rest, to the end.
    pub fn flat_out(progress: &'p dyn Fn(u64, u64)) -> Self {
        Pace { share: 1.0, progress, rest: &|_| true }
    }

    /// Rests after a stretch of work; so long that the share is kept, and at most [`REST_MAX`].
    fn rest_after(&self, worked: Duration) -> Result<(), StoreError> {
        let rest = worked.mul_f64(1.0 / self.share.clamp(0.01, 1.0) - 1.0).min(REST_MAX);
        if (self.rest)(rest) { Ok(()) } else { Err(StoreError::Stopped) }
    }
}

/// What compaction does about damage in the old log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    /// Stops, since going on would make the loss final.
    Refuse,
    /// Leaves it behind: repair has told what is lost.
    StepOver,
}

/// What compaction came to.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct CompactReport {
    /// Events that are stored, before as after.
    pub events: u64,
    /// Bytes of the old log.
    pub bytes_before: u64,
    /// Bytes of the new log.
    pub bytes_after: u64,
}

/// Bytes that compaction takes beside the present files, for a while: the live part of the log and a new index.
pub fn bytes_needed(store: &EmbeddedStore) -> u64 {
    store.stats().compaction_bytes_needed()
}

/// Compacts the store.
///
/// # Errors
/// [`StoreError::Damaged`] when the log has damage, which compaction would make final; [`StoreError::NoRoom`] when the
/// disk cannot hold the new generation; [`StoreError::InUse`] when it runs already; [`StoreError::Stopped`] when the pace
/// says so; I/O errors. The old generation stays current then.
pub fn compact(store: &EmbeddedStore, pace: &Pace<'_>) -> Result<CompactReport, StoreError> {
    compact_with(store, pace, Damage::Refuse)
}

/// As [`compact`], with a choice about damage.
pub(super) fn compact_with(
    store: &EmbeddedStore,
    pace: &Pace<'_>,
    damage: Damage,
) -> Result<CompactReport, StoreError> {
    let _only_one = match store.compacting.try_lock() {
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse("compaction is under way already".to_owned())),
        guard => guard,
    };
    check_room(store)?;
    let old = store.files();
    let dictionary = if store.options.compress { dictionary_for(&old)? } else { None };
    let events = store.writer_and_files().0.events;
    let mut new = open::new_generation(&store.dir, &store.options, events, dictionary)?;
    let bytes_before = old.log.end();
    let built = Copy::new(&old, &new, pace, damage).and_then(|copy| copy.run(store));
    let (state, exact_from) = match built {
        Ok(built) => built,
        Err(error) => {
            new.retire();
            return Err(error);
        }
    };
    new.exact_from = exact_from;
    let bytes_after = new.log.end();
    Ok(CompactReport { events: store.switch_to(new, state)?, bytes_before, bytes_after })
}

fn check_room(store: &EmbeddedStore) -> Result<(), StoreError> {
    let needed_bytes = bytes_needed(store);
    let free_bytes = store.dir.free_bytes()?;
    if free_bytes < needed_bytes { Err(StoreError::NoRoom { needed_bytes, free_bytes }) } else { Ok(()) }
}

/// The dictionary for the next generation: the present one, so that packed records can be copied as they are, or one
/// learnt from events all over the log.
fn dictionary_for(old: &Files) -> Result<Option<Vec<u8>>, StoreError> {
    if let Some(dictionary) = old.log.dictionary() {
        return Ok(Some(dictionary.to_vec()));
    }
    let (mut samples, mut bytes) = (Vec::new(), 0);
    let places = SAMPLE_PLACES.min((old.log.end() - HEADER_LEN) / SAMPLE_PLACE_BYTES + 1);
    let stride = ((old.log.end() - HEADER_LEN) / places).next_multiple_of(record::ALIGN as u64);
    for start in (0..places).map(|place| HEADER_LEN + place * stride) {
        let mut reader = old.log.reader_until(start, old.log.end().min(start + SAMPLE_PLACE_BYTES));
        while let Some(step) = reader.next()? {
            if let Step::Record(_, _, Record::Put(event)) = step
                && let Some(middle) = pack::middle(&event)
                && bytes + middle.len() <= pack::SAMPLE_BYTES_MAX
            {
                bytes += middle.len();
                samples.push(middle.to_vec());
            }
        }
    }
    Ok(pack::train(&samples))
}

/// A copy in progress.
struct Copy<'c> {
    old: &'c Files,
    new: &'c Files,
    pace: &'c Pace<'c>,
    damage: Damage,
    replay: Replay<'c>,
    packer: Option<Packer>,
    /// Everything of the old log before this was looked at.
    done: u64,
    /// Records for the new log that are not written yet.
    pending: Vec<u8>,
    erase: Vec<Erasure>,
    /// Where the records begin that keep their distance from the end.
    exact_from: u64,
    stride_began: Instant,
}

impl<'c> Copy<'c> {
    fn new(old: &'c Files, new: &'c Files, pace: &'c Pace<'c>, damage: Damage) -> Result<Self, StoreError> {
        Ok(Copy {
            old,
            new,
            pace,
            damage,
            replay: Replay::new(&new.index, &new.bloom, HEADER_LEN)?,
            packer: new.log.dictionary().map(Packer::new).transpose()?,
            done: HEADER_LEN,
            pending: Vec::new(),
            erase: Vec::new(),
            exact_from: 0,
            stride_began: Instant::now(),
        })
    }

    /// Runs to the point where the new generation can take over. The writer waits from then on: the guard is with it.
    fn run<'s>(mut self, store: &'s EmbeddedStore) -> Result<(WriterGuard<'s>, u64), StoreError> {
        fault::point("compact.begin");
        self.copy_cold(self.old.log.end())?;
        self.exact_from = self.new.log.end() + self.pending.len() as u64;
        fault::point("compact.copied");
        for _ in 0..ROUNDS_MAX {
            let end = self.old.log.end();
            if end - self.done <= REST_BYTES_MAX {
                break;
            }
            self.copy_all(end)?;
        }
        self.write_pending()?;
        self.replay.flush()?;
        if !self.new.index.merge_now(&|| !(self.pace.rest)(Duration::ZERO))? {
            return Err(StoreError::Stopped);
        }
        // Most of it reaches the disk before the writer has to wait.
        self.new.log.sync()?;
        // The last moment to give up: from here on the writer waits.
        self.pace.rest_after(Duration::ZERO)?;
        fault::point("compact.caught_up");
        let (state, _) = store.writer_and_files();
        self.copy_all(self.old.log.end())?;
        self.write_pending()?;
        self.replay.flush()?;
        self.new.log.sync()?;
        if !self.erase.is_empty() {
            self.new.log.erase(&self.erase)?;
        }
        fault::point("compact.synced");
        Ok((state, self.exact_from))
    }

    /// Copies what is stored of the old log up to `end`, packed if there is a dictionary.
    fn copy_cold(&mut self, end: u64) -> Result<(), StoreError> {
        self.for_each_record(end, |copy, offset, len, record| {
            if copy.is_stored(record, Place::new(offset, len))? { copy.take_cold(offset, len, record) } else { Ok(()) }
        })
    }

    /// Copies every record of the old log up to `end`, each in its length.
    fn copy_all(&mut self, end: u64) -> Result<(), StoreError> {
        self.for_each_record(end, |copy, offset, len, record| match record {
            Record::Remove(removed) => copy.take_removal(removed, len),
            _ => {
                // Read again: since it was read ahead, an event may have been erased.
                let mut bytes = Vec::new();
                copy.old.log.read_raw(offset, len, &mut bytes)?;
                let damaged = |_| StoreError::Damaged(format!("the record at byte {offset} is damaged"));
                let (record, _) = record::decode(&bytes).map_err(damaged)?;
                copy.take(&bytes, &copy.old.log.unpacked(record, offset)?)
            }
        })
    }

    fn for_each_record(
        &mut self,
        end: u64,
        mut each: impl FnMut(&mut Self, u64, u32, &Record<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut reader = self.old.log.reader_until(self.done, end);
        while let Some(step) = reader.next()? {
            match step {
                Step::Record(offset, len, record) => each(self, offset, len, &record)?,
                Step::Damaged { .. } | Step::TornTail { .. } if self.damage == Damage::StepOver => {}
                Step::Damaged { offset, .. } | Step::TornTail { offset, .. } => {
                    return Err(StoreError::Damaged(format!(
                        "{} is damaged at byte {offset}; compacting would make the loss final, see `sledge repair`",
                        self.old.log.path().display()
                    )));
                }
            }
            self.keep_pace(reader.offset())?;
        }
        self.done = end;
        Ok(())
    }

    /// Copies one record that nobody will change any more: packed, if that is wanted and worth it.
    fn take_cold(&mut self, offset: u64, len: u32, record: &Record<'_>) -> Result<(), StoreError> {
        let mut bytes = Vec::new();
        self.old.log.read_raw(offset, len, &mut bytes)?;
        let Record::Put(event) = record else { return self.take(&bytes, record) };
        let is_packed = matches!(record::parse(&bytes), Some(Record::Packed(_)));
        if self.packer.is_none() || !is_packed {
            bytes.clear();
            match self.packer.as_mut().and_then(|packer| packer.pack(event)) {
                Some(body) => record::push_packed(&mut bytes, event, &body),
                None => record::push_plain(&mut bytes, event),
            }
        }
        self.take(&bytes, &Record::Put(event.alone()))
    }

    fn is_stored(&self, record: &Record<'_>, place: Place) -> Result<bool, StoreError> {
        let event = match record {
            Record::Put(event) => event,
            Record::Gone(_) => return Ok(true),
            Record::Remove(_) | Record::Erased(_) | Record::Packed(_) | Record::Dictionary(_) => return Ok(false),
        };
        let current = self.old.index.get(&schema::by_id(&event.id))?.as_ref().and_then(schema::place);
        Ok(current == Some(place))
    }

    fn take(&mut self, bytes: &[u8], record: &Record<'_>) -> Result<(), StoreError> {
        let offset = self.new.log.end() + self.pending.len() as u64;
        self.pending.extend_from_slice(bytes);
        self.replay.take(offset, bytes.len() as u32, record)
    }

    /// A removal names a place, and that is another one in the new log; its length stays the same. What it removes may
    /// never have been copied: then it names nothing.
    fn take_removal(&mut self, removed: &Removed<'_>, len: u32) -> Result<(), StoreError> {
        self.write_pending()?;
        self.replay.flush()?;
        let mut bytes = Vec::with_capacity(len as usize);
        let mut target = Vec::new();
        match self.new.place_of(&removed.id)? {
            Some(place) => {
                let (Record::Put(event), target_len) =
                    self.new.log.read(place.offset, place.read_len(), &mut target)?
                else {
                    return Err(StoreError::Damaged(format!("event {} was lost while compacting", removed.id)));
                };
                let keys: Vec<Key> = schema::entries(&event, place).into_iter().map(|(key, _)| key).collect();
                let moved = Removed::new(&event, removed.by, place.offset, target_len, removed.why);
                record::push_remove(&mut bytes, &moved, keys.iter());
                if removed.why.erases() {
                    self.erase.push(Erasure { id: event.id, offset: place.offset, len: target_len });
                }
            }
            None => {
                let keys: Vec<Key> = removed.keys().collect();
                record::push_remove(&mut bytes, &removed.of_nothing(), keys.iter());
            }
        }
        debug_assert_eq!(bytes.len(), len as usize, "a removal keeps its length");
        let (record, _) =
            record::decode(&bytes).map_err(|_| StoreError::Damaged("a removal was not encoded".to_owned()))?;
        self.take(&bytes, &record)
    }

    fn write_pending(&mut self) -> Result<(), StoreError> {
        self.new.log.append_unsynced(&self.pending)?;
        self.pending.clear();
        Ok(())
    }

    fn keep_pace(&mut self, done: u64) -> Result<(), StoreError> {
        if self.pending.len() < STRIDE_BYTES {
            return Ok(());
        }
        self.write_pending()?;
        (self.pace.progress)(done, self.old.log.end());
        self.pace.rest_after(self.stride_began.elapsed())?;
        self.stride_began = Instant::now();
        Ok(())
    }
}

impl EmbeddedStore {
    /// Makes a finished copy the current generation. Returns the number of events.
    fn switch_to(&self, mut new: Files, mut state: WriterGuard<'_>) -> Result<u64, StoreError> {
        let old = self.files();
        new.base = old.end().0 as i64 - new.log.end() as i64;
        let switched = WriterState::load(&new.index).and_then(|loaded| {
            self.dir.switch_to(&new.generation)?;
            Ok(loaded)
        });
        match switched {
            Ok(loaded) => *state = loaded,
            Err(error) => {
                // CURRENT may name the new generation already. The old name goes back before anything is deleted; where
                // that fails too, both generations stay, and the next start finds out which of them is named.
                match self.dir.switch_to(&old.generation) {
                    Ok(()) => new.retire(),
                    Err(again) => old.log.stop_writes(&format!("CURRENT cannot be written: {again}")),
                }
                return Err(error);
            }
        }
        self.set_files(Arc::new(new));
        fault::point("compact.switched");
        old.retire();
        Ok(state.events)
    }
}
