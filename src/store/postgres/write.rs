//! One batch of writes, in one transaction: judged in memory, written in one go.
//!
//! Whoever writes holds the row of `sledge.head` until the transaction has ended. So there is one writer at a time among
//! all processes, verdicts cannot race, deadlocks cannot happen, and events become visible in the order of their
//! positions: who has seen the position `n` in a snapshot has seen everything before it. A process gathers what comes in
//! while it waits for the row, so waiting makes batches larger and costs no throughput.
//!
//! A batch is four round trips: lock, read what bears on it, write, commit. Columns go as arrays and are unnested: `COPY`
//! could only fill a table beside, from which this same statement would then have to read, and an import is not held up
//! here: 16,000 events a second, on two cores that also check the signatures and run the server.

use sqlx::postgres::PgConnection;
use sqlx::{Row, query, raw_sql};

use super::news;
use super::retention::taken_bytes;
use super::rows::{self, seconds};
use super::view::View;
use crate::protocol::supersede::{Verdict, may_delete};
use crate::protocol::{Event, EventId, Kind, TagLetter, Verified};
use crate::store::{FromElsewhere, StoreError};

/// Begins a transaction that writes, and waits for its turn. A process that is cut off from the database must not keep
/// the others waiting, and the tables are only ever read by their indexes, however small they are.
const BEGIN: &str = "BEGIN;
SET LOCAL lock_timeout = '10s';
SET LOCAL idle_in_transaction_session_timeout = '10s';
SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off; SET LOCAL jit = off;
SELECT next, events, bytes FROM sledge.head FOR NO KEY UPDATE";

/// Events that a request to vanish takes out in one statement.
const VANISH_EVENTS_MAX: i64 = 2_000;

/// A transaction that has the right to write. Ends by [`Transaction::commit`]; anything else undoes it.
pub(super) struct Transaction<'c> {
    connection: &'c mut PgConnection,
    /// Position of the next event.
    next: i64,
    /// Events, and bytes of their JSON: what was there before, and what this transaction adds.
    events: i64,
    bytes: i64,
}

/// Why a transaction came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The database said so; perhaps it helps to try again.
    Sql(sqlx::Error),
    /// It does not help.
    Store(StoreError),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Failure::Sql(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Failure::Store(error)
    }
}

