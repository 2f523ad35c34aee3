//! Lines in, checked events out, in the order of the file: one thread reads, one a processor core checks.
//!
//! Each chunk takes its place in a queue before it is checked, so the receiver meets chunks in order, whichever thread
//! is done first. Both queues are short, so memory stays bounded by a few chunks.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::lines::{Chunk, Lines};
use super::tally::Outcome;
use crate::protocol::Event;

/// A line that goes no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What to count it as.
    pub outcome: Outcome,
    /// Why, for a person.
    pub reason: String,
}

/// A line with what its check made of it.
#[derive(Debug)]
pub struct Checked<T> {
    /// Its number; the first of the file is 1.
    pub line: u64,
    /// Something to be stored, or the reason why not.
    pub result: Result<T, Refused>,
}

/// One chunk, checked.
pub type CheckedChunk<T> = Vec<Checked<T>>;

/// Chunks in the order of the file; each is a promise that a checking thread keeps.
pub struct Chunks<T>(Receiver<io::Result<Receiver<CheckedChunk<T>>>>);

type Job<T> = (Chunk, SyncSender<CheckedChunk<T>>);

/// Starts the threads. Protected events (NIP-70) go no further unless they are wanted. The threads end with the input, or soon after the [`Chunks`] are dropped; a read that blocks then is
/// left to the end of the process.
///
/// # Errors
/// When the system gives no threads.
pub fn start<T, C>(lines: Lines, protected: bool, check: C) -> io::Result<Chunks<T>>
where
    T: Send + 'static,
    C: Fn(Event) -> Result<T, Refused> + Send + Sync + 'static,
{
    let threads = thread::available_parallelism().map_or(1, usize::from);
    // One chunk a thread to work on, one that waits.
    let (order, ordered) = sync_channel(2 * threads);
    let (work, jobs) = sync_channel::<Job<T>>(threads);
    let check = move |event: Event| if !protected && event.is_protected() { Err(guarded()) } else { check(event) };
    let (jobs, check) = (Arc::new(Mutex::new(jobs)), Arc::new(check));
    for _ in 0..threads {
        let (jobs, check) = (Arc::clone(&jobs), Arc::clone(&check));
        spawn("check", move || run_checks(&jobs, &*check))?;
    }
    spawn("read", move || read(lines, &order, &work))?;
    Ok(Chunks(ordered))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
}

fn read<T>(mut lines: Lines, order: &SyncSender<io::Result<Receiver<CheckedChunk<T>>>>, work: &SyncSender<Job<T>>) {
    loop {
        let sent = match lines.next_chunk() {
            Ok(Some(chunk)) => {
                let (done, result) = sync_channel(1);
                order.send(Ok(result)).is_ok() && work.send((chunk, done)).is_ok()
            }
            Ok(None) => false,
            Err(error) => {
                // Nobody is left to tell if this fails.
                let _ = order.send(Err(error));
                false
            }
        };
        if !sent {
            return;
        }
    }
}

fn run_checks<T>(jobs: &Mutex<Receiver<Job<T>>>, check: &dyn Fn(Event) -> Result<T, Refused>) {
    loop {
        // The guard is gone before the work begins.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((chunk, done)) = job else { return };
        let checked = chunk.lines().map(|(line, text)| {
            let text = text.map_err(|_| refused(Outcome::TooLarge, "the line is longer than any event may be"));
            Checked { line, result: text.and_then(parse).and_then(check) }
        });
        // The receiver may have gone; then the reader stops too.
        let _ = done.send(checked.collect());
    }
}

fn parse(text: &[u8]) -> Result<Event, Refused> {
    let text = std::str::from_utf8(text).map_err(|_| refused(Outcome::Unreadable, "not UTF-8"))?;
    Event::from_json(text).map_err(|error| refused(Outcome::Unreadable, &format!("no event: {error}")))
}

/// Why an event with `["-"]` is left out.
fn guarded() -> Refused {
    refused(Outcome::Refused, "blocked: only its author may publish this event; --protected imports it")
}

/// Shorthand.
pub fn refused(outcome: Outcome, reason: &str) -> Refused {
    Refused { outcome, reason: reason.to_owned() }
}

/// What [`Chunks::next`] found.
pub enum Next<T> {
    /// The next chunk of the file.
    Chunk(CheckedChunk<T>),
    /// Nothing is ready yet.
    NotYet,
    /// The input has ended.
    End,
}

impl<T> Chunks<T> {
    /// The next chunk, waiting for it no longer than `patience`.
    ///
    /// # Errors
    /// When the input could not be read to its end.
    pub fn next(&self, patience: std::time::Duration) -> io::Result<Next<T>> {
        use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
        let promise = match self.0.recv_timeout(patience) {
            Ok(promise) => promise?,
            Err(Timeout) => return Ok(Next::NotYet),
            Err(Disconnected) => return Ok(Next::End),
        };
        // Checking takes milliseconds; only a panic of the thread breaks the promise.
        promise.recv().map(Next::Chunk).map_err(|_| io::Error::other("a checking thread has failed"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Cursor;
    use std::time::Duration;

    use super::*;
    use crate::cli::testing;

    fn collect(input: Vec<u8>) -> Vec<Checked<u64>> {
        let check = |event: Event| match event.created_at {
            at if at % 10 == 0 => Err(refused(Outcome::Refused, "a round number")),
            at => Ok(at),
        };
        let chunks = start(Lines::new(Cursor::new(input), 1_000).unwrap(), false, check).unwrap();
        let mut all = Vec::new();
        loop {
            match chunks.next(Duration::from_secs(60)).unwrap() {
                Next::Chunk(chunk) => all.extend(chunk),
                Next::NotYet => panic!("the reader hangs"),
                Next::End => return all,
            }
        }
    }

    /// Many chunks over several threads come out in the order of the file, each line with its number.
    #[test]
    fn lines_come_out_in_the_order_of_the_file() {
        let sample = testing::json(&testing::note(7_777, "x"));
        let input: String = (1..=9_000).map(|n| sample.replace("7777", &n.to_string()) + "\n").collect();
        let all = collect(input.into_bytes());
        assert_eq!(all.len(), 9_000);
        for (number, checked) in (1..).zip(&all) {
            assert_eq!(checked.line, number);
            assert_eq!(checked.result.is_err(), number % 10 == 0);
            assert!(checked.result.as_ref().is_err() || checked.result == Ok(number));
        }
    }

    /// Whatever a line holds, it is refused with a reason and the run goes on.
    #[test]
    fn bad_lines_are_refused_one_by_one() {
        let good = testing::json(&testing::note(1, ""));
        let mut input = format!("{{}}\n{good} trailing\n[\n").into_bytes();
        input.extend_from_slice(b"\xff\xfe\n");
        input.extend_from_slice(format!("{}\n  {good}\r\n", "x".repeat(1_001)).as_bytes());
        let all = collect(input);
        let reasons: Vec<_> = all.iter().map(|checked| checked.result.as_ref().err()).collect();
        let outcomes: Vec<_> = reasons.iter().map(|refused| refused.map(|refused| refused.outcome)).collect();
        let unreadable = Some(Outcome::Unreadable);
        assert_eq!(outcomes, [unreadable, unreadable, unreadable, unreadable, Some(Outcome::TooLarge), None]);
        assert!(reasons.iter().flatten().all(|refused| refused.reason.len() > 5));
    }
}
