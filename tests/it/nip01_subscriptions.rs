//! NIP-01, subscriptions: their ids, their one EOSE, what they bring after it and after CLOSE.

use serde_json::{Value, json};

use crate::support::{Client, Keys, NOW, Relay, ids};

/// Asserts that nothing but the live `marker` subscription, opened here, brings `note` to this connection.
async fn nobody_else_hears(client: &mut Client, publisher: &mut Client, seed: u64) {
    client.req("marker", &[json!({"limit": 0})]).await;
    let note = Keys::new(seed).note(NOW, "who hears this?");
    publisher.store(&note).await;
    assert_eq!(client.live("marker").await["id"], json!(note.id.to_hex()));
    assert_eq!(client.drain().await, Vec::<Value>::new());
    client.close("marker").await;
}

/// 1 to 64 characters, counted as characters; anything else is refused with the id as it was written.
#[tokio::test]
async fn t23_subscription_ids_have_1_to_64_characters() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    for id in ["x", "\"]\\\n\u{1}", &"x".repeat(64), &"🛷".repeat(64)] {
        client.req(id, &[json!({})]).await;
        client.close(id).await;
    }
    for id in ["", &"x".repeat(65), &"🛷".repeat(65)] {
        let text = client.refused(id, &[json!({})]).await;
        assert!(text.starts_with("invalid: "), "{text}");
    }
    for not_text in [json!(1), json!(null), json!(["x"]), json!({})] {
        client.send(json!(["REQ", not_text, {}]).to_string()).await;
        assert_eq!(client.next().await[0], "NOTICE", "{not_text}");
    }
    let text = client.refused("no filter", &[]).await;
    assert!(text.starts_with("invalid: "), "{text}");
}

/// A REQ on an open id replaces it, also when the connection has as many as it may; a COUNT takes no place; one more
/// is refused and the open ones go on.
#[tokio::test]
async fn t23_the_same_id_replaces_also_at_the_cap() {
    let relay = Relay::with(|config| config.limits.subscriptions_max = 2).await;
    let (mut client, mut publisher) = (relay.client().await, relay.client().await);
    client.req("a", &[json!({"kinds": [1]})]).await;
    client.req("b", &[json!({"kinds": [2]})]).await;
    client.refused("c", &[json!({})]).await;
    assert_eq!(client.count(&[json!({})]).await, 0);
    client.req("b", &[json!({"kinds": [3]})]).await;
    let events = [2, 3, 1].map(|kind| Keys::new(1).draft(kind, NOW).sign());
    publisher.store_all(&events).await;
    assert_eq!(client.live("b").await["kind"], 3, "kind 2 was replaced");
    assert_eq!(client.live("a").await["kind"], 1);
    client.close("a").await;
    let stored = client.req("c", &[json!({"kinds": [2]})]).await;
    assert_eq!(stored.ids(), ids([&events[0]]), "CLOSE makes room");
}

/// An id that was refused anew is no longer open: the old subscription went with it.
#[tokio::test]
async fn t23_ids_are_apart_by_connection() {
    let relay = Relay::start().await;
    let (mut one, mut two) = (relay.client().await, relay.client().await);
    one.req("s", &[json!({"kinds": [1]})]).await;
    two.req("s", &[json!({"kinds": [2]})]).await;
    two.close("s").await;
    let note = Keys::new(1).note(NOW, "");
    two.store(&note).await;
    assert_eq!(one.live("s").await["id"], json!(note.id.to_hex()));
}

/// Exactly one EOSE a REQ, also when nothing is stored or all is hidden; a refusal is CLOSED without EOSE.
#[tokio::test]
async fn t24_eose_exactly_once() {
    let relay = Relay::start().await;
    let (mut client, mut publisher) = (relay.client().await, relay.client().await);
    let keys = Keys::new(1);
    let hidden = keys.draft(1, NOW).tag(["expiration".to_owned(), (NOW + 1).to_string()]).sign();
    publisher.store(&hidden).await;
    relay.set_now(NOW + 1);
    let old = keys.note(NOW - 1, "");
    publisher.store(&old).await;
    for (filters, expected) in [
        (vec![json!({"ids": [hidden.id.to_hex()]})], ids([])),
        (vec![json!({"kinds": [9]})], ids([])),
        (vec![json!({"ids": []}), json!({"limit": 0}), json!({"since": 2, "until": 1})], ids([])),
        (vec![json!({}), json!({"kinds": [1]})], ids([&old])),
    ] {
        assert_eq!(client.req("s", &filters).await.ids(), expected, "{filters:?}");
    }
    client.close("s").await;
    client.refused("s", &[json!({"kinds": "x"})]).await;
    nobody_else_hears(&mut client, &mut publisher, 2).await;
}

