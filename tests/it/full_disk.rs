//! A disk that is really full: a small tmpfs. Mounting takes root; without it these tests say that they are skipped.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use serde_json::json;
use sledge::config::Config;
use sledge::protocol::Filter;
use sledge::relay::Clock;
use sledge::server::Server;
use sledge::store::embedded::{EmbeddedStore, Options};
use sledge::store::index::{Engine, Index, IndexError, Key, Value};
use sledge::store::{Store, StoreError};
use tempfile::TempDir;

use super::http::request;
use super::support::client::soon;
use super::support::stores::{all, once_free, options, query, read};
use super::support::{Binary, Client, Keys, NOW, json_of, verified};

/// A file system of its own; unmounted when dropped.
pub struct Disk {
    path: PathBuf,
    _dir: Option<TempDir>,
}

impl Disk {
    /// `None` where it cannot be had; says why.
    fn of_mib(mib: u32) -> Option<Disk> {
        let dir = TempDir::new().unwrap();
        let disk = Disk::at(dir.path(), mib)?;
        Some(disk.in_place_of(dir))
    }

    /// In place of an empty folder.
    pub fn at(path: &Path, mib: u32) -> Option<Disk> {
        let size = format!("size={mib}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(path).output();
        let problem = match mount {
            Ok(output) if output.status.success() => return Some(Disk { path: path.to_owned(), _dir: None }),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        eprintln!("skipped: a tmpfs cannot be mounted, which takes root: {problem}");
        None
    }

    fn in_place_of(mut self, dir: TempDir) -> Disk {
        self._dir = Some(dir);
        self
    }

    /// Fills it but for so many bytes.
    pub fn fill_but(&self, free_bytes: u64) {
        let mut ballast = File::create(self.path.join("ballast")).unwrap();
        let mut filled = 0;
        let error = loop {
            match ballast.write(&[1; 4096]) {
                Ok(written) => filled += written as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        ballast.set_len(filled - free_bytes).unwrap();
    }

    pub fn make_room(&self) {
        std::fs::remove_file(self.path.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a store that is just closing may still hold a file.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// Publishers are told, readers and live subscribers are served, and with room writing goes on without a restart.
#[tokio::test]
async fn a_full_disk_refuses_writes_until_there_is_room() {
    let Some(disk) = Disk::of_mib(64) else { return };
    let author = Keys::new(1);
    // Runs so short that the index is merged all the time.
    let store = Arc::new(EmbeddedStore::open(&disk.path.join("data"), &options()).unwrap());
    let mut config = Config::default();
    config.listen.set_port(0);
    let served: Arc<dyn Store> = store.clone();
    let clock = Clock::manual(Arc::new(AtomicU64::new(NOW)));
    let server = soon("the relay", Server::start(Arc::new(config), served, clock)).await.unwrap();
    let mut client = Client::connect(server.addr()).await;
    let notes: Vec<_> = (0..200).map(|n| author.note(NOW + n, &"x".repeat(1_000))).collect();
    client.store_all(&notes).await;
    client.req("live", &[json!({"limit": 0})]).await;

    disk.fill_but(0);
    let full = (false, "error: the disk is full".to_owned());
    let late = author.note(NOW + 300, &"y".repeat(5_000));
    assert_eq!(client.publish(&late).await, full);
    assert_eq!(client.publish(&late).await, full, "again and again");
    assert_eq!(request(server.addr(), "GET /healthz HTTP/1.1", &[]).await.status, 503);
    let passing = author.draft(20_001, NOW + 301).sign();
    client.store(&passing).await;
    assert_eq!(client.live("live").await["id"], passing.id.to_hex(), "live goes on, and nothing refused was sent");
    assert_eq!(client.count(&[json!({"kinds": [1]})]).await, 200);
    assert_eq!(client.query(json!({"limit": 1})).await.events[0]["id"], notes[199].id.to_hex());

    disk.make_room();
    client.store(&late).await;
    assert_eq!(client.live("live").await["id"], late.id.to_hex());
    assert_eq!(request(server.addr(), "GET /healthz HTTP/1.1", &[]).await.status, 200);
    // The index had to wait too: what it was not given then is merged now.
    let more: Vec<_> = (0..200).map(|n| author.note(NOW + 400 + n, "")).collect();
    client.store_all(&more).await;
    soon("the end", server.stop()).await.unwrap();
    store.close(Instant::now() + Duration::from_secs(60)).unwrap_or_default();
    drop(store);
    let store = EmbeddedStore::open(&disk.path.join("data"), &options()).unwrap();
    assert!(store.open_report().rebuilt.is_none(), "{:?}", store.open_report());
    let (rows, _) = read(&store, query(&[all(Filter::default())], NOW), 1 << 20);
    assert_eq!(rows.len(), 401);
}

/// The index waits in memory for room; the store is read, closed and opened again on a full disk, as often as one likes,
/// and nothing is rebuilt later.
#[test]
fn the_index_waits_for_room() {
    let Some(disk) = Disk::of_mib(48) else { return };
    let author = Keys::new(1);
    let data = disk.path.join("data");
    let large_runs = Options { run_entries_max: 1_000_000, ..options() };
    let notes = |from: u64, to: u64| (from..to).map(|n| verified(&author.note(n, ""))).collect::<Vec<_>>();
    let store = EmbeddedStore::open(&data, &large_runs).unwrap();
    store.apply(&notes(0, 300), NOW).unwrap();
    store.merge_index().unwrap();
    store.apply(&notes(300, 600), NOW).unwrap();
    disk.fill_but(0);
    let error = store.merge_index().unwrap_err().to_string();
    assert_eq!(error, "the disk is full");
    let count = |store: &EmbeddedStore| read(store, query(&[all(Filter::default())], NOW), 1 << 20).0.len();
    assert_eq!(count(&store), 600);
    store.close(Instant::now() + Duration::from_secs(60)).expect("nothing is lost");
    drop(store);
    for _ in 0..3 {
        let store = once_free(|| EmbeddedStore::open(&data, &large_runs));
        assert_eq!((count(&store), store.open_report().replayed), (600, 300), "read on a full disk");
        let refused = store.apply(&notes(600, 700), NOW).unwrap_err();
        assert!(matches!(refused, StoreError::DiskFull), "{refused}");
    }
    disk.make_room();
    let store = EmbeddedStore::open(&data, &large_runs).unwrap();
    assert!(store.open_report().rebuilt.is_none(), "{:?}", store.open_report());
    assert_eq!((count(&store), store.open_report().replayed), (600, 300));
    store.merge_index().unwrap();
    store.apply(&notes(600, 601), NOW).unwrap();
    drop(store);
    let store = EmbeddedStore::open(&data, &large_runs).unwrap();
    assert!(store.open_report().rebuilt.is_none());
    assert_eq!((count(&store), store.open_report().replayed), (601, 1));
}

/// `serve` starts on a disk without a free byte, also after kill -9: readers are served and publishers told, and with room
/// writing goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_starts_and_reads_on_a_full_disk() {
    let binary = Binary::new();
    std::fs::create_dir_all(binary.data()).unwrap();
    let Some(disk) = Disk::at(binary.data(), 32) else { return };
    binary.configure("[storage]\nindex_run_entries_max = 300\n");
    let author = Keys::new(1);
    let notes: Vec<_> = (0..200).map(|n| author.note(NOW + n, "")).collect();
    binary.import(&notes);
    disk.fill_but(0);
    for round in 0..3 {
        let mut serving = binary.serve();
        let mut client = Client::connect(serving.addr()).await;
        assert_eq!(client.count(&[json!({"kinds": [1]})]).await, 200);
        assert_eq!(client.query(json!({"limit": 1})).await.events[0]["id"], notes[199].id.to_hex());
        let late = author.note(NOW + 300 + round, &"y".repeat(5_000));
        assert_eq!(client.publish(&late).await, (false, "error: the disk is full".to_owned()));
        if round == 2 {
            disk.make_room();
            client.store(&late).await;
            assert_eq!(client.count(&[json!({"kinds": [1]})]).await, 201);
        }
        serving.kill();
    }
    assert_eq!(binary.run(&["count", "{}"]).ok().trim(), "201");
}

/// A disk that fills while sled writes takes none of what was there from the readers, and the run can be written later.
#[test]
fn sled_reads_on_after_a_disk_was_full_under_it() {
    let Some(disk) = Disk::of_mib(24) else { return };
    let dir = disk.path.join("index");
    let open = || Engine::Sled.open(&dir, 0, Duration::from_secs(60)).unwrap();
    let key = |n: u32| Key::new(&[&n.wrapping_mul(2_654_435_761).to_be_bytes()[..], &[7; 20]].concat());
    let run =
        |range: Range<u32>| range.map(|n| (key(n), Value::new(&n.to_be_bytes()[1..]))).collect::<BTreeMap<_, _>>();
    let write = |index: &dyn Index, run: &BTreeMap<Key, Value>| {
        index.write_run(&mut run.iter().map(|(key, value)| (*key, Some(*value))), &|| false)
    };
    let all_of = |index: &dyn Index| {
        let mut entries = Vec::new();
        index.scan(&[], &[0xff; 31], usize::MAX, &mut entries).unwrap();
        entries.into_iter().collect::<BTreeMap<_, _>>()
    };
    let (first, second) = (run(0..5_000), run(5_000..45_000));
    let index = open();
    assert!(write(&*index, &first).unwrap());
    let there = |found: &BTreeMap<Key, Value>| first.iter().all(|(key, value)| found.get(key) == Some(value));
    for _ in 0..2 {
        disk.fill_but(0);
        let error = write(&*index, &second).unwrap_err();
        assert!(matches!(error, IndexError::Io { .. }), "{error}");
        assert!(there(&all_of(&*index)), "read from the disk, since nothing of it is in memory any more");
        assert!(first.iter().all(|(key, value)| index.get(key).unwrap() == Some(*value)));
        disk.make_room();
    }
    assert!(write(&*index, &second).unwrap());
    let both: BTreeMap<_, _> = first.iter().chain(&second).map(|(key, value)| (*key, *value)).collect();
    assert_eq!(all_of(&*index), both);
    drop(index);
    assert_eq!(all_of(&*open()), both);
}

/// An import that fills the disk stops and says so; what it stored can be read, and with room a second run does the rest.
#[test]
fn an_import_stops_and_can_be_run_again() {
    let binary = Binary::new();
    std::fs::create_dir_all(binary.data()).unwrap();
    let Some(disk) = Disk::at(binary.data(), 32) else { return };
    binary.configure("[storage]\nwriter_queue_events_max = 50\n");
    let author = Keys::new(1);
    let lines: String = (0..300).map(|n| json_of(&author.note(NOW + n, &"x".repeat(10_000))) + "\n").collect();
    disk.fill_but(2 << 20);
    let ran = binary.run_with(&["import", "-"], lines.as_bytes());
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("is full; free some space"), "{}", ran.stderr);
    let stored: u64 = binary.run(&["count", "{}"]).ok().trim().parse().unwrap();
    assert!(stored > 0 && stored < 300 && stored.is_multiple_of(50), "whole batches: {stored}");
    disk.make_room();
    let ran = binary.run_with(&["import", "-"], lines.as_bytes());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("imported {} · already stored {stored}", 300 - stored)), "{}", ran.stderr);
    assert_eq!(binary.run(&["count", "{}"]).ok().trim(), "300");
}
