//! Stored events for REQ, COUNT and reconciliation: a few threads take turns at the queries that are open.
//!
//! A query works for one time slice or one page, whichever ends first. The page goes to the connection's [`Outbox`]
//! with the rest of the query in it, and only when the connection has written the page does it hand the rest back
//! ([`Queries::resume`]). So a subscription has at most one page in memory, a slow reader holds up nobody, and ending a
//! subscription is dropping its rest. New queries go before resumed ones: short questions are answered quickly
//! beside long ones.

#[cfg(test)]
mod tests;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::lock;
use super::look::Look;
use super::negotiation::Negotiation;
use super::outbox::{Outbox, Outgoing, Serial};
use super::querylog::{Finished, QueryFigures, QueryLog};
use super::runqueue::{RunQueue, Work};
use crate::config::Limits;
use crate::protocol::event::author_in;
use crate::protocol::hll::Hll;
use crate::protocol::message::EoseHint;
use crate::protocol::{Filter, Visibility};
use crate::store::{PageBudget, Position, Progress, Query, Row, Scan, Store, StoreError, Wanted};

/// Bytes of event JSON in one page; one event may exceed it.
const PAGE_BYTES_MAX: usize = 64 * 1024;
/// How long the first turn of a query takes at most.
const FIRST_TURN_MAX: Duration = Duration::from_millis(2);

/// What a query found, up to a pause or its end.
#[derive(Debug)]
pub struct Page {
    /// The subscription or count that asked.
    pub serial: Serial,
    /// Rows in the order in which they are sent.
    pub rows: Vec<Row>,
    /// What follows the rows.
    pub end: PageEnd,
}

/// What follows the rows of a [`Page`].
#[derive(Debug)]
pub enum PageEnd {
    /// There is more to look for: [`Queries::resume`] with this once the page is written.
    More(Job),
    /// All stored events were sent.
    Eose(EoseHint),
    /// The answer to a COUNT.
    Count {
        /// Matching events.
        count: u64,
        /// Whether there may be more of them.
        approximate: bool,
        /// HyperLogLog registers over their authors, where NIP-45 defines them: hex.
        hll: Option<String>,
    },
    /// The query cannot be answered; the text for `CLOSED`.
    Failed(&'static str),
}

/// A query that waits for its turn.
pub struct Job {
    serial: Serial,
    outbox: Arc<Outbox>,
    task: Task,
    stage: Stage,
    worked: Duration,
    /// For the log, if the query turns out to be slow.
    asked: Box<[Filter]>,
    asked_at: u64,
    rows: u64,
}

enum Task {
    Rows {
        /// Whether some filter asked for none of its stored events, so that nobody may say they were all sent.
        unasked: bool,
    },
    Count {
        so_far: u64,
        hll: Option<Box<Hll>>,
    },
}

enum Stage {
    New(Query),
    Running(Box<dyn Scan>),
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("serial", &self.serial).field("worked", &self.worked).finish_non_exhaustive()
    }
}

impl Job {
    /// Stored events for a REQ, those before the position where live delivery takes over. `now` is in seconds since
    /// 1970.
    pub fn rows(
        outbox: &Arc<Outbox>,
        serial: Serial,
        filters: Vec<Filter>,
        limits: &Limits,
        before: Position,
        visible: Visibility,
        now: u64,
    ) -> Job {
        let unasked = filters.iter().any(|filter| filter.limit == Some(0) && !filter.matches_nothing());
        let wanted = filters.into_iter().map(|filter| wanted(filter, limits)).filter(|wanted| wanted.limit > 0);
        let query = Query { wanted: asked(wanted), now, before: Some(before), visible };
        Job::new(outbox, serial, Task::Rows { unasked }, query)
    }

    /// The number of stored events for a COUNT; limits play no part.
    pub fn count(outbox: &Arc<Outbox>, serial: Serial, filters: Vec<Filter>, visible: Visibility, now: u64) -> Job {
        let hll = Hll::for_question(&filters).map(Box::new);
        let wanted = filters.into_iter().map(|filter| Wanted { filter, limit: usize::MAX, whole_seconds: false });
        let query = Query { wanted: asked(wanted), now, before: None, visible };
        Job::new(outbox, serial, Task::Count { so_far: 0, hll }, query)
    }

    fn new(outbox: &Arc<Outbox>, serial: Serial, task: Task, query: Query) -> Job {
        let asked = query.wanted.iter().map(|wanted| wanted.filter.clone()).collect();
        let asked_at = query.now;
        let outbox = outbox.clone();
        Job { serial, outbox, task, stage: Stage::New(query), worked: Duration::ZERO, asked, asked_at, rows: 0 }
    }

    /// Whose question it is.
    pub(super) fn connection(&self) -> u64 {
        self.outbox.connection
    }

