//! `sledge migrate`: from one store into another, a directory or a database each.
//!
//! What `export` writes and `import` reads, in one process: a thread reads the source, newest first, leaves out what the
//! target has, and passes the rest through a pipe to the stages that every import takes. The pipe holds little, so the
//! source is read no faster than the target stores. Running it again goes on where it was broken off: what is stored is
//! passed over without being checked again.

use std::collections::HashSet;
use std::io::{BufWriter, PipeWriter, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use indicatif::ProgressBar;

use super::lines::Lines;
use super::own::Import;
use super::tally::{Outcome, Report};
use super::{Ended, Failure, JSON_BYTES_A_BYTE};
use crate::cli::interrupt::Interrupt;
use crate::cli::progress::{self, count_of_events, number};
use crate::cli::store::{self, Opened};
use crate::config::Config;
use crate::error::Error;
use crate::protocol::item::Item;
use crate::protocol::{EventId, Filter};
use crate::relay::Clock;
use crate::store::{PageBudget, Progress, Row};

/// Copy all events from one store into another
///
/// Copies every event that has not expired from one store into another: a directory or, in a build with the feature
/// `postgres`, a database. What the target has already is passed over, so a run that was broken off is simply run again.
/// Neither store must be in use by `sledge serve`, unless it is a database.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge migrate --from sledge-data --to postgres://relay@db.example.com/relay
  sledge migrate --from postgres://relay@db.example.com/relay --to sledge-data")]
pub struct MigrateArgs {
    /// Store to read: a directory, or the URL of a database
    #[arg(long, value_name = "STORE", value_parser = NonEmptyStringValueParser::new())]
    pub from: String,
    /// Store to write: a directory, which is made when missing, or the URL of a database
    #[arg(long, value_name = "STORE", value_parser = NonEmptyStringValueParser::new())]
    pub to: String,
}

/// Bytes of events read in one go.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// How long one page may take; nobody else waits.
const PAGE_TIME_MAX: Duration = Duration::from_secs(60);

/// Copies, and tells what came of it.
pub fn run(args: &MigrateArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    if args.from == args.to {
        return Err(Error::Usage("--from and --to name the same store".to_owned()));
    }
    let at = |store: &String| Config { store: store.clone(), ..config.clone() };
    let (from, to) = (at(&args.from), Arc::new(at(&args.to)));
    store::with_existing(&from, |source| {
        let target = store::open_any(&to)?;
        target.describe_owner(&format!("sledge migrate (process {})", std::process::id()));
        store::with_open(&to, &target, |target| {
            let copied = copy(&from, source, &to, target, Interrupt::watch()?)?;
            super::super::print(out, &copied)
        })
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Copies what the target lacks; the summary for people.
fn copy(
    from: &Config,
    source: &Opened,
    to: &Arc<Config>,
    target: &Opened,
    interrupt: Interrupt,
) -> Result<String, Error> {
    let began = Instant::now();
    let cannot = |error: std::io::Error| Error::Failed(format!("cannot make a pipe: {error}"));
    let (reader, writer) = std::io::pipe().map_err(cannot)?;
    let bar = progress::events("copying", Some(source.stats().events));
    let there = AtomicU64::new(0);
    let mut say = |text: &str| bar.suspend(|| super::super::say(text));
    let mut report = Report::new(&mut say);
    let import = Import { config: to, store: target.store(), clock: Clock::system(), protected: true, interrupt };
    let (ended, sent) = thread::scope(|scope| {
        let sending = scope.spawn(|| send(from, source, to, target, writer, &there, &bar));
        let line_bytes_max = to.limits.frame_bytes_max.saturating_mul(JSON_BYTES_A_BYTE);
        // A pipe that nobody reads any more ends the sender.
        let ended = Lines::new(reader, line_bytes_max)
            .map_err(Failure::Input)
            .and_then(|lines| import.run(lines, &mut report))
            .map_err(|failure| failure.tell("the source"));
        (ended, sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let tally = report.tally;
    bar.finish_and_clear();
    let copied = tally.of(Outcome::Imported);
    if ended? == Ended::Interrupted {
        let text = format!("interrupted after {}; a second run goes on from there", count_of_events(copied));
        return Err(Error::Failed(text));
    }
    sent?;
    let there = there.into_inner() + tally.of(Outcome::AlreadyStored);
    let others = tally.lines() - copied - tally.of(Outcome::AlreadyStored);
    let seconds = began.elapsed().as_secs_f64();
    Ok(format!(
        "copied {}, {} were there, {} refused ({seconds:.1} s)\n",
        count_of_events(copied),
        number(there),
        number(others)
    ))
}

/// Writes the events that the target lacks into the pipe.
fn send(
    from: &Config,
    source: &Opened,
    to: &Config,
    target: &Opened,
    pipe: PipeWriter,
    there: &AtomicU64,
    bar: &ProgressBar,
) -> Result<(), Error> {
    let mut pipe = BufWriter::new(pipe);
    let query = store::query([Filter::default()], Clock::system().now());
    let mut scan = source.scan(query).map_err(|error| store::failed(from, error))?;
    let mut rows: Vec<Row> = Vec::new();
    loop {
        let budget = PageBudget { bytes_max: PAGE_BYTES_MAX, until: Instant::now() + PAGE_TIME_MAX };
        let progress = scan.page(budget, &mut rows).map_err(|error| store::failed(from, error))?;
        let known = known(target, &rows).map_err(|error| store::failed(to, error))?;
        there.fetch_add(known.len() as u64, Ordering::Relaxed);
        for row in rows.iter().filter(|row| !known.contains(&row.id)) {
            if pipe.write_all(&row.json).and_then(|()| pipe.write_all(b"\n")).is_err() {
                // The import has ended and says why.
                return Ok(());
            }
        }
        bar.inc(rows.len() as u64);
        rows.clear();
        if progress != Progress::Paused {
            let _ = pipe.flush();
            return Ok(());
        }
    }
}

/// Which of these the target has.
fn known(target: &Opened, rows: &[Row]) -> Result<HashSet<EventId>, crate::store::StoreError> {
    let mut ids: Vec<EventId> = rows.iter().map(|row| row.id).collect();
    ids.sort_unstable();
    // Time 0, at which nothing has expired.
    let query = store::query([Filter { ids: Some(ids), ..Filter::default() }], 0);
    let mut scan = target.scan(query)?;
    let mut items: Vec<Item> = Vec::new();
    while scan.items(Instant::now() + PAGE_TIME_MAX, &mut items)? == Progress::Paused {}
    Ok(items.into_iter().map(|item| item.id).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    /// All is copied; a second run finds it there, and what the target had beside it stays.
    #[test]
    fn a_second_run_finds_everything_there() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let from = testing::store_with(&at("from"), (0..50).map(|n| testing::note(n, "")));
        let to = testing::store_with(&at("to"), [testing::note(7, ""), testing::note(900, "")]);
        let migrate = || {
            let args = MigrateArgs { from: from.store.clone(), to: to.store.clone() };
            let mut out = Vec::new();
            run(&args, &Config::default(), &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let first = migrate();
        assert!(first.starts_with("copied 49 events, 1 were there, 0 refused"), "{first}");
        let second = migrate();
        assert!(second.starts_with("copied 0 events, 50 were there, 0 refused"), "{second}");
        assert_eq!(testing::dates(&to).len(), 51);
    }

    /// A store is not copied onto itself, and a misspelt one is named.
    #[test]
    fn wrong_stores_are_named() {
        let migrate = |from: &str, to: &str| {
            let args = MigrateArgs { from: from.to_owned(), to: to.to_owned() };
            run(&args, &Config::default(), &mut Vec::new()).unwrap_err().to_string()
        };
        assert!(migrate("a", "a").contains("same store"));
        assert!(migrate("/no/such/store", "b").contains("/no/such/store"));
    }
}
