//! A stream of events between this relay and another one: what either lacks is found out and moved, then what is new.
//!
//! In: a link to the other relay and this relay's [`Side`]. The sets are compared (`level`), requests to delete or
//! vanish before the rest, so that nothing is fetched or sent that is deleted already; what the other lacks is sent oldest
//! first, and the comparison is made again until nothing moves.
//!
//! Resumes by nature: whatever was moved before a link broke is equal already. Never waits longer than the link's time for
//! an answer. Nothing goes back to where it came from.

mod upload;

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use tokio::sync::watch;

use super::level::{self, Came, LIVE, PASSES_MAX, Party, deletions_in};
use super::link::{Incoming, Link, LinkError};
use crate::config::Direction;
use crate::protocol::item::Item;
use crate::protocol::relay_message::RelayMessage;
use crate::protocol::{Event, EventId, Filter};
use crate::relay::side::{Moved, Side, SideError, SideSet};
use crate::store::StoreError;

/// Events that are taken in with one durable write.
const TAKE_EVENTS: usize = 512;
/// Events that the one or the other side does not want, remembered so that they are not moved again and again.
const UNWANTED_MAX: usize = 200_000;
/// Events that came from the other relay a short while ago and are not to be sent back.
const RECENT_MAX: usize = 20_000;

