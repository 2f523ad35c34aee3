//! A stream of events between this relay and another one: what either lacks is found out and moved, then what is new.
//!
//! In: a link to the other relay and this relay's [`Side`]. The sets are compared by NIP-77, requests to delete or vanish
//! before the rest, so that nothing is fetched or sent that is deleted already; what is missing is fetched by id, what the
//! other lacks is sent oldest first, and the comparison is made again until nothing moves. Where one of the two has too
//! many events to be compared at once, the time is cut in halves. A relay without NIP-77 is read page by page.
//!
//! Resumes by nature: whatever was moved before a link broke is equal already. Never waits longer than the link's time for
//! an answer. Nothing goes back to where it came from.

mod upload;

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::catchup::deletions_in;
use super::link::{Auth, Incoming, Link, LinkError};
use super::reconcile::{Difference, Negotiation, Refused, Turn, halves};
use crate::config::Direction;
use crate::protocol::message::EoseHint;
use crate::protocol::relay_message::{RelayMessage, prefix};
use crate::protocol::{Event, EventId, Filter, SubscriptionId, message};
use crate::relay::side::{Moved, Side, SideError, SideSet};

/// Comparisons until nothing more moves. Two are usual; a third one sees what was replaced meanwhile.
const PASSES_MAX: usize = 5;
/// Ids in one REQ: as many as any relay gives in one answer.
const IDS_MAX: usize = 100;
/// REQs for ids on their way together.
const FETCHES_MAX: usize = 4;
/// Events that are taken in with one durable write.
const TAKE_EVENTS: usize = 512;
/// Events of one page, where the relay gives so many.
const PAGE_EVENTS: u64 = 500;
/// How far ahead of the clock an event may be dated that takes part, seconds.
const AHEAD_SECS: u64 = 86_400;
/// Events that the one or the other side does not want, remembered so that they are not moved again and again.
const UNWANTED_MAX: usize = 200_000;
/// Events that came from the other relay a short while ago and are not to be sent back.
const RECENT_MAX: usize = 20_000;

