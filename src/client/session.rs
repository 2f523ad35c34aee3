//! One link at work: catching up, sending what is owed, taking what comes.
//!
//! In: an open link and the profile. Out: a profile that has what the relay has and the other way round, until the link
//! is over. Everything that blocks on the disk runs on threads that may wait. Never opens a link by itself.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{RwLock, watch};

use super::carry::{Carry, Due};
use super::level::LIVE;
use super::link::{Auth, Incoming, Link, LinkError};
use super::profile::{Answer, Arrival, Profile};
use super::status::{LinkState, RelayStatus};
use crate::protocol::item::Item;
use crate::protocol::relay_message::{RelayMessage, prefix};
use crate::protocol::{Event, EventId, Filter, message};
use crate::store::{StoreError, fault};
use crate::sync::outbox::answer::judge;
use crate::sync::outbox::{Consequence, RelayUrl};

/// Messages that are taken in before the disk is asked once for all of them.
const BATCH_MAX: usize = 256;
/// Events that a link remembers as offered; forgetting them costs a `duplicate:` each.
const OFFERED_MAX: usize = 100_000;

/// A relay sends back every event of ours that a subscription asks for. Of so many the echo costs more than to ask anew, once
/// they are there, what has come meanwhile.
const BACKLOG_MIN: usize = 128;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The link is over.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The relay does not let us read, and proving the keys did not help.
    #[error("refuses to be read: {0}")]
    Refused(String),
}

/// How long a session goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stay {
    /// Until nothing differs and nothing is owed.
    UntilSettled,
    /// Until the link is over.
    Forever,
}

/// How a session ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Nothing differs and nothing is owed.
    Settled,
    /// It was told to stop.
    Stopped,
}

/// A link at work.
pub struct Session {
    pub(super) link: Link,
    pub(super) relay: RelayUrl,
    pub(super) profile: Arc<Profile>,
    pub(super) scopes: Vec<Filter>,
    pub(super) answer_timeout: Duration,
    /// Held for reading by whatever blocks on the disk.
    disk: Arc<RwLock<()>>,
    /// Events that came and are not yet in the cache.
    arrived: Vec<Event>,
    answers: Vec<Answer>,
    /// What the relay lacks, as found so far.
    pub(super) lacking: BTreeSet<Item>,
    /// Events that the relay has judged over this link, taken or not: they are not offered again.
    pub(super) offered: HashSet<EventId>,
    /// Events that came and were new, or were uploaded and taken.
    pub(super) moved: usize,
    /// So much is owed that it goes out first, before the relay is asked for what is new from now on.
    pub(super) has_backlog: bool,
    /// What was asked before the keys were proven must be asked again; or more has come of other relays than is
    /// remembered.
    again: bool,
    /// What other relays gave.
    carry: Carry,
    /// Why the subscription for what is new was ended by the relay.
    live_closed: Option<String>,
    /// Tells when something new is owed.
    owed: watch::Receiver<u64>,
    /// Something may go out: it is owed, or an answer has made room for it.
    pump_due: bool,
    /// When the outbox is to be asked again, milliseconds since 1970.
    pump_at_ms: Option<u64>,
}

impl Session {
    /// Takes over a link that has just come up.
    pub fn new(link: Link, relay: RelayUrl, profile: Arc<Profile>, answer_timeout: Duration) -> Session {
        let scopes = profile.routing().scopes(&relay, profile.keys().pubkey());
        // Before anything is looked at: what is owed meanwhile must be seen.
        let owed = profile.owed();
        let carry = profile.carry(&relay);
        let has_backlog = !scopes.is_empty() && profile.owed_to(&relay) > BACKLOG_MIN;
        Session {
            link,
            relay,
            profile,
            scopes,
            answer_timeout,
            disk: Arc::default(),
            arrived: Vec::new(),
            answers: Vec::new(),
            lacking: BTreeSet::new(),
            offered: HashSet::new(),
            moved: 0,
            has_backlog,
            again: false,
            carry,
            live_closed: None,
            owed,
            pump_due: true,
            pump_at_ms: None,
        }
    }