    /// The subscription or count that asked.
    pub fn serial(&self) -> Serial {
        self.serial
    }

    /// How long its next turn may take, of a slice of this length. The first is short: all new questions have theirs one
    /// after another, and most need no second.
    fn turn_of(&self, slice: Duration) -> Duration {
        if self.worked.is_zero() { slice.min(FIRST_TURN_MAX) } else { slice }
    }

    fn asks_nothing(&self) -> bool {
        matches!(&self.stage, Stage::New(query) if query.wanted.is_empty())
    }

    /// Works until the slice or a page is full.
    fn work(&mut self, store: &dyn Store, slice: Duration) -> Result<(Vec<Row>, Progress), StoreError> {
        let started = Instant::now();
        let until = started + slice;
        let mut rows = Vec::new();
        if let Stage::New(query) = &mut self.stage {
            let query = Query { wanted: std::mem::take(&mut query.wanted), ..query.clone() };
            self.stage = Stage::Running(store.scan(query)?);
        }
        let Stage::Running(scan) = &mut self.stage else { unreachable!("the scan was just begun") };
        let progress = match &mut self.task {
            Task::Rows { .. } => scan.page(PageBudget { bytes_max: PAGE_BYTES_MAX, until }, &mut rows)?,
            Task::Count { so_far, hll } => {
                let (more, progress) = match hll {
                    Some(hll) => count_authors(&mut **scan, hll, until)?,
                    None => scan.count(until)?,
                };
                *so_far += more;
                progress
            }
        };
        let worked = started.elapsed();
        self.worked += worked;
        self.outbox.add_query_time(worked);
        self.rows += rows.len() as u64;
        Ok((rows, progress))
    }

    /// The query as the log wants it, at its end.
    fn finished(&self, progress: Progress) -> Finished<'_> {
        let rows = match self.task {
            Task::Count { so_far, .. } => so_far,
            Task::Rows { .. } => self.rows,
        };
        let closed = progress == Progress::Paused;
        Finished { filters: &self.asked, asked_at: self.asked_at, worked: self.worked, rows, closed }
    }

    /// What the client is told when the query has come to an end, or must.
    fn end(&self, progress: Progress) -> PageEnd {
        match (&self.task, progress) {
            (Task::Count { so_far, hll }, _) => PageEnd::Count {
                count: *so_far,
                approximate: progress != Progress::Finished,
                hll: hll.as_ref().map(|hll| hll.to_hex()),
            },
            (Task::Rows { .. }, Progress::Paused) => PageEnd::Failed("error: the query took too long; narrow it"),
            (Task::Rows { unasked: false }, Progress::Finished) => PageEnd::Eose(EoseHint::Finish),
            (Task::Rows { unasked: false }, Progress::MoreOlder) => PageEnd::Eose(EoseHint::More),
            (Task::Rows { .. }, _) => PageEnd::Eose(EoseHint::Unknown),
        }
    }
}

/// Counts on until then, and the authors into the registers; for that the events themselves are needed.
fn count_authors(scan: &mut dyn Scan, hll: &mut Hll, until: Instant) -> Result<(u64, Progress), StoreError> {
    let (mut counted, mut rows) = (0, Vec::new());
    loop {
        let progress = scan.page(PageBudget { bytes_max: PAGE_BYTES_MAX, until }, &mut rows)?;
        counted += rows.len() as u64;
        rows.drain(..).filter_map(|row| author_in(&row.json)).for_each(|author| hll.add(&author));
        if progress != Progress::Paused || Instant::now() >= until {
            return Ok((counted, progress));
        }
    }
}

/// Without those that ask for nothing.
fn asked(wanted: impl Iterator<Item = Wanted>) -> Vec<Wanted> {
    wanted.filter(|wanted| !wanted.filter.matches_nothing()).collect()
}

/// The limit of a filter: the client's, within the relay's. Only where the relay cuts does it go on to the end of
/// the second, so that a client that pages by `until` misses nothing (NIP-67).
fn wanted(filter: Filter, limits: &Limits) -> Wanted {
    let asked = filter.limit.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let limit = asked.unwrap_or(limits.limit_default).min(limits.limit_max);
    Wanted { filter, limit, whole_seconds: asked != Some(limit) }
}

fn send(outbox: &Outbox, serial: Serial, rows: Vec<Row>, end: PageEnd) {
    outbox.push(Outgoing::Page(Box::new(Page { serial, rows, end })));
}

/// The query threads.
pub struct Queries {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    store: Arc<dyn Store>,
    slice: Duration,
    time_max: Duration,
    log: QueryLog,
    queue: Mutex<RunQueue>,
    changed: Condvar,
}

