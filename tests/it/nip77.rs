//! NIP-77, reconciliation: the reference implementation as client over a real socket, against a plain difference of sets.

use std::collections::BTreeSet;

use negentropy::{Id, Negentropy, NegentropyStorageVector};
use secp256k1::rand::rngs::StdRng;
use secp256k1::rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use sledge::config::Config;
use sledge::protocol::{Event, Filter};

use crate::support::{Client, Keys, NOW, Relay};

/// What of an event takes part: when it was made, and its id in hex.
type Known = (u64, String);

fn known(event: &Event) -> Known {
    (event.created_at, event.id.to_hex())
}

fn storage(items: &[Known]) -> NegentropyStorageVector {
    let mut storage = NegentropyStorageVector::new();
    for (created_at, id) in items {
        let mut bytes = [0; 32];
        faster_hex::hex_decode(id.as_bytes(), &mut bytes).unwrap();
        storage.insert(*created_at, Id::from_byte_array(bytes)).unwrap();
    }
    storage.seal().unwrap();
    storage
}

fn hex(bytes: &[u8]) -> String {
    faster_hex::hex_string(bytes)
}

/// A first message for a set of no events.
fn empty_opening() -> String {
    hex(&Negentropy::owned(storage(&[]), 0).unwrap().initiate().unwrap())
}

async fn open(client: &mut Client, id: &str, filter: &Value, message: &str) {
    client.send(json!(["NEG-OPEN", id, filter, message]).to_string()).await;
}

/// The next answer to a reconciliation.
async fn answer(client: &mut Client, id: &str) -> Value {
    client
        .wait_for(|message| message[1] == id && message[0].as_str().is_some_and(|verb| verb.starts_with("NEG-")))
        .await
}

/// The message in the next answer.
async fn message(client: &mut Client, id: &str) -> Vec<u8> {
    let answer = answer(client, id).await;
    assert_eq!(answer[0], "NEG-MSG", "{answer}");
    let text = answer[2].as_str().unwrap();
    let mut bytes = vec![0; text.len() / 2];
    faster_hex::hex_decode(text.as_bytes(), &mut bytes).unwrap();
    bytes
}

/// The reason in the next answer, which must be a refusal.
async fn refusal(client: &mut Client, id: &str) -> (String, Value) {
    let answer = answer(client, id).await;
    assert_eq!(answer[0], "NEG-ERR", "{answer}");
    (answer[2].as_str().unwrap().to_owned(), answer[3].clone())
}

/// Reconciles what the client has with what the relay has; ids that only the one or the other has.
async fn reconcile(client: &mut Client, filter: &Value, has: &[Known], frame: u64) -> [BTreeSet<String>; 2] {
    let storage = storage(has);
    let mut side = Negentropy::borrowed(&storage, frame).unwrap();
    let (mut have, mut need) = (Vec::new(), Vec::new());
    open(client, "sync", filter, &hex(&side.initiate().unwrap())).await;
    while let Some(next) = side.reconcile_with_ids(&message(client, "sync").await, &mut have, &mut need).unwrap() {
        client.send(json!(["NEG-MSG", "sync", hex(&next)]).to_string()).await;
    }
    client.send(json!(["NEG-CLOSE", "sync"]).to_string()).await;
    [have, need].map(|ids| ids.iter().map(|id| hex(id.as_bytes())).collect())
}

fn difference(a: &[Known], b: &[Known]) -> BTreeSet<String> {
    let b: BTreeSet<&String> = b.iter().map(|(_, id)| id).collect();
    a.iter().map(|(_, id)| id).filter(|id| !b.contains(id)).cloned().collect()
}

/// Reconciles under a filter and checks both directions against the difference of what matches it.
async fn check(client: &mut Client, stored: &[Event], filter: &Value, has: &[Known], frame: u64) {
    let condition = Filter::from_json(&filter.to_string()).unwrap();
    let stored: Vec<Known> = stored.iter().filter(|event| condition.matches(*event)).map(known).collect();
    let [have, need] = reconcile(client, filter, has, frame).await;
    assert_eq!(have, difference(has, &stored), "{filter}");
    assert_eq!(need, difference(&stored, has), "{filter}");
}

