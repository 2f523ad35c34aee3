//! Keeping events: the [`Store`] trait that the relay sees, and what passes through it.
//!
//! Calls block: they belong on the writer thread and the query threads, never on an async worker.

pub mod backup;
mod batch;
pub mod compact;
pub mod damage;
pub mod dir;
pub mod embedded;
pub mod estimate;
pub mod explain;
pub mod fault;
mod files;
pub mod hot;
pub mod index;
pub mod log;
mod matches;
pub mod memory;
pub mod merge;
pub mod open;
pub mod pack;
pub mod plan;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod quota;
pub mod record;
pub mod repair;
mod replay;
mod scan;
pub mod schema;
pub mod state;
mod summed;
mod sums;
#[cfg(test)]
mod testing;
pub mod verify;

use std::time::{Duration, Instant};

use bytes::Bytes;

use compact::{CompactReport, Pace};
use explain::Explanation;

use crate::protocol::item::{Item, Sum};
use crate::protocol::supersede::Verdict;
use crate::protocol::{Event, EventId, Filter, Kind, Verified, Visibility};

/// Bytes of event JSON read in one call of [`Scan::items`] by stores that cannot do without.
const ITEMS_PAGE_BYTES_MAX: usize = 1 << 20;

/// A point in the order in which events were stored: each later event has a higher one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(pub u64);

/// What a batch of writes came to.
#[derive(Debug)]
pub struct Applied {
    /// One verdict an event, in the order of the batch.
    pub verdicts: Vec<Verdict>,
    /// Every event of the batch lies before this point, every later one at or behind it.
    pub end: Position,
    /// The store takes more than its quota: [`Store::retain`] is due.
    pub over_quota: bool,
    /// What others have stored before this batch and nobody told yet, in order; see [`Store::follow`].
    pub others: Vec<FromElsewhere>,
}

/// An event that another process has stored or passed on. That process has checked it.
#[derive(Clone, Debug)]
pub struct FromElsewhere {
    /// The event.
    pub event: Event,
    /// Its canonical JSON.
    pub json: Bytes,
}

/// What others did since it was last asked for.
#[derive(Debug)]
pub struct News {
    /// Their events: stored ones in the order of storing, then ephemeral ones.
    pub events: Vec<FromElsewhere>,
    /// The stored ones all lie before this point, and every later one at or behind it.
    pub end: Position,
    /// A blob was saved meanwhile, perhaps by another process; see [`Store::load_state`].
    pub decided: bool,
    /// There may be more.
    pub more: bool,
}

/// What a portion of retention came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retained {
    /// Events removed.
    pub removed: usize,
    /// There may be more to remove.
    pub more: bool,
}

/// One filter of a query, its limits settled.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The condition; its own `limit` is not looked at.
    pub filter: Filter,
    /// Newest matches wanted at most.
    pub limit: usize,
    /// Whether to go on past `limit` to the end of the second (NIP-67), and to end the whole query there. Set where the
    /// limit is the relay's and not the client's: the client pages on from the oldest row, and must miss nothing.
    pub whole_seconds: bool,
}

/// A question to the store.
#[derive(Clone, Debug)]
pub struct Query {
    /// The union of these is wanted, newest first, without repeats.
    pub wanted: Vec<Wanted>,
    /// Events whose expiration has come by now are not seen (NIP-40). Seconds since 1970.
    pub now: u64,
    /// Only events stored before this point; live delivery takes over from there.
    pub before: Option<Position>,
    /// Only events that the reader may see; hidden ones use up no limit.
    pub visible: Visibility,
}

/// A stored event as a query sees it.
#[derive(Clone, Debug)]
pub struct Row {
    /// The event id.
    pub id: EventId,
    /// Seconds since 1970 UTC.
    pub created_at: u64,
    /// The event's canonical JSON.
    pub json: Bytes,
}

/// How much one call of [`Scan::page`] may do. Whatever is reached first pauses the scan.
#[derive(Clone, Copy, Debug)]
pub struct PageBudget {
    /// Bytes of JSON in the page; one row may exceed it.
    pub bytes_max: usize,
    /// When to stop working.
    pub until: Instant,
}

/// Where a scan stands after a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The budget is used up; call again for the rest.
    Paused,
    /// Every match was returned.
    Finished,
    /// A limit was reached, there are further matches, and all of them are older than the last row's second.
    MoreOlder,
    /// A limit was reached; further matches may lie in the last row's second, or nobody looked.
    LimitReached,
}

