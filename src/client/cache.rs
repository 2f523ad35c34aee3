//! The events that this device has: an embedded store of its own, small, asked before any relay is.
//!
//! In: verified events, of this user and of others. Out: what matches a filter, at once and offline. It judges as every
//! relay does, so the relay's winner is the client's winner. Calls block; they belong on threads that may wait.
//!
//! Nothing is evicted to save room. What is missing here is found lacking at the next comparison and fetched again, and a
//! relay's `OK` is no promise to keep an event for ever: relays that lose theirs are given it from here. So a person is
//! told how much there is, and decides. What replaced and deleted events take is freed.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::protocol::item::Item;
use crate::protocol::supersede::Verdict;
use crate::protocol::{Event, EventId, Filter, PublicKey, Verified, Visibility};
use crate::store::compact::Pace;
use crate::store::embedded::{EmbeddedStore, Options};
use crate::store::index::Engine;
use crate::store::{PageBudget, Progress, Query, Row, Scan, Store, StoreError, Wanted};

/// Bytes of events read at a time; one event may exceed it.
const PAGE_BYTES_MAX: usize = 256 * 1024;
/// How long one step of a query may take. Nobody else waits for this thread.
const STEP_TIME_MAX: Duration = Duration::from_secs(60);
/// Bytes of memory of one entry in the index's write buffer; see `sync.toml`, `[memory]`.
const ENTRY_BYTES: usize = 56;

/// Bytes of replaced and deleted events that are worth writing the cache anew.
const DEAD_BYTES_MIN: u64 = 16 << 20;

/// What a cache takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CacheSize {
    /// Events.
    pub events: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Those of them that replaced and deleted events take, until they are freed.
    pub dead_bytes: u64,
}

/// The store of one profile.
pub struct Cache {
    store: EmbeddedStore,
}

impl Cache {
    /// Opens the cache in `dir`, making an empty one where there is none. `memory_bytes` is what index buffers and page
    /// cache aim at.
    ///
    /// # Errors
    /// As [`EmbeddedStore::open`]; [`StoreError::InUse`] when another process has the profile.
    pub fn open(dir: &Path, memory_bytes: usize) -> Result<Cache, StoreError> {
        let options = Options {
            // Opens at once, and takes the least processor time.
            engine: Engine::Fjall,
            run_entries_max: (memory_bytes / 8 / ENTRY_BYTES).max(1_000),
            cache_bytes: memory_bytes as u64 / 4,
            hot_bytes: memory_bytes / 16,
            ..Options::default()
        };
        Ok(Cache { store: EmbeddedStore::open(dir, &options)? })
    }

    /// Says who has the profile, for the message that another process gets.
    ///
    /// # Errors
    /// When the lock file cannot be written.
    pub fn describe_owner(&self, text: &str) -> Result<(), StoreError> {
        self.store.describe_owner(text)
    }

    /// Stores what is new, durably; one verdict an event. Ephemeral events are passed over.
    ///
    /// # Errors
    /// As [`Store::apply`]. Putting the same events again does no harm.
    pub fn put(&self, events: &[Verified<Event>], now_secs: u64) -> Result<Vec<Verdict>, StoreError> {
        let lasting: Vec<Verified<Event>> = events.iter().filter(|event| !event.kind.is_ephemeral()).cloned().collect();
        Ok(self.store.apply(&lasting, now_secs)?.verdicts)
    }

