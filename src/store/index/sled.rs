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
//!   Only where the disk was full, the files are as sound as after a crash: they move
//!   into another folder (see `folder`) and are opened again, so that reading goes on.
//! - It writes when it is opened. So a ballast file is kept for a disk that is full then.
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

mod folder;

use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use super::ballast::{self, Ballast};
use super::{Change, Index, IndexError, Key, Value, guard};

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

/// The ballast is this much and a part of the index that opening writes anew: its list of leaves (1 MB of 127).
const BALLAST_BYTES_MIN: u64 = 256 * 1024;
const INDEX_BYTES_PER_BALLAST: u64 = 32;
/// How often a database that was lost to a full disk is opened again, since each time its memory is lost too.
const RESCUES_MAX: u32 = 8;

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
    ballast: Ballast,
    /// Readers and the writer hold it for reading; reopening takes it for writing.
    state: RwLock<State>,
    /// Number of the last run; held by the one who writes a run.
    last_run: Mutex<u64>,
    /// Leaves flushed since the database was opened, which is what it keeps in memory.
    written_leaves: AtomicU64,
    /// How often the database was opened again after it was lost to a full disk.
    rescues: AtomicU32,
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
        guard::refuse_marked(dir)?;
        let run_on_file = guard::read_number(&dir.join(LAST_RUN_FILE))?;
        let ballast = Ballast::of(dir);
        let (db, run_in_database) = open_with_ballast(dir, cache_bytes, open_timeout, &ballast)?;
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
            ballast,
            state: RwLock::new(State::Open(Handles::new(db))),
            last_run: Mutex::new(run_in_database),
            written_leaves: AtomicU64::new(0),
            rescues: AtomicU32::new(0),
        })
    }

    /// Reads, and reads again where the database was lost to a full disk and has been opened again.
    fn read<T>(&self, mut work: impl FnMut(&Db) -> io::Result<T>) -> Result<T, IndexError> {
        match self.with_db(&mut work) {
            Err(error) if error.is_for_want_of_room() => self.with_db(&mut work),
            read => read,
        }
    }

    /// Runs `work` on a handle of its own. A failure for want of room leaves the engine as after a crash, open again;
    /// any other damages it for good.
    fn with_db<T>(&self, work: impl FnOnce(&Db) -> io::Result<T>) -> Result<T, IndexError> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let handles = match &*state {
            State::Open(handles) => handles,
            State::Damaged(why) => return Err(IndexError::Damaged(why.clone())),
        };
        let db = handles.take();
        match guard::caught(|| work(&db)) {
            Ok(answer) => {
                handles.put(db);
                Ok(answer)
            }
            Err(error) => {
                let rescues = self.rescues.load(Ordering::Relaxed);
                drop(state);
                mem::forget(db);
                if !ballast::is_for_want_of_room(&error) {
                    return Err(self.damage(&error));
                }
                self.rescue(rescues)?;
                Err(IndexError::Io { what: "writing the index", source: error })
            }
        }
    }

    /// Opens a database again that was lost to a full disk, unless another thread has done so since there were
    /// `rescues_before`.
    fn rescue(&self, rescues_before: u32) -> Result<(), IndexError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let State::Open(_) = &*state else { return Err(IndexError::DiskFull) };
        if self.rescues.load(Ordering::Relaxed) != rescues_before {
            return Ok(());
        }
        let lost =
            mem::replace(&mut *state, State::Damaged("its disk was full, and it could not be opened again".into()));
        if let State::Open(handles) = lost {
            mem::forget(handles); // sled would end the process
        }
        if rescues_before >= RESCUES_MAX {
            return Err(IndexError::DiskFull);
        }
        self.rescues.store(rescues_before + 1, Ordering::Relaxed);
        self.ballast.give_up();
        // Half a move must not be opened: it lacks some of its leaves.
        guard::mark_damaged(&self.dir, "it was being moved away from a database that was lost to a full disk");
        let moved = folder::move_on(&self.dir, &folder::find(&self.dir));
        moved.map_err(|source| IndexError::Io { what: "moving the index", source })?;
        guard::unmark_damaged(&self.dir);
        let (db, _) = open_with_ballast(&self.dir, self.cache_bytes, self.open_timeout, &self.ballast)?;
        *state = State::Open(Handles::new(db));
        self.written_leaves.store(0, Ordering::Relaxed);
        tracing::warn!(dir = %self.dir.display(), "the disk was full while the index was written; it was opened again");
        Ok(())
    }

    fn damage(&self, error: &io::Error) -> IndexError {
        let why = error.to_string();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Open(_) = &*state {
            tracing::error!(why, dir = %self.dir.display(), "the index has failed");
            *state = State::Damaged(why.clone());
            if !guard::is_passing(error) {
                guard::mark_damaged(&self.dir, &why);
            }
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
            match open_with_ballast(&self.dir, self.cache_bytes, self.open_timeout, &self.ballast) {
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
        guard::write_number(&self.dir.join(LAST_RUN_FILE), number)?;
        self.ballast.fill(ballast_bytes(self.bytes_on_disk()));
        Ok(())
    }
}

impl Index for SledIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, IndexError> {
        self.read(|db| db.get(key)?.map(|value| guard::checked_value(&value)).transpose())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
        let before = out.len();
        self.read(|db| {
            out.truncate(before);
            for entry in db.range(from..).take(limit) {
                let (key, value) = entry?;
                if &*key >= to {
                    break;
                }
                out.push((guard::checked_key(&key)?, guard::checked_value(&value)?));
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
        guard::bytes_below(&self.dir).saturating_sub(self.ballast.bytes())
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

/// Opens and probes within the time limit; on a full disk in the place of the ballast, which is then made again.
fn open_with_ballast(
    dir: &Path,
    cache_bytes: u64,
    timeout: Duration,
    ballast: &Ballast,
) -> Result<(Db, u64), IndexError> {
    let opened = match open_within(dir, cache_bytes, timeout) {
        Err(error) if error.is_for_want_of_room() && ballast.give_up() => open_within(dir, cache_bytes, timeout),
        opened => opened,
    };
    ballast.fill(ballast_bytes(guard::bytes_below(dir).saturating_sub(ballast.bytes())));
    opened
}

fn ballast_bytes(index_bytes: u64) -> u64 {
    BALLAST_BYTES_MIN + index_bytes / INDEX_BYTES_PER_BALLAST
}

fn open_within(dir: &Path, cache_bytes: u64, timeout: Duration) -> Result<(Db, u64), IndexError> {
    let mut config = sled::Config::new()
        .path(folder::find(dir))
        .cache_capacity_bytes(usize::try_from(cache_bytes).unwrap_or(usize::MAX))
        .zstd_compression_level(ZSTD_LEVEL)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    // No rewriting of leaves only to fill gaps in files: free slots are used again anyway (0.7 M
    // events: 138 MB with and without), and closing then has nothing to write that could fail.
    config.target_heap_file_fill_ratio = 0.0;
    guard::within(timeout, move || open_and_probe(&config))
}

/// Opens the database and reads the number of its last run and its first leaf.
fn open_and_probe(config: &sled::Config) -> Result<(Db, u64), IndexError> {
    let db: Db = config.open().map_err(guard::open_error)?;
    let probe = || -> io::Result<u64> {
        db.first()?;
        let number = db.open_tree(LAST_RUN_TREE)?.get([])?;
        Ok(number.and_then(|bytes| Some(u64::from_le_bytes(*bytes.first_chunk()?))).unwrap_or(0))
    };
    match guard::caught(probe) {
        Ok(number) => Ok((db, number)),
        Err(error) => {
            mem::forget(db);
            Err(IndexError::Damaged(error.to_string()))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::suite::{CACHE_BYTES, OPEN_TIMEOUT, random_run, rng, scan, write};
    use super::*;

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

    /// A panic below becomes an error, and from then on the index answers nothing, also when opened again.
    #[test]
    fn a_panic_damages_the_engine_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let index = SledIndex::open(dir.path(), CACHE_BYTES, OPEN_TIMEOUT).unwrap();
        let error = index.with_db(|_| -> io::Result<()> { panic!("as sled does") }).unwrap_err();
        assert!(error.to_string().contains("as sled does"), "{error}");
        assert!(matches!(index.get(b"key"), Err(IndexError::Damaged(_))));
        drop(index);
        let error = SledIndex::open(dir.path(), CACHE_BYTES, OPEN_TIMEOUT).map(drop).unwrap_err();
        assert!(matches!(error, IndexError::Damaged(_)), "{error}");
    }
}
