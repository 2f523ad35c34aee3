//! Catching up with a relay, without gap or repeat.
//!
//! First a live subscription for what is new from here on. Then the sets are compared (`level`): deletions before
//! the rest, so that nothing is fetched or uploaded that is deleted already. What the relay lacks is uploaded, oldest
//! first, and the comparison is made again until nothing more moves. Never "since the newest event I have": devices that
//! were offline publish old times. A device that owes much sends that first and then begins anew with the subscription, which
//! would send all of it back.

use std::collections::HashSet;

use super::level::{self, Came, PASSES_MAX, Party, deletions_in};
use super::link::{Auth, Incoming, Link};
use super::profile::{Answer, Profile, form_of};
use super::session::{Session, SessionError};
use super::status::LinkState;
use crate::config::Direction;
use crate::protocol::item::Item;
use crate::protocol::relay_message::{RelayMessage, prefix};
use crate::protocol::{Event, EventId, Filter, message};
use crate::store::StoreError;
use crate::sync::draft::SettingsForm;
use crate::sync::outbox::{Content, Outbox, RelayUrl, Step};

/// Events that are uploaded before the next are read from the cache.
const UPLOADS_MAX: usize = 256;

impl Session {
    /// Makes this side and the relay equal, as far as either takes what the other has.
    pub(super) async fn catch_up(&mut self) -> Result<(), SessionError> {
        loop {
            self.starts_over();
            self.on_disk(|profile, relay| {
                profile.fetching(relay);
                profile.tell(relay, |status| status.link = LinkState::CatchingUp);
            })
            .await;
            if !self.scopes.is_empty() {
                let scopes = self.scopes.clone();
                if !self.has_backlog {
                    level::listen(self, &scopes).await?;
                }
                self.make_equal(&scopes).await?;
            }
            self.settle().await?;
            if !self.must_start_over() {
                break;
            }
        }
        let is_live = !self.has_backlog;
        self.on_disk(move |profile, relay| {
            profile.fetched(relay);
            if is_live {
                profile.tell(relay, |status| status.link = LinkState::Live);
            }
            profile.say_what_is_due()
        })
        .await?;
        Ok(())
    }

    async fn make_equal(&mut self, scopes: &[Filter]) -> Result<(), SessionError> {
        let deletions: Vec<Filter> = scopes.iter().filter_map(deletions_in).collect();
        // A backlog is followed by another catch-up, which sees what is left.
        let passes = if self.has_backlog { 1 } else { PASSES_MAX };
        for _ in 0..passes {
            let before = self.moved;
            self.level_all(&deletions).await?;
            self.upload().await?;
            self.level_all(scopes).await?;
            if self.must_start_over() {
                return Ok(());
            }
            self.settle().await?;
            // What merges waits for this, and not for what goes the other way.
            self.on_disk(|profile, relay| profile.fetched(relay)).await;
            self.is_due();
            self.upload().await?;
            if self.moved == before {
                return Ok(());
            }
        }
        if !self.has_backlog {
            tracing::info!(relay = %self.relay, "still not equal after {PASSES_MAX} passes; the next link goes on");
        }
        Ok(())
    }

    async fn level_all(&mut self, filters: &[Filter]) -> Result<(), SessionError> {
        for filter in filters {
            if self.must_start_over() {
                break;
            }
            level::level(self, filter).await?;
        }
        Ok(())
    }

    /// Gives the relay what it lacks of the user's own events and may have, oldest first.
    pub(super) async fn upload(&mut self) -> Result<(), SessionError> {
        let mut have: Vec<Item> = std::mem::take(&mut self.lacking).into_iter().collect();
        have.retain(|item| !self.offered.contains(&item.id));
        for part in have.chunks(UPLOADS_MAX) {
            let ids: Vec<EventId> = part.iter().map(|item| item.id).collect();
            let slots = self.link.about().slots;
            let events = self.on_disk(move |profile, relay| uploadable(profile, relay, slots, ids)).await?;
            self.upload_part(events).await?;
        }
        Ok(())
    }

