//! Answering a query from the database, page by page: each stretch of a plan is a range of one index, and stretches are
//! merged here, newest first.
//!
//! A statement looks at a bounded number of entries a stretch and says of each whether the event fits, so its time is
//! bounded however rare the matches are, and the next one goes on behind the last entry. What SQL decides by hashes or
//! cannot know (who may see it) is decided here, by the filter's reference meaning, on the event itself.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use sqlx::postgres::{PgConnection, PgRow, Postgres};
use sqlx::{QueryBuilder, Row, query};
use tokio::runtime::Handle;

use super::connect::Pools;
use super::rows::{self, Stored, seconds};
use super::wait::block_on;
use super::write::Failure;
use crate::protocol::event::{Fields, author_in};
use crate::protocol::label::NAMESPACE;
use crate::protocol::slot::{self, Slot};
use crate::protocol::visibility::PrivateKinds;
use crate::protocol::{Event, EventId, Filter, Kind, PublicKey, TagLetter, Visibility};
use crate::store::plan::{Plan, Stretch, plan};
use crate::store::scan::{Match, Source, UnionScan};
use crate::store::{Query, StoreError, Wanted};

/// Entries that a statement looks at in all stretches together, about: with one stretch, so many of it.
const ENTRIES_MAX: usize = 256;
/// The same where nobody waits for rows.
const ENTRIES_MAX_COUNTING: usize = 4_096;
/// Entries of one stretch that a statement looks at, where there are very many stretches.
const ENTRIES_MIN: usize = 4;
/// Authors whose former settings a query remembers.
const FORMER_AUTHORS_MAX: usize = 1_024;
/// JSON up to this size comes along with the entries; larger ones are fetched when it is their turn.
const SMALL_JSON_BYTES: i32 = 16_384;
/// Where a statement looks at more entries than this, their JSON is fetched by pages: most of it would be forgotten when
/// the first page is full.
const SMALL_JSON_ENTRIES_MAX: usize = 128;
/// Events whose JSON is fetched in one go.
const FETCH_EVENTS_MAX: usize = 128;
/// Bytes of JSON fetched in one go, but for one event: about a page.
const FETCH_BYTES_MAX: usize = 64 * 1024;

/// A query of a database.
pub(super) type PostgresScan = UnionScan<PostgresMatches>;

/// What the filters of a query share.
pub(super) struct Context {
    pools: Arc<Pools>,
    handle: Handle,
    now: i64,
    before: Option<i64>,
    visible: Visibility,
    with_json: bool,
    /// The former versions of settings of those authors whose settings were met.
    former: HashMap<PublicKey, HashSet<EventId>>,
}

/// Where the matches of one filter lie, and how far they were read.
pub(super) struct PostgresMatches {
    cursors: Vec<Cursor>,
    since: i64,
    until: i64,
    /// Entries of each stretch that the next statement looks at.
    helping: usize,
    limit: usize,
    /// The last match, since an event may lie in several stretches.
    last: Option<Order>,
}

type Order = (Reverse<i64>, EventId);

/// One stretch.
struct Cursor {
    place: Place,
    /// The last entry that was looked at: `-created_at` and id.
    behind: (i64, Vec<u8>),
    /// Entries that fit and were not taken yet, in order.
    found: VecDeque<Found>,
    /// Nothing is left to look at.
    ended: bool,
}

/// A stretch as a statement names it.
enum Place {
    Time,
    Author(Vec<u8>),
    AuthorKind(Vec<u8>, i32),
    Kind(i32),
    Term(i64),
    /// At these ids.
    Ids(Vec<Vec<u8>>),
}

struct Found {
    created_at: i64,
    id: EventId,
    bytes: usize,
    kind: Kind,
    /// Its tags may make it private.
    may_be_labelled: bool,
    json: Option<String>,
}

impl Found {
    fn order(&self) -> Order {
        (Reverse(self.created_at), self.id)
    }

    /// As filters see it.
    fn fields<'j>(&self, json: &'j str) -> Result<Stored<'j>, StoreError> {
        let pubkey = author_in(json.as_bytes());
        let pubkey = pubkey.ok_or_else(|| StoreError::Damaged(format!("the event {} in the database", self.id)))?;
        Ok(Stored { id: self.id, pubkey, created_at: self.created_at.unsigned_abs(), kind: self.kind, json })
    }
}

