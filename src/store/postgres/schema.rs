//! The tables, and how a database of an older version becomes one of this version.
//!
//! All lie in the schema `sledge`, so a database that has other uses keeps them. Bytes are `bytea`, times are seconds
//! since 1970. `newest` is `-created_at`: what runs upwards by it runs newest first, and ties fall to the lowest id, so a
//! page is a range of one index and goes on by a row comparison. Tag values and addresses are hashed; the event decides.
//!
//! ```text
//! head        one row: the position of the next event, events and bytes stored, how often a state was saved. Its lock is
//!             the right to write.
//! events      one row an event: position, fields that filters ask for, hashed terms of its tags, JSON as it is sent
//! tags        term · newest · id: one row a term of an event
//! tombstones  what deletion requests and requests to vanish forbid; a row leaves with its request
//! gone        the newest version of an address that was deleted by id
//! state       small named blobs: what the layers above decide, such as who is banned
//! passing     ephemeral events on their way to other processes; unlogged, gone after a minute
//! ```
//!
//! The tables are not partitioned by time. An id implies its `created_at`, so `(id, created_at)` would be as unique, and the
//! lock on `head` keeps addresses so. But a query's order runs over all partitions: with 100,000 events in 60 of them one
//! author's newest 20 took 57 times as long, those of 50 authors 17 times, 100 ids 290 times, since each partition is
//! opened for each stretch and an id does not say which to look in. And to drop a partition would take deletion requests
//! and profiles with the rest: what they forbid would come back. `super::retention` removes what is old instead.

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Row, raw_sql};

/// Version of the tables on this page.
pub const SCHEMA_VERSION: i32 = STEPS.len() as i32;

/// What makes a database of version `n` one of version `n + 1`. A step that was ever released is never changed.
const STEPS: [&str; 2] = [
    "
CREATE TABLE sledge.head (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    next bigint NOT NULL,
    events bigint NOT NULL,
    bytes bigint NOT NULL,
    states bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 10);
INSERT INTO sledge.head (next, events, bytes) VALUES (0, 0, 0);

CREATE TABLE sledge.events (
    seq bigint NOT NULL,
    created_at bigint NOT NULL,
    expires_at bigint,
    kind integer NOT NULL,
    bytes integer NOT NULL,
    news boolean NOT NULL,
    id bytea PRIMARY KEY,
    pubkey bytea NOT NULL,
    address bytea,
    terms bigint[] NOT NULL,
    json text NOT NULL
);
CREATE UNIQUE INDEX events_seq ON sledge.events (seq);
CREATE INDEX events_time ON sledge.events ((-created_at), id);
CREATE INDEX events_author ON sledge.events (pubkey, (-created_at), id);
CREATE INDEX events_author_kind ON sledge.events (pubkey, kind, (-created_at), id);
CREATE INDEX events_kind ON sledge.events (kind, (-created_at), id);
CREATE UNIQUE INDEX events_address ON sledge.events (address) WHERE address IS NOT NULL;
CREATE INDEX events_expires ON sledge.events (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE sledge.tags (
    term bigint NOT NULL,
    newest bigint NOT NULL,
    id bytea NOT NULL,
    PRIMARY KEY (term, newest, id)
);

CREATE TABLE sledge.tombstones (
    what smallint NOT NULL,
    target bytea NOT NULL,
    requester bytea NOT NULL,
    until bigint NOT NULL,
    request bytea NOT NULL,
    PRIMARY KEY (what, target, request)
);
CREATE INDEX tombstones_request ON sledge.tombstones (request);

CREATE TABLE sledge.gone (
    address bytea PRIMARY KEY,
    created_at bigint NOT NULL,
    id bytea NOT NULL
);

CREATE TABLE sledge.state (
    name text PRIMARY KEY,
    bytes bytea NOT NULL
);

CREATE UNLOGGED TABLE sledge.passing (
    seq bigserial PRIMARY KEY,
    sender bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    json text NOT NULL
);
",
    // The numbers of what passes are taken over by a standby that is promoted; where they were unlogged as the table is,
    // it had none to give, and neither ephemeral events nor news got through.
    "ALTER SEQUENCE sledge.passing_seq_seq SET LOGGED",
];

/// Key of the lock under which steps are taken: any number that nothing else uses.
const STEPS_LOCK: i64 = 0x5_1ed6e;

/// Why a database cannot be used.
pub(super) enum Unusable {
    /// The database said so.
    Refused(sqlx::Error),
    /// A newer program has made it.
    Newer(i32),
}

impl From<sqlx::Error> for Unusable {
    fn from(error: sqlx::Error) -> Self {
        Unusable::Refused(error)
    }
}

/// Takes the steps that the database lacks, all or none; several processes may try at once.
pub(super) async fn bring_up(connection: &mut PgConnection) -> Result<(), Unusable> {
    // The usual case needs no right to create anything.
    if version(connection).await? == Some(SCHEMA_VERSION) {
        return Ok(());
    }
    raw_sql("BEGIN").execute(&mut *connection).await?;
    let taken = take_steps(connection).await;
    let end = if taken.is_ok() { "COMMIT" } else { "ROLLBACK" };
    raw_sql(end).execute(&mut *connection).await?;
    taken
}

async fn take_steps(connection: &mut PgConnection) -> Result<(), Unusable> {
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(STEPS_LOCK).execute(&mut *connection).await?;
    let found = version(connection).await?.unwrap_or(0);
    if found > SCHEMA_VERSION {
        return Err(Unusable::Newer(found));
    }
    if found == 0 {
        let first = "CREATE SCHEMA IF NOT EXISTS sledge; CREATE TABLE sledge.version (version integer NOT NULL); \
                     INSERT INTO sledge.version VALUES (0)";
        raw_sql(first).execute(&mut *connection).await?;
    }
    for (number, step) in (1..).zip(STEPS).skip(found as usize) {
        raw_sql(step).execute(&mut *connection).await?;
        sqlx::query("UPDATE sledge.version SET version = $1").bind(number).execute(&mut *connection).await?;
        tracing::info!(version = number, "the database's tables are of this version now");
    }
    Ok(())
}

/// Whether the tables are there. Asked of the catalogue's own tables: functions such as `to_regclass` may answer from
/// what the connection remembers of before it waited for the lock.
const IS_THERE: &str = "
SELECT EXISTS (SELECT FROM pg_class AS class JOIN pg_namespace AS space ON space.oid = class.relnamespace
                WHERE space.nspname = 'sledge' AND class.relname = 'version')";

/// The version of the tables; none where there are none yet.
async fn version(connection: &mut PgConnection) -> Result<Option<i32>, sqlx::Error> {
    let there = sqlx::query(IS_THERE).fetch_one(&mut *connection).await?;
    if !there.try_get::<bool, _>(0)? {
        return Ok(None);
    }
    let row: PgRow = sqlx::query("SELECT version FROM sledge.version").fetch_one(&mut *connection).await?;
    row.try_get(0).map(Some)
}
