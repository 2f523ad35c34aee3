//! Live events across processes: relays on one database, each with connections and a store of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use sledge::protocol::Event;
use sledge::store::Store;
use sledge::store::postgres::{Options, PostgresStore};

use crate::fanout;
use crate::support::cluster::{Cluster, open};
use crate::support::{Keys, NOW, Relay, ids};

/// Two relays on one database. Looking without a notification is so rare that it plays no part.
async fn two_relays() -> [Relay; 2] {
    let url = Cluster::shared().database();
    let seldom = Options { poll: Duration::from_secs(3_600), ..Options::new(&url) };
    let relay = async || Relay::over(Arc::new(PostgresStore::open(&seldom).unwrap())).await;
    [relay().await, relay().await]
}

/// What one relay stores reaches the subscribers of the other, in the order of storing, stored and live without gap or
/// repeat; ephemeral events too; removals take effect on both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t26_events_reach_the_subscribers_of_another_process() {
    let [a, b] = two_relays().await;
    let (mut writer, mut other, mut reader) = (a.client().await, b.client().await, b.client().await);
    let keys = Keys::new(1);
    let before = keys.note(NOW, "before");
    assert_eq!(reader.req("all", &[json!({})]).await.ids(), [] as [&str; 0]);
    writer.store(&before).await;
    assert_eq!(reader.live("all").await["id"], json!(before.id.to_hex()));
    // Whoever subscribes from now on has it from the store.
    assert_eq!(other.query_ids(json!({})).await, ids([&before]));
    let notes: Vec<Event> = (0..50).map(|n| keys.note(NOW + n, &n.to_string())).collect();
    writer.store_all(&notes[..30]).await;
    other.store_all(&notes[30..]).await;
    let ephemeral = keys.draft(20_001, NOW).content("passing").sign();
    let last = keys.note(NOW + 99, "last");
    writer.store(&last).await;
    let live = reader.live_before("all", &last.id.to_hex()).await;
    assert_eq!(live, ids(&notes), "in the order of storing");
    writer.store(&ephemeral).await;
    assert_eq!(reader.live("all").await["id"], json!(ephemeral.id.to_hex()));
    other.store(&keys.deletion(NOW + 100, &[("e", &before.id.to_hex())])).await;
    assert_eq!(writer.query_ids(json!({"ids": ids([&before])})).await, Vec::<String>::new());
    assert!(writer.publish(&before).await.1.starts_with("blocked: "));
    let duplicate = other.publish(&notes[0]).await;
    assert!(duplicate.0 && duplicate.1.starts_with("duplicate: "), "{duplicate:?}");
    for relay in [a, b] {
        relay.stop().await;
    }
}

/// The proof of no gap and no repeat, with publishers, observers and readers on different relays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t26_no_gap_and_no_repeat_across_processes() {
    let [a, b] = two_relays().await;
    fanout::no_gap_and_no_repeat(&[&a, &b], 300).await;
}

/// Private events stay private on the way through another process (T34).
#[tokio::test]
async fn t34_private_events_do_not_leak_across_processes() {
    let [a, b] = two_relays().await;
    let (mut writer, mut stranger) = (a.client().await, b.client().await);
    stranger.req("all", &[json!({"limit": 0})]).await;
    let (author, recipient) = (Keys::new(1), Keys::new(2));
    let wrap = author.draft(1_059, NOW).tag(["p", &recipient.hex()]).sign();
    let note = author.note(NOW, "for all");
    writer.store(&wrap).await;
    writer.store(&note).await;
    assert_eq!(stranger.live("all").await["id"], json!(note.id.to_hex()), "the first that arrives is for all");
}

/// Without any notification (a pooler may swallow them) the look now and then finds what there is.
#[tokio::test]
async fn lost_notifications_cost_time_and_no_event() {
    let url = Cluster::shared().database();
    // This one listens on another database, so it never hears of anything.
    let deaf = Options {
        listen_url: Some(Cluster::shared().url("postgres")),
        poll: Duration::from_millis(20),
        ..Options::new(&url)
    };
    let (a, b) = (open(&url), PostgresStore::open(&deaf).unwrap());
    let (a, b) = (Relay::over(Arc::new(a)).await, Relay::over(Arc::new(b)).await);
    let (mut writer, mut reader) = (a.client().await, b.client().await);
    reader.req("all", &[json!({"limit": 0})]).await;
    let events: Vec<Event> = (0..5).map(|n| Keys::new(1).note(NOW + n, "")).collect();
    writer.store_all(&events).await;
    for event in &events {
        assert_eq!(reader.live("all").await["id"], json!(event.id.to_hex()));
    }
}

/// How long an event takes from one relay's OK to a subscriber of the other; printed, since a machine may be busy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_way_to_another_process_is_short() {
    let [a, b] = two_relays().await;
    let (mut writer, mut reader) = (a.client().await, b.client().await);
    reader.req("all", &[json!({"limit": 0})]).await;
    let mut times = Vec::new();
    for n in 0..40 {
        let event = Keys::new(1).note(NOW + n, "");
        let sent = Instant::now();
        writer.store(&event).await;
        assert_eq!(reader.live("all").await["id"], json!(event.id.to_hex()));
        times.push(sent.elapsed());
    }
    times.sort();
    println!("from publishing to another relay's subscriber: median {:?}, worst {:?}", times[20], times[39]);
}

/// A stored event that comes again with another signature is a duplicate, as in the embedded store, and an unknown one with
/// a wrong signature is invalid (T27).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t27_known_events_with_wrong_signatures_are_duplicates() {
    let dir = tempfile::tempdir().unwrap();
    let stores: [Arc<dyn Store>; 2] =
        [Arc::new(Cluster::shared().store()), Arc::new(crate::support::stores::open_store(dir.path()))];
    for store in stores {
        let relay = Relay::over(store).await;
        let mut client = relay.client().await;
        let [known, unknown] = ["known", "unknown"].map(|content| Keys::new(1).note(NOW, content));
        client.store(&known).await;
        let forged = |event: &Event| Event { sig: Keys::new(1).note(NOW, "another").sig, ..event.clone() };
        let (accepted, text) = client.publish(&forged(&known)).await;
        assert!(accepted && text.starts_with("duplicate:"), "{text}");
        let (accepted, text) = client.publish(&forged(&unknown)).await;
        assert!(!accepted && text.starts_with("invalid:"), "{text}");
        client.assert_alive().await;
    }
}
