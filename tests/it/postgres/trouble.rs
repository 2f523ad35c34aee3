//! A database that is away, comes back, dies in the middle of a batch, is full, or has somebody else at its tables.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use sledge::protocol::Event;
use sledge::protocol::supersede::Verdict;
use sledge::store::postgres::{Options, PostgresStore};
use sledge::store::{Store, StoreError};

use crate::full_disk::Disk;
use crate::support::client::PATIENCE;
use crate::support::cluster::{Cluster, open};
use crate::support::{Client, Keys, NOW, Relay, ids, json_of, verified};

/// Publishes until it is stored: a database that starts again takes its time.
async fn store_patiently(client: &mut Client, event: &Event) {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let (accepted, text) = client.publish(event).await;
        if accepted {
            return;
        }
        assert!(text.starts_with("error: "), "{text}");
        // The test must not take the time that the database needs to start.
        tokio::task::yield_now().await;
    }
    panic!("the database does not come back");
}

/// Away at the start: it is waited for, as long as was said. Away while serving: publishers and readers are told, the
/// connections live on, and everything goes on by itself when it is back; a subscription misses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_goes_away_and_comes_back() {
    let cluster = Arc::new(Cluster::start(""));
    let url = cluster.database();
    let options = Options { timeout: Duration::from_secs(2), poll: Duration::from_millis(100), ..Options::new(&url) };
    let relay = Relay::over(Arc::new(PostgresStore::open(&options).unwrap())).await;
    let (mut client, mut reader) = (relay.client().await, relay.client().await);
    let [first, lost, last] = ["first", "lost", "last"].map(|text| Keys::new(1).note(NOW, text));
    reader.req("all", &[json!({})]).await;
    client.store(&first).await;
    assert_eq!(reader.live("all").await["id"], json!(first.id.to_hex()));
    let (down, is_down) = tokio::sync::oneshot::channel();
    let (up, may_go_up) = std::sync::mpsc::channel::<()>();
    let restarting = {
        let cluster = cluster.clone();
        tokio::task::spawn_blocking(move || {
            cluster.restart(|| {
                down.send(()).unwrap();
                may_go_up.recv().unwrap();
            })
        })
    };
    is_down.await.unwrap();
    let (accepted, text) = client.publish(&lost).await;
    assert!(!accepted && text.starts_with("error: "), "{text}");
    assert!(client.refused("away", &[json!({})]).await.starts_with("error: "));
    let impatient = Options { start_timeout: Duration::ZERO, ..options.clone() };
    let refused = tokio::task::spawn_blocking(move || PostgresStore::open(&impatient).map(drop)).await.unwrap();
    assert!(matches!(refused, Err(StoreError::Away(_))), "{refused:?}");
    let patient = Options { start_timeout: Duration::from_secs(60), ..options.clone() };
    let waiting = tokio::task::spawn_blocking(move || PostgresStore::open(&patient).unwrap());
    up.send(()).unwrap();
    restarting.await.unwrap();
    store_patiently(&mut client, &last).await;
    assert_eq!(reader.live("all").await["id"], json!(last.id.to_hex()));
    let late = waiting.await.unwrap();
    late.apply(&[verified(&Keys::new(2).note(NOW, "by another"))], NOW).unwrap();
    assert_eq!(reader.live("all").await["content"], "by another");
    let mut stored = client.query_ids(json!({"authors": [Keys::new(1).hex()]})).await;
    let mut expected = ids([&first, &last]);
    stored.sort();
    expected.sort();
    assert_eq!(stored, expected, "what was answered with an error was not stored");
    relay.stop().await;
}

/// Connections are cut and the server is killed in the middle of batches: what was acknowledged is there, nothing is
/// there twice, and a subscriber of another relay gets each event exactly once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_the_middle_of_a_batch() {
    const EVENTS: u64 = 600;
    let cluster = Arc::new(Cluster::start(""));
    let url = cluster.database();
    let options = Options { poll: Duration::from_millis(50), ..Options::new(&url) };
    let relay = async || Relay::over(Arc::new(PostgresStore::open(&options).unwrap())).await;
    let (relay, other) = (relay().await, relay().await);
    let (mut client, mut reader) = (relay.client().await, other.client().await);
    reader.req("all", &[json!({"limit": 0})]).await;
    let events: Vec<Event> = (0..EVENTS).map(|n| Keys::new(1).note(NOW + n % 5, &n.to_string())).collect();
    let began = Instant::now();
    for (round, chunk) in events.chunks(50).enumerate() {
        let mut left: Vec<&Event> = chunk.iter().collect();
        let mut killing = Some(kill_something(round, cluster.clone()));
        while !left.is_empty() {
            assert!(began.elapsed() < 3 * PATIENCE, "the database does not come back");
            for event in &left {
                client.send(format!("[\"EVENT\",{}]", json_of(event))).await;
            }
            let mut refused = Vec::new();
            for event in left {
                match client.ok_for(&event.id.to_hex()).await {
                    (true, _) => {}
                    (false, text) => {
                        assert!(text.starts_with("error: "), "{text}");
                        refused.push(event);
                    }
                }
            }
            left = refused;
            if let Some(killing) = killing.take() {
                killing.await.unwrap();
            }
        }
    }
    let last = Keys::new(1).note(NOW + 9, "last");
    store_patiently(&mut client, &last).await;
    let mut live = reader.live_before("all", &last.id.to_hex()).await;
    let mut expected = ids(&events);
    live.sort();
    expected.sort();
    assert_eq!(live, expected, "each event once, live");
    let stored = tokio::task::spawn_blocking(move || open(&url).stats().events).await.unwrap();
    assert_eq!(stored, EVENTS + 1);
}

