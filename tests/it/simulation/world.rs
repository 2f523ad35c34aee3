//! The world of a run: true time, relays, the wire between them and the devices, and the book of what the app wrote.

use std::collections::{BTreeMap, BTreeSet};

use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, EventId, Kind, Verified};

use super::book::Book;
use super::chance::Chance;
use super::device::{SimDevice, relay_url, suits};
use super::rules::{Rule, Rules};
use super::store::SimStore;
use crate::support::NOW;

/// How far ahead of its clock a relay takes events, in seconds.
const FUTURE_SECS_MAX: u64 = 900;
const YEAR_MS: i64 = 365 * 86_400_000;
/// Merges in calm weather after which a world will not fall silent.
const MERGES_MAX: usize = 60;
/// Steps of calm after which a round that still talks will not stop.
const STEPS_MAX: usize = 60;
/// Rounds after which a world that still talks will not fall silent.
const ROUNDS_MAX: usize = 12;

/// One relay, its clock right.
pub struct SimRelay {
    pub store: SimStore,
    /// It keeps versions of settings by their heads.
    pub slots: bool,
    /// It answers as strfry does.
    other_words: bool,
    /// It loses events now and then.
    pub forgetful: bool,
    /// Everything that it ever stored.
    pub stored_ever: BTreeSet<EventId>,
}

/// Something on its way between a device and a relay.
struct Packet {
    device: usize,
    relay: usize,
    /// The link it travels on; lost when that is gone.
    epoch: u64,
    what: What,
}

enum What {
    Publish(Verified<Event>),
    Answer { id: EventId, accepted: bool, text: String },
    Event { event: Verified<Event>, fetched: bool },
}

pub struct World {
    pub chance: Chance,
    pub now_ms: u64,
    pub rules: Rules,
    pub relays: Vec<SimRelay>,
    pub devices: Vec<SimDevice>,
    wire: Vec<Packet>,
    pub book: Book,
    /// Faults happen.
    stormy: bool,
    /// What was said again in calm weather.
    merges: usize,
}

impl World {
    pub fn new(seed: u64, rules: Rules) -> World {
        let mut chance = Chance::new(seed);
        let relays: Vec<SimRelay> = (0..1 + chance.below(3)).map(|_| SimRelay::new(&mut chance, rules)).collect();
        let devices = (0..2 + chance.below(4)).map(|number| {
            let skew_ms = [0, 0, YEAR_MS, -YEAR_MS, 3_600_000, -90_000][chance.below(6)];
            SimDevice::new(number as u64, skew_ms, relays.len(), seed, rules)
        });
        let devices = devices.collect();
        let now_ms = NOW * 1000;
        World {
            chance,
            now_ms,
            rules,
            relays,
            devices,
            wire: Vec::new(),
            book: Book::default(),
            stormy: true,
            merges: 0,
        }
    }

    /// Faults and writes, then calm until nobody has anything to say; false if that never comes (law 8).
    pub fn run(&mut self, steps: usize) -> bool {
        for _ in 0..steps {
            self.step();
        }
        self.heal()
    }

    fn step(&mut self) {
        let device = self.chance.below(self.devices.len());
        let relay = self.chance.below(self.relays.len());
        self.now_ms += self.pause_ms();
        match self.chance.below(100) {
            0..4 => self.dialogue(device, relay),
            4..22 => self.app_writes(device),
            22..36 => self.toggle_link(device, relay),
            36..72 => {
                for _ in 0..1 + self.chance.below(6) {
                    self.deliver_any();
                }
            }
            72..86 => _ = self.pump(device, relay),
            86..89 => self.crash(device),
            89..93 => self.restart(device),
            93..95 => self.forget(relay),
            95 => self.die(device),
            _ => self.upkeep(device, relay),
        }
    }

    fn pause_ms(&mut self) -> u64 {
        match self.chance.below(20) {
            0 => self.chance.number() % 86_400_000,
            1..4 => self.chance.number() % 60_000,
            4..10 => 0,
            _ => self.chance.number() % 1_500,
        }
    }

    fn runs(&self, device: usize) -> bool {
        self.devices[device].memory.is_some()
    }

    fn is_up(&self, device: usize, relay: usize) -> bool {
        self.devices[device].memory.as_ref().is_some_and(|memory| memory.links[relay].up)
    }

