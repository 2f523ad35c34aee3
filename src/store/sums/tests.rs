//! Sums against a plain scan, while events come and go between the portions in which sums are made.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use secp256k1::rand::rngs::StdRng;
use secp256k1::rand::{Rng, SeedableRng};

use super::*;
use crate::protocol::label::NAMESPACE;
use crate::protocol::testing::{Author, sign};
use crate::protocol::visibility::PrivateKinds;
use crate::protocol::{Event, EventId, PublicKey, Verified};
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::testing::{contents, open};
use crate::store::{Progress, Removal, Store, Summed, Wanted};

/// The store's clock; events with an expiration below it are gone.
const NOW: u64 = 1_000;
const SECONDS: std::ops::Range<u64> = 0..60;

fn key(author: u8) -> PublicKey {
    Author::new(author).note(1, "").pubkey
}

fn reader(keys: &[u8]) -> Visibility {
    let private = Arc::new(PrivateKinds::new([4..=4, 1059..=1059]));
    Visibility::of(private, keys.iter().map(|author| key(*author)).collect())
}

fn query(filter: &str, visible: Visibility) -> Query {
    let filter = Filter::from_json(filter).unwrap();
    Query { wanted: vec![Wanted { filter, limit: usize::MAX, whole_seconds: false }], now: NOW, before: None, visible }
}

/// What a plain scan finds, in the order of reconciliation.
fn listed(store: &EmbeddedStore, query: &Query) -> Vec<Item> {
    let mut items = Vec::new();
    let mut scan = store.scan(query.clone()).unwrap();
    assert_eq!(scan.items(Instant::now() + Duration::from_secs(60), &mut items).unwrap(), Progress::Finished);
    items.sort_unstable();
    items
}

/// Holds a set against the plain scan: all of it, and many ranges of it.
fn check(store: &EmbeddedStore, query: &Query, summed: &mut dyn Summed, random: &mut StdRng) {
    while summed.prepare(Instant::now()).unwrap() == Progress::Paused {}
    let expected = listed(store, query);
    let mut place = || match random.random_range(0..4) {
        0 => Item::at(random.random_range(SECONDS)),
        1 => Item { created_at: random.random_range(SECONDS), id: EventId(random.random()) },
        2 if !expected.is_empty() => expected[random.random_range(0..expected.len())],
        _ => [Item::FIRST, Item::END][random.random_range(0..2)],
    };
    let mut ranges = vec![(Item::FIRST, Item::END)];
    ranges.extend((0..12).map(|_| (place(), place())));
    for (from, to) in ranges {
        let expected: Vec<Item> = expected.iter().copied().filter(|item| from <= *item && *item < to).collect();
        assert_eq!(summed.sum(&from, &to).unwrap(), expected.iter().collect(), "{from:?} {to:?}");
        let mut found = Vec::new();
        summed.items(&from, &to, usize::MAX, &mut found).unwrap();
        assert_eq!(found, expected);
        found.clear();
        summed.items(&from, &to, 3, &mut found).unwrap();
        assert_eq!(found, expected[..expected.len().min(3)]);
        let cuts = summed.cuts(&from, &to, 16).unwrap();
        assert!(cuts.len() < 16 && cuts.is_sorted_by(|a, b| a < b), "{cuts:?}");
        assert!(cuts.iter().all(|cut| from < Item::at(*cut) && Item::at(*cut) < to), "{cuts:?}");
    }
}

/// One write of any kind.
fn write(store: &EmbeddedStore, known: &mut Vec<Verified<Event>>, random: &mut StdRng, number: usize) {
    let author = random.random_range(1..4);
    let at = random.random_range(SECONDS);
    let content = number.to_string();
    let expiration = (NOW + random.random_range(0..5)).to_string();
    let to = key(random.random_range(1..4)).to_hex();
    let target = known.get(random.random_range(0..known.len().max(1))).map_or(String::new(), |event| event.id.to_hex());
    let event = match random.random_range(0..40) {
        0..20 => sign(author, 1 + at as u16 % 2, at, &[&["t", "x"]], &content),
        20..23 => sign(author, 1, at, &[&["expiration", &expiration]], &content),
        23 => sign(author, 10_001, at, &[&["L", NAMESPACE], &["prev", &target]], &content),
        24..27 => sign(author, 4, at, &[&["p", &to]], &content),
        27..29 => sign(author, 1, at, &[&["L", NAMESPACE], &["p", &to]], &content),
        29..32 => sign(author, 0, at, &[], &content),
        32..34 => sign(author, 30_001, at, &[&["d", "x"]], &content),
        34..38 => sign(author, 5, at, &[&["e", &target]], &content),
        38 => sign(author, 62, random.random_range(0..6), &[&["relay", "ALL_RELAYS"]], &content),
        _ => {
            let gone: Vec<EventId> = known.iter().map(|event| event.id).filter(|_| random.random_bool(0.1)).collect();
            store.remove(&gone, Removal::Operator).unwrap();
            return;
        }
    };
    store.apply(std::slice::from_ref(&event), 1).unwrap();
    known.push(event);
}

