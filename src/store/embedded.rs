//! The default store: the event log, its index, and the filter on ids, as one [`Store`].
//!
//! A batch goes: judged → appended to the log → fdatasync → what it erases overwritten → visible in the index's write
//! buffer. Only then does the caller answer. The index on disk follows in the background and is never waited for.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::protocol::supersede::Verdict;
use crate::protocol::{Event, EventId, Filter, Kind, Verified};

use super::batch::{self, Batch};
use super::compact::{self, CompactReport, Pace};
use super::dir::DataDir;
use super::explain::Explanation;
use super::index::buffer::BufferedIndex;
use super::index::{Engine, IndexError, Key, Value};
use super::matches::EmbeddedScan;
use super::merge::Source;
use super::open;
use super::quota::{FilesGround, FilesPlace, Keeper, Rules, saved_reaches};
use super::schema;
use super::summed::EmbeddedSummed;
use super::{Applied, Query, Removal, Retained, Scan, Store, StoreError, StoreStats, Summed, state};

pub(super) use super::files::{Files, WriterGuard, WriterState};

/// What the embedded store is told at opening.
#[derive(Clone)]
pub struct Options {
    /// What keeps the index on disk. Another one than before rebuilds it.
    pub engine: Engine,
    /// Index entries in one sorted run of the write buffer; up to three times as many may be in memory.
    pub run_entries_max: usize,
    /// Bytes of index pages in memory.
    pub cache_bytes: u64,
    /// Bytes of records that were read of late, kept in memory.
    pub hot_bytes: usize,
    /// How long opening the index may take before it is taken for damaged and rebuilt.
    pub index_open_timeout: Duration,
    /// Whether compaction compresses what it keeps.
    pub compress: bool,
    /// What is kept, and for how long.
    pub retention: Rules,
    /// Told how far a replay of the log has come: bytes done, bytes in all.
    pub progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            engine: Engine::default(),
            run_entries_max: 600_000,
            cache_bytes: 64 << 20,
            hot_bytes: 16 << 20,
            index_open_timeout: Duration::from_secs(30),
            compress: true,
            retention: Rules::default(),
            progress: Arc::new(|_, _| {}),
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Options");
        shown
            .field("engine", &self.engine)
            .field("run_entries_max", &self.run_entries_max)
            .field("cache_bytes", &self.cache_bytes);
        shown.field("index_open_timeout", &self.index_open_timeout).finish_non_exhaustive()
    }
}

/// A store in a directory of its own.
pub struct EmbeddedStore {
    files: RwLock<Arc<Files>>,
    writer: Mutex<WriterState>,
    opened: open::Report,
    pub(super) keeper: Keeper<FilesPlace>,
    pub(super) options: Options,
    /// Held while a compaction runs.
    pub(super) compacting: Mutex<()>,
    /// Last, since it holds the lock on the directory.
    pub(super) dir: DataDir,
}

impl EmbeddedStore {
    /// Opens the store in `dir`, making an empty one where there is none. Brings the index up to the log: what was
    /// written since the last run is replayed, and an index that is missing, damaged or of another schema is rebuilt.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has the directory; I/O errors; a log of a newer format.
    pub fn open(dir: &Path, options: &Options) -> Result<Self, StoreError> {
        Self::open_in(DataDir::take(dir)?, options)
    }

    /// As [`EmbeddedStore::open`], in a directory that is taken already.
    pub(super) fn open_in(dir: DataDir, options: &Options) -> Result<Self, StoreError> {
        let opened = open::open(&dir, options)?;
        let saved = saved_reaches(dir.path());
        let index_bytes = opened.files.index.bytes_on_disk();
        let keeper = Keeper::new(options.retention.clone(), saved.as_deref(), index_bytes);
        Ok(EmbeddedStore {
            files: RwLock::new(Arc::new(opened.files)),
            writer: Mutex::new(opened.state),
            opened: opened.report,
            keeper,
            options: options.clone(),
            compacting: Mutex::new(()),
            dir,
        })
    }

