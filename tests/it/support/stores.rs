//! Stores without a relay: opening them, reading them to the end page by page, looking at their bytes.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use sledge::protocol::{Event, Filter, Visibility};
use sledge::store::embedded::{EmbeddedStore, Options};
use sledge::store::index::Engine;
use sledge::store::{PageBudget, Progress, Query, Row, Store, StoreError, Wanted};

use super::client::PATIENCE;

/// Runs so short that small tests merge too. `SLEDGE_TEST_INDEX=fjall` takes the other index engine.
pub fn options() -> Options {
    let other = std::env::var_os("SLEDGE_TEST_INDEX").is_some_and(|name| name == "fjall");
    let engine = if other { Engine::Fjall } else { Engine::Sled };
    Options { engine, run_entries_max: 500, cache_bytes: 4 << 20, ..Options::default() }
}

/// Opens the embedded store in `dir`.
pub fn open_store(dir: &Path) -> EmbeddedStore {
    once_free(|| EmbeddedStore::open(dir, &options()))
}

/// Does something that takes a data directory which was just closed. Its locks may outlive that for a moment: a child
/// process that another test starts inherits them until it becomes another program.
pub fn once_free<T>(work: impl Fn() -> Result<T, StoreError>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match work() {
            Ok(done) => return done,
            Err(error) if Instant::now() < deadline && is_taken(&error) => thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

fn is_taken(error: &StoreError) -> bool {
    // The index engines have locks of their own, and report it as the system does.
    matches!(error, StoreError::InUse(_)) || error.to_string().contains("Resource temporarily unavailable")
}

/// Deletes all in a data directory but the event logs and what says which of them is current.
pub fn remove_indexes(dir: &Path) {
    for generation in generations(dir) {
        std::fs::remove_dir_all(generation.join("index")).expect("an index");
        for name in ["index.meta", "index.bloom"] {
            // Neither is there before the first merge.
            let _ = std::fs::remove_file(generation.join(name));
        }
    }
}

/// The folders of a data directory that hold an event log.
pub fn generations(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("a data directory");
    let paths = entries.map(|entry| entry.expect("a readable directory").path());
    paths.filter(|path| path.join("events.log").exists()).collect()
}

/// Whether any file below `dir` holds the bytes of `needle`.
pub fn holds(dir: &Path, needle: &str) -> bool {
    std::fs::read_dir(dir).expect("a directory").any(|entry| {
        let path = entry.expect("a readable directory").path();
        if path.is_dir() {
            return holds(&path, needle);
        }
        let bytes = std::fs::read(&path).expect("a readable file");
        memchr::memmem::find(&bytes, needle.as_bytes()).is_some()
    })
}

/// Ids in the order in which a REQ gives them: newest first, then the lowest id.
pub fn in_order<'e>(events: impl IntoIterator<Item = &'e Event>) -> Vec<String> {
    let mut events: Vec<&Event> = events.into_iter().collect();
    events.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
    super::ids(events)
}

/// All that a filter matches, without a limit.
pub fn all(filter: Filter) -> Wanted {
    Wanted { filter, limit: usize::MAX, whole_seconds: false }
}

/// The newest matches of a filter given as JSON.
pub fn newest(filter: &str, limit: usize) -> Wanted {
    Wanted { filter: Filter::from_json(filter).expect(filter), limit, whole_seconds: false }
}

/// A query without a position.
pub fn query(wanted: &[Wanted], now: u64) -> Query {
    Query { wanted: wanted.to_vec(), now, before: None, visible: Visibility::everything() }
}

/// Every row of a query and how it ended, read in pages of `page_bytes`.
pub fn read(store: &dyn Store, query: Query, page_bytes: usize) -> (Vec<Row>, Progress) {
    let mut scan = store.scan(query).expect("a readable store");
    let mut rows = Vec::new();
    loop {
        match scan.page(budget(page_bytes), &mut rows).expect("a readable store") {
            Progress::Paused => {}
            end => return (rows, end),
        }
    }
}

/// How many events a query counts.
pub fn count(store: &dyn Store, query: Query) -> u64 {
    let mut scan = store.scan(query).expect("a readable store");
    let mut counted = 0;
    loop {
        let (more, progress) = scan.count(far_away()).expect("a readable store");
        counted += more;
        if progress != Progress::Paused {
            return counted;
        }
    }
}

/// A page budget that only bytes limit.
pub fn budget(bytes_max: usize) -> PageBudget {
    PageBudget { bytes_max, until: far_away() }
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3_600)
}

/// The ids of rows, in hex.
pub fn row_ids(rows: &[Row]) -> Vec<String> {
    rows.iter().map(|row| row.id.to_hex()).collect()
}

/// Asserts that rows are exactly these events, in this order, byte for byte.
#[track_caller]
pub fn assert_rows(rows: &[Row], expected: &[&Event], what: &str) {
    assert_eq!(row_ids(rows), super::ids(expected.iter().copied()), "{what}");
    for (row, event) in rows.iter().zip(expected) {
        assert_eq!(row.created_at, event.created_at, "{what}");
        assert_eq!(row.json, event.canonical().json, "{what}");
    }
}