    fn app_writes(&mut self, device: usize) {
        if self.runs(device) {
            self.book.write(&mut self.devices[device], device, self.now_ms, &mut self.chance);
        }
    }

    /// A write that reaches another device at once, and what is written there right after.
    fn dialogue(&mut self, device: usize, relay: usize) {
        self.app_writes(device);
        self.pump(device, relay);
        for _ in 0..40 {
            self.deliver_any();
        }
        self.now_ms += self.chance.number() % 2_000;
        let other = (device + 1 + self.chance.below(self.devices.len() - 1)) % self.devices.len();
        self.app_writes(other);
        self.app_writes(other);
    }

    fn toggle_link(&mut self, device: usize, relay: usize) {
        if !self.runs(device) {
            return;
        }
        if !self.is_up(device, relay) {
            self.connect(device, relay);
        } else if self.chance.percent(40) {
            self.devices[device].link_down(relay);
        }
    }

    fn connect(&mut self, device: usize, relay: usize) {
        let slots = self.relays[relay].slots;
        self.devices[device].link_up(relay, self.now_ms, slots);
        self.fetch(device, relay);
    }

    /// Compares sets and asks for what is missing, deletions first; with nothing missing, says what the relay lacks.
    fn fetch(&mut self, device: usize, relay: usize) {
        let from = &self.relays[relay];
        let Some(memory) = self.devices[device].memory.as_ref() else { return };
        let cache = &self.devices[device].cache;
        let newest = cache.newest();
        let missing = from.store.events().filter(|event| {
            let by_time = !self.rules.hold(Rule::SetsAreCompared) && event.created_at < newest;
            !cache.keeps(&event.id) && !memory.unwanted.contains(&event.id) && !by_time
        });
        let mut missing: Vec<Verified<Event>> = missing.cloned().collect();
        missing.sort_by_key(|event| (event.kind != Kind::DELETION, event.created_at));
        let awaited = missing.len();
        for event in missing {
            self.send(device, relay, What::Event { event, fetched: true });
        }
        let Some(memory) = self.devices[device].memory.as_mut() else { return };
        memory.links[relay].awaited = awaited;
        if awaited == 0 {
            self.devices[device].fetched(relay);
            self.upload(device, relay);
        }
    }

    fn upload(&mut self, device: usize, relay: usize) {
        let lacking = self.lacking(device, relay);
        lacking.into_iter().for_each(|event| self.send(device, relay, What::Publish(event)));
    }

    /// What a device could tell a relay, in the form that the relay is to get.
    fn lacking(&self, device: usize, relay: usize) -> Vec<Verified<Event>> {
        let to = &self.relays[relay];
        let events = self.devices[device].cache.events().filter(|event| suits(event, to.slots));
        // A former version of settings is not shown, but the relay's answer said that it has it.
        let lacks = |event: &&Verified<Event>| to.store.get(&event.id).is_none() && !to.store.keeps(&event.id);
        if !self.rules.hold(Rule::AnswersSettle) {
            return Vec::new();
        }
        events.filter(lacks).cloned().collect()
    }

    fn send(&mut self, device: usize, relay: usize, what: What) {
        let Some(memory) = self.devices[device].memory.as_ref() else { return };
        let epoch = memory.links[relay].epoch;
        self.wire.push(Packet { device, relay, epoch, what });
    }

    /// Takes any packet off the wire: not in order, sometimes twice.
    fn deliver_any(&mut self) {
        if self.wire.is_empty() {
            return;
        }
        let at = self.chance.below(self.wire.len());
        let packet = self.wire.swap_remove(at);
        let link = self.devices[packet.device].memory.as_ref().map(|memory| memory.links[packet.relay]);
        if !link.is_some_and(|link| link.up && link.epoch == packet.epoch) {
            // Its link is gone; the relay may have read it before it noticed.
            if let (What::Publish(event), true) = (packet.what, self.chance.percent(30)) {
                self.relay_takes(packet.relay, &event);
            }
            return;
        }
        if self.stormy && self.chance.percent(3) {
            // A link that loses something is a link that breaks.
            return self.devices[packet.device].link_down(packet.relay);
        }
        let twice = self.stormy && self.chance.percent(5);
        self.deliver(&packet);
        if twice && self.is_up(packet.device, packet.relay) {
            self.deliver(&packet);
        }
    }

