//! Plugins: a script that was written to the documented protocol of strfry's write policy plugins, unchanged, judges what
//! clients publish.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use sledge::client::clock::World;
use sledge::client::link::LinkOptions;
use sledge::client::mirrors::Mirrors;
use sledge::config::{Config, Direction, OnFailure};
use tempfile::TempDir;

use crate::support::{Binary, Client, Keys, NOW, Relay, ids};

/// Reads a request a line, answers by the event's id, and complains on standard error; a white list in its usual place.
/// Some contents make it fail in the ways in which plugins do.
const SCRIPT: &str = r#"#!/bin/sh
while IFS= read -r line; do
    case $line in
        '{"type":"new",'*) ;;
        *) echo 'unexpected request type' >&2; continue ;;
    esac
    id=${line#*\"event\":\{\"id\":\"}
    id=${id%%\"*}
    case $line in
        *\"content\":\"spam\"*) echo "{\"id\":\"$id\",\"action\":\"reject\",\"msg\":\"blocked: not on white-list\"}" ;;
        *\"content\":\"quiet\"*) echo "{\"id\":\"$id\",\"action\":\"shadowReject\",\"msg\":\"\"}" ;;
        *\"content\":\"hang\"*) exec sleep 1000 ;;
        *\"content\":\"crash\"*) exit 1 ;;
        *\"content\":\"garbage\"*) echo 'Traceback (most recent call last):'; echo "{\"id\":\"$id\",\"action\":\"accept\"}" ;;
        *\"content\":\"who?\"*\"sourceType\":\"IP4\",\"sourceInfo\":\"203.0.113.7\"*\"authed\":\"*)
            echo "{\"id\":\"$id\",\"action\":\"accept\",\"msg\":\"\"}" ;;
        *\"content\":\"from?\"*\"sourceType\":\"Stream\",\"sourceInfo\":\"ws://127.0.0.1:*)
            echo "{\"id\":\"$id\",\"action\":\"accept\",\"msg\":\"\"}" ;;
        *\"content\":\"from?\"*) echo "{\"id\":\"$id\",\"action\":\"reject\",\"msg\":\"not from a stream\"}" ;;
        *\"content\":\"who?\"*) echo "{\"id\":\"$id\",\"action\":\"reject\",\"msg\":\"who are you\"}" ;;
        *) echo "{\"id\":\"$id\",\"action\":\"accept\",\"msg\":\"\"}" ;;
    esac
done
"#;

/// A relay with the script as its plugin, and the folder that holds it.
async fn with_plugin(change: impl FnOnce(&mut Config)) -> (Relay, TempDir) {
    let folder = TempDir::new().unwrap();
    let script = folder.path().join("policy.sh");
    std::fs::write(&script, SCRIPT).unwrap();
    let relay = Relay::with(|config| {
        config.plugin.command = format!("sh {}", script.display());
        change(config);
    })
    .await;
    (relay, folder)
}

/// Publishes new notes until one is taken: after a failure the plugin takes a moment to come back.
async fn until_it_is_back(client: &mut Client) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let note = || Keys::new(9).note(NOW, &format!("back? {}", NEXT.fetch_add(1, Ordering::Relaxed)));
    while !client.publish(&note()).await.0 {}
}

/// What is accepted is stored and delivered, what is rejected is neither, with the plugin's words; what is rejected in the
/// shadow looks taken and is not. Lines that are no answers are passed over, also for ephemeral events.
#[tokio::test]
async fn a_plugin_accepts_and_rejects() {
    let (relay, _script) = with_plugin(|_| {}).await;
    let (mut client, mut reader) = (relay.client().await, relay.client().await);
    reader.req("live", &[json!({})]).await;
    let keys = Keys::new(1);
    let good = keys.note(NOW, "hello");
    client.store(&good).await;
    let (accepted, text) = client.publish(&keys.note(NOW, "spam")).await;
    assert_eq!((accepted, text.as_str()), (false, "blocked: not on white-list"));
    assert_eq!(client.publish(&keys.note(NOW, "quiet")).await, (true, String::new()));
    assert!(!client.publish(&keys.draft(20_001, NOW).content("spam").sign()).await.0);
    let noisy = keys.note(NOW - 1, "garbage");
    client.store(&noisy).await;
    assert_eq!(client.query_ids(json!({})).await, ids([&good, &noisy]));
    assert_eq!(reader.live_before("live", &noisy.id.to_hex()).await, ids([&good]));
    let many: Vec<_> = (0..300).map(|number| keys.note(NOW - 10, &format!("note {number}"))).collect();
    client.store_all(&many).await;
}

/// The plugin is told who sent an event: address, and the key with which he has authenticated.
#[tokio::test]
async fn a_plugin_knows_the_sender() {
    let (relay, _script) = with_plugin(|_| {}).await;
    let mut client = Client::connect_from(relay.addr(), "203.0.113.7").await;
    let keys = Keys::new(1);
    let (accepted, text) = client.publish(&keys.note(NOW, "who?")).await;
    assert_eq!((accepted, text.as_str()), (false, "blocked: who are you"));
    client.prove(&keys).await;
    client.store(&keys.note(NOW, "who?")).await;
}

/// The plugin judges what a mirror brings, and is told from where it comes. What it refuses is not asked for again, and
/// nothing is refused in the shadow there.
#[tokio::test]
async fn a_plugin_judges_mirrored_events() {
    let there = Relay::start().await;
    let (here, _script) = with_plugin(|_| {}).await;
    let keys = Keys::new(1);
    let notes = ["from?", "spam", "quiet", "good"].map(|content| keys.note(NOW, content));
    there.client().await.store_all(&notes).await;
    let mut reader = here.client().await;
    reader.req("r", &[json!({})]).await;
    let mirror = crate::mirror::mirror(there.addr(), Direction::Down, &[json!({})]);
    let mirrors = Mirrors::start(&here.served(), vec![mirror], LinkOptions::default(), &World::system());
    let mut came = BTreeSet::new();
    while came.len() < 2 {
        came.insert(reader.live("r").await["content"].as_str().unwrap().to_owned());
    }
    assert_eq!(came, ["from?", "good"].map(str::to_owned).into());
    let later = keys.note(NOW + 1, "later");
    there.client().await.store(&later).await;
    assert_eq!(reader.live("r").await["content"], "later", "the shadow lets nothing through");
    mirrors.stop().await;
    let mirror = crate::mirror::mirror(there.addr(), Direction::Down, &[json!({})]);
    let moved = crate::mirror::level(&here, mirror).await.unwrap();
    assert_eq!((moved.stored, moved.refused), (0, 2), "{moved:?}");
}

/// A plugin that hangs or crashes holds up no reader, fails what it had as the settings say, and comes back.
#[tokio::test]
async fn a_failing_plugin_holds_up_nobody() {
    let (relay, _script) = with_plugin(|config| config.plugin.timeout_ms = 2_000).await;
    let (mut client, mut other) = (relay.client().await, relay.client().await);
    let keys = Keys::new(1);
    until_it_is_back(&mut client).await;
    for trouble in ["hang", "crash"] {
        let stuck = keys.note(NOW, trouble);
        client.send(format!("[\"EVENT\",{}]", crate::support::json_of(&stuck))).await;
        other.req("reading goes on", &[json!({"limit": 1})]).await;
        let (accepted, text) = client.ok_for(&stuck.id.to_hex()).await;
        assert!(!accepted && text.starts_with("error: "), "{text}");
        until_it_is_back(&mut other).await;
        let (accepted, text) = other.publish(&keys.note(NOW, "spam")).await;
        assert!(!accepted && text.starts_with("blocked: "), "{text}");
    }
    assert_eq!(other.query(json!({"authors": [keys.hex()]})).await.events.len(), 0);
}

/// Declared fail-open, everything is taken while the plugin is down; what is banned is not.
#[tokio::test]
async fn a_plugin_may_fail_open() {
    let relay = Relay::with(|config| {
        config.plugin.command = "exit 1".to_owned();
        config.plugin.on_failure = OnFailure::Accept;
        config.access.deny_keys = vec![Keys::new(2).hex()];
    })
    .await;
    let mut client = relay.client().await;
    client.store(&Keys::new(1).note(NOW, "spam")).await;
    assert!(!client.publish(&Keys::new(2).note(NOW, "")).await.0);
}

/// Stopping answers what the plugin has not: nobody is left waiting, and the program is ended.
#[tokio::test]
async fn stopping_does_not_wait_for_a_plugin() {
    let (relay, _script) = with_plugin(|config| {
        config.plugin.timeout_ms = 600_000;
        config.limits.stop_timeout_ms = 1_000;
    })
    .await;
    let mut client = relay.client().await;
    client.store(&Keys::new(1).note(NOW, "hello")).await;
    let stuck = Keys::new(1).note(NOW, "hang");
    client.send(format!("[\"EVENT\",{}]", crate::support::json_of(&stuck))).await;
    relay.stop().await;
}

/// `sledge import` asks the plugin only when the settings say so.
#[test]
fn import_asks_when_told_to() {
    let binary = Binary::new();
    let script = binary.file("policy.sh", SCRIPT);
    let keys = Keys::new(1);
    let (good, spam, quiet) = (keys.note(NOW, "good"), keys.note(NOW, "spam"), keys.note(NOW, "quiet"));
    let configure = |import| binary.configure(&format!("[plugin]\ncommand = \"sh {script}\"\nimport = {import}\n"));
    configure(true);
    let said = binary.import([&good, &spam, &quiet]).stderr;
    assert!(said.contains("line 2: blocked: not on white-list") && said.contains("refused 2"), "{said}");
    assert_eq!(binary.exported_ids(), ids([&good]));
    configure(false);
    binary.import([&good, &spam]);
    assert_eq!(binary.exported_ids().len(), 2);
}
