//! The outbox rules: what is owed to which relay, what to send next, and what an answer settles.
//!
//! In: content to publish, links that come up and go down, answers, the time, random numbers. Out: [`Change`]s for the
//! driver to make durable, and the next [`Step`] of each link. Never sends, signs or writes anything itself.
//!
//! The life of an entry: queued (durable: the app's write is made) → drafts are signed when a link first asks for them
//! (durable *before* the bytes go out, so that no relay ever sees two events for one draft) → sent, oldest first, at most
//! a window at a time → settled relay by relay. What merges, heads of chats and settings, waits until everything of the
//! relay is fetched ([`Outbox::fetched`]); messages, deletions and whatever else stands for itself go out at once. What a relay refuses for good stays visible among the dead letters. A
//! crash loses attempts and windows, never a debt; at worst an event is sent again and answered with `duplicate:`.

pub mod answer;
mod change;
mod link;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub use answer::{Consequence, Settlement};
pub use change::{Change, Content, RelayUrl, Seq};
pub use link::{LinkStatus, WINDOW_MAX};

use super::clock::{Clock, Hlc, Written};
use super::draft::{Draft, Op};
use super::shape::Schema;
use crate::protocol::{Event, EventId};
use link::Link;

/// What is owed to one relay for one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Debt {
    /// Not acknowledged yet.
    Owed,
    /// Nothing is owed any more.
    Paid(Settlement),
    /// Refused for good, with what the relay said.
    Dead(String),
}

/// Something to publish and where it stands.
#[derive(Clone, Debug)]
pub struct Entry {
    /// A draft, or the signed event.
    pub content: Content,
    /// The signed event's id.
    pub id: Option<EventId>,
    /// Each relay that is to have it.
    pub debts: BTreeMap<RelayUrl, Debt>,
    /// Entries that the event speaks for as well.
    pub covers: Vec<Seq>,
    /// It says all that is known: see [`Outbox::fetched`].
    pub after_fetch: bool,
}

/// What a link is to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Build and sign one event for the drafts of [`Outbox::drafts_told_with`], give it to [`Outbox::freeze`], make that
    /// durable and ask again.
    Sign(Seq),
    /// Send `["EVENT", …]` with this JSON.
    Send {
        /// The entry.
        seq: Seq,
        /// The event's canonical JSON.
        event: String,
    },
    /// Answer the relay's challenge (NIP-42), then say [`Outbox::authenticated`].
    Authenticate,
    /// Nothing to do before this time (milliseconds since 1970), or without one before something happens.
    Wait(Option<u64>),
}

/// How much is owed in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Entries with an unpaid debt.
    pub entries: usize,
    /// Entries that are not signed yet.
    pub drafts: usize,
    /// Entries that some relay refused for good.
    pub dead: usize,
    /// When the oldest draft was written by the device's own clock.
    pub oldest_draft_ms: Option<u64>,
}

/// All entries, and the links they go over.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    entries: BTreeMap<Seq, Entry>,
    links: BTreeMap<RelayUrl, Link>,
    /// Drafts that one event can tell together.
    told_together: HashMap<String, BTreeSet<Seq>>,
    next_seq: u64,
}

