//! Reconciliation with a client (NIP-77): the query threads gather what a filter matches, then answer one message after
//! the other.
//!
//! A [`Negotiation`] is either with the query threads or with its connection, never with both: it travels with the
//! message to be answered and comes back with the answer ([`Negotiated`]). It works for one time slice, then others have
//! their turn. What it holds in memory is bounded for each and for all together ([`Budget`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::outbox::{Outbox, Outgoing, Serial};
use crate::config::Sync;
use crate::protocol::Filter;
use crate::protocol::item::{Item, Sum};
use crate::store::{Progress, Query, Scan, Store, StoreError, Summed};
use crate::sync::reconcile::{self, Bound, Exchange, Failure, Malformed, Set, Side, Step};

/// A filter that matches more gets sums at the store; fewer are as quickly listed.
const SUMMED_FROM_RECORDS: usize = 4_096;

/// How many events all negotiations together hold in memory.
#[derive(Debug)]
pub struct Budget {
    records_max: usize,
    taken: AtomicUsize,
}

impl Budget {
    /// Nothing is taken of `records_max`.
    pub fn new(records_max: usize) -> Arc<Self> {
        Arc::new(Budget { records_max, taken: AtomicUsize::new(0) })
    }
}

/// A share in the budget, given back when dropped.
struct Share {
    budget: Arc<Budget>,
    records: usize,
}

impl Share {
    /// Makes the share as large as this; false when there is no room for it.
    fn grow(&mut self, records: usize) -> bool {
        let more = records.saturating_sub(self.records);
        let taken = self.budget.taken.fetch_add(more, Ordering::Relaxed) + more;
        self.records += more;
        taken <= self.budget.records_max
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.taken.fetch_sub(self.records, Ordering::Relaxed);
    }
}

/// What a client asks to reconcile.
#[derive(Debug)]
pub struct Opening {
    /// Number of the negotiation within its connection.
    pub serial: Serial,
    /// What takes part.
    pub filter: Filter,
    /// The client's first message.
    pub message: Vec<u8>,
    /// Set when nobody waits for the answer any more.
    pub abandoned: Arc<AtomicBool>,
}

/// An open reconciliation.
pub struct Negotiation {
    serial: Serial,
    outbox: Arc<Outbox>,
    limits: Sync,
    records: Records,
    share: Share,
    /// The message to be answered, and from the first turn on what has come of it.
    message: Vec<u8>,
    exchange: Option<Exchange>,
    /// Running time for this message.
    worked: Duration,
    abandoned: Arc<AtomicBool>,
}

/// The events that take part.
enum Records {
    New(Query),
    Gathering {
        scan: Box<dyn Scan>,
        items: Vec<Item>,
        /// The question, until it was asked whether the store can keep sums for it.
        query: Option<Query>,
    },
    Listed(Vec<Item>),
    /// Compared by sums that the store keeps; each message may have something more to sum up first.
    Summed(Box<dyn Summed>),
}

/// How a message was answered.
#[derive(Debug)]
pub struct Negotiated {
    /// The negotiation.
    pub serial: Serial,
    /// The answer.
    pub end: Ending,
}

/// What the client is told.
#[derive(Debug)]
pub enum Ending {
    /// This message; the negotiation waits for the next one.
    Answer(Box<Negotiation>, Vec<u8>),
    /// The negotiation is over.
    Over {
        /// The text for `NEG-ERR`.
        text: String,
        /// How many events would have been accepted, where there were too many.
        records_max: Option<usize>,
    },
}

impl Negotiated {
    /// About how many bytes this puts on the wire.
    pub(super) fn bytes(&self) -> usize {
        match &self.end {
            Ending::Answer(_, message) => 2 * message.len(),
            Ending::Over { text, .. } => text.len(),
        }
    }
}

/// Why a message gets no answer.
enum Refused {
    /// More events than may take part.
    TooMany,
    /// Other negotiations hold as much as all may.
    NoRoom,
    /// It took too long.
    TooLong,
    /// It is no message.
    Malformed(Malformed),
    /// The store cannot be read.
    Store(StoreError),
    /// Nobody waits for it.
    Abandoned,
}

impl std::fmt::Debug for Negotiation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Negotiation")
            .field("serial", &self.serial)
            .field("worked", &self.worked)
            .finish_non_exhaustive()
    }
}

impl Negotiation {
    /// A negotiation with its first message, for the query threads.
    pub fn open(
        outbox: &Arc<Outbox>,
        opening: Opening,
        query: Query,
        limits: &Sync,
        budget: &Arc<Budget>,
    ) -> Box<Negotiation> {
        Box::new(Negotiation {
            serial: opening.serial,
            outbox: outbox.clone(),
            limits: limits.clone(),
            records: Records::New(query),
            share: Share { budget: budget.clone(), records: 0 },
            message: opening.message,
            exchange: None,
            worked: Duration::ZERO,
            abandoned: opening.abandoned,
        })
    }

