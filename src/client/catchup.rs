//! Catching up with a relay, without gap or repeat.
//!
//! First a live subscription for what is new from here on. Then the sets are compared (NIP-77): deletions before the rest,
//! so that nothing is fetched or uploaded that is deleted already. What this side lacks is fetched by id, what the relay
//! lacks is uploaded, oldest first, and the comparison is made again until nothing more moves. Never "since the newest
//! event I have": devices that were offline publish old times. A relay without NIP-77 is read page by page.

use std::collections::{HashMap, HashSet};

use super::link::{Auth, Incoming};
use super::profile::{Profile, form_of};
use super::reconcile::{Difference, Negotiation, Refused, Turn, halves};
use super::session::{LIVE, Session, SessionError};
use super::status::LinkState;
use crate::protocol::item::Item;
use crate::protocol::message::EoseHint;
use crate::protocol::relay_message::{RelayMessage, prefix};
use crate::protocol::{Event, EventId, Filter, Kind, SubscriptionId, message};
use crate::store::StoreError;
use crate::sync::draft::SettingsForm;
use crate::sync::outbox::{Content, Outbox, RelayUrl, Step};

/// How often sets are compared until nothing more moves. Two are usual, a third one sees what was replaced meanwhile.
const PASSES_MAX: usize = 5;
/// Ids in one REQ.
const IDS_MAX: usize = 100;
/// REQs for ids on their way together.
const FETCHES_MAX: usize = 4;
/// Events that are uploaded before the next are read from the cache.
const UPLOADS_MAX: usize = 256;
/// Events of one page, where the relay gives so many.
const PAGE_EVENTS: u64 = 500;
/// How far ahead of the clock an event may be dated that takes part, seconds.
const AHEAD_SECS: u64 = 86_400;

impl Session {
    /// Makes this side and the relay equal, as far as either takes what the other has.
    pub(super) async fn catch_up(&mut self) -> Result<(), SessionError> {
        loop {
            self.starts_over();
            self.state_is(LinkState::CatchingUp).await;
            if !self.scopes.is_empty() {
                self.listen().await?;
                self.make_equal().await?;
            }
            self.settle().await?;
            if !self.must_start_over() {
                break;
            }
        }
        self.on_disk(|profile, _| profile.say_what_is_due()).await?;
        self.state_is(LinkState::Live).await;
        Ok(())
    }

    async fn state_is(&mut self, link: LinkState) {
        self.on_disk(move |profile, relay| profile.tell(relay, |status| status.link = link)).await;
    }

    /// Subscribes to what is new from now on, and waits until the relay has begun to send it.
    async fn listen(&mut self) -> Result<(), SessionError> {
        let live: Vec<Filter> = self.scopes.iter().map(|scope| Filter { limit: Some(0), ..scope.clone() }).collect();
        self.link.send(message::req(&subscription(LIVE), &live)).await?;
        loop {
            let incoming = self.link.next_within(self.answer_timeout).await?;
            match &incoming {
                Incoming::Message(RelayMessage::Eose { id, .. }) if id == LIVE => return Ok(()),
                Incoming::Message(RelayMessage::Closed { id, text }) if id == LIVE => {
                    self.wait_for_proof(text.clone()).await?;
                    self.link.send(message::req(&subscription(LIVE), &live)).await?;
                }
                _ => self.take_in(incoming).await?,
            }
        }
    }

    /// The relay wants a proof first. It is given by the link as soon as the relay asks for it.
    async fn wait_for_proof(&mut self, refusal: String) -> Result<(), SessionError> {
        if prefix(&refusal) != "auth-required" || *self.link.auth() != Auth::NotAsked {
            return Err(SessionError::Refused(refusal));
        }
        while *self.link.auth() == Auth::NotAsked {
            let incoming = self.link.next_within(self.answer_timeout).await?;
            self.take_in(incoming).await?;
        }
        match self.link.auth() {
            Auth::Refused(reason) => Err(SessionError::Refused(reason.clone())),
            _ => Ok(()),
        }
    }

    async fn make_equal(&mut self) -> Result<(), SessionError> {
        let scopes = self.scopes.clone();
        for _ in 0..PASSES_MAX {
            let mut moved = 0;
            for filter in scopes.iter().filter_map(deletions_in).chain(scopes.iter().cloned()) {
                moved += self.level(filter).await?;
                if self.must_start_over() {
                    return Ok(());
                }
            }
            if moved == 0 {
                return Ok(());
            }
        }
        tracing::info!(relay = %self.relay, "still not equal after {PASSES_MAX} passes; the next link goes on");
        Ok(())
    }

