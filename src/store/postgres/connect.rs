//! Connections: for writing, for reading, for listening; to the primary and to replicas.

use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::{ConnectOptions, Postgres, Row, query, raw_sql};

use super::schema::{self, Unusable};
use super::trouble::{self, RETRIES_MAX, Remedy, pause_before};
use super::write::Failure;
use crate::config::Config;
use crate::config::postgres::{hosts, without_password};
use crate::store::StoreError;
use crate::store::quota::Rules;

/// What a store on Postgres is told at opening.
#[derive(Clone, Debug)]
pub struct Options {
    /// `postgres://…`, the primary.
    pub url: String,
    /// Streaming replicas that stored queries may be read from.
    pub read_urls: Vec<String>,
    /// Where to listen for notifications, if not at `url`: past a pooler that has no use for them.
    pub listen_url: Option<String>,
    /// Connections for queries, to the primary and to each replica.
    pub connections_max: u32,
    /// How long one piece of work may take.
    pub timeout: Duration,
    /// How long to try where the database is away at the start.
    pub start_timeout: Duration,
    /// How often to look for what others stored where no notification comes.
    pub poll: Duration,
    /// What is kept, and for how long.
    pub retention: Rules,
}

impl Options {
    /// What the settings say about a store at this URL, but for the rules of retention.
    pub fn of(config: &Config, url: &str) -> Options {
        let settings = &config.postgres;
        Options {
            url: url.to_owned(),
            read_urls: settings.read_urls.clone(),
            listen_url: Some(settings.listen_url.clone()).filter(|url| !url.is_empty()),
            connections_max: settings.connections_max as u32,
            timeout: settings.timeout(),
            start_timeout: settings.start_timeout(),
            poll: settings.poll(),
            retention: Rules::default(),
        }
    }

    /// The usual settings for one database.
    pub fn new(url: impl Into<String>) -> Options {
        Options {
            url: url.into(),
            read_urls: Vec::new(),
            listen_url: None,
            connections_max: 4,
            timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(10),
            poll: Duration::from_secs(1),
            retention: Rules::default(),
        }
    }
}

/// For the whole session: every statement is written for one index, whatever the planner thinks of small tables, so it
/// is planned once and not for the values of each call: that took as long as the call itself.
const SESSION: &str = "
SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off;
SET plan_cache_mode = force_generic_plan; SET jit = off; SET max_parallel_workers_per_gather = 0; SET client_min_messages = warning";

/// One writes; the second is for ephemeral events and for what is left over when a connection broke.
const WRITE_CONNECTIONS_MAX: u32 = 2;

/// How long to try for a connection. Those who wait for an answer are told soon that there is none.
const ACQUIRE_TIME_MAX: Duration = Duration::from_secs(3);

/// How long a host may take to say whether it is the primary.
const PROBE_TIME_MAX: Duration = Duration::from_secs(2);

/// How long a replica that failed is left alone.
const REPLICA_REST: Duration = Duration::from_secs(5);

/// How long after a failed try at the start the next one comes.
const START_PAUSE: Duration = Duration::from_secs(1);

/// The pools of a store.
pub(super) struct Pools {
    write: PgPool,
    read: PgPool,
    listen: PgPool,
    /// Where the primary may be.
    hosts: Hosts,
    replicas: Vec<Replica>,
    /// Whose turn it is.
    turn: AtomicUsize,
    timeout: Duration,
    poll: Duration,
    /// Every event before this position is known to this process to be stored.
    reached: AtomicI64,
}

struct Replica {
    pool: PgPool,
    /// What it has replayed, as far as is known.
    reached: AtomicI64,
    rests_until: Mutex<Option<Instant>>,
    is_told: AtomicBool,
}

/// The hosts that the URL names; after a failover another of them is the primary.
struct Hosts {
    options: Vec<PgConnectOptions>,
    /// Notifications are listened for at the primary too.
    listens: bool,
    /// The one that was the primary last; held by whoever looks for it.
    current: tokio::sync::Mutex<usize>,
}

fn parsed(url: &str) -> Result<PgConnectOptions, StoreError> {
    let options = PgConnectOptions::from_str(url).map_err(|error| {
        StoreError::Damaged(format!("{} is not the URL of a Postgres database: {error}", without_password(url)))
    })?;
    Ok(options.application_name("sledge").disable_statement_logging())
}

/// `primary`: whether a standby will not do.
fn pool(url: &str, connections_max: u32, timeout: Duration, primary: bool) -> Result<PgPool, StoreError> {
    let pool = PgPoolOptions::new()
        .max_connections(connections_max)
        .acquire_timeout(timeout.min(ACQUIRE_TIME_MAX))
        // A ping before each use is a round trip; a connection that broke is noticed and replaced all the same.
        .test_before_acquire(false)
        .after_connect(move |connection, _| Box::pin(begin_session(connection, primary)));
    Ok(pool.connect_lazy_with(parsed(url)?))
}

