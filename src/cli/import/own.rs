//! Import into a store that this process has.

use std::sync::Arc;
use std::time::Duration;

use super::check::{self, Next, Refused, refused};
use super::lines::Lines;
use super::tally::{Outcome, Report};
use super::{Ended, Failure};
use crate::cli::interrupt::Interrupt;
use crate::cli::store;
use crate::config::Config;
use crate::error::Error;
use crate::protocol::{Event, Verified};
use crate::relay::Clock;
use crate::relay::ingest::{Ingest, Sender};
use crate::relay::plugin::{Plugin, Verdict};
use crate::relay::policy::Policy;
use crate::store::Store;

/// How long what was read waits for more before it is stored, and a signal for being noticed.
const PATIENCE: Duration = Duration::from_millis(200);

/// Where events go, and when to stop.
pub struct Import<'a> {
    /// The settings.
    pub config: &'a Arc<Config>,
    /// Open.
    pub store: Arc<dyn Store>,
    /// What time it is.
    pub clock: Clock,
    /// Whether protected events (NIP-70) are wanted too.
    pub protected: bool,
    /// Looked at between batches.
    pub interrupt: Interrupt,
}

/// Events that wait for one durable write, with their lines.
#[derive(Default)]
struct Batch {
    lines: Vec<u64>,
    events: Vec<Verified<Event>>,
    bytes: usize,
}

impl Import<'_> {
    /// Reads to the end, in the order of the file. Each durable write holds as many events as may wait for the writer of a
    /// relay.
    pub fn run(&self, lines: Lines, report: &mut Report) -> Result<Ended, Failure> {
        let policy = Policy::open(Arc::clone(self.config), Arc::clone(&self.store))
            .map_err(|error| Error::Failed(error.to_string()))?;
        let ingest = Ingest::new(Arc::clone(self.config), Arc::clone(&self.store), Arc::new(policy));
        let clock = self.clock.clone();
        let settings = &self.config.plugin;
        let plugin = match settings.is_set() && settings.import {
            true => Some(Plugin::start(settings.clone()).map_err(no_threads)?),
            false => None,
        };
        let check = move |event| {
            let event = check_event(&ingest, event, clock.now())?;
            match &plugin {
                Some(plugin) => ask(plugin, event, clock.now()),
                None => Ok(event),
            }
        };
        let chunks = check::start(lines, self.protected, check).map_err(no_threads)?;
        let mut batch = Batch::default();
        loop {
            if self.interrupt.is_set() {
                self.write(&mut batch, report)?;
                return Ok(Ended::Interrupted);
            }
            match chunks.next(PATIENCE) {
                Ok(Next::Chunk(chunk)) => {
                    for checked in chunk {
                        match checked.result {
                            Ok(event) => self.add(&mut batch, checked.line, event, report)?,
                            Err(refused) => report.add(checked.line, refused.outcome, &refused.reason),
                        }
                    }
                }
                Ok(Next::NotYet) => self.write(&mut batch, report)?,
                Ok(Next::End) => {
                    self.write(&mut batch, report)?;
                    return Ok(Ended::Whole);
                }
                Err(error) => {
                    self.write(&mut batch, report)?;
                    return Err(Failure::Input(error));
                }
            }
        }
    }

    fn add(&self, batch: &mut Batch, line: u64, event: Verified<Event>, report: &mut Report) -> Result<(), Error> {
        batch.bytes += event.canonical().json.len();
        batch.lines.push(line);
        batch.events.push(event);
        let storage = &self.config.storage;
        let full =
            batch.events.len() >= storage.writer_queue_events_max || batch.bytes >= storage.writer_queue_bytes_max;
        if full { self.write(batch, report) } else { Ok(()) }
    }

    /// Has the store make room; false when it has done what it can.
    fn retain(&self) -> Result<bool, Error> {
        let retained = self.store.retain(self.clock.now(), self.config.storage.batch_events_max);
        Ok(retained.map_err(|error| store::failed(self.config, error))?.more)
    }

    fn write(&self, batch: &mut Batch, report: &mut Report) -> Result<(), Error> {
        if batch.events.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(batch);
        let applied = self.store.apply(&batch.events, self.clock.now());
        let applied = applied.map_err(|error| store::failed(self.config, error))?;
        while applied.over_quota && self.retain()? {}
        for (line, verdict) in batch.lines.iter().zip(applied.verdicts) {
            report.add(*line, verdict.into(), "");
        }
        Ok(())
    }
}

