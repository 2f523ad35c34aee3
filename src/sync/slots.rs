//! What is left of the versions of addresses and of single events when replacement and deletion are done: the same that
//! a relay is left with, whatever came first.
//!
//! In: versions, and what deletion requests name. Out: the value of each address. The rules are those of
//! [`crate::protocol::supersede`]; kept apart from it because a client merges states and does not keep the requests.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::protocol::supersede::{self, Address, Target, Version};
use crate::protocol::{Event, EventId, Kind, PublicKey};

/// The winning version of each address.
#[derive(Clone, Debug)]
pub struct Slots<T> {
    held: BTreeMap<Address, (Version, T)>,
    /// The ids of those versions: most requests name none of them, and need no search then.
    ids: HashSet<EventId>,
    /// A version that was deleted by its id: what it had replaced stays replaced.
    floors: BTreeMap<Address, Version>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Slots { held: BTreeMap::new(), ids: HashSet::new(), floors: BTreeMap::new() }
    }
}

impl<T> Slots<T> {
    /// The value at an address.
    pub fn get(&self, address: &Address) -> Option<&T> {
        self.held.get(address).map(|(_, value)| value)
    }

    /// The winning version at an address.
    pub fn version(&self, address: &Address) -> Option<Version> {
        self.held.get(address).map(|(version, _)| *version)
    }

    /// All values, by address.
    pub fn iter(&self) -> impl Iterator<Item = (&Address, &T)> {
        self.held.iter().map(|(address, (_, value))| (address, value))
    }

    /// Takes a version. Whether it is now the value.
    pub fn put(&mut self, address: Address, version: Version, value: T, deletions: &Deletions) -> bool {
        if deletions.covers(&address.pubkey, &version.id) {
            self.raise_floor(&address, version);
            return false;
        }
        let wins = |over: Option<&Version>| over.is_none_or(|over| version.replaces(over));
        let alive = deletions.until(&address).is_none_or(|until| version.created_at > until);
        let wins = alive && wins(self.floors.get(&address)) && wins(self.held.get(&address).map(|(held, _)| held));
        if wins {
            self.ids.insert(version.id);
            if let Some((replaced, _)) = self.held.insert(address, (version, value)) {
                self.ids.remove(&replaced.id);
            }
        }
        wins
    }

    /// Drops what `news`, just taken into `deletions`, covers. What it was, and where.
    pub fn obey(&mut self, deletions: &Deletions, news: &News) -> Vec<(Address, T)> {
        if news.vanished || news.ids.iter().any(|id| self.ids.contains(id)) {
            return self.obey_all(deletions);
        }
        self.drop_covered(deletions, news.addresses.clone())
    }

    /// As [`Slots::obey`], for whatever deletions have not been obeyed yet: looks at everything.
    pub fn obey_all(&mut self, deletions: &Deletions) -> Vec<(Address, T)> {
        let covered = self.held.iter().filter(|(address, (version, _))| deletions.cover_version(address, version));
        let covered = covered.map(|(address, _)| address.clone()).collect();
        self.drop_covered(deletions, covered)
    }

    fn drop_covered(&mut self, deletions: &Deletions, addresses: Vec<Address>) -> Vec<(Address, T)> {
        let mut dropped = Vec::new();
        for address in addresses {
            let Some((version, _)) = self.held.get(&address) else { continue };
            let version = *version;
            if !deletions.cover_version(&address, &version) {
                continue;
            }
            if let Some(value) = self.take_out(&address) {
                if deletions.covers(&address.pubkey, &version.id) {
                    self.raise_floor(&address, version);
                }
                dropped.push((address, value));
            }
        }
        dropped
    }

    fn take_out(&mut self, address: &Address) -> Option<T> {
        let (version, value) = self.held.remove(address)?;
        self.ids.remove(&version.id);
        Some(value)
    }

    /// Takes everything of another state, made from other events. `deletions` are those of both.
    pub fn merge(&mut self, other: Slots<T>, deletions: &Deletions) {
        for (address, version) in other.floors {
            self.raise_floor(&address, version);
        }
        self.obey_all(deletions);
        for (address, (version, value)) in other.held {
            self.put(address, version, value, deletions);
        }
    }

