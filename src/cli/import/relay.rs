//! Import through the relay that has the store: events go out as EVENT messages, and each answer says what became of
//! one.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;

use super::check::{self, Checked, CheckedChunk, Chunks, Next, Refused, refused};
use super::lines::Lines;
use super::tally::{Outcome, Report};
use super::{Ended, Failure};
use crate::cli::interrupt::Interrupt;
use crate::cli::remote::{self, Door, Link};
use crate::error::Error;
use crate::protocol::supersede::Verdict;
use crate::protocol::{Event, EventId, message};

/// Events that wait for the relay's answer. Enough to fill its batches, and below what makes it stop reading.
const UNANSWERED_MAX: usize = 200;

/// Bytes of `["EVENT",` and `]` around an event.
const ENVELOPE_BYTES: usize = 10;

/// An event ready to be sent.
#[derive(Debug)]
struct Outgoing {
    id: EventId,
    message: String,
}

/// Reads to the end and sends all; an interruption waits for the answers that are due.
pub fn run(
    door: &Door,
    lines: Lines,
    protected: bool,
    message_bytes_max: usize,
    interrupt: Interrupt,
    report: &mut Report,
) -> Result<Ended, Failure> {
    let chunks = check::start(lines, protected, move |event| prepare(&event, message_bytes_max)).map_err(no_threads)?;
    let (tell, input) = mpsc::channel(1);
    let forward = std::thread::Builder::new().name("forward".to_owned());
    forward.spawn(move || forward_chunks(&chunks, &tell)).map_err(no_threads)?;
    let mut broken = None;
    let ended = remote::block_on(async {
        let link = Link::connect(door).await?;
        let mut sending =
            Sending { url: door.url(), link, waiting: VecDeque::new(), unanswered: HashMap::new(), count: 0, report };
        sending.run(input, interrupt, &mut broken).await
    });
    match broken {
        Some(error) if ended.is_ok() => Err(Failure::Input(error)),
        _ => Ok(ended?),
    }
}

fn no_threads(error: std::io::Error) -> Error {
    Error::Failed(format!("cannot start threads: {error}"))
}

/// What can be said of an event without its signature, which the relay checks. An ephemeral event is not sent: it would
/// be news to those who listen, long after its time.
fn prepare(event: &Event, message_bytes_max: usize) -> Result<Outgoing, Refused> {
    if event.kind.is_ephemeral() {
        return Err(refused(Outcome::Ephemeral, ""));
    }
    let canonical = event.canonical();
    let bytes = canonical.json.len();
    if bytes + ENVELOPE_BYTES > message_bytes_max {
        let reason = format!("invalid: the event has {bytes} bytes, and a message at most {message_bytes_max}");
        return Err(refused(Outcome::TooLarge, &reason));
    }
    let json = std::str::from_utf8(&canonical.json).expect("canonical JSON is text");
    Ok(Outgoing { id: event.id, message: message::publish(json) })
}

type Forwarded = std::io::Result<CheckedChunk<Outgoing>>;

/// Hands chunks from the threads to the task. The task cannot wait for them itself: it must answer pings meanwhile.
fn forward_chunks(chunks: &Chunks<Outgoing>, to: &mpsc::Sender<Forwarded>) {
    loop {
        let (sent, last) = match chunks.next(Duration::from_secs(1)) {
            Ok(Next::Chunk(chunk)) => (to.blocking_send(Ok(chunk)).is_ok(), false),
            Ok(Next::NotYet) => (!to.is_closed(), false),
            Ok(Next::End) => (true, true),
            Err(error) => (to.blocking_send(Err(error)).is_ok(), true),
        };
        if !sent || last {
            return;
        }
    }
}

struct Sending<'a, 'r> {
    url: &'a str,
    link: Link,
    waiting: VecDeque<Checked<Outgoing>>,
    /// Lines by the id that their answer will name; a file may hold an event twice.
    unanswered: HashMap<EventId, VecDeque<u64>>,
    count: usize,
    report: &'a mut Report<'r>,
}

