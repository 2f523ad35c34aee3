//! What other processes have stored or passed on: read in order from where this process has come to.
//!
//! A notification only says that there is something to read. It may be lost, come twice or come late: what is read is
//! decided by the position, and positions become visible in their order (see [`super::write`]). Where no notification
//! arrives at all, a look every `poll_ms` finds what there is.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgListener, PgPool};
use sqlx::{Row, query};

use super::rows::{self, json_text};
use crate::protocol::{Event, Verified};
use crate::store::{FromElsewhere, StoreError};

/// The channel of all notifications.
const CHANNEL: &str = "sledge";

/// Events read in one go.
const PORTION_EVENTS_MAX: i64 = 500;

/// Bytes of JSON read in one go, but for one event.
const PORTION_BYTES_MAX: i64 = 4 << 20;

/// How long after a listening connection broke a new one is tried.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// How long ephemeral events can be read by other processes. A process that slept longer has no use for them.
pub(super) const PASSING_SECS: u32 = 60;

/// Events in the order of their positions, and how far they go.
pub(super) struct Portion {
    pub(super) events: Vec<FromElsewhere>,
    /// Every event before this is among them or was known.
    pub(super) end: i64,
    /// There are more.
    pub(super) more: bool,
    /// How often a state was saved so far.
    pub(super) states: i64,
}

const STORED: &str = "
SELECT head.next, found.seq, found.bytes, CASE WHEN found.news THEN found.json END, head.states
  FROM sledge.head LEFT JOIN LATERAL (
  SELECT seq, bytes, news, json FROM (
    SELECT seq, bytes, news, json, sum(bytes) OVER (ORDER BY seq) - bytes AS before FROM (
      SELECT seq, bytes, news, json FROM sledge.events WHERE seq >= $1 ORDER BY seq LIMIT $2) AS next
  ) AS summed WHERE before < $3 ORDER BY seq
) AS found ON true ORDER BY found.seq";

/// Events stored from a position on, by whomever.
pub(super) async fn stored(connection: &mut PgConnection, from: i64) -> Result<Portion, super::write::Failure> {
    let found = query(STORED).bind(from).bind(PORTION_EVENTS_MAX).bind(PORTION_BYTES_MAX);
    let found = found.fetch_all(connection).await?;
    let first = found.first().ok_or(sqlx::Error::RowNotFound)?;
    let (next, states): (i64, i64) = (first.try_get(0)?, first.try_get(4)?);
    let (mut events, mut bytes, mut last) = (Vec::new(), 0, None);
    for row in &found {
        let Some(seq) = row.try_get::<Option<i64>, _>(1)? else { break };
        last = Some(seq);
        bytes += i64::from(row.try_get::<i32, _>(2)?);
        // A former version of settings is stored, and news to nobody.
        if let Some(json) = row.try_get(3)? {
            events.push(from_elsewhere(json)?);
        }
    }
    // A portion that stopped short may have left something between its last event and the end.
    let stopped_short = found.len() as i64 >= PORTION_EVENTS_MAX || bytes >= PORTION_BYTES_MAX;
    let end = last.filter(|_| stopped_short).map_or(next, |last| last + 1);
    Ok(Portion { events, end, more: end < next, states })
}

fn from_elsewhere(json: &str) -> Result<FromElsewhere, StoreError> {
    Ok(FromElsewhere { event: rows::event(json)?, json: json.to_owned().into() })
}

/// What a notification carries: who sent it, since one's own is no news.
pub(super) fn payload(sender: i64) -> String {
    sender.to_string()
}

/// The lock makes positions visible in their order, as that of `head` does for stored events.
const PASS_ON: &str = "
WITH turn AS MATERIALIZED (SELECT pg_advisory_xact_lock(375726)), passed AS (
  INSERT INTO sledge.passing (sender, json) SELECT $1, json FROM turn, unnest($2::text[]) AS json
)
SELECT pg_notify('sledge', $3)";

/// Lets other processes have ephemeral events. Nothing is written to the write-ahead log.
pub(super) async fn pass_on(
    connection: &mut PgConnection,
    sender: i64,
    events: &[Verified<Event>],
) -> Result<(), sqlx::Error> {
    let json: Vec<String> = events.iter().map(json_text).collect();
    query(PASS_ON).bind(sender).bind(json).bind(payload(sender)).execute(connection).await.map(drop)
}

const PASSED: &str = "
SELECT numbers.last_value, found.seq, found.sender, found.json
  FROM sledge.passing_seq_seq AS numbers LEFT JOIN LATERAL (
    SELECT seq, sender, json FROM sledge.passing WHERE seq > $1 ORDER BY seq LIMIT $2
  ) AS found ON true ORDER BY found.seq";

/// Ephemeral events that others passed on, from behind a number on.
pub(super) async fn passed(
    connection: &mut PgConnection,
    sender: i64,
    behind: i64,
) -> Result<Portion, super::write::Failure> {
    let found = query(PASSED).bind(behind).bind(PORTION_EVENTS_MAX).fetch_all(connection).await?;
    let last_given: i64 = found.first().ok_or(sqlx::Error::RowNotFound)?.try_get(0)?;
    if last_given < behind {
        // A crash of the database empties the table and may begin its numbers anew.
        return Ok(Portion { events: Vec::new(), end: 0, more: true, states: 0 });
    }
    let (mut events, mut end) = (Vec::new(), behind);
    for row in &found {
        let Some(seq) = row.try_get(1)? else { break };
        end = seq;
        if row.try_get::<i64, _>(2)? != sender {
            events.push(from_elsewhere(row.try_get(3)?)?);
        }
    }
    Ok(Portion { events, end, more: found.len() as i64 >= PORTION_EVENTS_MAX, states: 0 })
}

/// The last ephemeral event so far.
pub(super) async fn last_passed(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    query("SELECT coalesce(max(seq), 0) FROM sledge.passing").fetch_one(connection).await?.try_get(0)
}

/// Forgets ephemeral events that everybody has read.
pub(super) async fn forget_passed(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let old = query("DELETE FROM sledge.passing WHERE at < now() - make_interval(secs => $1)");
    old.bind(f64::from(PASSING_SECS)).execute(connection).await.map(drop)
}

/// Calls `wake` whenever others may have stored something: on their notifications, at least every `poll`, and after
/// each new connection. Ends with its task.
pub(super) async fn listen(pool: PgPool, sender: i64, poll: Duration, wake: Arc<dyn Fn() + Send + Sync>) {
    let mut told = false;
    loop {
        match listen_once(&pool, sender, poll, &*wake, &mut told).await {
            Ok(()) => return,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!("no notifications from the database, looking every {poll:?} instead: {error}");
                }
                // The store itself may be reachable: a pooler that refuses LISTEN must not cost anybody an event.
                wake();
                tokio::time::sleep(RECONNECT_PAUSE.min(poll)).await;
            }
        }
    }
}

async fn listen_once(
    pool: &PgPool,
    sender: i64,
    poll: Duration,
    wake: &(dyn Fn() + Send + Sync),
    told: &mut bool,
) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(CHANNEL).await?;
    wake();
    if std::mem::take(told) {
        tracing::info!("notifications from the database arrive again");
    }
    let own = payload(sender);
    loop {
        match tokio::time::timeout(poll, listener.try_recv()).await {
            Ok(Ok(Some(notification))) if notification.payload() == own => {}
            Ok(Ok(_)) | Err(_) => wake(),
            Ok(Err(error)) => return Err(error),
        }
    }
}