    /// By the outbox's rules, without its journal: what is lost on the way is found lacking again next time.
    async fn upload_part(&mut self, events: Vec<Event>) -> Result<(), SessionError> {
        let mut rules = Outbox::default();
        let mut left: HashSet<EventId> = events.iter().map(|event| event.id).collect();
        for event in &events {
            let json = String::from_utf8(event.canonical().json.to_vec()).expect("canonical JSON is text");
            rules.queue(Content::Event(json), vec![self.relay.clone()]);
        }
        rules.link_up(&self.relay);
        rules.fetched(&self.relay);
        if *self.link.auth() != Auth::NotAsked {
            rules.authenticated(&self.relay);
        }
        let mut answers = Vec::new();
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
                        self.moved += usize::from(accepted);
                        give_up(&mut rules, &id);
                        self.was_offered(id);
                        answers.push(Answer { id, accepted, text });
                    }
                }
                Incoming::Authenticated | Incoming::AuthRefused(_) => {
                    rules.authenticated(&self.relay);
                    self.take_in(incoming).await?;
                }
                other => self.take_in(other).await?,
            }
        }
        Ok(self.on_disk(move |profile, relay| profile.uploaded(relay, &answers)).await?)
    }

    /// What comes next, or nothing when a pause is over. Without a pause, an answer is owed.
    async fn next_or_pause(&mut self, until_ms: Option<u64>) -> Result<Option<Incoming>, SessionError> {
        let Some(until_ms) = until_ms else {
            return Ok(Some(self.next_within().await?));
        };
        let wait = until_ms.saturating_sub(self.profile.world().now_ms());
        let waited = tokio::time::timeout(std::time::Duration::from_millis(wait), self.link.next()).await;
        Ok(waited.ok().transpose()?)
    }
}

impl Party for Session {
    type Error = SessionError;
    type Set = Vec<Item>;

    fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    async fn next(&mut self) -> Result<Incoming, SessionError> {
        self.next_within().await
    }

    async fn take_in(&mut self, incoming: Incoming) -> Result<(), SessionError> {
        self.take_or_settle(incoming).await
    }

    fn direction(&self) -> Direction {
        Direction::Both
    }

    fn now_secs(&self) -> u64 {
        self.profile.now_secs()
    }

    async fn set(&mut self, filter: &Filter) -> Result<Option<Vec<Item>>, SessionError> {
        // What has come meanwhile counts as had.
        self.settle().await?;
        let filter = filter.clone();
        Ok(Some(self.on_disk(move |profile, relay| profile.items_for(relay, &filter)).await?))
    }

    async fn lacking(&mut self, ids: Vec<EventId>) -> Result<Vec<EventId>, SessionError> {
        Ok(self.on_disk(move |profile, relay| profile.wanted_from(relay, ids)).await?)
    }

    async fn keep(&mut self, events: Vec<Event>, _came: Came) -> Result<(), SessionError> {
        self.moved += self.on_disk(move |profile, relay| profile.take_from(relay, events)).await?;
        Ok(())
    }

    fn never_came(&mut self, _ids: Vec<EventId>) {}

    /// Uploaded when everything is fetched, each once although the scopes overlap.
    async fn give(&mut self, have: Vec<Item>) -> Result<(), SessionError> {
        self.lacking.extend(have);
        Ok(())
    }

    /// What cannot be read now is looked for again at the next catch-up; what can be had is not held up by it.
    fn incomplete(&mut self, what: &'static str) -> Result<(), SessionError> {
        tracing::warn!(relay = %self.relay, "the relay cannot give all of it: {what}");
        Ok(())
    }

    fn refused(reason: String) -> SessionError {
        SessionError::Refused(reason)
    }

    fn unreadable(never: std::convert::Infallible) -> SessionError {
        match never {}
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