impl Outbox {
    /// The outbox that a log of changes amounts to.
    pub fn replay<'c>(changes: impl IntoIterator<Item = &'c Change>) -> Self {
        let mut outbox = Outbox::default();
        changes.into_iter().for_each(|change| outbox.apply(change));
        outbox
    }

    /// Changes that amount to the present state: what a log is replaced with when it has grown.
    pub fn snapshot(&self) -> Vec<Change> {
        let mut changes = Vec::new();
        for (seq, entry) in &self.entries {
            let relays = entry.debts.keys().cloned().collect();
            changes.push(Change::Queued { seq: *seq, content: entry.content.clone(), relays });
            for (relay, debt) in &entry.debts {
                let (seq, relay) = (*seq, relay.clone());
                match debt {
                    Debt::Owed => {}
                    Debt::Paid(how) => changes.push(Change::Settled { seq, relay, how: *how }),
                    Debt::Dead(reason) => changes.push(Change::Buried { seq, relay, reason: reason.clone() }),
                }
            }
        }
        // Last, so that the entries before it are not taken for applied already.
        changes.push(Change::Numbered { next: Seq(self.next_seq) });
        changes
    }

    /// Owes something to relays. The write counts as made when the change is durable.
    pub fn queue(&mut self, content: Content, relays: Vec<RelayUrl>) -> (Seq, Change) {
        let seq = Seq(self.next_seq);
        let change = Change::Queued { seq, content, relays };
        self.apply(&change);
        (seq, change)
    }

    /// Takes a change of the log. One that was applied before, or that names what is gone, changes nothing.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Numbered { next } => self.next_seq = self.next_seq.max(next.0),
            Change::Queued { seq, content, relays } => self.apply_queued(*seq, content, relays),
            Change::Dated { dates } => dates.iter().for_each(|(seq, stamp)| self.apply_date(*seq, *stamp)),
            Change::Frozen { seq, covers, event } => self.apply_frozen(*seq, covers, event),
            Change::Settled { seq, relay, how } => self.set_debt(*seq, relay, Debt::Paid(*how)),
            Change::Buried { seq, relay, reason } => self.set_debt(*seq, relay, Debt::Dead(reason.clone())),
            Change::Revived { seq, relay } => self.set_debt(*seq, relay, Debt::Owed),
            Change::Withdrawn { seq } => drop(self.take_out(*seq)),
        }
    }

    fn apply_queued(&mut self, seq: Seq, content: &Content, relays: &[RelayUrl]) {
        if seq.0 < self.next_seq {
            return;
        }
        self.next_seq = seq.0 + 1;
        if relays.is_empty() {
            return;
        }
        if let Some(key) = merge_key(content) {
            self.told_together.entry(key).or_default().insert(seq);
        }
        let after_fetch = says_all_that_is_known(content);
        for relay in relays {
            self.link(relay).owe(seq, after_fetch);
        }
        let debts = relays.iter().map(|relay| (relay.clone(), Debt::Owed)).collect();
        let entry = Entry { content: content.clone(), id: id_of(content), debts, covers: Vec::new(), after_fetch };
        self.entries.insert(seq, entry);
    }

    fn apply_date(&mut self, seq: Seq, stamp: Hlc) {
        if let Some(Entry { content: Content::Draft(draft), .. }) = self.entries.get_mut(&seq) {
            draft.written.stamp = stamp;
            draft.written.is_final = true;
        }
    }

    fn apply_frozen(&mut self, seq: Seq, covers: &[Seq], event: &str) {
        let Some(entry) = self.entries.get(&seq).filter(|entry| entry.id.is_none()) else {
            return;
        };
        let content = Content::Event(event.to_owned());
        let Some(id) = id_of(&content) else {
            // Not an event: what the driver wrote was damaged. The draft is still there to be signed.
            return;
        };
        self.forget_key(seq, merge_key(&entry.content));
        let mut told = covers.to_vec();
        let mut debts = BTreeMap::new();
        for covered in covers.iter().filter(|covered| **covered != seq) {
            if let Some(gone) = self.take_out(*covered) {
                told.extend(gone.covers);
                debts.extend(gone.debts);
            }
        }
        let Some(entry) = self.entries.get_mut(&seq) else { return };
        entry.content = content;
        entry.id = Some(id);
        entry.covers.extend(told);
        for (relay, debt) in debts {
            if !entry.debts.contains_key(&relay) {
                entry.debts.insert(relay.clone(), debt);
                self.links.entry(relay).or_default().owe(seq, entry.after_fetch);
            }
        }
    }

    /// Sets a debt; an entry with nothing but paid debts is gone.
    fn set_debt(&mut self, seq: Seq, relay: &RelayUrl, debt: Debt) {
        let Some(entry) = self.entries.get_mut(&seq) else { return };
        let Some(slot) = entry.debts.get_mut(relay) else { return };
        let link = self.links.entry(relay.clone()).or_default();
        link.forget(seq);
        if debt == Debt::Owed {
            link.owe(seq, entry.after_fetch);
        }
        *slot = debt;
        if entry.debts.values().all(|debt| matches!(debt, Debt::Paid(_))) {
            self.take_out(seq);
        }
    }

    fn take_out(&mut self, seq: Seq) -> Option<Entry> {
        let entry = self.entries.remove(&seq)?;
        self.forget_key(seq, merge_key(&entry.content));
        for relay in entry.debts.keys() {
            self.link(relay).forget(seq);
        }
        Some(entry)
    }

    fn forget_key(&mut self, seq: Seq, key: Option<String>) {
        let Some(key) = key else { return };
        if let Some(group) = self.told_together.get_mut(&key) {
            group.remove(&seq);
            if group.is_empty() {
                self.told_together.remove(&key);
            }
        }
    }

    fn link(&mut self, relay: &RelayUrl) -> &mut Link {
        self.links.entry(relay.clone()).or_default()
    }
}

/// Links and what goes over them.
impl Outbox {
    /// A link is open. Nothing was sent over it, and no key is proven on it.
    pub fn link_up(&mut self, relay: &RelayUrl) {
        self.link(relay).open();
    }

    /// What the relay has is being fetched again, since it showed less before the keys were proven: see
    /// [`Outbox::fetched`].
    pub fn fetching(&mut self, relay: &RelayUrl) {
        self.link(relay).set_fetched(false);
    }