impl PostgresScan {
    /// Begins a query.
    pub(super) fn of(pools: Arc<Pools>, handle: Handle, query: Query) -> Self {
        let context = Context {
            pools,
            handle,
            now: seconds(query.now),
            before: query.before.map(|before| seconds(before.0)),
            visible: query.visible,
            with_json: true,
            former: HashMap::new(),
        };
        UnionScan::new(query.wanted, context, PostgresMatches::of)
    }
}

impl PostgresMatches {
    fn of(wanted: &Wanted) -> Self {
        let filter = &wanted.filter;
        let (since, until) = (seconds(filter.since.unwrap_or(0)), seconds(filter.until.unwrap_or(u64::MAX)));
        let places = match plan(filter) {
            Plan::Nothing => Vec::new(),
            Plan::Ids(ids) => vec![Place::Ids(ids.iter().map(|id| id.0.to_vec()).collect())],
            Plan::Ranges(stretches) => stretches.into_iter().map(Place::of).collect(),
        };
        let cursor = |place| Cursor { place, behind: (-until, Vec::new()), found: VecDeque::new(), ended: false };
        let cursors: Vec<Cursor> = places.into_iter().map(cursor).collect();
        // One more than is wanted shows whether that was all; authors differ, so each is asked for more than its share.
        let share = match cursors.len() {
            0 | 1 => wanted.limit.min(ENTRIES_MAX),
            many => 2 * wanted.limit.min(ENTRIES_MAX) / many,
        };
        let helping = (share + 1).clamp(ENTRIES_MIN, ENTRIES_MAX);
        PostgresMatches { cursors, since, until, helping, limit: wanted.limit, last: None }
    }

    /// Looks at the next entries of every stretch that has none ready.
    fn refill(&mut self, filter: &Filter, context: &Context) -> Result<(), StoreError> {
        let due: Vec<usize> = (0..self.cursors.len()).filter(|at| self.cursors[*at].is_due()).collect();
        if due.is_empty() {
            return Ok(());
        }
        let entries_max = if context.with_json { ENTRIES_MAX } else { ENTRIES_MAX_COUNTING };
        let share = (entries_max / due.len()).max(ENTRIES_MIN);
        let helping = if context.with_json { self.helping.min(share) } else { share };
        self.helping = 2 * helping;
        let with_small_json = context.with_json && helping * due.len() <= SMALL_JSON_ENTRIES_MAX;
        let ask = Ask { matches: self, due: &due, filter, context, helping, with_small_json };
        let answer = context.read(async |connection| ask.run(connection).await)?;
        for (at, looked_at, last) in answer.ends {
            let cursor = &mut self.cursors[at];
            cursor.ended = looked_at < helping || matches!(cursor.place, Place::Ids(_));
            cursor.behind = last;
        }
        for at in &due {
            // Of a stretch that had no entries at all, no row tells.
            let cursor = &mut self.cursors[*at];
            cursor.ended |= !answer.seen.contains(at);
        }
        for (at, found) in answer.found {
            self.cursors[at].found.push_back(found);
        }
        for at in due {
            self.cursors[at].found.make_contiguous().sort_by_key(Found::order);
        }
        Ok(())
    }

    /// The stretch with the next match.
    fn next(&self) -> Option<usize> {
        let heads = self.cursors.iter().enumerate();
        let heads = heads.filter_map(|(at, cursor)| Some((cursor.found.front()?.order(), at)));
        heads.min().map(|(_, at)| at)
    }