impl Sending<'_, '_> {
    async fn run(
        &mut self,
        mut input: mpsc::Receiver<Forwarded>,
        mut interrupt: Interrupt,
        broken: &mut Option<std::io::Error>,
    ) -> Result<Ended, Error> {
        let (mut ended, mut reading) = (Ended::Whole, true);
        loop {
            self.send_waiting().await?;
            if !reading && self.waiting.is_empty() && self.count == 0 {
                return Ok(ended);
            }
            tokio::select! {
                () = interrupt.wait(), if ended == Ended::Whole => {
                    (ended, reading) = (Ended::Interrupted, false);
                    self.waiting.clear();
                }
                chunk = input.recv(), if reading && self.waiting.is_empty() => match chunk {
                    Some(Ok(chunk)) => self.waiting.extend(chunk),
                    Some(Err(error)) => (*broken, reading) = (Some(error), false),
                    None => reading = false,
                },
                // Also where no answer is due: pings must be answered.
                answer = self.link.next(self.count > 0) => self.take_answer(&answer?)?,
            }
        }
    }

    async fn send_waiting(&mut self) -> Result<(), Error> {
        while self.count < UNANSWERED_MAX
            && let Some(checked) = self.waiting.pop_front()
        {
            match checked.result {
                Ok(event) => {
                    self.unanswered.entry(event.id).or_default().push_back(checked.line);
                    self.count += 1;
                    self.link.feed(event.message).await?;
                }
                Err(refused) => self.report.add(checked.line, refused.outcome, &refused.reason),
            }
        }
        self.link.flush().await
    }

    fn take_answer(&mut self, text: &str) -> Result<(), Error> {
        let Some((id, accepted, reason)) = read_ok(text) else { return Ok(()) };
        let Some(lines) = self.unanswered.get_mut(&id) else { return Ok(()) };
        if let Some(line) = lines.pop_front() {
            self.count -= 1;
            let Some(outcome) = outcome(accepted, &reason) else {
                return Err(remote::failed(
                    self.url,
                    &format!("did not store line {line}: {reason}; its log may say more"),
                ));
            };
            self.report.add(line, outcome, &reason);
        }
        if lines.is_empty() {
            self.unanswered.remove(&id);
        }
        Ok(())
    }
}

/// The parts of an `OK`; `None` for any other message.
fn read_ok(text: &str) -> Option<(EventId, bool, String)> {
    let parts: Vec<Value> = serde_json::from_str(text).ok()?;
    let [verb, id, accepted, reason, ..] = parts.as_slice() else { return None };
    (verb == "OK").then_some(())?;
    Some((EventId::from_hex(id.as_str()?)?, accepted.as_bool()?, reason.as_str()?.to_owned()))
}

