//! This relay's own side of a stream with another one: what it has of a filter, taking events in, giving events out.
//!
//! Events go in through the same stages as everybody's ([`Source::Mirror`](super::ingest::Source)), so whoever listens here
//! hears of them. Nothing here knows the other relay.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::Relay;
use super::ingest::{Rejection, Sender, Source, Upstream};
use super::outbox::{Outbox, Outgoing, Taken};
use super::writer::Submission;
use crate::protocol::item::{Item, Sum};
use crate::protocol::relay_message::RelayMessage;
use crate::protocol::{Event, EventId, Filter, Verified, Visibility};
use crate::store::{PageBudget, Progress, Query, Row, StoreError, Summed, Wanted};
use crate::sync::reconcile::{Bound, Set};

/// Events of one filter that are listed in memory, 40 bytes each; of more a part of the time is asked for.
const LISTED_MAX: usize = 2_000_000;
/// How long one portion of reading takes; between two of them others may end it.
const PORTION: Duration = Duration::from_millis(200);
/// Answers that are taken from the writer in one go, in bytes.
const ANSWERS_BYTES: usize = 64 * 1024;

/// What a stream has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Events that the other relay has and this one lacked.
    pub wanted: u64,
    /// Of these: stored here.
    pub stored: u64,
    /// Of these: not taken by the rules here.
    pub refused: u64,
    /// Of these: not given when asked for.
    pub missing: u64,
    /// Events that the other relay lacked.
    pub offered: u64,
    /// Of these: taken by it.
    pub sent: u64,
    /// Of these: refused by it.
    pub unwanted: u64,
    /// Messages of reconciliation that were sent.
    pub rounds: u64,
    /// Bytes sent on the wire.
    pub bytes_up: u64,
    /// Bytes that came on the wire.
    pub bytes_down: u64,
}

impl Moved {
    /// Events dealt with, of how many.
    pub fn progress(&self) -> (u64, u64) {
        let done = self.stored + self.refused + self.missing + self.sent + self.unwanted;
        (done, (self.wanted + self.offered).max(done))
    }

    /// Events that are now where they were not.
    pub fn total(&self) -> u64 {
        self.stored + self.sent
    }
}

/// What became of events that were taken in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakenIn {
    /// Stored, or passed on if ephemeral.
    pub stored: u64,
    /// Refused by the rules; coming again would change nothing.
    pub refused: Vec<EventId>,
}

/// Why this side cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SideError {
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store takes nothing.
    #[error("this relay does not store: {0}")]
    Full(String),
    /// A thread ended, which only a panic or the end of the process brings about.
    #[error("the relay is stopping")]
    Stopping,
}

/// The relay's side.
#[derive(Clone)]
pub struct Side {
    relay: Arc<Relay>,
    /// Gets the writer's answers.
    outbox: Arc<Outbox>,
    visible: Visibility,
    sender: Sender,
}

impl Side {
    /// The side of a stream that carries what anybody may see and publish, or with `private` everything: then both relays
    /// are the same person's. Events that come are of `upstream`.
    pub fn new(relay: Arc<Relay>, private: bool, upstream: Upstream) -> Side {
        let anybody = || Visibility::of(relay.gate().private().clone(), Arc::default());
        let visible = if private { Visibility::everything() } else { anybody() };
        let outbox = relay.connect();
        Side { relay, outbox, visible, sender: Sender::relay(upstream, private) }
    }

    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        self.relay.now()
    }

    /// Listens to what is stored here from now on: `Outgoing::Live` in this outbox, until [`Side::unlisten`].
    pub fn listen(&self, filters: &[Filter]) -> Arc<Outbox> {
        let outbox = self.relay.connect();
        let filters = filters.iter().map(|filter| Filter { limit: Some(0), ..filter.clone() }).collect();
        self.relay.subscribe(&outbox, 1, filters, self.visible.clone());
        outbox
    }

    /// Ends listening.
    pub fn unlisten(&self, outbox: &Outbox) {
        outbox.close();
        self.relay.unsubscribe(outbox, 1);
    }

    /// Whether an event may leave through this stream.
    pub fn may_leave(&self, event: &Event) -> bool {
        self.visible.allows(event) && (self.sender.source == Source::Operator || !event.is_protected())
    }

    fn query(&self, filter: Filter) -> Query {
        let wanted = vec![Wanted { filter, limit: usize::MAX, whole_seconds: false }];
        Query { wanted, now: self.relay.now(), before: None, visible: self.visible.clone() }
    }

    /// What is here of a filter; `None`: too much to be compared at once.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn set(&self, filter: Filter) -> Result<Option<SideSet>, SideError> {
        let (relay, query) = (self.relay.clone(), self.query(Filter { limit: None, ..filter }));
        blocking(move || set_of(&relay, query)).await
    }

    /// Which of these events are not here.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn lacking(&self, mut ids: Vec<EventId>) -> Result<Vec<EventId>, SideError> {
        let relay = self.relay.clone();
        blocking(move || {
            let mut error = None;
            ids.retain(|id| match relay.store().contains(id) {
                Ok(is_here) => !is_here,
                Err(found) => {
                    error = Some(found);
                    false
                }
            });
            error.map_or(Ok(ids), Err)
        })
        .await
    }

    /// These events, as far as they are here and may leave; oldest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn events(&self, mut ids: Vec<EventId>) -> Result<Vec<Row>, SideError> {
        ids.sort_unstable();
        let relay = self.relay.clone();
        let query = self.query(Filter { ids: Some(ids), ..Filter::default() });
        blocking(move || {
            let mut rows = Vec::new();
            let mut scan = relay.store().scan(query)?;
            let budget = || PageBudget { bytes_max: usize::MAX, until: Instant::now() + PORTION };
            while scan.page(budget(), &mut rows)? == Progress::Paused {}
            rows.reverse();
            Ok(rows)
        })
        .await
    }

    /// Takes events in by the rules, and waits until they are stored.
    ///
    /// # Errors
    /// [`SideError::Full`] when the store takes nothing more.
    pub async fn take(&self, events: Vec<Event>) -> Result<TakenIn, SideError> {
        let (relay, sender) = (self.relay.clone(), self.sender.clone());
        let checked = blocking(move || Ok(check(&relay, events, &sender))).await?;
        let (good, refused) = checked?;
        let mut left = good.len();
        for event in good {
            let mut slot =
                Some(Box::new(Submission { event, reply: self.outbox.clone(), sender: self.sender.clone() }));
            poll_fn(|cx| self.relay.poll_submit(cx, &mut slot)).await;
        }
        let mut taken = TakenIn { stored: 0, refused };
        let mut batch = Vec::new();
        while left > 0 {
            let found = poll_fn(|cx| self.outbox.poll_take(cx, ANSWERS_BYTES, &mut batch)).await;
            if found != Taken::Some {
                return Err(SideError::Stopping);
            }
            for message in batch.drain(..) {
                let Outgoing::Answer(text) = message else { continue };
                left = left.saturating_sub(1);
                taken.note(&text)?;
            }
        }
        Ok(taken)
    }
}

