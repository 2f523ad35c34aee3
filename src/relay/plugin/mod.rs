//! A program that judges events before they are stored: started, fed, listened to, and started again when it fails.
//!
//! In: events that passed the ingest stages, and who sent them. Out: a [`Verdict`] for each, through the callback that came
//! with it. Several events may be with the plugin at a time; its answers are told apart by id.
//!
//! A plugin that hangs, crashes or talks nonsense holds up nobody: an event that it was given has its verdict within the
//! time-out, and as soon as the plugin is found to be down, everything that waits for it has. What that verdict is, the
//! settings say. Threads and not tasks, since import has no runtime; none of them is one that others need.

mod process;
#[cfg(test)]
mod tests;
pub mod wire;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use process::Process;
pub use wire::Verdict;

use super::ingest::Sender;
use super::lock;
use super::writer::{Entrance, Submission};
use crate::config::{self, OnFailure};
use crate::protocol::{Event, Verified};

/// Bytes of events that wait for verdicts.
const QUEUE_BYTES_MAX: usize = 16 << 20;

/// Pause before a plugin that has ended is started again; it doubles each time, until the plugin answers something.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Complaints about a plugin's lines that are logged in one run of it.
const COMPLAINTS_MAX: u32 = 20;

const UNAVAILABLE: &str = "error: this relay's write policy does not answer; try again later";
const UNWANTED: &str = "blocked: refused by the plugin";
const STOPPING: &str = "error: the relay is stopping";

/// Gets the event back with its verdict; called on the plugin's own thread, and may wait there for room.
pub type Done = Box<dyn FnOnce(Verified<Event>, Verdict) + Send>;

/// A question to the plugin.
pub struct Ask {
    /// About this event.
    pub event: Verified<Event>,
    /// Who sent it.
    pub sender: Sender,
    /// When, in seconds since 1970.
    pub received_at: u64,
    /// Who wants to know.
    pub done: Done,
}

impl Ask {
    fn bytes(&self) -> usize {
        self.event.canonical().json.len()
    }
}

/// The question about an event on its way to the writer, which goes on or is answered as the verdict says.
pub fn ask_for(submission: Box<Submission>, writer: Entrance, received_at: u64) -> Ask {
    let Submission { event, reply, sender } = *submission;
    let asked = sender.clone();
    let done: Done = Box::new(move |event, verdict| {
        let submission = Box::new(Submission { event, reply, sender: asked });
        match verdict {
            Verdict::Accept => writer.submit(submission),
            Verdict::Reject(text) => submission.answer(false, &text),
            // No relay is misled: it would be asked for the event again and again.
            Verdict::ShadowReject if submission.sender.upstream.is_some() => submission.answer(false, UNWANTED),
            Verdict::ShadowReject => submission.answer(true, ""),
        }
    });
    Ask { event, sender, received_at, done }
}

/// The plugin, until dropped.
pub struct Plugin(Arc<Shared>);

struct Shared {
    settings: config::Plugin,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Ask>,
    /// In the order of handing over.
    in_flight: VecDeque<Flying>,
    judged: VecDeque<(Ask, Verdict)>,
    /// Of all three.
    bytes: usize,
    /// Who waits for room.
    blocked: Vec<Waker>,
    run: Run,
    stopping: bool,
}

/// A question that the plugin has.
struct Flying {
    ask: Ask,
    deadline: Instant,
}

/// One run of the program.
#[derive(Default)]
struct Run {
    /// Counts the runs: a late line of an earlier one is nobody's.
    number: u64,
    /// Started, and not known to have ended.
    up: bool,
    /// Being started: what comes waits for it.
    starting: bool,
    /// Ends the processes.
    group: Option<process::Group>,
    /// When it last gave a sign of life, or was given something while it had nothing.
    alive_at: Option<Instant>,
    /// Whether it has answered anything.
    has_answered: bool,
    complaints: u32,
}

impl Plugin {
    /// Starts the program and keeps it running.
    ///
    /// # Errors
    /// When the system gives no threads. A program that cannot be started is tried again and again.
    pub fn start(settings: config::Plugin) -> std::io::Result<Plugin> {
        let state = State { run: Run { starting: true, ..Run::default() }, ..State::default() };
        let shared = Arc::new(Shared { settings, state: Mutex::new(state), changed: Condvar::new() });
        let plugin = Plugin(shared.clone());
        let (runs, judges) = (shared.clone(), shared);
        std::thread::Builder::new().name("plugin".to_owned()).spawn(move || runs.run())?;
        std::thread::Builder::new().name("plugin-judge".to_owned()).spawn(move || judges.judge())?;
        Ok(plugin)
    }