    /// Gives it the next message, for the query threads. The flag is to be set when nobody waits for the answer.
    pub fn receive(&mut self, message: Vec<u8>) -> Arc<AtomicBool> {
        (self.message, self.exchange, self.worked) = (message, None, Duration::ZERO);
        self.abandoned.clone()
    }

    /// How the negotiation ends when working on it failed for a reason of ours.
    pub(super) fn failed(&self) -> impl FnOnce() + use<> {
        let (outbox, serial) = (self.outbox.clone(), self.serial);
        move || push_over(&outbox, serial, READ_ERROR.to_owned(), None)
    }

    /// Works for one time slice. What is given back needs further turns; else the connection has the answer.
    pub(super) fn turn(
        mut self: Box<Self>,
        store: &dyn Store,
        slice: Duration,
        time_max: Duration,
    ) -> Option<Box<Self>> {
        if self.outbox.is_closed() {
            return None;
        }
        let started = Instant::now();
        let worked = self.work(store, started + slice);
        self.worked += started.elapsed();
        self.outbox.add_query_time(started.elapsed());
        let refused = match worked {
            _ if self.abandoned.load(Ordering::Relaxed) => Refused::Abandoned,
            Ok(Step::More) if self.worked < time_max => return Some(self),
            Ok(Step::More) => Refused::TooLong,
            Ok(Step::Done) => {
                self.answer();
                return None;
            }
            Err(refused) => refused,
        };
        let (text, records_max) = self.told(&refused);
        let (outbox, serial) = (self.outbox.clone(), self.serial);
        // First its share in the budget: who is told to try again may do so at once.
        drop(self);
        push_over(&outbox, serial, text, records_max);
        None
    }

    fn work(&mut self, store: &dyn Store, until: Instant) -> Result<Step, Refused> {
        if self.exchange.is_none() {
            let exchange =
                Exchange::new(Side::Responder, std::mem::take(&mut self.message), self.limits.frame_bytes_max());
            self.exchange = Some(exchange.map_err(Refused::Malformed)?);
        }
        if self.prepare(store, until)? == Step::More {
            return Ok(Step::More);
        }
        let exchange = self.exchange.as_mut().expect("it was just made");
        match &mut self.records {
            Records::Listed(items) => exchange_until(exchange, items, until, |never| match never {}),
            Records::Summed(summed) => exchange_until(exchange, &mut BySums(&mut **summed), until, Refused::Store),
            Records::New(_) | Records::Gathering { .. } => unreachable!("preparing ends with one of the others"),
        }
    }

    /// Has the events that take part at hand, or their sums.
    fn prepare(&mut self, store: &dyn Store, until: Instant) -> Result<Step, Refused> {
        if let Records::New(query) = &self.records {
            let summed = store.summed(query, false).map_err(Refused::Store)?;
            self.records = match summed {
                Some(summed) => Records::Summed(summed),
                None => {
                    let scan = store.scan(query.clone()).map_err(Refused::Store)?;
                    Records::Gathering { scan, items: Vec::new(), query: Some(query.clone()) }
                }
            };
        }
        if let Records::Gathering { scan, items, query } = &mut self.records {
            let progress = scan.items(until, items).map_err(Refused::Store)?;
            let is_large = progress == Progress::Paused && items.len() >= SUMMED_FROM_RECORDS;
            let summed = match query.take_if(|_| is_large) {
                Some(query) => store.summed(&query, true).map_err(Refused::Store)?,
                None => None,
            };
            match summed {
                Some(summed) => self.records = Records::Summed(summed),
                None => return self.gathered(progress),
            }
        }
        if let Records::Summed(summed) = &mut self.records {
            let progress = summed.prepare(until).map_err(Refused::Store)?;
            let held = summed.held();
            self.hold(held, held)?;
            if progress == Progress::Paused {
                // What is summed up stays so, for all who ask: this time is well spent, and has an end.
                self.worked = Duration::ZERO;
                return Ok(Step::More);
            }
        }
        Ok(Step::Done)
    }

    /// Takes in what was gathered so far.
    fn gathered(&mut self, progress: Progress) -> Result<Step, Refused> {
        let Records::Gathering { items, .. } = &mut self.records else { return Ok(Step::Done) };
        let (held, reserved) = (items.len(), items.capacity());
        if progress != Progress::Paused {
            self.records = Records::Listed(in_order(std::mem::take(items)));
        }
        self.hold(held, reserved)?;
        Ok(if progress == Progress::Paused { Step::More } else { Step::Done })
    }