    /// Has the JSON of the next match, and with it that of the ones behind it; without it when it is gone.
    fn fetch(&mut self, context: &Context) -> Result<(), StoreError> {
        let lacking = self.cursors.iter().flat_map(|cursor| cursor.found.iter().take(FETCH_EVENTS_MAX));
        let mut lacking: Vec<(Order, usize)> =
            lacking.filter(|found| found.json.is_none()).map(|found| (found.order(), found.bytes)).collect();
        lacking.sort_unstable();
        lacking.dedup_by_key(|(order, _)| order.1);
        let (mut ids, mut bytes) = (Vec::new(), 0);
        for ((_, id), size) in lacking.into_iter().take(FETCH_EVENTS_MAX.min(self.limit.saturating_add(1))) {
            bytes += size;
            if bytes > FETCH_BYTES_MAX && !ids.is_empty() {
                break;
            }
            ids.push(id);
        }
        let wanted: Vec<Vec<u8>> = ids.iter().map(|id| id.0.to_vec()).collect();
        let mut json = context.read(async |connection: &mut PgConnection| {
            let rows = query("SELECT id, json FROM sledge.events WHERE id = ANY($1)").bind(&wanted);
            let mut json: HashMap<EventId, String> = HashMap::new();
            for row in rows.fetch_all(connection).await? {
                json.insert(rows::id(row.try_get(0)?)?, row.try_get(1)?);
            }
            Ok(json)
        })?;
        let asked: BTreeSet<EventId> = ids.into_iter().collect();
        for cursor in &mut self.cursors {
            cursor.found.retain_mut(|found| {
                if found.json.is_none() && asked.contains(&found.id) {
                    found.json = json.get(&found.id).cloned();
                    return found.json.is_some();
                }
                true
            });
        }
        json.clear();
        Ok(())
    }
}

impl Source for PostgresMatches {
    type Context = Context;

    /// Many candidates come with one statement, and that is what takes time.
    const CANDIDATES_A_LOOK: u32 = 2;

    fn read_ahead(
        &mut self,
        filter: &Filter,
        context: &mut Context,
        ready: &mut VecDeque<Match>,
    ) -> Result<bool, StoreError> {
        if self.cursors.iter().any(Cursor::is_due) {
            self.refill(filter, context)?;
            if self.cursors.iter().any(Cursor::is_due) {
                // None of the entries fitted; whether to go on is for the caller to say.
                return Ok(true);
            }
        }
        let at = loop {
            let Some(at) = self.next() else { return Ok(self.cursors.iter().any(Cursor::is_due)) };
            let found = &mut self.cursors[at].found;
            let next = found.front().expect("the stretch with the next match has one");
            let must_look = context.with_json || context.leaves_open(filter, next);
            if self.last == Some(next.order()) {
                found.pop_front();
                if found.is_empty() {
                    // What this stretch has next may come before what the others have.
                    return Ok(true);
                }
            } else if must_look && next.json.is_none() {
                // What is gone meanwhile is taken out, and another one may be the next.
                self.fetch(context)?;
                if self.cursors.iter().any(Cursor::is_due) {
                    return Ok(true);
                }
            } else {
                break at;
            }
        };
        let mut found = self.cursors[at].found.pop_front().expect("looked at above");
        self.last = Some(found.order());
        let json = found.json.take().unwrap_or_default();
        if context.leaves_open(filter, &found) {
            let event = found.fields(&json)?;
            if !filter.matches(&event) || !context.answers(filter, &event)? {
                return Ok(true);
            }
        }
        let json = if context.with_json { Bytes::from(json) } else { Bytes::new() };
        ready.push_back(Match { created_at: found.created_at.unsigned_abs(), id: found.id, json });
        Ok(true)
    }

    fn count_only(context: &mut Context) {
        context.with_json = false;
    }

    fn rest(&mut self) {
        self.cursors.iter_mut().flat_map(|cursor| &mut cursor.found).for_each(|found| found.json = None);
    }
}

impl Cursor {
    fn is_due(&self) -> bool {
        self.found.is_empty() && !self.ended
    }
}

impl Place {
    fn of(stretch: Stretch<'_>) -> Place {
        match stretch {
            Stretch::Time => Place::Time,
            Stretch::Author(author) => Place::Author(author.0.to_vec()),
            Stretch::AuthorKind(author, kind) => Place::AuthorKind(author.0.to_vec(), i32::from(kind.0)),
            Stretch::Kind(kind) => Place::Kind(i32::from(kind.0)),
            Stretch::Tag(letter, value) => Place::Term(rows::term(letter, value)),
        }
    }

    /// The condition by which an index finds the stretch.
    fn condition(&self) -> &'static str {
        match self {
            Place::Time => "",
            Place::Author(_) => "event.pubkey = place.author AND ",
            Place::AuthorKind(..) => "event.pubkey = place.author AND event.kind = place.kind AND ",
            Place::Kind(_) => "event.kind = place.kind AND ",
            Place::Term(_) | Place::Ids(_) => unreachable!("these have statements of their own"),
        }
    }
}

