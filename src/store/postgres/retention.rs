//! Retention in a database: its events by time, for the keeper that all stores share.
//!
//! One process works on a portion at a time, under an advisory lock, and takes the right to write only for what goes. How
//! far it has walked each keeps to itself. The reaches are a blob that is read again before each portion, so what one
//! process has evicted no other takes back.
//!
//! The files of a database do not shrink with what they hold, and autovacuum frees their room for what comes later. So what
//! is held against the quota is what the events take, by the average.

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Row, query, raw_sql};

use super::rows::{self, seconds};
use super::{PostgresStore, trouble, wait};
use crate::protocol::{EventId, Kind, PublicKey};
use crate::store::quota::{Evicted, Ground, Used};
use crate::store::{Retained, StoreError};

/// What an event takes beside its JSON, in bytes: its row, and its entries in eight indexes and for three tags. Events of
/// 740 bytes took 2.2 kB each.
pub(super) const EVENT_OVERHEAD_BYTES: u64 = 1_400;

/// The blob with the reaches. Nobody needs to be told of it: whoever goes by it reads it.
const REACHES: &str = "retention";

/// Any number that no other lock of these tables has.
const TAKE_TURN: &str = "SELECT pg_try_advisory_xact_lock(375727)";

const STANDING: &str = "
SELECT events, bytes, (SELECT bytes FROM sledge.state WHERE name = $1) FROM sledge.head";

const COUNT: &str = "
SELECT count(*) FROM (SELECT FROM sledge.events WHERE -created_at BETWEEN $1 AND $2 LIMIT $3) AS found";

const WALK: &str = "
SELECT created_at, id, kind, pubkey FROM sledge.events
 WHERE (-created_at, id) > ($1, $2) AND -created_at <= $3 ORDER BY -created_at, id LIMIT $4";

const SAVE: &str = "
INSERT INTO sledge.state (name, bytes) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET bytes = excluded.bytes";

/// The last entry that was looked at: `-created_at` and id.
pub(super) type Place = (i64, Vec<u8>);

/// What so many events with so many bytes of JSON take.
pub(super) fn taken_bytes(events: u64, json_bytes: u64) -> u64 {
    json_bytes + events * EVENT_OVERHEAD_BYTES
}

/// What is stored, and the reaches that were saved last.
pub(super) async fn standing(connection: &mut PgConnection) -> Result<(Used, Option<Vec<u8>>), sqlx::Error> {
    let row = query(STANDING).bind(REACHES).fetch_one(connection).await?;
    let [events, json_bytes] = [row.try_get::<i64, _>(0)?, row.try_get(1)?].map(i64::unsigned_abs);
    Ok((Used { live_bytes: taken_bytes(events, json_bytes), other_bytes: 0, events }, row.try_get(2)?))
}

/// Removes a portion of what need not stay; nothing while another process is at it.
pub(super) fn retain(store: &PostgresStore, now: u64, events_max: usize) -> Result<Retained, StoreError> {
    if store.keeper.is_idle() {
        return Ok(Retained::default());
    }
    store.wait(store.pools.writing(async |connection: &mut PgConnection| {
        raw_sql("BEGIN").execute(&mut *connection).await?;
        let turn: bool = query(TAKE_TURN).fetch_one(&mut *connection).await?.try_get(0)?;
        let (used, saved) = standing(connection).await?;
        store.keeper.hear(saved.as_deref());
        let retained = match turn {
            true => store.keeper.retain(&mut DatabaseGround { store, connection, used }, now, events_max)?,
            false => Retained::default(),
        };
        raw_sql("COMMIT").execute(&mut *connection).await?;
        Ok(retained)
    }))
}

/// The database, on the connection that has the turn.
struct DatabaseGround<'s> {
    store: &'s PostgresStore,
    connection: &'s mut PgConnection,
    used: Used,
}

impl DatabaseGround<'_> {
    fn ask<T>(&mut self, work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>) -> Result<T, StoreError> {
        wait::block_on(self.store.handle(), work(self.connection)).map_err(trouble::told)
    }
}

impl Ground for DatabaseGround<'_> {
    type Place = Place;

    fn used(&mut self) -> Used {
        self.used
    }

    fn count(&mut self, from: u64, until: u64, limit: usize) -> Result<usize, StoreError> {
        let (newest, oldest) = (-seconds(until), -seconds(from));
        self.ask(async |connection| {
            let counted = query(COUNT).bind(newest).bind(oldest).bind(limit as i64).fetch_one(connection);
            counted.await?.try_get::<i64, _>(0)
        })
        .map(|counted| counted as usize)
    }

    fn evict(
        &mut self,
        (since, until): (u64, u64),
        place: Option<Place>,
        entries_max: usize,
        goes: &dyn Fn(Kind) -> bool,
        kept: &dyn Fn(&PublicKey) -> bool,
    ) -> Result<Evicted<Place>, StoreError> {
        let behind = place.unwrap_or((-seconds(until), Vec::new()));
        let rows = self.ask(async |connection| {
            let walk = query(WALK).bind(behind.0).bind(behind.1).bind(-seconds(since)).bind(entries_max as i64);
            walk.fetch_all(connection).await
        })?;
        let entries: Vec<Entry> = rows.iter().map(Entry::of).collect::<Result<_, _>>()?;
        let going = || entries.iter().filter(|entry| goes(entry.kind) && !kept(&entry.author));
        let ids: Vec<EventId> = going().map(|entry| entry.id).collect();
        let removed = match ids.is_empty() {
            true => 0,
            false => self.store.removing(async |transaction| Ok(transaction.delete(&ids).await?))?,
        };
        let rest = entries.last().filter(|_| entries.len() >= entries_max);
        Ok(Evicted {
            removed: removed as usize,
            latest: going().map(|entry| entry.created_at.unsigned_abs()).max().unwrap_or(0),
            rest: rest.map(|entry| (-entry.created_at, entry.id.0.to_vec())),
        })
    }

    fn save(&mut self, reaches: &[u8]) -> Result<(), StoreError> {
        self.ask(async |connection| query(SAVE).bind(REACHES).bind(reaches).execute(connection).await.map(drop))
    }
}

struct Entry {
    created_at: i64,
    id: EventId,
    kind: Kind,
    author: PublicKey,
}

impl Entry {
    fn of(row: &PgRow) -> Result<Entry, StoreError> {
        let column = |name| row.try_get::<&[u8], _>(name).map_err(trouble::told);
        Ok(Entry {
            created_at: row.try_get("created_at").map_err(trouble::told)?,
            id: rows::id(column("id")?)?,
            kind: Kind(row.try_get::<i32, _>("kind").map_err(trouble::told)? as u16),
            author: rows::pubkey(column("pubkey")?)?,
        })
    }
}