fn no_threads(error: std::io::Error) -> Error {
    Error::Failed(format!("cannot start threads: {error}"))
}

/// What the plugin lets pass. What it only pretends to take is refused here: there is nobody to be misled.
fn ask(plugin: &Plugin, event: Verified<Event>, now: u64) -> Result<Verified<Event>, Refused> {
    match plugin.ask(event, &Sender::import(), now) {
        (event, Verdict::Accept) => Ok(event),
        (_, Verdict::Reject(reason)) => Err(Refused { outcome: Outcome::Refused, reason }),
        (_, Verdict::ShadowReject) => Err(refused(Outcome::Refused, "refused by the plugin")),
    }
}

/// The ingest stages; what passes them and may be stored.
fn check_event(ingest: &Ingest, event: Event, now: u64) -> Result<Verified<Event>, Refused> {
    match ingest.check(event, &Sender::import(), now) {
        Ok(event) if event.kind.is_ephemeral() => Err(refused(Outcome::Ephemeral, "")),
        Ok(event) => Ok(event),
        Err(rejection) => Err(Refused { outcome: Outcome::from(&rejection), reason: rejection.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{self, Cursor, Read};
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::cli::import::tally::Tally;
    use crate::cli::testing;

    /// A store in a folder of its own, and an import that nobody interrupts.
    fn import_into(
        config: &Arc<Config>,
        input: impl Read + Send + 'static,
        interrupt: Interrupt,
    ) -> (Result<Ended, Failure>, Tally, Vec<String>) {
        let opened = store::open_or_create(config).unwrap();
        let clock = Clock::manual(Arc::new(AtomicU64::new(1_000)));
        let import = Import { config, store: opened.clone(), clock, protected: false, interrupt };
        let mut said = Vec::new();
        let mut say = |text: &str| said.push(text.to_owned());
        let mut report = Report::new(&mut say);
        let ended = import.run(Lines::new(input, 100_000).unwrap(), &mut report);
        let tally = report.tally;
        drop(import);
        // The checking threads hold the store until they notice that the run is over.
        opened.close(std::time::Instant::now() + Duration::from_secs(60)).unwrap();
        drop(opened);
        (ended, tally, said)
    }

    fn nobody() -> Interrupt {
        Interrupt::by_hand().1
    }

    /// One line of every outcome, in one run; the second run adds nothing.
    #[test]
    fn every_line_is_counted_for_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let config = Arc::new(testing::config_for(folder.path()));
        let note = testing::note(10, "deleted");
        let mut lines = vec![
            testing::json(&testing::event(0, 10, &[], "new profile")),
            testing::json(&testing::event(0, 9, &[], "old profile")),
            testing::json(&testing::event(5, 12, &[["e", &note.id.to_hex()]], "")),
            testing::json(&note),
            testing::json(&testing::event(1, 13, &[["expiration", "1000"]], "")),
            testing::json(&testing::event(20_001, 14, &[], "ephemeral")),
            testing::json(&testing::note(15, "forged")).replace("forged", "changed"),
            "not an event".to_owned(),
            testing::json(&testing::event(1, 16, &[["-", ""]], "protected")),
            testing::json(&testing::note(17, &"x".repeat(300_000))),
            testing::json(&testing::note(1 << 40, "far ahead")),
        ];
        lines.push(lines[0].clone());
        let input = lines.join("\n");
        let (ended, tally, said) = import_into(&config, Cursor::new(input.clone()), nobody());
        assert!(matches!(ended, Ok(Ended::Whole)), "{ended:?}");
        let of = |tally: &Tally| {
            use Outcome::*;
            [Imported, AlreadyStored, Superseded, Deleted, Expired, Ephemeral, Unreadable, Invalid, TooLarge, Refused]
                .map(|outcome| tally.of(outcome))
        };
        assert_eq!(of(&tally), [3, 1, 1, 1, 1, 1, 1, 1, 1, 1], "{said:?}");
        let named: Vec<_> = said.iter().map(|line| line.split(':').next().unwrap()).collect();
        assert_eq!(named, ["line 7", "line 8", "line 9", "line 10"]);
        assert_eq!(testing::dates(&config), [1 << 40, 12, 10]);

        let (_, tally, _) = import_into(&config, Cursor::new(input), nobody());
        assert_eq!(of(&tally), [0, 4, 1, 1, 1, 1, 1, 1, 1, 1]);
    }

    /// Batches of any size come to the same, the last and smallest included.
    #[test]
    fn a_file_larger_than_a_batch_is_imported_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = testing::config_for(folder.path());
        config.storage.writer_queue_events_max = 7;
        let input: String = (0..100).map(|n| testing::json(&testing::note(n, "")) + "\n").collect();
        let (ended, tally, _) = import_into(&Arc::new(config.clone()), Cursor::new(input), nobody());
        assert!(matches!(ended, Ok(Ended::Whole)));
        assert_eq!((tally.of(Outcome::Imported), tally.lines()), (100, 100));
        assert_eq!(testing::dates(&config).len(), 100);
    }

    /// An input that breaks off is told, and what came before it is stored.
    #[test]
    fn what_came_before_a_read_error_is_stored() {
        struct Broken(Option<Vec<u8>>);
        impl Read for Broken {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let Some(bytes) = self.0.take() else { return Err(io::Error::other("unplugged")) };
                let used = bytes.len().min(buffer.len());
                buffer[..used].copy_from_slice(&bytes[..used]);
                self.0 = (used < bytes.len()).then(|| bytes[used..].to_vec());
                Ok(used)
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let config = Arc::new(testing::config_for(folder.path()));
        let input = Broken(Some(format!("{}\n{{\"id", testing::json(&testing::note(5, ""))).into_bytes()));
        let (ended, tally, _) = import_into(&config, input, nobody());
        let error = ended.unwrap_err().tell("x.jsonl");
        assert!(error.to_string().contains("x.jsonl cannot be read to its end: unplugged"), "{error}");
        assert_eq!((tally.lines(), error.exit_code()), (1, 1));
        assert_eq!(testing::dates(&config), [5]);
    }

    /// A signal ends the run although the input goes on without end; what was read is stored or counted as not reached.
    #[test]
    fn a_signal_ends_a_run_without_end() {
        struct Endless(Vec<u8>, usize, Option<tokio::sync::watch::Sender<bool>>);
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                if self.1 > 1_000_000
                    && let Some(tell) = self.2.take()
                {
                    tell.send_replace(true);
                }
                let line = &self.0[self.1 % self.0.len()..];
                let used = line.len().min(buffer.len());
                buffer[..used].copy_from_slice(&line[..used]);
                self.1 += used;
                Ok(used)
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let config = Arc::new(testing::config_for(folder.path()));
        let (tell, interrupt) = Interrupt::by_hand();
        let line = testing::json(&testing::note(5, "")) + "\n";
        let (ended, tally, _) = import_into(&config, Endless(line.into_bytes(), 0, Some(tell)), interrupt);
        assert!(matches!(ended, Ok(Ended::Interrupted)), "{ended:?}");
        assert_eq!(tally.of(Outcome::Imported), 1);
    }
}
