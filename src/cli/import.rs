//! `sledge import`.

mod check;
pub(super) mod lines;
pub mod migrate;
mod own;
mod relay;
mod tally;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use self::lines::Lines;
use self::tally::{Outcome, Report, Tally};
use super::interrupt::Interrupt;
use super::progress::{self, number};
use super::remote::Door;
use super::store::{self, Access};
use crate::config::Config;
use crate::error::Error;
use crate::relay::Clock;

/// Read events from a file into the store
///
/// Reads one event (a JSON object) a line, checks id and signature of each, and stores what the rules of the NIPs let
/// stand, whatever its date. Gzip is recognised by its content. A bad line is named with its number and the run goes
/// on; the summary at the end counts what was stored and why the rest was not. Importing the same file again adds
/// nothing. While `sledge serve` has the store, the events go to the relay, which applies its limits to dates too.
///
/// Exit code 0: the file was read to its end, even if lines were refused. 1: it could not be, or not one line was an
/// event, or storing failed, or the run was interrupted; what came before is stored, and a second run skips it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge import events.jsonl.gz
  sledge --store old export | sledge --store new import --protected -")]
pub struct ImportArgs {
    /// File with one event a line, plain or gzip; - reads standard input
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    /// Import protected events (NIP-70) too, which only their authors may publish: for an export of your own relay
    #[arg(long)]
    pub protected: bool,
    /// Print the summary as JSON to standard output
    #[arg(long)]
    pub json: bool,
}

/// How many bytes of a line one byte of an event may take: `\u0041` is an A.
pub(super) const JSON_BYTES_A_BYTE: usize = 6;

/// How a run ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The whole file was read.
    Whole,
    /// Somebody asked to stop.
    Interrupted,
}

impl ImportArgs {
    fn name(&self) -> String {
        input_name(&self.file)
    }
}

/// A file, or standard input for `-`, and how many bytes it has if that is known.
pub(super) fn open_input(file: &Path) -> Result<(Box<dyn Read + Send>, Option<u64>), Error> {
    if is_stdin(file) {
        return Ok((Box::new(std::io::stdin()), None));
    }
    let opened = File::open(file).map_err(Error::io("read", file))?;
    let metadata = opened.metadata().map_err(Error::io("read", file))?;
    Ok((Box::new(opened), metadata.is_file().then_some(metadata.len())))
}

/// What people call it.
pub(super) fn input_name(file: &Path) -> String {
    if is_stdin(file) { "standard input".to_owned() } else { file.display().to_string() }
}

fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

/// Imports, and tells what came of it.
pub fn run(args: &ImportArgs, config: &Arc<Config>, out: &mut impl Write) -> Result<ExitCode, Error> {
    let (input, bytes) = open_input(&args.file)?;
    let access = store::open_or_reach(config)?;
    if let Access::Own(opened) = &access {
        // Only makes the message better that others get meanwhile.
        opened.describe_owner(&format!("sledge import (process {})", std::process::id()));
    }
    let started = Instant::now();
    let bar = progress::bytes("importing", bytes);
    let line_bytes_max = config.limits.frame_bytes_max.saturating_mul(JSON_BYTES_A_BYTE);
    let lines = Lines::new(bar.wrap_read(input), line_bytes_max).map_err(Error::io("read", args.name()))?;
    let mut say = |text: &str| bar.suspend(|| super::say(text));
    let mut report = Report::new(&mut say);
    let ended = import(args, lines, access, config, &mut report);
    let tally = report.tally;
    bar.finish_and_clear();
    super::say(&format!("{} ({:.1} s)", tally.for_people(), started.elapsed().as_secs_f64()));
    if args.json {
        super::print(out, &format!("{}\n", tally.to_json()))?;
    }
    let ended = ended.map_err(|failure| failure.tell(&args.name()))?;
    exit_code(ended, &tally, &args.name())
}

/// Why a run could not go on.
#[derive(Debug)]
enum Failure {
    /// The file.
    Input(std::io::Error),
    /// The store, the relay, or the system.
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Other(error)
    }
}

impl Failure {
    fn tell(self, file: &str) -> Error {
        match self {
            Failure::Input(error) => Error::Failed(format!(
                "{file} cannot be read to its end: {error}; the lines before that are imported, and a second run with \
                 a good file skips them"
            )),
            Failure::Other(error) => error,
        }
    }
}

fn import(
    args: &ImportArgs,
    lines: Lines,
    access: Access,
    config: &Arc<Config>,
    report: &mut Report,
) -> Result<Ended, Failure> {
    let interrupt = Interrupt::watch()?;
    match access {
        Access::Own(opened) => {
            let import = own::Import {
                config,
                store: opened.store(),
                clock: Clock::system(),
                protected: args.protected,
                interrupt,
            };
            store::with_open(config, &opened, |_| import.run(lines, report))
        }
        Access::Relay(url) => {
            super::say(&format!("the relay on {url} has the store; the events go to it"));
            let door = Door::of_operator(config, url);
            relay::run(&door, lines, args.protected, config.limits.frame_bytes_max, interrupt, report)
        }
    }
}

fn exit_code(ended: Ended, tally: &Tally, file: &str) -> Result<ExitCode, Error> {
    if ended == Ended::Interrupted {
        return Err(Error::Failed(format!(
            "interrupted after {} lines of {file}; a second run skips what is stored and goes on",
            number(tally.lines())
        )));
    }
    if tally.lines() > 0 && tally.of(Outcome::Unreadable) == tally.lines() {
        return Err(Error::Failed(format!(
            "not one line of {file} is an event; it should hold one event, a JSON object, a line"
        )));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Refused lines are no failure; an interruption is, and so is a file without events.
    #[test]
    fn exit_codes() {
        let tally = |outcomes: &[Outcome]| {
            let mut tally = Tally::default();
            outcomes.iter().for_each(|outcome| tally.add(*outcome));
            tally
        };
        let code = |ended, outcomes: &[Outcome]| match exit_code(ended, &tally(outcomes), "x.jsonl") {
            Ok(_) => 0,
            Err(error) => error.exit_code(),
        };
        assert_eq!(code(Ended::Whole, &[]), 0);
        assert_eq!(code(Ended::Whole, &[Outcome::Invalid, Outcome::Imported, Outcome::Refused]), 0);
        assert_eq!(code(Ended::Whole, &[Outcome::Invalid, Outcome::Unreadable]), 0);
        assert_eq!(code(Ended::Whole, &[Outcome::Unreadable, Outcome::Unreadable]), 1);
        assert_eq!(code(Ended::Interrupted, &[Outcome::Imported]), 1);
    }
}