    /// Works until `stop` turns true, or as long as `stay` says. The link is closed afterwards.
    ///
    /// # Errors
    /// [`SessionError`]: what went wrong. What was achieved until then stays.
    pub async fn run(mut self, stay: Stay, mut stop: watch::Receiver<bool>) -> Result<Ended, SessionError> {
        let arrival = Arrival {
            proven: *self.link.auth() != Auth::NotAsked,
            clock_offset_ms: self.link.clock_offset_ms(),
            slots: self.link.about().slots,
        };
        let begun = self.on_disk(move |profile, relay| {
            profile.tell(relay, |status| {
                *status = RelayStatus { link: LinkState::CatchingUp, ..RelayStatus::default() };
            });
            profile.link_up(relay, arrival)
        });
        let ended = match begun.await {
            Err(error) => Err(error.into()),
            Ok(()) => tokio::select! {
                ended = self.work(stay) => ended.map(|()| Ended::Settled),
                _ = stop.wait_for(|stop| *stop) => Ok(Ended::Stopped),
            },
        };
        // What was broken off may be at work on the disk still.
        drop(self.disk.write().await);
        let settled = self.settle().await;
        let trouble = ended.as_ref().err().map(ToString::to_string).unwrap_or_default();
        self.on_disk(move |profile, relay| {
            profile.link_down(relay);
            profile.tell(relay, |status| (status.link, status.trouble) = (LinkState::Down, trouble));
        })
        .await;
        self.link.close().await;
        settled.and(ended)
    }

    async fn work(&mut self, stay: Stay) -> Result<(), SessionError> {
        self.catch_up().await?;
        loop {
            if self.again {
                self.catch_up().await?;
                continue;
            }
            self.pump_due = true;
            self.pump().await?;
            if self.has_backlog && !self.is_backlog_going_out() {
                self.has_backlog = false;
                self.catch_up().await?;
                continue;
            }
            if stay == Stay::UntilSettled && self.profile.owed_to(&self.relay) == 0 {
                return Ok(());
            }
            let pause = self.pause().min(self.answer_timeout);
            tokio::select! {
                incoming = self.link.next() => {
                    self.take(incoming?);
                    self.take_ready();
                    self.settle().await?;
                }
                due = self.carry.due() => match due {
                    Due::Items(items) => {
                        self.lacking.extend(items);
                        self.upload().await?;
                    }
                    Due::TooMany => self.again = true,
                },
                _ = self.owed.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
            self.reopen_if_closed().await?;
        }
    }

    /// As soon as it has to wait for anything but answers, what is new is no longer waited for.
    fn is_backlog_going_out(&self) -> bool {
        self.pump_at_ms.is_none() && self.profile.owed_to(&self.relay) > BACKLOG_MIN
    }

    /// Something may go out that could not before.
    pub(super) fn is_due(&mut self) {
        self.pump_due = true;
    }

    /// Until the outbox is to be asked again.
    fn pause(&self) -> Duration {
        let now_ms = self.profile.world().now_ms();
        self.pump_at_ms.map_or(Duration::MAX, |at_ms| Duration::from_millis(at_ms.saturating_sub(now_ms)))
    }

    /// What comes next, within the time for an answer. Meanwhile goes out what is owed and may: also a long fetch does not
    /// hold up what needs no knowledge of it.
    pub(super) async fn next_within(&mut self) -> Result<Incoming, SessionError> {
        let overdue = tokio::time::Instant::now() + self.answer_timeout;
        loop {
            if let Some(incoming) = self.link.ready() {
                return Ok(incoming);
            }
            self.pump().await?;
            let pause = self.pause();
            tokio::select! {
                incoming = self.link.next() => return Ok(incoming?),
                _ = self.owed.changed() => self.pump_due = true,
                () = tokio::time::sleep(pause) => self.pump_due = true,
                () = tokio::time::sleep_until(overdue) => return Err(LinkError::Silent.into()),
            }
        }
    }

    /// Sends what may go out now, where something has changed since it was last asked for. Nothing before what was asked
    /// without a proof of the keys is asked anew: the relay has hidden something.
    async fn pump(&mut self) -> Result<(), SessionError> {
        if self.again || !std::mem::take(&mut self.pump_due) {
            return Ok(());
        }
        self.settle().await?;
        let answer_ms = u64::try_from(self.answer_timeout.as_millis()).unwrap_or(u64::MAX);
        loop {
            self.owed.mark_unchanged();
            let steps = self.on_disk(move |profile, relay| profile.steps(relay, answer_ms)).await?;
            for event in &steps.events {
                self.link.send(message::publish(event)).await?;
                fault::point("outbox.sent");
            }
            if steps.events.is_empty() {
                self.pump_at_ms = steps.wait_until_ms;
                return Ok(());
            }
        }
    }

    /// Takes in what came, without waiting for the disk.
    pub(super) fn take(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Message(RelayMessage::Event { id, event }) if id == LIVE => {
                if self.scopes.iter().any(|scope| scope.matches(&*event)) {
                    // What it gives it need not be given.
                    self.was_offered(event.id);
                    self.arrived.push(*event);
                }
            }
            Incoming::Message(RelayMessage::Ok { id, accepted, text }) => {
                if matches!(judge(accepted, &text), Consequence::Settle(_) | Consequence::Bury) {
                    self.was_offered(id);
                }
                self.answers.push(Answer { id, accepted, text });
                self.pump_due = true;
            }
            Incoming::Message(RelayMessage::Closed { id, text }) if id == LIVE => self.live_closed = Some(text),
            Incoming::Message(RelayMessage::Notice(text)) => tracing::debug!(relay = %self.relay, text, "notice"),
            Incoming::Message(_) => {}
            Incoming::Authenticated => {
                self.again = true;
                self.profile.authenticated(&self.relay);
            }
            Incoming::AuthRefused(reason) => {
                tracing::warn!(relay = %self.relay, reason, "the relay did not take our proof");
                self.pump_due = true;
                self.profile.authenticated(&self.relay);
            }
        }
    }

