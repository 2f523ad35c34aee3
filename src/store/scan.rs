//! Answering a query page by page: one stream of matches a filter, and their union. Where the matches come from is the
//! business of a [`Source`]; the embedded store has one (`matches`), Postgres another.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::protocol::item::Item;
use crate::protocol::{EventId, Filter};

use super::{PageBudget, Progress, Row, Scan, StoreError, Wanted};

/// The clock is looked at once in this many candidates.
const CANDIDATES_A_LOOK: u32 = 32;
/// How many candidates are looked at to learn whether there is more behind a limit (NIP-67).
const PEEK_CANDIDATES_MAX: u32 = 512;
/// How long that look may take: the hint is worth no more.
const PEEK_TIME_MAX: Duration = Duration::from_millis(5);
/// The same where the second must be read to its end; it is there so that nothing is without an end.
const PEEK_SECOND_TIME_MAX: Duration = Duration::from_secs(60);

/// The matches of one filter, newest first, then by id.
pub(super) trait Source: Send + Sized {
    /// What the sources of a query share: the store, and what of it the query may see.
    type Context: Send;

    /// Looks at the next candidate, and appends it to `ready` if it matches; false at the end. Where only a closer look
    /// tells the order of several candidates, it appends all of them.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn read_ahead(
        &mut self,
        filter: &Filter,
        context: &mut Self::Context,
        ready: &mut VecDeque<Match>,
    ) -> Result<bool, StoreError>;

    /// From now on only the number of matches is wanted, not their JSON.
    fn count_only(context: &mut Self::Context);

    /// How many candidates may be looked at before the clock is looked at again: few where each may take long.
    const CANDIDATES_A_LOOK: u32 = CANDIDATES_A_LOOK;

    /// The query rests: JSON that was read ahead must be forgotten, since it may be erased before the next page.
    fn rest(&mut self) {}
}

/// A query in progress.
pub(super) struct UnionScan<S: Source> {
    streams: Vec<Stream<S>>,
    context: S::Context,
    /// `created_at` of the last row that was returned.
    last_second: Option<u64>,
}

/// The matches of one filter, newest first.
struct Stream<S> {
    wanted: Wanted,
    source: S,
    /// Matches that were read ahead, in order.
    ready: VecDeque<Match>,
    /// Rows that may still be taken.
    left: usize,
    state: State,
    /// The second at which the relay's own limit ended it.
    floor: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// Every match was taken.
    Finished,
    /// The limit was reached. The second of the next match, if that was found out.
    Limited(Option<u64>),
}

/// A match as a source finds it.
#[derive(Debug)]
pub(super) struct Match {
    pub(super) created_at: u64,
    pub(super) id: EventId,
    /// The canonical JSON; empty where only the number is wanted.
    pub(super) json: Bytes,
}

impl Match {
    /// Newest first, then the lowest id.
    pub(super) fn order(&self) -> (std::cmp::Reverse<u64>, EventId) {
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
    fn one_more(&mut self, candidates_a_look: u32) -> bool {
        self.candidates += 1;
        self.candidates < self.candidates_max
            && (!self.candidates.is_multiple_of(candidates_a_look) || Instant::now() < self.until)
    }
}

impl<S: Source> UnionScan<S> {
    /// The union of what is wanted; each filter is matched from the source that `source` makes for it.
    pub(super) fn new(wanted: Vec<Wanted>, context: S::Context, source: impl Fn(&Wanted) -> S) -> Self {
        let stream = |wanted: Wanted| {
            let (source, left) = (source(&wanted), wanted.limit);
            Stream { wanted, source, ready: VecDeque::new(), left, state: State::Running, floor: None }
        };
        UnionScan { streams: wanted.into_iter().map(stream).collect(), context, last_second: None }
    }

    /// The context, for what is settled before the first page.
    pub(super) fn context(&mut self) -> &mut S::Context {
        &mut self.context
    }

    /// Makes every running stream have its next match ready; false when the work ran out first.
    fn make_ready(&mut self, work: &mut Work) -> Result<bool, StoreError> {
        for stream in &mut self.streams {
            if stream.state == State::Running && !stream.make_ready(&mut self.context, work)? {
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
            if stream.state == State::Running && stream.ready.front().is_some_and(|head| head.id == taken.id) {
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
                stream.settle_limit(second, &mut self.context)?;
            }
        }
        Ok(())
    }

    fn pause(&mut self) -> Progress {
        self.streams.iter_mut().for_each(|stream| stream.source.rest());
        Progress::Paused
    }

    fn progress(&self) -> Progress {
        let mut rest = self.streams.iter().filter(|stream| stream.state != State::Finished).peekable();
        if rest.peek().is_none() {
            return Progress::Finished;
        }
        let next_of = |stream: &Stream<S>| match stream.state {
            State::Limited(next) => next,
            State::Running | State::Finished => stream.ready.front().map(|head| head.created_at),
        };
        let all_older =
            rest.all(|stream| next_of(stream).zip(self.last_second).is_some_and(|(next, last)| next < last));
        if all_older { Progress::MoreOlder } else { Progress::LimitReached }
    }
}

impl<S: Source> Scan for UnionScan<S> {
    fn page(&mut self, budget: PageBudget, rows: &mut Vec<Row>) -> Result<Progress, StoreError> {
        let mut work = Work::until(budget.until);
        let mut bytes = 0;
        loop {
            self.settle_limits()?;
            if !self.make_ready(&mut work)? {
                return Ok(self.pause());
            }
            let Some(taken) = self.take_next() else { return Ok(self.progress()) };
            self.last_second = Some(taken.created_at);
            bytes += taken.json.len();
            rows.push(Row { id: taken.id, created_at: taken.created_at, json: taken.json });
            if bytes >= budget.bytes_max {
                return Ok(self.pause());
            }
        }
    }

    fn items(&mut self, until: Instant, items: &mut Vec<Item>) -> Result<Progress, StoreError> {
        S::count_only(&mut self.context);
        let mut rows = Vec::new();
        let progress = self.page(PageBudget { bytes_max: usize::MAX, until }, &mut rows)?;
        items.extend(rows.iter().map(|row| Item { created_at: row.created_at, id: row.id }));
        Ok(progress)
    }

    fn count(&mut self, until: Instant) -> Result<(u64, Progress), StoreError> {
        let mut work = Work::until(until);
        S::count_only(&mut self.context);
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

impl<S: Source> Stream<S> {
    fn take(&mut self) -> Option<Match> {
        self.left = self.left.saturating_sub(1);
        self.ready.pop_front()
    }

    /// Has a match in `ready`, or is known to be finished; false when the work ran out first.
    fn make_ready(&mut self, context: &mut S::Context, work: &mut Work) -> Result<bool, StoreError> {
        while self.ready.is_empty() {
            if !work.one_more(S::CANDIDATES_A_LOOK) {
                return Ok(false);
            }
            if !self.source.read_ahead(&self.wanted.filter, context, &mut self.ready)? {
                self.state = State::Finished;
                return Ok(true);
            }
        }
        Ok(true)
    }

    fn settle_limit(&mut self, second: Option<u64>, context: &mut S::Context) -> Result<(), StoreError> {
        if self.wanted.limit == 0 {
            self.state = State::Limited(None);
            return Ok(());
        }
        // To end a second is more than a hint, so only the number of candidates bounds that look.
        let time = if self.wanted.whole_seconds { PEEK_SECOND_TIME_MAX } else { PEEK_TIME_MAX };
        let mut work = Work { until: Instant::now() + time, candidates: 0, candidates_max: PEEK_CANDIDATES_MAX };
        let known = self.make_ready(context, &mut work)?;
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