impl Context {
    /// Whether SQL has not decided about an event: it compares tag values by their hashes, and who may see what is private
    /// is not its business.
    fn leaves_open(&self, filter: &Filter, found: &Found) -> bool {
        let may_be_private = |(private, _): (&PrivateKinds, _)| found.may_be_labelled || private.contains(found.kind);
        !filter.tags.is_empty() || self.visible.reader().is_some_and(may_be_private)
    }

    /// Whether the reader may see an event that matches. Each author's settings are looked up once a query.
    fn answers(&mut self, filter: &Filter, event: &impl Fields) -> Result<bool, StoreError> {
        let may_be_former = slot::is_version(event) && self.visible.reader().is_some();
        let author = *event.pubkey();
        if may_be_former && !self.former.contains_key(&author) {
            if self.former.len() >= FORMER_AUTHORS_MAX {
                self.former.clear();
            }
            let former = self.former_versions(&author)?;
            self.former.insert(author, former);
        }
        let is_former = || self.former.get(&author).is_some_and(|former| former.contains(event.id()));
        Ok(self.visible.answers(filter, event, is_former))
    }

    /// The versions of an author's settings that another one names.
    fn former_versions(&self, author: &PublicKey) -> Result<HashSet<EventId>, StoreError> {
        let json: Vec<String> = self.read(async |connection: &mut PgConnection| {
            let rows = query("SELECT json FROM sledge.events WHERE pubkey = $1 AND kind = $2");
            let rows = rows.bind(&author.0[..]).bind(i32::from(slot::KIND.0)).fetch_all(connection).await?;
            Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
        })?;
        let events: Vec<Event> = json.iter().map(|json| rows::event(json)).collect::<Result<_, _>>()?;
        let versions = events.iter().filter(|event| slot::is_version(*event)).map(slot::Version::of);
        Ok(Slot::new(versions.collect()).former())
    }

    fn read<T>(&self, work: impl AsyncFn(&mut PgConnection) -> Result<T, Failure>) -> Result<T, StoreError> {
        block_on(&self.handle, self.pools.reading(self.before, work))
    }
}

/// One look at some stretches.
struct Ask<'q> {
    matches: &'q PostgresMatches,
    due: &'q [usize],
    filter: &'q Filter,
    context: &'q Context,
    helping: usize,
    with_small_json: bool,
}

/// What a look found.
#[derive(Default)]
struct Answer {
    /// Of each stretch: how many entries were looked at, and the last of them.
    ends: Vec<(usize, usize, (i64, Vec<u8>))>,
    seen: BTreeSet<usize>,
    found: Vec<(usize, Found)>,
}