/// A query that is read page by page. It holds no lock between calls. Events that are removed meanwhile are no longer
/// seen, but for a few that were read ahead; erased ones never are.
pub trait Scan: Send {
    /// Appends the next rows, `created_at` descending, then id ascending.
    ///
    /// # Errors
    /// See [`StoreError`]; a record that cannot be read is skipped and logged, not an error.
    fn page(&mut self, budget: PageBudget, rows: &mut Vec<Row>) -> Result<Progress, StoreError>;

    /// As [`Scan::page`], but gives only what reconciliation needs of the next matches. Works until `until`.
    ///
    /// # Errors
    /// As [`Scan::page`].
    fn items(&mut self, until: Instant, items: &mut Vec<Item>) -> Result<Progress, StoreError> {
        let mut rows = Vec::new();
        let progress = self.page(PageBudget { bytes_max: ITEMS_PAGE_BYTES_MAX, until }, &mut rows)?;
        items.extend(rows.iter().map(|row| Item { created_at: row.created_at, id: row.id }));
        Ok(progress)
    }

    /// Counts on instead of returning rows; limits play no part, an event matched by several filters counts once.
    /// Returns what was counted since the last call.
    ///
    /// # Errors
    /// As [`Scan::page`].
    fn count(&mut self, until: Instant) -> Result<(u64, Progress), StoreError>;
}

/// Calls `each` for every event that one of the filters matches, newest first, whatever its expiration. For commands
/// and background work: it takes as long as it takes, and holds a page in memory.
///
/// # Errors
/// The first of `each`, or that of the store.
pub fn for_each_match<E: From<StoreError>>(
    store: &dyn Store,
    filters: Vec<Filter>,
    mut each: impl FnMut(&Row) -> Result<(), E>,
) -> Result<(), E> {
    let limit = |filter: &Filter| filter.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let wanted = filters.into_iter().map(|filter| Wanted { limit: limit(&filter), filter, whole_seconds: false });
    let query = Query { wanted: wanted.collect(), now: 0, before: None, visible: Visibility::everything() };
    let mut scan = store.scan(query)?;
    let mut rows = Vec::new();
    loop {
        let budget = PageBudget { bytes_max: MATCH_PAGE_BYTES, until: Instant::now() + MATCH_PAGE_TIME };
        let progress = scan.page(budget, &mut rows)?;
        rows.drain(..).try_for_each(|row| each(&row))?;
        if progress != Progress::Paused {
            return Ok(());
        }
    }
}

/// Bytes of a page of [`for_each_match`].
const MATCH_PAGE_BYTES: usize = 1 << 20;
/// How long one may take; it only has to be some bound.
const MATCH_PAGE_TIME: Duration = Duration::from_secs(60);

/// A set of events for reconciliation (NIP-77) that is compared by sums kept beforehand. Ranges are `from <= item < to`.
/// It follows the store: what comes or goes between two calls may show in the later one.
pub trait Summed: Send {
    /// Works until `until` on what is still to be summed up; to be called before each message, until it is finished.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn prepare(&mut self, until: Instant) -> Result<Progress, StoreError>;

    /// Events that are held in memory for this reader.
    fn held(&self) -> usize;

    /// How many events lie in a range, and the sum of their ids.
    ///
    /// # Errors
    /// As [`Summed::prepare`].
    fn sum(&mut self, from: &Item, to: &Item) -> Result<Sum, StoreError>;

    /// Appends the first `max` events of a range, in order.
    ///
    /// # Errors
    /// As [`Summed::prepare`].
    fn items(&mut self, from: &Item, to: &Item, max: usize, out: &mut Vec<Item>) -> Result<(), StoreError>;

    /// Fewer than `parts` seconds strictly within a range, ascending, that cut it into parts of about the same size and
    /// are cheap to sum up to; none where the events themselves are as cheap.
    ///
    /// # Errors
    /// As [`Summed::prepare`].
    fn cuts(&mut self, from: &Item, to: &Item, parts: usize) -> Result<Vec<u64>, StoreError>;
}

