//! What a relay and a device's cache keep: the reference store, with what it keeps at hand.

use std::collections::BTreeMap;

use sledge::protocol::slot::{self, Slot};
use sledge::protocol::supersede::{self, Address, Target, Verdict, Version};
use sledge::protocol::{Event, EventId, Kind, Verified};
use sledge::store::memory::MemoryStore;
use sledge::store::{Removal, Store};

use super::rules::{Rule, Rules};

/// The reference store's verdicts; and which events it shows.
pub struct SimStore {
    memory: MemoryStore,
    held: BTreeMap<EventId, Verified<Event>>,
    by_address: BTreeMap<Address, EventId>,
    /// Versions of settings, former ones too.
    versions: Vec<slot::Version>,
    rules: Rules,
    /// It is a relay's, to which some rules are addressed.
    of_relay: bool,
}

impl SimStore {
    pub fn new(rules: Rules, of_relay: bool) -> SimStore {
        SimStore {
            memory: MemoryStore::new(),
            held: BTreeMap::new(),
            by_address: BTreeMap::new(),
            versions: Vec::new(),
            rules,
            of_relay,
        }
    }

    /// Takes an event, as a relay at `now` (seconds) would.
    pub fn apply(&mut self, event: &Verified<Event>, now: u64) -> Verdict {
        let verdict = self.memory.apply(std::slice::from_ref(event), now).unwrap().verdicts[0];
        let broken = match verdict {
            Verdict::Superseded => self.of_relay && !self.rules.hold(Rule::RelaysKeepTheWinner),
            Verdict::Deleted => self.of_relay && !self.rules.hold(Rule::DeletionsWinTies) && self.is_tie(event),
            _ => false,
        };
        if verdict == Verdict::Store && is_slot(event) {
            self.hold_version(event);
        } else if verdict == Verdict::Store || broken {
            self.hold(event);
        }
        if broken { Verdict::Store } else { verdict }
    }

    /// Holds an event, and lets go of what it replaces or deletes.
    fn hold(&mut self, event: &Verified<Event>) {
        self.held.insert(event.id, event.clone());
        if let Some(old) = Address::of(event).and_then(|address| self.by_address.insert(address, event.id)) {
            self.held.remove(&old);
        }
        if event.kind == Kind::DELETION {
            for target in supersede::deletion_targets(event) {
                let id = match target {
                    Target::Event(id) => Some(id),
                    Target::Address(address) => self.by_address.get(&address).copied(),
                };
                if let Some(id) = id.filter(|id| !self.memory.contains(id).unwrap()) {
                    self.held.remove(&id);
                }
            }
        }
    }

    fn is_tie(&self, event: &Event) -> bool {
        let requests = self.held.values().filter(|request| request.kind == Kind::DELETION);
        requests.map(|request| request.created_at).max() == Some(event.created_at)
    }

    /// Heads can be seen; former versions are only kept.
    fn hold_version(&mut self, event: &Verified<Event>) {
        self.held.insert(event.id, event.clone());
        self.versions.push(slot::Version::of(event));
        let memory = &self.memory;
        self.versions.retain(|version| memory.contains(&version.id).unwrap());
        let former = Slot::new(self.versions.clone()).former();
        self.held.retain(|id, old| !is_slot(old) || (!former.contains(id) && memory.contains(id).unwrap()));
    }

    /// Whether an event is kept, seen or not.
    pub fn keeps(&self, id: &EventId) -> bool {
        self.held.contains_key(id) || self.memory.contains(id).unwrap()
    }

    pub fn get(&self, id: &EventId) -> Option<&Verified<Event>> {
        self.held.get(id)
    }

    pub fn events(&self) -> impl Iterator<Item = &Verified<Event>> {
        self.held.values()
    }

    pub fn newest(&self) -> u64 {
        self.held.values().map(|event| event.created_at).max().unwrap_or(0)
    }

    /// The version at an address.
    pub fn winner(&self, address: &Address) -> Option<Version> {
        let id = self.by_address.get(address)?;
        self.held.get(id).map(|event| Version::of(event))
    }

    /// Loses events for no reason.
    pub fn forget(&mut self, ids: &[EventId]) {
        self.memory.remove(ids, Removal::Evicted).unwrap();
        self.held.retain(|id, _| !ids.contains(id));
        self.by_address.retain(|_, id| !ids.contains(id));
        self.versions.retain(|version| !ids.contains(&version.id));
    }
}

/// Whether an event is a version of our settings, which live in a slot of their own.
pub fn is_slot(event: &Event) -> bool {
    slot::is_version(event)
}