    /// Whether this very event is here.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn contains(&self, id: &EventId) -> Result<bool, StoreError> {
        self.store.contains(id)
    }

    /// Calls `each` with what one of the filters matches, newest first, each once; their limits hold.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn for_each(&self, filters: &[Filter], now_secs: u64, mut each: impl FnMut(&Row)) -> Result<(), StoreError> {
        let mut scan = self.scan(filters, now_secs, Visibility::everything())?;
        let mut rows = Vec::new();
        loop {
            let budget = PageBudget { bytes_max: PAGE_BYTES_MAX, until: Instant::now() + STEP_TIME_MAX };
            let progress = scan.page(budget, &mut rows)?;
            rows.iter().for_each(&mut each);
            rows.clear();
            if progress != Progress::Paused {
                return Ok(());
            }
        }
    }

    /// What one of the filters matches, newest first.
    ///
    /// # Errors
    /// As [`Cache::for_each`].
    pub fn query(&self, filters: &[Filter], now_secs: u64) -> Result<Vec<Event>, StoreError> {
        let mut events = Vec::new();
        self.for_each(filters, now_secs, |row| events.extend(event_of(row)))?;
        Ok(events)
    }

    /// Time and id of everything that a filter matches and a relay would show `reader`, in NIP-77's order: what a
    /// reconciliation compares. Versions of settings that others have replaced stay out, and so do all of them where the
    /// filter does not ask for settings; otherwise they would seem to be lacking at the relay each time.
    ///
    /// # Errors
    /// As [`Cache::for_each`].
    pub fn items(&self, filter: &Filter, now_secs: u64, reader: PublicKey) -> Result<Vec<Item>, StoreError> {
        let unlimited = Filter { limit: None, ..filter.clone() };
        let visible = Visibility::of(Arc::default(), Arc::new([reader]));
        let mut scan = self.scan(std::slice::from_ref(&unlimited), now_secs, visible)?;
        let mut items = Vec::new();
        while scan.items(Instant::now() + STEP_TIME_MAX, &mut items)? == Progress::Paused {}
        items.sort_unstable();
        items.dedup();
        Ok(items)
    }

    /// How many events are here.
    pub fn count(&self) -> u64 {
        self.store.stats().events
    }

    /// What the cache takes on disk.
    pub fn size(&self) -> CacheSize {
        let stats = self.store.stats();
        CacheSize { events: stats.events, bytes: stats.log_bytes + stats.index_bytes, dead_bytes: stats.dead_bytes }
    }

    /// Brings what is in memory to disk, as far as `deadline` allows, and frees what replaced and deleted events take where
    /// that is most of it. Nothing is lost without it.
    ///
    /// # Errors
    /// When the last writes fail.
    pub fn close(&self, deadline: Instant) -> Result<(), StoreError> {
        self.compact_if(DEAD_BYTES_MIN, deadline);
        self.store.close(deadline)
    }

    /// A compaction that does not come to its end leaves everything as it was.
    fn compact_if(&self, dead_bytes_min: u64, deadline: Instant) {
        let stats = self.store.stats();
        if stats.dead_bytes < dead_bytes_min.max(stats.live_bytes()) {
            return;
        }
        let pace = Pace { share: 1.0, progress: &|_, _| {}, rest: &|_| Instant::now() < deadline };
        if let Err(error) = self.store.compact(&pace) {
            tracing::debug!(%error, "the cache stays as large as it is");
        }
    }

    fn scan(&self, filters: &[Filter], now_secs: u64, visible: Visibility) -> Result<Box<dyn Scan>, StoreError> {
        let wanted = |filter: &Filter| {
            let limit = filter.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
            Wanted { filter: filter.clone(), limit, whole_seconds: false }
        };
        let asked = filters.iter().filter(|filter| filter.limit != Some(0) && !filter.matches_nothing());
        let wanted = asked.map(wanted).collect();
        self.store.scan(Query { wanted, now: now_secs, before: None, visible })
    }
}