/// Why an event was taken out of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// A newer version took its place.
    Replaced,
    /// Its author's deletion request (NIP-09). The bytes are erased.
    Deleted,
    /// Its expiration has come (NIP-40).
    Expired,
    /// Its author asked to vanish (NIP-62). The bytes are erased.
    Vanished,
    /// The operator removed it; it may come back. The bytes are erased.
    Operator,
    /// Older than the rules of retention keep, or evicted to stay within the quota.
    Evicted,
}

/// Figures about a store.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct StoreStats {
    /// Events that can be read.
    pub events: u64,
    /// Bytes of the event log.
    pub log_bytes: u64,
    /// Bytes of the log that compaction would free.
    pub dead_bytes: u64,
    /// Bytes of the index on disk.
    pub index_bytes: u64,
    /// Index entries in memory that are not yet in the index on disk.
    pub buffered_entries: u64,
    /// What retention has done, where there are rules for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionStats>,
}

/// Figures about what the rules of retention have done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RetentionStats {
    /// Bytes that live events and index may take; 0: no limit.
    pub quota_bytes: u64,
    /// Bytes that they take.
    pub used_bytes: u64,
    /// Nothing is left to evict and the quota is exceeded: writes are refused.
    pub used_up: bool,
    /// Events removed for their age or the quota since the start.
    pub evicted_events: u64,
    /// Events of kinds that no rule names are refused up to this `created_at`, since the quota has evicted up to there;
    /// 0: none are.
    pub evicted_up_to: u64,
    /// The same for the kinds that rules name, which are evicted first.
    #[serde(default)]
    pub named_evicted_up_to: u64,
}

impl StoreStats {
    /// Bytes of the log that hold what is stored.
    pub fn live_bytes(&self) -> u64 {
        self.log_bytes.saturating_sub(self.dead_bytes)
    }

    /// Bytes that compaction takes beside the present files, for a while: the live part of the log and a new index.
    pub fn compaction_bytes_needed(&self) -> u64 {
        self.live_bytes() + self.index_bytes
    }
}

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, with the file's name.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The disk has no room for the write; nothing was stored, reading goes on.
    #[error("the disk is full")]
    DiskFull,
    /// The store takes more than its quota and nothing may be evicted; nothing was stored, reading goes on.
    #[error("the relay's disk quota is used up")]
    QuotaUsedUp,
    /// The disk cannot hold what an operation would need for a while.
    #[error("{needed_bytes} bytes are needed and {free_bytes} are free; make room and try again")]
    NoRoom {
        /// Bytes needed.
        needed_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// A write failed in a way that leaves the disk's state unknown; writing stops until the next start, reading goes on.
    #[error("writing stopped after a disk error ({0}); restart the relay once the disk is well")]
    Poisoned(String),
    /// It was asked to stop before it was done; nothing has changed.
    #[error("it was stopped before it was done; nothing has changed")]
    Stopped,
    /// Another process has the data directory, or the operation runs already.
    #[error("{0}")]
    InUse(String),
    /// The database cannot be reached or does not answer in time; the next try may succeed.
    #[error("the database cannot be used at present: {0}")]
    Away(String),
    /// Something on disk is not what it should be.
    #[error("{0}")]
    Damaged(String),
}

impl From<index::IndexError> for StoreError {
    fn from(error: index::IndexError) -> Self {
        if error.is_for_want_of_room() {
            return StoreError::DiskFull;
        }
        StoreError::Damaged(format!("the index: {error}; a restart rebuilds it from the event log"))
    }
}

/// What keeps events. The embedded store and Postgres answer alike: one conformance suite runs against both.
pub trait Store: Send + Sync {
    /// Judges and stores a batch, durably, in order: a later event sees the earlier ones. One caller at a time.
    ///
    /// Returns only after what was stored survives a power cut. Ephemeral events must not be passed. An empty batch
    /// stores nothing and tells the present end.
    ///
    /// # Errors
    /// Nothing of the batch is stored or visible then, except what stands before a request to vanish in it: that part is
    /// a write of its own, and a part of what the request takes out may be gone already. Sending the batch again does no
    /// harm.
    fn apply(&self, batch: &[Verified<Event>], now: u64) -> Result<Applied, StoreError>;

    /// Takes events out by id, durably; unknown ids are passed over. Returns how many were there. One caller at a
    /// time, not beside [`Store::apply`].
    ///
    /// # Errors
    /// As [`Store::apply`].
    fn remove(&self, ids: &[EventId], why: Removal) -> Result<u64, StoreError>;

