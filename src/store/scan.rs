//! Answering a query from the embedded store, page by page: one stream of matches a filter, and their union.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::protocol::event::Fields;
use crate::protocol::item::Item;
use crate::protocol::slot::{self, Slot};
use crate::protocol::supersede::is_expired;
use crate::protocol::{EventId, Filter, PublicKey, Visibility};

use super::embedded::Files;
use super::merge::{Candidate, Merge};
use super::plan::{Plan, plan};
use super::record::{Record, StoredEvent};
use super::schema::{Place, Prefix};
use super::{PageBudget, Position, Progress, Query, Row, Scan, StoreError, Wanted};

/// The clock is looked at once in this many candidates.
const CANDIDATES_A_LOOK: u32 = 32;
/// Authors whose former settings a query remembers.
const FORMER_AUTHORS_MAX: usize = 1_024;
/// How many candidates are looked at to learn whether there is more behind a limit (NIP-67).
const PEEK_CANDIDATES_MAX: u32 = 512;
/// How long that look may take: the hint is worth no more.
const PEEK_TIME_MAX: Duration = Duration::from_millis(5);

/// A query in progress.
pub(super) struct EmbeddedScan {
    files: Arc<Files>,
    streams: Vec<Stream>,
    view: View,
    /// `created_at` of the last row that was returned.
    last_second: Option<u64>,
    buffer: Vec<u8>,
}

/// What of the store a query may see.
#[derive(Clone)]
struct View {
    now: u64,
    /// Only records before this offset.
    before: u64,
    /// Whether rows are wanted, or only their number.
    with_json: bool,
    visible: Visibility,
    /// The filter by which settings are asked for, where it is not that of the stream.
    asked_by: Option<Filter>,
    /// The former versions of settings of those authors whose settings were met.
    former: RefCell<HashMap<PublicKey, HashSet<EventId>>>,
}

/// The matches of one filter, newest first.
struct Stream {
    wanted: Wanted,
    source: Source,
    /// Matches that were read ahead, in order.
    ready: VecDeque<Match>,
    /// Rows that may still be taken.
    left: usize,
    state: State,
    /// The second at which the relay's own limit ended it.
    floor: Option<u64>,
}

enum Source {
    Ranges(Merge),
    /// By id: to be looked up, then in order.
    Ids(Vec<EventId>),
    Places(std::vec::IntoIter<Place>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// Every match was taken.
    Finished,
    /// The limit was reached. The second of the next match, if that was found out.
    Limited(Option<u64>),
}

#[derive(Debug)]
struct Match {
    created_at: u64,
    id: EventId,
    offset: u64,
    json: Bytes,
}

impl Match {
    /// Newest first, then the lowest id.
    fn order(&self) -> (std::cmp::Reverse<u64>, EventId) {
        (std::cmp::Reverse(self.created_at), self.id)
    }
}

/// How much more work one call may do.
struct Work {
    until: Instant,
    candidates: u32,
    candidates_max: u32,
}

impl Work {
    fn until(until: Instant) -> Self {
        Work { until, candidates: 0, candidates_max: u32::MAX }
    }

    /// Counts a candidate; false when it is time to stop. The first few are always allowed, so that every call gets on.
    fn one_more(&mut self) -> bool {
        self.candidates += 1;
        self.candidates < self.candidates_max
            && (!self.candidates.is_multiple_of(CANDIDATES_A_LOOK) || Instant::now() < self.until)
    }
}

impl EmbeddedScan {
    pub(super) fn new(files: Arc<Files>, query: Query) -> Self {
        let offset = |position: Position| position.0.saturating_add_signed(-files.base).max(files.exact_from);
        let before = query.before.map_or(u64::MAX, offset);
        let (asked_by, former) = (None, RefCell::default());
        let view = View { now: query.now, before, with_json: true, visible: query.visible, asked_by, former };
        let streams = query.wanted.into_iter().map(Stream::new).collect();
        EmbeddedScan { files, streams, view, last_second: None, buffer: Vec::new() }
    }

    /// Has settings judged by what this filter asks for, whatever the streams' own filters add to find things.
    pub(super) fn asked_by(mut self, filter: Filter) -> Self {
        self.view.asked_by = Some(filter);
        self
    }

