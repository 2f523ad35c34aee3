//! The one thread that writes: it gathers what waits into a batch, has it stored, answers, and passes it to fan-out.
//!
//! Submitting never blocks a thread: where the queue is full the submitter is woken when there is room, and does not
//! read its socket until then. Ephemeral events go through the same queue, so that a connection's events keep their
//! order, but never to the store.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::fanout::{Epoch, Fanout};
use super::ingest::Sender;
use super::lock;
use super::outbox::{Outbox, Outgoing};
use super::policy::admin::{Chore, Desk};
use super::policy::{Policy, members, trust};
use super::sweeper::Sweeper;
use crate::config::Storage;
use crate::protocol::message;
use crate::protocol::supersede::{Verdict, is_expired};
use crate::protocol::{Event, Verified};
use crate::store::{FromElsewhere, Position, Store, StoreError};

/// An event on its way to the store, and who waits for the answer.
pub struct Submission {
    /// A good event that passed the ingest stages.
    pub event: Verified<Event>,
    /// Gets the `OK` once the event is durable.
    pub reply: Arc<Outbox>,
    /// Who sent it.
    pub sender: Sender,
}

impl Submission {
    /// Bytes of the event's JSON.
    pub fn bytes(&self) -> usize {
        self.event.canonical().json.len()
    }

    /// Sends the `OK`.
    pub fn answer(&self, accepted: bool, text: &str) {
        self.reply.push(Outgoing::Answer(message::ok(&self.event.id, accepted, text)));
    }
}

/// The writer thread and its queue.
pub struct Writer {
    shared: Arc<Shared>,
    ended: Mutex<mpsc::Receiver<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Why the last write failed, and when.
    problem: Mutex<Option<Problem>>,
    events_max: usize,
    bytes_max: usize,
}

#[derive(Default)]
struct Queue {
    submissions: VecDeque<Submission>,
    bytes: usize,
    /// Who waits for room.
    blocked: Vec<Waker>,
    /// Other work; each has one turn between two batches.
    chores: VecDeque<Chore>,
    sweep: bool,
    /// Other processes may have stored or passed on something.
    news: bool,
    stopping: bool,
}

/// Why a write failed.
#[derive(Clone, Copy)]
struct Problem {
    text: &'static str,
    at: Instant,
    /// Whether only a restart mends it.
    lasts: bool,
}

/// For how long after the last failed write the store counts as not taking any.
const PROBLEM_TOLD_TIME: Duration = Duration::from_secs(60);

/// What the writer does next.
struct Work {
    batch: Vec<Submission>,
    chore: Option<Chore>,
    sweep: bool,
    news: bool,
}

