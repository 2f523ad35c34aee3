//! NIP-45, COUNT: exact, over the union of the filters, without limits; with registers that clients can merge.

use serde_json::{Value, json};
use sledge::protocol::Event;

use crate::support::client::request;
use crate::support::{Keys, NOW, Relay};

/// An event that several filters match counts once, however many there are; `limit` plays no part.
#[tokio::test]
async fn t39_overlapping_filters_count_once() {
    let relay = Relay::with(|config| {
        config.limits.limit_default = 2;
        config.limits.limit_max = 3;
    })
    .await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = (0..20)
        .map(|n| Keys::new(n % 4).draft(1 + (n % 2) as u16, NOW + n).tag(["t", "x"]).tag(["t", "y"]).sign())
        .collect();
    client.store_all(&notes).await;
    let author = |n| json!({"authors": [Keys::new(n).hex()]});
    for (filters, expected) in [
        (vec![json!({})], 20),
        (vec![json!({}), json!({}), json!({"kinds": [1]})], 20),
        (vec![json!({"kinds": [1]})], 10),
        (vec![json!({"kinds": [1]}), author(0), author(1)], 15),
        (vec![json!({"#t": ["x", "y"]})], 20),
        (vec![json!({"#t": ["x"]}), json!({"#t": ["y"]})], 20),
        (vec![json!({"limit": 1})], 20),
        (vec![json!({"ids": []}), json!({"since": NOW + 15})], 5),
        (vec![json!({"kinds": [7]})], 0),
    ] {
        let body = client.count_body(&filters).await;
        assert_eq!(body["count"], expected, "{filters:?}");
        assert_ne!(body["approximate"], true, "{filters:?}");
    }
}

/// A count that takes too long is given as far as it came, and says that it is a lower bound.
#[tokio::test]
async fn t39_a_count_that_is_cut_short_says_so() {
    let relay = Relay::with(|config| {
        config.limits.query_slice_ms = 0;
        config.limits.query_time_ms_max = 0;
    })
    .await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = (0..1_000).map(|n| Keys::new(1).note(NOW + n % 9, &n.to_string())).collect();
    client.store_all(&notes).await;
    let body = client.count_body(&[json!({"kinds": [1]})]).await;
    assert_eq!(body["approximate"], true, "{body}");
    assert!(body["count"].as_u64().is_some_and(|count| count < 1_000), "{body}");
    client.assert_alive().await;
}

/// Replaced and deleted events do not count, those stored since do.
#[tokio::test]
async fn t39_counts_follow_what_is_stored() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let note = keys.note(NOW, "");
    client.store_all([&note, &keys.draft(0, NOW).sign(), &keys.draft(0, NOW + 1).sign()]).await;
    assert_eq!(client.count(&[json!({})]).await, 2);
    client.store(&keys.deletion(NOW, &[("e", &note.id.to_hex())])).await;
    assert_eq!(client.count(&[json!({"kinds": [0, 1]})]).await, 1);
    assert_eq!(client.count(&[json!({})]).await, 2);
}

/// A COUNT opens nothing: no EVENT, no EOSE, and its id may be that of an open subscription.
#[tokio::test]
async fn t39_a_count_is_not_a_subscription() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    client.req("s", &[json!({"kinds": [1]})]).await;
    client.send(request("COUNT", "s", &[json!({"kinds": [2]})])).await;
    assert_eq!(client.next().await, json!(["COUNT", "s", {"count": 0}]));
    let [note, other] = [1, 2].map(|kind| Keys::new(1).draft(kind, NOW).sign());
    client.store_all([&other, &note]).await;
    assert_eq!(client.live("s").await["id"], json!(note.id.to_hex()), "s still asks for kind 1");
    client.send(request("COUNT", "", &[json!({})])).await;
    client.closed("").await;
}

/// The common questions of NIP-45 come with registers, which are those of the authors that were counted: the oracle walks
/// NIP-45's steps over the keys of the events that a REQ brings. Deleted events leave no trace in them (T39).
#[tokio::test]
async fn t39_registers_of_the_authors_counted() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let target = Keys::new(1_000).note(NOW, "target").id.to_hex();
    let reactions: Vec<Event> =
        (0..300).map(|n| Keys::new(n % 200).draft(7, NOW + n).tag(["e", &target]).sign()).collect();
    client.store_all(&reactions).await;
    let deleted = Keys::new(199).deletion(NOW, &[("e", &reactions[199].id.to_hex())]);
    client.store(&deleted).await;
    let question = json!({"#e": [target], "kinds": [7]});
    let mut all = question.clone();
    all["limit"] = json!(1_000);
    let found = client.query(all).await.events;
    let body = client.count_body(std::slice::from_ref(&question)).await;
    assert_eq!((body["count"].as_u64(), found.len()), (Some(299), 299));
    assert_eq!(body["hll"], json!(registers(&target, &found)));
    let mut narrowed = question.clone();
    narrowed["since"] = json!(NOW + 250);
    assert_eq!(client.count_body(&[narrowed]).await["hll"], json!(registers(&target, &found[..50])));
    for without in [
        vec![json!({"kinds": [7]})],
        vec![question.clone(), question.clone()],
        vec![json!({"#e": [target, "0".repeat(64)]})],
    ] {
        assert!(client.count_body(&without).await["hll"].is_null(), "{without:?}");
    }
    assert_eq!(client.count_body(&[json!({"#e": ["0".repeat(64)]})]).await["hll"], json!("0".repeat(512)));
}

/// NIP-45's registers for a target in hex, by the letter of its text.
fn registers(target: &str, events: &[Value]) -> String {
    let offset = usize::from_str_radix(&target[32..33], 16).unwrap() + 8;
    let mut registers = [0u8; 256];
    for event in events {
        let key = event["pubkey"].as_str().unwrap();
        let byte = |at: usize| u8::from_str_radix(&key[2 * at..2 * at + 2], 16).unwrap();
        let bits: String = (offset + 1..32).map(|at| format!("{:08b}", byte(at))).collect();
        let value = bits.find('1').map_or(bits.len(), |at| at) as u8 + 1;
        let register = &mut registers[usize::from(byte(offset))];
        *register = value.max(*register);
    }
    registers.iter().map(|register| format!("{register:02x}")).collect()
}