    /// Removes up to `events_max` events whose expiration has come; returns how many. Same caller as `apply`.
    ///
    /// # Errors
    /// As [`Store::apply`].
    fn sweep_expired(&self, now: u64, events_max: usize) -> Result<usize, StoreError>;

    /// Removes events that the rules of retention do not keep, a bounded portion: at most `events_max`. Same caller as
    /// `apply`.
    ///
    /// # Errors
    /// As [`Store::apply`].
    fn retain(&self, _now: u64, _events_max: usize) -> Result<Retained, StoreError> {
        Ok(Retained::default())
    }

    /// Whether the rules of retention would keep this event, had it come now. Cheap.
    fn keeps(&self, _event: &Event, _now: u64) -> bool {
        true
    }

    /// Whether events of this kind are stored at present; false while a quota is used up. Requests to delete or vanish
    /// always are: they make room. Cheap.
    fn has_room_for(&self, _kind: Kind) -> bool {
        true
    }

    /// Whether this very event is stored. Cheap for unknown ids.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn contains(&self, id: &EventId) -> Result<bool, StoreError>;

    /// As [`Store::contains`], but without waiting for anybody: `None` where that cannot be told at once.
    ///
    /// # Errors
    /// As [`Store::contains`].
    fn contains_at_hand(&self, id: &EventId) -> Result<Option<bool>, StoreError> {
        self.contains(id).map(Some)
    }

    /// From now on tells, by calling `wake`, that other processes may have stored or passed on something, which
    /// [`Store::news`] then gives. Events of others that lie before a batch come with [`Applied::others`], so that every
    /// event is given once, in the order of storing. To be called once, by the one who writes, after an empty
    /// [`Store::apply`]. A store that one process has to itself has no news.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn follow(&self, _wake: std::sync::Arc<dyn Fn() + Send + Sync>) -> Result<(), StoreError> {
        Ok(())
    }

    /// What others did since this, [`Store::apply`] or [`Store::follow`] was last called. Same caller as `apply`.
    ///
    /// # Errors
    /// When the store cannot be read; nothing is lost then, the next call gives it.
    fn news(&self) -> Result<Option<News>, StoreError> {
        Ok(None)
    }

    /// Lets other processes have ephemeral events, as well as that can be done. Same caller as `apply`.
    fn pass_on(&self, _events: &[Verified<Event>]) {}

    /// Begins a query.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn scan(&self, query: Query) -> Result<Box<dyn Scan>, StoreError>;

    /// How a filter would be looked up.
    fn explain(&self, _filter: &Filter) -> Explanation {
        Explanation::default()
    }

    /// The set that a query with one filter and no limit asks for, from sums kept up to date with every write; `None`
    /// where there are none for such a filter. With `make` they are made where they can be, which takes reading all
    /// that matches once; without, only what is there already is given.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn summed(&self, _query: &Query, _make: bool) -> Result<Option<Box<dyn Summed>>, StoreError> {
        Ok(None)
    }

    /// Frees what removed events take on the disk, beside reads and writes; `None` where there is nothing to do that
    /// for. Takes long: for a thread of its own.
    ///
    /// # Errors
    /// Nothing has changed then; see [`compact::compact`].
    fn compact(&self, _pace: &Pace<'_>) -> Result<Option<CompactReport>, StoreError> {
        Ok(None)
    }

    /// The blob that was last saved under this name; see [`state`].
    ///
    /// # Errors
    /// When it cannot be read, or `name` cannot name one.
    fn load_state(&self, name: &str) -> Result<Option<Bytes>, StoreError>;

    /// Keeps a blob under a name in place of the one before, atomically and durably: after a power cut one of the two
    /// is there, and once this has returned, the new one. One caller at a time for a name.
    ///
    /// # Errors
    /// When it cannot be written, or `name` cannot name one; the blob before is still there then.
    fn save_state(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError>;

    /// Figures for `status` and logs.
    fn stats(&self) -> StoreStats;

    /// Brings what is in memory to disk as far as `deadline` allows; the store takes no writes afterwards.
    /// Nothing acknowledged depends on it: the next start replays what was left.
    ///
    /// # Errors
    /// When the last writes fail.
    fn close(&self, deadline: Instant) -> Result<(), StoreError>;
}
