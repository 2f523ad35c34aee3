//! NIP-70, protected events: only their authenticated author publishes them, and nobody carries them along in a repost.

use serde_json::json;

use crate::support::{Binary, Keys, NOW, Relay, ids};

/// An event with `["-"]` is refused and not broadcast; other tags of that name's look are no protection.
#[tokio::test]
async fn protected_events_are_refused() {
    let relay = Relay::start().await;
    let (mut reader, mut client) = (relay.client().await, relay.client().await);
    reader.req("live", &[json!({})]).await;
    let keys = Keys::new(1);
    for protected in
        [keys.draft(1, NOW).tag(["-"]).sign(), keys.draft(20_001, NOW).tag(["t", "x"]).tag(["-", "x"]).sign()]
    {
        let (accepted, text) = client.publish(&protected).await;
        assert!(!accepted, "{text}");
        assert!(text.starts_with("auth-required: "), "{text}");
    }
    let free = keys.draft(1, NOW).tag(["t", "-"]).tag(["--"]).sign();
    client.store(&free).await;
    assert_eq!(reader.live_before("live", &free.id.to_hex()).await, ids([]));
    assert_eq!(client.query_ids(json!({})).await, ids([&free]));
}

/// Its author may publish it after authentication, and nobody else; then it is an event like others (T38).
#[tokio::test]
async fn t38_only_the_authenticated_author_publishes() {
    let relay = Relay::start().await;
    let (author, stranger) = (Keys::new(1), Keys::new(2));
    let protected = author.draft(1, NOW).tag(["-"]).sign();
    let mut client = relay.client().await;
    client.prove(&stranger).await;
    let (accepted, text) = client.publish(&protected).await;
    assert!(!accepted && text.starts_with("restricted: "), "{text}");
    client.prove(&author).await;
    client.store(&protected).await;
    let mut reader = relay.client().await;
    assert_eq!(reader.query_ids(json!({})).await, ids([&protected]));
    let (accepted, text) = reader.publish(&protected).await;
    assert!(!accepted && text.starts_with("auth-required: "), "{text}");
}

/// A repost that carries a protected event inside would leak it.
#[tokio::test]
async fn reposts_of_protected_events_are_refused() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let (author, reposter) = (Keys::new(1), Keys::new(2));
    let protected = author.draft(1, NOW).tag(["-"]).sign();
    let free = author.note(NOW, "says [\"-\"] in its text");
    for kind in [6, 16] {
        let repost = |of| reposter.draft(kind, NOW).content(crate::support::json_of(of)).sign();
        assert!(!client.publish(&repost(&protected)).await.0, "kind {kind}");
        client.store(&repost(&free)).await;
        client.store(&reposter.draft(kind, NOW).content("").sign()).await;
    }
}

/// Import leaves them out, unless it is told that they are the operator's own.
#[tokio::test]
async fn protected_events_are_not_imported() {
    let keys = Keys::new(1);
    let (protected, free) = (keys.draft(1, NOW).tag(["-"]).sign(), keys.note(NOW, "free"));
    let binary = Binary::new();
    binary.import([&protected, &free]);
    assert_eq!(binary.exported_ids(), ids([&free]));
}