/// What is moved.
#[derive(Clone, Debug, PartialEq)]
pub struct Scope {
    /// Each is made equal by itself; their limits are not looked at.
    pub filters: Vec<Filter>,
    /// Which way.
    pub direction: Direction,
    /// How long the other relay may owe an answer.
    pub answer_timeout: Duration,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The link is over.
    #[error("the relay {0}")]
    Link(#[from] LinkError),
    /// The other relay refuses what a stream needs.
    #[error("the relay refuses: {0}")]
    Refused(String),
    /// The other relay cannot give all there is.
    #[error("the relay cannot give all of it: {0}")]
    Incomplete(&'static str),
    /// This side cannot go on.
    #[error(transparent)]
    Side(#[from] SideError),
    /// More became new here than the other relay takes.
    #[error("the relay takes events more slowly than they come in here")]
    Behind,
}

/// A stream over one link.
pub struct Stream {
    link: Link,
    side: Side,
    scope: Scope,
    moved: Moved,
    /// Bytes up and down on links before this one.
    passed_before: (u64, u64),
    told: watch::Sender<Moved>,
    memory: Memory,
    /// Live events that came while something else was waited for.
    arrived: Vec<Event>,
}

/// What is remembered from link to link.
#[derive(Debug, Default)]
pub struct Memory {
    /// Not wanted by one of the two sides.
    unwanted: HashSet<EventId>,
    recent: HashSet<EventId>,
    recent_order: VecDeque<EventId>,
}

impl Memory {
    fn unwanted(&mut self, id: EventId) {
        if self.unwanted.len() >= UNWANTED_MAX {
            self.unwanted.clear();
        }
        self.unwanted.insert(id);
    }

    fn came(&mut self, id: EventId) {
        if self.recent.insert(id) {
            self.recent_order.push_back(id);
        }
        if self.recent_order.len() > RECENT_MAX
            && let Some(oldest) = self.recent_order.pop_front()
        {
            self.recent.remove(&oldest);
        }
    }
}

impl Stream {
    /// A stream over a link that has just been opened. `told` gets the figures as they grow.
    pub fn new(link: Link, side: Side, scope: Scope, told: watch::Sender<Moved>, memory: Memory) -> Stream {
        let moved = *told.borrow();
        let passed_before = (moved.bytes_up, moved.bytes_down);
        Stream { link, side, scope, moved, passed_before, told, memory, arrived: Vec::new() }
    }

    /// What was moved so far.
    pub fn moved(&self) -> Moved {
        self.moved
    }

    /// Ends it, and gives back what the next one is to remember.
    pub fn into_memory(self) -> Memory {
        self.memory
    }

    fn note(&mut self, change: impl FnOnce(&mut Moved)) {
        change(&mut self.moved);
        let (passed, before) = (self.link.passed(), self.passed_before);
        (self.moved.bytes_up, self.moved.bytes_down) = (before.0 + passed.up(), before.1 + passed.down());
        self.told.send_replace(self.moved);
    }

    /// Makes both sides equal, as far as either takes what the other has.
    ///
    /// # Errors
    /// [`StreamError`]; what was moved stays moved.
    pub async fn level(&mut self) -> Result<(), StreamError> {
        let filters = self.scope.filters.clone();
        for _ in 0..PASSES_MAX {
            let before = self.moved.total();
            for filter in filters.iter().filter_map(deletions_in).chain(filters.iter().cloned()) {
                level::level(self, &filter).await?;
            }
            self.take_arrived().await?;
            if self.moved.total() == before {
                break;
            }
        }
        // Whatever has passed since something was last noted.
        self.note(|_| {});
        Ok(())
    }

    /// Takes in the live events that have arrived.
    pub(super) async fn take_arrived(&mut self) -> Result<(), StreamError> {
        let mut arrived = std::mem::take(&mut self.arrived);
        arrived.retain(|event| self.scope.filters.iter().any(|filter| filter.matches(event)));
        let taken = self.take(arrived).await?;
        self.note(|moved| moved.wanted += taken);
        Ok(())
    }

    /// Takes events in by the rules here; how many were new.
    async fn take(&mut self, events: Vec<Event>) -> Result<u64, StreamError> {
        if events.is_empty() {
            return Ok(0);
        }
        events.iter().for_each(|event| self.memory.came(event.id));
        let taken = self.side.take(events).await?;
        taken.refused.iter().for_each(|id| self.memory.unwanted(*id));
        let refused = taken.refused.len() as u64;
        self.note(|moved| (moved.stored, moved.refused) = (moved.stored + taken.stored, moved.refused + refused));
        Ok(taken.stored + refused)
    }
}

impl Party for Stream {
    type Error = StreamError;
    type Set = SideSet;

    fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    async fn next(&mut self) -> Result<Incoming, StreamError> {
        Ok(self.link.next_within(self.scope.answer_timeout).await?)
    }

    /// Live events are kept, the rest is nobody's.
    async fn take_in(&mut self, incoming: Incoming) -> Result<(), StreamError> {
        if let Incoming::Message(RelayMessage::Event { id, event }) = incoming
            && id == LIVE
        {
            self.arrived.push(*event);
            if self.arrived.len() >= TAKE_EVENTS {
                self.take_arrived().await?;
            }
        }
        Ok(())
    }

    fn direction(&self) -> Direction {
        self.scope.direction
    }

    fn now_secs(&self) -> u64 {
        self.side.now()
    }

    async fn set(&mut self, filter: &Filter) -> Result<Option<SideSet>, StreamError> {
        Ok(self.side.set(filter.clone()).await?)
    }

    async fn lacking(&mut self, ids: Vec<EventId>) -> Result<Vec<EventId>, StreamError> {
        let mut missing = self.side.lacking(ids).await?;
        missing.retain(|id| !self.memory.unwanted.contains(id));
        self.note(|moved| moved.wanted += missing.len() as u64);
        Ok(missing)
    }

    async fn keep(&mut self, events: Vec<Event>, came: Came) -> Result<(), StreamError> {
        let taken = self.take(events).await?;
        if came == Came::Found {
            self.note(|moved| moved.wanted += taken);
        }
        Ok(())
    }

    fn never_came(&mut self, ids: Vec<EventId>) {
        self.note(|moved| moved.missing += ids.len() as u64);
        ids.into_iter().for_each(|id| self.memory.unwanted(id));
    }

    async fn give(&mut self, have: Vec<Item>) -> Result<(), StreamError> {
        self.upload(have).await
    }

    fn round(&mut self) {
        self.note(|moved| moved.rounds += 1);
    }

    fn incomplete(&mut self, what: &'static str) -> Result<(), StreamError> {
        Err(StreamError::Incomplete(what))
    }

    fn refused(reason: String) -> StreamError {
        StreamError::Refused(reason)
    }

    fn unreadable(error: StoreError) -> StreamError {
        StreamError::Side(SideError::Store(error))
    }
}
