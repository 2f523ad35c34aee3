//! NIP-13, proof of work: what is asked, what counts, and who is exempt.

use serde_json::{Value, json};
use sledge::protocol::{Event, pow};

use crate::http::request;
use crate::support::{Binary, Keys, NOW, Relay, ids};

/// An event of this kind with at least, and one with less than, `bits` of work; both aim for `target`.
fn mined(kind: u16, bits: u32, target: Option<u32>) -> [Event; 2] {
    let event = |nonce: u64| {
        let mut tag = vec!["nonce".to_owned(), nonce.to_string()];
        tag.extend(target.map(|target| target.to_string()));
        Keys::new(1).draft(kind, NOW).tag(tag).sign()
    };
    let find = |wanted: &dyn Fn(u32) -> bool| {
        (0..).map(event).find(|event| wanted(pow::difficulty(&event.id))).expect("an endless search")
    };
    [find(&|found| found >= bits), find(&|found| found < bits)]
}

/// The general minimum and that of a kind, announced in NIP-11; too little is refused as `pow:` and reaches nobody.
#[tokio::test]
async fn the_minimum_holds_by_kind() {
    let relay = Relay::with(|config| {
        config.access.pow_min = 6;
        config.access.pow_rules = sledge::config::Config::parse(
            "access.pow_rules = [{ kinds = [7], bits = 0 }, { kinds = [\"1059-1060\"], bits = 8 }]",
            None,
        )
        .unwrap()
        .access
        .pow_rules;
    })
    .await;
    let (mut reader, mut client) = (relay.client().await, relay.client().await);
    reader.req("live", &[json!({})]).await;
    for (kind, bits) in [(1, 6), (30_023, 6), (20_001, 6), (1059, 8)] {
        let [enough, too_little] = mined(kind, bits, Some(bits));
        let (accepted, text) = client.publish(&too_little).await;
        assert!(!accepted && text.starts_with("pow: ") && text.contains(&format!(" {bits} are needed")), "{text}");
        client.store(&enough).await;
    }
    client.store(&Keys::new(2).draft(7, NOW).sign()).await;
    let first = reader.live("live").await;
    assert_eq!(first["id"], json!(mined(1, 6, Some(6))[0].id.to_hex()));
    let response = request(relay.addr(), "GET / HTTP/1.1", &["Accept: application/nostr+json"]).await;
    let info: Value = serde_json::from_str(&response.body).unwrap();
    assert_eq!(info["limitation"]["min_pow_difficulty"], 6);
    assert_eq!(info["limitation"]["restricted_writes"], true);
}

/// Whoever aims lower than what is needed is refused, however lucky; without an aim the bits count.
#[tokio::test]
async fn a_low_target_is_refused() {
    let relay = Relay::with(|config| config.access.pow_min = 8).await;
    let mut client = relay.client().await;
    let [lucky, _] = mined(1, 8, Some(4));
    let (accepted, text) = client.publish(&lucky).await;
    assert!(!accepted && text.starts_with("pow: 4 bits"), "{text}");
    client.store(&mined(1, 8, None)[0]).await;
    client.store(&mined(1, 8, Some(8))[0]).await;
}

/// Requests to vanish are followed without work (NIP-62), and the operator's import needs none.
#[tokio::test]
async fn vanishing_and_import_need_no_work() {
    let relay = Relay::with(|config| {
        config.access.pow_min = 40;
        config.access.auth_required_to_write = true;
    })
    .await;
    let vanish = Keys::new(1).draft(62, NOW).tag(["relay", "ALL_RELAYS"]).sign();
    relay.client().await.store(&vanish).await;
    let binary = Binary::new();
    binary.configure("[access]\npow_min = 40\n");
    let note = Keys::new(2).note(NOW, "");
    binary.import([&note]);
    assert_eq!(binary.exported_ids(), ids([&note]));
}
