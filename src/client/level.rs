//! Two sides made equal over a link: compared by NIP-77, or read page by page where a relay cannot compare.
//!
//! In: a [`Party`], which is a link and whoever keeps events at this end of it: a user's profile ([`super::session`]) or a
//! relay's own store ([`super::stream`]). Out: events for it to keep, and what the other side lacks for it to give. What is
//! missing is fetched by id, a hundred a question, and asked for once more; where one of the two has too many events to
//! be compared at once, the time is cut in halves. Never waits longer than the party does, and never writes anything
//! itself.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;

use tokio::task::spawn_blocking;

use super::link::{Auth, Incoming, Link, LinkError};
use super::reconcile::{Difference, Negotiation, Refused, Turn, halves};
use crate::config::Direction;
use crate::protocol::item::Item;
use crate::protocol::message::EoseHint;
use crate::protocol::relay_message::{RelayMessage, prefix};
use crate::protocol::{Event, EventId, Filter, Kind, SubscriptionId, message};
use crate::sync::reconcile::Set;

/// Comparisons until nothing more moves. Two are usual; a third one sees what was replaced meanwhile.
pub(super) const PASSES_MAX: usize = 5;
/// The subscription of what is new.
pub(super) const LIVE: &str = "live";
const NEG: &str = "neg";
const PAGE: &str = "page";
/// Ids in one REQ: as many as any relay gives in one answer.
const IDS_MAX: usize = 100;
/// REQs for ids on their way together.
const FETCHES_MAX: usize = 4;
/// Events of one page, where the relay gives so many.
const PAGE_EVENTS: u64 = 500;
/// What a relay may give for one filter that does not tell: fewer are not usual. More in one second may not be all of
/// them.
const UNTOLD_LIMIT: u64 = 100;
/// How far ahead of the clock an event may be dated that takes part, seconds.
const AHEAD_SECS: u64 = 86_400;

/// How events came that are to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// They were asked for by [`Party::lacking`]'s answer.
    AskedFor,
    /// They stood on a page.
    Found,
}

/// One end of a link that is to be made equal with the other.
pub(super) trait Party: Send {
    /// Why it cannot go on.
    type Error: From<LinkError> + Send;
    /// What it has of a filter.
    type Set: Set<Error: Display + Send> + Send + 'static;

