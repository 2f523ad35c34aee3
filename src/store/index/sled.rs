//! The sled engine behind [`Index`].
//!
//! sled 1.0 alpha is an index that may be lost here, never a database, and this file
//! is written around what it does:
//!
//! - **A leaf that was ever written stays in memory until the database is closed**
//!   (`max_unflushed_epoch` is set by a flush and never cleared, and the eviction after
//!   a flush looks for a mark that the flush has just taken away), whatever the cache
//!   limit says. So this engine counts the leaves it has flushed, and closes and opens
//!   the database again when they reach the limit; readers wait for that moment.
//! - After a failed flush the next one waits for ever, and the thread that flushes at
//!   closing aborts the process when it fails. So after any failure the engine is
//!   *damaged*: it answers nothing more, and its handle is leaked instead of closed.
//! - `flush_every_ms(None)` flushes on every dropped handle, also on those inside
//!   iterators. So it is given an interval that never passes.
//! - A forward range with an upper bound goes on reading behind the bound. So ranges are
//!   opened without one and left at the bound.
//! - A metadata log with a damaged frame is read up to there and the rest is silently
//!   dropped. So every run ends with its number in the database, and the same number in
//!   a file beside it tells at the next open whether that run is still there.
//! - Opening damaged files may also fail, panic or never return. So it happens on a
//!   thread of its own with a time limit.
//!
//! Opening runs the external command `sync`; where there is none, sled only warns.

use std::any::Any;
use std::fs::{self, File};
use std::io::{self, Write};
use std::mem;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use super::{Change, Index, IndexError, Key, Value};

/// Entries in a leaf. 128 makes a missed read cost 16-23 µs; 1,024 would make it 143.
const LEAF_FANOUT: usize = 128;
/// Cheap enough for a merge (35 µs an event instead of 48 at level 3), and still 3 to 1.
const ZSTD_LEVEL: i32 = -1;
/// Never: see the module documentation.
const FLUSH_EVERY_MS: usize = 1 << 40;
/// Entries written between two flushes, which bounds what a flush holds twice.
const FLUSH_ENTRIES: usize = 20_000;
/// What a leaf takes in memory: 2 KiB of slots, and 48 bytes of heap for each of about 88 keys.
const LEAF_BYTES_IN_MEMORY: u64 = 6 * 1024;
/// Fewest written leaves before the database is opened again.
const WRITTEN_LEAVES_MIN: u64 = 4_096;
/// How long a reopening waits for a thread of sled that still holds the lock on the directory.
const REOPEN_LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How often it tries again.
const REOPEN_LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The folder of the database, within ours.
const DATABASE_DIR: &str = "sled";
/// The file with the number of the last durable run, as decimal text.
const LAST_RUN_FILE: &str = "last-run";
/// The tree with the number of the last run, under the empty key.
const LAST_RUN_TREE: &str = "last-run";

type Db = sled::Db<LEAF_FANOUT>;

/// An index in sled 1.0 alpha.
pub struct SledIndex {
    dir: PathBuf,
    cache_bytes: u64,
    open_timeout: Duration,
    /// Readers and the writer hold it for reading; reopening takes it for writing.
    state: RwLock<State>,
    /// Number of the last run; held by the one who writes a run.
    last_run: Mutex<u64>,
    /// Leaves flushed since the database was opened, which is what it keeps in memory.
    written_leaves: AtomicU64,
}

enum State {
    Open(Handles),
    Damaged(String),
}

/// A handle may move between threads but not be used by two, and to clone one takes
/// longer than to read with it: idle handles wait here. Never empty.
struct Handles(Mutex<Vec<Db>>);

/// How a part of a run ended.
enum Segment {
    RunEnded,
    LeavesFull,
    Stopped,
}

