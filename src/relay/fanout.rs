//! Live fan-out: which open subscriptions does an event reach?
//!
//! In: accepted events, from the writer alone, in the order of writing. Out: messages in the [`Outbox`]es of the
//! connections, all sharing one copy of the JSON. Never reads the store, never waits.
//!
//! **Index.** Each filter is filed under the values of one field, the most telling that it has: ids, else authors, else
//! one tag, else kinds, else a term that every event has. An event looks up its own values and only the subscriptions
//! found there are asked [`Filter::matches`]. Values are filed by a keyed 64-bit hash; a collision costs a needless
//! question, never a wrong answer.
//!
//! **Who may see it.** Whether an event is private is found out once an event; a public one costs its subscriptions
//! nothing more. When a client authenticates, its open subscriptions see more from that moment on.
//!
//! **Stored and live join without gap or repeat.** The writer makes a batch readable in the store, then calls
//! [`Fanout::begin_batch`], and only then answers and dispatches. A subscription that registers before that call gets
//! the batch live and its query does not look past the position before it; one that registers after gets it from the
//! store alone. Events that other processes stored before a batch are dispatched with it, and those that come without
//! one are a batch by themselves, so the same holds for them.

use std::collections::hash_map::{Entry, RandomState};
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::counters::Counters;
use super::lock;
use super::outbox::{LiveEvent, Outbox, Outgoing, Serial};
use crate::protocol::slot;
use crate::protocol::visibility::PrivateKinds;
use crate::protocol::{Event, Filter, Verified, Visibility};
use crate::store::{FromElsewhere, Position};

/// Number of a batch of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// All open subscriptions.
pub struct Fanout(Mutex<Registry>, Counters);

struct Registry {
    epoch: Epoch,
    readable: Position,
    /// Where a subscription lies in `slots`.
    places: HashMap<(u64, Serial), u32>,
    slots: Vec<Option<Subscription>>,
    free: Vec<u32>,
    index: Index,
    keys: RandomState,
    private: Arc<PrivateKinds>,
    events_dispatched: u64,
}

struct Subscription {
    outbox: Arc<Outbox>,
    serial: Serial,
    /// The last batch that its stored query covers.
    since: Epoch,
    /// The last event it was asked about, so that no event asks twice.
    asked: u64,
    filters: Box<[Filter]>,
    visible: Visibility,
}

impl Fanout {
    /// No subscriptions; events before `readable` are in the store, `private` kinds are not for all.
    pub fn new(readable: Position, private: Arc<PrivateKinds>) -> Self {
        Fanout(
            Mutex::new(Registry {
                epoch: Epoch::default(),
                readable,
                places: HashMap::new(),
                slots: Vec::new(),
                free: Vec::new(),
                index: Index::default(),
                keys: RandomState::new(),
                private,
                events_dispatched: 0,
            }),
            Counters::default(),
        )
    }

    /// What the relay counts; kept here, since every part of it that counts knows the subscriptions.
    pub fn counters(&self) -> &Counters {
        &self.1
    }

    /// Registers a subscription. From now on it gets matching events live as far as its reader may see them, except those
    /// before the returned position, which the store has. A `serial` must not be used twice by one connection.
    pub fn subscribe(&self, outbox: &Arc<Outbox>, serial: Serial, filters: &[Filter], visible: Visibility) -> Position {
        // Clones hold no spare capacity, unlike what a parser leaves behind; they stay as long as the subscription.
        let filters: Box<[Filter]> = filters.iter().filter(|filter| !filter.matches_nothing()).cloned().collect();
        let mut registry = lock(&self.0);
        let since = registry.epoch;
        registry.insert(Subscription { outbox: outbox.clone(), serial, since, asked: 0, filters, visible });
        registry.readable
    }

    /// From now on the reader of a subscription may see this; an unknown subscription is passed over.
    pub fn set_visible(&self, outbox: &Outbox, serial: Serial, visible: Visibility) {
        let mut registry = lock(&self.0);
        let slot = registry.places.get(&(outbox.connection, serial)).copied();
        if let Some(subscription) = slot.and_then(|slot| registry.slots[slot as usize].as_mut()) {
            subscription.visible = visible;
        }
    }

    /// Ends a subscription; an unknown one is passed over.
    pub fn unsubscribe(&self, outbox: &Outbox, serial: Serial) {
        lock(&self.0).remove(outbox, serial);
    }