    /// Everything that the relay had when the link came up is here. From now on goes out what takes the place of another
    /// version and says all that is known, heads of chats and settings: signed or sent before, it would take the place of
    /// what nobody here has read. Everything else stands for itself and does not wait for this.
    pub fn fetched(&mut self, relay: &RelayUrl) {
        self.link(relay).set_fetched(true);
    }

    /// Dates all drafts anew that are not dated for good, now that `clock` was corrected by a relay. Nothing when there are
    /// none.
    pub fn restamp(&mut self, clock: &mut Clock, local_ms: u64) -> Option<Change> {
        let undated: Vec<Seq> =
            self.drafts().filter(|(_, draft)| !draft.written.is_final).map(|(seq, _)| seq).collect();
        clock.restamp(local_ms, self.dates_mut());
        let stamp = |seq: Seq| match &self.entries.get(&seq)?.content {
            Content::Draft(draft) => Some((seq, draft.written.stamp)),
            Content::Event(_) => None,
        };
        let dates: Vec<(Seq, Hlc)> = undated.into_iter().filter_map(stamp).collect();
        (!dates.is_empty()).then_some(Change::Dated { dates })
    }

    /// A link is gone. What was on its way is owed as before.
    pub fn link_down(&mut self, relay: &RelayUrl) {
        self.link(relay).close();
    }

    /// The relay accepted the answer to its challenge.
    pub fn authenticated(&mut self, relay: &RelayUrl) {
        self.link(relay).authenticated();
    }

    /// What this link is to do next: the oldest debt first, as far as window and pauses allow.
    pub fn next(&mut self, relay: &RelayUrl, now_ms: u64) -> Step {
        let link = self.links.entry(relay.clone()).or_default();
        if link.wants_auth() {
            return Step::Authenticate;
        }
        let seq = match link.due(now_ms) {
            Ok(seq) => seq,
            Err(until) => return Step::Wait(until),
        };
        let entry = self.entries.get(&seq).expect("links hold only entries that are there");
        match (&entry.content, entry.id) {
            (Content::Event(event), Some(id)) => {
                link.sent(seq, id, now_ms);
                Step::Send { seq, event: event.clone() }
            }
            _ => Step::Sign(seq),
        }
    }

    /// The drafts that one event is to tell when `seq` is signed: itself and all of the same key, oldest first.
    pub fn drafts_told_with(&self, seq: Seq) -> Vec<(Seq, &Draft)> {
        let draft = |seq: Seq| match &self.entries.get(&seq)?.content {
            Content::Draft(draft) => Some((seq, draft.as_ref())),
            Content::Event(_) => None,
        };
        let Some((_, own)) = draft(seq) else {
            return Vec::new();
        };
        match own.merge_key().and_then(|key| self.told_together.get(&key)) {
            Some(group) => group.iter().filter_map(|seq| draft(*seq)).collect(),
            None => vec![(seq, own)],
        }
    }

    /// Replaces a draft, and those told with it, by their signed event. To be durable before [`Outbox::next`] is asked.
    pub fn freeze(&mut self, seq: Seq, event: &Event) -> Change {
        let covers = self.drafts_told_with(seq).into_iter().map(|(told, _)| told).filter(|told| *told != seq).collect();
        let json = event.canonical().json;
        let event = String::from_utf8(json.to_vec()).expect("canonical JSON is text");
        let change = Change::Frozen { seq, covers, event };
        self.apply(&change);
        change
    }

    /// Takes a relay's `OK`. `chance` is a random number for the waiting time. An answer to what was not asked changes
    /// nothing.
    pub fn answer(
        &mut self,
        relay: &RelayUrl,
        id: &EventId,
        accepted: bool,
        text: &str,
        now_ms: u64,
        chance: u64,
    ) -> Vec<Change> {
        let link = self.link(relay);
        let seqs = link.answered(id);
        let consequence = answer::judge(accepted, text);
        let mut changes = Vec::new();
        for seq in seqs {
            let relay = relay.clone();
            match &consequence {
                Consequence::Settle(how) => changes.push(Change::Settled { seq, relay, how: *how }),
                Consequence::Bury => changes.push(Change::Buried { seq, relay, reason: text.to_owned() }),
                Consequence::Authenticate if link.ask_auth() => link.make_ready(seq),
                Consequence::SlowDown => link.slow_down(seq, now_ms, chance),
                Consequence::Authenticate | Consequence::Retry => link.retry(seq, now_ms, chance),
            }
        }
        if !changes.is_empty() {
            link.progress();
        }
        changes.iter().for_each(|change| self.apply(change));
        changes
    }

    /// Gives up waiting for answers to what was sent before `sent_before_ms`: owed again, after a pause of the link.
    pub fn time_out(&mut self, relay: &RelayUrl, sent_before_ms: u64, now_ms: u64, chance: u64) {
        let link = self.link(relay);
        for seq in link.unanswered_since(sent_before_ms) {
            link.slow_down(seq, now_ms, chance);
        }
    }