impl Ask<'_> {
    async fn run(&self, connection: &mut PgConnection) -> Result<Answer, Failure> {
        let mut statement = QueryBuilder::new("SELECT number, created_at, id, bytes, fits, kind, labelled, ");
        match self.with_small_json {
            true => statement.push("CASE WHEN fits AND bytes <= ").push(SMALL_JSON_BYTES).push(" THEN json END"),
            false => statement.push("NULL"),
        };
        statement.push(" FROM (SELECT place.number, event.created_at, event.id, event.bytes, event.kind, event.json, ");
        match self.context.visible.reader() {
            Some(_) => {
                statement.push("event.terms @> ").push_bind(vec![rows::term(TagLetter::LABEL_NAMESPACE, NAMESPACE)])
            }
            None => statement.push("false"),
        };
        statement.push(" AS labelled, (");
        self.push_conditions(&mut statement);
        statement.push(") AS fits FROM ");
        self.push_entries(&mut statement);
        statement.push(") AS entry");
        let rows = statement.build().fetch_all(connection).await?;
        self.read(&rows)
    }

    /// The conditions that the plan does not already hold to. They decide about an entry and never how many are read.
    fn push_conditions(&self, statement: &mut QueryBuilder<Postgres>) {
        statement.push("(event.expires_at IS NULL OR event.expires_at > ").push_bind(self.context.now).push(")");
        if let Some(before) = self.context.before {
            statement.push(" AND event.seq < ").push_bind(before);
        }
        if let Some(kinds) = &self.filter.kinds {
            statement.push(" AND event.kind = ANY(").push_bind(rows::kinds(kinds)).push(")");
        }
        if let Some(authors) = &self.filter.authors {
            let authors: Vec<Vec<u8>> = authors.iter().map(|author| author.0.to_vec()).collect();
            statement.push(" AND event.pubkey = ANY(").push_bind(authors).push(")");
        }
        for condition in &self.filter.tags {
            let terms: Vec<i64> = condition.values.iter().map(|value| rows::term(condition.letter, value)).collect();
            statement.push(" AND event.terms && ").push_bind(terms);
        }
    }

    /// The next entries of every stretch, under the names `place` and `event`.
    fn push_entries(&self, statement: &mut QueryBuilder<Postgres>) {
        const COLUMNS: &str = "event.seq, event.created_at, event.expires_at, event.kind, event.bytes, event.id, \
                               event.pubkey, event.terms, event.json";
        let place = &self.matches.cursors[self.due[0]].place;
        if let Place::Ids(ids) = place {
            statement.push("(SELECT 0 AS number) AS place, sledge.events AS event WHERE event.id = ANY(");
            statement.push_bind(ids.clone()).push(") AND event.created_at BETWEEN ");
            statement.push_bind(self.matches.since).push(" AND ").push_bind(self.matches.until);
            return;
        }
        self.push_places(statement);
        let oldest = -self.matches.since;
        let helping = self.helping as i64;
        if let Place::Term(_) = place {
            statement.push(
                " CROSS JOIN LATERAL (SELECT tag.id FROM sledge.tags AS tag WHERE tag.term = place.term \
                 AND (tag.newest, tag.id) > (place.newest, place.id) AND tag.newest <= ",
            );
            statement.push_bind(oldest).push(" ORDER BY tag.newest, tag.id LIMIT ").push_bind(helping);
            statement.push(") AS entry JOIN sledge.events AS event ON event.id = entry.id");
            return;
        }
        statement.push(" CROSS JOIN LATERAL (SELECT ").push(COLUMNS).push(" FROM sledge.events AS event WHERE ");
        statement.push(place.condition()).push("(-event.created_at, event.id) > (place.newest, place.id)");
        statement.push(" AND -event.created_at <= ").push_bind(oldest);
        statement.push(" ORDER BY -event.created_at, event.id LIMIT ").push_bind(helping).push(") AS event");
    }

    fn push_places(&self, statement: &mut QueryBuilder<Postgres>) {
        let (mut authors, mut kinds, mut terms) = (Vec::new(), Vec::new(), Vec::new());
        let (mut numbers, mut newest, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        for at in self.due {
            let cursor = &self.matches.cursors[*at];
            let (author, kind, term) = match &cursor.place {
                Place::Author(author) => (author.clone(), 0, 0),
                Place::AuthorKind(author, kind) => (author.clone(), *kind, 0),
                Place::Kind(kind) => (Vec::new(), *kind, 0),
                Place::Term(term) => (Vec::new(), 0, *term),
                Place::Time | Place::Ids(_) => (Vec::new(), 0, 0),
            };
            authors.push(author);
            kinds.push(kind);
            terms.push(term);
            numbers.push(*at as i32);
            newest.push(cursor.behind.0);
            ids.push(cursor.behind.1.clone());
        }
        statement.push("unnest(").push_bind(numbers).push("::integer[], ").push_bind(authors).push("::bytea[], ");
        statement.push_bind(kinds).push("::integer[], ").push_bind(terms).push("::bigint[], ");
        statement.push_bind(newest).push("::bigint[], ").push_bind(ids).push("::bytea[]");
        statement.push(") AS place (number, author, kind, term, newest, id)");
    }

    fn read(&self, rows: &[PgRow]) -> Result<Answer, Failure> {
        let mut ends: HashMap<usize, (usize, Order)> = HashMap::new();
        let mut answer = Answer::default();
        for row in rows {
            let number = row.try_get::<i32, _>(0)? as usize;
            let found = Found {
                created_at: row.try_get(1)?,
                id: rows::id(row.try_get(2)?)?,
                bytes: row.try_get::<i32, _>(3)? as usize,
                kind: Kind(row.try_get::<i32, _>(5)? as u16),
                may_be_labelled: row.try_get(6)?,
                json: row.try_get(7)?,
            };
            let end = ends.entry(number).or_insert((0, found.order()));
            *end = (end.0 + 1, end.1.max(found.order()));
            if row.try_get::<bool, _>(4)? {
                answer.found.push((number, found));
            }
        }
        for (number, (count, (Reverse(created_at), id))) in ends {
            answer.seen.insert(number);
            answer.ends.push((number, count, (-created_at, id.0.to_vec())));
        }
        Ok(answer)
    }
}
