//! The store on Postgres: the same suite and the same rules as the other stores, on a throw-away cluster, and what only
//! a database shared by several processes can do.

mod live;
mod moving;
mod operation;
mod pooler;
mod replica;
mod trouble;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, Verified};
use sledge::store::postgres::{Options, PostgresStore};
use sledge::store::quota::Rules;
use sledge::store::{Progress, Store, StoreError};

use crate::support::cluster::{Cluster, open};
use crate::support::stores::{newest, query, read, row_ids};
use crate::support::{Keys, NOW, ids, verified};
use crate::{model, retention, slots, store_suite};

fn shared_store() -> Arc<dyn Store> {
    Arc::new(Cluster::shared().store())
}

/// The conformance suite, unchanged.
#[test]
fn the_postgres_store_conforms() {
    store_suite::run_all(&shared_store);
}

/// The embedded store, Postgres and the rules, side by side on the same random input.
#[test]
fn both_stores_are_their_rules() {
    model::stores_are_their_rules(&|| Some(shared_store()), 30);
}

/// The same for the order of arrival.
#[test]
fn the_order_of_arrival_does_not_matter_on_postgres() {
    model::order_of_arrival_does_not_matter(&|| Some(shared_store()), 20);
}

/// Age and quota: the same events go, the same stay, the same are refused.
#[test]
fn a_database_keeps_to_its_rules() {
    retention::run_all(&|test| {
        let url = Cluster::shared().database();
        let open = |rules: &Rules, quota_bytes| {
            let retention = rules.clone().with_quota_bytes(quota_bytes);
            let opened = PostgresStore::open(&Options { retention, ..Options::new(&url) });
            Arc::new(opened.unwrap()) as Arc<dyn Store>
        };
        test(&retention::Place { open: &open, rebuild: &|| {} });
    });
}

/// What one process has evicted, no other takes back, and two that make room at once do not make too much.
#[test]
fn processes_share_a_quota() {
    let url = Cluster::shared().database();
    let open = |quota_bytes| {
        let retention = Rules::default().with_quota_bytes(quota_bytes);
        PostgresStore::open(&Options { retention, ..Options::new(&url) }).unwrap()
    };
    let notes: Vec<Event> = (0..200).map(|n| Keys::new(1).note(1_000 + n, &"x".repeat(1_000))).collect();
    open(1 << 40).apply(&notes.iter().map(verified).collect::<Vec<_>>(), NOW).unwrap();
    let bytes = open(1 << 40).stats().retention.unwrap().used_bytes;
    let (one, other) = (open(bytes / 2), open(bytes / 2));
    assert!(one.apply(&[], NOW).unwrap().over_quota);
    thread::scope(|scope| {
        for store in [&one, &other] {
            scope.spawn(|| while store.retain(NOW, 7).unwrap().more {});
        }
    });
    let left = one.stats().events;
    assert!((85..=90).contains(&left), "{left} of 200");
    for store in [&one, &other] {
        store.retain(NOW, 7).unwrap();
        assert!(!store.keeps(&notes[200 - left as usize - 1], NOW) && store.keeps(&notes[200 - left as usize], NOW));
    }
}

/// The settings slot: the same verdicts and the same view of heads and former versions as the plain store's.
#[test]
fn settings_agree_with_the_plain_store() {
    let url = Cluster::shared().database();
    slots::agrees_with_the_plain_store(&|_| Box::new(open(&url)), 1);
}

/// Blobs are there for every process, the last one that was saved under a name; wrong names are refused.
#[test]
fn blobs_are_shared() {
    let url = Cluster::shared().database();
    let (one, other) = (open(&url), open(&url));
    assert_eq!(one.load_state("policy").unwrap(), None);
    one.save_state("policy", b"decided").unwrap();
    other.save_state("key", b"\0\xff").unwrap();
    other.save_state("policy", b"decided later").unwrap();
    assert_eq!(one.load_state("policy").unwrap().as_deref(), Some(&b"decided later"[..]));
    assert_eq!(one.load_state("key").unwrap().as_deref(), Some(&b"\0\xff"[..]));
    assert!(one.save_state("../x", b"").is_err());
}

/// What is in a database is there for whoever opens it next, several at once, and opening it changes nothing.
#[test]
fn several_open_one_database_at_once() {
    let url = Cluster::shared().database();
    let note = Keys::new(1).note(NOW, "");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| open(&url));
        }
    });
    open(&url).apply(&[verified(&note)], NOW).unwrap();
    let again = open(&url);
    assert!(again.contains(&note.id).unwrap());
    assert_eq!(again.stats().events, 1);
}

/// Tables of a newer program are left alone, and the message says what to do.
#[test]
fn newer_tables_are_refused() {
    let cluster = Cluster::shared();
    let url = cluster.database();
    drop(open(&url));
    let name = url.split(['/', '?']).nth(3).unwrap();
    cluster.sql(name, "UPDATE sledge.version SET version = 99");
    let error = PostgresStore::open(&Options::new(&url)).map(drop).unwrap_err().to_string();
    assert!(error.contains("version 99") && error.contains("newer"), "{error}");
    assert_eq!(cluster.sql(name, "SELECT version FROM sledge.version"), "99");
}

