//! The client's link to one relay: what it proves, what it learns, and how it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use sledge::client::clock::World;
use sledge::client::dial::RelayUrl;
use sledge::client::keys::Keys;
use sledge::client::link::{Auth, Incoming, Link, LinkError, LinkOptions, Redial};
use sledge::protocol::message::EoseHint;
use sledge::protocol::relay_message::RelayMessage;
use sledge::protocol::{Event, Kind, Verified};
use tokio_tungstenite::tungstenite::Message;

use super::support::client::soon;
use super::support::{Fake, NOW, Relay};

/// Time-outs that end a test only when it has failed, and waits that cost nothing.
fn patient() -> LinkOptions {
    LinkOptions { reconnect_first: Duration::ZERO, reconnect_max: Duration::ZERO, ..LinkOptions::default() }
}

fn world() -> World {
    World::manual(Arc::new(AtomicU64::new(NOW * 1000)))
}

fn keys(numbers: impl IntoIterator<Item = u8>) -> Arc<[Keys]> {
    numbers.into_iter().map(|number| Keys::from_secret_bytes([number; 32]).unwrap()).collect()
}

async fn open(url: &str, keys: Arc<[Keys]>) -> Result<Link, LinkError> {
    let url = RelayUrl::parse(url).unwrap();
    soon("the link", Link::open(&url, &patient(), keys, &world())).await
}

async fn next(link: &mut Link) -> Result<Incoming, LinkError> {
    soon("the relay's word", link.next()).await
}

fn said(message: Value) -> Incoming {
    Incoming::Message(RelayMessage::from_json(&message.to_string()))
}

/// A relay of ours: what is asked is answered, the document is read, and the clocks are compared.
#[tokio::test]
async fn a_link_to_a_real_relay() {
    let relay = Relay::start().await;
    let mut link = open(&format!("ws://{}", relay.addr()), keys([])).await.unwrap();
    assert!(link.about().supports(1) && link.about().limit_max == Some(5_000));
    // The relay's HTTP has the machine's clock, this test's world stands in 2023.
    assert!(link.clock_offset_ms().unwrap() > 0);
    link.send(json!(["REQ", "a", {"limit": 1}]).to_string()).await.unwrap();
    let end = RelayMessage::Eose { id: "a".to_owned(), hint: EoseHint::Finish };
    assert_eq!(next(&mut link).await, Ok(Incoming::Message(end)));
    link.close().await;
    relay.stop().await;
}

/// A relay that says it asks for proof is believed: the link opens with the keys proven, each by an event of its own
/// that names relay and challenge, dated by the relay's clock (T35, T36, T37). What was said meanwhile is not lost.
#[tokio::test]
async fn t36_keys_are_proven_before_anything_is_asked() {
    let about = json!({"supported_nips": [1, 42]});
    let mut fake = Fake::dated(about, Some("Tue, 14 Nov 2023 23:13:20 GMT")).await;
    let url = fake.url();
    let playing = async {
        let mut peer = fake.accept().await;
        peer.say(json!(["NOTICE", "first"])).await;
        peer.say(json!(["AUTH", "c-1"])).await;
        let mut authors = Vec::new();
        for accepted in [false, true] {
            let proof = peer.hear_verb("AUTH").await;
            let event = Verified::check(Event::from_json(&proof[1].to_string()).unwrap()).unwrap();
            assert_eq!((event.kind, event.created_at), (Kind::CLIENT_AUTH, NOW + 3_600));
            let value = |name| event.tags.find(name).and_then(|tag| tag.value()).unwrap().to_owned();
            assert_eq!((value("relay"), value("challenge")), (fake.url(), "c-1".to_owned()));
            peer.say(json!(["OK", event.id.to_hex(), accepted, if accepted { "" } else { "restricted: no" }])).await;
            authors.push(event.pubkey);
        }
        (peer, authors)
    };
    let all = keys([1, 2]);
    let (link, (peer, authors)) = tokio::join!(open(&url, all.clone()), playing);
    let mut link = link.unwrap();
    assert_eq!(authors, all.iter().map(Keys::pubkey).collect::<Vec<_>>());
    assert_eq!((link.auth(), link.clock_offset_ms()), (&Auth::Proven, Some(3_600_000)));
    assert_eq!(next(&mut link).await, Ok(said(json!(["NOTICE", "first"]))));
    peer.close().await;
    assert!(matches!(next(&mut link).await, Err(LinkError::Closed(_))));
}