impl SledIndex {
    /// Opens the index in `dir`, or makes an empty one where there is none.
    ///
    /// `cache_bytes` bounds the leaves read and, apart from them, the leaves written, so
    /// about twice as much memory may be taken. One process at a time may have it open.
    ///
    /// # Errors
    /// [`IndexError::Damaged`] or [`IndexError::OpenTimeout`] when it has to be rebuilt: remove
    /// `dir` first, since a failed attempt may keep files open. [`IndexError::Io`] when
    /// the directory is out of reach.
    pub fn open(dir: &Path, cache_bytes: u64, open_timeout: Duration) -> Result<SledIndex, IndexError> {
        fs::create_dir_all(dir).map_err(|source| IndexError::Io { what: "making the index directory", source })?;
        let run_on_file = read_last_run(dir)?;
        let (db, run_in_database) = open_within(dir, cache_bytes, open_timeout)?;
        // A crash between the two leaves the database one ahead; behind, it has lost a run.
        if run_in_database < run_on_file {
            mem::forget(db);
            let what = format!("it ends with run {run_in_database} and should with {run_on_file}");
            return Err(IndexError::Damaged(what));
        }
        Ok(SledIndex {
            dir: dir.to_owned(),
            cache_bytes,
            open_timeout,
            state: RwLock::new(State::Open(Handles::new(db))),
            last_run: Mutex::new(run_in_database),
            written_leaves: AtomicU64::new(0),
        })
    }

    /// Runs `work` on a handle of its own. Any failure damages the engine for good.
    fn with_db<T>(&self, work: impl FnOnce(&Db) -> io::Result<T>) -> Result<T, IndexError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let handles = match &*state {
            State::Open(handles) => handles,
            State::Damaged(why) => return Err(IndexError::Damaged(why.clone())),
        };
        let db = handles.take();
        let failure = match panic::catch_unwind(AssertUnwindSafe(|| work(&db))) {
            Ok(Ok(answer)) => {
                handles.put(db);
                return Ok(answer);
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic_message(panic.as_ref()),
        };
        drop(state);
        mem::forget(db);
        Err(self.damage(failure))
    }

    fn damage(&self, why: String) -> IndexError {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Open(_) = &*state {
            tracing::error!(why, dir = %self.dir.display(), "the index has failed");
            *state = State::Damaged(why.clone());
        }
        IndexError::Damaged(why)
    }

    /// Writes until the run ends or the written leaves fill their share of memory.
    fn write_segment(
        &self,
        run: &mut dyn Iterator<Item = Change>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Segment, IndexError> {
        let leaves_max = (self.cache_bytes / LEAF_BYTES_IN_MEMORY).max(WRITTEN_LEAVES_MIN);
        self.with_db(|db| {
            loop {
                let mut entries = 0;
                for change in (&mut *run).take(FLUSH_ENTRIES) {
                    write(db, &change)?;
                    entries += 1;
                }
                self.flush(db)?;
                if entries < FLUSH_ENTRIES {
                    return Ok(Segment::RunEnded);
                }
                if stop() {
                    return Ok(Segment::Stopped);
                }
                if self.written_leaves.load(Ordering::Relaxed) >= leaves_max {
                    return Ok(Segment::LeavesFull);
                }
            }
        })
    }

    fn flush(&self, db: &Db) -> io::Result<()> {
        let flushed = db.flush()?;
        self.written_leaves.fetch_add(flushed.objects_flushed, Ordering::Relaxed);
        Ok(())
    }

    /// Closes the database and opens it again, which is the only way to take the leaves
    /// that were written out of memory. Everything is flushed when this is called.
    fn reopen(&self) -> Result<(), IndexError> {
        let started = Instant::now();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Damaged(why) = &*state {
            return Err(IndexError::Damaged(why.clone()));
        }
        drop(mem::replace(&mut *state, State::Damaged("it could not be opened again".into())));
        let opened = loop {
            match open_within(&self.dir, self.cache_bytes, self.open_timeout) {
                // A thread of sled may hold the lock a moment longer than its handles.
                Err(IndexError::Io { source, .. })
                    if source.kind() == io::ErrorKind::WouldBlock && started.elapsed() < REOPEN_LOCK_PATIENCE =>
                {
                    thread::sleep(REOPEN_LOCK_PAUSE);
                }
                opened => break opened?,
            }
        };
        *state = State::Open(Handles::new(opened.0));
        let leaves = self.written_leaves.swap(0, Ordering::Relaxed);
        tracing::debug!(leaves, took = ?started.elapsed(), "index opened again to free its memory");
        Ok(())
    }

    /// Puts the end of a run on record, in the database and beside it.
    fn end_run(&self, number: u64) -> Result<(), IndexError> {
        self.with_db(|db| {
            db.open_tree(LAST_RUN_TREE)?.insert([], &number.to_le_bytes()[..])?;
            self.flush(db)
        })?;
        write_last_run(&self.dir, number)
            .map_err(|source| IndexError::Io { what: "recording the end of a run", source })
    }
}

impl Index for SledIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, IndexError> {
        self.with_db(|db| db.get(key)?.map(|value| checked_value(&value)).transpose())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
        self.with_db(|db| {
            for entry in db.range(from..).take(limit) {
                let (key, value) = entry?;
                if &*key >= to {
                    break;
                }
                out.push((checked_key(&key)?, checked_value(&value)?));
            }
            Ok(())
        })
    }