const STOPPING: &str = "error: the relay is stopping";

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system refuses it.
    pub fn start(
        store: Arc<dyn Store>,
        fanout: Arc<Fanout>,
        clock: Clock,
        policy: Arc<Policy>,
        settings: &Storage,
    ) -> std::io::Result<Writer> {
        let trust = policy.start_trust()?;
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            problem: Mutex::default(),
            events_max: settings.writer_queue_events_max,
            bytes_max: settings.writer_queue_bytes_max,
        });
        let (ending, ended) = mpsc::channel();
        let work = Loop {
            shared: shared.clone(),
            store,
            fanout,
            clock,
            policy,
            trust,
            batch_events_max: settings.batch_events_max,
            sweeper: Sweeper::new(settings.expiry_sweep()),
            failing: false,
            deaf: false,
        };
        std::thread::Builder::new().name("writer".to_owned()).spawn(move || {
            // Dropped last, also when the loop panics.
            let _ending: mpsc::Sender<()> = ending;
            let _refuse_rest = RefuseRest(work.shared.clone());
            work.run();
        })?;
        Ok(Writer { shared, ended: Mutex::new(ended) })
    }

    /// Queues the submission in `slot`, leaving it empty. `Pending` while there is no room; the task is woken then.
    /// A stopping relay takes nothing more and answers so.
    pub fn poll_submit(&self, cx: &mut Context<'_>, slot: &mut Option<Box<Submission>>) -> Poll<()> {
        self.shared.poll_submit(cx, slot)
    }

    /// The way in for threads that may wait.
    pub fn entrance(&self) -> Entrance {
        Entrance(self.shared.clone())
    }

    /// Has work done on the writer's thread, between batches. A stopping relay drops it.
    pub fn enqueue(&self, chore: Chore) {
        let mut queue = lock(&self.shared.queue);
        if !queue.stopping {
            queue.chores.push_back(chore);
        }
        drop(queue);
        self.shared.changed.notify_one();
    }

    /// Events and bytes that wait.
    pub fn queued(&self) -> (usize, usize) {
        let queue = lock(&self.shared.queue);
        (queue.submissions.len(), queue.bytes)
    }

    /// Why the store takes no writes at `now`. A problem that may pass is told for a while after the last write that
    /// failed; then the next write shows whether it has passed.
    pub fn problem(&self, now: Instant) -> Option<&'static str> {
        let problem = (*lock(&self.shared.problem))?;
        let is_present = problem.lasts || now.saturating_duration_since(problem.at) < PROBLEM_TOLD_TIME;
        is_present.then_some(problem.text)
    }

    /// Has expired events removed now rather than at the next round.
    pub fn sweep(&self) {
        lock(&self.shared.queue).sweep = true;
        self.shared.changed.notify_one();
    }

    /// What a store is to call when other processes have stored something ([`Store::follow`]).
    pub fn news_bell(&self) -> Arc<dyn Fn() + Send + Sync> {
        let shared = self.shared.clone();
        Arc::new(move || {
            lock(&shared.queue).news = true;
            shared.changed.notify_one();
        })
    }

    /// Takes nothing more, writes what was taken, and waits for that until `deadline`. Returns whether it was done.
    pub fn stop(&self, deadline: Instant) -> bool {
        self.shared.stop();
        let left = deadline.saturating_duration_since(Instant::now());
        // The thread sends nothing; the channel closes when it ends.
        lock(&self.ended).recv_timeout(left) == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

/// The way in for threads that may wait: it lets them wait for room.
#[derive(Clone)]
pub struct Entrance(Arc<Shared>);

impl Entrance {
    /// Queues a submission.
    pub fn submit(&self, submission: Box<Submission>) {
        struct Unpark(std::thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let (mut cx, mut slot) = (Context::from_waker(&waker), Some(submission));
        while self.0.poll_submit(&mut cx, &mut slot).is_pending() {
            std::thread::park();
        }
    }
}

impl Shared {
    fn poll_submit(&self, cx: &mut Context<'_>, slot: &mut Option<Box<Submission>>) -> Poll<()> {
        let Some(submission) = slot.take() else {
            return Poll::Ready(());
        };
        let mut queue = lock(&self.queue);
        if queue.stopping {
            drop(queue);
            submission.answer(false, STOPPING);
            return Poll::Ready(());
        }
        let bytes = submission.bytes();
        let has_room = queue.submissions.len() < self.events_max
            && (queue.bytes + bytes <= self.bytes_max || queue.submissions.is_empty());
        if !has_room {
            if !queue.blocked.iter().any(|waker| waker.will_wake(cx.waker())) {
                queue.blocked.push(cx.waker().clone());
            }
            *slot = Some(submission);
            return Poll::Pending;
        }
        // The thread waits only on an empty queue, and a needless wake is a system call.
        let may_wait = queue.submissions.is_empty();
        queue.bytes += bytes;
        queue.submissions.push_back(*submission);
        drop(queue);
        if may_wait {
            self.changed.notify_one();
        }
        Poll::Ready(())
    }

    fn stop(&self) {
        let mut queue = lock(&self.queue);
        queue.stopping = true;
        queue.blocked.drain(..).for_each(Waker::wake);
        drop(queue);
        self.changed.notify_one();
    }

    /// Waits for something to do; `None` when stopping and nothing is left.
    fn wait(&self, batch_events_max: usize, sweep_in: impl Fn() -> Duration) -> Option<Work> {
        let mut queue = lock(&self.queue);
        loop {
            let sweep = std::mem::take(&mut queue.sweep) || sweep_in().is_zero();
            let news = std::mem::take(&mut queue.news);
            let has_work = sweep || news || !queue.chores.is_empty();
            if !queue.submissions.is_empty() || (has_work && !queue.stopping) {
                let chore = queue.chores.pop_front();
                return Some(Work { batch: queue.take(batch_events_max), chore, sweep, news });
            }
            if queue.stopping {
                queue.chores.clear();
                return None;
            }
            queue = self.changed.wait_timeout(queue, sweep_in()).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Queue {
    fn take(&mut self, events_max: usize) -> Vec<Submission> {
        let portion = events_max.min(self.submissions.len());
        let batch: Vec<Submission> = self.submissions.drain(..portion).collect();
        self.bytes -= batch.iter().map(Submission::bytes).sum::<usize>();
        self.blocked.drain(..).for_each(Waker::wake);
        batch
    }
}

/// Answers what is left when the thread ends, which only a panic can leave.
struct RefuseRest(Arc<Shared>);

impl Drop for RefuseRest {
    fn drop(&mut self) {
        self.0.stop();
        let mut queue = lock(&self.0.queue);
        let (rest, _dropped) = (queue.take(usize::MAX), std::mem::take(&mut queue.chores));
        drop(queue);
        rest.iter().for_each(|submission| submission.answer(false, STOPPING));
    }
}

/// The writer thread's own.
struct Loop {
    shared: Arc<Shared>,
    store: Arc<dyn Store>,
    fanout: Arc<Fanout>,
    clock: Clock,
    policy: Arc<Policy>,
    /// Told what was stored.
    trust: trust::Reader,
    batch_events_max: usize,
    sweeper: Sweeper,
    /// Whether the last write failed; a disk that stays full is logged once.
    failing: bool,
    /// Whether the last look for what others stored failed.
    deaf: bool,
}

/// A batch taken apart: the store wants its events side by side.
#[derive(Default)]
struct Batch {
    stored: Vec<Verified<Event>>,
    ephemeral: Vec<Verified<Event>>,
    /// In the order of arrival: who waits, and in which of the lists the event is next.
    order: Vec<(Arc<Outbox>, bool)>,
}

/// What came of storing a batch.
#[derive(Default)]
struct Stored {
    outcomes: Vec<Outcome>,
    /// Up to where the store can be read, if it stored anything.
    end: Option<Position>,
    /// What other processes stored before it.
    others: Vec<FromElsewhere>,
}

/// What became of one event of a batch.
#[derive(Clone, Copy)]
enum Outcome {
    /// Judged by the store.
    Judged(Verdict),
    /// Ephemeral and still valid.
    Passed,
    /// Not stored, for a reason of ours.
    Failed(&'static str),
}

impl Batch {
    fn new(submissions: Vec<Submission>) -> Batch {
        let mut batch = Batch::default();
        for Submission { event, reply, .. } in submissions {
            let is_ephemeral = event.kind.is_ephemeral();
            batch.order.push((reply, is_ephemeral));
            if is_ephemeral { &mut batch.ephemeral } else { &mut batch.stored }.push(event);
        }
        batch
    }

    /// Events with their outcomes, in the order of arrival.
    fn in_order(
        &self,
        stored: &[Outcome],
        now: u64,
    ) -> impl Iterator<Item = (&Outbox, &Verified<Event>, Outcome)> + use<'_> {
        let mut stored = self.stored.iter().zip(stored.to_vec());
        let mut ephemeral = self.ephemeral.iter().map(move |event| (event, judge_ephemeral(event, now)));
        self.order.iter().filter_map(move |(reply, is_ephemeral)| {
            let (event, outcome) = if *is_ephemeral { ephemeral.next() } else { stored.next() }?;
            Some((&**reply, event, outcome))
        })
    }
}

fn judge_ephemeral(event: &Event, now: u64) -> Outcome {
    if is_expired(event.expiration(), now) { Outcome::Judged(Verdict::Expired) } else { Outcome::Passed }
}

impl Loop {
    fn run(mut self) {
        while let Some(work) = self.shared.wait(self.batch_events_max, || self.sweeper.due_in(Instant::now())) {
            if work.news {
                self.spread_news();
            }
            if !work.batch.is_empty() {
                self.write(work.batch);
            }
            if let Some(chore) = work.chore {
                self.do_chore(chore);
            }
            if work.sweep {
                self.policy.refresh();
                self.sweeper.sweep(&*self.store, self.clock.now(), Instant::now());
            }
        }
    }

    fn desk(&self) -> Desk<'_> {
        Desk { store: &*self.store, fanout: Some(&self.fanout), now: self.clock.now() }
    }

    fn do_chore(&self, mut chore: Chore) {
        if chore(&self.desk()) {
            lock(&self.shared.queue).chores.push_back(chore);
        }
    }

    /// Answers what is not to be stored: requests to the relay itself, and events of somebody who was banned while they
    /// waited.
    fn answer_apart(&self, mut submissions: Vec<Submission>) -> Vec<Submission> {
        submissions.retain(|submission| {
            let answer = |accepted, text: &str| {
                self.fanout.counters().answered(accepted, text);
                submission.answer(accepted, text);
            };
            if let Err(refusal) = self.policy.recheck(&submission.event) {
                answer(false, &refusal.to_string());
                return false;
            }
            if !members::is_request(submission.event.kind) {
                return true;
            }
            let answered = members::answer(&self.policy, &submission.event, self.clock.now());
            if let Err(error) = self.desk().publish(&answered.events) {
                tracing::error!(%error, "the list of members was not published; the next start does it");
            }
            answer(answered.accepted, &answered.text);
            false
        });
        submissions
    }

    fn write(&mut self, submissions: Vec<Submission>) {
        let submissions = self.answer_apart(submissions);
        if submissions.is_empty() {
            return;
        }
        let now = self.clock.now();
        let batch = Batch::new(submissions);
        let Stored { outcomes, end, others } = self.store(&batch.stored, now);
        let epoch = self.fanout.begin_batch(end);
        self.spread(epoch, &others, now);
        for (reply, event, outcome) in batch.in_order(&outcomes, now) {
            let (accepted, text) = match outcome {
                Outcome::Judged(verdict) => (verdict.is_accepted(), verdict.to_string()),
                Outcome::Passed => (true, String::new()),
                Outcome::Failed(text) => (false, text.to_owned()),
            };
            self.fanout.counters().answered(accepted, &text);
            reply.push(Outgoing::Answer(message::ok(&event.id, accepted, &text)));
        }
        for (_, event, outcome) in batch.in_order(&outcomes, now) {
            // A former version of settings is stored, and news to nobody.
            if matches!(outcome, Outcome::Judged(Verdict::Store) | Outcome::Passed) {
                self.fanout.dispatch(epoch, event);
                self.trust.stored(event);
            }
        }
        let passed = |event: &&Verified<Event>| matches!(judge_ephemeral(event, now), Outcome::Passed);
        self.store.pass_on(&batch.ephemeral.iter().filter(passed).cloned().collect::<Vec<_>>());
    }

    /// Passes on what other processes have stored meanwhile.
    fn spread_news(&mut self) {
        loop {
            match self.store.news() {
                Ok(Some(news)) => {
                    let epoch = self.fanout.begin_batch(Some(news.end));
                    self.spread(epoch, &news.events, self.clock.now());
                    if news.decided {
                        self.policy.refresh();
                    }
                    if !news.more {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    if !std::mem::replace(&mut self.deaf, true) {
                        tracing::warn!(%error, "what other relays store does not arrive; they are asked again");
                    }
                    return;
                }
            }
        }
        if std::mem::take(&mut self.deaf) {
            tracing::info!("what other relays store arrives again");
        }
    }

    fn spread(&self, epoch: Epoch, events: &[FromElsewhere], now: u64) {
        for event in events.iter().filter(|event| !is_expired(event.event.expiration(), now)) {
            self.fanout.dispatch_from_elsewhere(epoch, event);
        }
    }

    fn store(&mut self, events: &[Verified<Event>], now: u64) -> Stored {
        if events.is_empty() {
            return Stored::default();
        }
        match self.store.apply(events, now) {
            Ok(applied) => {
                if std::mem::replace(&mut self.failing, false) {
                    *lock(&self.shared.problem) = None;
                }
                if applied.over_quota {
                    self.sweeper.sweep_soon(Instant::now());
                }
                let outcomes = applied.verdicts.into_iter().map(Outcome::Judged).collect();
                Stored { outcomes, end: Some(applied.end), others: applied.others }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, events = events.len(), "writing failed; publishers are told");
                }
                let lasts = matches!(error, StoreError::Poisoned(_));
                *lock(&self.shared.problem) = Some(Problem { text: told(&error), at: Instant::now(), lasts });
                Stored { outcomes: vec![Outcome::Failed(told(&error)); events.len()], ..Stored::default() }
            }
        }
    }
}

/// What a publisher is told; file names are none of their business.
fn told(error: &StoreError) -> &'static str {
    match error {
        StoreError::DiskFull => "error: the disk is full",
        StoreError::QuotaUsedUp => "error: the relay's disk quota is used up",
        StoreError::Away(_) => "error: the relay's database cannot be reached; try again",
        _ => "error: the relay could not store the event",
    }
}

#[cfg(test)]
mod tests;