    /// Whatever the next comparison says, the relay has judged this event.
    pub(super) fn was_offered(&mut self, id: EventId) {
        if self.offered.len() >= OFFERED_MAX {
            self.offered.clear();
        }
        self.offered.insert(id);
    }

    /// As [`Session::take`], and to the disk where much has come.
    pub(super) async fn take_or_settle(&mut self, incoming: Incoming) -> Result<(), SessionError> {
        self.take(incoming);
        if self.arrived.len() + self.answers.len() >= BATCH_MAX { self.settle().await } else { Ok(()) }
    }

    /// Takes in what else has come already, up to a batch.
    pub(super) fn take_ready(&mut self) {
        while self.arrived.len() + self.answers.len() < BATCH_MAX
            && let Some(incoming) = self.link.ready()
        {
            self.take(incoming);
        }
    }

    /// Brings what was taken in to the disk.
    pub(super) async fn settle(&mut self) -> Result<(), SessionError> {
        let (arrived, answers) = (std::mem::take(&mut self.arrived), std::mem::take(&mut self.answers));
        if arrived.is_empty() && answers.is_empty() {
            return Ok(());
        }
        self.on_disk(move |profile, relay| {
            if !answers.is_empty() {
                profile.answered(relay, &answers)?;
            }
            profile.take_from(relay, arrived)
        })
        .await?;
        Ok(())
    }

    /// What was asked before the keys were proven is asked anew.
    pub(super) fn starts_over(&mut self) {
        (self.again, self.live_closed) = (false, None);
        self.lacking.clear();
    }

    /// A relay that ends the subscription for what is new wants a proof, or has no room; both pass.
    async fn reopen_if_closed(&mut self) -> Result<(), SessionError> {
        let Some(reason) = self.live_closed.take() else { return Ok(()) };
        match (prefix(&reason), self.link.auth()) {
            // The proof is under way; with it everything is asked anew.
            ("auth-required", Auth::NotAsked) => Ok(()),
            _ => Err(SessionError::Refused(reason)),
        }
    }

    /// Whether the keys were proven since the last catch-up began.
    pub(super) fn must_start_over(&self) -> bool {
        self.again
    }

    /// Runs what blocks on a thread that may wait.
    pub(super) async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Profile, &RelayUrl) -> T + Send + 'static,
    ) -> T {
        let (profile, relay) = (Arc::clone(&self.profile), self.relay.clone());
        let at_work = Arc::clone(&self.disk).read_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let done = work(&profile, &relay);
            // Before whoever waits for the end of it may go on.
            drop(profile);
            drop(at_work);
            done
        });
        let done = done.await;
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}