async fn begin_session(connection: &mut PgConnection, primary: bool) -> Result<(), sqlx::Error> {
    raw_sql(SESSION).execute(&mut *connection).await?;
    if primary && is_standby(connection).await? {
        return Err(std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "it is a standby").into());
    }
    Ok(())
}

async fn is_standby(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    query("SELECT pg_is_in_recovery()").fetch_one(connection).await?.try_get(0)
}

impl Pools {
    /// Connects and brings the tables up; also says where the stored events end.
    pub(super) async fn open(options: &Options) -> Result<(Pools, i64), StoreError> {
        let urls = hosts(&options.url);
        let several = urls.len() > 1;
        let url = &urls[0];
        let listen_url = options.listen_url.as_deref().unwrap_or(url);
        let replica = |url: &String| {
            let pool = pool(url, options.connections_max, options.timeout, false)?;
            Ok::<_, StoreError>(Replica {
                pool,
                reached: AtomicI64::new(0),
                rests_until: Mutex::new(None),
                is_told: AtomicBool::new(false),
            })
        };
        let pools = Pools {
            write: pool(url, WRITE_CONNECTIONS_MAX, options.timeout, several)?,
            read: pool(url, options.connections_max, options.timeout, several)?,
            listen: pool(listen_url, 1, options.timeout, several && options.listen_url.is_none())?,
            hosts: Hosts {
                options: urls.iter().map(|url| parsed(url)).collect::<Result<_, _>>()?,
                listens: options.listen_url.is_none(),
                current: tokio::sync::Mutex::new(0),
            },
            replicas: options.read_urls.iter().map(replica).collect::<Result<_, _>>()?,
            turn: AtomicUsize::new(0),
            timeout: options.timeout,
            poll: options.poll,
            reached: AtomicI64::new(0),
        };
        let next = pools.first_contact(&options.url, options.start_timeout).await?;
        pools.reached(next);
        Ok((pools, next))
    }

    async fn first_contact(&self, url: &str, patience: Duration) -> Result<i64, StoreError> {
        let began = Instant::now();
        loop {
            let away = match self.bring_up().await {
                Err(StoreError::Away(why)) => why,
                settled => return settled,
            };
            if began.elapsed() >= patience {
                let shown = without_password(url);
                return Err(StoreError::Away(format!("{shown} was tried for {} s: {away}", patience.as_secs())));
            }
            if self.find_primary().await {
                continue;
            }
            tracing::warn!("waiting for the database {}: {away}", without_password(url));
            tokio::time::sleep(START_PAUSE).await;
        }
    }

    async fn bring_up(&self) -> Result<i64, StoreError> {
        let attempt = async {
            // The statements of the steps are long ones, and others may be at them.
            let mut connection = self.write.acquire().await?.detach();
            schema::bring_up(&mut connection).await?;
            warn_of_settings(&mut connection).await?;
            Ok::<i64, Unusable>(query("SELECT next FROM sledge.head").fetch_one(&mut connection).await?.try_get(0)?)
        };
        attempt.await.map_err(|unusable| match unusable {
            Unusable::Refused(error) => trouble::told(error),
            Unusable::Newer(found) => StoreError::Damaged(format!(
                "the database's tables are of version {found}, and this program knows only up to {}; use a newer one",
                schema::SCHEMA_VERSION
            )),
        })
    }

    /// Runs a transaction on a connection of its own, again where that helps.
    pub(super) async fn writing<T>(
        &self,
        work: impl AsyncFn(&mut PgConnection) -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        self.attempts(&self.write, work).await
    }

    /// Looks which host is the primary now, the last one first; whether that is another one.
    async fn find_primary(&self) -> bool {
        if self.hosts.options.len() < 2 {
            return false;
        }
        let mut current = self.hosts.current.lock().await;
        let count = self.hosts.options.len();
        for number in (0..count).map(|step| (*current + step) % count) {
            let options = &self.hosts.options[number];
            let is_primary = async { Ok::<_, sqlx::Error>(!is_standby(&mut options.connect().await?).await?) };
            if !matches!(tokio::time::timeout(PROBE_TIME_MAX, is_primary).await, Ok(Ok(true))) {
                continue;
            }
            if number == *current {
                return false;
            }
            tracing::warn!(host = options.get_host(), port = options.get_port(), "another server is the primary now");
            *current = number;
            let listening = [&self.listen].into_iter().filter(|_| self.hosts.listens);
            [&self.write, &self.read].into_iter().chain(listening).for_each(|pool| {
                pool.set_connect_options(options.clone());
            });
            return true;
        }
        false
    }

    /// As [`Pools::writing`], for statements that only read and must see the latest.
    pub(super) async fn reading_primary<T>(
        &self,
        work: impl AsyncFn(&mut PgConnection) -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        self.attempts(&self.read, work).await
    }

    /// Reads from a replica that has everything before `position`, and everything this process knows of, if there is
    /// one; else from the primary.
    pub(super) async fn reading<T>(
        &self,
        position: Option<i64>,
        work: impl AsyncFn(&mut PgConnection) -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        let known = self.reached.load(Ordering::Relaxed);
        let needed = position.map_or(known, |position| position.min(known));
        if let Some(replica) = self.replica() {
            match self.attempt_on_replica(replica, needed, &work).await {
                Ok(Some(read)) => return Ok(read),
                Ok(None) => {}
                Err(error) => replica.failed(&error),
            }
        }
        self.attempts(&self.read, work).await
    }

