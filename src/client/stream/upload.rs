//! Giving the other relay what it lacks, and going on with what is new on either side.

use std::collections::{HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Stream, StreamError};
use crate::client::level::{self, LIVE, Party};
use crate::client::link::{Auth, Incoming};
use crate::protocol::item::Item;
use crate::protocol::relay_message::{RelayMessage, prefix};
use crate::protocol::{Event, EventId, message};
use crate::relay::outbox::{Outbox, Outgoing, Taken};

/// Events that are read from the store and sent before the next are read.
const UPLOAD_EVENTS: usize = 256;
/// Events that wait for the other relay's answer.
const UNANSWERED_MAX: usize = 64;
/// How often an event is sent again that was refused for coming too fast.
const RETRIES_MAX: u32 = 5;
/// The wait before the first of these; it doubles.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of new events that are taken from this relay in one go.
const LIVE_BYTES: usize = 256 * 1024;
/// After so much time both sides are compared again although nothing broke: events that were refused for want of room may
/// be welcome by now, and what a relay deletes it does not tell.
const LEVEL_EVERY: Duration = Duration::from_secs(60 * 60);

/// Events on their way to the other relay.
#[derive(Default)]
struct Sending {
    waiting: VecDeque<(EventId, String, u32)>,
    unanswered: HashMap<EventId, (String, u32)>,
    /// Refused until the keys are proven.
    unproven: Vec<(EventId, String, u32)>,
}

impl Sending {
    fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.unanswered.is_empty()
    }
}

/// What an answer to an event means for it.
#[derive(Debug, PartialEq, Eq)]
enum Answered {
    Taken,
    /// It has it already, or something that is as good.
    Known,
    Unwanted,
    /// Later.
    Again,
    /// Once the keys are proven.
    Unproven,
}

fn read_answer(accepted: bool, text: &str, retries: u32) -> Answered {
    match prefix(text) {
        "duplicate" if accepted => Answered::Known,
        _ if accepted => Answered::Taken,
        "rate-limited" | "error" if retries < RETRIES_MAX => Answered::Again,
        "auth-required" => Answered::Unproven,
        _ => Answered::Unwanted,
    }
}

impl Stream {
    /// Gives the other relay what it lacks, oldest first.
    pub(super) async fn upload(&mut self, mut have: Vec<Item>) -> Result<(), StreamError> {
        have.retain(|item| !self.memory.unwanted.contains(&item.id) && !self.memory.recent.contains(&item.id));
        have.sort_unstable();
        for part in have.chunks(UPLOAD_EVENTS) {
            let rows = self.side.events(part.iter().map(|item| item.id).collect()).await?;
            let mut sending = Sending::default();
            for row in rows {
                let json = String::from_utf8_lossy(&row.json).into_owned();
                // What must stay here is left out for as long as this stream runs.
                match Event::from_json(&json) {
                    Ok(event) if self.side.may_leave(&event) => sending.waiting.push_back((row.id, json, 0)),
                    _ => self.memory.unwanted(row.id),
                }
            }
            let offered = sending.waiting.len() as u64;
            self.note(|moved| moved.offered += offered);
            self.send_all(sending).await?;
        }
        Ok(())
    }

    async fn send_all(&mut self, mut sending: Sending) -> Result<(), StreamError> {
        while !sending.is_done() {
            self.send_waiting(&mut sending).await?;
            match self.next().await? {
                Incoming::Message(RelayMessage::Ok { id, accepted, text }) => {
                    self.answered(&mut sending, &id, accepted, &text).await?;
                }
                Incoming::Authenticated => sending.waiting.extend(sending.unproven.drain(..)),
                other => self.take_in(other).await?,
            }
        }
        for (id, ..) in sending.unproven {
            self.refused(id);
        }
        Ok(())
    }

    async fn send_waiting(&mut self, sending: &mut Sending) -> Result<(), StreamError> {
        while sending.unanswered.len() < UNANSWERED_MAX
            && let Some((id, json, retries)) = sending.waiting.pop_front()
        {
            self.link.send(message::publish(&json)).await?;
            sending.unanswered.insert(id, (json, retries));
        }
        Ok(())
    }

    async fn answered(
        &mut self,
        sending: &mut Sending,
        id: &EventId,
        accepted: bool,
        text: &str,
    ) -> Result<(), StreamError> {
        let Some((json, retries)) = sending.unanswered.remove(id) else { return Ok(()) };
        match read_answer(accepted, text, retries) {
            Answered::Taken => self.note(|moved| moved.sent += 1),
            Answered::Known => {
                // It has the event and does not show it, so it would be found lacking in every comparison.
                self.memory.unwanted(*id);
                self.note(|moved| moved.offered = moved.offered.saturating_sub(1));
            }
            Answered::Again => {
                tokio::time::sleep(RETRY_PAUSE * 2_u32.pow(retries)).await;
                sending.waiting.push_back((*id, json, retries + 1));
            }
            Answered::Unproven if *self.link.auth() == Auth::NotAsked => sending.unproven.push((*id, json, retries)),
            // The proof went out while the refusal was on its way.
            Answered::Unproven if *self.link.auth() == Auth::Proven && retries == 0 => {
                sending.waiting.push_back((*id, json, 1));
            }
            Answered::Unproven | Answered::Unwanted => {
                tracing::debug!(relay = %self.link.url(), %id, text, "the relay does not take an event");
                self.refused(*id);
            }
        }
        Ok(())
    }

