//! Upkeep that takes long and must disturb nobody: compaction, begun by itself past a dead share or by command.
//!
//! A thread of its own looks at the store now and then. It writes beside the writer, not through it: compaction holds
//! the writer for a moment only, at its end. All resting is done on one condition variable, so stopping never waits for
//! a pause to end.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::lock;
use crate::config::Storage;
use crate::store::compact::{CompactReport, Pace};
use crate::store::{Store, StoreError, StoreStats};

/// The thread, and compaction by command.
pub struct Maintenance(Arc<Shared>);

struct Shared {
    store: Arc<dyn Store>,
    limits: Limits,
    state: Mutex<State>,
    changed: Condvar,
}

/// When to compact, and how hard.
#[derive(Clone, Copy, Debug)]
struct Limits {
    dead_share: f64,
    dead_bytes_min: u64,
    work_share: f64,
}

#[derive(Default)]
struct State {
    stopping: bool,
    /// Threads at work: the one that looks by itself, and whoever compacts by command.
    working: u32,
}

impl Maintenance {
    /// Starts the thread, which looks for work every `expiry_sweep_secs`.
    ///
    /// # Errors
    /// When the system refuses it.
    pub fn start(store: Arc<dyn Store>, settings: &Storage) -> std::io::Result<Maintenance> {
        let limits = Limits {
            dead_share: settings.compact_dead_share,
            dead_bytes_min: settings.compact_dead_bytes_min(),
            work_share: settings.compact_share,
        };
        let shared = Arc::new(Shared { store, limits, state: Mutex::default(), changed: Condvar::new() });
        let every = settings.expiry_sweep();
        let looking = Working::begin(&shared);
        std::thread::Builder::new().name("maintenance".to_owned()).spawn(move || {
            let Some(looking) = looking else { return };
            let mut rounds = Rounds::default();
            while looking.0.rest(every) {
                rounds.round(&looking.0);
            }
        })?;
        Ok(Maintenance(shared))
    }

    /// Compacts now, on the calling thread, beside reads and writes and at their pace. `progress` is told bytes of the
    /// old log done, and in all. `None`: the store has nothing to compact.
    ///
    /// # Errors
    /// As [`Store::compact`]; [`StoreError::Stopped`] when the relay stops.
    pub fn compact(&self, progress: &dyn Fn(u64, u64)) -> Result<Option<CompactReport>, StoreError> {
        let working = Working::begin(&self.0).ok_or(StoreError::Stopped)?;
        working.0.compact(progress)
    }

