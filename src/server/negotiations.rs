//! The open reconciliations of one client (NIP-77), without a socket. Their ids are apart from those of subscriptions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::frames::Frames;
use crate::protocol::message;
use crate::protocol::{Filter, SubscriptionId};
use crate::relay::negotiation::{Ending, Negotiated, Negotiation, Opening};
use crate::relay::outbox::Serial;

/// What a client's message calls for.
#[derive(Debug)]
pub enum Call {
    /// Tell the client that this reconciliation is over, or never began.
    Refuse(String),
    /// Begin one.
    Open(Opening),
    /// Have the message answered that this one has received.
    GoOn(Box<Negotiation>),
}

/// The reconciliations of one connection.
pub struct Negotiations {
    open: Vec<Open>,
    sessions_max: usize,
    idle_max: Duration,
}

struct Open {
    serial: Serial,
    id: SubscriptionId,
    state: State,
}

enum State {
    /// The relay owes an answer; the flag tells it when nobody waits for that any more.
    Answering(Arc<AtomicBool>),
    /// The client's next message is due.
    Waiting { since: Instant, negotiation: Box<Negotiation> },
}

impl Negotiations {
    /// None yet, and never more than this.
    pub fn new(sessions_max: usize, idle_max: Duration) -> Self {
        Negotiations { open: Vec::new(), sessions_max, idle_max }
    }

    /// Begins a reconciliation; one of the same id ends.
    pub fn open(&mut self, serial: Serial, id: SubscriptionId, filter: Filter, message: Vec<u8>) -> Call {
        self.close(&id);
        if self.open.len() >= self.sessions_max {
            let text = format!("error: at most {} reconciliations may be open", self.sessions_max);
            return Call::Refuse(message::neg_err(&id, &text, None));
        }
        let abandoned = Arc::new(AtomicBool::new(false));
        self.open.push(Open { serial, id, state: State::Answering(abandoned.clone()) });
        Call::Open(Opening { serial, filter, message, abandoned })
    }

    /// Goes on with a reconciliation. A message that comes before the last one is answered ends it: sides take turns.
    pub fn receive(&mut self, id: &SubscriptionId, message: Vec<u8>) -> Call {
        let Some(open) = self.open.iter_mut().find(|open| open.id == *id) else {
            return Call::Refuse(message::neg_err(id, "closed: no such reconciliation is open", None));
        };
        let answering = State::Answering(Arc::default());
        match std::mem::replace(&mut open.state, answering) {
            State::Waiting { mut negotiation, .. } => {
                open.state = State::Answering(negotiation.receive(message));
                Call::GoOn(negotiation)
            }
            State::Answering(abandoned) => {
                open.state = State::Answering(abandoned);
                self.close(id);
                Call::Refuse(message::neg_err(id, "invalid: the last message is not answered yet", None))
            }
        }
    }

    /// Ends a reconciliation, and what is under way for it; an unknown one is passed over.
    pub fn close(&mut self, id: &SubscriptionId) {
        if let Some(at) = self.open.iter().position(|open| open.id == *id)
            && let State::Answering(abandoned) = self.open.swap_remove(at).state
        {
            abandoned.store(true, Ordering::Relaxed);
        }
    }

    /// Frames an answer of the relay. One that nobody waits for any more goes nowhere.
    pub fn answered(&mut self, negotiated: Negotiated, now: Instant, frames: &mut Frames) {
        let Some(at) = self.open.iter().position(|open| open.serial == negotiated.serial) else { return };
        let open = &mut self.open[at];
        match negotiated.end {
            Ending::Answer(negotiation, message) => {
                frames.text(&message::neg_msg(&open.id, &message));
                open.state = State::Waiting { since: now, negotiation };
            }
            Ending::Over { text, records_max } => {
                frames.text(&message::neg_err(&open.id, &text, records_max));
                self.open.swap_remove(at);
            }
        }
    }

    /// Ends those whose clients have been silent for too long.
    pub fn expire(&mut self, now: Instant, frames: &mut Frames) {
        let idle_max = self.idle_max;
        self.open.retain(|open| {
            let is_over = open.deadline(idle_max).is_some_and(|deadline| deadline <= now);
            if is_over {
                let text = format!("closed: nothing came for {} s", idle_max.as_secs());
                frames.text(&message::neg_err(&open.id, &text, None));
            }
            !is_over
        });
    }

    /// When [`Negotiations::expire`] is next to be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.open.iter().filter_map(|open| open.deadline(self.idle_max)).min()
    }

    /// Ends all, and what is under way for them.
    pub fn close_all(&mut self) {
        for open in self.open.drain(..) {
            if let State::Answering(abandoned) = open.state {
                abandoned.store(true, Ordering::Relaxed);
            }
        }
    }
}

impl Open {
    fn deadline(&self, idle_max: Duration) -> Option<Instant> {
        match &self.state {
            State::Waiting { since, .. } => Some(*since + idle_max),
            State::Answering(_) => None,
        }
    }
}