/// A relay that asks later, or again, is answered then, and whoever drives the link hears of it, also of a refusal.
#[tokio::test]
async fn a_late_challenge_is_answered() {
    let mut fake = Fake::start(json!({"supported_nips": [1]})).await;
    let mut link = open(&fake.url(), keys([1])).await.unwrap();
    let mut peer = fake.accept().await;
    assert_eq!((link.auth(), link.clock_offset_ms()), (&Auth::NotAsked, None));
    for (accepted, expected) in
        [(true, Incoming::Authenticated), (false, Incoming::AuthRefused("restricted: who?".to_owned()))]
    {
        peer.say(json!(["AUTH", "again"])).await;
        let proof = peer.hear_verb("AUTH").await;
        peer.say(json!(["OK", proof[1]["id"], accepted, "restricted: who?"])).await;
        assert_eq!(next(&mut link).await, Ok(expected));
    }
    assert_eq!(link.auth(), &Auth::Refused("restricted: who?".to_owned()));
    // An OK for what is no answer of ours is the driver's.
    let ok = json!(["OK", "0".repeat(64), true, ""]);
    peer.say(ok.clone()).await;
    assert_eq!(next(&mut link).await, Ok(said(ok)));
}

/// Garbage, binary frames and a message beyond the limit: the first two are passed over, the last ends this link.
#[tokio::test]
async fn t41_a_hostile_relay_costs_its_own_link_only() {
    let mut fake = Fake::start(Value::Null).await;
    let mut link = open(&fake.url(), keys([])).await.unwrap();
    let mut peer = fake.accept().await;
    peer.say_raw(Message::text("{]")).await;
    peer.say_raw(Message::binary(vec![0xff; 5])).await;
    peer.say(json!(["NOTICE", "still here"])).await;
    assert_eq!(next(&mut link).await, Ok(Incoming::Message(RelayMessage::Unreadable)));
    assert_eq!(next(&mut link).await, Ok(said(json!(["NOTICE", "still here"]))));
    peer.say_raw(Message::text("x".repeat(patient().message_bytes_max + 1))).await;
    assert!(matches!(next(&mut link).await, Err(LinkError::Broken(_))));
    assert!(link.next().await.is_err(), "over is over");
}

/// A relay that is silent is pinged, and given up when not even a pong comes.
#[tokio::test]
async fn a_silent_relay_is_given_up() {
    let mut fake = Fake::start(Value::Null).await;
    let options =
        LinkOptions { idle_ping: Duration::from_millis(10), idle_timeout: Duration::from_millis(50), ..patient() };
    let url = RelayUrl::parse(&fake.url()).unwrap();
    let mut link = soon("the link", Link::open(&url, &options, keys([]), &world())).await.unwrap();
    // This end is not read, so that no ping is answered.
    let peer = fake.accept().await;
    assert_eq!(next(&mut link).await, Err(LinkError::Silent));
    peer.cut();
}

/// A driver that does not read, and a relay that talks on, do not block what the driver sends.
#[tokio::test]
async fn a_full_inbox_does_not_block_the_way_out() {
    let mut fake = Fake::start(Value::Null).await;
    let options = LinkOptions { queue_messages_max: 1, ..patient() };
    let url = RelayUrl::parse(&fake.url()).unwrap();
    let mut link = soon("the link", Link::open(&url, &options, keys([]), &world())).await.unwrap();
    let mut peer = fake.accept().await;
    for number in 0..20 {
        peer.say(json!(["NOTICE", number.to_string()])).await;
    }
    for number in 0..20 {
        soon("the queue", link.send(json!(["CLOSE", number.to_string()]).to_string())).await.unwrap();
        assert_eq!(peer.hear().await, Some(json!(["CLOSE", number.to_string()])));
    }
    for number in 0..20 {
        assert_eq!(next(&mut link).await, Ok(said(json!(["NOTICE", number.to_string()]))));
    }
    link.close().await;
    assert_eq!(peer.hear().await, None);
}

/// No relay, then one that hangs up, then one that stays: the link comes up by itself, and each failure was told.
#[tokio::test]
async fn a_relay_that_comes_back_is_found() {
    let relay = Relay::start().await;
    let addr = relay.addr();
    let stopped = relay.stop().await;
    let url = RelayUrl::parse(&format!("ws://{addr}")).unwrap();
    let clock = Arc::new(AtomicU64::new(0));
    let mut redial = Redial::new(url.clone(), patient(), keys([]), World::manual(Arc::clone(&clock)));
    assert!(matches!(soon("the refusal", redial.attempt()).await, Err(LinkError::Unreachable(_))));
    let (mut failures, mut back) = (0, None);
    let (failed, wait) = tokio::sync::oneshot::channel();
    let mut failed = Some(failed);
    let opening = redial.open(|_| {
        failures += 1;
        if let Some(failed) = failed.take() {
            failed.send(()).unwrap();
        }
    });
    let coming_back = async {
        wait.await.unwrap();
        back = Some(stopped.start_on(addr).await);
    };
    let (link, ()) = soon("the link", async { tokio::join!(opening, coming_back) }).await;
    assert!(failures > 0);
    assert!(link.clock_offset_ms().unwrap() > 1_000_000 && clock.load(Ordering::Relaxed) == 0);
    back.unwrap().stop().await;
}
