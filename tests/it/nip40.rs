//! NIP-40, expiration: refused when past, hidden in the very second, erased later.

use serde_json::json;
use sledge::protocol::Event;

use crate::support::paths::History;
use crate::support::{Binary, Keys, NOW, Relay, ids};

fn expiring(keys: &Keys, kind: u16, at: &str) -> Event {
    keys.draft(kind, NOW).tag(["expiration", at]).sign()
}

/// Past or present expirations are refused, the next second is not.
#[tokio::test]
async fn t31_expired_events_are_refused() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    for (at, accepted) in [(0, false), (NOW - 1, false), (NOW, false), (NOW + 1, true)] {
        let answer = client.publish(&expiring(&keys, 1, &at.to_string())).await;
        assert_eq!(answer.0, accepted, "{at}: {answer:?}");
    }
    assert_eq!(client.count(&[json!({})]).await, 1);
}

/// Hidden from REQ and COUNT in the second that the tag names, not one before.
#[tokio::test]
async fn t31_hidden_in_the_same_second() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let event = expiring(&keys, 1, &(NOW + 10).to_string());
    let stays = keys.note(NOW - 1, "stays");
    client.store_all([&event, &stays]).await;
    let filters = [json!({}), json!({"ids": ids([&event, &stays])}), json!({"authors": [keys.hex()]})];
    relay.set_now(NOW + 9);
    for filter in &filters {
        assert_eq!(client.query_ids(filter.clone()).await, ids([&event, &stays]), "{filter}");
    }
    relay.set_now(NOW + 10);
    for filter in &filters {
        assert_eq!(client.query_ids(filter.clone()).await, ids([&stays]), "{filter}");
        assert_eq!(client.count(std::slice::from_ref(filter)).await, 1, "{filter}");
    }
    let again = client.publish(&event).await;
    assert!(!again.0 || again.1.starts_with("duplicate: "), "{again:?}");
    assert_eq!(client.count(&[json!({})]).await, 1);
    let relay = relay.restart().await;
    let mut client = relay.client().await;
    assert_eq!(client.query_ids(json!({})).await, ids([&stays]), "after a restart");
}

/// Live subscribers get events that have not expired and no others.
#[tokio::test]
async fn t31_expired_events_are_not_broadcast() {
    let relay = Relay::start().await;
    let (mut reader, mut client) = (relay.client().await, relay.client().await);
    reader.req("live", &[json!({})]).await;
    let keys = Keys::new(1);
    let events = [NOW, NOW + 1].map(|at| expiring(&keys, 1, &at.to_string()));
    let ephemeral = [NOW, NOW + 1].map(|at| expiring(&keys, 20_000, &at.to_string()));
    for event in events.iter().chain(&ephemeral) {
        client.publish(event).await;
    }
    let last = keys.note(NOW, "last");
    client.store(&last).await;
    assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids([&events[1], &ephemeral[1]]));
}

/// A value that is no number is no expiration; of several tags the first readable one counts.
#[tokio::test]
async fn t31_unreadable_values_are_ignored() {
    let keys = Keys::new(1);
    let odd = ["", "x", "-1", "1.5", " 1", "99999999999999999999"].map(|value| expiring(&keys, 1, value));
    let bare = keys.draft(1, NOW).tag(["expiration"]).sign();
    let far = keys.draft(1, NOW).tag(["expiration", "x"]).tag(["expiration", "99999999999"]).sign();
    let kept: Vec<&Event> = odd.iter().chain([&bare, &far]).collect();
    kept.iter().copied().fold(History::new(), History::stored).keeps(kept).holds_on_every_path().await;
}

/// An event that expired long ago does not come in by import, and one that expires in the far future does.
#[tokio::test]
async fn t31_import_and_export_leave_expired_events_out() {
    let keys = Keys::new(1);
    let (past, future) = (expiring(&keys, 1, &NOW.to_string()), expiring(&keys, 1, "99999999999"));
    let binary = Binary::new();
    binary.import([&past, &future]);
    assert_eq!(binary.exported_ids(), ids([&future]));
    // Stored while it was valid, expired by the real clock: export and query do not show it.
    let relay = Relay::start().await;
    relay.client().await.store_all([&expiring(&keys, 1, &(NOW + 1).to_string()), &future]).await;
    let stopped = relay.stop().await;
    let binary = Binary::on(stopped.dir());
    assert_eq!(binary.exported_ids(), ids([&future]));
    assert_eq!(binary.run(&["count", "{}"]).ok().trim(), "1");
    binary.run(&["compact"]).ok();
    assert_eq!(binary.exported_ids(), ids([&future]));
}