    /// The link.
    fn link(&mut self) -> &mut Link;
    /// What comes next, within the time for an answer.
    fn next(&mut self) -> impl Future<Output = Result<Incoming, Self::Error>> + Send;
    /// Takes what comes while something else is waited for.
    fn take_in(&mut self, incoming: Incoming) -> impl Future<Output = Result<(), Self::Error>> + Send;
    /// Which way events go.
    fn direction(&self) -> Direction;
    /// Seconds since 1970.
    fn now_secs(&self) -> u64;
    /// What is here of a filter; `None`: too much to be compared at once.
    fn set(&mut self, filter: &Filter) -> impl Future<Output = Result<Option<Self::Set>, Self::Error>> + Send;
    /// Which of these events are wanted here and not there yet.
    fn lacking(&mut self, ids: Vec<EventId>) -> impl Future<Output = Result<Vec<EventId>, Self::Error>> + Send;
    /// Keeps events.
    fn keep(&mut self, events: Vec<Event>, came: Came) -> impl Future<Output = Result<(), Self::Error>> + Send;
    /// These were asked for twice and did not come.
    fn never_came(&mut self, ids: Vec<EventId>);
    /// Gives the other side what it lacks, or takes note of it.
    fn give(&mut self, have: Vec<Item>) -> impl Future<Output = Result<(), Self::Error>> + Send;
    /// A message of a comparison goes out.
    fn round(&mut self) {}
    /// The other side has more than it can give. The reading goes on behind that place, unless this is an error.
    fn incomplete(&mut self, what: &'static str) -> Result<(), Self::Error>;
    /// The other side refuses what is needed.
    fn refused(reason: String) -> Self::Error;
    /// Its own set cannot be read.
    fn unreadable(error: <Self::Set as Set>::Error) -> Self::Error;
}

/// The part of a scope that deletes: it is made equal first.
pub(super) fn deletions_in(scope: &Filter) -> Option<Filter> {
    let deleting = [Kind::DELETION, Kind::VANISH];
    let kinds: Vec<Kind> = match &scope.kinds {
        Some(kinds) => kinds.iter().copied().filter(|kind| deleting.contains(kind)).collect(),
        None => deleting.to_vec(),
    };
    (!kinds.is_empty()).then(|| Filter { kinds: Some(kinds), ..scope.clone() })
}

pub(super) fn subscription(id: &str) -> SubscriptionId {
    SubscriptionId::new(id).expect("short names of our own")
}

/// Subscribes to what is new from now on, and waits until the other side has begun to send it.
pub(super) async fn listen<P: Party>(party: &mut P, filters: &[Filter]) -> Result<(), P::Error> {
    let live: Vec<Filter> = filters.iter().map(|filter| Filter { limit: Some(0), ..filter.clone() }).collect();
    party.link().send(message::req(&subscription(LIVE), &live)).await?;
    loop {
        match party.next().await? {
            Incoming::Message(RelayMessage::Eose { id, .. }) if id == LIVE => return Ok(()),
            Incoming::Message(RelayMessage::Closed { id, text }) if id == LIVE => {
                wait_for_proof(party, text).await?;
                party.link().send(message::req(&subscription(LIVE), &live)).await?;
            }
            other => party.take_in(other).await?,
        }
    }
}

/// Makes both sides equal in what a filter matches; its limit is not looked at.
pub(super) async fn level<P: Party>(party: &mut P, filter: &Filter) -> Result<(), P::Error> {
    let mut spans = vec![Filter { limit: None, ..filter.clone() }];
    while let Some(span) = spans.pop() {
        let difference = match compare(party, &span).await? {
            Ok(difference) => difference,
            Err(NotCompared { refused: Refused::TooMany(reason), middle }) => {
                let parts = halves(&span, party.now_secs() + AHEAD_SECS, middle);
                let [older, newer] = parts.ok_or_else(|| P::refused(reason))?;
                spans.extend([newer, older]);
                continue;
            }
            Err(NotCompared { refused: Refused::AuthRequired, .. }) => {
                wait_for_proof(party, "auth-required: to reconcile".to_owned()).await?;
                spans.push(span);
                continue;
            }
            Err(NotCompared { refused: Refused::Unwilling(reason) | Refused::Malformed(reason), .. }) => {
                tracing::debug!(relay = %party.link().url(), reason, "no reconciliation; reading page by page");
                compare_by_pages(party, &span).await?
            }
        };
        if party.direction().is_down() {
            fetch(party, difference.need).await?;
        }
        if party.direction().is_up() {
            party.give(difference.have).await?;
        }
    }
    Ok(())
}

/// Why two sets were not compared, and where a span can be cut so that both parts have as many events.
struct NotCompared {
    refused: Refused,
    middle: Option<u64>,
}

impl From<Refused> for NotCompared {
    fn from(refused: Refused) -> Self {
        NotCompared { refused, middle: None }
    }
}

/// Compares both sides by NIP-77.
async fn compare<P: Party>(party: &mut P, filter: &Filter) -> Result<Result<Difference, NotCompared>, P::Error> {
    if !party.link().about().supports(77) {
        return Ok(Err(Refused::Unwilling("NIP-77 is not announced".to_owned()).into()));
    }
    let Some(set) = party.set(filter).await? else {
        return Ok(Err(Refused::TooMany("there are too many events here to be compared".to_owned()).into()));
    };
    let asked = filter.clone();
    let opened = aside(move || Negotiation::open(subscription(NEG), &asked, set)).await;
    let (mut negotiation, opening) = opened.map_err(P::unreadable)?;
    party.link().send(opening).await?;
    loop {
        party.round();
        let turn = loop {
            let said = party.next().await?;
            let (back, turn) = negotiate(negotiation, said).await;
            negotiation = back;
            match turn {
                Ok(turn) => break turn,
                Err(other) => party.take_in(other).await?,
            }
        };
        match turn {
            Turn::Say(answer) => party.link().send(answer).await?,
            Turn::Done(close, difference) => {
                party.link().send(close).await?;
                return Ok(Ok(difference));
            }
            Turn::Refused(refused) => {
                let middle = aside(move || negotiation.middle()).await.map_err(P::unreadable)?;
                return Ok(Err(NotCompared { refused, middle }));
            }
        }
    }
}

/// Fetches events by id; what does not come is asked for once more.
async fn fetch<P: Party>(party: &mut P, need: Vec<EventId>) -> Result<(), P::Error> {
    let mut missing = party.lacking(need).await?;
    for _ in 0..2 {
        let mut still_missing = Vec::new();
        for part in missing.chunks(IDS_MAX * FETCHES_MAX) {
            still_missing.extend(fetch_part(party, part).await?);
        }
        missing = still_missing;
    }
    party.never_came(missing);
    Ok(())
}

/// Fetches these; those that did not come.
async fn fetch_part<P: Party>(party: &mut P, part: &[EventId]) -> Result<Vec<EventId>, P::Error> {
    let mut open = HashMap::new();
    for (number, ids) in part.chunks(IDS_MAX).enumerate() {
        let id = subscription(&format!("fetch{number}"));
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        let filter = Filter { limit: Some(ids.len() as u64), ids: Some(ids), ..Filter::default() };
        party.link().send(message::req(&id, std::slice::from_ref(&filter))).await?;
        open.insert(id.as_str().to_owned(), id);
    }
    let mut wanted: HashSet<EventId> = part.iter().copied().collect();
    let mut events = Vec::new();
    while !open.is_empty() {
        match party.next().await? {
            Incoming::Message(RelayMessage::Event { id, event }) if open.contains_key(&id) => {
                // A relay that gives what was not asked for is not let in.
                if wanted.remove(&event.id) {
                    events.push(*event);
                }
            }
            Incoming::Message(RelayMessage::Eose { id, .. }) if open.contains_key(&id) => {
                if let Some(id) = open.remove(&id) {
                    party.link().send(message::close(&id)).await?;
                }
            }
            Incoming::Message(RelayMessage::Closed { id, .. }) if open.contains_key(&id) => {
                open.remove(&id);
            }
            other => party.take_in(other).await?,
        }
    }
    party.keep(events, Came::AskedFor).await?;
    Ok(wanted.into_iter().collect())
}

/// Reads all that the other side has of a filter, newest first, and has it kept; what it did not have is the difference.
async fn compare_by_pages<P: Party>(party: &mut P, filter: &Filter) -> Result<Difference, P::Error> {
    let ours = party.set(filter).await?;
    let (mut seen, mut until) = (HashSet::new(), filter.until);
    loop {
        let page = Filter { until, limit: Some(PAGE_EVENTS), ..filter.clone() };
        let (events, hint) = read_page(party, &page).await?;
        let (Some(newest), Some(oldest)) =
            (events.iter().map(|event| event.created_at).max(), events.iter().map(|event| event.created_at).min())
        else {
            break;
        };
        let unseen: Vec<Event> = events.into_iter().filter(|event| seen.insert(event.id)).collect();
        let found = unseen.len();
        if party.direction().is_down() {
            party.keep(unseen, Came::Found).await?;
        }
        // Without a hint the next page begins in the second where this one ended: there may be more of it.
        let next = match hint {
            EoseHint::Finish => break,
            EoseHint::More => oldest.checked_sub(1),
            EoseHint::Unknown if found > 0 => Some(oldest),
            EoseHint::Unknown => {
                if newest == oldest && fills_a_page(party, &page, oldest).await? {
                    party.incomplete("too many events share one second")?;
                }
                oldest.checked_sub(1)
            }
        };
        let Some(next) = next.filter(|next| filter.since.is_none_or(|since| since <= *next)) else { break };
        until = Some(next);
    }
    lacked_there(party, ours, seen).await
}

/// Whether one second has as many events as the relay gives at all, so that there may be more which it never gives.
async fn fills_a_page<P: Party>(party: &mut P, filter: &Filter, second: u64) -> Result<bool, P::Error> {
    let one = Filter { since: Some(second), until: Some(second), ..filter.clone() };
    let (events, hint) = read_page(party, &one).await?;
    let limit = party.link().about().limit_max.unwrap_or(UNTOLD_LIMIT).min(PAGE_EVENTS);
    Ok(hint != EoseHint::Finish && events.len() as u64 >= limit)
}

async fn lacked_there<P: Party>(
    party: &mut P,
    ours: Option<P::Set>,
    seen: HashSet<EventId>,
) -> Result<Difference, P::Error> {
    if !party.direction().is_up() {
        return Ok(Difference::default());
    }
    let Some(mut ours) = ours else {
        party.incomplete("there are too many events here to be compared")?;
        return Ok(Difference::default());
    };
    let listed = aside(move || {
        let mut have = Vec::new();
        ours.items(&Item::FIRST, &Item::END, usize::MAX, &mut have)?;
        have.retain(|item| !seen.contains(&item.id));
        Ok(have)
    });
    Ok(Difference { have: listed.await.map_err(P::unreadable)?, need: Vec::new() })
}

async fn read_page<P: Party>(party: &mut P, filter: &Filter) -> Result<(Vec<Event>, EoseHint), P::Error> {
    let page = subscription(PAGE);
    party.link().send(message::req(&page, std::slice::from_ref(filter))).await?;
    let mut events = Vec::new();
    loop {
        match party.next().await? {
            Incoming::Message(RelayMessage::Event { id, event }) if id == PAGE => {
                if filter.matches(&*event) {
                    events.push(*event);
                }
            }
            Incoming::Message(RelayMessage::Eose { id, hint }) if id == PAGE => {
                party.link().send(message::close(&page)).await?;
                return Ok((events, hint));
            }
            Incoming::Message(RelayMessage::Closed { id, text }) if id == PAGE => {
                wait_for_proof(party, text).await?;
                party.link().send(message::req(&page, std::slice::from_ref(filter))).await?;
                events.clear();
            }
            other => party.take_in(other).await?,
        }
    }
}

/// The relay wants a proof first. The link gives it as soon as the relay asks for it.
async fn wait_for_proof<P: Party>(party: &mut P, refusal: String) -> Result<(), P::Error> {
    if prefix(&refusal) != "auth-required" || *party.link().auth() != Auth::NotAsked {
        return Err(P::refused(refusal));
    }
    while *party.link().auth() == Auth::NotAsked {
        let incoming = party.next().await?;
        party.take_in(incoming).await?;
    }
    match party.link().auth() {
        Auth::Refused(reason) => Err(P::refused(reason.clone())),
        _ => Ok(()),
    }
}

/// Runs what computes or reads the disk beside the sockets.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime ends, and with it whoever waits here.
        Err(_) => std::future::pending().await,
    }
}

/// Has a message answered; gives it back if it is about something else.
async fn negotiate<S: Set<Error: Display> + Send + 'static>(
    mut negotiation: Negotiation<S>,
    said: Incoming,
) -> (Negotiation<S>, Result<Turn, Incoming>) {
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
        return (negotiation, Err(said));
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