    fn refused(&mut self, id: EventId) {
        self.memory.unwanted(id);
        self.note(|moved| moved.unwanted += 1);
    }

    /// Makes both sides equal, tells so by `levelled`, and goes on with what is new until the link ends.
    ///
    /// # Errors
    /// Always, in the end: [`StreamError`].
    pub async fn follow(&mut self, levelled: impl FnOnce()) -> Result<Infallible, StreamError> {
        let new_here = self.scope.direction.is_up().then(|| self.side.listen(&self.scope.filters));
        let ended = self.follow_until_it_ends(new_here.as_ref(), levelled).await;
        if let Some(outbox) = new_here {
            self.side.unlisten(&outbox);
        }
        ended
    }

    async fn follow_until_it_ends(
        &mut self,
        new_here: Option<&Arc<Outbox>>,
        levelled: impl FnOnce(),
    ) -> Result<Infallible, StreamError> {
        // First, so that nothing is missed between the comparison and what follows.
        if self.scope.direction.is_down() {
            level::listen(self, &self.scope.filters.clone()).await?;
        }
        self.level().await?;
        levelled();
        let mut level_at = Instant::now() + LEVEL_EVERY;
        let mut unanswered = HashSet::new();
        loop {
            tokio::select! {
                incoming = self.link.next() => {
                    self.follow_incoming(incoming?, &mut unanswered).await?;
                }
                batch = taken(new_here) => self.send_new(batch?, &mut unanswered).await?,
                () = tokio::time::sleep_until(level_at) => {
                    self.level().await?;
                    level_at = Instant::now() + LEVEL_EVERY;
                }
            }
        }
    }

    /// What the other relay says, and whatever has come with it.
    async fn follow_incoming(&mut self, first: Incoming, unanswered: &mut HashSet<EventId>) -> Result<(), StreamError> {
        let mut next = Some(first);
        while let Some(incoming) = next {
            match incoming {
                Incoming::Message(RelayMessage::Ok { id, accepted, text }) => {
                    if unanswered.remove(&id) {
                        self.note(|moved| match read_answer(accepted, &text, RETRIES_MAX) {
                            Answered::Taken => moved.sent += 1,
                            Answered::Known => moved.offered = moved.offered.saturating_sub(1),
                            _ => moved.unwanted += 1,
                        });
                    }
                }
                Incoming::Message(RelayMessage::Closed { id, text }) if id == LIVE => {
                    return Err(StreamError::Refused(text));
                }
                other => self.take_in(other).await?,
            }
            next = self.link.ready();
        }
        self.take_arrived().await
    }

    /// What has become new here, but for what came from the other relay.
    async fn send_new(&mut self, batch: Vec<Outgoing>, unanswered: &mut HashSet<EventId>) -> Result<(), StreamError> {
        for outgoing in batch {
            let Outgoing::Live { event: live, .. } = outgoing else { continue };
            let Some(event) = std::str::from_utf8(&live.json).ok().and_then(|json| Event::from_json(json).ok()) else {
                continue;
            };
            let goes = !self.memory.recent.contains(&event.id) && self.side.may_leave(&event);
            if goes {
                self.note(|moved| moved.offered += 1);
                if unanswered.len() >= super::RECENT_MAX {
                    return Err(StreamError::Behind);
                }
                unanswered.insert(event.id);
                self.link.send(message::publish(&String::from_utf8_lossy(&live.json))).await?;
            }
        }
        Ok(())
    }
}

/// What has become new here; never, where nobody listens.
async fn taken(outbox: Option<&Arc<Outbox>>) -> Result<Vec<Outgoing>, StreamError> {
    let Some(outbox) = outbox else { return std::future::pending().await };
    let mut batch = Vec::new();
    match poll_fn(|cx| outbox.poll_take(cx, LIVE_BYTES, &mut batch)).await {
        Taken::Some => Ok(batch),
        Taken::Overflow => Err(StreamError::Behind),
        Taken::Stop | Taken::Expelled => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A duplicate moves nothing, haste is waited out for a while, and what the relay does not want it is not asked
    /// again.
    #[test]
    fn t27_answers_are_read_by_their_prefix() {
        for (accepted, text, retries, expected) in [
            (true, "", 0, Answered::Taken),
            (true, "duplicate: already have this event", 0, Answered::Known),
            (false, "rate-limited: slow down", 0, Answered::Again),
            (false, "rate-limited: slow down", RETRIES_MAX, Answered::Unwanted),
            (false, "error: the disk is full", 0, Answered::Again),
            (false, "auth-required: who are you", 0, Answered::Unproven),
            (false, "replaced: have newer event", 0, Answered::Unwanted),
            (false, "no prefix at all", 0, Answered::Unwanted),
        ] {
            assert_eq!(read_answer(accepted, text, retries), expected, "{text}");
        }
    }
}