    fn deliver(&mut self, packet: &Packet) {
        let Packet { device, relay, .. } = *packet;
        match &packet.what {
            What::Publish(event) => self.publish(device, relay, event),
            What::Answer { id, accepted, text } => {
                let chance = self.chance.number();
                self.devices[device].answered(relay, id, *accepted, text, self.now_ms, chance);
            }
            What::Event { event, fetched } => {
                let (_, absorbed) = self.devices[device].keep(event, self.now_ms / 1000);
                self.book.judged(event, absorbed);
                if *fetched {
                    self.fetched(device, relay);
                }
            }
        }
    }

    fn fetched(&mut self, device: usize, relay: usize) {
        let Some(memory) = self.devices[device].memory.as_mut() else { return };
        let link = &mut memory.links[relay];
        link.awaited = link.awaited.saturating_sub(1);
        if link.awaited == 0 && !link.fetched {
            self.fetch(device, relay);
        }
    }

    fn publish(&mut self, device: usize, relay: usize, event: &Verified<Event>) {
        let (accepted, text) = if self.stormy && self.chance.percent(6) {
            (false, ["error: try later", "rate-limited: slow down"][self.chance.below(2)].to_owned())
        } else {
            self.relay_takes(relay, event)
        };
        // The answer may be lost with its link after the relay has stored the event.
        self.send(device, relay, What::Answer { id: event.id, accepted, text });
    }

    fn relay_takes(&mut self, relay: usize, event: &Verified<Event>) -> (bool, String) {
        let now = self.now_ms / 1000;
        if event.created_at > now + FUTURE_SECS_MAX {
            return (false, format!("invalid: created_at {} s ahead", event.created_at - now));
        }
        let at = &mut self.relays[relay];
        let verdict = at.store.apply(event, now);
        if verdict == Verdict::Store {
            at.stored_ever.insert(event.id);
            for device in 0..self.devices.len() {
                if self.is_up(device, relay) {
                    self.send(device, relay, What::Event { event: event.clone(), fetched: false });
                }
            }
        }
        self.relays[relay].words(verdict)
    }

    fn pump(&mut self, device: usize, relay: usize) -> bool {
        if !self.is_up(device, relay) {
            return false;
        }
        let (event, signed) = self.devices[device].pump(relay, self.now_ms);
        let writes = &self.devices[device].writes;
        if let Some(event) = &signed.event {
            self.book.signed(
                event,
                device,
                signed.entries.iter().map(|(seq, stamp)| (writes.get(seq).copied(), *stamp)),
            );
        }
        if let Some(event) = &event {
            self.book.sent(event, device, relay, self.devices[device].entry_of(&event.id));
            self.send(device, relay, What::Publish(event.clone()));
        }
        event.is_some()
    }

    fn crash(&mut self, device: usize) {
        let keep = self.chance.below(8);
        self.devices[device].crash(keep);
    }

    fn restart(&mut self, device: usize) {
        if !self.devices[device].dead && !self.runs(device) {
            self.devices[device].start();
        }
    }

    fn forget(&mut self, relay: usize) {
        if !self.relays[relay].forgetful {
            return;
        }
        let ids: Vec<EventId> = self.relays[relay].store.events().map(|event| event.id).collect();
        let lost: Vec<EventId> = ids.into_iter().filter(|_| self.chance.percent(30)).collect();
        self.relays[relay].store.forget(&lost);
    }

    /// A device is gone for ever; two always stay.
    fn die(&mut self, device: usize) {
        let alive = self.devices.iter().filter(|device| !device.dead).count();
        if alive > 2 && self.chance.percent(50) {
            self.devices[device].dead = true;
            self.devices[device].memory = None;
        }
    }

    fn upkeep(&mut self, device: usize, relay: usize) {
        if !self.runs(device) {
            return;
        }
        let chance = self.chance.number();
        self.devices[device].time_out(relay, self.now_ms, chance);
        if self.devices[device].memory.as_ref().is_some_and(|memory| memory.links[relay].fetched) {
            self.devices[device].settle_differences(self.now_ms);
        }
        if self.chance.percent(20) {
            self.devices[device].compact_log();
        }
    }

