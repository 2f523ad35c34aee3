//! What tests of the store share.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub(super) use crate::protocol::testing::sign;
use crate::protocol::{Event, Filter, Verified, Visibility};

use super::embedded::{EmbeddedStore, Options};
use super::verify::verify;
use super::{PageBudget, Query, Store, StoreError, Wanted};

/// A note by always the same author.
pub(super) fn note(created_at: u64, content: &str) -> Verified<Event> {
    sign(1, 1, created_at, &[], content)
}

pub(super) fn open(dir: &Path) -> EmbeddedStore {
    let options = Options { run_entries_max: 500, cache_bytes: 4 << 20, ..Options::default() };
    once_free(|| EmbeddedStore::open(dir, &options)).unwrap()
}

/// Does something that takes a directory which was just closed. Its lock may outlive that for a moment: a process that
/// another test starts has it until it becomes another program.
pub(super) fn once_free<T>(mut work: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match work() {
            Err(StoreError::InUse(reason))
                if ["in use by", "is under way"].iter().any(|said| reason.contains(said))
                    && Instant::now() < deadline =>
            {
                std::thread::yield_now();
            }
            done => return done,
        }
    }
}

pub(super) fn close(store: EmbeddedStore) {
    store.close(Instant::now() + Duration::from_secs(60)).unwrap();
}

/// The content of everything that is stored, newest first.
pub(super) fn contents(store: &EmbeddedStore) -> Vec<String> {
    let wanted = vec![Wanted { filter: Filter::default(), limit: 100_000, whole_seconds: false }];
    let mut scan = store.scan(Query { wanted, now: 0, before: None, visible: Visibility::everything() }).unwrap();
    let budget = PageBudget { bytes_max: 1 << 30, until: Instant::now() + Duration::from_secs(600) };
    let mut rows = Vec::new();
    scan.page(budget, &mut rows).unwrap();
    rows.iter().map(|row| Event::from_json(std::str::from_utf8(&row.json).unwrap()).unwrap().content).collect()
}

#[track_caller]
pub(super) fn assert_sound(store: &EmbeddedStore) {
    assert_eq!(verify(store, &|_, _| {}).unwrap().problems, [] as [&str; 0]);
}

/// The log of the current generation.
pub(super) fn log_of(dir: &Path) -> PathBuf {
    dir.join(std::fs::read_to_string(dir.join("CURRENT")).unwrap().trim()).join("events.log")
}

pub(super) fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

pub(super) fn holds(bytes: &[u8], text: &str) -> bool {
    memchr::memmem::find(bytes, text.as_bytes()).is_some()
}