    /// Ends the store and keeps the directory.
    pub(super) fn into_dir(self) -> DataDir {
        self.dir
    }

    /// What opening found and did.
    pub fn open_report(&self) -> &open::Report {
        &self.opened
    }

    /// Says in the lock file what this process does, for the message that another one gets.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn describe_owner(&self, text: &str) -> Result<(), StoreError> {
        self.dir.describe_owner(text)
    }

    /// The data directory.
    pub fn path(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    /// Brings the index on disk up to the log, on the calling thread.
    ///
    /// # Errors
    /// When the index cannot be written.
    pub fn merge_index(&self) -> Result<(), StoreError> {
        self.files().index.merge_now(&|| false)?;
        Ok(())
    }

    /// The current generation.
    pub(super) fn files(&self) -> Arc<Files> {
        Arc::clone(&self.files.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_files(&self, files: Arc<Files>) {
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = files;
    }

    /// The writer's state and the generation it belongs to: a switch waits for the writer.
    pub(super) fn writer_and_files(&self) -> (WriterGuard<'_>, Arc<Files>) {
        let state = self.writer();
        let files = self.files();
        (state, files)
    }

    fn writer(&self) -> WriterGuard<'_> {
        // A panic in a batch leaves the state as it was before: it is only changed once the batch is durable.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for BufferedIndex {
    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
        BufferedIndex::scan(self, from, to, limit, out)
    }
}

/// For how many matches a filter without a limit is explained.
const EXPLAINED_LIMIT: usize = 500;

impl Store for EmbeddedStore {
    fn apply(&self, batch: &[Verified<Event>], now: u64) -> Result<Applied, StoreError> {
        if !batch.iter().all(|event| self.keeper.has_room_for(event.kind)) {
            return Err(StoreError::QuotaUsedUp);
        }
        let (mut state, files) = self.writer_and_files();
        let mut verdicts = Vec::with_capacity(batch.len());
        let mut writes = Batch::new(&files, &mut state);
        for event in batch {
            if event.kind == Kind::VANISH {
                // It takes out whatever the index holds, so the events before it must be there.
                writes.commit()?;
                batch::vanish_in_portions(&files, &mut state, event, now)?;
                writes = Batch::new(&files, &mut state);
            }
            verdicts.push(writes.add(event, now)?);
            debug_assert!(verdicts.last() != Some(&Verdict::Store) || !event.kind.is_ephemeral());
        }
        writes.commit()?;
        let over_quota = self.keeper.is_over(files.log.end().saturating_sub(state.dead_bytes));
        Ok(Applied { verdicts, end: files.end(), over_quota, others: Vec::new() })
    }

    fn remove(&self, ids: &[EventId], why: Removal) -> Result<u64, StoreError> {
        let (mut state, files) = self.writer_and_files();
        let mut writes = Batch::new(&files, &mut state);
        let mut removed = 0;
        for id in ids {
            removed += u64::from(writes.remove(id, why)?);
        }
        writes.commit()?;
        Ok(removed)
    }

    fn sweep_expired(&self, now: u64, events_max: usize) -> Result<usize, StoreError> {
        let (mut state, files) = self.writer_and_files();
        let (from, to) = schema::expired_range(now);
        let mut due = Vec::new();
        files.index.scan(&from, &to, events_max, &mut due)?;
        let mut writes = Batch::new(&files, &mut state);
        let mut removed = 0;
        for place in due.iter().filter_map(|(key, value)| schema::expired_place(key, value)) {
            removed += usize::from(writes.take_out(place, None, Removal::Expired)?);
        }
        writes.commit()?;
        Ok(removed)
    }

    fn retain(&self, now: u64, events_max: usize) -> Result<Retained, StoreError> {
        let (mut state, files) = self.writer_and_files();
        self.keeper.retain(&mut FilesGround::new(self.dir.path(), &files, &mut state), now, events_max)
    }

    fn has_room_for(&self, kind: Kind) -> bool {
        self.keeper.has_room_for(kind)
    }

    fn keeps(&self, event: &Event, now: u64) -> bool {
        self.keeper.keeps(event, now)
    }

    fn contains(&self, id: &EventId) -> Result<bool, StoreError> {
        Ok(self.files().place_of(id)?.is_some())
    }

    fn scan(&self, query: Query) -> Result<Box<dyn Scan>, StoreError> {
        Ok(Box::new(EmbeddedScan::of(self.files(), query)))
    }

    fn explain(&self, filter: &Filter) -> Explanation {
        let limit = filter.limit.map_or(EXPLAINED_LIMIT, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        Explanation::estimated(filter, &self.files().estimates(filter, limit))
    }

    fn summed(&self, query: &Query, make: bool) -> Result<Option<Box<dyn Summed>>, StoreError> {
        let files = self.files();
        let Some(sums) = files.sums.find(query, make) else { return Ok(None) };
        let set = EmbeddedSummed::new(files, sums, query.clone());
        Ok(set.map(|set| Box::new(set) as Box<dyn Summed>))
    }

    fn compact(&self, pace: &Pace<'_>) -> Result<Option<CompactReport>, StoreError> {
        compact::compact(self, pace).map(Some)
    }

    fn load_state(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        state::load(self.dir.path(), name)
    }

    fn save_state(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        state::save(self.dir.path(), name, bytes)
    }

    fn stats(&self) -> StoreStats {
        let (state, files) = self.writer_and_files();
        let (events, dead_bytes, log_bytes) = (state.events, state.dead_bytes, files.log.end());
        drop(state); // the rest takes looking at files, which the writer need not wait for
        StoreStats {
            events,
            log_bytes,
            dead_bytes,
            index_bytes: files.index.bytes_on_disk(),
            buffered_entries: files.index.buffered_entries() as u64,
            retention: self.keeper.stats(log_bytes.saturating_sub(dead_bytes)),
        }
    }

    fn close(&self, deadline: Instant) -> Result<(), StoreError> {
        let (_writer, files) = self.writer_and_files();
        match files.index.close(deadline) {
            Err(error) if error.is_for_want_of_room() => {
                tracing::warn!("{error}; the next start reads the rest from the event log");
                Ok(())
            }
            closed => {
                if closed? {
                    // All is in the index, what opening counted again included.
                    let _ = std::fs::remove_file(files.generation.rebuild_mark());
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::Filter;
    use crate::protocol::testing::sign;
    use crate::store::testing::{flip, once_free};
    use crate::store::{PageBudget, Progress, Wanted};

    fn all(store: &EmbeddedStore) -> Vec<String> {
        let wanted = vec![Wanted { filter: Filter::default(), limit: 1000, whole_seconds: false }];
        let mut scan = store
            .scan(Query { wanted, now: 50, before: None, visible: crate::protocol::Visibility::everything() })
            .unwrap();
        let budget = PageBudget { bytes_max: 1 << 20, until: Instant::now() + Duration::from_secs(60) };
        let mut rows = Vec::new();
        assert_eq!(scan.page(budget, &mut rows).unwrap(), Progress::Finished);
        rows.iter().map(|row| String::from_utf8(row.json.to_vec()).unwrap()).collect()
    }

    fn contents(store: &EmbeddedStore) -> Vec<String> {
        all(store).iter().map(|json| Event::from_json(json).unwrap().content).collect()
    }

    fn compact(store: &EmbeddedStore) -> CompactReport {
        compact::compact(store, &Pace::flat_out(&|_, _| {})).unwrap()
    }

    fn raw_log(store: &EmbeddedStore) -> Vec<u8> {
        std::fs::read(store.files().generation.log()).unwrap()
    }

    /// Everything that takes events out, and what the log and a rebuilt index make of it.
    #[test]
    fn a_rebuilt_index_gives_the_same_store() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let old_profile = sign(1, 0, 10, &[], "old profile");
        let secret = sign(1, 1, 11, &[&["t", "x"]], "a secret");
        let foreign = sign(2, 1, 12, &[&["expiration", "20"]], "foreign");
        let delete = sign(1, 5, 13, &[&["e", &secret.id.to_hex()], &["e", &foreign.id.to_hex()]], "deletion");
        let new_profile = sign(1, 0, 14, &[], "new profile");
        let batch = [old_profile, secret.clone(), foreign, delete, new_profile];
        let verdicts = store.apply(&batch, 15).unwrap().verdicts;
        assert_eq!(verdicts, [Verdict::Store; 5]);
        assert_eq!(store.apply(std::slice::from_ref(&secret), 15).unwrap().verdicts, [Verdict::Deleted]);
        assert_eq!(store.sweep_expired(19, 10).unwrap(), 0);
        assert_eq!(store.sweep_expired(20, 10).unwrap(), 1);
        assert_eq!(contents(&store), ["new profile", "deletion"]);
        assert_eq!(crate::store::verify::verify(&store, &|_, _| {}).unwrap().problems, [] as [&str; 0]);
        assert!(memchr::memmem::find(&raw_log(&store), b"a secret").is_none());
        let before = (all(&store), store.stats().events, store.stats().dead_bytes);
        let generation = store.files().generation.clone();
        drop(store);
        generation.remove_index().unwrap();
        for _ in 0..2 {
            let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
            assert_eq!((all(&store), store.stats().events, store.stats().dead_bytes), before);
            store.close(Instant::now() + Duration::from_secs(60)).unwrap();
        }
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let report = compact(&store);
        assert_eq!((report.events, report.bytes_before - report.bytes_after), (before.1, before.2));
        assert_eq!((all(&store), store.stats().events, store.stats().dead_bytes), (before.0.clone(), before.1, 0));
        drop(store);
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        assert_eq!((all(&store), store.stats().events, store.stats().dead_bytes), (before.0, before.1, 0));
        assert_eq!(crate::store::verify::verify(&store, &|_, _| {}).unwrap().problems, [] as [&str; 0]);
        assert_eq!(store.apply(&[secret], 15).unwrap().verdicts, [Verdict::Deleted]);
    }

    /// Another engine builds the index again, says why, and answers alike; the same one goes on with what is there.
    #[test]
    fn a_changed_engine_rebuilds_the_index() {
        let folder = tempfile::tempdir().unwrap();
        let open = |engine| {
            let options = Options { engine, ..Options::default() };
            EmbeddedStore::open(folder.path(), &options).unwrap()
        };
        let replaced = sign(1, 0, 10, &[], "old profile");
        let profile = sign(1, 0, 11, &[], "new profile");
        let store = open(Engine::Sled);
        store.apply(&[replaced, profile, sign(2, 1, 12, &[&["t", "x"]], "note")], 15).unwrap();
        store.close(Instant::now() + Duration::from_secs(60)).unwrap();
        drop(store);
        for (engine, rebuilt) in
            [(Engine::Sled, false), (Engine::Fjall, true), (Engine::Fjall, false), (Engine::Sled, true)]
        {
            let store = open(engine);
            let reason = store.open_report().rebuilt.clone();
            assert_eq!(reason.is_some_and(|why| why.contains("sled") && why.contains("fjall")), rebuilt);
            assert_eq!((contents(&store), store.stats().events), (vec!["note".into(), "new profile".into()], 2));
            assert_eq!(crate::store::verify::verify(&store, &|_, _| {}).unwrap().problems, [] as [&str; 0]);
            store.close(Instant::now() + Duration::from_secs(60)).unwrap();
        }
    }

    /// A version that was replaced stays replaced when the one that replaced it was deleted and erased (rebuild).
    #[test]
    fn erased_events_still_replace_their_predecessors_on_rebuild() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let (first, second) = (sign(1, 0, 10, &[], "first"), sign(1, 0, 11, &[], "second"));
        let delete = sign(1, 5, 12, &[&["e", &second.id.to_hex()]], "deletion");
        store.apply(&[first, second], 15).unwrap();
        store.apply(&[delete], 15).unwrap();
        assert_eq!(contents(&store), ["deletion"]);
        let generation = store.files().generation.clone();
        drop(store);
        generation.remove_index().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        assert_eq!(contents(&store), ["deletion"]);
        assert_eq!(store.stats().events, 1);
    }

    /// A request to vanish takes the author's events and the gift wraps to them, erases the bytes, and holds (T14).
    #[test]
    fn t14_vanish_erases_and_holds() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let note = sign(1, 1, 10, &[], "my note");
        let me = note.pubkey.to_hex();
        let later = sign(1, 1, 21, &[], "my later note");
        let wrap = sign(2, 1059, 9, &[&["p", &me]], "wrapped for me");
        let mention = sign(2, 1, 9, &[&["p", &me]], "a mention");
        let vanish = sign(1, 62, 20, &[&["relay", "ALL_RELAYS"]], "vanish");
        let batch = [note.clone(), later, wrap.clone(), mention, vanish];
        assert_eq!(store.apply(&batch, 30).unwrap().verdicts, [Verdict::Store; 5]);
        assert_eq!(contents(&store), ["my later note", "vanish", "a mention"]);
        let log = raw_log(&store);
        assert!(memchr::memmem::find(&log, b"my note").is_none() && memchr::memmem::find(&log, b"wrapped").is_none());
        drop(store);
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        assert_eq!(store.apply(&[note, wrap], 30).unwrap().verdicts, [Verdict::Vanished; 2]);
    }

    /// An event that was read stays in memory until it is erased, and not a moment longer (T14).
    #[test]
    fn t14_what_was_read_is_forgotten_when_it_is_erased() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let secret = sign(1, 1, 10, &[], "a secret");
        store.apply(std::slice::from_ref(&secret), 15).unwrap();
        let files = store.files();
        let offset = files.place_of(&secret.id).unwrap().unwrap().offset;
        assert_eq!((contents(&store), contents(&store)), (vec!["a secret".into()], vec!["a secret".into()]));
        assert!(files.log.hot().get(offset).is_ok());
        store.apply(&[sign(1, 5, 13, &[&["e", &secret.id.to_hex()]], "deletion")], 15).unwrap();
        assert!(files.log.hot().get(offset).is_err());
        assert_eq!(contents(&store), ["deletion"]);
    }

    /// A CURRENT that names what is not there is an error, and nothing is deleted for it.
    #[test]
    fn a_wrong_current_deletes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        store.apply(&[sign(1, 1, 10, &[], "kept")], 15).unwrap();
        drop(store);
        std::fs::write(folder.path().join("CURRENT"), "gen-000003\n").unwrap();
        assert!(once_free(|| EmbeddedStore::open(folder.path(), &Options::default())).is_err());
        std::fs::write(folder.path().join("CURRENT"), "gen-000001\n").unwrap();
        let store = once_free(|| EmbeddedStore::open(folder.path(), &Options::default())).unwrap();
        assert_eq!(contents(&store), ["kept"]);
    }

    /// One person's damaged record does not keep others, nor that person, from writing.
    #[test]
    fn a_damaged_record_stands_in_nobodys_way() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let broken = sign(1, 0, 10, &[["expiration", "20"].as_slice()], "broken profile");
        store.apply(std::slice::from_ref(&broken), 15).unwrap();
        let log = store.files().generation.log();
        let at = memchr::memmem::find(&std::fs::read(&log).unwrap(), b"broken").unwrap();
        flip(&log, at);
        let others = [
            sign(2, 1, 11, &[], "a note"),
            sign(1, 0, 12, &[], "a new profile"),
            sign(1, 5, 13, &[&["e", &broken.id.to_hex()]], "its deletion"),
            sign(1, 62, 11, &[&["relay", "ALL_RELAYS"]], "vanishing"),
        ];
        assert_eq!(store.apply(&others, 15).unwrap().verdicts, [Verdict::Store; 4]);
        assert_eq!(store.sweep_expired(30, 10).unwrap(), 0);
        assert_eq!(contents(&store), ["its deletion", "a new profile", "a note", "vanishing"]);
    }
}
