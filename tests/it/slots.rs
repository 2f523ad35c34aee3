//! The settings slot: versions of settings on kind 10001 beside the pinned notes of NIP-51, through a relay and in both
//! stores.

use std::collections::BTreeSet;
use std::path::Path;

use secp256k1::rand::rngs::StdRng;
use secp256k1::rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use sledge::protocol::supersede::Verdict;
use sledge::protocol::visibility::PrivateKinds;
use sledge::protocol::{Event, Filter, Visibility, label};
use sledge::store::memory::MemoryStore;
use sledge::store::{Query, Removal, Store};

use crate::support::client::request;
use crate::support::stores::{all, open_store, read, remove_indexes, row_ids};
use crate::support::{Client, Keys, NOW, Relay, json_of, verified};

const DAY: u64 = 24 * 60 * 60;

/// A version of settings that has taken in these.
fn version(keys: &Keys, created_at: u64, content: &str, prev: &[&Event]) -> Event {
    let draft = keys.draft(10_001, created_at).tag(["L", label::NAMESPACE]).tag(["d", "settings"]).content(content);
    prev.iter().fold(draft, |draft, event| draft.tag(["prev", &event.id.to_hex()])).sign()
}

fn by_label(keys: &Keys) -> Value {
    json!({"#L": [label::NAMESPACE], "kinds": [10001], "authors": [keys.hex()]})
}

async fn ids_of(client: &mut Client, filter: Value) -> BTreeSet<String> {
    client.query_ids(filter).await.into_iter().collect()
}

fn set(events: &[&Event]) -> BTreeSet<String> {
    events.iter().map(|event| event.id.to_hex()).collect()
}

/// A connection that has proven a key.
async fn proven(relay: &Relay, keys: &Keys) -> Client {
    let mut client = relay.client().await;
    client.prove(keys).await;
    client
}

/// A client that knows NIP-51 only, its pins (10001) and bookmarks (30001): byte for byte as if ours were not there, by
/// every question that such a client has, although it is the same author and authenticated.
#[tokio::test]
async fn a_pin_client_sees_plain_nip51() {
    let relay = Relay::start().await;
    let alice = Keys::new(1);
    let mut client = proven(&relay, &alice).await;
    let pins = |at, note: &str| alice.draft(10_001, at).tag(["e", note]).sign();
    let old_pins = pins(NOW, &"ab".repeat(32));
    let bookmarks = alice.draft(30_001, NOW).tag(["d", "bookmarks"]).tag(["t", "x"]).sign();
    client.store_all([&old_pins, &bookmarks]).await;
    let first = version(&alice, NOW + 5, "first", &[]);
    let chat = alice.draft(30_001, NOW + 6).tag(["d", "oa:c:1"]).tag(["L", label::NAMESPACE]).sign();
    client.store_all([&first, &chat]).await;
    let new_pins = pins(NOW + 7, &"cd".repeat(32));
    client.store(&new_pins).await;
    let second = version(&alice, NOW + 8, "second", &[&first]);
    client.store(&second).await;
    client.subscribe("live", &[json!({"kinds": [10001], "limit": 0})]).await;
    client.until_eose("live").await;
    for question in [
        json!({"kinds": [10001], "authors": [alice.hex()]}),
        json!({"kinds": [10001]}),
        json!({"authors": [alice.hex()], "kinds": [10001, 7], "limit": 1}),
        json!({"authors": [alice.hex()], "kinds": [10001], "#e": ["cd".repeat(32)]}),
    ] {
        let stored = client.query(question.clone()).await.events;
        let expected: Value = serde_json::from_str(&json_of(&new_pins)).unwrap();
        assert_eq!(stored, [expected], "{question}");
        assert_eq!(client.count(&[question]).await, 1);
    }
    assert_eq!(ids_of(&mut client, json!({"kinds": [30001], "#t": ["x"]})).await, set(&[&bookmarks]));
    assert_eq!(ids_of(&mut client, by_label(&alice)).await, set(&[&second]));
    assert_eq!(ids_of(&mut client, json!({"authors": [alice.hex()]})).await, set(&[&new_pins, &bookmarks, &chat]));

    // Deleting the pins by their address is not about settings; live, only the pins arrive.
    client.store(&version(&alice, NOW + 9, "third", &[&second])).await;
    client.store(&alice.deletion(NOW + 10, &[("a", &alice.address(10_001, ""))])).await;
    assert_eq!(client.query_ids(json!({"kinds": [10001]})).await, [""; 0]);
    assert_eq!(client.query_ids(by_label(&alice)).await.len(), 1);
    let last_pins = pins(NOW + 11, &"ef".repeat(32));
    client.store(&last_pins).await;
    assert_eq!(client.live_before("live", &last_pins.id.to_hex()).await, [""; 0]);
}

