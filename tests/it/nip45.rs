//! NIP-45, COUNT: exact, over the union of the filters, without limits.

use serde_json::json;
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
