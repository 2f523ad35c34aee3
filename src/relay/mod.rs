//! The relay without sockets: the one way in for events, the way out for stored and live ones.
//!
//! [`Relay`] is what `server` talks to. Each connection has an [`Outbox`]; every answer, page and live event for it
//! arrives there, from whichever thread.

pub mod clock;
pub mod counters;
pub mod explain;
pub mod fanout;
pub mod ingest;
mod look;
pub mod maintenance;
pub mod negotiation;
pub mod outbox;
pub mod plugin;
pub mod policy;
pub mod query;
pub mod querylog;
mod runqueue;
pub mod side;
pub mod sweeper;
pub mod writer;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

pub use clock::Clock;
use counters::Counters;
use explain::Measured;
use fanout::Fanout;
use ingest::{Ingest, Rejection, Sender, Source};
use look::Look;
use maintenance::Maintenance;
use negotiation::{Budget, Negotiation, Opening};
use outbox::{Outbox, Serial};
use plugin::Plugin;
use policy::invitations::{self, Question};
use policy::{Policy, admin, methods};
use query::{Job, Queries};
use querylog::QueryFigures;
use writer::{Submission, Writer};

use crate::auth::Gate;
use crate::config::{Config, Live};
use crate::protocol::{Event, EventId, Filter, Verified, Visibility};
use crate::store::compact::CompactReport;
use crate::store::{Query, Store, StoreError, StoreStats, Wanted};

/// Locks; a panic elsewhere while holding the lock is no reason to stop serving, since no guarded state here is left
/// half changed by code that can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running relay over a store: the writer thread, the query threads and the live index.
pub struct Relay {
    config: Live,
    store: Arc<dyn Store>,
    clock: Clock,
    policy: Arc<Policy>,
    gate: Arc<Gate>,
    ingest: Ingest,
    fanout: Arc<Fanout>,
    writer: Writer,
    plugin: Option<Plugin>,
    /// Whether the plugin judges what the operator brings in.
    asks_for_operator: bool,
    queries: Queries,
    negotiable: Arc<Budget>,
    maintenance: Maintenance,
    connections: AtomicU64,
}