    /// The replicas take turns; those that failed are passed over for a while.
    fn replica(&self) -> Option<&Replica> {
        let count = self.replicas.len();
        let first = if count > 0 { self.turn.fetch_add(1, Ordering::Relaxed) } else { 0 };
        (0..count).map(|step| &self.replicas[(first + step) % count]).find(|replica| replica.is_ready())
    }

    /// None where the replica has not got that far.
    async fn attempt_on_replica<T>(
        &self,
        replica: &Replica,
        needed: i64,
        work: &impl AsyncFn(&mut PgConnection) -> Result<T, Failure>,
    ) -> Result<Option<T>, StoreError> {
        let read = self.attempt(&replica.pool, async |connection: &mut PgConnection| {
            if replica.reached.load(Ordering::Relaxed) < needed {
                let row = query("SELECT next FROM sledge.head").fetch_one(&mut *connection).await?;
                let reached = row.try_get(0)?;
                replica.reached.fetch_max(reached, Ordering::Relaxed);
                if reached < needed {
                    return Ok(None);
                }
            }
            work(connection).await.map(Some)
        });
        let read = read.await.map_err(|failure| match failure {
            Failure::Sql(error) => trouble::told(error),
            Failure::Store(error) => error,
        })?;
        replica.is_told.store(false, Ordering::Relaxed);
        Ok(read)
    }

    async fn attempts<T>(
        &self,
        pool: &PgPool,
        work: impl AsyncFn(&mut PgConnection) -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        let (mut retries, mut reconnected, mut moved) = (0, false, false);
        loop {
            let error = match self.attempt(pool, &work).await {
                Ok(done) => return Ok(done),
                // A host that vanished says nothing at all.
                Err(Failure::Store(StoreError::Away(_))) if !moved && self.find_primary().await => {
                    moved = true;
                    continue;
                }
                Err(Failure::Store(error)) => return Err(error),
                Err(Failure::Sql(error)) => error,
            };
            match trouble::remedy(&error) {
                Remedy::Again if retries < RETRIES_MAX => {
                    retries += 1;
                    tracing::debug!(%error, retries, "a transaction is tried again");
                    tokio::time::sleep(pause_before(retries)).await;
                }
                Remedy::Reconnect if !reconnected => reconnected = true,
                _ if !moved && trouble::is_lost(&error) && self.find_primary().await => moved = true,
                _ => return Err(trouble::told(error)),
            }
        }
    }

    /// One try on one connection, within the time. A connection that anything went wrong on is not used again: it may
    /// be in the middle of a transaction.
    async fn attempt<T>(
        &self,
        pool: &PgPool,
        work: impl AsyncFn(&mut PgConnection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let attempt = async {
            let mut connection = Guarded(Some(pool.acquire().await?));
            let done = work(connection.0.as_mut().expect("until it is given back")).await?;
            drop(connection.0.take());
            Ok(done)
        };
        match tokio::time::timeout(self.timeout, attempt).await {
            Ok(done) => done,
            Err(_) => Err(Failure::Store(trouble::too_slow(self.timeout))),
        }
    }

    /// Says that everything before `position` is known to be stored.
    pub(super) fn reached(&self, position: i64) {
        self.reached.store(position, Ordering::Relaxed);
    }

    pub(super) fn listen_pool(&self) -> PgPool {
        self.listen.clone()
    }

    pub(super) fn poll(&self) -> Duration {
        self.poll
    }

    /// Says goodbye to the servers, as far as the time allows.
    pub(super) async fn close(&self, time: Duration) {
        let all = [&self.write, &self.read].into_iter().chain(self.replicas.iter().map(|replica| &replica.pool));
        let closing = async {
            for pool in all {
                pool.close().await;
            }
        };
        let _ = tokio::time::timeout(time, closing).await;
    }
}

impl Replica {
    fn is_ready(&self) -> bool {
        let mut rests_until = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        if rests_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        *rests_until = None;
        true
    }

    fn failed(&self, error: &StoreError) {
        *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + REPLICA_REST);
        // It may come back as another server that has replayed less.
        self.reached.store(0, Ordering::Relaxed);
        if !self.is_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "a replica failed; the primary answers instead");
        }
    }
}

/// A connection that goes back to its pool only if it is taken out; else it is closed.
struct Guarded(Option<PoolConnection<Postgres>>);

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

/// `OK true` promises that an event survives a power cut, and the database decides whether it does.
async fn warn_of_settings(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    for name in ["synchronous_commit", "fsync", "full_page_writes"] {
        let row = query("SELECT current_setting($1)").bind(name).fetch_one(&mut *connection).await?;
        if row.try_get::<&str, _>(0)? == "off" {
            tracing::warn!("the database has {name} = off: events that were acknowledged may be lost in a crash");
        }
    }
    Ok(())
}