/// Any filter, any part of the events on either side, crowded seconds, unequal frame limits: exactly the difference.
#[tokio::test]
async fn the_difference_is_found_over_a_socket() {
    let mut random = StdRng::seed_from_u64(77);
    let relay = Relay::with(|config| config.sync.message_bytes_max = 20_000).await;
    let mut client = relay.client().await;
    let event = |n: u64| {
        let draft = Keys::new(n % 3).draft(1 + (n % 2) as u16, NOW + n % 40 / (1 + n % 3));
        draft.tag(["t", if n.is_multiple_of(5) { "five" } else { "other" }]).content(n.to_string()).sign()
    };
    let stored: Vec<Event> = (0..900).map(event).collect();
    client.store_all(&stored).await;
    let author = Keys::new(1).hex();
    let filters = [
        json!({}),
        json!({"kinds": [1]}),
        json!({"authors": [author]}),
        json!({"authors": [author], "kinds": [2], "#t": ["other"]}),
        json!({"#t": ["five"], "since": NOW + 3, "until": NOW + 20}),
        json!({"since": NOW + 5}),
        json!({"kinds": []}),
        json!({"ids": [stored[4].id.to_hex(), stored[5].id.to_hex()]}),
    ];
    for (filter, frame) in filters.iter().zip([4_096, 0, 60_000, 5_000, 0, 9_000, 0, 0]) {
        let condition = Filter::from_json(&filter.to_string()).unwrap();
        let mut has: Vec<Known> = stored.iter().filter(|event| condition.matches(*event)).map(known).collect();
        has.retain(|_| random.random_bool(0.9));
        has.extend((0..50).map(|_| (NOW + random.random_range(0..30), hex(&random.random::<[u8; 32]>()))));
        check(&mut client, &stored, filter, &has, frame).await;
        check(&mut client, &stored, filter, &[], frame).await;
    }
    let whole: Vec<Known> = stored.iter().map(known).collect();
    check(&mut client, &stored, &json!({}), &whole, 0).await;
}

/// A thousand events in one second, half of them on each side.
#[tokio::test]
async fn t40_a_flood_in_one_second() {
    let relay = Relay::with(|config| config.sync.message_bytes_max = 8_192).await;
    let mut client = relay.client().await;
    let events: Vec<Event> = (0..1_000).map(|n: u64| Keys::new(1).note(NOW, &n.to_string())).collect();
    let (ours, theirs) = (&events[..600], &events[300..]);
    client.store_all(theirs).await;
    let has: Vec<Known> = ours.iter().map(known).collect();
    for frame in [4_096, 100_000] {
        check(&mut client, theirs, &json!({}), &has, frame).await;
    }
}

/// What cannot be read is refused with the id that the client waits for, and ends the reconciliation; another version is
/// answered with ours (T40).
#[tokio::test]
async fn t40_bad_messages_are_refused() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    client.store(&Keys::new(1).note(NOW, "")).await;
    for (message, expected) in [
        ("610", "invalid: the message is not hex"),
        ("xyz1", "invalid: the message is not hex"),
        ("", "invalid: the message is empty"),
        ("00", "invalid: version 0x00 of the protocol is not known"),
        ("61ffffffffffffffffffffff", "invalid: a number is too large"),
        ("6100", "invalid: the message ends too early"),
        ("610000020a", "invalid: the message ends too early"),
    ] {
        open(&mut client, "bad", &json!({}), message).await;
        assert_eq!(refusal(&mut client, "bad").await.0, expected, "{message}");
        client.send(json!(["NEG-MSG", "bad", "61"]).to_string()).await;
        assert!(refusal(&mut client, "bad").await.0.starts_with("closed: "));
    }
    open(&mut client, "bad", &json!({"kinds": ["1"]}), "61").await;
    assert!(refusal(&mut client, "bad").await.0.starts_with("invalid: kinds must be"));
    open(&mut client, "new", &json!({}), "62").await;
    assert_eq!(message(&mut client, "new").await, [0x61]);
    open(&mut client, "gone", &json!({}), &empty_opening()).await;
    message(&mut client, "gone").await;
    client.send(json!(["NEG-MSG", "gone", "6"]).to_string()).await;
    assert_eq!(refusal(&mut client, "gone").await.0, "invalid: the message is not hex");
    client.send(json!(["NEG-MSG", "gone", "61"]).to_string()).await;
    assert!(refusal(&mut client, "gone").await.0.starts_with("closed: "));
    client.assert_alive().await;
}