    /// Makes both sides equal in what a filter matches. How many events moved.
    async fn level(&mut self, filter: Filter) -> Result<usize, SessionError> {
        let mut spans = vec![filter];
        let mut moved = 0;
        while let Some(span) = spans.pop() {
            let difference = match self.compare(&span).await? {
                Ok(difference) => difference,
                Err(Refused::TooMany(reason)) => {
                    let end = self.profile.now_secs() + AHEAD_SECS;
                    let [older, newer] = halves(&span, end).ok_or(SessionError::Refused(reason))?;
                    spans.extend([newer, older]);
                    continue;
                }
                Err(Refused::AuthRequired) => {
                    self.wait_for_proof("auth-required: to reconcile".to_owned()).await?;
                    spans.push(span);
                    continue;
                }
                Err(Refused::Unwilling(reason) | Refused::Malformed(reason)) => {
                    tracing::debug!(relay = %self.relay, reason, "no reconciliation; reading page by page");
                    self.compare_by_pages(&span, &mut moved).await?
                }
            };
            moved += self.fetch(difference.need).await?;
            moved += self.upload(difference.have).await?;
        }
        Ok(moved)
    }

    /// Compares both sides by NIP-77.
    async fn compare(&mut self, filter: &Filter) -> Result<Result<Difference, Refused>, SessionError> {
        if !self.link.about().supports(77) {
            return Ok(Err(Refused::Unwilling("NIP-77 is not announced".to_owned())));
        }
        let items = self.items(filter).await?;
        let Ok((mut negotiation, opening)) = Negotiation::open(subscription("neg"), filter, items);
        self.link.send(opening).await?;
        loop {
            let incoming = self.link.next_within(self.answer_timeout).await?;
            let turn = match &incoming {
                Incoming::Message(said) => negotiation.take(said),
                _ => None,
            };
            match turn {
                Some(Turn::Say(answer)) => self.link.send(answer).await?,
                Some(Turn::Done(close, difference)) => {
                    self.link.send(close).await?;
                    return Ok(Ok(difference));
                }
                Some(Turn::Refused(refused)) => return Ok(Err(refused)),
                None => self.take_in(incoming).await?,
            }
        }
    }

    async fn items(&mut self, filter: &Filter) -> Result<Vec<Item>, SessionError> {
        // What has come meanwhile counts as had.
        self.settle().await?;
        let (filter, now_secs) = (filter.clone(), self.profile.now_secs());
        Ok(self.on_disk(move |profile, _| profile.cache().items(&filter, now_secs)).await?)
    }

    /// Fetches events by id; what does not come is asked for once more. How many were new.
    async fn fetch(&mut self, need: Vec<EventId>) -> Result<usize, SessionError> {
        let mut new = 0;
        let mut missing = need;
        for _ in 0..2 {
            let mut still_missing = Vec::new();
            for part in missing.chunks(IDS_MAX * FETCHES_MAX) {
                let (came, lacking) = self.fetch_part(part).await?;
                new += came;
                still_missing.extend(lacking);
            }
            missing = still_missing;
        }
        Ok(new)
    }

