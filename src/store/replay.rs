//! Turning the log back into the index: what is replayed, and what of it counts.

use super::StoreError;
use super::embedded::WriterState;
use super::index::bloom::Bloom;
use super::index::buffer::BufferedIndex;
use super::index::{Change, Value};
use super::log::Erasure;
use super::record::{Record, Removed, StoredEvent};
use super::schema::{self, Place};
use crate::protocol::EventId;

/// Changes that are gathered before they go to the index.
const REPLAY_CHANGES: usize = 4096;

/// Turns log records back into index changes.
pub(super) struct Replay<'i> {
    index: &'i BufferedIndex,
    bloom: &'i Bloom,
    changes: Vec<Change>,
    /// Where the replay began.
    from: u64,
    /// Log offset behind the last record that counts.
    end: u64,
    events: u64,
    dead_bytes: u64,
    /// Records before this are counted already.
    counted_up_to: u64,
    /// The event put last. A removal counts only behind the event that caused it: damage may keep the removal and take
    /// the cause, and then the removed event is the one to keep.
    pub(super) cause: Option<EventId>,
    /// A put whose followers are not all read yet.
    group: Option<Group>,
    /// What the removals that count promised to erase.
    pub(super) erasures: Vec<Erasure>,
}

/// A put with what it brought about. It counts as a whole or not at all.
struct Group {
    offset: u64,
    followers_left: u32,
    /// Of the put; they come last, since the removals free keys that the put takes.
    entries: Vec<Change>,
    removals: Vec<Change>,
    removed: u64,
    dead_bytes: u64,
    erasures: Vec<Erasure>,
}

impl<'i> Replay<'i> {
    pub(super) fn new(index: &'i BufferedIndex, bloom: &'i Bloom, from: u64) -> Result<Self, StoreError> {
        let state = WriterState::load(index)?;
        Ok(Replay {
            index,
            bloom,
            changes: Vec::new(),
            from,
            end: from,
            events: state.events,
            dead_bytes: state.dead_bytes,
            counted_up_to: state.counted_up_to,
            cause: None,
            group: None,
            erasures: Vec::new(),
        })
    }

    pub(super) fn take(&mut self, offset: u64, len: u32, record: &Record<'_>) -> Result<(), StoreError> {
        let end = offset + u64::from(len);
        match record {
            Record::Put(event) => self.put(event, Place::new(offset, len)),
            Record::Remove(removed) => self.remove(removed, offset, len)?,
            Record::Gone(gone) => self.follow(Some((schema::gone_version(gone), Some(Value::new(&[]))))),
            Record::Erased(id) => {
                self.close_group(offset);
                self.cause = Some(*id);
            }
            Record::Packed(_) | Record::Dictionary(_) => {} // readers unpack; the dictionary is the log's own business
        }
        if self.group.as_ref().is_none_or(|group| group.followers_left == 0) {
            self.close_group(end);
            self.end = end;
        }
        if self.changes.len() >= REPLAY_CHANGES { self.flush() } else { Ok(()) }
    }

    /// Where the log ends as far as it counts: before a put whose followers were cut off.
    pub(super) fn end_that_counts(&self, log_end: u64) -> u64 {
        self.group.as_ref().map_or(log_end, |group| group.offset)
    }

    fn put(&mut self, event: &StoredEvent<'_>, place: Place) {
        self.close_group(place.offset);
        self.cause = Some(event.id);
        self.bloom.insert(&event.id.0);
        schema::named_ids(event).for_each(|id| self.bloom.insert(&id.0));
        self.group = Some(Group {
            offset: place.offset,
            followers_left: event.followers,
            entries: schema::entries(event, place),
            removals: Vec::new(),
            removed: 0,
            dead_bytes: 0,
            erasures: Vec::new(),
        });
    }

    /// Takes out what a removal names, unless its cause was lost.
    fn remove(&mut self, removed: &Removed<'_>, offset: u64, len: u32) -> Result<(), StoreError> {
        self.flush()?;
        let mut changes = Vec::new();
        let mut was_there = false;
        if self.has_cause(removed)? {
            // What lay before the start was counted; a run that was half written may have taken its keys already.
            was_there = removed.len > 0 && removed.offset < self.from;
            for key in removed.keys() {
                let place = if schema::holds_a_place(&key) { self.index.get(&key)? } else { None };
                let is_its_own = place.as_ref().and_then(schema::place).is_some_and(|at| at.offset == removed.offset);
                if is_its_own || !schema::holds_a_place(&key) {
                    changes.push((key, None));
                }
                was_there |= is_its_own;
            }
            if removed.why.erases() && removed.len > 0 {
                let erasure = Erasure { id: removed.id, offset: removed.offset, len: removed.len };
                self.group.as_mut().map_or(&mut self.erasures, |group| &mut group.erasures).push(erasure);
            }
        }
        let dead_bytes = u64::from(removed.len) + u64::from(len);
        let counts = self.counts(offset);
        match &mut self.group {
            Some(group) => {
                group.removed += u64::from(was_there);
                group.dead_bytes += dead_bytes;
            }
            None if counts => {
                self.events = self.events.saturating_sub(u64::from(was_there));
                self.dead_bytes += dead_bytes;
            }
            None => {}
        }
        self.follow(changes);
        Ok(())
    }

    /// Adds the changes of one record to the open group, or to all if there is none.
    fn follow(&mut self, changes: impl IntoIterator<Item = Change>) {
        match &mut self.group {
            Some(group) => {
                group.removals.extend(changes);
                group.followers_left = group.followers_left.saturating_sub(1);
            }
            None => self.changes.extend(changes),
        }
    }

    /// Takes the open group as it is: it is complete, or what is missing was damaged and not cut off.
    pub(super) fn close_group(&mut self, end: u64) {
        let Some(group) = self.group.take() else { return };
        if self.counts(group.offset) {
            self.events = (self.events + 1).saturating_sub(group.removed);
            self.dead_bytes += group.dead_bytes;
        }
        self.changes.extend(group.removals);
        self.changes.extend(group.entries);
        self.erasures.extend(group.erasures);
        self.end = end;
    }

    fn counts(&self, offset: u64) -> bool {
        offset >= self.counted_up_to
    }

    fn has_cause(&self, removed: &Removed<'_>) -> Result<bool, StoreError> {
        match removed.by {
            None => Ok(true),
            Some(by) if self.cause == Some(by) => Ok(true),
            Some(by) => Ok(self.index.get(&schema::by_id(&by))?.is_some()),
        }
    }

    /// Makes what counts so far visible in the index.
    pub(super) fn flush(&mut self) -> Result<(), StoreError> {
        self.index.check_bound()?;
        self.counted_up_to = self.counted_up_to.max(self.end);
        self.changes.extend(schema::counters(self.events, self.dead_bytes, self.counted_up_to));
        self.index.apply(&self.changes, self.end)?;
        self.changes.clear();
        Ok(())
    }
}
