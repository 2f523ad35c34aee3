//! The write buffer in front of an index engine, and the thread that merges it down.
//!
//! New entries go to an ordered map in memory, the *active* run. When it is full it
//! is *frozen*: it changes no more, a fresh active run takes its place, and the
//! merge thread writes the frozen one into the engine in key order. Reads ask
//! active, frozen and engine, in this order, and the first that knows a key is
//! right. Entries only ever move down, and the frozen run is dropped after the
//! engine has it all, so a reader that looks from the top down never meets a gap.
//!
//! The event log is the durable one: what is lost here is replayed from it.

use std::collections::BTreeMap;
use std::io;
use std::iter::Peekable;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Change, Index, IndexError, Key, Value};

/// Most entries taken from each layer at once by a scan, which bounds the time under the read lock.
const SCAN_PAGE: usize = 1_024;
/// First pause after a failed merge; it doubles up to [`RETRY_PAUSE_MAX`].
const RETRY_PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause after a failed merge.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long beyond its deadline closing waits for an engine that is in the middle of a chunk.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

type Entries = BTreeMap<Key, Option<Value>>;
/// Persists that the engine has everything up to this log offset.
pub type OnMerged = Box<dyn Fn(u64) -> io::Result<()> + Send + Sync>;

/// An index engine with a write buffer in front of it.
///
/// One writer calls [`apply`](BufferedIndex::apply); any number of threads read.
pub struct BufferedIndex {
    shared: Arc<Shared>,
    /// The merge thread, until it has been joined.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    engine: Arc<dyn Index>,
    run_entries_max: usize,
    on_merged: OnMerged,
    layers: RwLock<Layers>,
    merger: Mutex<Merger>,
    merger_changed: Condvar,
    /// Held while a frozen run is written: by the merge thread or by `merge_now`.
    merging: Mutex<()>,
}

#[derive(Default)]
struct Layers {
    active: Entries,
    /// Log offset after the last batch in `active`.
    active_log_end: u64,
    frozen: Option<Arc<Frozen>>,
    /// How many runs were frozen so far.
    freezes: u64,
}

struct Frozen {
    entries: Entries,
    log_end: u64,
}

/// What the merge thread and the others tell each other.
#[derive(Default)]
struct Merger {
    running: bool,
    /// Set by `close`: start no further merge, and stop the present one at this time.
    deadline: Option<Instant>,
    /// Why the last merge failed; the retry that succeeds clears it.
    failure: Option<String>,
    /// It failed for want of room on the disk.
    is_short_of_room: bool,
}

impl BufferedIndex {
    /// Puts a buffer of `run_entries_max` entries a run in front of `engine` and starts the
    /// merge thread. Two runs are alive at most, of which the active one may grow to twice
    /// its size: about 60 bytes an entry, so 180 bytes times `run_entries_max` in all.
    ///
    /// `on_merged(log_offset)` is called by whoever merged, after a run is durable: every
    /// change applied with `log_end <= log_offset` is in the engine. After its
    /// error the run stays in memory and is written again later; [`health`](BufferedIndex::health) tells of it.
    ///
    /// # Errors
    /// [`IndexError::Io`] when the thread cannot be started.
    pub fn new(
        engine: Arc<dyn Index>,
        run_entries_max: usize,
        on_merged: OnMerged,
    ) -> Result<BufferedIndex, IndexError> {
        let shared = Arc::new(Shared {
            engine,
            run_entries_max: run_entries_max.max(1),
            on_merged,
            layers: RwLock::default(),
            merger: Mutex::new(Merger { running: true, ..Merger::default() }),
            merger_changed: Condvar::new(),
            merging: Mutex::new(()),
        });
        let merger = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("index-merge".into())
            .spawn(move || {
                merger.run();
                merger.merger().running = false;
                merger.merger_changed.notify_all();
            })
            .map_err(|source| IndexError::Io { what: "starting the index merge thread", source })?;
        Ok(BufferedIndex { shared, thread: Mutex::new(Some(thread)) })
    }

    /// The value of `key`, the newest one wherever it is.
    ///
    /// # Panics
    /// On more than [`KEY_BYTES_MAX`](super::KEY_BYTES_MAX) bytes.
    ///
    /// # Errors
    /// [`IndexError`] when the key is not buffered and the engine cannot read.
    pub fn get(&self, key: &[u8]) -> Result<Option<Value>, IndexError> {
        let buffered = self.shared.read().get(&Key::new(key));
        match buffered {
            Some(value) => Ok(value),
            None => self.shared.engine.get(key),
        }
    }