    fn raise_floor(&mut self, address: &Address, version: Version) {
        let floor = self.floors.entry(address.clone()).or_insert(version);
        if version.replaces(floor) {
            *floor = version;
        }
        if self.held.get(address).is_some_and(|(held, _)| !held.replaces(floor)) {
            self.take_out(address);
        }
    }
}

/// What a request says that was not known before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Addresses, of which older versions are deleted now.
    pub addresses: Vec<Address>,
    /// Events, deleted if the author of the request wrote them.
    pub ids: Vec<EventId>,
    /// Somebody vanished: anything of theirs may be deleted.
    pub vanished: bool,
}

impl News {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == News::default()
    }
}

/// What deletion requests (NIP-09) and requests to vanish everywhere (NIP-62) name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deletions {
    addresses: BTreeMap<Address, u64>,
    /// Ids, each with who asked: only an event's author can.
    ids: BTreeSet<(PublicKey, EventId)>,
    vanished: BTreeMap<PublicKey, u64>,
}

impl Deletions {
    /// Takes a request; what it says that is new. Nothing for other events.
    pub fn take(&mut self, request: &Event) -> News {
        let mut news = News::default();
        match request.kind {
            Kind::DELETION => {
                for target in supersede::deletion_targets(request) {
                    self.take_target(request, target, &mut news);
                }
            }
            Kind::VANISH if request.tags.values("relay").any(|relay| relay == "ALL_RELAYS") => {
                news.vanished = raise(&mut self.vanished, request.pubkey, request.created_at);
            }
            _ => {}
        }
        news
    }

    fn take_target(&mut self, request: &Event, target: Target, news: &mut News) {
        match target {
            Target::Event(id) => {
                if self.ids.insert((request.pubkey, id)) {
                    news.ids.push(id);
                }
            }
            Target::Address(address) => {
                if raise(&mut self.addresses, address.clone(), request.created_at) {
                    news.addresses.push(address);
                }
            }
        }
    }

    /// Versions of this address up to this second are deleted.
    pub fn until(&self, address: &Address) -> Option<u64> {
        let asked = self.addresses.get(address).copied();
        asked.max(self.vanished.get(&address.pubkey).copied())
    }

    /// Whether the author deleted this event by its id.
    pub fn covers(&self, author: &PublicKey, id: &EventId) -> bool {
        self.ids.contains(&(*author, *id))
    }

    /// Whether a version of an address is deleted.
    fn cover_version(&self, address: &Address, version: &Version) -> bool {
        let by_time = || self.until(address).is_some_and(|until| version.created_at <= until);
        self.covers(&address.pubkey, &version.id) || by_time()
    }

    /// Whether an event without an address is deleted.
    pub fn cover_event(&self, event: &Event) -> bool {
        self.cover(&event.pubkey, &event.id, event.created_at)
    }

    /// Whether an event without an address, given by what matters of it, is deleted.
    pub fn cover(&self, author: &PublicKey, id: &EventId, created_at: u64) -> bool {
        self.covers(author, id) || self.vanished.get(author).is_some_and(|until| created_at <= *until)
    }

    /// Takes everything of another state.
    pub fn merge(&mut self, other: Deletions) {
        self.ids.extend(other.ids);
        other.addresses.into_iter().for_each(|(address, until)| _ = raise(&mut self.addresses, address, until));
        other.vanished.into_iter().for_each(|(key, until)| _ = raise(&mut self.vanished, key, until));
    }
}