/// What is moved.
#[derive(Clone, Debug)]
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
        Stream { link, side, scope, moved, told, memory, arrived: Vec::new() }
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
                self.level_filter(filter).await?;
            }
            self.take_arrived().await?;
            if self.moved.total() == before {
                break;
            }
        }
        Ok(())
    }

    async fn level_filter(&mut self, filter: Filter) -> Result<(), StreamError> {
        let mut spans = vec![Filter { limit: None, ..filter }];
        while let Some(span) = spans.pop() {
            let difference = match self.compare(&span).await? {
                Ok(difference) => difference,
                Err(Refused::TooMany(reason)) => {
                    let parts = halves(&span, self.side.now() + AHEAD_SECS);
                    let [older, newer] = parts.ok_or(StreamError::Refused(reason))?;
                    spans.extend([newer, older]);
                    continue;
                }
                Err(Refused::AuthRequired) => {
                    self.wait_for_proof("auth-required: to reconcile".to_owned()).await?;
                    spans.push(span);
                    continue;
                }
                Err(Refused::Unwilling(reason) | Refused::Malformed(reason)) => {
                    tracing::debug!(relay = %self.link.url(), reason, "no reconciliation; reading page by page");
                    self.compare_by_pages(&span).await?
                }
            };
            if self.scope.direction.is_down() {
                self.fetch(difference.need).await?;
            }
            if self.scope.direction.is_up() {
                self.upload(difference.have).await?;
            }
        }
        Ok(())
    }

    /// Compares both sides by NIP-77.
    async fn compare(&mut self, filter: &Filter) -> Result<Result<Difference, Refused>, StreamError> {
        if !self.link.about().supports(77) {
            return Ok(Err(Refused::Unwilling("NIP-77 is not announced".to_owned())));
        }
        let Some(set) = self.side.set(filter.clone()).await? else {
            return Ok(Err(Refused::TooMany("there are too many events here to be compared".to_owned())));
        };
        let asked = filter.clone();
        let opened = aside(move || Negotiation::open(subscription(NEG), &asked, set)).await?;
        let (mut negotiation, opening) = opened.map_err(SideError::Store)?;
        self.link.send(opening).await?;
        loop {
            self.note(|moved| moved.rounds += 1);
            let turn = loop {
                let said = self.next().await?;
                let (back, turn) = negotiate(negotiation, said).await?;
                negotiation = back;
                match turn {
                    Ok(turn) => break turn,
                    Err(other) => self.take_in(other).await?,
                }
            };
            match turn {
                Turn::Say(answer) => self.link.send(answer).await?,
                Turn::Done(close, difference) => {
                    self.link.send(close).await?;
                    return Ok(Ok(difference));
                }
                Turn::Refused(refused) => return Ok(Err(refused)),
            }
        }
    }

    /// What comes next, within the time for an answer.
    async fn next(&mut self) -> Result<Incoming, StreamError> {
        Ok(self.link.next_within(self.scope.answer_timeout).await?)
    }

    /// What comes while something else is waited for: live events are kept, the rest is nobody's.
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

    /// Fetches events by id; what does not come is asked for once more.
    async fn fetch(&mut self, need: Vec<EventId>) -> Result<(), StreamError> {
        let mut missing = self.side.lacking(need).await?;
        missing.retain(|id| !self.memory.unwanted.contains(id));
        self.note(|moved| moved.wanted += missing.len() as u64);
        for _ in 0..2 {
            let mut still_missing = Vec::new();
            for part in missing.chunks(IDS_MAX * FETCHES_MAX) {
                still_missing.extend(self.fetch_part(part).await?);
            }
            missing = still_missing;
        }
        self.note(|moved| moved.missing += missing.len() as u64);
        missing.into_iter().for_each(|id| self.memory.unwanted(id));
        Ok(())
    }

    /// Fetches these; those that did not come.
    async fn fetch_part(&mut self, part: &[EventId]) -> Result<Vec<EventId>, StreamError> {
        let mut open = HashMap::new();
        for (number, ids) in part.chunks(IDS_MAX).enumerate() {
            let id = subscription(&format!("fetch{number}"));
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            let filter = Filter { limit: Some(ids.len() as u64), ids: Some(ids), ..Filter::default() };
            self.link.send(message::req(&id, std::slice::from_ref(&filter))).await?;
            open.insert(id.as_str().to_owned(), id);
        }
        let mut wanted: HashSet<EventId> = part.iter().copied().collect();
        let mut events = Vec::new();
        while !open.is_empty() {
            match self.next().await? {
                Incoming::Message(RelayMessage::Event { id, event }) if open.contains_key(&id) => {
                    // A relay that gives what was not asked for is not let in.
                    if wanted.remove(&event.id) {
                        events.push(*event);
                    }
                }
                Incoming::Message(RelayMessage::Eose { id, .. }) if open.contains_key(&id) => {
                    if let Some(id) = open.remove(&id) {
                        self.link.send(message::close(&id)).await?;
                    }
                }
                Incoming::Message(RelayMessage::Closed { id, .. }) if open.contains_key(&id) => {
                    open.remove(&id);
                }
                other => self.take_in(other).await?,
            }
        }
        self.take(events).await?;
        Ok(wanted.into_iter().collect())
    }

    /// Reads all that the other relay has of a filter, newest first, taking in what is wanted; what it did not have is the
    /// difference.
    async fn compare_by_pages(&mut self, filter: &Filter) -> Result<Difference, StreamError> {
        let ours = self.side.set(filter.clone()).await?;
        let (mut seen, mut until) = (HashSet::new(), filter.until);
        loop {
            let page = Filter { until, limit: Some(PAGE_EVENTS), ..filter.clone() };
            let (events, hint) = self.read_page(&page).await?;
            let (Some(newest), Some(oldest)) =
                (events.iter().map(|event| event.created_at).max(), events.iter().map(|event| event.created_at).min())
            else {
                break;
            };
            let unseen: Vec<Event> = events.into_iter().filter(|event| seen.insert(event.id)).collect();
            let found = unseen.len();
            if self.scope.direction.is_down() {
                let taken = self.take(unseen).await?;
                self.note(|moved| moved.wanted += taken);
            }
            // Without a hint the next page begins in the second where this one ended: there may be more of it.
            let next = match hint {
                EoseHint::Finish => break,
                EoseHint::More => oldest.checked_sub(1),
                EoseHint::Unknown if found > 0 => Some(oldest),
                EoseHint::Unknown if newest == oldest && found == 0 && self.fills_a_page(&page, oldest).await? => {
                    return Err(StreamError::Incomplete("too many events share one second"));
                }
                EoseHint::Unknown => oldest.checked_sub(1),
            };
            let Some(next) = next.filter(|next| filter.since.is_none_or(|since| since <= *next)) else { break };
            until = Some(next);
        }
        self.lacked_there(ours, &seen).await
    }

    /// Whether one second has as many events as the relay gives at all, so that there may be more which it never gives.
    async fn fills_a_page(&mut self, filter: &Filter, second: u64) -> Result<bool, StreamError> {
        let one = Filter { since: Some(second), until: Some(second), ..filter.clone() };
        let (events, hint) = self.read_page(&one).await?;
        let limit = self.link.about().limit_max.unwrap_or(PAGE_EVENTS).min(PAGE_EVENTS);
        Ok(hint != EoseHint::Finish && events.len() as u64 >= limit)
    }

    async fn lacked_there(&self, ours: Option<SideSet>, seen: &HashSet<EventId>) -> Result<Difference, StreamError> {
        if !self.scope.direction.is_up() {
            return Ok(Difference::default());
        }
        let mut ours = ours.ok_or(StreamError::Incomplete("there are too many events here to be compared"))?;
        let listed = aside(move || {
            use crate::protocol::item::Item;
            use crate::sync::reconcile::Set;
            let mut items = Vec::new();
            ours.items(&Item::FIRST, &Item::END, usize::MAX, &mut items).map(|()| items)
        });
        let mut have = listed.await?.map_err(SideError::Store)?;
        have.retain(|item| !seen.contains(&item.id));
        Ok(Difference { have, need: Vec::new() })
    }

    async fn read_page(&mut self, filter: &Filter) -> Result<(Vec<Event>, EoseHint), StreamError> {
        let page = subscription("page");
        self.link.send(message::req(&page, std::slice::from_ref(filter))).await?;
        let mut events = Vec::new();
        loop {
            match self.next().await? {
                Incoming::Message(RelayMessage::Event { id, event }) if id == page.as_str() => {
                    if filter.matches(&*event) {
                        events.push(*event);
                    }
                }
                Incoming::Message(RelayMessage::Eose { id, hint }) if id == page.as_str() => {
                    self.link.send(message::close(&page)).await?;
                    return Ok((events, hint));
                }
                Incoming::Message(RelayMessage::Closed { id, text }) if id == page.as_str() => {
                    self.wait_for_proof(text).await?;
                    self.link.send(message::req(&page, std::slice::from_ref(filter))).await?;
                    events.clear();
                }
                other => self.take_in(other).await?,
            }
        }
    }

    /// The relay wants a proof first. The link gives it as soon as the relay asks for it.
    async fn wait_for_proof(&mut self, refusal: String) -> Result<(), StreamError> {
        if prefix(&refusal) != "auth-required" || *self.link.auth() != Auth::NotAsked {
            return Err(StreamError::Refused(refusal));
        }
        while *self.link.auth() == Auth::NotAsked {
            let incoming = self.next().await?;
            self.take_in(incoming).await?;
        }
        match self.link.auth() {
            Auth::Refused(reason) => Err(StreamError::Refused(reason.clone())),
            _ => Ok(()),
        }
    }
}

const NEG: &str = "neg";
/// The subscription of what is new.
const LIVE: &str = "live";

fn subscription(id: &str) -> SubscriptionId {
    SubscriptionId::new(id).expect("short names of our own")
}

/// Runs what may read the disk beside the sockets.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, SideError> {
    spawn_blocking(work).await.map_err(|_| SideError::Stopping)
}

type Side77 = Negotiation<SideSet>;

/// Has a message answered; gives it back if it is about something else.
async fn negotiate(mut negotiation: Side77, said: Incoming) -> Result<(Side77, Result<Turn, Incoming>), SideError> {
    let is_for_it = matches!(
        &said,
        Incoming::Message(
            RelayMessage::NegMsg { .. }
                | RelayMessage::NegErr { .. }
                | RelayMessage::Closed { .. }
                | RelayMessage::Notice(_)
        )
    );
    if !is_for_it {
        return Ok((negotiation, Err(said)));
    }
    aside(move || {
        let turn = match &said {
            Incoming::Message(message) => negotiation.take(message),
            _ => None,
        };
        (negotiation, turn.ok_or(said))
    })
    .await
}