    /// Appends up to `limit` entries with `from <= key < to`, in key order. Removed keys
    /// do not count. Batches applied meanwhile may show in the later part only.
    ///
    /// # Panics
    /// On bounds of more than [`KEY_BYTES_MAX`](super::KEY_BYTES_MAX) bytes.
    ///
    /// # Errors
    /// [`IndexError`] when the engine cannot read; `out` then holds a prefix of the answer.
    pub fn scan(&self, from: &[u8], to: &[u8], limit: usize, out: &mut Vec<(Key, Value)>) -> Result<(), IndexError> {
        let to = Key::new(to);
        let mut next = Some(Key::new(from));
        let mut wanted = limit;
        while let Some(from) = next.filter(|from| *from < to && wanted > 0) {
            let before = out.len();
            next = self.shared.scan_page(from, to, wanted, out)?;
            wanted -= out.len() - before;
        }
        Ok(())
    }

    /// Makes all changes of a batch visible at once; a later change of a key wins. Writer only.
    ///
    /// `log_end` is the log offset after the batch. May block: when the active run has grown
    /// to twice its size, until the run before it is merged. It never refuses, for the batch
    /// is in the log already; [`wait_for_room`](BufferedIndex::wait_for_room) before the log
    /// append is what keeps memory bounded while merges fail.
    ///
    /// # Errors
    /// [`IndexError::Closed`] after [`close`](BufferedIndex::close).
    pub fn apply(&self, changes: &[Change], log_end: u64) -> Result<(), IndexError> {
        match self.wait_for_room() {
            // A failing engine is no reason to hide what the log holds already.
            Ok(()) | Err(IndexError::Full(_) | IndexError::DiskFull) => {}
            Err(error) => return Err(error),
        }
        let mut layers = self.shared.write();
        layers.active.extend(changes.iter().copied());
        layers.active_log_end = log_end;
        let frozen = layers.active.len() >= self.shared.run_entries_max && layers.freeze();
        drop(layers);
        if frozen {
            self.shared.wake_merger();
        }
        Ok(())
    }

