//! The same [`Store`] on a Postgres database that several processes share (feature `postgres`).
//!
//! Verdicts are decided by `protocol::supersede` as everywhere, inside the transaction that writes ([`write`]), so two
//! processes cannot both win. Queries go by the same plans as the embedded store's, each stretch a range of one index,
//! read page by page from where the last one ended (`scan`); no cursor or transaction is open between pages. Live
//! events of other processes come by position (`news`). Nothing is kept on this machine.

mod connect;
mod news;
mod retention;
mod rows;
mod scan;
pub mod schema;
mod trouble;
mod view;
mod wait;
mod write;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sqlx::postgres::PgConnection;
use sqlx::{Row, query};
use tokio::runtime::Runtime;

use super::explain::Explanation;
use super::quota::Keeper;
use super::{
    Applied, FromElsewhere, News, Position, Query, Removal, Retained, Scan, Store, StoreError, StoreStats, state,
};
use crate::protocol::{Event, EventId, Filter, Kind, Verified};
pub use connect::Options;
use connect::Pools;
use write::Transaction;

/// A store in a database.
pub struct PostgresStore {
    pools: Arc<Pools>,
    /// Sockets and timers of the connections; the work itself is done on the threads that ask for it.
    runtime: Option<Runtime>,
    /// Which notifications are this process's own.
    sender: i64,
    told: Mutex<Told>,
    keeper: Keeper<retention::Place>,
    following: AtomicBool,
    events: AtomicU64,
    bytes: AtomicU64,
}

/// How far the caller has been told of what is stored.
struct Told {
    /// Everything before this position.
    stored: i64,
    /// Ephemeral events up to this one.
    passed: i64,
    /// How often a state had been saved.
    states: i64,
}