impl Queries {
    /// Starts `threads` threads.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(store: Arc<dyn Store>, limits: &Limits, threads: usize) -> std::io::Result<Queries> {
        let (slice, time_max) = (limits.query_slice(), limits.query_time_max());
        let log = QueryLog::default();
        let shared = Shared { store, slice, time_max, log, queue: Mutex::default(), changed: Condvar::new() };
        let queries = Queries { shared: Arc::new(shared), threads: Mutex::default() };
        for number in 0..threads {
            let shared = queries.shared.clone();
            let thread = std::thread::Builder::new().name(format!("query-{number}")).spawn(move || shared.run())?;
            lock(&queries.threads).push(thread);
        }
        Ok(queries)
    }

    /// Begins a query. The answer goes to the job's outbox; a question about nothing is answered at once.
    pub fn begin(&self, job: Job) {
        if job.asks_nothing() {
            return send(&job.outbox, job.serial, Vec::new(), job.end(Progress::Finished));
        }
        self.shared.enqueue(|queue| queue.begin(Work::Query(job)));
    }

    /// Goes on with a query whose last page was written.
    pub fn resume(&self, job: Job) {
        self.shared.enqueue(|queue| queue.resume(Work::Query(job)));
    }

    /// Has the next message of a reconciliation answered; the answer goes to its connection.
    pub fn negotiate(&self, negotiation: Box<Negotiation>) {
        self.shared.enqueue(|queue| queue.begin(Work::Negotiation(negotiation)));
    }

    /// Has an event looked for; the answer goes to its connection.
    pub(super) fn look(&self, look: Look) {
        self.shared.enqueue(|queue| queue.begin(Work::Look(look)));
    }

    /// From now on queries that run for longer are logged.
    pub fn log_from(&self, slow: Option<Duration>) {
        self.shared.log.log_from(slow);
    }

    /// What queries have cost.
    pub fn figures(&self) -> QueryFigures {
        let queue = lock(&self.shared.queue);
        let waiting = queue.len();
        drop(queue);
        self.shared.log.figures(waiting)
    }

    /// Drops what waits and ends the threads, each after its current slice.
    pub fn stop(&self) {
        self.shared.enqueue(|queue| *queue = RunQueue::stopped());
        self.shared.changed.notify_all();
        for thread in lock(&self.threads).drain(..) {
            if thread.join().is_err() {
                tracing::error!("a query thread had panicked");
            }
        }
    }
}

impl Drop for Queries {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn enqueue(&self, change: impl FnOnce(&mut RunQueue)) {
        let mut queue = lock(&self.queue);
        if !queue.stopping {
            change(&mut queue);
            self.changed.notify_one();
        }
    }

    fn run(&self) {
        while let Some(work) = self.wait() {
            // A panic in one query must not take the thread, and with it all other queries, along.
            match work {
                Work::Query(job) => {
                    let (outbox, serial) = (job.outbox.clone(), job.serial);
                    self.or_else(|| self.turn(job), || send(&outbox, serial, Vec::new(), PageEnd::Failed(READ_ERROR)));
                }
                Work::Negotiation(negotiation) => {
                    let failed = negotiation.failed();
                    self.or_else(|| self.negotiation_turn(negotiation), failed);
                }
                Work::Look(look) => self.or_else(|| look.turn(&*self.store), || {}),
            }
        }
    }

    fn or_else(&self, turn: impl FnOnce(), panicked: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(turn)).is_err() {
            tracing::error!("a query panicked");
            panicked();
        }
    }

    fn negotiation_turn(&self, negotiation: Box<Negotiation>) {
        if let Some(rest) = negotiation.turn(&*self.store, self.slice, self.time_max) {
            self.enqueue(|queue| queue.resume(Work::Negotiation(rest)));
        }
    }

    fn wait(&self) -> Option<Work> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stopping {
                return None;
            }
            if let Some(work) = queue.next() {
                return Some(work);
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One turn of a query: the page goes out, or the query back into the queue when it found nothing yet.
    fn turn(&self, mut job: Job) {
        if job.outbox.is_closed() {
            return;
        }
        let (rows, progress) = match job.work(&*self.store, job.turn_of(self.slice)) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "a query failed");
                return send(&job.outbox, job.serial, Vec::new(), PageEnd::Failed(READ_ERROR));
            }
        };
        let goes_on = progress == Progress::Paused && job.worked < self.time_max;
        if goes_on && rows.is_empty() {
            return self.enqueue(|queue| queue.resume(Work::Query(job)));
        }
        let (outbox, serial) = (job.outbox.clone(), job.serial);
        let end = if goes_on {
            PageEnd::More(job)
        } else {
            self.log.note(&job.finished(progress), &*self.store);
            job.end(progress)
        };
        send(&outbox, serial, rows, end);
    }
}

const READ_ERROR: &str = "error: the relay could not read its store";
