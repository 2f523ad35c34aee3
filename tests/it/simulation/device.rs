//! A device: the real collections, clock and outbox rules, driven as a client drives them, on a disk that a crash cuts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, EventId, Verified};
use sledge::sync::clock::{Clock, Device as DeviceId, Hlc};
use sledge::sync::draft::{Draft, Op, SettingsForm};
use sledge::sync::nip44::Nip44;
use sledge::sync::outbox::{Change, Content, Outbox, RelayUrl, Seq, Step};
use sledge::sync::{Absorbed, Collections};

use super::broken;
use super::rules::{Rule, Rules};
use super::store::SimStore;
use crate::support::Keys;

/// Longest time that a relay's `Date` takes to arrive.
const DELAY_MS_MAX: u64 = 10_000;
/// Bytes of the secret key that all devices share.
const PERSON: [u8; 32] = [7; 32];

/// What a link knows of the relay behind it.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkState {
    pub up: bool,
    /// Everything that the relay had when the link came up was fetched; only then goes out what merges.
    pub fetched: bool,
    /// Counts the links to this relay: what travels on an old one is lost.
    pub epoch: u64,
    /// Events that were asked for and have not come yet.
    pub awaited: usize,
}

/// What is in memory, and is gone after a crash.
pub struct Memory {
    pub outbox: Outbox,
    pub state: Collections,
    pub clock: Clock,
    pub links: Vec<LinkState>,
    /// What relays have and this device does not want: it was overtaken or deleted here.
    pub unwanted: BTreeSet<EventId>,
}

/// One device.
pub struct SimDevice {
    pub id: DeviceId,
    /// How far its clock is off, in milliseconds.
    pub skew_ms: i64,
    pub dead: bool,
    pub memory: Option<Memory>,
    /// The outbox's log. The first `synced` changes survive a crash for certain.
    log: Vec<Change>,
    synced: usize,
    /// The cache; a driver writes it in one with the log.
    pub cache: SimStore,
    /// Which write of the app each entry is.
    pub writes: BTreeMap<Seq, usize>,
    pub cipher: Nip44,
    keys: Keys,
    relays: usize,
    rules: Rules,
}

/// What a device's step did that the world takes note of.
#[derive(Default)]
pub struct Signed {
    pub event: Option<Verified<Event>>,
    pub entries: Vec<(Seq, Hlc)>,
}

pub fn relay_url(relay: usize) -> RelayUrl {
    RelayUrl::new(&format!("wss://relay{relay}.example.com"))
}

pub fn person() -> Keys {
    Keys::of_secret(PERSON)
}