/// More events than may take part are refused with the number that would do, in one session and in all together.
#[tokio::test]
async fn t40_too_many_records_are_blocked_with_the_number() {
    let relay = Relay::with(|config| (config.sync.session_records_max, config.sync.records_max) = (20, 30)).await;
    let mut client = relay.client().await;
    client
        .store_all(&(0..40).map(|n| Keys::new(1).draft(1 + n % 2, NOW + u64::from(n)).sign()).collect::<Vec<_>>())
        .await;
    open(&mut client, "all", &json!({"since": NOW}), &empty_opening()).await;
    let (text, number) = refusal(&mut client, "all").await;
    assert!(text.starts_with("blocked: more than 20 "), "{text}");
    assert_eq!(number, 20);
    open(&mut client, "half", &json!({"since": NOW + 20}), &empty_opening()).await;
    message(&mut client, "half").await;
    open(&mut client, "other", &json!({"until": NOW + 19}), &empty_opening()).await;
    let (text, number) = refusal(&mut client, "other").await;
    assert!(text.starts_with("error: too many reconciliations"), "{text}");
    assert_eq!(number, Value::Null);
    client.send(json!(["NEG-CLOSE", "half"]).to_string()).await;
    open(&mut client, "other", &json!({"until": NOW + 19}), &empty_opening()).await;
    message(&mut client, "other").await;
}

/// A client that says nothing more is told that its reconciliation is closed, and can begin again.
#[tokio::test]
async fn t40_an_idle_reconciliation_is_closed() {
    let relay = Relay::with(|config| config.sync.session_idle_secs = 1).await;
    let mut client = relay.client().await;
    open(&mut client, "idle", &json!({}), &empty_opening()).await;
    message(&mut client, "idle").await;
    assert_eq!(refusal(&mut client, "idle").await.0, "closed: nothing came for 1 s");
    client.send(json!(["NEG-MSG", "idle", "61"]).to_string()).await;
    assert_eq!(refusal(&mut client, "idle").await.0, "closed: no such reconciliation is open");
    open(&mut client, "idle", &json!({}), &empty_opening()).await;
    message(&mut client, "idle").await;
}

/// The same id begins anew, ids are apart from those of REQ, and only so many may be open; closing makes room.
#[tokio::test]
async fn t40_ids_and_their_cap() {
    let relay = Relay::with(|config| config.sync.sessions_max = 2).await;
    let mut client = relay.client().await;
    let note = Keys::new(1).note(NOW, "");
    client.store(&note).await;
    client.req("same", &[json!({})]).await;
    open(&mut client, "same", &json!({}), &empty_opening()).await;
    assert!(message(&mut client, "same").await.len() > 32);
    open(&mut client, "same", &json!({"kinds": [7]}), &empty_opening()).await;
    assert!(message(&mut client, "same").await.len() < 32);
    client.close("same").await;
    client.send(json!(["NEG-MSG", "same", "61"]).to_string()).await;
    assert_eq!(message(&mut client, "same").await, [0x61], "CLOSE is not about reconciliations");
    open(&mut client, "second", &json!({}), &empty_opening()).await;
    message(&mut client, "second").await;
    open(&mut client, "third", &json!({}), &empty_opening()).await;
    assert!(refusal(&mut client, "third").await.0.starts_with("error: at most 2 "));
    client.send(json!(["NEG-CLOSE", "unknown"]).to_string()).await;
    client.send(json!(["NEG-CLOSE", "same"]).to_string()).await;
    open(&mut client, "third", &json!({}), &empty_opening()).await;
    message(&mut client, "third").await;
}