/// What nobody has taken in are the heads, whichever comes first; former versions are for their author, by id; and
/// REQ, COUNT, reconciliation and live events agree.
#[tokio::test]
async fn heads_are_what_no_version_names() {
    let relay = Relay::start().await;
    let (alice, bob) = (Keys::new(1), Keys::new(2));
    let mut client = proven(&relay, &alice).await;
    let base = version(&alice, NOW, "base", &[]);
    let (phone, laptop) = (version(&alice, NOW + 1, "phone", &[&base]), version(&alice, NOW + 1, "laptop", &[&base]));
    let merged = version(&alice, NOW + 2, "merged", &[&phone, &laptop]);
    client.store_all([&phone, &laptop]).await;
    client.subscribe("live", &[json!({"#L": [label::NAMESPACE], "limit": 0})]).await;
    client.until_eose("live").await;
    client.store(&base).await;
    assert_eq!(
        ids_of(&mut client, by_label(&alice)).await,
        set(&[&phone, &laptop]),
        "the base came last, and is former"
    );
    assert_eq!(client.count(&[by_label(&alice)]).await, 2);
    client.store(&merged).await;
    assert_eq!(ids_of(&mut client, by_label(&alice)).await, set(&[&merged]));
    assert_eq!(client.live_before("live", &merged.id.to_hex()).await, [""; 0], "a former version is no news");
    assert_eq!(client.publish(&base).await, (true, "duplicate: already have this event".to_owned()));

    let by_id = json!({"ids": [base.id.to_hex(), phone.id.to_hex(), merged.id.to_hex()]});
    assert_eq!(ids_of(&mut client, by_id.clone()).await, set(&[&base, &phone, &merged]));
    assert_eq!(client.count(std::slice::from_ref(&by_id)).await, 3);
    for (question, expected) in [(by_label(&alice), vec![&merged]), (by_id.clone(), vec![&base, &phone, &merged])] {
        client.send(json!(["NEG-OPEN", "n", question, "6100000200"]).to_string()).await;
        let answer = client.wait_for(|message| message[0] == "NEG-MSG").await;
        for event in [&base, &phone, &laptop, &merged] {
            let is_told = answer[2].as_str().unwrap().contains(&event.id.to_hex());
            assert_eq!(is_told, expected.contains(&event), "{question} {}", event.content);
        }
    }
    let mut strangers = proven(&relay, &bob).await;
    assert_eq!(strangers.query_ids(by_id.clone()).await, [""; 0]);
    let mut anonymous = relay.client().await;
    anonymous.send(request("REQ", "a", &[by_id])).await;
    assert_eq!(anonymous.until_eose("a").await.ids(), [""; 0]);
}

/// NIP-11 says that there is a slot.
#[tokio::test]
async fn the_slot_is_advertised() {
    let config = std::sync::Arc::new(sledge::config::Config::default());
    let store = std::sync::Arc::new(sledge::store::memory::MemoryStore::new());
    let policy = sledge::relay::policy::Policy::open(config.clone(), store).unwrap();
    let info = sledge::server::about::relay_info(&config, &policy);
    assert_eq!(serde_json::to_value(info).unwrap()["sync"]["slots"], 1);
}

/// What a reader of the author's key sees by label, and by id of all these.
fn seen(store: &dyn Store, author: &Keys, ids: &[&Event], now: u64) -> [Vec<String>; 3] {
    let visible = Visibility::of(PrivateKinds::default().into(), [author.pubkey()].into());
    let ids: Vec<String> = ids.iter().map(|event| event.id.to_hex()).collect();
    let everything = (Visibility::everything(), json!({}));
    [(visible.clone(), json!({"#L": [label::NAMESPACE]})), (visible, json!({"ids": ids})), everything].map(
        |(visible, filter)| {
            let wanted = vec![all(Filter::from_json(&filter.to_string()).unwrap())];
            row_ids(&read(store, Query { wanted, now, before: None, visible }, usize::MAX).0)
        },
    )
}

fn reopened(dir: &Path, rebuild: bool) -> Box<dyn Store> {
    if rebuild {
        remove_indexes(dir);
    }
    Box::new(open_store(dir))
}

