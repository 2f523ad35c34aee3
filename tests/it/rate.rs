//! The limits by address: what is too much is answered, others notice nothing, and garbage shuts an address out.

use serde_json::json;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::{Client, Keys, NOW, Relay};

const SOMEBODY: &str = "192.0.2.1";
const SOMEBODY_ELSE: &str = "192.0.2.2";

/// Tight limits that refill too slowly to matter in a test.
async fn tight(change: impl FnOnce(&mut sledge::config::Rate)) -> Relay {
    Relay::with(|config| {
        let rate = &mut config.rate;
        (rate.events_per_sec, rate.events_burst) = (1, 3);
        (rate.reqs_per_sec, rate.reqs_burst) = (1, 3);
        (rate.garbage_per_sec, rate.garbage_burst, rate.ban_secs) = (1, 20, 3_600);
        change(rate);
    })
    .await
}

/// Until the relay says so: the answer that starts with `rate-limited:`. It refills while a slow machine asks, so
/// this goes on for as long as it takes.
async fn publish_until_limited(client: &mut Client) -> usize {
    for n in 0..10_000 {
        let (accepted, text) = client.publish(&Keys::new(1).note(NOW, &n.to_string())).await;

        if !accepted {
            assert!(text.starts_with("rate-limited: at most 1 events a second"), "{text}");
            return n;
        }
    }
    panic!("never limited");
}

/// The burst passes, the next event is refused, and neither another address nor this machine itself notices.
#[tokio::test]
async fn too_many_events_are_refused_to_one_address() {
    let relay = tight(|_| {}).await;
    let mut one = Client::connect_from(relay.addr(), SOMEBODY).await;
    assert!(publish_until_limited(&mut one).await >= 3);
    let mut elsewhere = Client::connect_from(relay.addr(), SOMEBODY_ELSE).await;
    elsewhere.store(&Keys::new(2).note(NOW, "elsewhere")).await;
    let mut local = relay.client().await;
    let notes: Vec<_> = (0..50).map(|n| Keys::new(3).note(NOW, &n.to_string())).collect();
    local.store_all(&notes).await;
    one.assert_alive().await;
}

/// A second connection of the same address, or another address of the same /64, shares the limit.
#[tokio::test]
async fn connections_of_one_address_share_its_limits() {
    for (first, second) in [(SOMEBODY, "::ffff:192.0.2.1"), ("2001:db8::1", "2001:db8::2")] {
        let relay = tight(|rate| rate.events_burst = 200).await;
        let (mut one, mut two) =
            (Client::connect_from(relay.addr(), first).await, Client::connect_from(relay.addr(), second).await);
        assert!(publish_until_limited(&mut one).await >= 200);
        // The second finds no burst of its own, only what has refilled meanwhile.
        assert!(publish_until_limited(&mut two).await < 100);
    }
}

/// Too many REQs get CLOSED, and a subscription that stood under the id has ended; CLOSE always works.
#[tokio::test]
async fn too_many_requests_are_closed() {
    let relay = tight(|_| {}).await;
    let mut client = Client::connect_from(relay.addr(), SOMEBODY).await;
    for n in 0.. {
        client.subscribe(&n.to_string(), &[json!({"limit": 0})]).await;
        let answer = client.wait_for(|message| message[1] == n.to_string().as_str()).await;
        if answer[0] == "CLOSED" {
            assert!(answer[2].as_str().unwrap().starts_with("rate-limited: "), "{answer}");
            break;
        }
        client.close(&n.to_string()).await;
    }
}

/// Exempt addresses are not limited.
#[tokio::test]
async fn exempt_addresses_are_not_limited() {
    let relay = tight(|rate| rate.exempt_ips = vec!["192.0.2.0/31".parse().unwrap()]).await;
    let mut client = Client::connect_from(relay.addr(), "::ffff:192.0.2.1").await;
    let notes: Vec<_> = (0..50).map(|n| Keys::new(3).note(NOW, &n.to_string())).collect();
    client.store_all(&notes).await;
    for n in 0..50 {
        client.send(format!("garbage {n}")).await;
    }
    client.assert_alive().await;
}

/// Garbage closes the connections of its address and keeps it out; others stay.
#[tokio::test]
async fn garbage_shuts_its_address_out() {
    let relay = tight(|_| {}).await;
    let mut bystander = Client::connect_from(relay.addr(), SOMEBODY_ELSE).await;
    let mut client = Client::connect_from(relay.addr(), SOMEBODY).await;
    for _ in 0..1_000 {
        if client.try_send(Message::text("garbage")).await.is_err() {
            break;
        }
    }
    client.assert_closed().await;
    match Client::try_connect_from(relay.addr(), SOMEBODY).await {
        Err(Error::Http(response)) => assert_eq!(response.status(), 429),
        other => panic!("let in again: {:?}", other.is_ok()),
    }
    bystander.assert_alive().await;
}

/// Forged events count for more than what cannot be read.
#[tokio::test]
async fn forged_events_shut_their_address_out() {
    let relay = tight(|rate| rate.events_burst = 1_000).await;
    let mut client = Client::connect_from(relay.addr(), SOMEBODY).await;
    let mut sent = 0;
    for n in 0..1_000 {
        let mut note = Keys::new(1).note(NOW, &n.to_string());
        note.sig.0[7] ^= 1;
        let text = format!("[\"EVENT\",{}]", crate::support::json_of(&note));
        if client.try_send(Message::text(text)).await.is_err() {
            break;
        }
        sent = n;
    }
    client.assert_closed().await;
    assert!(sent > 3, "one forged event is no ban");
    assert!(Client::try_connect_from(relay.addr(), SOMEBODY).await.is_err());
}
