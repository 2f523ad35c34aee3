//! How the relay behaves towards one client, without a socket: what a message calls for, and what goes back.
//!
//! Keeps the subscriptions of the connection and what is under way for it. Starts nothing itself: a message becomes an
//! [`Action`] for `connection` to carry out, answers become frames.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::time::Instant;

use super::frames::Frames;
use super::negotiations::{Call, Negotiations};
use crate::auth::{Authority, Gate, Session};
use crate::config::{Config, Limits};
use crate::protocol::message::{self, ClientMessage, EoseHint, Refusal};
use crate::protocol::{Event, Filter, SubscriptionId, Visibility};
use crate::relay::ingest::{Sender, Source};
use crate::relay::negotiation::Negotiated;
use crate::relay::outbox::{LiveEvent, Serial};
use crate::relay::query::{Job, Page, PageEnd};

/// What a client's message calls for.
#[derive(Debug)]
pub enum Action {
    /// Nothing, or nothing yet.
    Nothing,
    /// Send this. A subscription that a refused REQ would have replaced has ended: the client reads `CLOSED`.
    Answer {
        /// The message.
        text: String,
        /// The subscription that has ended.
        ended: Option<Serial>,
    },
    /// Take the event in; [`Peer::answered`] once its `OK` is sent.
    Publish(Box<Event>),
    /// Let [`Peer::authenticate`] judge this `AUTH` event.
    Authenticate(Box<Event>),
    /// Open a subscription.
    Subscribe {
        /// Its number.
        serial: Serial,
        /// What it asks for.
        filters: Vec<Filter>,
        /// The subscription of the same id that it replaces.
        replaced: Option<Serial>,
    },
    /// Count.
    Count {
        /// Number of this question.
        serial: Serial,
        /// What it asks for.
        filters: Vec<Filter>,
    },
    /// End this subscription.
    Unsubscribe(Serial),
    /// Reconcile.
    Negotiate(Call),
}

/// What remains to be done after a page was framed.
#[derive(Debug, Default)]
pub struct AfterPage {
    /// The rest of the query, to be handed back once the page is written.
    pub rest: Option<Job>,
    /// A subscription that has ended by an error.
    pub ended: Option<Serial>,
}

/// Live events held back for catching-up subscriptions exceed their bound: the client reads too slowly.
#[derive(Debug, PartialEq, Eq)]
pub struct TooSlow;

/// One client, as the relay knows it.
pub struct Peer {
    config: Arc<Config>,
    gate: Arc<Gate>,
    session: Session,
    /// Ascending serials.
    subscriptions: Vec<Subscription>,
    /// Questions that wait for their answer; they take no subscription's place.
    counts: Vec<(Serial, SubscriptionId)>,
    next_serial: Serial,
    /// EVENTs that wait for their `OK`.
    unanswered: usize,
    /// Queries that wait for or have the attention of a query thread, abandoned ones included.
    queries: usize,
    /// A message that must not be acted upon before all EVENTs before it are answered.
    held: Option<ClientMessage>,
    held_live_bytes: usize,
    negotiations: Negotiations,
}

struct Subscription {
    serial: Serial,
    id: SubscriptionId,
    prefix: Box<str>,
    /// List items in its filters.
    values: usize,
    /// Live events that came before the stored ones were all sent; `None` once they were.
    catching_up: Option<Vec<Arc<LiveEvent>>>,
}

impl Peer {
    /// A client that has just connected.
    pub fn new(config: Arc<Config>, gate: Arc<Gate>, session: Session) -> Self {
        let negotiations = Negotiations::new(config.sync.sessions_max, config.sync.session_idle());
        Peer {
            negotiations,
            config,
            gate,
            session,
            subscriptions: Vec::new(),
            counts: Vec::new(),
            next_serial: 0,
            unanswered: 0,
            queries: 0,
            held: None,
            held_live_bytes: 0,
        }
    }

    /// The first message: the challenge that the client may sign at any time (NIP-42).
    pub fn greeting(&self) -> String {
        message::auth(&self.session.challenge().text())
    }

    /// What is known of the client as a sender of events, given its address.
    pub fn sender(&self, ip: IpAddr) -> Sender {
        let source = if self.session.is_operator() { Source::Operator } else { Source::Client };
        Sender { source, ..Sender::client(ip, self.session.keys().clone()) }
    }

    /// What the client may see.
    pub fn visible(&self) -> Visibility {
        self.gate.visible_to(&self.session)
    }

    /// Judges an `AUTH` event: the `OK` for it, and whether the client may see more now. `own` is the relay's public
    /// name, `now` is in seconds since 1970.
    pub fn authenticate(&mut self, event: Event, own: Option<&Authority>, now: u64) -> (String, bool) {
        let (id, keys_before) = (event.id, self.session.keys().len());
        let answer = match self.session.authenticate(event, own, now) {
            Ok(()) => message::ok(&id, true, ""),
            Err(error) => message::ok(&id, false, &error.to_string()),
        };
        (answer, self.session.keys().len() > keys_before)
    }

    fn limits(&self) -> &Limits {
        &self.config.limits
    }