impl SimDevice {
    pub fn new(number: u64, skew_ms: i64, relays: usize, seed: u64, rules: Rules) -> SimDevice {
        let next = AtomicU64::new(seed.wrapping_mul(1_000_003).wrapping_add(number << 48));
        let chance = move || {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&next.fetch_add(1, Ordering::Relaxed).to_be_bytes());
            bytes
        };
        let mut device = SimDevice {
            id: DeviceId(number + 1),
            skew_ms,
            dead: false,
            memory: None,
            log: Vec::new(),
            synced: 0,
            cache: SimStore::new(rules, false),
            writes: BTreeMap::new(),
            cipher: Nip44::new(&PERSON, chance).expect("a valid key"),
            keys: person(),
            relays,
            rules,
        };
        device.start();
        device
    }

    pub fn local_ms(&self, true_ms: u64) -> u64 {
        true_ms.saturating_add_signed(self.skew_ms)
    }

    /// Starts from what the disk has.
    pub fn start(&mut self) {
        let outbox = Outbox::replay(&self.log);
        let mut memory = Memory {
            outbox,
            state: Collections::new(self.keys.pubkey()),
            clock: Clock::new(self.id),
            links: vec![LinkState::default(); self.relays],
            unwanted: BTreeSet::new(),
        };
        for event in self.cache.events() {
            memory.state.absorb(event, &self.cipher, &mut memory.clock);
        }
        if self.rules.hold(Rule::Floor) {
            memory.outbox.drafts().for_each(|(_, draft)| memory.clock.resume(&draft.written));
        }
        self.memory = Some(memory);
    }

    /// Loses its memory, and of the log's unsynced end whatever chance takes.
    pub fn crash(&mut self, keep: usize) {
        self.memory = None;
        let unsynced = self.log.len() - self.synced;
        self.log.truncate(self.synced + keep.min(unsynced));
        self.synced = self.log.len();
    }

    /// Writes changes; `sync` before anything is done that relies on them.
    fn record(&mut self, changes: impl IntoIterator<Item = Change>, sync: bool) {
        self.log.extend(changes);
        if sync {
            self.synced = self.log.len();
        }
    }

    /// The app writes: one write, in as many forms as there are commands.
    pub fn write(&mut self, ops: Vec<Op>, true_ms: u64, write: Option<usize>) {
        let (local_ms, relays) = (self.local_ms(true_ms), self.relays);
        let memory = self.memory.as_mut().expect("it runs");
        let mut written = memory.clock.write(local_ms);
        if !self.rules.hold(Rule::Floor) {
            written.floor = Hlc::ZERO;
            written.stamp = Hlc::at(memory.clock.true_ms(local_ms), self.id);
        }
        for op in ops {
            let memory = self.memory.as_mut().expect("it runs");
            let content = Content::Draft(Box::new(Draft { written, op }));
            let (seq, change) = memory.outbox.queue(content, (0..relays).map(relay_url).collect());
            self.record([change], true);
            self.writes.extend(write.map(|write| (seq, write)));
        }
    }

    /// A link is up and the relay's `Date` is known to the second.
    pub fn link_up(&mut self, relay: usize, true_ms: u64, has_slot: bool) {
        let local_ms = self.local_ms(true_ms);
        let memory = self.memory.as_mut().expect("it runs");
        let link = &mut memory.links[relay];
        *link = LinkState { up: true, epoch: link.epoch + 1, ..LinkState::default() };
        memory.outbox.link_up(&relay_url(relay));
        if self.rules.hold(Rule::Restamp) {
            // The header is whole seconds, and old by what the answer took to arrive.
            let delay_ms = (self.id.0 * 7_919 + memory.links[relay].epoch * 104_729) % DELAY_MS_MAX;
            let date_ms = true_ms / 1000 * 1000 + 500 - delay_ms;
            memory.clock.correct(date_ms as i64 - local_ms as i64);
            let dated = memory.outbox.restamp(&mut memory.clock, local_ms);
            self.record(dated, false);
        }
        let memory = self.memory.as_mut().expect("it runs");
        let unsuited = if has_slot { SettingsForm::Document } else { SettingsForm::Slot };
        let changes = memory.outbox.settle_unsuited(&relay_url(relay), |entry| match &entry.content {
            Content::Draft(draft) => !matches!(&draft.op, Op::Settings { form, .. } if *form == unsuited),
            Content::Event(json) => Event::from_json(json).map_or(true, |event| suits(&event, has_slot)),
        });
        self.record(changes, false);
    }

    /// Everything that the relay had is here.
    pub fn fetched(&mut self, relay: usize) {
        let Some(memory) = &mut self.memory else { return };
        memory.links[relay].fetched = true;
        memory.outbox.fetched(&relay_url(relay));
    }

    pub fn link_down(&mut self, relay: usize) {
        let Some(memory) = &mut self.memory else { return };
        let epoch = memory.links[relay].epoch + 1;
        memory.links[relay] = LinkState { epoch, ..LinkState::default() };
        memory.outbox.link_down(&relay_url(relay));
        if memory.links.iter().all(|link| !link.up) {
            memory.clock.doubt();
        }
    }

    /// What the outbox sends next over a link, signing what has to be signed.
    pub fn pump(&mut self, relay: usize, true_ms: u64) -> (Option<Verified<Event>>, Signed) {
        let now_ms = self.local_ms(true_ms);
        let mut signed = Signed::default();
        loop {
            let memory = self.memory.as_mut().expect("it runs");
            match memory.outbox.next(&relay_url(relay), now_ms) {
                Step::Send { event, seq } => {
                    let event = Verified::check(Event::from_json(&event).unwrap()).unwrap();
                    if !self.rules.hold(Rule::AnswersSettle) {
                        let changes = memory.outbox.answer(&relay_url(relay), &event.id, true, "", now_ms, 0);
                        self.record(changes, false);
                    }
                    if !self.rules.hold(Rule::FrozenOnce) {
                        // The signature is made anew for each sending, and so is the nonce.
                        return (self.sign_again(seq, &event, true_ms), signed);
                    }
                    return (Some(event), signed);
                }
                Step::Sign(seq) => self.sign(seq, &mut signed),
                Step::Authenticate => memory.outbox.authenticated(&relay_url(relay)),
                Step::Wait(_) => return (None, signed),
            }
        }
    }

    fn sign(&mut self, seq: Seq, signed: &mut Signed) {
        let memory = self.memory.as_mut().expect("it runs");
        let drafts = memory.outbox.drafts_told_with(seq);
        signed.entries = drafts.iter().map(|(seq, draft)| (*seq, draft.written.stamp)).collect();
        let drafts: Vec<&Draft> = drafts.into_iter().map(|(_, draft)| draft).collect();
        let mut unsigned = memory.state.build(&drafts, self.id, &self.cipher).expect("short texts");
        if unsigned.is_none() && !self.rules.hold(Rule::SilenceWhenSaid) {
            unsigned = broken::say_again(&memory.state, &drafts, &self.cipher);
        }
        if !self.rules.hold(Rule::HeadsSayEverything) {
            unsigned = unsigned.map(|unsigned| broken::amnesia(unsigned, &drafts, &self.cipher));
        }
        let Some(unsigned) = unsigned else {
            let told: Vec<Seq> = signed.entries.iter().map(|(seq, _)| *seq).collect();
            let changes: Vec<Change> = told.into_iter().filter_map(|seq| memory.outbox.withdraw(seq)).collect();
            return self.record(changes, true);
        };
        let event = unsigned.sign(self.keys.pubkey(), |id| self.keys.sign_id(id));
        let change = memory.outbox.freeze(seq, &event);
        let event = Verified::check(event).expect("just signed");
        self.record([change], true);
        self.keep(&event, event.created_at);
        signed.event = Some(event);
    }

    fn sign_again(&mut self, seq: Seq, event: &Verified<Event>, true_ms: u64) -> Option<Verified<Event>> {
        let memory = self.memory.as_ref()?;
        let drafts = memory.outbox.entry(seq).map_or(0, |entry| entry.debts.len() as u64);
        let mut again = Event::clone(event);
        again.created_at += (drafts + true_ms) % 3;
        Some(Verified::check(self.keys.seal(again)).unwrap())
    }

    /// Takes an event into cache and state; what the state made of it.
    pub fn keep(&mut self, event: &Verified<Event>, now: u64) -> (Verdict, Absorbed) {
        let memory = self.memory.as_mut().expect("it runs");
        let own_clock = now.saturating_add_signed(self.skew_ms / 1000) + 900;
        if !self.rules.hold(Rule::ValidityFromTheEvent) && event.created_at > own_clock {
            memory.unwanted.insert(event.id);
            return (Verdict::Expired, Absorbed::Invalid("in the future of this device's clock"));
        }
        let absorbed = if self.rules.hold(Rule::Floor) {
            memory.state.absorb(event, &self.cipher, &mut memory.clock)
        } else {
            memory.state.absorb(event, &self.cipher, &mut Clock::new(self.id))
        };
        // Before the cache lets go of a head that this event replaces, what only that one said is in the outbox.
        let drafts: Vec<Draft> = memory.outbox.drafts().map(|(_, draft)| draft.clone()).collect();
        for op in memory.state.heads_due(&drafts.iter().collect::<Vec<_>>()) {
            self.write(vec![op], now * 1000, None);
        }
        let verdict = self.cache.apply(event, now);
        let memory = self.memory.as_mut().expect("it runs");
        if !matches!(verdict, Verdict::Store | Verdict::Duplicate) {
            memory.unwanted.insert(event.id);
        }
        (verdict, absorbed)
    }

    pub fn answered(&mut self, relay: usize, id: &EventId, accepted: bool, text: &str, true_ms: u64, chance: u64) {
        let now_ms = self.local_ms(true_ms);
        let memory = self.memory.as_mut().expect("it runs");
        let changes = memory.outbox.answer(&relay_url(relay), id, accepted, text, now_ms, chance);
        self.record(changes, false);
    }

    /// The entry that an event tells, if it is one of this device's own that is still owed.
    pub fn entry_of(&self, id: &EventId) -> Option<Seq> {
        let memory = self.memory.as_ref()?;
        memory.outbox.entries().find(|(_, entry)| entry.id == Some(*id)).map(|(seq, _)| seq)
    }

    /// Gives up waiting for answers.
    pub fn time_out(&mut self, relay: usize, true_ms: u64, chance: u64) {
        let now_ms = self.local_ms(true_ms);
        let Some(memory) = &mut self.memory else { return };
        memory.outbox.time_out(&relay_url(relay), now_ms.saturating_sub(5_000), now_ms, chance);
    }

    /// Says again what the relays' versions leave out; how many entries that made.
    pub fn settle_differences(&mut self, true_ms: u64) -> usize {
        let memory = self.memory.as_ref().expect("it runs");
        let drafts: Vec<Draft> = memory.outbox.drafts().map(|(_, draft)| draft.clone()).collect();
        let mut due = memory.state.due(&drafts);
        if !self.rules.hold(Rule::SilenceWhenSaid) && due.is_empty() && memory.state.settings.heads().next().is_some() {
            due.push(Op::Settings { form: SettingsForm::Slot, fields: BTreeMap::new() });
        }
        let count = due.len();
        due.into_iter().for_each(|op| self.write(vec![op], true_ms, None));
        count
    }

    /// The outbox's log is replaced by what it amounts to.
    pub fn compact_log(&mut self) {
        if let Some(memory) = &self.memory {
            self.log = memory.outbox.snapshot();
            self.synced = self.log.len();
        }
    }
}

/// Whether an event is in the form that a relay is to get.
pub fn suits(event: &Event, has_slot: bool) -> bool {
    let document = event.kind == sledge::sync::shape::SETTINGS_DOCUMENT;
    if has_slot { !document } else { !super::store::is_slot(event) }
}