    /// Settles what is not meant for a relay, now that it is known what the relay is.
    pub fn settle_unsuited(&mut self, relay: &RelayUrl, suits: impl Fn(&Entry) -> bool) -> Vec<Change> {
        let owed = self.entries.iter().filter(|(_, entry)| entry.debts.get(relay) == Some(&Debt::Owed));
        let unsuited = owed.filter(|(_, entry)| !suits(entry)).map(|(seq, _)| *seq);
        let settled = |seq| Change::Settled { seq, relay: relay.clone(), how: Settlement::NotForThisRelay };
        let changes: Vec<Change> = unsuited.map(settled).collect();
        changes.iter().for_each(|change| self.apply(change));
        changes
    }

    /// Tries a dead letter again; nothing if there is none.
    pub fn revive(&mut self, seq: Seq, relay: &RelayUrl) -> Option<Change> {
        let debt = self.entries.get(&seq)?.debts.get(relay)?;
        if !matches!(debt, Debt::Dead(_)) {
            return None;
        }
        let change = Change::Revived { seq, relay: relay.clone() };
        self.apply(&change);
        Some(change)
    }

    /// Takes an entry out: a needless merge, or what a person discards. Nothing if it is gone already.
    pub fn withdraw(&mut self, seq: Seq) -> Option<Change> {
        self.entries.get(&seq)?;
        let change = Change::Withdrawn { seq };
        self.apply(&change);
        Some(change)
    }
}

/// What there is to see.
impl Outbox {
    /// An entry that is not settled everywhere.
    pub fn entry(&self, seq: Seq) -> Option<&Entry> {
        self.entries.get(&seq)
    }

    /// All entries, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = (Seq, &Entry)> {
        self.entries.iter().map(|(seq, entry)| (*seq, entry))
    }

    /// All drafts, oldest first: with the state of signed events they make the state that the app sees.
    pub fn drafts(&self) -> impl Iterator<Item = (Seq, &Draft)> {
        self.entries().filter_map(|(seq, entry)| match &entry.content {
            Content::Draft(draft) => Some((seq, draft.as_ref())),
            Content::Event(_) => None,
        })
    }

    /// The dates of all drafts, oldest first, for [`super::clock::Clock::restamp`].
    pub fn dates_mut(&mut self) -> impl Iterator<Item = &mut Written> {
        self.entries.values_mut().filter_map(|entry| match &mut entry.content {
            Content::Draft(draft) => Some(&mut draft.written),
            Content::Event(_) => None,
        })
    }

    /// Whether a draft of this [`Draft::merge_key`] waits.
    pub fn waits(&self, merge_key: &str) -> bool {
        self.told_together.contains_key(merge_key)
    }

    /// What relays refused for good: entry, relay, what it said.
    pub fn dead_letters(&self) -> impl Iterator<Item = (Seq, &RelayUrl, &str)> {
        self.entries.iter().flat_map(|(seq, entry)| {
            entry.debts.iter().filter_map(move |(relay, debt)| match debt {
                Debt::Dead(reason) => Some((*seq, relay, reason.as_str())),
                _ => None,
            })
        })
    }

    /// How much is owed in all.
    pub fn status(&self) -> Status {
        let has = |entry: &Entry, wanted: fn(&Debt) -> bool| entry.debts.values().any(wanted);
        Status {
            entries: self.entries.values().filter(|entry| has(entry, |debt| *debt == Debt::Owed)).count(),
            drafts: self.drafts().count(),
            dead: self.entries.values().filter(|entry| has(entry, |debt| matches!(debt, Debt::Dead(_)))).count(),
            oldest_draft_ms: self.drafts().map(|(_, draft)| draft.written.local_ms).min(),
        }
    }

    /// How a link stands.
    pub fn link_status(&self, relay: &RelayUrl) -> LinkStatus {
        self.links.get(relay).map(Link::status).unwrap_or_default()
    }
}

fn merge_key(content: &Content) -> Option<String> {
    match content {
        Content::Draft(draft) => draft.merge_key(),
        Content::Event(_) => None,
    }
}

fn says_all_that_is_known(content: &Content) -> bool {
    match content {
        Content::Draft(draft) => matches!(draft.op, Op::Head { .. } | Op::Settings { .. }),
        Content::Event(json) => Event::from_json(json)
            .is_ok_and(|event| matches!(Schema::of(&event), Some(Schema::ChatHead | Schema::Settings))),
    }
}

fn id_of(content: &Content) -> Option<EventId> {
    match content {
        Content::Draft(_) => None,
        Content::Event(json) => Event::from_json(json).ok().map(|event| event.id),
    }
}