    /// Refuses more events than one negotiation or all together may hold.
    fn hold(&mut self, records: usize, reserved: usize) -> Result<(), Refused> {
        if records > self.limits.session_records_max {
            return Err(Refused::TooMany);
        }
        if self.share.grow(reserved.min(self.limits.session_records_max)) { Ok(()) } else { Err(Refused::NoRoom) }
    }

    fn answer(mut self: Box<Self>) {
        let answer = self.exchange.take().map(Exchange::into_answer).unwrap_or_default();
        let (outbox, serial) = (self.outbox.clone(), self.serial);
        outbox.push(Outgoing::Negotiated(Box::new(Negotiated { serial, end: Ending::Answer(self, answer) })));
    }

    fn told(&self, refused: &Refused) -> (String, Option<usize>) {
        let records_max = self.limits.session_records_max;
        match refused {
            Refused::TooMany => {
                let text =
                    format!("blocked: more than {records_max} events match; split the time or narrow the filter");
                (text, Some(records_max))
            }
            Refused::NoRoom => {
                ("error: too many reconciliations are open at present; try again later".to_owned(), None)
            }
            Refused::TooLong => {
                let text = "blocked: this takes too long; split the time or narrow the filter".to_owned();
                (text, Some(records_max))
            }
            Refused::Malformed(malformed) => (format!("invalid: {malformed}"), None),
            Refused::Store(error) => {
                tracing::error!(%error, "a reconciliation failed");
                (READ_ERROR.to_owned(), None)
            }
            Refused::Abandoned => (String::new(), None),
        }
    }
}

/// Answers range by range until the time is up.
fn exchange_until<S: Set>(
    exchange: &mut Exchange,
    set: &mut S,
    until: Instant,
    failed: impl Fn(S::Error) -> Refused,
) -> Result<Step, Refused> {
    loop {
        match exchange.step(set) {
            Ok(Step::More) if Instant::now() < until => {}
            Ok(step) => return Ok(step),
            Err(Failure::Malformed(malformed)) => return Err(Refused::Malformed(malformed)),
            Err(Failure::Set(error)) => return Err(failed(error)),
        }
    }
}

/// The store's sums as the machine asks for them.
pub(super) struct BySums<'s>(pub(super) &'s mut dyn Summed);

impl Set for BySums<'_> {
    type Error = StoreError;

    fn sum(&mut self, from: &Item, to: &Item) -> Result<Sum, StoreError> {
        self.0.sum(from, to)
    }

    fn items(&mut self, from: &Item, to: &Item, max: usize, out: &mut Vec<Item>) -> Result<(), StoreError> {
        self.0.items(from, to, max, out)
    }

    fn cuts(&mut self, from: &Item, to: &Item, parts: usize, out: &mut Vec<Bound>) -> Result<(), StoreError> {
        let seconds = self.0.cuts(from, to, parts)?;
        if seconds.is_empty() {
            let mut items = Vec::new();
            self.0.items(from, to, usize::MAX, &mut items)?;
            out.extend(reconcile::cuts_of(&items, parts));
        } else {
            out.extend(seconds.into_iter().map(Bound::at));
        }
        Ok(())
    }
}

/// Time ascending, each event once, none at the time that stands for infinity.
pub(super) fn in_order(mut items: Vec<Item>) -> Vec<Item> {
    items.retain(|item| item.created_at < u64::MAX);
    items.sort_unstable();
    items.dedup();
    items
}

fn push_over(outbox: &Outbox, serial: Serial, text: String, records_max: Option<usize>) {
    outbox.push(Outgoing::Negotiated(Box::new(Negotiated { serial, end: Ending::Over { text, records_max } })));
}

const READ_ERROR: &str = "error: the relay could not read its store";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::EventId;

    /// Shares come back; what goes beyond the budget is told, not given.
    #[test]
    fn the_budget_is_shared_and_given_back() {
        let budget = Budget::new(10);
        let share = || Share { budget: budget.clone(), records: 0 };
        let (mut first, mut second) = (share(), share());
        assert!(first.grow(6) && first.grow(4) && second.grow(4));
        assert!(!second.grow(5));
        drop(second);
        assert!(first.grow(10));
        drop(first);
        assert_eq!(budget.taken.load(Ordering::Relaxed), 0);
    }

    /// Newest first becomes oldest first, without repeats and without infinity (T22).
    #[test]
    fn t22_items_are_put_in_order() {
        let item = |created_at, id| Item { created_at, id: EventId([id; 32]) };
        let items = vec![item(u64::MAX, 1), item(9, 1), item(9, 2), item(9, 2), item(3, 0)];
        assert_eq!(in_order(items), [item(3, 0), item(9, 1), item(9, 2)]);
    }
}