impl TakenIn {
    fn note(&mut self, text: &str) -> Result<(), SideError> {
        match RelayMessage::from_json(text) {
            RelayMessage::Ok { accepted: true, text, .. } => self.stored += u64::from(text.is_empty()),
            RelayMessage::Ok { text, .. } if text.starts_with("error:") => return Err(SideError::Full(text)),
            RelayMessage::Ok { id, .. } => self.refused.push(id),
            _ => {}
        }
        Ok(())
    }
}

/// The ingest stages; what passes, and what is refused for good. An event that is here already is neither.
fn check(
    relay: &Relay,
    events: Vec<Event>,
    sender: &Sender,
) -> Result<(Vec<Verified<Event>>, Vec<EventId>), SideError> {
    let (mut good, mut refused) = (Vec::with_capacity(events.len()), Vec::new());
    for event in events {
        let id = event.id;
        match relay.check(event, sender) {
            Ok(event) => good.push(event),
            Err(Rejection::Duplicate) => {}
            Err(rejection @ (Rejection::QuotaUsedUp | Rejection::StoreUnreadable)) => {
                return Err(SideError::Full(rejection.to_string()));
            }
            Err(rejection) => {
                tracing::debug!(%id, %rejection, "an event from another relay is not taken");
                refused.push(id);
            }
        }
    }
    Ok((good, refused))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, SideError> {
    Ok(spawn_blocking(work).await.map_err(|_| SideError::Stopping)??)
}

fn set_of(relay: &Relay, query: Query) -> Result<Option<SideSet>, StoreError> {
    if let Some(mut summed) = relay.store().summed(&query, true)? {
        while summed.prepare(Instant::now() + PORTION)? == Progress::Paused {}
        return Ok(Some(SideSet::Summed(summed)));
    }
    let mut items = Vec::new();
    let mut scan = relay.store().scan(query)?;
    while scan.items(Instant::now() + PORTION, &mut items)? == Progress::Paused {
        if items.len() > LISTED_MAX {
            return Ok(None);
        }
    }
    Ok(Some(SideSet::Listed(super::negotiation::in_order(items))))
}

/// What this side has of a filter.
pub enum SideSet {
    /// Event by event.
    Listed(Vec<Item>),
    /// By sums that the store keeps.
    Summed(Box<dyn Summed>),
}

impl Set for SideSet {
    type Error = StoreError;

    fn sum(&mut self, from: &Item, to: &Item) -> Result<Sum, StoreError> {
        match self {
            SideSet::Listed(items) => items.sum(from, to).map_err(|never| match never {}),
            SideSet::Summed(summed) => summed.sum(from, to),
        }
    }

    fn items(&mut self, from: &Item, to: &Item, max: usize, out: &mut Vec<Item>) -> Result<(), StoreError> {
        match self {
            SideSet::Listed(items) => items.items(from, to, max, out).map_err(|never| match never {}),
            SideSet::Summed(summed) => Summed::items(&mut **summed, from, to, max, out),
        }
    }

    fn cuts(&mut self, from: &Item, to: &Item, parts: usize, out: &mut Vec<Bound>) -> Result<(), StoreError> {
        match self {
            SideSet::Listed(items) => items.cuts(from, to, parts, out).map_err(|never| match never {}),
            SideSet::Summed(summed) => super::negotiation::BySums(&mut **summed).cuts(from, to, parts, out),
        }
    }
}