    /// How many subscriptions are open.
    pub fn len(&self) -> usize {
        lock(&self.0).places.len()
    }

    /// Whether no subscription is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Says that a batch can be read from the store, up to `end` if it stored anything. To be called before its events
    /// are answered and dispatched.
    pub fn begin_batch(&self, end: Option<Position>) -> Epoch {
        let mut registry = lock(&self.0);
        registry.readable = end.unwrap_or(registry.readable);
        registry.epoch.0 += 1;
        registry.epoch
    }

    /// Puts an event of `batch` into the outbox of every subscription that wants it, once each. Returns how many there
    /// were. Holds the registry for this one event only, so that subscribing waits for no batch.
    pub fn dispatch(&self, batch: Epoch, event: &Verified<Event>) -> usize {
        self.counted(lock(&self.0).dispatch(batch, event, &event.canonical().json))
    }

    /// As [`Fanout::dispatch`], for an event that another process has checked and stored.
    pub fn dispatch_from_elsewhere(&self, batch: Epoch, FromElsewhere { event, json }: &FromElsewhere) -> usize {
        self.counted(lock(&self.0).dispatch(batch, event, json))
    }

    fn counted(&self, delivered: usize) -> usize {
        self.1.deliveries.add(delivered);
        delivered
    }
}

impl Registry {
    fn insert(&mut self, subscription: Subscription) {
        let slot = self.free.pop().unwrap_or(self.slots.len() as u32);
        for filter in &subscription.filters {
            for_each_term(filter, &self.keys, |term| self.index.insert(term, slot));
        }
        self.places.insert((subscription.outbox.connection, subscription.serial), slot);
        match self.slots.get_mut(slot as usize) {
            Some(place) => *place = Some(subscription),
            None => self.slots.push(Some(subscription)),
        }
    }

    fn remove(&mut self, outbox: &Outbox, serial: Serial) {
        let Some(slot) = self.places.remove(&(outbox.connection, serial)) else {
            return;
        };
        let subscription = self.slots[slot as usize].take().expect("a place names a slot that is taken");
        self.free.push(slot);
        for filter in &subscription.filters {
            for_each_term(filter, &self.keys, |term| self.index.remove(term, slot));
        }
        if self.places.is_empty() {
            // Vectors and maps keep their size when they empty; after a rush of clients that would be for ever.
            (self.places, self.slots, self.free, self.index) = Default::default();
        }
    }

    fn dispatch(&mut self, batch: Epoch, event: &Event, json: &Bytes) -> usize {
        self.events_dispatched += 1;
        let (number, slots, index) = (self.events_dispatched, &mut self.slots, &self.index);
        let audience = self.private.audience(event);
        let is_settings = slot::is_version(event);
        let asks = |filter: &Filter| filter.matches(event) && (!is_settings || slot::is_asked_for(filter));
        let mut shared = None;
        let mut delivered = 0;
        let mut ask = |slot: u32| {
            let subscription = slots[slot as usize].as_mut().expect("terms name slots that are taken");
            if subscription.asked == number || subscription.since >= batch {
                return;
            }
            subscription.asked = number;
            let may_see = audience.as_ref().is_none_or(|audience| subscription.visible.is_among(audience));
            if may_see && subscription.filters.iter().any(asks) {
                let shared = shared.get_or_insert_with(|| LiveEvent::new(json.clone()));
                subscription.outbox.push(Outgoing::Live { serial: subscription.serial, event: shared.clone() });
                delivered += 1;
            }
        };
        for_each_event_term(event, &self.keys, |term| index.for_each(term, &mut ask));
        delivered
    }
}

/// A value of a field, hashed with a key of this process so that nobody can aim for collisions.
type Term = u64;