/// Why a relay did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store did not take an empty write.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It cannot be told who may write.
    #[error(transparent)]
    Policy(#[from] policy::PolicyError),
    /// The system refused a thread.
    #[error("starting a thread: {0}")]
    Thread(#[from] std::io::Error),
}

impl Relay {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the store takes no writes, or the system gives no threads.
    pub fn start(config: Arc<Config>, store: Arc<dyn Store>, clock: Clock) -> Result<Relay, StartError> {
        // A batch of nothing tells where the stored events end.
        let readable = store.apply(&[], clock.now())?.end;
        let gate = Arc::new(Gate::new(&config));
        let fanout = Arc::new(Fanout::new(readable, gate.private().clone()));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let queries = Queries::start(store.clone(), &config.limits, config.limits.query_threads_on(cores))?;
        queries.log_from(config.operation.slow_query());
        let policy = Arc::new(Policy::open(config.clone(), store.clone())?);
        let writer = Writer::start(store.clone(), fanout.clone(), clock.clone(), policy.clone(), &config.storage)?;
        writer.enqueue(admin::start_chore(policy.clone()));
        // Nobody is connected yet, so nothing can come between the two.
        store.follow(writer.news_bell())?;
        let maintenance = Maintenance::start(store.clone(), &config.storage)?;
        let plugin = if config.plugin.is_set() { Some(Plugin::start(config.plugin.clone())?) } else { None };
        let asks_for_operator = config.plugin.import;
        let negotiable = Budget::new(config.sync.records_max);
        let config = Live::from(config);
        let ingest = Ingest::new(config.clone(), store.clone(), policy.clone());
        let connections = AtomicU64::new(0);
        Ok(Relay {
            config,
            store,
            clock,
            policy,
            gate,
            ingest,
            fanout,
            writer,
            plugin,
            asks_for_operator,
            queries,
            negotiable,
            maintenance,
            connections,
        })
    }

    /// The settings in force now.
    pub fn config(&self) -> Arc<Config> {
        self.config.load()
    }

    /// The settings in force, also after the next reload.
    pub fn live_config(&self) -> &Live {
        &self.config
    }

    /// What it stores.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Who may write, and what was decided about that.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// Calls a management method. `answer` gets the end of it: on the calling thread, which may have to wait for a disk,
    /// where nothing is changed; else from the writer's. A stopping relay drops it.
    pub fn manage(&self, call: admin::Call, answer: impl FnOnce(admin::Answer) + Send + 'static) {
        if methods::only_answers(&call.method) {
            let called = methods::call(&self.policy, &call.caller, &call.method, &call.params, self.clock.now());
            return answer(admin::Answer { result: called.map(|(value, _)| value), block: None });
        }
        self.writer.enqueue(admin::chore(self.policy.clone(), call, answer));
    }

    /// Who may read what.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        self.clock.now()
    }

    /// The outbox of a new connection.
    pub fn connect(&self) -> Arc<Outbox> {
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        Outbox::new(connection, self.config().limits.live_queue_bytes_max)
    }

    /// Takes an event through the ingest stages.
    ///
    /// # Errors
    /// What is to be answered instead of storing it.
    pub fn check(&self, event: Event, sender: &Sender) -> Result<Verified<Event>, Rejection> {
        self.ingest.check(event, sender, self.clock.now())
    }

    /// Has an event that was rejected answered from a query thread, if the rejection depends on what the store cannot tell at
    /// hand; whether it has.
    pub fn look_again(&self, outbox: &Arc<Outbox>, id: EventId, rejection: &Rejection) -> bool {
        let is_open = look::is_open(&*self.store, &id, rejection);
        if is_open {
            self.queries.look(Look { outbox: outbox.clone(), fanout: self.fanout.clone(), id });
        }
        is_open
    }

    /// Queues the submission in `slot` for the plugin, if there is one to be asked, else for the writer; leaves the slot
    /// empty. `Pending` while there is no room; the task is woken then.
    pub fn poll_submit(&self, cx: &mut Context<'_>, slot: &mut Option<Box<Submission>>) -> Poll<()> {
        let Some(submission) = slot else { return Poll::Ready(()) };
        match self.plugin.as_ref().filter(|_| self.asks_plugin(submission)) {
            Some(plugin) => {
                let (bytes, now) = (submission.bytes(), self.clock.now());
                let ask = || plugin::ask_for(slot.take().expect("it was just there"), self.writer.entrance(), now);
                plugin.poll_ask(cx, bytes, ask)
            }
            None => self.writer.poll_submit(cx, slot),
        }
    }

    /// Requests to the relay itself hold an invitation, and are judged by the relay; the operator is asked for only where the
    /// settings say so.
    fn asks_plugin(&self, submission: &Submission) -> bool {
        let by_operator = !matches!(submission.sender.source, Source::Client | Source::Mirror);
        !policy::members::is_request(submission.event.kind) && (!by_operator || self.asks_for_operator)
    }

    /// Opens a subscription: its stored events come in pages, then live ones follow. Live events that arrive between
    /// the pages belong after the end of the stored ones. Only events that the reader may see.
    pub fn subscribe(&self, outbox: &Arc<Outbox>, serial: Serial, filters: Vec<Filter>, visible: Visibility) {
        let before = self.fanout.subscribe(outbox, serial, &filters, visible.clone());
        let keys = visible.reader().map_or(&[][..], |(_, keys)| keys);
        let (now, question) = (self.clock.now(), invitations::question(&self.policy, &filters, keys));
        let asked = if question == Question::Other { Vec::new() } else { filters.clone() };
        let job = Job::rows(outbox, serial, filters, &self.config().limits, before, visible, now);
        match question {
            Question::Other => self.queries.begin(job),
            Question::Refused(text) => outbox.push(invitations::refusal(serial, text)),
            Question::Invite(by) => {
                let policy = self.policy.clone();
                self.writer.enqueue(invitations::chore(policy, by, asked, outbox.clone(), job));
            }
        }
    }

    /// From now on these subscriptions get live events that a reader may see who has authenticated meanwhile. Stored ones
    /// that were hidden from them are for a new REQ.
    pub fn widen(&self, outbox: &Outbox, serials: impl Iterator<Item = Serial>, visible: &Visibility) {
        serials.for_each(|serial| self.fanout.set_visible(outbox, serial, visible.clone()));
    }

    /// Counts stored events; the answer comes in a page without rows.
    pub fn count(&self, outbox: &Arc<Outbox>, serial: Serial, filters: Vec<Filter>, visible: Visibility) {
        self.queries.begin(Job::count(outbox, serial, filters, visible, self.clock.now()));
    }

    /// Opens a reconciliation (NIP-77); the answer to its first message comes through the outbox.
    pub fn negotiate(&self, outbox: &Arc<Outbox>, mut opening: Opening, visible: Visibility) {
        let limit =
            opening.filter.limit.take().map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let wanted = Wanted { filter: opening.filter.clone(), limit, whole_seconds: false };
        let now = self.clock.now();
        let query = Query { wanted: vec![wanted], now, before: None, visible };
        let limits = &self.config().sync;
        self.queries.negotiate(Negotiation::open(outbox, opening, query, limits, &self.negotiable));
    }

    /// Has the next message of a reconciliation answered.
    pub fn go_on(&self, negotiation: Box<Negotiation>) {
        self.queries.negotiate(negotiation);
    }

    /// Compacts the store on the calling thread; see [`Maintenance::compact`].
    ///
    /// # Errors
    /// As [`Maintenance::compact`].
    pub fn compact(&self, progress: &dyn Fn(u64, u64)) -> Result<Option<CompactReport>, StoreError> {
        self.maintenance.compact(progress)
    }

    /// What is counted.
    pub fn counters(&self) -> &Counters {
        self.fanout.counters()
    }

    /// Runs a filter to see what it costs; see [`explain::measure`]. Blocks.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn measure(&self, filter: &Filter) -> Result<Measured, StoreError> {
        explain::measure(&*self.store, filter, &self.config().limits, self.clock.now())
    }

    /// Figures about queries.
    pub fn query_figures(&self) -> QueryFigures {
        self.queries.figures()
    }

    /// Events and bytes that wait for the writer.
    pub fn writer_queue(&self) -> (usize, usize) {
        self.writer.queued()
    }

    /// Why the store takes no writes; `None` while it does.
    pub fn problem(&self) -> Option<&'static str> {
        self.writer.problem(Instant::now())
    }

    /// Puts other settings in force; see [`Live`].
    pub fn reload(&self, config: Config) {
        self.queries.log_from(config.operation.slow_query());
        self.config.replace(config);
        self.policy.reload(self.config.load());
    }

    /// Figures about the store.
    pub fn stats(&self) -> StoreStats {
        self.store.stats()
    }

    /// Open subscriptions, of all connections.
    pub fn subscriptions(&self) -> usize {
        self.fanout.len()
    }

    /// Goes on with a query whose page was written.
    pub fn resume(&self, job: Job) {
        self.queries.resume(job);
    }

    /// Ends a subscription; an unknown one is passed over.
    pub fn unsubscribe(&self, outbox: &Outbox, serial: Serial) {
        self.fanout.unsubscribe(outbox, serial);
    }

    /// Writes and answers what was submitted, ends the threads and closes the store, as far as `deadline` allows.
    /// Blocks.
    ///
    /// # Errors
    /// When the store's last writes fail. Nothing that was answered is lost even then.
    pub fn stop(&self, deadline: Instant) -> Result<(), StoreError> {
        if !self.maintenance.stop(deadline) {
            tracing::warn!("compaction is still busy at the end of the time for stopping; it has changed nothing");
        }
        if let Some(plugin) = &self.plugin {
            plugin.stop();
        }
        if !self.writer.stop(deadline) {
            tracing::warn!("the writer is still busy at the end of the time for stopping");
        }
        self.queries.stop();
        self.store.close(deadline)
    }
}
