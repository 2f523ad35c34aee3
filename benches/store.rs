//! Writing to the embedded store, opening it again, and what it takes on disk.
//!
//! Limit: without the disk's fdatasync, an event should cost the writer at most 10 µs; merging into sled follows in
//! the background (about 35 µs an event). The figures beside the timings are printed once.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use divan::counter::ItemsCount;
use sledge::protocol::{Event, EventId, Verified};
use sledge::store::embedded::{EmbeddedStore, Options};
use sledge::store::{Removal, Store, compact};

const EVENTS: usize = 20_000;
const NOW: u64 = support::START + 100_000_000;

fn main() {
    print_disk_figures();
    divan::main();
}

fn events() -> &'static [Verified<Event>] {
    static ALL: OnceLock<Vec<Verified<Event>>> = OnceLock::new();
    ALL.get_or_init(|| support::events(EVENTS))
}

fn empty() -> (tempfile::TempDir, EmbeddedStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
    (folder, store)
}

fn full() -> (tempfile::TempDir, EmbeddedStore) {
    let (folder, store) = empty();
    fill(&store, 1000);
    (folder, store)
}

fn fill(store: &EmbeddedStore, batch: usize) {
    for batch in events().chunks(batch) {
        store.apply(batch, NOW).unwrap();
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(600)
}

#[divan::bench(args = [1, 64, 1000], sample_count = 3, sample_size = 1)]
fn apply_in_batches_of(bencher: divan::Bencher, batch: usize) {
    let count = if batch == 1 { 2000 } else { EVENTS };
    bencher.counter(ItemsCount::new(count)).with_inputs(empty).bench_refs(|(_folder, store)| {
        for batch in events()[..count].chunks(batch) {
            store.apply(batch, NOW).unwrap();
        }
    });
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn merge_into_sled(bencher: divan::Bencher) {
    bencher.counter(ItemsCount::new(EVENTS)).with_inputs(full).bench_refs(|(_folder, store)| {
        store.merge_index().unwrap();
    });
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn open_clean(bencher: divan::Bencher) {
    let (folder, store) = full();
    store.close(far()).unwrap();
    drop(store);
    bencher.bench_local(|| EmbeddedStore::open(folder.path(), &Options::default()).unwrap());
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn open_and_replay_all(bencher: divan::Bencher) {
    let (folder, store) = full();
    drop(store);
    bencher
        .counter(ItemsCount::new(EVENTS))
        .bench_local(|| drop(EmbeddedStore::open(folder.path(), &Options::default()).unwrap()));
}

#[divan::bench]
fn contains_unknown_id(bencher: divan::Bencher) {
    let (_folder, store) = full();
    let mut number = 0_u64;
    bencher.bench_local(|| {
        number += 1;
        let mut id = [0x5a; 32];
        id[16..24].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        id[24..].copy_from_slice(&number.wrapping_mul(0xc2b2_ae3d_27d4_eb4f).to_be_bytes());
        store.contains(&EventId(id)).unwrap()
    });
}

/// Bytes that this process has sent to the disk, where the system counts them.
fn bytes_written() -> Option<usize> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    io.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.parse().ok()
}

fn print_disk_figures() {
    let before = bytes_written();
    let (_folder, store) = full();
    store.merge_index().unwrap();
    if let (Some(before), Some(after)) = (before, bytes_written()) {
        println!("written to disk an event, in batches of 1000, merging included: {}", (after - before) / EVENTS);
    }
    let json: usize = events().iter().map(|event| event.canonical().json.len()).sum();
    let show = |what: &str, store: &EmbeddedStore| {
        let stats = store.stats();
        println!(
            "{what}: {} events, bytes an event: JSON {}, log {}, index {}",
            stats.events,
            json / EVENTS,
            stats.log_bytes / stats.events,
            stats.index_bytes / stats.events
        );
    };
    show("full", &store);
    let half: Vec<EventId> = events().iter().step_by(2).map(|event| event.id).collect();
    for ids in half.chunks(1000) {
        store.remove(ids, Removal::Operator).unwrap();
    }
    compact::compact(&store, &compact::Pace::flat_out(&|_, _| {})).unwrap();
    show("after deleting half and compacting", &store);
}