#[derive(Hash)]
enum Value<'a> {
    Id(&'a [u8; 32]),
    Author(&'a [u8; 32]),
    Tag(u8, &'a str),
    Kind(u16),
    /// What every event has.
    Any,
}

/// The terms that a filter is filed under.
fn for_each_term(filter: &Filter, keys: &RandomState, mut file: impl FnMut(Term)) {
    let mut file = |value: Value| file(keys.hash_one(value));
    if let Some(ids) = &filter.ids {
        ids.iter().for_each(|id| file(Value::Id(&id.0)));
    } else if let Some(authors) = &filter.authors {
        authors.iter().for_each(|author| file(Value::Author(&author.0)));
    } else if let Some(tag) = filter.tags.iter().min_by_key(|condition| condition.values.len()) {
        tag.values.iter().for_each(|value| file(Value::Tag(tag.letter.as_byte(), value)));
    } else if let Some(kinds) = &filter.kinds {
        kinds.iter().for_each(|kind| file(Value::Kind(kind.0)));
    } else {
        file(Value::Any);
    }
}

/// The terms under which filters that match `event` may be filed.
fn for_each_event_term(event: &Event, keys: &RandomState, mut look_up: impl FnMut(Term)) {
    let mut look_up = |value: Value| look_up(keys.hash_one(value));
    look_up(Value::Id(&event.id.0));
    look_up(Value::Author(&event.pubkey.0));
    let indexed = event.tags.iter().filter_map(|tag| tag.indexed());
    indexed.for_each(|(letter, value)| look_up(Value::Tag(letter.as_byte(), value)));
    look_up(Value::Kind(event.kind.0));
    look_up(Value::Any);
}

/// Terms are hashes already.
#[derive(Default)]
struct TermHasher(u64);

impl Hasher for TermHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("terms are u64");
    }

    fn write_u64(&mut self, term: u64) {
        self.0 = term;
    }
}

/// The subscriptions filed under each term.
#[derive(Default)]
struct Index {
    terms: HashMap<Term, Filed, BuildHasherDefault<TermHasher>>,
    sets: Vec<BTreeSet<u32>>,
    free_sets: Vec<u32>,
}

/// Most authors are followed by one subscription only, so that case takes no set; a term takes 16 bytes in all.
#[derive(Clone, Copy)]
enum Filed {
    /// This subscription.
    One(u32),
    /// The subscriptions in this set, at least two.
    Set(u32),
}

impl Index {
    fn insert(&mut self, term: Term, slot: u32) {
        match self.terms.entry(term) {
            Entry::Vacant(entry) => drop(entry.insert(Filed::One(slot))),
            Entry::Occupied(mut entry) => match *entry.get() {
                Filed::One(only) if only == slot => {}
                Filed::One(only) => {
                    let number = self.free_sets.pop().unwrap_or(self.sets.len() as u32);
                    if number as usize == self.sets.len() {
                        self.sets.push(BTreeSet::new());
                    }
                    self.sets[number as usize].extend([only, slot]);
                    entry.insert(Filed::Set(number));
                }
                Filed::Set(number) => drop(self.sets[number as usize].insert(slot)),
            },
        }
    }

    /// Takes `slot` from under `term`, where it may have been taken already.
    fn remove(&mut self, term: Term, slot: u32) {
        let Entry::Occupied(mut entry) = self.terms.entry(term) else {
            return;
        };
        match *entry.get() {
            Filed::One(only) if only == slot => drop(entry.remove()),
            Filed::One(_) => {}
            Filed::Set(number) => {
                let set = &mut self.sets[number as usize];
                set.remove(&slot);
                if set.len() == 1
                    && let Some(last) = set.pop_first()
                {
                    entry.insert(Filed::One(last));
                    self.free_sets.push(number);
                }
            }
        }
    }