    /// Calm weather: every device that lives runs and is linked to every relay, until nothing happens any more.
    fn heal(&mut self) -> bool {
        self.stormy = false;
        self.wire.clear();
        for device in 0..self.devices.len() {
            // All that counts is on the disks.
            self.crash(device);
            self.restart(device);
        }
        let mut quiet_rounds = 0;
        for _ in 0..ROUNDS_MAX {
            for device in 0..self.devices.len() {
                for relay in 0..self.relays.len() {
                    if self.runs(device) {
                        self.devices[device].link_down(relay);
                        self.connect(device, relay);
                    }
                }
            }
            quiet_rounds = if self.settle() { quiet_rounds + 1 } else { 0 };
            if quiet_rounds == 2 || self.merges > MERGES_MAX {
                return quiet_rounds == 2;
            }
        }
        false
    }

    /// Lets everything that is on its way arrive; whether nothing was published.
    fn settle(&mut self) -> bool {
        let mut quiet = true;
        for _ in 0..STEPS_MAX {
            while !self.wire.is_empty() {
                self.deliver_any();
            }
            self.now_ms += 61_000;
            let mut busy = false;
            for device in 0..self.devices.len() {
                for relay in 0..self.relays.len() {
                    while self.pump(device, relay) {
                        busy = true;
                    }
                    if self.runs(device) {
                        self.devices[device].time_out(relay, self.now_ms, 1);
                    }
                }
                if self.runs(device) {
                    let merges = self.devices[device].settle_differences(self.now_ms);
                    self.merges += merges;
                    busy |= merges > 0;
                }
            }
            if self.merges > MERGES_MAX {
                return false;
            }
            quiet &= !busy;
            if !busy && self.wire.is_empty() {
                return quiet && self.is_equal();
            }
        }
        false
    }

    /// Whether no device has something to fetch or to tell, and nothing is owed.
    fn is_equal(&self) -> bool {
        (0..self.devices.len()).filter(|device| self.runs(*device)).all(|device| {
            let memory = self.devices[device].memory.as_ref().expect("it runs");
            memory.outbox.status().entries == 0
                && (0..self.relays.len()).all(|relay| self.lacking(device, relay).is_empty())
        })
    }

    /// Devices that live.
    pub fn alive(&self) -> impl Iterator<Item = &SimDevice> {
        self.devices.iter().filter(|device| device.memory.is_some())
    }

    /// What a run looked like, for a failing seed.
    pub fn describe(&self) -> String {
        let skews: Vec<String> =
            self.devices.iter().map(|d| format!("{}{}", d.skew_ms, if d.dead { " dead" } else { "" })).collect();
        let relays: BTreeMap<String, (bool, bool)> =
            self.relays.iter().enumerate().map(|(n, r)| (relay_url(n).to_string(), (r.slots, r.forgetful))).collect();
        let mut text =
            format!("{} writes, devices {skews:?}, relays (slots, forgetful) {relays:?}", self.book.writes.len());
        for (number, device) in self.devices.iter().enumerate().filter(|(_, device)| device.memory.is_some()) {
            let memory = device.memory.as_ref().expect("it runs");
            let lacking = (0..self.relays.len()).flat_map(|relay| self.lacking(number, relay));
            let lacking: Vec<String> =
                lacking.map(|event| format!("{} {} {}", event.kind, event.created_at, event.id)).collect();
            text += &format!("\ndevice {number}: {:?}, due {:?}", memory.outbox.status(), memory.state.due([]));
            text += &format!(", links {:?}, relays lack {lacking:?}", memory.links);
        }
        for relay in &self.relays {
            let held = relay.store.events().map(|event| {
                format!("{} {:?} {} {}", event.kind, event.tags.values("d").next(), event.created_at, event.id)
            });
            text += &format!("\nrelay at {} s: {:#?}", self.now_ms / 1000, held.collect::<Vec<_>>());
        }
        text
    }
}

impl SimRelay {
    fn new(chance: &mut Chance, rules: Rules) -> SimRelay {
        SimRelay {
            store: SimStore::new(rules, true),
            slots: chance.percent(70),
            other_words: chance.percent(30),
            forgetful: chance.percent(25),
            stored_ever: BTreeSet::new(),
        }
    }

    /// How the relay words a verdict.
    fn words(&self, verdict: Verdict) -> (bool, String) {
        match verdict {
            Verdict::Superseded if self.other_words => (false, "replaced: have newer event".to_owned()),
            Verdict::Deleted if self.other_words => (false, "deleted: user requested deletion".to_owned()),
            verdict => (verdict.is_accepted(), verdict.to_string()),
        }
    }
}