/// Cuts all connections of the relays, or kills the server and starts it again, while events are on their way.
fn kill_something(round: usize, cluster: Arc<Cluster>) -> tokio::task::JoinHandle<()> {
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'sledge'";
    tokio::task::spawn_blocking(move || {
        if round % 4 == 3 { cluster.restart(|| {}) } else { drop(cluster.sql("postgres", cut)) }
    })
}

/// Somebody else's locks make a deadlock with the writer: the database picks the writer, and the writer tries again.
#[test]
fn a_deadlock_is_tried_again() {
    let cluster = Cluster::shared();
    let url = cluster.database();
    let store = open(&url);
    let note = Keys::new(1).note(NOW, "");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut rival = runtime.block_on(async {
        use sqlx::Connection;
        let mut rival = sqlx::PgConnection::connect(&url).await.unwrap();
        let take = "SET deadlock_timeout = '60s'; BEGIN; LOCK TABLE sledge.events IN ACCESS EXCLUSIVE MODE";
        sqlx::raw_sql(take).execute(&mut rival).await.unwrap();
        rival
    });
    thread::scope(|scope| {
        let writing = scope.spawn(|| store.apply(&[verified(&note)], NOW));
        let waits =
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sledge' AND wait_event = 'relation'";
        while cluster.sql("postgres", waits) == "0" {}
        runtime.block_on(async {
            // Waits for the writer, which waits for the table.
            sqlx::raw_sql("UPDATE sledge.head SET next = next").execute(&mut rival).await.unwrap();
            sqlx::raw_sql("COMMIT").execute(&mut rival).await.unwrap();
        });
        assert_eq!(writing.join().unwrap().unwrap().verdicts, [Verdict::Store]);
    });
    let name = url.split(['/', '?']).nth(3).unwrap();
    let deadlocks = format!("SELECT deadlocks FROM pg_stat_database WHERE datname = '{name}'");
    assert!(store.contains(&note.id).unwrap());
    drop(store);
    drop(runtime);
    let mut seen = BTreeSet::new();
    // The server counts with some delay.
    while !seen.contains("1") {
        seen.insert(cluster.sql("postgres", &deadlocks));
    }
}

/// A full disk: publishers are told so, reading goes on, and so does writing once there is room.
#[test]
fn a_full_disk_is_told_and_got_over() {
    let cluster = Cluster::shared();
    let place = cluster.dir().join("small");
    std::fs::create_dir(&place).unwrap();
    let Some(disk) = Disk::at(&place, 64) else { return };
    cluster.own(&place);
    cluster.sql("postgres", &format!("CREATE TABLESPACE small LOCATION '{}'", place.display()));
    cluster.sql("postgres", "CREATE DATABASE small TABLESPACE small");
    let store = open(&cluster.url("small"));
    let first = Keys::new(1).note(NOW, "first");
    store.apply(&[verified(&first)], NOW).unwrap();
    disk.fill_but(0);
    let large = |n: u64| verified(&Keys::new(1).note(NOW + n, &format!("{n} {}", incompressible(200_000))));
    let error = (0..200).find_map(|n| store.apply(&[large(n)], NOW).err()).expect("the disk is full");
    assert!(matches!(error, StoreError::DiskFull), "{error}");
    assert!(store.contains(&first.id).unwrap());
    disk.make_room();
    assert_eq!(store.apply(&[large(999)], NOW).unwrap().verdicts, [Verdict::Store]);
    drop(store);
    cluster.sql("postgres", "DROP DATABASE small WITH (FORCE)");
    cluster.sql("postgres", "DROP TABLESPACE small");
}

/// Text that no compression makes small.
fn incompressible(chars: usize) -> String {
    let mut state = 7_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'0' + (state >> 33) as u8 % 75)
    };
    std::iter::repeat_with(next).take(chars).collect()
}
