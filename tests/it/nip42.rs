//! NIP-42, authentication: the challenge, what answers it, and what it opens.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::support::relay::SERVICE_URL;
use crate::support::{Binary, Client, Keys, NOW, Relay, ids};

/// An AUTH event of this key for this relay tag and second.
async fn attempt(client: &mut Client, keys: &Keys, relay: &str, at: u64) -> (bool, String) {
    let event = keys.auth(&client.challenge.clone(), relay, at);
    client.auth(&event).await
}

/// Every connection is sent a challenge of its own at once.
#[tokio::test]
async fn every_connection_has_its_own_challenge() {
    let relay = Relay::start().await;
    let (mut one, mut other) = (relay.client().await, relay.client().await);
    assert!(one.challenge.len() >= 32 && one.challenge != other.challenge);
    let foreign = Keys::new(1).auth(&one.challenge, SERVICE_URL, NOW);
    let (accepted, text) = other.auth(&foreign).await;
    assert!(!accepted && text.starts_with("invalid: the challenge"), "{text}");
    assert_eq!(one.auth(&foreign).await, (true, String::new()));
}

/// All spellings of the relay's URL hold, another host or port does not, nor a name that only contains it (T35). The
/// clients come over plain TCP, as from a proxy that has taken TLS off.
#[tokio::test]
async fn t35_the_relay_tag() {
    let relay = Relay::with(|config| config.service_url = "wss://relay.example.com/inbox".to_owned()).await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    for own in [
        "wss://relay.example.com/inbox",
        "wss://relay.example.com/inbox/",
        "wss://relay.example.com",
        "wss://relay.example.com/",
        "WSS://Relay.Example.Com/",
        "wss://relay.example.com:443/",
        "ws://relay.example.com",
    ] {
        assert_eq!(attempt(&mut client, &keys, own, NOW).await, (true, String::new()), "{own}");
    }
    for foreign in [
        "wss://other.example.com/",
        "wss://example.com",
        "wss://relay.example.com.evil.net/inbox",
        "wss://relay.example.com:7777",
        "wss://evil.net/relay.example.com",
        "wss://relay.example.com@evil.net",
        "relay.example.com",
        "",
    ] {
        let (accepted, text) = attempt(&mut client, &keys, foreign, NOW).await;
        assert!(!accepted && text.starts_with("invalid: the relay tag"), "{foreign}: {text}");
    }
}

/// Without a `service_url`, and beside it, the local name by which the client came holds; a public name does not, since a
/// Host header is only a claim (T35).
#[tokio::test]
async fn t35_local_names_hold_and_claimed_public_ones_do_not() {
    let relay = Relay::with(|config| config.service_url = String::new()).await;
    let local = format!("ws://{}", relay.addr());
    let mut client = relay.client().await;
    assert_eq!(attempt(&mut client, &Keys::new(1), &local, NOW).await, (true, String::new()));
    let (accepted, text) = attempt(&mut client, &Keys::new(1), "ws://127.0.0.1:1", NOW).await;
    assert!(!accepted && text.starts_with("invalid: "), "{text}");
    let mut claimed = Client::connect_as(relay.addr(), "ws://relay.example.com/").await;
    let (accepted, text) = attempt(&mut claimed, &Keys::new(1), "ws://relay.example.com/", NOW).await;
    assert!(!accepted && text.starts_with("error: ") && text.contains("service_url"), "{text}");
}

/// Several keys on one connection are valid side by side: each reads its own mail, and both may publish (T36).
#[tokio::test]
async fn t36_two_keys_on_one_connection() {
    let relay = Relay::start().await;
    let [mine, work, wrapper] = [1, 2, 3].map(Keys::new);
    let letter = |to: &Keys| wrapper.draft(1059, NOW).tag(["p", &to.hex()]).sign();
    let (to_me, to_work) = (letter(&mine), letter(&work));
    let mut client = relay.client().await;
    client.store_all([&to_me, &to_work]).await;
    client.prove(&mine).await;
    assert_eq!(client.query_ids(json!({"kinds": [1059]})).await, ids([&to_me]));
    client.prove(&work).await;
    assert_eq!(client.count(&[json!({"kinds": [1059]})]).await, 2);
    for keys in [&mine, &work] {
        client.store(&keys.draft(1, NOW).tag(["-"]).sign()).await;
    }
}

/// Ten minutes either way, to the second (T37).
#[tokio::test]
async fn t37_ten_minutes_either_way() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    for at in [NOW - 601, NOW + 601, 0] {
        let (accepted, text) = attempt(&mut client, &keys, SERVICE_URL, at).await;
        assert!(!accepted && text.starts_with("invalid: created_at"), "{text}");
    }
    for at in [NOW - 600, NOW + 600] {
        assert_eq!(attempt(&mut client, &keys, SERVICE_URL, at).await, (true, String::new()));
    }
    relay.set_now(NOW + 10_000);
    let (accepted, _) = attempt(&mut client, &keys, SERVICE_URL, NOW).await;
    assert!(!accepted, "the challenge is still valid, but the event is old");
    client.store(&keys.draft(1, NOW).tag(["-"]).sign()).await;
}

