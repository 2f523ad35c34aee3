//! `sledge verify`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;

use super::progress::{self, count_of_events, number};
use super::store;
use crate::config::Config;
use crate::error::Error;
use crate::store::verify::{VerifyReport, verify};

/// Check every stored event and the index
///
/// Reads the whole store and checks each record's checksum, each event's id and signature, and that the index agrees
/// with the event log. Changes nothing. Exit code 0: all is well, 1: damage was found and named. The store must not be
/// in use by `sledge serve`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge --store sledge-data verify")]
pub struct VerifyArgs {}

/// Checks and reports.
pub fn run(config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let (opened, report) = store::with_existing(config, |opened| {
        let bar = progress::bytes("checking", None);
        let report = verify(opened.embedded()?, &|done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        Ok((opened.embedded()?.open_report().clone(), report.map_err(|error| store::failed(config, error))?))
    })?;
    if let Some(reason) = &opened.rebuilt {
        super::say(&format!("the index was built again from the event log before the check: {reason}"));
    }
    super::print(out, &summary(config, &report))?;
    Ok(if report.problem_count == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn summary(config: &Config, report: &VerifyReport) -> String {
    let dir = config.store_dir().display();
    let checked = format!("{dir}: {} and {} index entries", count_of_events(report.events), number(report.entries));
    if report.problem_count == 0 {
        return format!("{checked} checked, all is well\n");
    }
    let mut text: String = report.problems.iter().map(|problem| format!("{problem}\n")).collect();
    let untold = report.problem_count - report.problems.len() as u64;
    if untold > 0 {
        text += &format!("… and {} more\n", number(untold));
    }
    let noun = if report.problem_count == 1 { "problem" } else { "problems" };
    text + &format!(
        "{checked} checked, {} {noun} found; `sledge repair` builds the index again, saves from the event log \
         what can be saved, and names what cannot\n",
        number(report.problem_count)
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    /// A good store passes.
    #[test]
    fn a_good_store_passes() {
        let folder = tempfile::tempdir().unwrap();
        let config = testing::store_with(folder.path(), [testing::note(1, "x"), testing::note(2, "y")]);
        let mut out = Vec::new();
        assert_eq!(run(&config, &mut out).unwrap(), ExitCode::SUCCESS);
        let said = String::from_utf8(out).unwrap();
        assert!(said.contains("2 events") && said.contains("all is well"), "{said}");
    }

    /// A flipped byte in the log is named, with exit code 1.
    #[test]
    fn a_flipped_byte_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let config = testing::store_with(folder.path(), (0..3).map(|n| testing::note(n, "some content")));
        let log = folder.path().join("gen-000001/events.log");
        let mut bytes = std::fs::read(&log).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&log, bytes).unwrap();
        let mut out = Vec::new();
        assert_eq!(run(&config, &mut out).unwrap(), ExitCode::FAILURE);
        let said = String::from_utf8(out).unwrap();
        assert!(said.contains("found"), "{said}");
    }
}
