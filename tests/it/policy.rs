//! Who may write, through real sockets: lists of the settings, quotas, the web of trust.

use serde_json::json;
use sledge::config::Writers;

use crate::http::request;
use crate::support::{Binary, Client, Keys, NOW, Relay, ids};

/// Denied keys and kinds are refused by every door; an allowed address may publish, another only read.
#[tokio::test]
async fn lists_of_the_settings_hold() {
    let (author, denied) = (Keys::new(1), Keys::new(2));
    let relay = Relay::with(|config| {
        config.access.deny_keys = vec![denied.hex()];
        config.access.deny_kinds = vec!["7".parse().unwrap(), "20000-29999".parse().unwrap()];
        config.access.allow_ips = vec!["192.0.2.0/24".parse().unwrap()];
        config.access.deny_ips = vec!["203.0.113.7".parse().unwrap()];
    })
    .await;
    let mut client = Client::connect_from(relay.addr(), "192.0.2.1").await;
    let note = author.note(NOW, "");
    client.store(&note).await;
    for refused in [denied.note(NOW, ""), author.draft(7, NOW).sign(), author.draft(20_001, NOW).sign()] {
        let (accepted, text) = client.publish(&refused).await;
        assert!(!accepted && text.starts_with("blocked: "), "{text}");
    }
    let mut reader = Client::connect_from(relay.addr(), "198.51.100.1").await;
    let (accepted, text) = reader.publish(&author.note(NOW, "more")).await;
    assert!(!accepted && text.starts_with("blocked: your address"), "{text}");
    assert_eq!(reader.query_ids(json!({})).await, ids([&note]));
    assert!(Client::try_connect_from(relay.addr(), "203.0.113.7").await.is_err());
    let stopped = relay.stop().await;
    let binary = Binary::on(stopped.dir());
    binary.configure(&format!("[access]\ndeny_keys = [\"{}\"]\nallow_ips = [\"192.0.2.1\"]\n", denied.hex()));
    binary.import([&denied.note(NOW, ""), &author.note(NOW - 1, "imported")]);
    assert_eq!(binary.exported_ids().len(), 2);
}

/// A key has its quota, an address has its own; both begin anew the next day. Listed keys have none.
#[tokio::test]
async fn quotas_are_for_a_day() {
    let friend = Keys::new(7);
    let relay = Relay::with(|config| {
        config.access.key_events_per_day_max = 2;
        config.access.ip_events_per_day_max = 3;
        config.access.allow_keys = vec![friend.hex()];
    })
    .await;
    let note = |author: u64, content: &str| Keys::new(author).note(NOW, content);
    let mut client = Client::connect_from(relay.addr(), "2001:db8::1").await;
    client.store_all([&note(1, "a"), &note(1, "b")]).await;
    let (accepted, text) = client.publish(&note(1, "c")).await;
    assert!(!accepted && text.starts_with("rate-limited: this key"), "{text}");
    let mut forged = note(2, "forged");
    forged.sig.0[3] ^= 1;
    assert!(!client.publish(&forged).await.0);
    client.store(&note(2, "a")).await;
    let (accepted, text) = client.publish(&note(2, "b")).await;
    assert!(!accepted && text.starts_with("rate-limited: your address"), "{text}");
    let mut neighbour = Client::connect_from(relay.addr(), "2001:db8::2").await;
    assert!(!neighbour.publish(&note(3, "a")).await.0, "the same line");
    let mut elsewhere = Client::connect_from(relay.addr(), "192.0.2.1").await;
    elsewhere.store(&note(2, "b")).await;
    for number in 0..5 {
        client.store(&friend.note(NOW, &number.to_string())).await;
    }
    relay.set_now(NOW + 86_400);
    client.store(&note(1, "c")).await;
}

/// Whom a root follows may publish as soon as the relay has read the list, whom he follows no more may not.
#[tokio::test]
async fn the_web_of_trust_follows_the_roots() {
    let (root, friend) = (Keys::new(1), Keys::new(2));
    let relay = Relay::with(|config| {
        config.access.write = Writers::Listed;
        config.trust.roots = vec![root.hex()];
    })
    .await;
    let mut client = relay.client().await;
    let follow =
        |at, keys: &[&Keys]| keys.iter().fold(root.draft(3, at), |draft, keys| draft.tag(["p", &keys.hex()])).sign();
    client.store(&follow(NOW, &[&friend])).await;
    let mut count = 0;
    let mut publish_until = async |wanted: bool| loop {
        count += 1;
        let (accepted, text) = client.publish(&friend.note(NOW, &count.to_string())).await;
        if accepted == wanted {
            return text;
        }
        // Reading the list takes a moment.
        assert!(accepted || text.starts_with("error: ") || text.starts_with("auth-required: "), "{text}");
    };
    publish_until(true).await;
    let mut root_client = relay.client().await;
    root_client.store(&follow(NOW + 1, &[])).await;
    assert!(publish_until(false).await.starts_with("auth-required: "));
}

/// A relay that only members write to still takes messages to them, and says that it restricts writing.
#[tokio::test]
async fn messages_reach_listed_keys() {
    let owner = Keys::new(1);
    let relay = Relay::with(|config| {
        config.access.write = Writers::Listed;
        config.info.pubkey = owner.hex();
    })
    .await;
    let mut client = relay.client().await;
    let wrap =
        |tags: &[&str]| tags.iter().fold(Keys::new(5).draft(1059, NOW), |draft, key| draft.tag(["p", key])).sign();
    client.store(&wrap(&[&owner.hex()])).await;
    let (accepted, text) = client.publish(&wrap(&[&owner.hex(), &Keys::new(6).hex()])).await;
    assert!(!accepted && text.starts_with("auth-required: "), "{text}");
    let friend = Keys::new(6).note(NOW, "passed on");
    client.prove(&Keys::new(6)).await;
    assert!(client.publish(&friend).await.1.starts_with("restricted: "));
    client.prove(&owner).await;
    client.store(&friend).await;
    let response = request(relay.addr(), "GET / HTTP/1.1", &["Accept: application/nostr+json"]).await;
    let info: serde_json::Value = serde_json::from_str(&response.body).unwrap();
    assert_eq!(info["limitation"]["restricted_writes"], true);
}
