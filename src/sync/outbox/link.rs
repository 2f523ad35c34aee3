//! One link of the outbox: what is ready for it, what waits for another attempt, what is on its way.

use std::collections::{BTreeMap, BTreeSet};

use super::answer::backoff_ms;
use super::change::Seq;
use crate::protocol::EventId;

/// Most events on their way to one relay without an answer. Halved when the relay slows us down, one wider with each
/// event that it settles.
pub const WINDOW_MAX: usize = 64;

/// What can be seen of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStatus {
    /// The link is open.
    pub up: bool,
    /// Events that are owed, those on their way included.
    pub owed: usize,
    /// Events on their way.
    pub in_flight: usize,
    /// How many may be on their way.
    pub window: usize,
    /// Nothing goes out before this time (milliseconds since 1970).
    pub paused_until_ms: u64,
}

/// Held in memory only: a crash forgets attempts and pauses, not debts.
#[derive(Clone, Debug)]
pub(super) struct Link {
    up: bool,
    /// Everything that the relay had when the link came up is here.
    fetched: bool,
    auth: Auth,
    window: usize,
    /// Refusals in a row.
    failures: u32,
    paused_until_ms: u64,
    ready: BTreeSet<Seq>,
    /// Ready, but not before everything is fetched.
    held: BTreeSet<Seq>,
    /// What waits for that, whatever else it waits for.
    after_fetch: BTreeSet<Seq>,
    /// Owed, but not before a time: in the order of time.
    later: BTreeSet<(u64, Seq)>,
    failed: BTreeMap<Seq, Failed>,
    in_flight: BTreeMap<Seq, Sent>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Auth {
    NotAsked,
    Wanted,
    Done,
}

/// How often an event failed by itself, and when it is next due.
#[derive(Clone, Copy, Debug, Default)]
struct Failed {
    times: u32,
    due_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    id: EventId,
    at_ms: u64,
}

impl Default for Link {
    fn default() -> Self {
        Link {
            up: false,
            fetched: false,
            auth: Auth::NotAsked,
            window: WINDOW_MAX,
            failures: 0,
            paused_until_ms: 0,
            ready: BTreeSet::new(),
            held: BTreeSet::new(),
            after_fetch: BTreeSet::new(),
            later: BTreeSet::new(),
            failed: BTreeMap::new(),
            in_flight: BTreeMap::new(),
        }
    }
}

impl Link {
    pub(super) fn open(&mut self) {
        self.close();
        self.up = true;
    }

    pub(super) fn close(&mut self) {
        self.up = false;
        self.fetched = false;
        self.auth = Auth::NotAsked;
        std::mem::take(&mut self.in_flight).into_keys().for_each(|seq| self.make_ready(seq));
    }

    pub(super) fn set_fetched(&mut self, fetched: bool) {
        self.fetched = fetched;
    }

    /// Asks for a proof of the key; false when there was one already on this link and it did not help.
    pub(super) fn ask_auth(&mut self) -> bool {
        if self.auth == Auth::Done {
            return false;
        }
        self.auth = Auth::Wanted;
        true
    }

    pub(super) fn wants_auth(&self) -> bool {
        self.up && self.auth == Auth::Wanted
    }

    pub(super) fn authenticated(&mut self) {
        self.auth = Auth::Done;
    }

    pub(super) fn owe(&mut self, seq: Seq, after_fetch: bool) {
        if after_fetch {
            self.after_fetch.insert(seq);
        }
        self.make_ready(seq);
    }

    /// What is owed may go out, now or when everything is fetched.
    pub(super) fn make_ready(&mut self, seq: Seq) {
        if self.after_fetch.contains(&seq) {
            self.held.insert(seq)
        } else {
            self.ready.insert(seq)
        };
    }

    pub(super) fn forget(&mut self, seq: Seq) {
        self.ready.remove(&seq);
        self.held.remove(&seq);
        self.after_fetch.remove(&seq);
        if let Some(failed) = self.failed.remove(&seq) {
            self.later.remove(&(failed.due_ms, seq));
        }
        self.in_flight.remove(&seq);
    }

    /// The oldest entry that may go out now; otherwise when to ask again.
    pub(super) fn due(&mut self, now_ms: u64) -> Result<Seq, Option<u64>> {
        if !self.up || self.in_flight.len() >= self.window {
            return Err(None);
        }
        if now_ms < self.paused_until_ms {
            return Err(Some(self.paused_until_ms));
        }
        while let Some((at_ms, seq)) = self.later.first().copied().filter(|(at_ms, _)| *at_ms <= now_ms) {
            self.later.remove(&(at_ms, seq));
            self.make_ready(seq);
        }
        let held = self.held.first().filter(|_| self.fetched);
        let first = self.ready.first().into_iter().chain(held).min();
        first.copied().ok_or_else(|| self.later.first().map(|(at_ms, _)| *at_ms))
    }

    pub(super) fn sent(&mut self, seq: Seq, id: EventId, at_ms: u64) {
        self.ready.remove(&seq);
        self.held.remove(&seq);
        self.in_flight.insert(seq, Sent { id, at_ms });
    }

    /// Takes what waits for an answer about `id` off the link.
    pub(super) fn answered(&mut self, id: &EventId) -> Vec<Seq> {
        self.take_in_flight(|sent| sent.id == *id)
    }

    pub(super) fn unanswered_since(&mut self, sent_before_ms: u64) -> Vec<Seq> {
        self.take_in_flight(|sent| sent.at_ms < sent_before_ms)
    }

    fn take_in_flight(&mut self, wanted: impl Fn(&Sent) -> bool) -> Vec<Seq> {
        let taken: Vec<Seq> = self.in_flight.iter().filter(|(_, sent)| wanted(sent)).map(|(seq, _)| *seq).collect();
        self.in_flight.retain(|_, sent| !wanted(sent));
        taken
    }

    /// An event failed by itself: it waits, the link goes on.
    pub(super) fn retry(&mut self, seq: Seq, now_ms: u64, chance: u64) {
        let failed = self.failed.entry(seq).or_default();
        failed.times = failed.times.saturating_add(1);
        failed.due_ms = now_ms.saturating_add(backoff_ms(failed.times, chance));
        self.later.insert((failed.due_ms, seq));
    }

    /// The relay wants less: the whole link waits, and goes on with half the window.
    pub(super) fn slow_down(&mut self, seq: Seq, now_ms: u64, chance: u64) {
        self.make_ready(seq);
        // The refusals of one window are one complaint.
        if now_ms >= self.paused_until_ms {
            self.window = (self.window / 2).max(1);
            self.failures = self.failures.saturating_add(1);
            self.paused_until_ms = now_ms.saturating_add(backoff_ms(self.failures, chance));
        }
    }

    /// The relay settled something.
    pub(super) fn progress(&mut self) {
        self.failures = 0;
        self.window = (self.window + 1).min(WINDOW_MAX);
    }

    pub(super) fn status(&self) -> LinkStatus {
        LinkStatus {
            up: self.up,
            owed: self.ready.len() + self.held.len() + self.later.len() + self.in_flight.len(),
            in_flight: self.in_flight.len(),
            window: self.window,
            paused_until_ms: self.paused_until_ms,
        }
    }
}