/// An AUTH event proves nothing when it is forged, of another kind, or without its tags; the connection goes on.
#[tokio::test]
async fn what_proves_nothing_is_refused() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let (keys, challenge) = (Keys::new(1), client.challenge.clone());
    let mut forged = keys.auth(&challenge, SERVICE_URL, NOW);
    forged.sig = Keys::new(2).sign_id(&forged.id);
    let tagged = |kind| keys.draft(kind, NOW).tag(["relay", SERVICE_URL]).tag(["challenge", &challenge]).sign();
    let bare = keys.draft(22_242, NOW).sign();
    let no_relay = keys.draft(22_242, NOW).tag(["challenge", &challenge]).sign();
    for event in [forged, tagged(1), tagged(22_243), bare, no_relay] {
        let (accepted, text) = client.auth(&event).await;
        assert!(!accepted && text.starts_with("invalid: "), "{text}");
    }
    client.send(r#"["AUTH",{"id":"x"}]"#).await;
    assert!(!client.ok_for("x").await.0);
    client.refused("inbox", &[json!({"kinds": [1059]})]).await;
}

/// The answer to a challenge is for the relay alone: sent as EVENT it is refused, and nobody gets it (T33).
#[tokio::test]
async fn t33_an_answer_is_never_stored_or_broadcast() {
    let relay = Relay::start().await;
    let (mut reader, mut client) = (relay.client().await, relay.client().await);
    reader.prove(&Keys::new(1)).await;
    reader.req("live", &[json!({})]).await;
    let answer = Keys::new(1).auth(&client.challenge.clone(), SERVICE_URL, NOW);
    let (accepted, text) = client.publish(&answer).await;
    assert!(!accepted && text.starts_with("invalid: "), "{text}");
    assert_eq!(client.auth(&answer).await, (true, String::new()));
    let last = Keys::new(2).note(NOW, "last");
    client.store(&last).await;
    assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids([]));
    assert_eq!(client.query_ids(json!({"kinds": [22_242]})).await, ids([]));
}

/// The flow that NIP-42 shows, as clients walk it: refused, authenticated, asked again, answered, live.
#[tokio::test]
async fn the_inbox_flow() {
    let relay = Relay::start().await;
    let (me, wrapper) = (Keys::new(1), Keys::new(9));
    let wrap = |n| wrapper.draft(1059, NOW + n).tag(["p", &me.hex()]).sign();
    let inbox = [json!({"kinds": [1059], "#p": [me.hex()]})];
    let (mut sender, mut client) = (relay.client().await, relay.client().await);
    sender.store(&wrap(0)).await;
    assert!(client.refused("inbox", &inbox).await.starts_with("auth-required: "));
    client.prove(&me).await;
    assert_eq!(client.req("inbox", &inbox).await.ids(), ids([&wrap(0)]));
    sender.store(&wrap(1)).await;
    assert_eq!(client.live("inbox").await["id"], json!(wrap(1).id.to_hex()));
    let mut other = relay.client().await;
    other.prove(&Keys::new(2)).await;
    assert!(other.refused("inbox", &inbox).await.starts_with("restricted: "));
}

/// A subscription that was open before its client authenticated gets private events live from then on.
#[tokio::test]
async fn open_subscriptions_see_more_after_authentication() {
    let relay = Relay::start().await;
    let (me, wrapper) = (Keys::new(1), Keys::new(9));
    let wrap = |n| wrapper.draft(1059, NOW + n).tag(["p", &me.hex()]).sign();
    let (mut sender, mut client) = (relay.client().await, relay.client().await);
    client.req("all", &[json!({})]).await;
    // What was published before the note has passed by when the note arrives.
    let note = wrapper.note(NOW, "");
    sender.store_all([&wrap(0), &note]).await;
    assert_eq!(client.live("all").await["id"], json!(note.id.to_hex()));
    client.prove(&me).await;
    sender.store(&wrap(1)).await;
    assert_eq!(client.live("all").await["id"], json!(wrap(1).id.to_hex()));
}

/// Where reading or writing needs authentication, each says so in the way its message is answered; any key will do.
#[tokio::test]
async fn authentication_can_be_required() {
    let relay = Relay::with(|config| {
        config.access.auth_required_to_read = true;
        config.access.auth_required_to_write = true;
    })
    .await;
    let mut client = relay.client().await;
    let note = Keys::new(2).note(NOW, "");
    let (accepted, text) = client.publish(&note).await;
    assert!(!accepted && text.starts_with("auth-required: "), "{text}");
    assert!(client.refused("r", &[json!({})]).await.starts_with("auth-required: "));
    client.send(json!(["COUNT", "c", {}]).to_string()).await;
    assert!(client.closed("c").await.starts_with("auth-required: "));
    client.prove(&Keys::new(1)).await;
    client.store(&note).await;
    assert_eq!(client.query_ids(json!({})).await, ids([&note]));
    assert_eq!(client.count(&[json!({})]).await, 1);
}

/// The relay's name and what needs authentication follow a reload, also on connections that are open.
#[tokio::test]
async fn access_follows_a_reload() {
    let binary = Binary::new();
    binary.configure("service_url = \"wss://old.example.com\"\n");
    let serving = binary.serve();
    let mut client = Client::connect(serving.addr()).await;
    let (keys, new) = (Keys::new(1), "wss://new.example.com");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    client.store(&keys.note(NOW, "before")).await;
    assert!(!attempt(&mut client, &keys, new, now).await.0);
    binary.configure(&format!("service_url = \"{new}\"\n[access]\nauth_required_to_write = true\n"));
    serving.signal("HUP");
    serving.wait_for_line("settings read again");
    let note = keys.note(NOW, "afterwards");
    let (accepted, text) = client.publish(&note).await;
    assert!(!accepted && text.starts_with("auth-required: "), "{text}");
    assert_eq!(attempt(&mut client, &keys, new, now).await, (true, String::new()));
    client.store(&note).await;
}