/// Two processes write versions of the same addresses, and the same events: each event is stored by exactly one of them,
/// and the version that wins is the one that the rules name (T1).
#[test]
fn t01_two_processes_cannot_both_win() {
    const EVENTS: u64 = 120;
    let url = Cluster::shared().database();
    let version = |n: u64| Keys::new(n % 3).draft(30_023, NOW + n % 7).tag(["d", "x"]).content(n.to_string()).sign();
    let notes: Vec<Event> = (0..EVENTS).map(|n| Keys::new(9).note(NOW + n, "")).collect();
    let versions: Vec<Event> = (0..EVENTS).map(version).collect();
    let batch: Vec<Verified<Event>> = notes.iter().chain(&versions).map(verified).collect();
    let stored: Vec<Vec<usize>> = thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|seed: usize| {
                let (url, mut order) = (&url, (0..batch.len()).collect::<Vec<_>>());
                order.rotate_left(seed * 70);
                let batch = &batch;
                scope.spawn(move || {
                    let store = open(url);
                    let mut stored = Vec::new();
                    for part in order.chunks(5) {
                        let events: Vec<_> = part.iter().map(|at| batch[*at].clone()).collect();
                        let verdicts = store.apply(&events, NOW).unwrap().verdicts;
                        let new = part.iter().zip(verdicts).filter(|(_, verdict)| *verdict == Verdict::Store);
                        stored.extend(new.map(|(at, _)| *at));
                    }
                    stored
                })
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    let mut all: Vec<usize> = stored.into_iter().flatten().collect();
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count, "an event was stored twice");
    assert_eq!(all.iter().filter(|at| **at < notes.len()).count(), notes.len(), "each note once");
    let winners = (0..3).map(|author| {
        let own = versions.iter().filter(|event| event.pubkey == Keys::new(author).pubkey());
        own.max_by(|a, b| a.created_at.cmp(&b.created_at).then(b.id.cmp(&a.id))).unwrap()
    });
    let mut expected = ids(winners);
    let (rows, _) = read(&open(&url), query(&[newest("{\"kinds\":[30023]}", 100)], NOW), usize::MAX);
    let mut found = row_ids(&rows);
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

/// Every plan is a range of an index: nothing reads a table through, and how much is read follows the limit and not what
/// is stored.
#[test]
fn every_plan_reads_a_range_of_an_index() {
    let cluster = Cluster::shared();
    let url = cluster.database();
    let name = url.split(['/', '?']).nth(3).unwrap();
    let store = open(&url);
    let notes: Vec<Event> = (0..3_000)
        .map(|n| Keys::new(n % 2).draft(1, NOW - n).tag(["t", "x"]).tag(["e", &Keys::new(1).hex()]).sign())
        .collect();
    for batch in notes.chunks(500) {
        store.apply(&batch.iter().map(verified).collect::<Vec<_>>(), NOW).unwrap();
    }
    drop(store);
    let authors = format!("\"authors\":[\"{}\"]", Keys::new(1).hex());
    let filters = [
        "{}".to_owned(),
        format!("{{\"until\":{}}}", NOW - 1_500),
        "{\"kinds\":[1]}".to_owned(),
        format!("{{{authors}}}"),
        format!("{{{authors},\"kinds\":[1,7]}}"),
        format!("{{\"#e\":[\"{}\"]}}", Keys::new(1).hex()),
        "{\"#t\":[\"x\",\"y\"],\"kinds\":[1]}".to_owned(),
        format!("{{\"ids\":[\"{}\"]}}", notes[5].id.to_hex()),
    ];
    let read_so_far = || {
        let sums = "SELECT sum(seq_scan), sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_user_tables WHERE relname IN ('events', 'tags')";
        let row = cluster.sql(name, sums);
        let (scans, rows) = row.split_once('|').unwrap();
        (scans.parse::<u64>().unwrap(), rows.parse::<u64>().unwrap())
    };
    // A connection tells what it read when it ends, at the latest.
    let settled = || {
        let clients =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sledge'";
        let deadline = Instant::now() + Duration::from_secs(60);
        while cluster.sql(name, clients) != "0" {
            assert!(Instant::now() < deadline, "connections that do not end");
        }
        read_so_far()
    };
    for filter in filters {
        let (scans, rows) = settled();
        let store = open(&url);
        let (found, _) = read(&store, query(&[newest(&filter, 10)], NOW), usize::MAX);
        assert_eq!(found.len(), if filter.contains("ids") { 1 } else { 10 }, "{filter}");
        store.close(Instant::now() + Duration::from_secs(60)).unwrap();
        drop(store);
        let (scans_after, rows_after) = settled();
        assert_eq!(scans_after, scans, "{filter} reads a whole table");
        assert!(rows_after - rows <= 60, "{filter} read {} rows for 10", rows_after - rows);
    }
}

/// A page goes on behind the last row, also where thousands of events share a second.
#[test]
fn a_crowded_second_is_paged_without_repeats() {
    let store = Cluster::shared().store();
    let notes: Vec<Event> = (0..1_500).map(|n| Keys::new(1).note(NOW, &n.to_string())).collect();
    store.apply(&notes.iter().map(verified).collect::<Vec<_>>(), NOW).unwrap();
    for filter in ["{}", "{\"kinds\":[1]}"] {
        let (rows, end) = read(&store, query(&[newest(filter, 2_000)], NOW), 20_000);
        let mut expected = ids(&notes);
        expected.sort();
        assert_eq!((row_ids(&rows), end), (expected, Progress::Finished), "{filter}");
    }
}

/// A URL that is none, and a database that is not there, are told apart and named, without the password.
#[test]
fn wrong_urls_are_named() {
    let open = |url: &str| PostgresStore::open(&Options { start_timeout: Duration::ZERO, ..Options::new(url) });
    let error = open("postgres://me:secret@[bad/x").map(drop).unwrap_err().to_string();
    assert!(error.contains("not the URL") && !error.contains("secret"), "{error}");
    let missing = Cluster::shared().url("no_such_relay");
    let error = open(&missing).map(drop).unwrap_err();
    assert!(matches!(error, StoreError::Damaged(_)) && error.to_string().contains("no_such_relay"), "{error}");
}