impl PostgresStore {
    /// Connects, and makes or updates the tables. Tries for as long as the options say where the database is away.
    ///
    /// # Errors
    /// [`StoreError::Away`] when it stays away; [`StoreError::Damaged`] when it refuses, or holds tables of a newer version.
    pub fn open(options: &Options) -> Result<PostgresStore, StoreError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("postgres")
            .enable_all()
            .build()
            .map_err(|source| StoreError::Io { what: "starting a thread".to_owned(), source })?;
        let (pools, next) = wait::block_on(runtime.handle(), Pools::open(options))?;
        let standing = async |connection: &mut PgConnection| Ok(retention::standing(connection).await?);
        let (_, reaches) = wait::block_on(runtime.handle(), pools.reading_primary(standing))?;
        Ok(PostgresStore {
            pools: Arc::new(pools),
            keeper: Keeper::new(options.retention.clone(), reaches.as_deref(), 0),
            runtime: Some(runtime),
            sender: sender(),
            told: Mutex::new(Told { stored: next, passed: 0, states: -1 }),
            following: AtomicBool::new(false),
            events: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    fn handle(&self) -> &tokio::runtime::Handle {
        self.runtime.as_ref().expect("it is there until the store is dropped").handle()
    }

    fn wait<F: Future>(&self, future: F) -> F::Output {
        wait::block_on(self.handle(), future)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes in one transaction what `work` says; how many events that were.
    fn removing(
        &self,
        work: impl AsyncFn(&mut Transaction<'_>) -> Result<u64, write::Failure>,
    ) -> Result<u64, StoreError> {
        self.wait(self.pools.writing(async |connection: &mut PgConnection| {
            let mut transaction = Transaction::begin(connection).await?;
            let removed = work(&mut transaction).await?;
            if removed == 0 {
                transaction.commit().await?;
            } else {
                transaction.commit_removal().await?;
            }
            Ok(removed)
        }))
    }

    /// The end of what is stored; where others are followed, of what was told about.
    fn present_end(&self) -> Result<Applied, StoreError> {
        let mut told = self.told();
        let follows = self.following.load(Ordering::Relaxed);
        if follows && self.keeper.is_idle() {
            let end = position(told.stored);
            return Ok(Applied { verdicts: Vec::new(), end, over_quota: false, others: Vec::new() });
        }
        let (next, events, bytes) = self.wait(self.pools.reading_primary(async |connection: &mut PgConnection| {
            let row = query("SELECT next, events, bytes FROM sledge.head").fetch_one(connection).await?;
            Ok((row.try_get(0)?, row.try_get::<i64, _>(1)?.unsigned_abs(), row.try_get::<i64, _>(2)?.unsigned_abs()))
        }))?;
        if !follows {
            told.stored = next;
        }
        let over_quota = self.keeper.is_over(retention::taken_bytes(events, bytes));
        Ok(Applied { verdicts: Vec::new(), end: position(told.stored), over_quota, others: Vec::new() })
    }
}

/// A number that no other process is likely to have.
fn sender() -> i64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) as i64
}

fn position(next: i64) -> Position {
    Position(next.unsigned_abs())
}

impl Store for PostgresStore {
    fn apply(&self, batch: &[Verified<Event>], now: u64) -> Result<Applied, StoreError> {
        if batch.is_empty() {
            return self.present_end();
        }
        if !batch.iter().all(|event| self.keeper.has_room_for(event.kind)) {
            return Err(StoreError::QuotaUsedUp);
        }
        let mut told = self.told();
        let follows = self.following.load(Ordering::Relaxed);
        let from = told.stored;
        let done = self.pools.writing(async |connection: &mut PgConnection| {
            let mut transaction = Transaction::begin(connection).await?;
            let others = match follows {
                true => transaction.others(from).await?,
                false => Vec::new(),
            };
            let verdicts = transaction.apply(batch, now, self.sender).await?;
            let taken_bytes = transaction.taken_bytes();
            Ok((verdicts, others, taken_bytes, transaction.commit().await?))
        });
        let (verdicts, others, taken_bytes, next): (_, Vec<FromElsewhere>, _, _) = self.wait(done)?;
        told.stored = next;
        self.pools.reached(next);
        Ok(Applied { verdicts, end: position(next), over_quota: self.keeper.is_over(taken_bytes), others })
    }

    fn remove(&self, ids: &[EventId], _why: Removal) -> Result<u64, StoreError> {
        self.removing(async |transaction| Ok(transaction.delete(ids).await?))
    }

    fn sweep_expired(&self, now: u64, events_max: usize) -> Result<usize, StoreError> {
        let forget = async |connection: &mut PgConnection| Ok(news::forget_passed(connection).await?);
        if let Err(error) = self.wait(self.pools.writing(forget)) {
            tracing::debug!(%error, "ephemeral events of others were not cleared away");
        }
        let removed = self.removing(async |transaction| transaction.delete_expired(now, events_max).await)?;
        Ok(removed as usize)
    }

    fn retain(&self, now: u64, events_max: usize) -> Result<Retained, StoreError> {
        retention::retain(self, now, events_max)
    }

    fn keeps(&self, event: &Event, now: u64) -> bool {
        self.keeper.keeps(event, now)
    }

    fn has_room_for(&self, kind: Kind) -> bool {
        self.keeper.has_room_for(kind)
    }

    fn contains(&self, id: &EventId) -> Result<bool, StoreError> {
        self.wait(self.pools.reading_primary(async |connection: &mut PgConnection| {
            let found = query("SELECT 1 FROM sledge.events WHERE id = $1").bind(&id.0[..]).fetch_optional(connection);
            Ok(found.await?.is_some())
        }))
    }

    /// A round trip for each event that comes in would cost more than checking the signatures of the few that are known
    /// already; the batch finds those.
    fn contains_at_hand(&self, _id: &EventId) -> Result<Option<bool>, StoreError> {
        Ok(None)
    }

    fn follow(&self, wake: Arc<dyn Fn() + Send + Sync>) -> Result<(), StoreError> {
        let passed = self.wait(
            self.pools.reading_primary(async |connection: &mut PgConnection| Ok(news::last_passed(connection).await?)),
        )?;
        self.told().passed = passed;
        self.following.store(true, Ordering::Relaxed);
        let listening = news::listen(self.pools.listen_pool(), self.sender, self.pools.poll(), wake);
        self.handle().spawn(listening);
        Ok(())
    }

    fn news(&self) -> Result<Option<News>, StoreError> {
        if !self.following.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut told = self.told();
        let (from, behind) = (told.stored, told.passed);
        let (mut stored, passed) = self.wait(self.pools.reading_primary(async |connection: &mut PgConnection| {
            let stored = news::stored(&mut *connection, from).await?;
            Ok((stored, news::passed(connection, self.sender, behind).await?))
        }))?;
        if stored.end < from {
            tracing::warn!("the database has lost events that it had acknowledged; was another server made primary?");
        }
        let decided = told.states != stored.states;
        *told = Told { stored: stored.end, passed: passed.end, states: stored.states };
        self.pools.reached(stored.end);
        stored.events.extend(passed.events);
        Ok(Some(News { events: stored.events, end: position(stored.end), decided, more: stored.more || passed.more }))
    }

    fn pass_on(&self, events: &[Verified<Event>]) {
        if events.is_empty() || !self.following.load(Ordering::Relaxed) {
            return;
        }
        let passing = async |connection: &mut PgConnection| Ok(news::pass_on(connection, self.sender, events).await?);
        if let Err(error) = self.wait(self.pools.writing(passing)) {
            tracing::debug!(%error, events = events.len(), "ephemeral events reached no other process");
        }
    }

    fn scan(&self, query: Query) -> Result<Box<dyn Scan>, StoreError> {
        Ok(Box::new(scan::PostgresScan::of(self.pools.clone(), self.handle().clone(), query)))
    }

    fn load_state(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        state::check_name(name)?;
        self.wait(self.pools.reading_primary(async |connection: &mut PgConnection| {
            let found = query("SELECT bytes FROM sledge.state WHERE name = $1").bind(name).fetch_optional(connection);
            Ok(found.await?.map(|row| row.try_get::<Vec<u8>, _>(0)).transpose()?.map(Bytes::from))
        }))
    }

    fn save_state(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        state::check_name(name)?;
        self.wait(self.pools.writing(async |connection: &mut PgConnection| {
            let saved = query(SAVE_STATE).bind(name).bind(bytes).bind(news::payload(self.sender));
            saved.execute(connection).await?;
            Ok(())
        }))
    }

    fn explain(&self, filter: &Filter) -> Explanation {
        Explanation::of(filter)
    }

    /// The last figures known where the database does not answer.
    fn stats(&self) -> StoreStats {
        let asking = self.pools.reading_primary(async |connection: &mut PgConnection| {
            let row = query(FIGURES).fetch_one(connection).await?;
            Ok([row.try_get::<i64, _>(0)?, row.try_get::<i64, _>(1)?, row.try_get::<i64, _>(2)?])
        });
        // Whoever shows figures does not wait for a database that is away.
        let asked = self.wait(async {
            let late = |_| Err(trouble::too_slow(STATS_TIME_MAX));
            tokio::time::timeout(STATS_TIME_MAX, asking).await.unwrap_or_else(late)
        });
        let index_bytes = match asked {
            Ok([events, bytes, index_bytes]) => {
                self.events.store(events.unsigned_abs(), Ordering::Relaxed);
                self.bytes.store(bytes.unsigned_abs(), Ordering::Relaxed);
                index_bytes.unsigned_abs()
            }
            Err(error) => {
                tracing::debug!(%error, "no fresh figures about the store");
                0
            }
        };
        let (events, log_bytes) = (self.events.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        StoreStats {
            events,
            log_bytes,
            index_bytes,
            retention: self.keeper.stats(retention::taken_bytes(events, log_bytes)),
            ..StoreStats::default()
        }
    }

    fn close(&self, deadline: Instant) -> Result<(), StoreError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.wait(self.pools.close(left.min(CLOSE_TIME_MAX)));
        Ok(())
    }
}

/// How long figures about the store may take.
const STATS_TIME_MAX: Duration = Duration::from_secs(1);

const FIGURES: &str = "
SELECT events, bytes, (
  SELECT coalesce(sum(pg_indexes_size(name)), 0)::bigint
    FROM unnest(ARRAY['sledge.events', 'sledge.tags', 'sledge.tombstones']::regclass[]) AS name)
  FROM sledge.head";

const SAVE_STATE: &str = "
WITH saved AS (
  INSERT INTO sledge.state (name, bytes) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET bytes = excluded.bytes
), counted AS (
  UPDATE sledge.head SET states = states + 1
)
SELECT pg_notify('sledge', $3)";

/// How long saying goodbye to the server may take; nothing depends on it.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(2);

impl Drop for PostgresStore {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