impl<'c> Transaction<'c> {
    /// Waits for its turn.
    pub(super) async fn begin(connection: &'c mut PgConnection) -> Result<Transaction<'c>, sqlx::Error> {
        let head = raw_sql(BEGIN).fetch_one(&mut *connection).await?;
        let [next, events, bytes] = [head.try_get(0)?, head.try_get(1)?, head.try_get(2)?];
        Ok(Transaction { connection, next, events, bytes })
    }

    /// What the events take of the quota, not counting what this transaction removes.
    pub(super) fn taken_bytes(&self) -> u64 {
        taken_bytes(self.events.unsigned_abs(), self.bytes.unsigned_abs())
    }

    /// What others have stored from a position on.
    pub(super) async fn others(&mut self, from: i64) -> Result<Vec<FromElsewhere>, Failure> {
        let (mut all, mut at) = (Vec::new(), from);
        while at < self.next {
            let portion = news::stored(self.connection, at).await?;
            at = portion.end;
            all.extend(portion.events);
        }
        Ok(all)
    }

    /// Judges and stores a batch. A request to vanish takes out what the tables hold, so those before it go in first.
    pub(super) async fn apply(
        &mut self,
        batch: &[Verified<Event>],
        now: u64,
        sender: i64,
    ) -> Result<Vec<Verdict>, Failure> {
        let mut verdicts = Vec::with_capacity(batch.len());
        for part in batch.split_inclusive(|event| event.kind == Kind::VANISH) {
            let mut view = View::load(self.connection, part).await??;
            verdicts.extend(part.iter().map(|event| view.add(event, now)));
            self.write(&view, sender).await?;
            let vanishes = part.last().filter(|last| last.kind == Kind::VANISH);
            if let Some(request) = vanishes.filter(|_| verdicts.last() == Some(&Verdict::Store)) {
                self.vanish(request).await?;
            }
        }
        Ok(verdicts)
    }

    async fn write(&mut self, view: &View<'_>, sender: i64) -> Result<(), sqlx::Error> {
        if !view.writes.removed.is_empty() {
            self.delete(&view.writes.removed).await?;
        }
        let (columns, stones, gone) = (view.writes.columns(), &view.writes.tombstones, view.gone_columns());
        let count = columns.len() as i64;
        let bytes: usize = columns.json.iter().map(String::len).sum();
        if count == 0 && gone.0.is_empty() {
            return Ok(());
        }
        query(INSERT)
            .bind(self.next)
            .bind(columns.ids)
            .bind(columns.pubkeys)
            .bind(columns.created_at)
            .bind(columns.kinds)
            .bind(columns.expires_at)
            .bind(columns.addresses)
            .bind(columns.terms)
            .bind(columns.json)
            .bind(&stones.what)
            .bind(&stones.targets)
            .bind(&stones.requesters)
            .bind(&stones.until)
            .bind(&stones.requests)
            .bind(gone.0)
            .bind(gone.1)
            .bind(gone.2)
            .bind(news::payload(sender))
            .bind(columns.news)
            .execute(&mut *self.connection)
            .await?;
        self.next += count;
        self.events += count;
        self.bytes += bytes as i64;
        Ok(())
    }

    /// Takes events out by id; how many were there.
    pub(super) async fn delete(&mut self, ids: &[EventId]) -> Result<u64, sqlx::Error> {
        let ids: Vec<Vec<u8>> = ids.iter().map(|id| id.0.to_vec()).collect();
        let deleted = query(DELETE).bind(ids).fetch_one(&mut *self.connection).await?;
        deleted.try_get::<i64, _>(0).map(i64::unsigned_abs)
    }

    /// Takes out everything of an author up to the request, and the gift wraps sent to them (NIP-62).
    async fn vanish(&mut self, request: &Event) -> Result<(), Failure> {
        let until = seconds(request.created_at);
        loop {
            let own = query(OWN_EVENTS).bind(&request.pubkey.0[..]).bind(-until).bind(VANISH_EVENTS_MAX);
            let found = own.fetch_all(&mut *self.connection).await?;
            let ids = found.iter().map(|row| rows::id(row.try_get(0)?).map_err(Failure::Store));
            let ids: Vec<EventId> = ids.collect::<Result<_, Failure>>()?;
            self.delete(&ids).await?;
            if (ids.len() as i64) < VANISH_EVENTS_MAX {
                break;
            }
        }
        let mut from: (i64, Vec<u8>) = (-until, Vec::new());
        loop {
            let inbox = rows::term(TagLetter::P, &request.pubkey.to_hex());
            let wraps = query(INBOX).bind(inbox).bind(from.0).bind(&from.1).bind(VANISH_EVENTS_MAX);
            let found = wraps.fetch_all(&mut *self.connection).await?;
            let Some(last) = found.last() else { return Ok(()) };
            from = (last.try_get(0)?, last.try_get(1)?);
            let mut ids = Vec::new();
            for row in &found {
                // Other keys may share the term.
                if let Some(json) = row.try_get::<Option<&str>, _>(2)?
                    && may_delete(&request.pubkey, &rows::event(json)?)
                {
                    ids.push(rows::id(row.try_get(1)?)?);
                }
            }
            self.delete(&ids).await?;
        }
    }

    /// Events whose expiration has come: at most so many are taken out. How many were.
    pub(super) async fn delete_expired(&mut self, now: u64, events_max: usize) -> Result<u64, Failure> {
        let due = query("SELECT id FROM sledge.events WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2");
        let due = due.bind(seconds(now)).bind(events_max as i64).fetch_all(&mut *self.connection).await?;
        let ids = due.iter().map(|row| rows::id(row.try_get(0)?).map_err(Failure::Store));
        let ids: Vec<EventId> = ids.collect::<Result<_, Failure>>()?;
        Ok(self.delete(&ids).await?)
    }

    /// Makes a removal durable. It takes up a position, so that what a replica has reached tells whether it has seen it.
    pub(super) async fn commit_removal(mut self) -> Result<i64, sqlx::Error> {
        self.next += 1;
        raw_sql("UPDATE sledge.head SET next = next + 1; COMMIT").execute(self.connection).await?;
        Ok(self.next)
    }

    /// Makes it durable. The position of the next event.
    pub(super) async fn commit(self) -> Result<i64, sqlx::Error> {
        raw_sql("COMMIT").execute(self.connection).await?;
        Ok(self.next)
    }
}

const INSERT: &str = "
WITH new AS (
  INSERT INTO sledge.events (seq, id, pubkey, created_at, kind, expires_at, address, terms, bytes, news, json)
  SELECT $1 + row.number - 1, row.id, pubkey, created_at, kind, expires_at, address, terms::bigint[],
         octet_length(json), news, json
    FROM unnest($2::bytea[], $3::bytea[], $4::bigint[], $5::integer[], $6::bigint[], $7::bytea[], $8::text[], $9::text[],
                $19::boolean[])
         WITH ORDINALITY AS row (id, pubkey, created_at, kind, expires_at, address, terms, json, news, number)
  RETURNING id, created_at, terms, bytes
), tagged AS (
  INSERT INTO sledge.tags (term, newest, id) SELECT unnest(terms), -created_at, id FROM new
), forbidden AS (
  INSERT INTO sledge.tombstones (what, target, requester, until, request)
  SELECT * FROM unnest($10::smallint[], $11::bytea[], $12::bytea[], $13::bigint[], $14::bytea[])
  ON CONFLICT DO NOTHING
), gone AS (
  INSERT INTO sledge.gone (address, created_at, id)
  SELECT * FROM unnest($15::bytea[], $16::bigint[], $17::bytea[])
  ON CONFLICT (address) DO UPDATE SET created_at = excluded.created_at, id = excluded.id
), counted AS (
  UPDATE sledge.head SET next = next + sum.events, events = head.events + sum.events, bytes = head.bytes + sum.bytes
    FROM (SELECT count(*) AS events, coalesce(sum(bytes), 0) AS bytes FROM new) AS sum
)
SELECT pg_notify('sledge', $18)";

const DELETE: &str = "
WITH old AS (
  DELETE FROM sledge.events WHERE id = ANY($1) RETURNING id, created_at, terms, kind, bytes
), untagged AS (
  DELETE FROM sledge.tags AS tag
   USING (SELECT unnest(terms) AS term, -created_at AS newest, id FROM old) AS entry
   WHERE tag.term = entry.term AND tag.newest = entry.newest AND tag.id = entry.id
), allowed AS (
  DELETE FROM sledge.tombstones WHERE request IN (SELECT id FROM old WHERE kind IN (5, 62))
), sum AS (
  SELECT count(*) AS events, coalesce(sum(bytes), 0) AS bytes FROM old
), counted AS (
  UPDATE sledge.head SET events = head.events - sum.events, bytes = head.bytes - sum.bytes FROM sum
)
SELECT events FROM sum";

const OWN_EVENTS: &str = "
SELECT id FROM sledge.events
 WHERE pubkey = $1 AND -created_at >= $2 AND kind <> 62 ORDER BY -created_at, id LIMIT $3";

const INBOX: &str = "
SELECT entry.newest, entry.id, CASE WHEN event.kind = 1059 THEN event.json END
  FROM (SELECT newest, id FROM sledge.tags WHERE term = $1 AND (newest, id) > ($2, $3)
         ORDER BY newest, id LIMIT $4) AS entry
  JOIN sledge.events AS event ON event.id = entry.id ORDER BY entry.newest, entry.id";