    async fn fetch_part(&mut self, part: &[EventId]) -> Result<(usize, Vec<EventId>), SessionError> {
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
            let incoming = self.link.next_within(self.answer_timeout).await?;
            match incoming {
                Incoming::Message(RelayMessage::Event { id, event }) if open.contains_key(&id) => {
                    // A relay that gives what was not asked for is not let into the cache.
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
        Ok((self.store(events).await?, wanted.into_iter().collect()))
    }

    async fn store(&mut self, events: Vec<Event>) -> Result<usize, SessionError> {
        let stored = self.on_disk(move |profile, relay| {
            let new = profile.take(events)?;
            profile.tell(relay, |status| status.fetched += new);
            Ok::<usize, StoreError>(new)
        });
        Ok(stored.await?)
    }

    /// Reads all that a relay has of a filter, newest first, and keeps it; what it did not have is the difference.
    async fn compare_by_pages(&mut self, filter: &Filter, moved: &mut usize) -> Result<Difference, SessionError> {
        let ours = self.items(filter).await?;
        let mut seen = HashSet::new();
        let mut until = filter.until;
        loop {
            let page = Filter { until, limit: Some(PAGE_EVENTS), ..filter.clone() };
            let (events, hint) = self.read_page(&page).await?;
            let oldest = events.iter().map(|event| event.created_at).min();
            let unseen: Vec<Event> = events.into_iter().filter(|event| seen.insert(event.id)).collect();
            let found = unseen.len();
            *moved += self.store(unseen).await?;
            let Some(oldest) = oldest.filter(|_| hint != EoseHint::Finish) else { break };
            // Without a hint the next page begins in the second where this one ended: there may be more of it.
            let next = if hint == EoseHint::More || found == 0 { oldest.checked_sub(1) } else { Some(oldest) };
            let Some(next) = next.filter(|next| filter.since.is_none_or(|since| since <= *next)) else { break };
            until = Some(next);
        }
        let have = ours.into_iter().filter(|item| !seen.contains(&item.id)).collect();
        Ok(Difference { have, need: Vec::new() })
    }

    async fn read_page(&mut self, filter: &Filter) -> Result<(Vec<Event>, EoseHint), SessionError> {
        let page = subscription("page");
        self.link.send(message::req(&page, std::slice::from_ref(filter))).await?;
        let mut events = Vec::new();
        loop {
            match self.link.next_within(self.answer_timeout).await? {
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

    /// Gives the relay what it lacks of the user's own events and may have, oldest first. How many it took.
    async fn upload(&mut self, mut have: Vec<Item>) -> Result<usize, SessionError> {
        have.retain(|item| !self.unwanted.contains(&item.id));
        have.sort_unstable();
        let mut taken = 0;
        for part in have.chunks(UPLOADS_MAX) {
            let ids: Vec<EventId> = part.iter().map(|item| item.id).collect();
            let slots = self.link.about().slots;
            let events = self.on_disk(move |profile, relay| uploadable(profile, relay, slots, ids)).await?;
            taken += self.upload_part(events).await?;
        }
        Ok(taken)
    }

    /// By the outbox's rules, without its journal: what is lost on the way is found lacking again next time.
    async fn upload_part(&mut self, events: Vec<Event>) -> Result<usize, SessionError> {
        let mut rules = Outbox::default();
        let mut left: HashSet<EventId> = events.iter().map(|event| event.id).collect();
        for event in &events {
            let json = String::from_utf8(event.canonical().json.to_vec()).expect("canonical JSON is text");
            rules.queue(Content::Event(json), vec![self.relay.clone()]);
        }
        rules.link_up(&self.relay);
        if *self.link.auth() != Auth::NotAsked {
            rules.authenticated(&self.relay);
        }
        let mut taken = 0;
        while rules.link_status(&self.relay).owed > 0 {
            let wait = match rules.next(&self.relay, self.profile.world().now_ms()) {
                Step::Send { event, .. } => {
                    self.link.send(message::publish(&event)).await?;
                    continue;
                }
                Step::Wait(until) => until,
                Step::Authenticate => None,
                Step::Sign(_) => unreachable!("everything that is uploaded is signed"),
            };
            let Some(incoming) = self.next_or_pause(wait).await? else { continue };
            match incoming {
                Incoming::Message(RelayMessage::Ok { id, accepted, text }) if left.contains(&id) => {
                    let world = self.profile.world();
                    rules.answer(&self.relay, &id, accepted, &text, world.now_ms(), world.chance());
                    let comes_again = matches!(prefix(&text), "auth-required" | "rate-limited") && !accepted;
                    if !comes_again {
                        left.remove(&id);
                        taken += usize::from(accepted);
                        give_up(&mut rules, &id);
                        // Taken or not: whatever it still lacks in the next pass, it does not want.
                        self.unwanted.insert(id);
                    }
                }
                Incoming::Authenticated | Incoming::AuthRefused(_) => {
                    rules.authenticated(&self.relay);
                    self.take_in(incoming).await?;
                }
                other => self.take_in(other).await?,
            }
        }
        self.on_disk(move |profile, relay| profile.tell(relay, |status| status.uploaded += taken)).await;
        Ok(taken)
    }

    /// What comes next, or nothing when a pause is over. Without a pause, an answer is owed.
    async fn next_or_pause(&mut self, until_ms: Option<u64>) -> Result<Option<Incoming>, SessionError> {
        let Some(until_ms) = until_ms else {
            return Ok(Some(self.link.next_within(self.answer_timeout).await?));
        };
        let wait = until_ms.saturating_sub(self.profile.world().now_ms());
        let waited = tokio::time::timeout(std::time::Duration::from_millis(wait), self.link.next()).await;
        Ok(waited.ok().transpose()?)
    }
}

/// Takes an event out that was not settled: the next link tries it again.
fn give_up(rules: &mut Outbox, id: &EventId) {
    let entry = rules.entries().find(|(_, entry)| entry.id == Some(*id)).map(|(seq, _)| seq);
    if let Some(seq) = entry {
        rules.withdraw(seq);
    }
}

/// Which of these events the user wrote, the relay may have and no outbox owes it, oldest first. Settings only in the form
/// that this relay takes.
fn uploadable(
    profile: &Profile,
    relay: &RelayUrl,
    slots: bool,
    mut ids: Vec<EventId>,
) -> Result<Vec<Event>, StoreError> {
    let in_outbox = profile.known_to_outbox(relay);
    ids.retain(|id| !in_outbox.contains(id));
    ids.sort_unstable();
    let mut events = profile.cache().query(&[Filter { ids: Some(ids), ..Filter::default() }], profile.now_secs())?;
    events.retain(|event| event.pubkey == profile.keys().pubkey() && profile.routing().may_have(relay, event));
    events.retain(|event| form_of(event).is_none_or(|form| (form == SettingsForm::Slot) == slots));
    events.reverse();
    Ok(events)
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

fn subscription(id: &str) -> SubscriptionId {
    SubscriptionId::new(id).expect("short names of our own")
}
