//! One generation's files, open, and what only the writer changes beside them.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use crate::protocol::{EventId, PublicKey};

use super::dir::Generation;
use super::index::Key;
use super::index::bloom::Bloom;
use super::index::buffer::BufferedIndex;
use super::log::Log;
use super::schema::{self, Place};
use super::sums::Registry;
use super::{Position, StoreError, open};

/// The files of one generation, open. A query keeps those it began with, so compaction can switch under it.
pub(super) struct Files {
    pub(super) log: Log,
    pub(super) index: BufferedIndex,
    pub(super) bloom: Arc<Bloom>,
    /// Sums for reconciliation, made when asked for.
    pub(super) sums: Registry,
    /// A record's [`Position`] is its offset plus this. It goes on where the generation before it ended.
    pub(super) base: i64,
    /// Records from this offset on have the [`Position`]s that they were given; those before were moved by compaction.
    pub(super) exact_from: u64,
    /// Last, so that nothing has its files open when they are deleted.
    pub(super) generation: Held,
}

/// A generation that is in use. Its folder is deleted with it once it is retired.
pub(super) struct Held {
    generation: Generation,
    retired: AtomicBool,
}

impl Files {
    pub(super) fn new(generation: Generation, log: Log, index: BufferedIndex, bloom: Arc<Bloom>) -> Self {
        let generation = Held { generation, retired: AtomicBool::new(false) };
        Files { log, index, bloom, sums: Registry::default(), base: 0, exact_from: 0, generation }
    }

    /// Another generation has taken over: the files go with the last user.
    pub(super) fn retire(&self) {
        self.generation.retired.store(true, Ordering::Relaxed);
        // Nobody needs what it merges from now on.
        self.index.ask_to_stop();
    }

    /// The point behind everything in the log.
    pub(super) fn end(&self) -> Position {
        Position(self.log.end().saturating_add_signed(self.base))
    }

    /// Where an event lies.
    pub(super) fn place_of(&self, id: &EventId) -> Result<Option<Place>, StoreError> {
        if !self.bloom.contains(&id.0) {
            return Ok(None);
        }
        Ok(self.index.get(&schema::by_id(id))?.as_ref().and_then(schema::place))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if *self.generation.retired.get_mut() && !self.index.stop() {
            tracing::warn!("files of a former generation stay until the next start: its index is still being merged");
            *self.generation.retired.get_mut() = false;
        }
    }
}

impl Deref for Held {
    type Target = Generation;
    fn deref(&self) -> &Generation {
        &self.generation
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if *self.retired.get_mut()
            && let Err(error) = self.generation.remove()
        {
            tracing::warn!("files of a former generation stay until the next start: {error}");
        }
    }
}

/// The writer's state, while nobody else may write.
pub(super) type WriterGuard<'w> = MutexGuard<'w, WriterState>;

/// What only the writer changes.
#[derive(Default)]
pub(super) struct WriterState {
    pub(super) events: u64,
    pub(super) dead_bytes: u64,
    /// Log offset up to which the two above have counted; only looked at on opening.
    pub(super) counted_up_to: u64,
    /// Requests to vanish that hold: few, and asked about for every event.
    vanished: HashMap<[u8; 16], u64>,
}

impl WriterState {
    pub(super) fn vanished_until(&self, pubkey: &PublicKey) -> Option<u64> {
        self.vanished.get(&pubkey.0[..16]).copied()
    }

    pub(super) fn vanish(&mut self, pubkey: &PublicKey, until: u64) {
        let half = pubkey.0[..16].try_into().expect("16 bytes");
        self.vanish_half(half, until);
    }

    /// Reads again from the index until when a key has vanished: a request of it was taken out.
    pub(super) fn look_up_vanished(&mut self, index: &BufferedIndex, pubkey: &PublicKey) -> Result<(), StoreError> {
        self.vanished.remove(&pubkey.0[..16]);
        let (from, to) = schema::vanished_range(pubkey);
        self.load_vanished(index, from, to)
    }

    fn load_vanished(&mut self, index: &BufferedIndex, from: Key, to: Key) -> Result<(), StoreError> {
        open::for_each_key(index, from, to, |key| {
            if let (Some(half), Some(until)) = (schema::id_half(key), schema::request_created_at(key)) {
                self.vanish_half(half, until);
            }
        })
    }

    fn vanish_half(&mut self, half: [u8; 16], until: u64) {
        let latest = self.vanished.entry(half).or_default();
        *latest = until.max(*latest);
    }

    /// Reads the state back from the index.
    pub(super) fn load(index: &BufferedIndex) -> Result<Self, StoreError> {
        let number = |which| -> Result<u64, StoreError> {
            Ok(index.get(&schema::counter(which))?.as_ref().and_then(schema::counter_number).unwrap_or(0))
        };
        let mut state = WriterState {
            events: number(schema::Counter::Events)?,
            dead_bytes: number(schema::Counter::DeadBytes)?,
            counted_up_to: number(schema::Counter::CountedUpTo)?,
            vanished: HashMap::new(),
        };
        let (from, to) = schema::vanished_all();
        state.load_vanished(index, from, to)?;
        Ok(state)
    }
}