    /// Whether the next message may be read. What is accepted here must be finished, so this bounds what a client can
    /// have under way.
    pub fn wants_input(&self) -> bool {
        self.held.is_none()
            && self.unanswered < self.limits().events_in_flight_max
            && self.queries < self.limits().subscriptions_max
    }

    /// Whether every EVENT was answered.
    pub fn is_settled(&self) -> bool {
        self.unanswered == 0
    }

    /// The open subscriptions.
    pub fn serials(&self) -> impl Iterator<Item = Serial> + '_ {
        self.subscriptions.iter().map(|subscription| subscription.serial)
    }

    /// Acts on a text message.
    #[cfg(test)]
    pub fn receive(&mut self, text: &str) -> Action {
        self.handle(ClientMessage::parse(text))
    }

    /// Acts on a message, or answers what is wrong with it.
    pub fn handle(&mut self, message: Result<ClientMessage, Refusal>) -> Action {
        match message {
            Ok(message) => self.act(message),
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// The action of a message that was held back, when its time has come.
    pub fn take_held(&mut self) -> Option<Action> {
        if self.unanswered > 0 {
            return None;
        }
        self.held.take().map(|message| self.act(message))
    }

    /// One EVENT has its answer.
    pub fn answered(&mut self) {
        self.unanswered = self.unanswered.saturating_sub(1);
    }

    /// A query was handed back to the query threads.
    pub fn resumed(&mut self) {
        self.queries += 1;
    }

    fn act(&mut self, message: ClientMessage) -> Action {
        // The client's own events are seen by its next question: they are stored once they are answered (T25).
        let asks = matches!(message, ClientMessage::Req(..) | ClientMessage::Count(..) | ClientMessage::NegOpen(..));
        if self.unanswered > 0 && asks {
            self.held = Some(message);
            return Action::Nothing;
        }
        match message {
            ClientMessage::Event(event) => {
                self.unanswered += 1;
                Action::Publish(event)
            }
            ClientMessage::Req(id, filters) => self.subscribe(id, filters),
            ClientMessage::Count(id, filters) => self.count(id, filters),
            ClientMessage::Close(id) => self.close(&id).map_or(Action::Nothing, Action::Unsubscribe),
            ClientMessage::Auth(event) => Action::Authenticate(event),
            ClientMessage::NegOpen(id, filter, message) => self.negotiate_anew(id, filter, message),
            ClientMessage::NegMsg(id, message) => self.negotiate(|negotiations| negotiations.receive(&id, message)),
            ClientMessage::NegClose(id) => {
                self.negotiations.close(&id);
                Action::Nothing
            }
        }
    }

    fn negotiate_anew(&mut self, id: SubscriptionId, filter: Filter, message: Vec<u8>) -> Action {
        if let Some(problem) = self.filters_problem(std::slice::from_ref(&filter)) {
            self.negotiations.close(&id);
            return Action::Answer { text: message::neg_err(&id, &problem, None), ended: None };
        }
        let serial = self.take_serial();
        self.negotiate(|negotiations| negotiations.open(serial, id, filter, message))
    }

    fn negotiate(&mut self, act: impl FnOnce(&mut Negotiations) -> Call) -> Action {
        match act(&mut self.negotiations) {
            Call::Refuse(text) => Action::Answer { text, ended: None },
            call => {
                self.queries += 1;
                Action::Negotiate(call)
            }
        }
    }

    /// The open reconciliations.
    pub fn negotiations(&mut self) -> &mut Negotiations {
        &mut self.negotiations
    }

    /// Frames the answer to a message of a reconciliation.
    pub fn negotiated(&mut self, negotiated: Negotiated, now: Instant, frames: &mut Frames) {
        self.queries = self.queries.saturating_sub(1);
        self.negotiations.answered(negotiated, now, frames);
    }

    fn refuse(&mut self, refusal: Refusal) -> Action {
        let ended = match &refusal {
            Refusal::Closed { id, .. } => SubscriptionId::new(id).and_then(|id| self.close(&id)),
            Refusal::NegErr { id, .. } => {
                SubscriptionId::new(id).iter().for_each(|id| self.negotiations.close(id));
                None
            }
            Refusal::Ok { .. } | Refusal::Notice(_) => None,
        };
        Action::Answer { text: refusal.to_json(), ended }
    }

    fn subscribe(&mut self, id: SubscriptionId, filters: Vec<Filter>) -> Action {
        let replaced = self.close(&id);
        if let Some(problem) = self.subscription_problem(&filters) {
            return Action::Answer { text: message::closed(&id, &problem), ended: replaced };
        }
        let serial = self.take_serial();
        self.subscriptions.push(Subscription {
            serial,
            prefix: message::event_prefix(&id).into(),
            id,
            values: item_count(&filters),
            catching_up: Some(Vec::new()),
        });
        self.queries += 1;
        Action::Subscribe { serial, filters, replaced }
    }

    fn count(&mut self, id: SubscriptionId, filters: Vec<Filter>) -> Action {
        if let Some(problem) = self.filters_problem(&filters) {
            return Action::Answer { text: message::closed(&id, &problem), ended: None };
        }
        let serial = self.take_serial();
        self.counts.push((serial, id));
        self.queries += 1;
        Action::Count { serial, filters }
    }

    /// Forgets a subscription, and counts of that id: nothing more is sent under it.
    fn close(&mut self, id: &SubscriptionId) -> Option<Serial> {
        self.counts.retain(|(_, other)| other != id);
        let index = self.subscriptions.iter().position(|subscription| subscription.id == *id)?;
        Some(self.forget(index))
    }

    fn forget(&mut self, index: usize) -> Serial {
        let subscription = self.subscriptions.remove(index);
        self.held_live_bytes -= subscription.catching_up.iter().flatten().map(|event| event.json.len()).sum::<usize>();
        subscription.serial
    }

    fn take_serial(&mut self) -> Serial {
        self.next_serial += 1;
        self.next_serial
    }

    fn filters_problem(&self, filters: &[Filter]) -> Option<String> {
        let limits = self.limits();
        if filters.len() > limits.filters_max {
            return Some(format!("error: at most {} filters are accepted", limits.filters_max));
        }
        if item_count(filters) > limits.filter_values_max {
            return Some(format!("error: at most {} values in all filters are accepted", limits.filter_values_max));
        }
        self.gate.refuse(filters, &self.session, &self.config.access).map(str::to_owned)
    }

    fn subscription_problem(&self, filters: &[Filter]) -> Option<String> {
        let limits = self.limits();
        if self.subscriptions.len() >= limits.subscriptions_max {
            return Some(format!("error: at most {} subscriptions may be open", limits.subscriptions_max));
        }
        let values: usize = self.subscriptions.iter().map(|subscription| subscription.values).sum();
        if values + item_count(filters) > limits.subscription_values_max {
            let values_max = limits.subscription_values_max;
            return Some(format!("error: at most {values_max} values in all open subscriptions are accepted"));
        }
        self.filters_problem(filters)
    }

    fn find(&self, serial: Serial) -> Option<usize> {
        self.subscriptions.binary_search_by_key(&serial, |subscription| subscription.serial).ok()
    }

    /// Frames a live event, or holds it back while stored ones are still to come. A subscription that is gone gets
    /// nothing.
    ///
    /// # Errors
    /// [`TooSlow`]: the connection must be closed.
    pub fn live(&mut self, serial: Serial, event: Arc<LiveEvent>, frames: &mut Frames) -> Result<(), TooSlow> {
        let Some(index) = self.find(serial) else {
            return Ok(());
        };
        let subscription = &mut self.subscriptions[index];
        let Some(held) = &mut subscription.catching_up else {
            frames.live(&subscription.prefix, &event);
            return Ok(());
        };
        self.held_live_bytes += event.json.len();
        held.push(event);
        if self.held_live_bytes > self.config.limits.live_queue_bytes_max { Err(TooSlow) } else { Ok(()) }
    }

    /// Frames a page, and what follows it.
    pub fn page(&mut self, page: Page, frames: &mut Frames) -> AfterPage {
        self.queries = self.queries.saturating_sub(1);
        if let PageEnd::Count { count, approximate, hll } = page.end {
            let answer = |id: &SubscriptionId| message::count(id, count, approximate, hll.as_deref());
            self.counted(page.serial, &answer, frames);
            return AfterPage::default();
        }
        let Some(index) = self.find(page.serial) else {
            if let PageEnd::Failed(text) = page.end {
                self.counted(page.serial, &|id| message::closed(id, text), frames);
            }
            return AfterPage::default();
        };
        let prefix = &self.subscriptions[index].prefix;
        frames.reserve(page.rows.iter().map(|row| row.json.len() + prefix.len()).sum(), page.rows.len());
        page.rows.iter().for_each(|row| frames.event(prefix, &row.json));
        match page.end {
            PageEnd::More(job) => AfterPage { rest: Some(job), ended: None },
            PageEnd::Eose(hint) => {
                self.end_of_stored(index, hint, frames);
                AfterPage::default()
            }
            PageEnd::Failed(text) => {
                frames.text(&message::closed(&self.subscriptions[index].id, text));
                AfterPage { rest: None, ended: Some(self.forget(index)) }
            }
            PageEnd::Count { .. } => unreachable!("handled above"),
        }
    }

    fn end_of_stored(&mut self, index: usize, hint: EoseHint, frames: &mut Frames) {
        let subscription = &mut self.subscriptions[index];
        frames.text(&message::eose(&subscription.id, hint));
        for event in subscription.catching_up.take().into_iter().flatten() {
            self.held_live_bytes -= event.json.len();
            frames.live(&subscription.prefix, &event);
        }
    }

    fn counted(&mut self, serial: Serial, answer: &dyn Fn(&SubscriptionId) -> String, frames: &mut Frames) {
        if let Some(index) = self.counts.iter().position(|(asked, _)| *asked == serial) {
            let (_, id) = self.counts.swap_remove(index);
            frames.text(&answer(&id));
        }
    }
}

fn item_count(filters: &[Filter]) -> usize {
    filters.iter().map(Filter::item_count).sum()
}

#[cfg(test)]
mod tests;
