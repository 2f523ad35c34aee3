//! Stored queries from a streaming replica: never less than this process knows to be stored, and never without an answer.
//! And what happens when the replica takes the primary's place.

use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use sledge::protocol::Event;
use sledge::store::Store;
use sledge::store::postgres::{Options, PostgresStore};

use crate::support::client::PATIENCE;
use crate::support::cluster::Cluster;
use crate::support::stores::{count, in_order, newest, query, read, row_ids};
use crate::support::{Keys, NOW, Relay, ids, verified};

/// A replica that has caught up answers, even with the primary away; one that lags or is gone is passed over.
#[test]
fn a_replica_answers_where_it_has_caught_up() {
    let cluster = Cluster::start("");
    let url = cluster.database();
    let name = url.split(['/', '?']).nth(3).unwrap();
    let writer = PostgresStore::open(&Options::new(&url)).unwrap();
    let notes: Vec<Event> = (0..20).map(|n| Keys::new(1).note(NOW + n, "")).collect();
    writer.apply(&notes[..10].iter().map(verified).collect::<Vec<_>>(), NOW).unwrap();
    cluster.start_standby();
    let store = PostgresStore::open(&Options { read_urls: vec![cluster.standby_url(name)], ..Options::new(&url) });
    let store = store.unwrap();
    let everything = || query(&[newest("{}", 100)], NOW);
    let seen = || row_ids(&read(&store, everything(), usize::MAX).0);
    let position = "SELECT next FROM sledge.head";
    while cluster.standby_sql(name, position) != cluster.sql(name, position) {}
    cluster.restart(|| {
        assert_eq!(seen(), in_order(&notes[..10]), "from the replica: the primary is away");
        assert_eq!(count(&store, everything()), 10);
        assert!(store.contains(&notes[0].id).is_err(), "what must be exact is asked of the primary");
    });
    cluster.standby_sql("postgres", "SELECT pg_wal_replay_pause()");
    while store.apply(&notes[10..].iter().map(verified).collect::<Vec<_>>(), NOW).is_err() {}
    assert_eq!(seen(), in_order(&notes), "one's own writes are seen, whatever the replica has");
    assert_eq!(cluster.standby_sql(name, "SELECT count(*) FROM sledge.events"), "10", "it lags");
    store.remove(&[notes[0].id], sledge::store::Removal::Operator).unwrap();
    assert_eq!(seen(), in_order(&notes[1..]), "so are removals");
    cluster.stop_standby();
    assert_eq!(seen(), in_order(&notes[1..]), "a replica that is gone is passed over");
}

/// The primary is killed while events come in and its synchronous standby is promoted: relays that know both hosts go on by
/// themselves, nothing that was acknowledged is lost, and a subscriber of another relay gets each event once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_standby_is_found_and_nothing_acknowledged_is_lost() {
    const EVENTS: u64 = 120;
    let cluster = Arc::new(Cluster::start(""));
    let name = cluster.database().split(['/', '?']).nth(3).unwrap().to_owned();
    cluster.start_standby();
    cluster.wait_for_standby();
    let relay =
        async || Relay::over(Arc::new(PostgresStore::open(&Options::new(cluster.either_url(&name))).unwrap())).await;
    let (relay, other) = (relay().await, relay().await);
    let (mut client, mut reader) = (relay.client().await, other.client().await);
    reader.req("all", &[json!({"limit": 0})]).await;
    let events: Vec<Event> = (0..EVENTS).map(|n| Keys::new(1).note(NOW + n, "")).collect();
    let mut failing_over = None;
    for (number, event) in events.iter().enumerate() {
        if number == 40 {
            let cluster = cluster.clone();
            failing_over = Some(tokio::task::spawn_blocking(move || cluster.fail_over()));
        }
        let began = Instant::now();
        loop {
            let (accepted, text) = client.publish(event).await;
            if accepted {
                break;
            }
            assert!(text.starts_with("error: ") && began.elapsed() < PATIENCE, "{text}");
        }
    }
    failing_over.unwrap().await.unwrap();
    // In whatever order: an event that was stored without an answer came before its repetition.
    let mut heard = Vec::new();
    while heard.len() < events.len() {
        heard.push(reader.live("all").await["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(heard, ids(&events));
    assert_eq!(cluster.standby_sql(&name, "SELECT count(*) FROM sledge.events"), EVENTS.to_string());
    assert_eq!(reader.query_ids(json!({"limit": 500})).await, in_order(&events));
    relay.stop().await;
    other.stop().await;
}