    /// Makes every running stream have its next match ready; false when the work ran out first.
    fn make_ready(&mut self, work: &mut Work) -> Result<bool, StoreError> {
        for stream in &mut self.streams {
            if stream.state == State::Running && !stream.make_ready(&self.files, &self.view, work, &mut self.buffer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The next match of the union, taken from every stream that has it. Nothing older than the second at which the
    /// relay's own limit ended a stream: a client that pages on by `until` starts from the oldest row it got, and what
    /// that stream has left must lie behind it.
    fn take_next(&mut self) -> Option<Match> {
        let floor = self.streams.iter().filter_map(|stream| stream.floor).max().unwrap_or(0);
        let heads = self.streams.iter().enumerate();
        let heads = heads.filter(|(_, stream)| stream.state == State::Running);
        let heads = heads.filter(|(_, stream)| stream.ready.front().is_none_or(|head| head.created_at >= floor));
        let (first, _) =
            heads.filter_map(|(i, stream)| Some((i, stream.ready.front()?.order()))).min_by_key(|(_, o)| *o)?;
        let taken = self.streams[first].take()?;
        for stream in &mut self.streams[first + 1..] {
            if stream.state == State::Running && stream.ready.front().is_some_and(|head| head.offset == taken.offset) {
                stream.take();
            }
        }
        Some(taken)
    }

    /// Settles streams that have reached their limit: on to the end of the second, or stop and know what is behind.
    fn settle_limits(&mut self) -> Result<(), StoreError> {
        let second = self.last_second;
        for stream in &mut self.streams {
            if stream.state == State::Running && stream.left == 0 {
                stream.settle_limit(second, &self.files, &self.view, &mut self.buffer)?;
            }
        }
        Ok(())
    }

    fn progress(&self) -> Progress {
        let mut rest = self.streams.iter().filter(|stream| stream.state != State::Finished).peekable();
        if rest.peek().is_none() {
            return Progress::Finished;
        }
        let next_of = |stream: &Stream| match stream.state {
            State::Limited(next) => next,
            State::Running | State::Finished => stream.ready.front().map(|head| head.created_at),
        };
        let all_older =
            rest.all(|stream| next_of(stream).zip(self.last_second).is_some_and(|(next, last)| next < last));
        if all_older { Progress::MoreOlder } else { Progress::LimitReached }
    }
}

impl Scan for EmbeddedScan {
    fn page(&mut self, budget: PageBudget, rows: &mut Vec<Row>) -> Result<Progress, StoreError> {
        let mut work = Work::until(budget.until);
        let mut bytes = 0;
        loop {
            self.settle_limits()?;
            if !self.make_ready(&mut work)? {
                return Ok(Progress::Paused);
            }
            let Some(taken) = self.take_next() else { return Ok(self.progress()) };
            self.last_second = Some(taken.created_at);
            bytes += taken.json.len();
            rows.push(Row { id: taken.id, created_at: taken.created_at, json: taken.json });
            if bytes >= budget.bytes_max {
                return Ok(Progress::Paused);
            }
        }
    }

    fn items(&mut self, until: Instant, items: &mut Vec<Item>) -> Result<Progress, StoreError> {
        self.view.with_json = false;
        let mut rows = Vec::new();
        let progress = self.page(PageBudget { bytes_max: usize::MAX, until }, &mut rows)?;
        items.extend(rows.iter().map(|row| Item { created_at: row.created_at, id: row.id }));
        Ok(progress)
    }

    fn count(&mut self, until: Instant) -> Result<(u64, Progress), StoreError> {
        let mut work = Work::until(until);
        self.view.with_json = false;
        let mut counted = 0;
        for stream in &mut self.streams {
            stream.left = usize::MAX;
        }
        while self.make_ready(&mut work)? {
            match self.take_next() {
                Some(_) => counted += 1,
                None => return Ok((counted, Progress::Finished)),
            }
        }
        Ok((counted, Progress::Paused))
    }
}

impl Stream {
    fn new(wanted: Wanted) -> Self {
        let (since, until) = (wanted.filter.since.unwrap_or(0), wanted.filter.until.unwrap_or(u64::MAX));
        let source = match plan(&wanted.filter) {
            Plan::Nothing => Source::Ids(Vec::new()),
            Plan::Ids(ids) => Source::Ids(ids),
            Plan::Ranges(prefixes) => Source::Ranges(Merge::new(prefixes, since, until)),
        };
        let left = wanted.limit;
        Stream { wanted, source, ready: VecDeque::new(), left, state: State::Running, floor: None }
    }

    fn take(&mut self) -> Option<Match> {
        self.left = self.left.saturating_sub(1);
        self.ready.pop_front()
    }

    /// Has a match in `ready`, or is known to be finished; false when the work ran out first.
    fn make_ready(
        &mut self,
        files: &Files,
        view: &View,
        work: &mut Work,
        buffer: &mut Vec<u8>,
    ) -> Result<bool, StoreError> {
        while self.ready.is_empty() {
            if !work.one_more() {
                return Ok(false);
            }
            if !self.read_ahead(files, view, buffer)? {
                self.state = State::Finished;
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// Reads the next candidate, with those whose order only the full ids decide; false at the end.
    fn read_ahead(&mut self, files: &Files, view: &View, buffer: &mut Vec<u8>) -> Result<bool, StoreError> {
        if let Source::Ids(ids) = &mut self.source {
            let places = places_in_order(std::mem::take(ids), files, buffer)?;
            self.source = Source::Places(places.into_iter());
        }
        match &mut self.source {
            Source::Places(places) => {
                let Some(place) = places.next() else { return Ok(false) };
                self.ready.extend(files.read_match(place, &self.wanted.filter, view, buffer));
            }
            Source::Ranges(merge) => {
                let Some(first) = merge.next(&files.index)? else { return Ok(false) };
                let filter = &self.wanted.filter;
                let read = |candidate: Candidate, buffer: &mut Vec<u8>| {
                    let kind_fits = filter.kinds.as_ref().is_none_or(|kinds| kinds.contains(&candidate.kind));
                    kind_fits.then(|| files.read_match(candidate.place, filter, view, buffer)).flatten()
                };
                self.ready.extend(read(first, buffer));
                while merge.peek(&files.index)?.is_some_and(|next| next.ties_with(&first.suffix)) {
                    let Some(tied) = merge.next(&files.index)? else { break };
                    self.ready.extend(read(tied, buffer));
                }
                self.ready.make_contiguous().sort_by_key(Match::order);
            }
            Source::Ids(_) => {}
        }
        Ok(true)
    }

    fn settle_limit(
        &mut self,
        second: Option<u64>,
        files: &Files,
        view: &View,
        buffer: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        if self.wanted.limit == 0 {
            self.state = State::Limited(None);
            return Ok(());
        }
        let until = Instant::now() + PEEK_TIME_MAX;
        let mut work = Work { until, candidates: 0, candidates_max: PEEK_CANDIDATES_MAX };
        let known = self.make_ready(files, view, &mut work, buffer)?;
        let next = self.ready.front().map(|head| head.created_at);
        if self.state == State::Finished {
            return Ok(());
        }
        let whole_seconds = self.wanted.whole_seconds;
        if known && next.is_some() && next == second && whole_seconds {
            self.left = 1;
        } else {
            self.state = State::Limited(next);
            self.floor = second.filter(|_| whole_seconds);
        }
        Ok(())
    }
}

/// Looks ids up and puts the places of those that are there in answer order; whether they match is found out when they are
/// read. Holds places, not events: a thousand ids may be a thousand large events.
fn places_in_order(ids: Vec<EventId>, files: &Files, buffer: &mut Vec<u8>) -> Result<Vec<Place>, StoreError> {
    let mut found = Vec::new();
    for id in ids {
        let Some(place) = files.place_of(&id)? else { continue };
        let created_at = match files.log.read_packed(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => event.created_at,
            Ok((Record::Packed(packed), _)) => packed.header.created_at,
            Ok(_) => continue, // erased since it was looked up
            Err(error) => {
                tell_unreadable(&error);
                continue;
            }
        };
        found.push(((std::cmp::Reverse(created_at), id), place));
    }
    found.sort_unstable_by_key(|(order, _)| *order);
    Ok(found.into_iter().map(|(_, place)| place).collect())
}

fn tell_unreadable(error: &StoreError) {
    tracing::error!("an event cannot be read and is left out of an answer: {error}; run `sledge verify`");
}

impl View {
    /// Whether a version of settings is named by another one. Each author's are looked up once a query.
    fn is_former(&self, files: &Files, event: &StoredEvent<'_>) -> bool {
        let mut former = self.former.borrow_mut();
        if former.len() >= FORMER_AUTHORS_MAX {
            former.clear();
        }
        former.entry(event.pubkey).or_insert_with(|| files.former_versions(&event.pubkey)).contains(&event.id)
    }
}

impl Files {
    /// The versions of an author's settings that another one names. None where the index cannot be read, which the query
    /// finds out by itself.
    pub(super) fn former_versions(&self, author: &PublicKey) -> HashSet<EventId> {
        let mut merge = Merge::new(vec![Prefix::author_kind(author, slot::KIND)], 0, u64::MAX);
        let (mut versions, mut buffer) = (Vec::new(), Vec::new());
        while let Ok(Some(candidate)) = merge.next(&self.index) {
            let place = candidate.place;
            if let Ok((Record::Put(event), _)) = self.log.read(place.offset, place.read_len(), &mut buffer)
                && event.pubkey == *author
            {
                versions.extend(event.settings_version());
            }
        }
        Slot::new(versions).former()
    }

    /// Reads a record and gives it back if it is a visible event that matches. What cannot be read is logged.
    fn read_match(&self, place: Place, filter: &Filter, view: &View, buffer: &mut Vec<u8>) -> Option<Match> {
        if place.offset >= view.before {
            return None;
        }
        let event = match self.log.read(place.offset, place.read_len(), buffer) {
            Ok((Record::Put(event), _)) => event,
            Ok(_) => return None, // erased or taken out after the index was read
            Err(error) => {
                tell_unreadable(&error);
                return None;
            }
        };
        if is_expired(event.expiration, view.now) || !filter.matches(&event) {
            return None;
        }
        let asked_by = view.asked_by.as_ref().unwrap_or(filter);
        if !view.visible.answers(asked_by, &event, || view.is_former(self, &event)) {
            return None;
        }
        let (created_at, id) = (event.created_at(), event.id);
        let json = match event.json {
            _ if !view.with_json => Bytes::new(),
            Cow::Borrowed(json) => Bytes::copy_from_slice(json),
            Cow::Owned(json) => Bytes::from(json),
        };
        Some(Match { created_at, id, offset: place.offset, json })
    }
}