/// The embedded store and the plain one in memory agree after every write: versions of two authors in any order, naming
/// any others, between pins, deletions and removals; across restarts and an index built again from the log.
#[test]
fn both_stores_agree_on_every_version() {
    for seed in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        agrees_with_the_plain_store(&|round| reopened(dir.path(), round % 2 == 1), seed);
    }
}

/// The same for the store that `open` opens again for each round.
pub fn agrees_with_the_plain_store(open: &dyn Fn(usize) -> Box<dyn Store>, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let plain = MemoryStore::new();
    let authors = [Keys::new(1), Keys::new(2)];
    let mut versions: Vec<Event> = Vec::new();
    for number in 0..150_u64 {
        let keys = &authors[random.random_range(0..2)];
        let at = NOW + random.random_range(0..60) * DAY;
        let named: Vec<&Event> = (0..random.random_range(0..4))
            .filter_map(|_| versions.get(random.random_range(0..versions.len().max(1))))
            .collect();
        versions.push(version(keys, at, &number.to_string(), &named));
    }
    let mut waiting: Vec<&Event> = versions.iter().collect();
    for round in 0..4 {
        let store = open(round);
        for step in 0..40 {
            let keys = &authors[random.random_range(0..2)];
            let now = NOW + 60 * DAY + step;
            let batch = match random.random_range(0..12) {
                0 => vec![verified(&keys.draft(10_001, NOW + step).content("pins").sign())],
                1 => vec![verified(&keys.deletion(now, &[("a", &keys.address(10_001, ""))]))],
                2 => {
                    let target = &versions[random.random_range(0..versions.len())];
                    vec![verified(&keys.deletion(now, &[("e", &target.id.to_hex())]))]
                }
                3 => {
                    let gone = [versions[random.random_range(0..versions.len())].id];
                    assert_eq!(
                        store.remove(&gone, Removal::Operator).unwrap(),
                        plain.remove(&gone, Removal::Operator).unwrap()
                    );
                    continue;
                }
                _ => (0..random.random_range(1..5))
                    .filter(|_| !waiting.is_empty())
                    .map(|_| random.random_range(0..waiting.len()))
                    .collect::<BTreeSet<usize>>()
                    .into_iter()
                    .rev()
                    .map(|at| verified(waiting.swap_remove(at)))
                    .collect(),
            };
            let verdicts = store.apply(&batch, now).unwrap().verdicts;
            assert_eq!(verdicts, plain.apply(&batch, now).unwrap().verdicts, "seed {seed}, step {round}/{step}");
            let ids: Vec<&Event> = versions.iter().collect();
            for keys in &authors {
                assert_eq!(
                    seen(&*store, keys, &ids, now),
                    seen(&plain, keys, &ids, now),
                    "seed {seed}, {round}/{step}"
                );
            }
        }
    }
}

/// Sixteen heads and thirty-two former versions, whatever is written; the rest of the author's events stays.
#[test]
fn a_slot_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path());
    let alice = Keys::new(1);
    let conflicts: Vec<Event> = (0..40).map(|n| version(&alice, NOW + n, &format!("device {n}"), &[])).collect();
    let verdicts = store.apply(&conflicts.iter().map(verified).collect::<Vec<_>>(), NOW).unwrap().verdicts;
    assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Store));
    let heads: Vec<&Event> = conflicts.iter().rev().take(16).collect();
    let ids = |events: &[&Event]| events.iter().map(|event| event.id.to_hex()).collect::<Vec<_>>();
    assert_eq!(seen(&store, &alice, &[], NOW)[0], ids(&heads));
    assert_eq!(store.apply(&[verified(&conflicts[3])], NOW).unwrap().verdicts, [Verdict::Superseded]);
    let mut last = version(&alice, NOW + 100, "merged", &heads);
    store.apply(&[verified(&last)], NOW).unwrap();
    for n in 0..50 {
        let next = version(&alice, NOW + 101 + n, &format!("{n}"), &[&last]);
        store.apply(&[verified(&next)], NOW).unwrap();
        last = next;
    }
    let [by_label, _, everything] = seen(&store, &alice, &[], NOW);
    assert_eq!((by_label, everything.len()), (vec![last.id.to_hex()], 33));
    assert_eq!(sledge::store::verify::verify(&store, &|_, _| {}).unwrap().problems, [""; 0]);
}