    /// Has all work given up, and waits for that until `deadline`. Returns whether it has ended.
    pub fn stop(&self, deadline: Instant) -> bool {
        let mut state = lock(&self.0.state);
        state.stopping = true;
        self.0.changed.notify_all();
        while state.working > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Maintenance {
    fn drop(&mut self) {
        lock(&self.0.state).stopping = true;
        self.0.changed.notify_all();
    }
}

/// Somebody at work: counted until dropped, also by a panic.
struct Working(Arc<Shared>);

impl Working {
    /// `None` when stopping.
    fn begin(shared: &Arc<Shared>) -> Option<Working> {
        let mut state = lock(&shared.state);
        if state.stopping {
            return None;
        }
        state.working += 1;
        Some(Working(shared.clone()))
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        lock(&self.0.state).working -= 1;
        self.0.changed.notify_all();
    }
}

impl Shared {
    /// Rests for so long, or until stopping; false then.
    fn rest(&self, time: Duration) -> bool {
        let state = lock(&self.state);
        let until_stopped = self.changed.wait_timeout_while(state, time, |state| !state.stopping);
        !until_stopped.unwrap_or_else(PoisonError::into_inner).0.stopping
    }

    fn compact(&self, progress: &dyn Fn(u64, u64)) -> Result<Option<CompactReport>, StoreError> {
        self.store.compact(&Pace { share: self.limits.work_share, progress, rest: &|time| self.rest(time) })
    }
}

impl Limits {
    fn are_passed_by(&self, stats: &StoreStats) -> bool {
        let enough = stats.dead_bytes > 0 && stats.dead_bytes >= self.dead_bytes_min;
        let mostly_dead = enough && stats.dead_bytes as f64 > self.dead_share * stats.log_bytes as f64;
        mostly_dead || stats.retention.is_some_and(|retention| is_worth_it_for_quota(stats, retention.quota_bytes))
    }
}

/// Whether the store takes more disk than its quota and compaction would give back a twentieth of that: what an eviction
/// frees is twice as much.
fn is_worth_it_for_quota(stats: &StoreStats, quota_bytes: u64) -> bool {
    let takes_more = quota_bytes > 0 && stats.log_bytes + stats.index_bytes > quota_bytes;
    takes_more && stats.dead_bytes >= quota_bytes / 20
}

/// What the thread does each time it looks.
#[derive(Default)]
struct Rounds {
    /// What went wrong last time and was logged: a disk that stays full is logged once.
    complaint: Option<String>,
}

impl Rounds {
    fn round(&mut self, shared: &Shared) {
        let before = shared.store.stats();
        if !shared.limits.are_passed_by(&before) {
            return;
        }
        let began = Instant::now();
        match shared.compact(&|_, _| {}) {
            Ok(None) | Err(StoreError::Stopped | StoreError::InUse(_)) => {}
            Ok(Some(CompactReport { bytes_before, bytes_after, .. })) => {
                self.complaint = None;
                tracing::info!(bytes_before, bytes_after, took = ?began.elapsed(), "the event log was compacted");
            }
            Err(error) => self.complain(&error, &before),
        }
    }

    fn complain(&mut self, error: &StoreError, stats: &StoreStats) {
        // The free bytes of a message change all the time.
        let kind = match error {
            StoreError::NoRoom { .. } => "no room".to_owned(),
            error => error.to_string(),
        };
        if self.complaint.as_ref() != Some(&kind) {
            tracing::warn!(
                dead_bytes = stats.dead_bytes,
                "the event log was not compacted and is tried again: {error}"
            );
            self.complaint = Some(kind);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;
    use crate::protocol::EventId;
    use crate::protocol::testing::{Author, NOW};
    use crate::store::embedded::{EmbeddedStore, Options};
    use crate::store::{Removal, RetentionStats};

    /// A store of `count` notes of which `gone` were removed, and upkeep that nobody runs but the test.
    fn shared(count: u64, gone: usize) -> (tempfile::TempDir, Arc<Shared>) {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let notes: Vec<_> = (0..count).map(|number| Author::new(1).note(NOW + number, &"x".repeat(500))).collect();
        store.apply(&notes, NOW).unwrap();
        let ids: Vec<EventId> = notes[..gone].iter().map(|note| note.id).collect();
        store.remove(&ids, Removal::Operator).unwrap();
        let limits = Limits { dead_share: 0.5, dead_bytes_min: 1, work_share: 1.0 };
        let store = Arc::new(store);
        (folder, Arc::new(Shared { store, limits, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// Past the dead share the log is compacted, at once and once; below it is left alone.
    #[test]
    fn a_dead_log_is_compacted_by_itself() {
        let (_folder, shared) = shared(20, 2);
        Rounds::default().round(&shared);
        let lively = shared.store.stats();
        assert!(lively.dead_bytes > 0, "left alone");
        let (_folder, shared) = self::shared(20, 18);
        let dead = shared.store.stats();
        let mut rounds = Rounds::default();
        rounds.round(&shared);
        let after = shared.store.stats();
        assert_eq!((after.events, after.dead_bytes, after.log_bytes), (2, 0, dead.log_bytes - dead.dead_bytes));
        rounds.round(&shared);
        assert_eq!(shared.store.stats().log_bytes, after.log_bytes);
    }

    /// Both limits count, and a share of 1 is never passed.
    #[test]
    fn both_limits_must_be_passed() {
        let passed = |dead_share, dead_bytes_min, dead_bytes| {
            let stats = StoreStats { log_bytes: 1_000, dead_bytes, ..StoreStats::default() };
            Limits { dead_share, dead_bytes_min, work_share: 1.0 }.are_passed_by(&stats)
        };
        assert!(passed(0.5, 100, 501) && !passed(0.5, 100, 500));
        assert!(passed(0.5, 501, 501) && !passed(0.5, 502, 501));
        assert!(!passed(1.0, 0, 1_000) && !passed(0.0, 0, 0));
        let over_quota = |log_bytes, dead_bytes| {
            let retention = Some(RetentionStats { quota_bytes: 1_000, ..RetentionStats::default() });
            let stats = StoreStats { log_bytes, index_bytes: 100, dead_bytes, retention, ..StoreStats::default() };
            Limits { dead_share: 1.0, dead_bytes_min: 0, work_share: 1.0 }.are_passed_by(&stats)
        };
        assert!(over_quota(901, 50) && !over_quota(900, 50) && !over_quota(901, 49));
    }

    /// What goes wrong is told once, until something else goes wrong.
    #[test]
    fn a_lack_of_room_is_told_once() {
        let mut rounds = Rounds::default();
        let stats = StoreStats::default();
        rounds.complain(&StoreError::NoRoom { needed_bytes: 2, free_bytes: 1 }, &stats);
        let first = rounds.complaint.clone();
        rounds.complain(&StoreError::NoRoom { needed_bytes: 3, free_bytes: 2 }, &stats);
        assert_eq!(rounds.complaint, first);
        rounds.complain(&StoreError::DiskFull, &stats);
        assert_ne!(rounds.complaint, first);
    }

    /// Stopping ends the thread and a compaction that rests; nothing begins afterwards.
    #[test]
    fn stopping_ends_every_rest() {
        let (_folder, shared) = shared(20, 18);
        let settings = Config::default().storage;
        let maintenance = Maintenance::start(shared.store.clone(), &settings).unwrap();
        let resting = {
            let working = Working::begin(&maintenance.0).unwrap();
            std::thread::spawn(move || working.0.rest(Duration::from_secs(3_600)))
        };
        assert!(maintenance.stop(Instant::now() + Duration::from_secs(60)));
        assert!(!resting.join().unwrap(), "it was told to give up");
        assert!(matches!(maintenance.compact(&|_, _| {}), Err(StoreError::Stopped)));
        assert!(matches!(maintenance.0.compact(&|_, _| {}), Err(StoreError::Stopped)), "half-way too");
        assert_eq!(shared.store.stats().events, 2, "all as before");
        assert!(shared.store.stats().dead_bytes > 0);
    }
}