    fn write_run(&self, run: &mut dyn Iterator<Item = Change>, stop: &dyn Fn() -> bool) -> Result<bool, IndexError> {
        let mut last_run = self.last_run.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match self.write_segment(run, stop)? {
                Segment::RunEnded => break,
                Segment::LeavesFull => self.reopen()?,
                Segment::Stopped => return Ok(false),
            }
        }
        self.end_run(*last_run + 1)?;
        *last_run += 1;
        Ok(true)
    }

    fn bytes_on_disk(&self) -> u64 {
        bytes_below(&self.dir)
    }
}

impl Drop for SledIndex {
    /// Flushes by ourselves first: a failure here is an error, one in sled's own thread an abort.
    fn drop(&mut self) {
        let _ = self.with_db(|db| self.flush(db));
    }
}

impl Handles {
    fn new(db: Db) -> Handles {
        Handles(Mutex::new(vec![db]))
    }

    fn take(&self) -> Db {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() > 1
            && let Some(db) = idle.pop()
        {
            return db;
        }
        idle[0].clone()
    }

    fn put(&self, db: Db) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(db);
    }
}

fn write(db: &Db, (key, value): &Change) -> io::Result<()> {
    match value {
        Some(value) => db.insert(key.as_slice(), value.as_slice())?,
        None => db.remove(key.as_slice())?,
    };
    Ok(())
}

fn checked_key(bytes: &[u8]) -> io::Result<Key> {
    if bytes.len() > super::KEY_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a key is too long"));
    }
    Ok(Key::new(bytes))
}

fn checked_value(bytes: &[u8]) -> io::Result<Value> {
    if bytes.len() > super::VALUE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a value is too long"));
    }
    Ok(Value::new(bytes))
}

/// Opens and probes on a thread of its own, which is left behind when it does not end in time.
fn open_within(dir: &Path, cache_bytes: u64, timeout: Duration) -> Result<(Db, u64), IndexError> {
    let mut config = sled::Config::new()
        .path(dir.join(DATABASE_DIR))
        .cache_capacity_bytes(usize::try_from(cache_bytes).unwrap_or(usize::MAX))
        .zstd_compression_level(ZSTD_LEVEL)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    // No rewriting of leaves only to fill gaps in files: free slots are used again anyway (0.7 M
    // events: 138 MB with and without), and closing then has nothing to write that could fail.
    config.target_heap_file_fill_ratio = 0.0;
    let (answer, opened) = mpsc::channel();
    thread::Builder::new()
        .name("index-open".into())
        .spawn(move || {
            let opened = panic::catch_unwind(AssertUnwindSafe(|| open_and_probe(&config)));
            let _ = answer.send(opened.unwrap_or_else(|panic| Err(IndexError::Damaged(panic_message(panic.as_ref())))));
        })
        .map_err(|source| IndexError::Io { what: "starting the thread that opens the index", source })?;
    match opened.recv_timeout(timeout) {
        Ok(opened) => opened,
        Err(RecvTimeoutError::Timeout) => Err(IndexError::OpenTimeout(timeout)),
        Err(RecvTimeoutError::Disconnected) => Err(IndexError::Damaged("opening ended without an answer".into())),
    }
}