    /// Waits until the active run is below twice its size. To be called before the log append.
    ///
    /// # Errors
    /// [`IndexError::Full`] when there is no room and merging fails, so that none will come soon, and
    /// [`IndexError::DiskFull`] when it fails for want of room on the disk;
    /// [`IndexError::Closed`] after [`close`](BufferedIndex::close).
    pub fn wait_for_room(&self) -> Result<(), IndexError> {
        let mut merger = self.shared.merger();
        loop {
            if merger.deadline.is_some() {
                return Err(IndexError::Closed);
            }
            if !self.shared.is_full() {
                return Ok(());
            }
            if merger.is_short_of_room {
                return Err(IndexError::DiskFull);
            }
            if let Some(failure) = &merger.failure {
                return Err(IndexError::Full(failure.clone()));
            }
            merger = self.shared.merger_changed.wait(merger).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For a replay, which may need as much memory as the writer took before a crash and a little more, but must not take
    /// all there is while merges fail.
    ///
    /// # Errors
    /// As [`wait_for_room`](BufferedIndex::wait_for_room), once the active run has grown to four times its size.
    pub fn check_bound(&self) -> Result<(), IndexError> {
        let entries = self.shared.read().active.len();
        if entries < self.shared.run_entries_max.saturating_mul(4) { Ok(()) } else { self.wait_for_room() }
    }

    /// Merges all that is buffered now, on the calling thread. False when `stop` ended it early.
    ///
    /// # Errors
    /// [`IndexError`] when the engine cannot write; what was buffered stays buffered.
    pub fn merge_now(&self, stop: &dyn Fn() -> bool) -> Result<bool, IndexError> {
        let shared = &self.shared;
        let _merging = lock(&shared.merging);
        // The run that was frozen before, then the one that is active now.
        for _ in 0..2 {
            shared.write().freeze();
            if !shared.merge_frozen(stop)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Ends the merge thread, and merges what is buffered if that can be done before
    /// `deadline`. True when all is merged; else the log replays the rest at the next start.
    /// Returns soon after the deadline even when the engine hangs.
    ///
    /// # Errors
    /// [`IndexError`] when the engine cannot write.
    pub fn close(&self, deadline: Instant) -> Result<bool, IndexError> {
        if !self.stop_thread(deadline) {
            return Ok(false);
        }
        self.merge_now(&|| Instant::now() >= deadline)
    }

    /// Has the merge thread end soon, and does not wait for it. The index takes no more changes.
    pub fn ask_to_stop(&self) {
        drop(self.shared.ask_merger_to_stop(Instant::now()));
    }

    /// Ends the merge thread, and merges nothing more. False when it hangs in the engine.
    #[must_use]
    pub fn stop(&self) -> bool {
        self.stop_thread(Instant::now())
    }

    /// Ends the merge thread. False when it did not end until a little beyond `deadline`.
    fn stop_thread(&self, deadline: Instant) -> bool {
        let ended = self.shared.stop_merger(deadline);
        if ended && let Some(thread) = lock(&self.thread).take() {
            // Only its share in the engine is left to be dropped, and whoever drops us
            // relies on the engine being closed after that.
            let _ = thread.join();
        }
        ended
    }

    /// Why merging fails at present; `None` when all is well.
    #[must_use]
    pub fn health(&self) -> Option<String> {
        self.shared.merger().failure.clone()
    }

    /// Entries in memory, removals included.
    #[must_use]
    pub fn buffered_entries(&self) -> usize {
        let layers = self.shared.read();
        layers.active.len() + layers.frozen.as_ref().map_or(0, |frozen| frozen.entries.len())
    }

    /// Bytes the engine takes on disk.
    #[must_use]
    pub fn bytes_on_disk(&self) -> u64 {
        self.shared.engine.bytes_on_disk()
    }
}

impl Drop for BufferedIndex {
    fn drop(&mut self) {
        self.stop_thread(Instant::now());
    }
}

impl Layers {
    /// What the buffer knows of a key: `Some(None)` that it is removed, `None` nothing.
    fn get(&self, key: &Key) -> Option<Option<Value>> {
        let frozen = || self.frozen.as_ref().and_then(|frozen| frozen.entries.get(key));
        self.active.get(key).or_else(frozen).copied()
    }

    /// Turns the active run into the frozen one, unless there is one or nothing to freeze.
    fn freeze(&mut self) -> bool {
        if self.frozen.is_some() || self.active.is_empty() {
            return false;
        }
        let entries = std::mem::take(&mut self.active);
        self.frozen = Some(Arc::new(Frozen { entries, log_end: self.active_log_end }));
        self.freezes += 1;
        true
    }
}

/// Reading.
impl Shared {
    /// Appends the next live entries and returns where to go on; `None` at the end of the range.
    fn scan_page(
        &self,
        from: Key,
        to: Key,
        wanted: usize,
        out: &mut Vec<(Key, Value)>,
    ) -> Result<Option<Key>, IndexError> {
        let page = wanted.min(SCAN_PAGE);
        let (active, frozen, engine) = loop {
            // Top down: what leaves a layer after it was read is found again below.
            let layers = self.read();
            let active: Vec<Change> = layers.active.range(from..to).take(page).map(copied).collect();
            let (frozen, freezes) = (layers.frozen.clone(), layers.freezes);
            drop(layers);
            let mut engine = Vec::with_capacity(page.min(128));
            self.engine.scan(&from, &to, page, &mut engine)?;
            // A run that was frozen meanwhile may be on its way into the engine, and then half a batch was read.
            if self.read().freezes == freezes {
                break (active, frozen, engine);
            }
        };

        // A layer that filled its page may have more behind its last key: the others are
        // only comparable up to there.
        let mut known_to = None;
        let mut cut = |full: bool, last: Option<Key>| {
            if full {
                known_to = [known_to, last].into_iter().flatten().min();
            }
        };
        cut(active.len() == page, active.last().map(|(key, _)| *key));
        cut(engine.len() == page, engine.last().map(|(key, _)| *key));

        let known = |key: &Key| known_to.is_none_or(|end| *key <= end);
        let frozen = frozen.as_ref().map(|frozen| frozen.entries.range(from..to));
        let buffered = Overlay::new(active.into_iter(), frozen.into_iter().flatten().map(copied));
        let merged = Overlay::new(buffered, engine.into_iter().map(|(key, value)| (key, Some(value))));
        let before = out.len();
        for (key, value) in merged.take_while(|(key, _)| known(key)) {
            out.extend(value.map(|value| (key, value)));
            if out.len() - before == wanted {
                return Ok(None);
            }
        }
        Ok(known_to.and_then(|end| end.successor()))
    }

    fn read(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Layers> {
        self.layers.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Merging.
impl Shared {
    /// The merge thread: waits for a frozen run, merges it, and tries again later when that fails.
    fn run(&self) {
        let mut pause = RETRY_PAUSE_MIN;
        loop {
            let retry_in = self.merger().failure.is_some().then_some(pause);
            if !self.wait_for_work(retry_in) {
                return;
            }
            let merged = {
                let _merging = lock(&self.merging);
                self.merge_frozen(&|| self.is_past_deadline())
            };
            match merged {
                Ok(_) => pause = RETRY_PAUSE_MIN,
                Err(error) => {
                    tracing::error!(%error, retry_in = ?pause, "merging the index failed; its entries stay in memory");
                    if retry_in.is_some() {
                        pause = (pause * 2).min(RETRY_PAUSE_MAX);
                    }
                }
            }
        }
    }

    /// Waits for a frozen run, or after a failure for `retry_in`. False when the thread must end.
    fn wait_for_work(&self, retry_in: Option<Duration>) -> bool {
        let retry_at = retry_in.map(|pause| Instant::now() + pause);
        let mut merger = self.merger();
        loop {
            if merger.deadline.is_some() {
                return false;
            }
            let now = Instant::now();
            let paused = retry_at.is_some_and(|at| now < at);
            if !paused && self.read().frozen.is_some() {
                return true;
            }
            let wake_at = retry_at.filter(|_| paused);
            merger = match wake_at {
                Some(at) => {
                    self.merger_changed.wait_timeout(merger, at - now).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.merger_changed.wait(merger).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Writes the frozen run into the engine and drops it; the caller holds `merging`.
    /// False when `stop` ended it early. On an error the run stays frozen and readable.
    fn merge_frozen(&self, stop: &dyn Fn() -> bool) -> Result<bool, IndexError> {
        let Some(frozen) = self.read().frozen.clone() else {
            return Ok(true);
        };
        let written = panic::catch_unwind(AssertUnwindSafe(|| self.write_frozen(&frozen, stop)))
            .unwrap_or_else(|_| Err(IndexError::Damaged("a merge panicked".into())));
        let failure = written.as_ref().err().map(ToString::to_string);
        let is_short_of_room = written.as_ref().is_err_and(IndexError::is_for_want_of_room);
        let merged = *written.as_ref().unwrap_or(&false);
        if merged {
            let mut layers = self.write();
            layers.frozen = None;
            if layers.active.len() >= self.run_entries_max {
                layers.freeze();
            }
        }
        let mut merger = self.merger();
        (merger.failure, merger.is_short_of_room) = (failure, is_short_of_room);
        drop(merger);
        self.merger_changed.notify_all();
        written
    }

    fn write_frozen(&self, frozen: &Frozen, stop: &dyn Fn() -> bool) -> Result<bool, IndexError> {
        let written = self.engine.write_run(&mut frozen.entries.iter().map(copied), stop)?;
        if written && let Err(source) = (self.on_merged)(frozen.log_end) {
            // With room on the disk the run is simply written again.
            return Err(IndexError::Io { what: "recording how far the index reaches", source });
        }
        Ok(written)
    }

    /// Tells the merge thread to end and waits until it has, a little beyond `deadline`.
    fn ask_merger_to_stop(&self, deadline: Instant) -> MutexGuard<'_, Merger> {
        let mut merger = self.merger();
        merger.deadline = Some(merger.deadline.map_or(deadline, |set| set.min(deadline)));
        self.merger_changed.notify_all();
        merger
    }

    fn stop_merger(&self, deadline: Instant) -> bool {
        let mut merger = self.ask_merger_to_stop(deadline);
        while merger.running {
            let left = (deadline + CLOSE_GRACE).saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            merger = self.merger_changed.wait_timeout(merger, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn wake_merger(&self) {
        // Taking the lock orders this wake-up after a check that just found no work.
        drop(self.merger());
        self.merger_changed.notify_all();
    }

    fn is_full(&self) -> bool {
        let layers = self.read();
        layers.frozen.is_some() && layers.active.len() >= self.run_entries_max.saturating_mul(2)
    }

    fn is_past_deadline(&self) -> bool {
        self.merger().deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    fn merger(&self) -> MutexGuard<'_, Merger> {
        lock(&self.merger)
    }
}

/// The data behind our locks is whole after a panic anywhere: every change of it is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn copied((key, value): (&Key, &Option<Value>)) -> Change {
    (*key, *value)
}

/// Two streams of changes in key order as one; where both have a key, `above` is right.
struct Overlay<A: Iterator<Item = Change>, B: Iterator<Item = Change>> {
    above: Peekable<A>,
    below: Peekable<B>,
}

impl<A: Iterator<Item = Change>, B: Iterator<Item = Change>> Overlay<A, B> {
    fn new(above: A, below: B) -> Overlay<A, B> {
        Overlay { above: above.peekable(), below: below.peekable() }
    }
}

impl<A: Iterator<Item = Change>, B: Iterator<Item = Change>> Iterator for Overlay<A, B> {
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        let Some((above, _)) = self.above.peek() else {
            return self.below.next();
        };
        match self.below.peek() {
            Some((below, _)) if below < above => self.below.next(),
            Some((below, _)) if below == above => {
                self.below.next();
                self.above.next()
            }
            _ => self.above.next(),
        }
    }
}

#[cfg(test)]
mod tests;