fn raise<K: Ord>(map: &mut BTreeMap<K, u64>, key: K, until: u64) -> bool {
    match map.get_mut(&key) {
        Some(have) if *have >= until => return false,
        Some(have) => *have = until,
        None => drop(map.insert(key, until)),
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::protocol::Verified;
    use crate::protocol::testing::{NOW, sign};
    use crate::store::Store;
    use crate::store::memory::MemoryStore;

    /// A version of one of two addresses, or a request that names an address or any event before it.
    #[derive(Clone, Debug)]
    enum Made {
        Version { d: bool, second: u64, text: u8 },
        DeleteAddress { d: bool, second: u64 },
        DeleteId { of: Index, second: u64 },
    }

    fn made() -> impl Strategy<Value = Made> {
        let second = || 0..4_u64;
        prop_oneof![
            6 => (any::<bool>(), second(), 0..3_u8).prop_map(|(d, second, text)| Made::Version { d, second, text }),
            1 => (any::<bool>(), second()).prop_map(|(d, second)| Made::DeleteAddress { d, second }),
            2 => (any::<Index>(), second()).prop_map(|(of, second)| Made::DeleteId { of, second }),
        ]
    }

    fn events(made: &[Made]) -> Vec<Verified<Event>> {
        let mut events: Vec<Verified<Event>> = Vec::new();
        let me = sign(1, 1, NOW, &[], "").pubkey;
        let name = |d: bool| if d { "x" } else { "y" };
        for made in made {
            let event = match made {
                Made::Version { d, second, text } => {
                    sign(1, 30_001, NOW + second, &[&["d", name(*d)]], &text.to_string())
                }
                Made::DeleteAddress { d, second } => {
                    sign(1, 5, NOW + second, &[&["a", &format!("30001:{me}:{}", name(*d))]], "")
                }
                Made::DeleteId { of, second } => {
                    let target = if events.is_empty() { EventId([7; 32]) } else { of.get(&events).id };
                    sign(1, 5, NOW + second, &[&["e", &target.to_hex()]], "")
                }
            };
            events.push(event);
        }
        events
    }

    #[derive(Clone, Default)]
    struct State {
        slots: Slots<EventId>,
        deletions: Deletions,
    }

    impl State {
        fn of<'e>(events: impl IntoIterator<Item = &'e Verified<Event>>) -> State {
            let mut state = State::default();
            for event in events {
                match Address::of(event) {
                    Some(address) => {
                        _ = state.slots.put(address, Version::of(event), event.id, &state.deletions);
                    }
                    None => {
                        let news = state.deletions.take(event);
                        _ = state.slots.obey(&state.deletions, &news);
                    }
                }
            }
            state
        }

        fn merged(mut self, other: State) -> State {
            self.deletions.merge(other.deletions);
            self.slots.merge(other.slots, &self.deletions);
            self
        }

        fn ids(&self) -> Vec<EventId> {
            assert!(
                self.slots.iter().all(|(_, id)| self.slots.ids.contains(id))
                    && self.slots.ids.len() == self.slots.held.len()
            );
            let mut ids: Vec<EventId> = self.slots.iter().map(|(_, id)| *id).collect();
            ids.sort();
            ids
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() })]

        /// Laws 1 to 5 for versions and deletions: what stays is what a relay keeps, in any order, split and merged in any way.
        #[test]
        fn law_4_what_stays_is_what_a_relay_keeps(made in vec(made(), 0..14), salts in vec(any::<u64>(), 14)) {
            let events = events(&made);
            let relay = MemoryStore::new();
            relay.apply(&events, NOW).unwrap();
            let here = State::of(&events);
            let mut kept: Vec<EventId> = events
                .iter()
                .filter(|event| Address::of(event).is_some() && relay.contains(&event.id).unwrap())
                .map(|event| event.id)
                .collect();
            kept.sort();
            kept.dedup();
            prop_assert_eq!(here.ids(), kept);
            let mut mixed: Vec<(u64, &Verified<Event>)> = salts.iter().copied().zip(&events).collect();
            mixed.sort_by_key(|(salt, _)| *salt);
            prop_assert_eq!(State::of(mixed.iter().map(|(_, event)| *event)).ids(), here.ids());
            let part = |wanted: u64| State::of(mixed.iter().filter(|(salt, _)| salt % 3 == wanted).map(|(_, event)| *event));
            let (a, b, c) = (part(0), part(1), part(2));
            let left = a.clone().merged(b.clone()).merged(c.clone());
            prop_assert_eq!(left.ids(), here.ids());
            prop_assert_eq!(c.clone().merged(a.clone()).merged(b.clone()).ids(), here.ids());
            prop_assert_eq!(a.clone().merged(b.merged(c)).ids(), here.ids());
            prop_assert_eq!(left.clone().merged(left.clone()).merged(a).ids(), here.ids());
        }
    }
}