    /// Asks, once there is room: `make` gives the question then. `Pending` while there is none; the task is woken.
    pub fn poll_ask(&self, cx: &mut Context<'_>, bytes: usize, make: impl FnOnce() -> Ask) -> Poll<()> {
        let mut state = lock(&self.0.state);
        let count = state.waiting.len() + state.in_flight.len() + state.judged.len();
        let has_room = count < self.0.settings.queue_events_max && state.bytes + bytes <= QUEUE_BYTES_MAX;
        if !has_room && count > 0 && !state.stopping {
            if !state.blocked.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.blocked.push(cx.waker().clone());
            }
            return Poll::Pending;
        }
        self.0.ask(state, make());
        Poll::Ready(())
    }

    /// Asks and waits for the verdict, on a thread that may wait.
    pub fn ask(&self, event: Verified<Event>, sender: &Sender, received_at: u64) -> (Verified<Event>, Verdict) {
        let (tell, told) = std::sync::mpsc::channel();
        let done: Done = Box::new(move |event, verdict| drop(tell.send((event, verdict))));
        self.0.ask(lock(&self.0.state), Ask { event, sender: sender.clone(), received_at, done });
        told.recv().expect("every question gets its verdict, also when the plugin stops")
    }

    /// Gives what waits its last verdict and ends the program.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl State {
    /// Gives a verdict on everything that has none.
    fn judge_all(&mut self, verdict: &Verdict) {
        let flying = self.in_flight.drain(..).map(|flying| flying.ask);
        let asks: Vec<Ask> = flying.chain(self.waiting.drain(..)).collect();
        self.judged.extend(asks.into_iter().map(|ask| (ask, verdict.clone())));
    }
}