/// What an `OK` says. `None`: the relay has a problem of its own, which the next event would meet too.
fn outcome(accepted: bool, reason: &str) -> Option<Outcome> {
    let told = [Verdict::Superseded, Verdict::Deleted, Verdict::Vanished, Verdict::Expired];
    if let Some(verdict) = told.into_iter().find(|verdict| verdict.to_string() == reason) {
        return Some(verdict.into());
    }
    let prefix = reason.split_once(':').map_or("", |(prefix, _)| prefix);
    match (accepted, prefix) {
        (true, "duplicate") => Some(Outcome::AlreadyStored),
        (true, _) => Some(Outcome::Imported),
        (false, "invalid") => Some(Outcome::Invalid),
        (false, "error") => None,
        (false, _) => Some(Outcome::Refused),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Cursor;

    use super::*;
    use crate::cli::testing;
    use crate::store::Store;

    /// The relay's words lead to the same outcomes as the store's own.
    #[test]
    fn answers_are_counted_as_the_store_would() {
        for (accepted, reason, expected) in [
            (true, Verdict::Store.to_string(), Some(Outcome::Imported)),
            (true, Verdict::Duplicate.to_string(), Some(Outcome::AlreadyStored)),
            (true, Verdict::Superseded.to_string(), Some(Outcome::Superseded)),
            (false, Verdict::Deleted.to_string(), Some(Outcome::Deleted)),
            (false, Verdict::Vanished.to_string(), Some(Outcome::Vanished)),
            (false, Verdict::Expired.to_string(), Some(Outcome::Expired)),
            (false, "invalid: the signature does not verify".to_owned(), Some(Outcome::Invalid)),
            (false, "blocked: protected events are not accepted here".to_owned(), Some(Outcome::Refused)),
            (false, "error: the disk is full".to_owned(), None),
        ] {
            assert_eq!(outcome(accepted, &reason), expected, "{reason}");
        }
    }

    /// Only a whole OK counts as one.
    #[test]
    fn an_ok_is_read_and_nothing_else() {
        let id = EventId([7; 32]);
        assert_eq!(read_ok(&message::ok(&id, true, "x")), Some((id, true, "x".to_owned())));
        for other in ["[]", "{}", "x", r#"["OK"]"#, r#"["OK","07",true,""]"#, &message::notice("OK")] {
            assert_eq!(read_ok(other), None, "{other}");
        }
    }

    /// An ephemeral event is counted and not sent.
    #[test]
    fn ephemeral_events_stay_here() {
        let refused = prepare(&testing::event(20_001, 1, &[], ""), 1_000).unwrap_err();
        assert_eq!(refused.outcome, Outcome::Ephemeral);
    }

    /// The bound is on the whole message, as the relay's is.
    #[test]
    fn an_event_must_fit_into_a_message() {
        let event = testing::note(1, "x");
        let message = message::publish(&testing::json(&event));
        assert_eq!(prepare(&event, message.len()).unwrap().message, message);
        assert_eq!(prepare(&event, message.len() - 1).unwrap_err().outcome, Outcome::TooLarge);
    }

    /// More events than may be unanswered, good and bad, come to the same as in a store of one's own.
    #[test]
    fn a_running_relay_takes_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let relay = testing::Relay::start(testing::config_for(folder.path()));
        let mut lines: Vec<String> = (0..500).map(|n| testing::json(&testing::note(n, ""))).collect();
        lines.insert(3, "no event".to_owned());
        lines.insert(30, lines[0].clone());
        lines.insert(60, testing::json(&testing::note(5, "forged")).replace("forged", "changed"));
        lines.insert(90, testing::json(&testing::event(20_001, 5, &[], "")));
        let import = || {
            let input = Lines::new(Cursor::new(lines.join("\n")), 100_000).unwrap();
            let mut said = Vec::new();
            let mut say = |text: &str| said.push(text.to_owned());
            let mut report = Report::new(&mut say);
            let (_tell, interrupt) = Interrupt::by_hand();
            let ended = run(&Door::public(&relay.url), input, false, 500_000, interrupt, &mut report);
            assert!(matches!(ended, Ok(Ended::Whole)), "{ended:?}");
            let tally = report.tally;
            said.sort();
            assert!(said[0].starts_with("line 4: no event") && said[1].starts_with("line 61: invalid"), "{said:?}");
            tally.for_people()
        };
        let rest = "ephemeral (not stored) 1 · unreadable 1 · invalid 1";
        assert_eq!(import(), format!("imported 500 · already stored 1 · {rest}"));
        assert_eq!(import(), format!("imported 0 · already stored 501 · {rest}"));
        assert_eq!(relay.store.stats().events, 500);
    }

    /// An interruption waits for the answers that are due and sends nothing more.
    #[test]
    fn an_interruption_waits_for_due_answers() {
        let folder = tempfile::tempdir().unwrap();
        let relay = testing::Relay::start(testing::config_for(folder.path()));
        let (tell, interrupt) = Interrupt::by_hand();
        tell.send_replace(true);
        let input = Cursor::new(testing::json(&testing::note(1, "")));
        let mut say = |_: &str| {};
        let mut report = Report::new(&mut say);
        let ended =
            run(&Door::public(&relay.url), Lines::new(input, 100_000).unwrap(), false, 500_000, interrupt, &mut report);
        assert!(matches!(ended, Ok(Ended::Interrupted)), "{ended:?}");
        assert_eq!(report.tally.lines(), relay.store.stats().events);
    }
}