/// What was answered OK is seen by the next REQ on the same socket, and on any other.
#[tokio::test]
async fn t25_a_socket_reads_its_own_writes() {
    let relay = Relay::start().await;
    let (mut client, mut other) = (relay.client().await, relay.client().await);
    for n in 0..50 {
        let note = Keys::new(1).note(NOW + n, "");
        client.store(&note).await;
        let filter = json!({"ids": [note.id.to_hex()]});
        assert_eq!(client.query_ids(filter.clone()).await, ids([&note]));
        assert_eq!(other.query_ids(filter).await, ids([&note]));
    }
}

/// EVENT and REQ sent without waiting in between: the event comes, stored or live, once.
#[tokio::test]
async fn t25_event_then_req_without_waiting() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    for n in 0..50 {
        let note = Keys::new(1).note(NOW + n, "");
        client.send(format!("[\"EVENT\",{}]", crate::support::json_of(&note))).await;
        client.subscribe("s", &[json!({"ids": [note.id.to_hex()]})]).await;
        let seen = client.wait_for(|message| message[0] == "EVENT").await;
        assert_eq!(seen[2]["id"], json!(note.id.to_hex()));
        client.ok_for(&note.id.to_hex()).await;
        client.wait_for(|message| message[0] == "EOSE").await;
        client.close("s").await;
        assert_eq!(client.drain().await, Vec::<Value>::new());
    }
}

/// After CLOSE, and after closing an id that was never open, nothing arrives on it.
#[tokio::test]
async fn t25_after_close_nothing_more_arrives() {
    let relay = Relay::start().await;
    let (mut client, mut publisher) = (relay.client().await, relay.client().await);
    client.req("s", &[json!({})]).await;
    client.close("s").await;
    client.close("never open").await;
    nobody_else_hears(&mut client, &mut publisher, 1).await;
    client.req("s", &[json!({"kinds": [1]})]).await;
    client.req("s", &[json!({"kinds": [2]})]).await;
    nobody_else_hears(&mut client, &mut publisher, 2).await;
}

/// A subscription is closed while its stored events are still on their way: what follows belongs to the next one.
#[tokio::test]
async fn t25_close_in_the_middle_of_the_stored_events() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes: Vec<_> = (0..300).map(|n| Keys::new(1).note(NOW + n, &"x".repeat(2_000))).collect();
    client.store_all(&notes).await;
    client.subscribe("s", &[json!({})]).await;
    client.close("s").await;
    client.subscribe("s", &[json!({"kinds": [2]})]).await;
    // Of the first one any part may come, and its EOSE; of the second nothing but its EOSE.
    client.req("t", &[json!({"kinds": [2]})]).await;
    client.drain().await;
    let late = Keys::new(1).draft(2, NOW).sign();
    client.store(&late).await;
    assert_eq!(client.live("s").await["id"], json!(late.id.to_hex()));
    assert_eq!(client.live("t").await["id"], json!(late.id.to_hex()));
}

/// One event for several subscriptions of a connection arrives on each of them, once.
#[tokio::test]
async fn each_matching_subscription_gets_the_event_once() {
    let relay = Relay::start().await;
    let (mut client, mut publisher) = (relay.client().await, relay.client().await);
    let keys = Keys::new(1);
    let filters = [json!({"kinds": [1]}), json!({"authors": [keys.hex()]}), json!({"#t": ["x", "y"]}), json!({})];
    for (at, filter) in filters.iter().enumerate() {
        client.req(&format!("s{at}"), &[filter.clone(), json!({"since": 1}), filter.clone()]).await;
    }
    client.req("not", &[json!({"kinds": [2]}), json!({"ids": []})]).await;
    let note = keys.draft(1, NOW).tag(["t", "x"]).tag(["t", "y"]).sign();
    publisher.store(&note).await;
    for at in 0..filters.len() {
        assert_eq!(client.live(&format!("s{at}")).await["id"], json!(note.id.to_hex()));
    }
    nobody_else_hears_more(&mut client, &mut publisher, filters.len()).await;
}

/// One further event reaches each of the open subscriptions `s0…` exactly once more.
async fn nobody_else_hears_more(client: &mut Client, publisher: &mut Client, subscriptions: usize) {
    publisher.store(&Keys::new(1).draft(1, NOW).tag(["t", "y"]).content("more").sign()).await;
    for at in 0..subscriptions {
        assert_eq!(client.live(&format!("s{at}")).await["content"], "more");
    }
    assert_eq!(client.drain().await, Vec::<Value>::new());
}