/// Every filter that sums serve and every reader, made at any moment and worked on between writes, comes to what a plain
/// scan finds; so do sums that were complete before the writes (T34: nobody's private events are in them).
#[test]
fn t34_sums_follow_every_write_for_every_reader() {
    for seed in 0..2 {
        let mut random = StdRng::seed_from_u64(seed);
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let mut known = Vec::new();
        (0..200).for_each(|number| write(&store, &mut known, &mut random, number));
        let author = key(1).to_hex();
        let filters = [
            "{}".to_owned(),
            r#"{"kinds":[1]}"#.to_owned(),
            format!(r#"{{"authors":["{author}"]}}"#),
            format!(r##"{{"authors":["{author}"],"#L":["{NAMESPACE}"]}}"##),
            r##"{"#t":["x"],"since":9,"until":41}"##.to_owned(),
        ];
        let mut queries = Vec::new();
        for filter in &filters {
            for visible in [Visibility::everything(), reader(&[]), reader(&[1]), reader(&[2]), reader(&[1, 3])] {
                queries.push(query(filter, visible));
            }
        }
        for round in 0..2 {
            let mut sets: Vec<_> =
                queries.iter().map(|query| (query, store.summed(query, true).unwrap().unwrap())).collect();
            for number in 0..40 {
                let at = random.random_range(0..sets.len());
                sets[at].1.prepare(Instant::now()).unwrap();
                write(&store, &mut known, &mut random, 1_000 * (round + 1) + number);
            }
            drop(sets);
            for query in &queries {
                let mut summed = store.summed(query, false).unwrap().unwrap();
                check(&store, query, &mut *summed, &mut random);
            }
        }
        assert!(!contents(&store).is_empty());
    }
}

/// A flood in one second is one leaf, cut no further and tried once; the seconds around it are cut as ever.
#[test]
fn a_flood_in_one_second_is_one_leaf() {
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
    let mut events: Vec<_> = (0..300).map(|n| sign(1, 1, 30, &[], &n.to_string())).collect();
    events.extend((0..120).map(|n| sign(1, 1, n, &[], "around")));
    store.apply(&events, 1).unwrap();
    let everything = query("{}", Visibility::everything());
    let mut summed = store.summed(&everything, true).unwrap().unwrap();
    check(&store, &everything, &mut *summed, &mut StdRng::seed_from_u64(1));
    let sums = store.files().sums.find(&everything, false).unwrap();
    assert!(!sums.work(&store.files()).unwrap(), "nothing is left to do");
    let leaves = sums.leaves();
    let largest = leaves.leaves.iter().filter_map(|leaf| leaf.sum).map(|sum| sum.count).max().unwrap();
    assert!((301..320).contains(&largest), "{largest}");
    assert!(leaves.leaves.len() > 8, "{}", leaves.leaves.len());
}

/// Filters that need several stretches of the index, name ids or have a limit have no sums; only so many filters have
/// some, and the one asked for longest ago goes.
#[test]
fn which_filters_have_sums() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let id = "ab".repeat(32);
    for filter in [r#"{"kinds":[1,2]}"#.to_owned(), format!(r#"{{"ids":["{id}"]}}"#), r#"{"kinds":[]}"#.to_owned()] {
        assert!(store.summed(&query(&filter, reader(&[])), true).unwrap().is_none(), "{filter}");
    }
    let mut limited = query("{}", reader(&[]));
    limited.wanted[0].limit = 9;
    assert!(store.summed(&limited, true).unwrap().is_none());
    let of_kind = |kind: usize| query(&format!(r#"{{"kinds":[{kind}]}}"#), reader(&[]));
    for kind in 0..FILTERS_MAX {
        assert!(store.summed(&of_kind(kind), true).unwrap().is_some());
    }
    assert!(store.summed(&of_kind(0), false).unwrap().is_some());
    store.summed(&of_kind(FILTERS_MAX), true).unwrap();
    assert!(store.summed(&of_kind(0), false).unwrap().is_some());
    assert!(store.summed(&of_kind(1), false).unwrap().is_none());
}