    fn for_each(&self, term: Term, ask: &mut impl FnMut(u32)) {
        match self.terms.get(&term) {
            None => {}
            Some(Filed::One(slot)) => ask(*slot),
            Some(Filed::Set(number)) => self.sets[*number as usize].iter().for_each(|slot| ask(*slot)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::protocol::testing::{Author, NOW};
    use crate::protocol::{EventId, Kind, PublicKey};
    use crate::relay::outbox::tests::drain;

    fn serials(outbox: &Outbox) -> Vec<Serial> {
        let live = drain(outbox).into_iter().map(|message| match message {
            Outgoing::Live { serial, .. } => serial,
            other => panic!("unexpected {other:?}"),
        });
        let mut serials: Vec<Serial> = live.collect();
        serials.sort_unstable();
        serials
    }

    fn filter(json: &str) -> Filter {
        Filter::from_json(json).unwrap()
    }

    /// Several matching filters, and terms that occur twice in an event, still give one delivery.
    #[test]
    fn an_event_reaches_a_subscription_once() {
        let fanout = Fanout::new(Position(0), Arc::default());
        let outbox = Outbox::new(1, 1 << 20);
        fanout.subscribe(
            &outbox,
            7,
            &[filter("{}"), filter(r#"{"kinds":[1]}"#), filter(r##"{"#t":["a","b"]}"##)],
            Visibility::everything(),
        );
        let tags = [vec!["t", "a"], vec!["t", "a"], vec!["t", "b"]];
        let event = Verified::check(Author::new(1).event(1, NOW, &tags, "")).unwrap();
        let batch = fanout.begin_batch(None);
        assert_eq!(fanout.dispatch(batch, &event), 1);
        assert_eq!(serials(&outbox), [7]);
    }

    /// Whoever registers after a batch became readable gets it from the store, not live; whoever was there before gets
    /// it live and is told the position before it (T26).
    #[test]
    fn t26_the_seam_between_stored_and_live() {
        let fanout = Fanout::new(Position(3), Arc::default());
        let outbox = Outbox::new(1, 1 << 20);
        let event = Author::new(1).note(NOW, "");
        assert_eq!(fanout.subscribe(&outbox, 1, &[filter("{}")], Visibility::everything()), Position(3));
        let batch = fanout.begin_batch(Some(Position(4)));
        assert_eq!(fanout.subscribe(&outbox, 2, &[filter("{}")], Visibility::everything()), Position(4));
        fanout.dispatch(batch, &event);
        assert_eq!(serials(&outbox), [1]);
        let next = fanout.begin_batch(None);
        fanout.dispatch(next, &event);
        assert_eq!(serials(&outbox), [1, 2]);
    }

    /// A private event reaches the author and whom it names; who has authenticated meanwhile is among them (T34).
    #[test]
    fn t34_private_events_reach_those_involved() {
        let private = Arc::new(PrivateKinds::new([4..=4]));
        let fanout = Fanout::new(Position(0), private.clone());
        let key = |author| Author::new(author).note(NOW, "").pubkey;
        let as_seen_by =
            |keys: &[u8]| Visibility::of(private.clone(), keys.iter().map(|author| key(*author)).collect());
        let outbox = Outbox::new(1, 1 << 20);
        for (serial, keys) in [&[] as &[u8], &[1], &[2], &[3], &[3, 2]].into_iter().enumerate() {
            fanout.subscribe(&outbox, serial as Serial, &[filter("{}")], as_seen_by(keys));
        }
        let to = vec!["p".to_owned(), key(2).to_hex()];
        let letter = Verified::check(Author::new(1).event(4, NOW, &[to], "")).unwrap();
        let dispatch = |event: &Verified<Event>| {
            let batch = fanout.begin_batch(None);
            fanout.dispatch(batch, event)
        };
        dispatch(&letter);
        assert_eq!(serials(&outbox), [1, 2, 4]);
        assert_eq!(dispatch(&Author::new(1).note(NOW, "")), 5);
        serials(&outbox);
        fanout.set_visible(&outbox, 0, as_seen_by(&[2]));
        fanout.set_visible(&outbox, 9, as_seen_by(&[2]));
        dispatch(&letter);
        assert_eq!(serials(&outbox), [0, 1, 2, 4]);
    }

    /// What was registered is forgotten without a trace, whatever the order.
    #[test]
    fn unsubscribing_leaves_nothing_behind() {
        let fanout = Fanout::new(Position(0), Arc::default());
        let outbox = Outbox::new(1, 1 << 20);
        let filters = [filter(r#"{"kinds":[1,2]}"#), filter(r#"{"kinds":[2,3]}"#), filter("{}")];
        for serial in 0..9 {
            fanout.subscribe(&outbox, serial, &filters, Visibility::everything());
        }
        [4, 0, 8, 1, 7, 2, 6, 3, 5, 5].into_iter().for_each(|serial| fanout.unsubscribe(&outbox, serial));
        let registry = lock(&fanout.0);
        assert!(registry.places.is_empty() && registry.index.terms.is_empty() && registry.slots.is_empty());
    }

    /// Where several subscriptions share a term, one that leaves takes none of the others along.
    #[test]
    fn the_others_under_a_term_stay() {
        let fanout = Fanout::new(Position(0), Arc::default());
        let outbox = Outbox::new(1, 1 << 20);
        for serial in 0..4 {
            fanout.subscribe(&outbox, serial, &[filter(r#"{"kinds":[1]}"#)], Visibility::everything());
        }
        for (gone, left) in [(1, vec![0, 2, 3]), (3, vec![0, 2]), (0, vec![2]), (2, vec![])] {
            fanout.unsubscribe(&outbox, gone);
            let batch = fanout.begin_batch(None);
            fanout.dispatch(batch, &Author::new(1).note(NOW, ""));
            assert_eq!(serials(&outbox), left);
        }
    }

    /// Filters over a tiny alphabet, so that they often match.
    fn filters() -> impl Strategy<Value = Filter> {
        let authors: Vec<PublicKey> = (1..4).map(|n| Author::new(n).note(NOW, "").pubkey).collect();
        let list = |max: u16| prop::option::weighted(0.4, prop::collection::btree_set(0..max, 0..3));
        (list(3), list(3), list(3), list(3), list(6)).prop_map(move |(by, kinds, t, u, ids)| {
            let values = |set: Option<std::collections::BTreeSet<u16>>, key: &str| {
                set.map(|set| {
                    filter(&format!("{{\"#{key}\":{:?}}}", set.iter().map(u16::to_string).collect::<Vec<_>>()))
                })
            };
            let tags = [values(t, "t"), values(u, "u")].into_iter().flatten().flat_map(|filter| filter.tags).collect();
            Filter {
                authors: by.map(|set| {
                    let mut list: Vec<_> = set.iter().map(|n| authors[usize::from(*n)]).collect();
                    list.sort_unstable();
                    list
                }),
                kinds: kinds.map(|set| set.iter().map(|kind| Kind(*kind)).collect()),
                ids: ids.filter(|set| set.len() > 1).map(|set| set.iter().map(|n| EventId([*n as u8; 32])).collect()),
                tags,
                ..Filter::default()
            }
        })
    }

    /// A third of the kinds of these events.
    fn private_kinds() -> PrivateKinds {
        PrivateKinds::new([2..=2])
    }

    /// Clients that have proven some of the authors' keys, and operators.
    fn readers() -> impl Strategy<Value = Visibility> {
        let proven = prop::collection::vec(1u8..4, 0..3);
        prop::option::weighted(0.9, proven).prop_map(|proven| match proven {
            Some(proven) => {
                let keys = proven.into_iter().map(|author| Author::new(author).note(NOW, "").pubkey).collect();
                Visibility::of(Arc::new(private_kinds()), keys)
            }
            None => Visibility::everything(),
        })
    }

    fn events() -> impl Strategy<Value = Verified<Event>> {
        (1u8..4, 0u16..3, prop::collection::vec((prop::sample::select(vec!["t", "u"]), 0u16..3), 0..3)).prop_map(
            |(author, kind, tags)| {
                let tags: Vec<Vec<String>> =
                    tags.into_iter().map(|(name, value)| vec![name.to_owned(), value.to_string()]).collect();
                Verified::check(Author::new(author).event(kind, NOW, &tags, "")).unwrap()
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// The index reaches exactly the subscriptions that a linear scan finds, among those that may see the event.
        #[test]
        fn the_index_agrees_with_a_linear_scan(
            subscriptions in prop::collection::vec((prop::collection::vec(filters(), 1..3), readers()), 1..20),
            gone in prop::collection::vec(0usize..20, 0..8),
            events in prop::collection::vec(events(), 1..4),
        ) {
            let fanout = Fanout::new(Position(0), Arc::new(private_kinds()));
            let outbox = Outbox::new(1, 1 << 20);
            for (serial, (filters, visible)) in subscriptions.iter().enumerate() {
                fanout.subscribe(&outbox, serial as Serial, filters, visible.clone());
            }
            gone.iter().for_each(|serial| fanout.unsubscribe(&outbox, *serial as Serial));
            let batch = fanout.begin_batch(None);
            for event in &events {
                fanout.dispatch(batch, event);
                let expected: Vec<Serial> = (0..subscriptions.len())
                    .filter(|serial| !gone.contains(serial))
                    .filter(|serial| subscriptions[*serial].1.allows(&**event))
                    .filter(|serial| subscriptions[*serial].0.iter().any(|filter| filter.matches(&**event)))
                    .map(|serial| serial as Serial)
                    .collect();
                prop_assert_eq!(serials(&outbox), expected);
            }
        }
    }
}