/// Opens the database and reads the number of its last run and its first leaf.
fn open_and_probe(config: &sled::Config) -> Result<(Db, u64), IndexError> {
    let db: Db = config.open().map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::Unsupported => {
            IndexError::Damaged(source.to_string())
        }
        _ => IndexError::Io { what: "opening the index", source },
    })?;
    let probe = || -> io::Result<u64> {
        db.first()?;
        let number = db.open_tree(LAST_RUN_TREE)?.get([])?;
        Ok(number.and_then(|bytes| Some(u64::from_le_bytes(*bytes.first_chunk()?))).unwrap_or(0))
    };
    match panic::catch_unwind(AssertUnwindSafe(probe)) {
        Ok(Ok(number)) => Ok((db, number)),
        failed => {
            let why = match &failed {
                Err(panic) => panic_message(panic.as_ref()),
                Ok(answer) => format!("{answer:?}"),
            };
            mem::forget(db);
            Err(IndexError::Damaged(why))
        }
    }
}

fn read_last_run(dir: &Path) -> Result<u64, IndexError> {
    match fs::read_to_string(dir.join(LAST_RUN_FILE)) {
        Ok(text) => text.trim().parse().map_err(|_| IndexError::Damaged(format!("{LAST_RUN_FILE} holds no number"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(IndexError::Damaged(format!("{LAST_RUN_FILE} is no text")))
        }
        Err(source) => Err(IndexError::Io { what: "reading the number of the last run", source }),
    }
}

/// Replaces the file in one step.
fn write_last_run(dir: &Path, number: u64) -> io::Result<()> {
    let new = dir.join(format!("{LAST_RUN_FILE}.new"));
    let mut file = File::create(&new)?;
    file.write_all(format!("{number}\n").as_bytes())?;
    // An empty file after a power loss would look like damage.
    file.sync_all()?;
    fs::rename(new, dir.join(LAST_RUN_FILE))
}

fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("sled panicked: {}", text.unwrap_or("without a message"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::Rng;
    use proptest::test_runner::{RngAlgorithm, TestRng};
    use std::collections::BTreeMap;

    const CACHE_BYTES: u64 = 16 << 20;
    /// Ample for a sound index of these sizes on a busy machine.
    const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

    fn open(dir: &Path) -> SledIndex {
        SledIndex::open(dir, CACHE_BYTES, OPEN_TIMEOUT).unwrap()
    }

    fn write(index: &SledIndex, run: impl IntoIterator<Item = Change>) {
        assert!(index.write_run(&mut run.into_iter(), &|| false).unwrap());
    }

    fn scan(index: &SledIndex, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Key, Value)>, IndexError> {
        let mut out = vec![];
        index.scan(from, to, limit, &mut out)?;
        Ok(out)
    }

    fn rng(seed: u8) -> TestRng {
        TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32])
    }

    /// Sorted changes with keys of 28 random bytes.
    fn random_run(rng: &mut TestRng, entries: usize) -> BTreeMap<Key, Option<Value>> {
        let key = |rng: &mut TestRng| {
            let mut bytes = [0; 28];
            rng.fill_bytes(&mut bytes);
            Key::new(&bytes)
        };
        (0..entries).map(|n| (key(rng), Some(Value::new(&(n as u32).to_be_bytes())))).collect()
    }

    /// Written, replaced and removed entries, read back before and after opening again.
    #[test]
    fn what_is_written_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let mut oracle = BTreeMap::new();
        for seed in 0..3 {
            let index = open(dir.path());
            let mut run = random_run(&mut rng(seed), 3_000);
            let removed = oracle.keys().step_by(3).map(|key| (*key, None));
            run.extend(removed.collect::<Vec<_>>());
            write(&index, run.clone());
            oracle.extend(run);
            oracle.retain(|_, value: &mut Option<Value>| value.is_some());

            let expected: Vec<_> = oracle.iter().map(|(key, value)| (*key, value.unwrap())).collect();
            assert_eq!(scan(&index, &[], &[0xff; 31], usize::MAX).unwrap(), expected);
            let (key, value) = expected[expected.len() / 2];
            assert_eq!(index.get(&key).unwrap(), Some(value));
            assert_eq!(index.get(b"nothing").unwrap(), None);
            assert!(index.bytes_on_disk() > 0);
        }
    }

    /// The upper bound and the limit hold, in the middle of a leaf and beyond the last one.
    #[test]
    fn scan_stops_at_its_bound_and_limit() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path());
        write(&index, (0..1_000u16).map(|n| (Key::new(&n.to_be_bytes()), Some(Value::new(&[])))));
        let numbers = |from: u16, to: u16, limit| {
            let entries = scan(&index, &from.to_be_bytes(), &to.to_be_bytes(), limit).unwrap();
            entries.iter().map(|(key, _)| u16::from_be_bytes([key[0], key[1]])).collect::<Vec<_>>()
        };
        assert_eq!(numbers(500, 503, 10), [500, 501, 502]);
        assert_eq!(numbers(500, 700, 2), [500, 501]);
        assert_eq!(numbers(998, 2_000, 10), [998, 999]);
        assert_eq!(numbers(500, 500, 10), [0u16; 0]);
        assert_eq!(numbers(500, 700, 0), [0u16; 0]);
    }

    /// A database of more leaves than may stay in memory is opened again within the run,
    /// while others read from it.
    #[test]
    fn reopens_within_a_run_under_readers() {
        let dir = tempfile::tempdir().unwrap();
        let index = SledIndex::open(dir.path(), 0, OPEN_TIMEOUT).unwrap();
        let first = random_run(&mut rng(1), 100);
        write(&index, first.clone());
        // Just below the limit, so that a short run crosses it.
        index.written_leaves.store(WRITTEN_LEAVES_MIN - 1, Ordering::Relaxed);
        let second = random_run(&mut rng(2), FLUSH_ENTRIES + 1);
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| write(&index, second.clone()));
            while !writing.is_finished() {
                for (key, value) in &first {
                    assert_eq!(index.get(key).unwrap(), *value);
                }
            }
        });
        assert!(index.written_leaves.load(Ordering::Relaxed) < WRITTEN_LEAVES_MIN, "it was opened again");
        assert_eq!(scan(&index, &[], &[0xff; 31], usize::MAX).unwrap().len(), first.len() + second.len());
    }

    /// Removing a stretch of entries empties whole leaves, which sled then merges away; readers
    /// on both sides of the stretch miss nothing meanwhile.
    #[test]
    fn leaves_are_emptied_under_readers() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path());
        let change = |n: u16, value| (Key::new(&n.to_be_bytes()), value);
        let value = Some(Value::new(&[1]));
        write(&index, (0..6_000).map(|n| change(n, value)));
        let numbers = |index: &SledIndex| {
            let entries = scan(index, &[], &[0xff; 31], usize::MAX).unwrap();
            let number = |(key, _): &(Key, Value)| u16::from_be_bytes([key[0], key[1]]);
            entries.iter().map(number).collect::<Vec<_>>()
        };
        std::thread::scope(|scope| {
            let removing = scope.spawn(|| write(&index, (1_000..5_000).map(|n| change(n, None))));
            while !removing.is_finished() {
                let seen = numbers(&index);
                assert!(
                    seen.iter().copied().filter(|n| !(1_000..5_000).contains(n)).eq((0..1_000).chain(5_000..6_000))
                );
            }
        });
        drop(index);
        assert!(numbers(&open(dir.path())).into_iter().eq((0..1_000).chain(5_000..6_000)));
    }

    /// A stopped run says so; written again it is complete.
    #[test]
    fn a_stopped_run_can_be_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path());
        let run = random_run(&mut rng(3), FLUSH_ENTRIES * 2);
        assert!(!index.write_run(&mut run.clone().into_iter(), &|| true).unwrap());
        write(&index, run.clone());
        assert_eq!(scan(&index, &[], &[0xff; 31], usize::MAX).unwrap().len(), run.len());
    }

    /// A panic below becomes an error, and from then on the index answers nothing.
    #[test]
    fn a_panic_damages_the_engine_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path());
        let error = index.with_db(|_| -> io::Result<()> { panic!("as sled does") }).unwrap_err();
        assert!(error.to_string().contains("as sled does"), "{error}");
        assert!(matches!(index.get(b"key"), Err(IndexError::Damaged(_))));
    }

    /// Every file of the database, in a fixed order.
    fn files(dir: &Path) -> Vec<PathBuf> {
        let mut found = vec![];
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(files(&path));
            } else if fs::metadata(&path).unwrap().len() > 0 {
                found.push(path);
            }
        }
        found.sort();
        found
    }

    fn copy(from: &Path, to: &Path) {
        for file in files(from) {
            let target = to.join(file.strip_prefix(from).unwrap());
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::copy(&file, target).unwrap();
        }
    }

    fn damage(bytes: &mut Vec<u8>, kind: u64, rng: &mut TestRng) {
        let at = (rng.next_u64() % bytes.len() as u64) as usize;
        match kind {
            0 => bytes[at] ^= 1 << (rng.next_u32() % 8),
            1 => bytes.truncate(at),
            _ => {
                let end = (at + 4_096).min(bytes.len());
                bytes[at..end].fill(0);
            }
        }
    }

    /// Each file in turn with a flipped bit, cut short, and with a zeroed page. The index must
    /// refuse to open, fail on reading, or answer exactly what was written: never an incomplete
    /// answer, a panic, or a wait beyond the time limit.
    #[test]
    fn damaged_files_never_give_a_wrong_answer() {
        let sound = tempfile::tempdir().unwrap();
        let run = random_run(&mut rng(4), 2_000);
        let index = open(sound.path());
        write(&index, run.clone());
        // Copied while open, as a crash would leave it: the metadata log is not compacted yet.
        let crashed = tempfile::tempdir().unwrap();
        copy(sound.path(), crashed.path());
        drop(index);

        let expected: Vec<_> = run.iter().map(|(key, value)| (*key, value.unwrap())).collect();
        let mut rng = rng(5);
        // A hang costs this much, and a sound index that is slow for once is only one case less.
        let timeout = Duration::from_secs(2);
        let read_all = |dir: &Path, timeout| {
            let index = SledIndex::open(dir, CACHE_BYTES, timeout)?;
            scan(&index, &[], &[0xff; 31], usize::MAX)
        };
        for origin in [sound.path(), crashed.path()] {
            let dir = tempfile::tempdir().unwrap();
            copy(origin, dir.path());
            assert_eq!(read_all(dir.path(), OPEN_TIMEOUT).unwrap(), expected, "the copy itself is sound");
            for (file, kind) in files(origin).iter().flat_map(|file| (0..3).map(move |kind| (file, kind))) {
                let dir = tempfile::tempdir().unwrap();
                copy(origin, dir.path());
                let mut bytes = fs::read(file).unwrap();
                damage(&mut bytes, kind, &mut rng);
                fs::write(dir.path().join(file.strip_prefix(origin).unwrap()), bytes).unwrap();
                if let Ok(entries) = read_all(dir.path(), timeout) {
                    assert_eq!(entries, expected, "{} damaged by {kind}", file.display());
                }
            }
        }
    }
}