/// The event in a row; `None` if it is damaged, which the store has logged.
pub fn event_of(row: &Row) -> Option<Event> {
    Event::from_json(std::str::from_utf8(&row.json).ok()?).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::{NOW, sign};

    /// What replaced versions take is freed where it is most of it, and the state is the same after that (law 6); where it
    /// is little, or there is no time, nothing is done.
    #[test]
    fn law_6_replaced_versions_take_no_room_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), 1 << 20).unwrap();
        let content = |at: u64| format!("{at} {}", "x".repeat(1_000));
        let versions: Vec<_> = (1..=100).map(|at| sign(1, 30_001, NOW + at, &[&["d", "x"]], &content(at))).collect();
        for version in &versions {
            cache.put(std::slice::from_ref(version), NOW).unwrap();
        }
        let before = cache.size();
        assert!(before.events == 1 && before.dead_bytes > 99_000, "{before:?}");
        cache.compact_if(DEAD_BYTES_MIN, Instant::now() + STEP_TIME_MAX);
        cache.compact_if(0, Instant::now());
        assert_eq!(cache.size().dead_bytes, before.dead_bytes);
        cache.compact_if(0, Instant::now() + STEP_TIME_MAX);
        assert!(cache.size().bytes + 90_000 < before.bytes && cache.size().dead_bytes == 0, "{:?}", cache.size());
        assert_eq!(cache.query(&[Filter::default()], NOW).unwrap(), [(*versions[99]).clone()]);
    }

    /// What was put is found, also after a restart; a newer version takes the place of the older, whichever came first.
    #[test]
    fn the_relays_winner_is_the_clients_winner() {
        let dir = tempfile::tempdir().unwrap();
        let versions = [3, 1, 2].map(|at| sign(1, 30_001, NOW + at, &[&["d", "x"]], &at.to_string()));
        let cache = Cache::open(dir.path(), 1 << 20).unwrap();
        let verdicts = cache.put(&versions, NOW).unwrap();
        assert_eq!(verdicts, [Verdict::Store, Verdict::Superseded, Verdict::Superseded]);
        assert_eq!(cache.put(&versions[..1], NOW).unwrap(), [Verdict::Duplicate]);
        assert_eq!(cache.put(&[sign(1, 20_000, NOW, &[], "")], NOW).unwrap(), []);
        cache.close(Instant::now() + STEP_TIME_MAX).unwrap();
        drop(cache);
        let cache = Cache::open(dir.path(), 1 << 20).unwrap();
        let all = [Filter::default()];
        assert_eq!(cache.query(&all, NOW).unwrap(), [(*versions[0]).clone()]);
        let item = Item { created_at: NOW + 3, id: versions[0].id };
        assert_eq!(cache.items(&all[0], NOW, versions[0].pubkey).unwrap(), [item]);
        assert!(cache.contains(&versions[0].id).unwrap() && cache.count() == 1);
        assert!(cache.query(&[Filter { limit: Some(0), ..Filter::default() }], NOW).unwrap().is_empty());
    }

    /// Versions of settings are compared only where settings are asked for, and only those that no other one has taken in:
    /// as a relay shows them, or they would seem to be lacking there each time.
    #[test]
    fn what_is_compared_is_what_a_relay_shows() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), 1 << 20).unwrap();
        let former = sign(1, 10_001, NOW, &[&["L", crate::protocol::label::NAMESPACE]], "former");
        let prev = former.id.to_hex();
        let head = sign(1, 10_001, NOW, &[&["L", crate::protocol::label::NAMESPACE], &["prev", &prev]], "head");
        let note = sign(1, 1, NOW, &[], "");
        let theirs = sign(2, 1, NOW, &[&["L", crate::protocol::label::NAMESPACE]], "for its author only");
        let me = note.pubkey;
        cache.put(&[former, head.clone(), note.clone(), theirs], NOW).unwrap();
        let ids = |filter: &str| -> Vec<EventId> {
            let items = cache.items(&Filter::from_json(filter).unwrap(), NOW, me).unwrap();
            items.iter().map(|item| item.id).collect()
        };
        assert_eq!(ids("{}"), [note.id]);
        assert_eq!(ids(&format!(r##"{{"kinds":[10001],"#L":["{}"]}}"##, crate::protocol::label::NAMESPACE)), [head.id]);
    }
}
