//! Reading pages of stored events: everything in sled, nothing in the write buffer.
//!
//! Limit: one page of 100 from one stretch of the index within 100 µs; strfry needs about 9 µs a returned event. A page of
//! 500 from a compressed log takes at most a tenth longer than from a plain one (`page_of_500`).

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use sledge::protocol::{Event, Filter, Verified, Visibility};
use sledge::store::compact::{Pace, compact};
use sledge::store::embedded::{EmbeddedStore, Options};
use sledge::store::{PageBudget, Query, Row, Store, Wanted};

const EVENTS: usize = 50_000;
const NOW: u64 = support::START + 100_000_000;

fn main() {
    divan::main();
}

struct Full {
    _folder: tempfile::TempDir,
    store: EmbeddedStore,
    events: Vec<Verified<Event>>,
}

fn full() -> &'static Full {
    static FULL: OnceLock<Full> = OnceLock::new();
    FULL.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let events = support::events(EVENTS);
        events.chunks(1000).for_each(|batch| drop(store.apply(batch, NOW).unwrap()));
        store.merge_index().unwrap();
        Full { _folder: folder, store, events }
    })
}

fn page(filter: &Filter, limit: usize) -> Vec<Row> {
    page_of(&full().store, filter, limit)
}

fn page_of(store: &EmbeddedStore, filter: &Filter, limit: usize) -> Vec<Row> {
    let wanted = vec![Wanted { filter: filter.clone(), limit, whole_seconds: false }];
    let mut scan = store.scan(Query { wanted, now: NOW, before: None, visible: Visibility::everything() }).unwrap();
    let mut rows = Vec::new();
    let budget = PageBudget { bytes_max: usize::MAX, until: Instant::now() + Duration::from_secs(60) };
    scan.page(budget, &mut rows).unwrap();
    rows
}

fn bench(bencher: divan::Bencher, json: &serde_json::Value, limit: usize) {
    let filter = Filter::from_json(&json.to_string()).unwrap();
    assert!(!page(&filter, limit).is_empty(), "{json} should match something");
    bencher.bench(|| page(&filter, limit));
}

fn authors(count: usize) -> Vec<String> {
    (0..count).map(|number| support::pubkey(&support::author(number)).to_hex()).collect()
}

/// Two stores of the same events, compacted: the first as they are, the second compressed.
fn compacted() -> &'static [Full; 2] {
    static COMPACTED: OnceLock<[Full; 2]> = OnceLock::new();
    COMPACTED.get_or_init(|| {
        let events = support::wordy_events(EVENTS);
        [false, true].map(|compress| {
            let folder = tempfile::tempdir().unwrap();
            // Without records in memory: it is reading that is measured.
            let options = Options { compress, hot_bytes: 0, ..Options::default() };
            let store = EmbeddedStore::open(folder.path(), &options).unwrap();
            events.chunks(1000).for_each(|batch| drop(store.apply(batch, NOW).unwrap()));
            compact(&store, &Pace::flat_out(&|_, _| {})).unwrap();
            println!("compressed: {compress}; bytes of log an event: {}", store.stats().log_bytes / EVENTS as u64);
            Full { _folder: folder, store, events: events.clone() }
        })
    })
}

/// Pages of 500 from all over the store, as someone scrolling back reads them.
#[divan::bench(args = ["plain", "compressed"])]
fn page_of_500(bencher: divan::Bencher, log: &str) {
    let store = &compacted()[usize::from(log == "compressed")].store;
    let mut page = 0;
    bencher.bench_local(|| {
        page = (page + 37) % 97;
        let until = support::START + 3 * (500 + page * 510);
        let rows = page_of(store, &Filter { until: Some(until), ..Filter::default() }, 500);
        assert_eq!(rows.len(), 500);
        rows
    });
}

#[divan::bench(args = [100, 500])]
fn newest(bencher: divan::Bencher, limit: usize) {
    full();
    bench(bencher, &serde_json::json!({}), limit);
}

#[divan::bench]
fn newest_100_of_an_author(bencher: divan::Bencher) {
    full();
    bench(bencher, &serde_json::json!({"authors": authors(1)}), 100);
}

#[divan::bench]
fn newest_100_of_an_author_and_kind(bencher: divan::Bencher) {
    full();
    bench(bencher, &serde_json::json!({"authors": authors(1), "kinds": [1]}), 100);
}

#[divan::bench(args = [20, 200, 500])]
fn newest_500_of_many_authors(bencher: divan::Bencher, count: usize) {
    full();
    bench(bencher, &serde_json::json!({"authors": authors(count), "kinds": [1]}), 500);
}

#[divan::bench(args = [1, 100])]
fn by_id(bencher: divan::Bencher, count: usize) {
    let ids: Vec<String> = full().events.iter().rev().step_by(97).take(count).map(|event| event.id.to_hex()).collect();
    bench(bencher, &serde_json::json!({"ids": ids}), 500);
}

#[divan::bench]
fn by_e_tag(bencher: divan::Bencher) {
    let target = full().events.iter().find_map(|event| event.tags.values("e").next().map(str::to_owned)).unwrap();
    bench(bencher, &serde_json::json!({"#e": [target]}), 100);
}

#[divan::bench]
fn by_topic(bencher: divan::Bencher) {
    full();
    bench(bencher, &serde_json::json!({"#t": ["topic7"]}), 100);
}