impl Shared {
    fn ask(&self, mut state: MutexGuard<'_, State>, ask: Ask) {
        if state.stopping {
            drop(state); // nobody judges any more
            return (ask.done)(ask.event, Verdict::Reject(STOPPING.to_owned()));
        }
        state.bytes += ask.bytes();
        if state.run.up || state.run.starting {
            state.waiting.push_back(ask);
        } else {
            state.judged.push_back((ask, self.failure()));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The verdict on an event for which the plugin has no answer.
    fn failure(&self) -> Verdict {
        match self.settings.on_failure {
            OnFailure::Accept => Verdict::Accept,
            OnFailure::Reject => Verdict::Reject(UNAVAILABLE.to_owned()),
        }
    }

    fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopping = true;
        state.judge_all(&Verdict::Reject(STOPPING.to_owned()));
        if let Some(group) = &state.run.group {
            group.terminate();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Runs the program again and again: the thread that starts and feeds it.
    fn run(self: Arc<Self>) {
        let mut pause = PAUSE_MIN;
        loop {
            match Process::start(&self.settings.command) {
                Ok(process) => self.run_once(process),
                Err(error) => tracing::error!(%error, command = %self.settings.command, "the plugin does not start"),
            }
            let mut state = lock(&self.state);
            if state.run.has_answered {
                pause = PAUSE_MIN;
            }
            state.run = Run { number: state.run.number, ..Run::default() };
            state.judge_all(&self.failure());
            self.changed.notify_all();
            let resting = self.changed.wait_timeout_while(state, pause, |state| !state.stopping);
            let mut state = resting.unwrap_or_else(PoisonError::into_inner).0;
            if state.stopping {
                return;
            }
            state.run.starting = true;
            pause = (2 * pause).min(PAUSE_MAX);
        }
    }

    /// Feeds one run of the program to its end.
    fn run_once(self: &Arc<Self>, mut process: Process) {
        let mut state = lock(&self.state);
        let number = state.run.number + 1;
        state.run = Run { number, up: true, group: Some(process.group()), ..Run::default() };
        if state.stopping {
            process.group().terminate();
        }
        drop(state);
        tracing::info!(command = %self.settings.command, "the plugin was started");
        let (reads, complains) = (self.clone(), process.take_errors());
        let (mut output, mut input) = process.take_pipes();
        let reading = std::thread::Builder::new().name("plugin-read".to_owned()).spawn(move || {
            reads.read(number, &mut output);
        });
        let listening =
            std::thread::Builder::new().name("plugin-log".to_owned()).spawn(move || process::log(complains));
        if let Err(error) = reading.and(listening) {
            tracing::error!(%error, "the plugin cannot be listened to");
        } else {
            while let Some(line) = self.next_line(number) {
                if input.feed(&line).is_err() {
                    break;
                }
            }
        }
        drop(input);
        // Its number may soon be another process's.
        lock(&self.state).run.group = None;
        let status = process.end();
        if !lock(&self.state).stopping {
            tracing::warn!(status, "the plugin has ended; it is started again");
        }
    }

    /// The next line for the plugin, once it may have one more; `None` when it has ended.
    fn next_line(&self, number: u64) -> Option<Vec<u8>> {
        let state = lock(&self.state);
        let idle = |state: &mut State| {
            let may_feed = state.in_flight.len() < self.settings.in_flight_max && !state.waiting.is_empty();
            !may_feed && !state.stopping && state.run.up && state.run.number == number
        };
        let mut state = self.changed.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner);
        if state.stopping || !state.run.up {
            return None;
        }
        let ask = state.waiting.pop_front()?;
        let (line, now) = (wire::request(&ask.event, &ask.sender, ask.received_at), Instant::now());
        if state.in_flight.is_empty() {
            state.run.alive_at = Some(now);
        }
        state.in_flight.push_back(Flying { ask, deadline: now + self.settings.timeout() });
        drop(state);
        // The judge has a new deadline to watch.
        self.changed.notify_all();
        Some(line)
    }

    /// Reads what one run of the program says, to its end.
    fn read(&self, number: u64, output: &mut impl std::io::BufRead) {
        let mut line = Vec::new();
        while matches!(wire::read_line(output, &mut line), Ok(true)) {
            let mut state = lock(&self.state);
            if state.run.number != number {
                return;
            }
            self.take_answer(&mut state, &line);
            drop(state);
            self.changed.notify_all();
        }
        let mut state = lock(&self.state);
        if state.run.number == number {
            state.run.up = false;
        }
        drop(state);
        self.changed.notify_all();
    }

    fn take_answer(&self, state: &mut State, line: &[u8]) {
        let (id, verdict) = match wire::answer(line) {
            Ok(answer) => answer,
            Err(error) => return complain(&mut state.run, &format!("a line is no answer: {error}")),
        };
        let Some(at) = state.in_flight.iter().position(|flying| flying.ask.event.id == id) else {
            return complain(&mut state.run, &format!("an answer for {id}, which was not asked about or is late"));
        };
        state.run.alive_at = Some(Instant::now());
        state.run.has_answered = true;
        if verdict.is_none() {
            complain(&mut state.run, &format!("an unknown action for {id}"));
        }
        let flying = state.in_flight.remove(at).expect("the position is of this queue");
        state.judged.push_back((flying.ask, verdict.unwrap_or_else(|| self.failure())));
    }

    /// Hands out verdicts and watches the deadlines, until nothing can come any more.
    fn judge(&self) {
        let mut state = lock(&self.state);
        loop {
            self.watch(&mut state, Instant::now());
            let judged: Vec<(Ask, Verdict)> = state.judged.drain(..).collect();
            if judged.is_empty() {
                if state.stopping {
                    return;
                }
                state = self.wait(state);
                continue;
            }
            drop(state);
            let bytes: usize = judged.iter().map(|(ask, _)| ask.bytes()).sum();
            judged.into_iter().for_each(|(ask, verdict)| (ask.done)(ask.event, verdict));
            state = lock(&self.state);
            state.bytes -= bytes;
            state.blocked.drain(..).for_each(Waker::wake);
        }
    }

    /// Waits for something to judge, or for the next deadline.
    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        match state.in_flight.front() {
            Some(next) => {
                let left = next.deadline.saturating_duration_since(Instant::now());
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Judges what is late. A plugin that has answered nothing at all for that long hangs, and is ended.
    fn watch(&self, state: &mut State, now: Instant) {
        let hangs = !state.in_flight.is_empty()
            && state.run.alive_at.is_some_and(|alive_at| now >= alive_at + self.settings.timeout());
        while state.in_flight.front().is_some_and(|flying| flying.deadline <= now) {
            let flying = state.in_flight.pop_front().expect("there is a first");
            let id = flying.ask.event.id;
            complain(&mut state.run, &format!("no answer for {id} in {:?}", self.settings.timeout()));
            state.judged.push_back((flying.ask, self.failure()));
        }
        if hangs {
            tracing::warn!("the plugin hangs and is ended");
            state.run.up = false;
            state.judge_all(&self.failure());
            if let Some(group) = &state.run.group {
                group.kill();
            }
            self.changed.notify_all();
        }
    }
}

/// Logs what is wrong with a plugin, up to a bound for each run.
fn complain(run: &mut Run, problem: &str) {
    run.complaints += 1;
    if run.complaints <= COMPLAINTS_MAX {
        tracing::warn!(problem, "the plugin");
    }
}