/// An event that is deleted between two messages does no harm; one whose time has come takes no part from that very
/// second on (T31), an ephemeral one never does (T32).
#[tokio::test]
async fn t31_t32_t40_events_that_go_while_reconciling() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let (alice, bob) = (Keys::new(1), Keys::new(2));
    let doomed = alice.note(NOW, "doomed");
    let expiring = bob.draft(1, NOW).tag(["expiration", &(NOW + 10).to_string()]).sign();
    let others: Vec<Event> = (0..100).map(|n| bob.note(NOW + n, "")).collect();
    client.store_all([&doomed, &expiring]).await;
    client.store_all(&others).await;
    client.store(&alice.draft(20_001, NOW).sign()).await;
    let all: Vec<Event> = [doomed.clone(), expiring.clone()].into_iter().chain(others.clone()).collect();
    check(&mut client, &all, &json!({}), &[], 0).await;

    let storage = storage(&[]);
    let mut side = Negentropy::borrowed(&storage, 0).unwrap();
    open(&mut client, "sync", &json!({}), &hex(&side.initiate().unwrap())).await;
    message(&mut client, "sync").await;
    let deletion = alice.deletion(NOW + 1, &[("e", &doomed.id.to_hex())]);
    client.store(&deletion).await;
    client.send(json!(["NEG-MSG", "sync", empty_opening()]).to_string()).await;
    message(&mut client, "sync").await;

    relay.set_now(NOW + 10);
    let left: Vec<Event> = others.into_iter().chain([deletion]).collect();
    check(&mut client, &left, &json!({}), &[], 0).await;
}

/// A reconciliation sees what the client published right before it (T25).
#[tokio::test]
async fn t25_published_before_is_seen() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = (0..50).map(|n| Keys::new(1).note(NOW + n, "")).collect();
    for note in &notes {
        client.send(format!("[\"EVENT\",{}]", crate::support::json_of(note))).await;
    }
    check(&mut client, &notes, &json!({}), &[], 0).await;
}

/// A message before the last one is answered ends the reconciliation and nothing else; a client that floods with new
/// ones costs what its cap says, and the relay goes on.
#[tokio::test]
async fn t40_messages_out_of_turn() {
    let relay = Relay::with(|config: &mut Config| config.limits.query_threads = 1).await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = (0..300).map(|n| Keys::new(1).note(NOW + n, "")).collect();
    client.store_all(&notes).await;
    for _ in 0..50 {
        open(&mut client, "a", &json!({}), &empty_opening()).await;
        client.send(json!(["NEG-MSG", "a", "61"]).to_string()).await;
    }
    client.assert_alive().await;
    client.forget("a");
    check(&mut client, &notes, &json!({}), &[], 0).await;
}

/// A large set is compared by sums that the store keeps: made by the first reconciliation, kept up to date by every write
/// after it, and cut at other places than the reference does.
#[tokio::test]
async fn large_sets_go_by_sums_that_follow_every_write() {
    let relay = Relay::with(|config| {
        config.limits.query_slice_ms = 1;
        config.sync.session_records_max = 6_000;
        config.sync.records_max = 7_000;
    })
    .await;
    let mut client = relay.client().await;
    let event = |n: u64| Keys::new(n % 2).draft(1, NOW - 3_000 + n * n % 3_000).content(n.to_string()).sign();
    let mut stored: Vec<Event> = (0..9_000).map(event).collect();
    client.store_all(&stored).await;
    let has: Vec<Known> = (0..9_000).step_by(3).chain(9_500..9_600).map(|n| known(&event(n))).collect();
    check(&mut client, &stored, &json!({}), &has, 0).await;

    let (gone, deletion) = (&stored[6], Keys::new(0).deletion(NOW, &[("e", &stored[6].id.to_hex())]));
    client.store(&deletion).await;
    let gone = gone.id;
    stored.retain(|event| event.id != gone);
    stored.push(deletion);
    let more: Vec<Event> = (9_400..9_450).map(event).collect();
    client.store_all(&more).await;
    stored.extend(more);
    for frame in [4_096, 0] {
        check(&mut client, &stored, &json!({}), &has, frame).await;
        let part: Vec<Known> = has.iter().filter(|(at, _)| (NOW - 2_900..=NOW - 900).contains(at)).cloned().collect();
        check(&mut client, &stored, &json!({"since": NOW - 2_900, "until": NOW - 900}), &part, frame).await;
    }
    let whole: Vec<Known> = stored.iter().map(known).collect();
    check(&mut client, &stored, &json!({}), &whole, 0).await;
}
