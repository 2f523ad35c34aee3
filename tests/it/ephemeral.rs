//! Ephemeral kinds: delivered to those who listen now, and nowhere else.

use serde_json::json;

use crate::support::stores::holds;
use crate::support::{Binary, Keys, NOW, Relay, ids};

/// Delivered live in order with stored events, and then gone: not in REQ, COUNT or on the disk.
#[tokio::test]
async fn t32_ephemeral_events_are_live_only() {
    let relay = Relay::start().await;
    let (mut reader, mut client) = (relay.client().await, relay.client().await);
    reader.req("live", &[json!({"authors": [Keys::new(1).hex()]})]).await;
    let keys = Keys::new(1);
    let kinds = [20_000, 29_999, 19_999, 30_000, 25_000];
    let events = kinds.map(|kind| keys.draft(kind, NOW).content("unmistakable ephemeral words").sign());
    let (ephemeral, stored) = ([&events[0], &events[1], &events[4]], [&events[2], &events[3]]);
    client.store_all(&events).await;
    for event in &events {
        assert_eq!(reader.live("live").await["id"], json!(event.id.to_hex()));
    }
    for filter in [json!({}), json!({"ids": ids(&events)}), json!({"kinds": kinds})] {
        let mut found = client.query_ids(filter.clone()).await;
        let mut expected = ids(stored);
        found.sort();
        expected.sort();
        assert_eq!(found, expected, "{filter}");
        assert_eq!(client.count(std::slice::from_ref(&filter)).await, 2, "{filter}");
    }
    let stopped = relay.stop().await;
    for event in ephemeral {
        assert!(!holds(stopped.dir(), &event.id.to_hex()), "an ephemeral event reached the disk");
    }
    assert!(holds(stopped.dir(), &stored[0].id.to_hex()), "the search finds what is there");
    let mut expected = ids(stored);
    expected.sort();
    assert_eq!(Binary::on(stopped.dir()).exported_ids(), expected);
}

/// Import does not store them either, and the run is no failure.
#[tokio::test]
async fn t32_ephemeral_events_are_not_imported() {
    let keys = Keys::new(1);
    let (ephemeral, note) = (keys.draft(20_000, NOW).sign(), keys.note(NOW, ""));
    let binary = Binary::new();
    binary.import([&ephemeral, &note]);
    assert_eq!(binary.exported_ids(), ids([&note]));
    assert!(!holds(binary.data(), &ephemeral.id.to_hex()));
}

/// The same ephemeral event sent twice by mistake is no error; a forged one reaches nobody.
#[tokio::test]
async fn t32_forged_ephemeral_events_reach_nobody() {
    let relay = Relay::start().await;
    let (mut reader, mut client) = (relay.client().await, relay.client().await);
    reader.req("live", &[json!({})]).await;
    let mut forged = Keys::new(1).draft(20_000, NOW).sign();
    forged.sig = Keys::new(2).sign_id(&forged.id);
    let (accepted, text) = client.publish(&forged).await;
    assert!(!accepted && text.starts_with("invalid: "), "{text}");
    let last = Keys::new(1).draft(20_000, NOW).content("last").sign();
    client.store(&last).await;
    assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids([]));
}
