//! `sledge compact`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;

use super::control;
use super::progress::{self, count_of_events, size};
use super::store::{self, Access};
use crate::config::Config;
use crate::error::Error;
use crate::server::control::{Answer, Request};
use crate::store::compact::{CompactReport, Pace, bytes_needed, compact};

/// Rewrite the store without what was deleted or replaced
///
/// Writes a new generation of the store that holds live events only, then switches to it. Needs free disk space for
/// the live events and says how much before it starts; an interrupted run leaves the old generation in force.
/// While `sledge serve` has the store, the relay does it, at the pace that `compact_share` in the settings allows; it goes
/// on when this command is ended.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge --store sledge-data compact")]
pub struct CompactArgs {}

/// Compacts, and says what was gained.
pub fn run(config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    store::check_is_directory(config)?;
    store::must_exist(config)?;
    let report = match store::open_or_reach(config)? {
        Access::Own(opened) => store::with_open(config, &opened, |opened| {
            let opened = opened.embedded()?;
            tell_need(bytes_needed(opened));
            with_bar(|progress| compact(opened, &Pace::flat_out(progress)))
                .map_err(|error| store::failed(config, error))
        })?,
        Access::Relay(_) => by_relay(config)?,
    };
    super::print(out, &summary(&report))?;
    Ok(ExitCode::SUCCESS)
}

fn by_relay(config: &Config) -> Result<CompactReport, Error> {
    match control::ask(config, Request::Status, &|_, _| {})? {
        Answer::Status(status) => tell_need(status.stats.compaction_bytes_needed()),
        other => return Err(control::strange(&other)),
    }
    match with_bar(|progress| control::ask(config, Request::Compact, progress))? {
        Answer::Report(report) => Ok(report.unwrap_or_default()),
        other => Err(control::strange(&other)),
    }
}

fn tell_need(bytes: u64) {
    super::say(&format!("compacting needs about {} of free disk space", size(bytes)));
}

fn with_bar<T>(work: impl FnOnce(&dyn Fn(u64, u64)) -> T) -> T {
    let bar = progress::bytes("compacting", None);
    work(&|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })
}

fn summary(report: &CompactReport) -> String {
    let freed = report.bytes_before.saturating_sub(report.bytes_after);
    format!(
        "{} kept; the event log went from {} to {}, {} are free\n",
        count_of_events(report.events),
        size(report.bytes_before),
        size(report.bytes_after),
        size(freed)
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;
    use crate::store::Removal;

    /// What was deleted is gone from the file, what is left can still be read.
    #[test]
    fn compacting_keeps_what_is_stored_and_frees_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let notes: Vec<_> = (0..100).map(|n| testing::note(n, &"x".repeat(1_000))).collect();
        let config = testing::store_with(folder.path(), notes.clone());
        let ids: Vec<_> = notes[..90].iter().map(|note| note.id).collect();
        store::with_existing(&config, |opened| Ok(opened.remove(&ids, Removal::Operator).unwrap())).unwrap();
        let mut out = Vec::new();
        run(&config, &mut out).unwrap();
        let said = String::from_utf8(out).unwrap();
        assert!(said.starts_with("10 events kept; the event log went from 1"), "{said}");
        assert_eq!(testing::dates(&config), [99, 98, 97, 96, 95, 94, 93, 92, 91, 90]);
    }
}
