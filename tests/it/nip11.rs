//! NIP-11, the relay information document: on the same URI, readable from any web page, true to the settings.

use serde_json::{Value, json};

use crate::http::request;
use crate::support::{Keys, NOW, Relay};

const ACCEPT: &str = "Accept: application/nostr+json";

/// The document mirrors the limits that are in force, and those limits are in force.
#[tokio::test]
async fn limits_are_announced_and_kept() {
    let relay = Relay::with(|config| {
        config.info.name = "a relay of the tests".to_owned();
        config.limits.frame_bytes_max = 65_536;
        config.limits.subscriptions_max = 3;
        config.limits.limit_max = 7;
        config.limits.limit_default = 4;
        config.limits.event_tags_max = 10;
        config.limits.content_chars_max = 100;
        config.limits.created_at_ahead_secs_max = 60;
        config.limits.created_at_behind_secs_max = 1_000;
    })
    .await;
    let response = request(relay.addr(), "GET / HTTP/1.1", &[ACCEPT]).await;
    assert_eq!(response.status, 200);
    assert!(response.header("content-type").is_some_and(|kind| kind.starts_with("application/nostr+json")));
    let info: Value = serde_json::from_str(&response.body).unwrap();
    assert_eq!(info["name"], "a relay of the tests");
    let limits = &info["limitation"];
    for (key, value) in [
        ("max_message_length", json!(65_536)),
        ("max_subscriptions", json!(3)),
        ("max_limit", json!(7)),
        ("default_limit", json!(4)),
        ("max_subid_length", json!(64)),
        ("max_event_tags", json!(10)),
        ("max_content_length", json!(100)),
        ("created_at_upper_limit", json!(60)),
        ("created_at_lower_limit", json!(1_000)),
        ("auth_required", json!(false)),
        ("payment_required", json!(false)),
    ] {
        assert_eq!(limits[key], value, "{key}");
    }
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let tags = |count| (0..count).fold(keys.draft(1, NOW), |draft, _| draft.tag(["t", "x"])).sign();
    client.store(&tags(10)).await;
    client.store(&keys.note(NOW, &"é".repeat(100))).await;
    client.store(&keys.note(NOW - 1_000, "")).await;
    client.store(&keys.note(NOW + 60, "")).await;
    for beyond in [tags(11), keys.note(NOW, &"é".repeat(101)), keys.note(NOW - 1_001, ""), keys.note(NOW + 61, "")] {
        let (accepted, text) = client.publish(&beyond).await;
        assert!(!accepted && text.starts_with("invalid: "), "{text}");
    }
}

/// Authentication is announced as required where nothing works without it (NIP-42).
#[tokio::test]
async fn required_authentication_is_announced() {
    for (read, write) in [(true, true), (true, false), (false, true)] {
        let relay = Relay::with(|config| {
            config.access.auth_required_to_read = read;
            config.access.auth_required_to_write = write;
        })
        .await;
        let response = request(relay.addr(), "GET / HTTP/1.1", &[ACCEPT]).await;
        let info: Value = serde_json::from_str(&response.body).unwrap();
        assert_eq!(info["limitation"]["auth_required"], json!(read && write));
    }
}

/// The NIPs of this relay are listed in order, each once, and those of this issue are among them.
#[tokio::test]
async fn supported_nips_are_listed() {
    let relay = Relay::start().await;
    let response = request(relay.addr(), "GET / HTTP/1.1", &[ACCEPT]).await;
    let info: Value = serde_json::from_str(&response.body).unwrap();
    let nips: Vec<u64> = info["supported_nips"].as_array().unwrap().iter().map(|nip| nip.as_u64().unwrap()).collect();
    assert!(nips.is_sorted_by(|a, b| a < b), "{nips:?}");
    for nip in [1, 2, 9, 11, 13, 17, 40, 42, 45, 59, 62, 67, 70, 77] {
        assert!(nips.contains(&nip), "NIP-{nip} is not in {nips:?}");
    }
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
}

/// Any web page may read it: CORS headers on the answer and on the preflight.
#[tokio::test]
async fn web_pages_may_read_it() {
    let relay = Relay::start().await;
    for line in ["GET / HTTP/1.1", "OPTIONS / HTTP/1.1"] {
        let response = request(relay.addr(), line, &[ACCEPT, "Origin: https://client.example.com"]).await;
        assert!(response.status == 200 || response.status == 204, "{line}: {}", response.status);
        assert_eq!(response.header("access-control-allow-origin"), Some("*"), "{line}");
        assert!(response.header("access-control-allow-headers").is_some(), "{line}");
        assert!(response.header("access-control-allow-methods").is_some(), "{line}");
    }
}
