//! `sledge repair`.

use std::cell::RefCell;
use std::io::Write;
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Args;
use indicatif::ProgressBar;

use super::progress::{self, count_of_events, number, size};
use super::store;
use crate::config::Config;
use crate::error::Error;
use crate::store::repair::{RepairReport, Survey, Wish, repair, survey};

/// Mend a damaged store, and say what is lost
///
/// Builds the index again where it does not agree with the event log. Where the log itself is damaged, writes a new one
/// with every sound record; events that can still be read inside damaged records are checked and stored again, and what
/// cannot be saved is listed with its place and its event id. A sound store is left as it is. The store must not be in
/// use by `sledge serve`. Exit code 0: all is well now, 1: something is lost or still wrong.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge repair --dry-run
  sledge repair --keep
  sledge repair --json")]
pub struct RepairArgs {
    /// Change nothing; read the event log and say what would be lost
    #[arg(long, conflicts_with = "keep")]
    pub dry_run: bool,
    /// Keep a copy of a damaged event log in the data directory; what is deleted later is not deleted there
    #[arg(long)]
    pub keep: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Mends or only looks, and says what came of it.
pub fn run(args: &RepairArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    store::check_is_directory(config)?;
    if !config.store_dir().is_dir() {
        return Err(Error::Failed(format!("there is no directory {}", config.store_dir().display())));
    }
    let (text, is_well) = if args.dry_run { look(args, config)? } else { mend(args, config)? };
    super::print(out, &text)?;
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn look(args: &RepairArgs, config: &Config) -> Result<(String, bool), Error> {
    let bar = progress::bytes("reading the event log", None);
    let survey = survey(config.store_dir(), &|done, total| progress::step(&bar, done, total));
    bar.finish_and_clear();
    let survey = survey.map_err(|error| store::failed(config, error))?;
    let text = if args.json { super::json(&survey) } else { surveyed(config, &survey) };
    Ok((text, survey.damaged.is_empty()))
}

fn mend(args: &RepairArgs, config: &Config) -> Result<(String, bool), Error> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let bar: RefCell<Option<(&'static str, ProgressBar)>> = RefCell::new(None);
    let show = |what: &'static str, done, total| {
        let mut shown = bar.borrow_mut();
        if shown.as_ref().is_none_or(|(shown, _)| *shown != what) {
            *shown = Some((what, progress::bytes(what, Some(total))));
        }
        if let Some((_, bar)) = &*shown {
            progress::step(bar, done, total);
        }
    };
    let wish = Wish { keep: args.keep, now, progress: &show };
    let report = store::opening(config, |options| repair(config.store_dir(), options, &wish));
    drop(bar);
    let report = report.map_err(|error| store::failed(config, error))?;
    let text = if args.json { super::json(&report) } else { mended(config, &report) };
    Ok((text, report.lost.is_empty() && report.problems.is_empty()))
}

fn surveyed(config: &Config, survey: &Survey) -> String {
    let mut text: String = survey.damaged.iter().map(|stretch| format!("{stretch}\n")).collect();
    for id in &survey.whole {
        text += &format!("event {id} can be saved\n");
    }
    let looked = format!(
        "{}: {} records, {} of event log",
        config.store_dir().display(),
        number(survey.records),
        size(survey.log_bytes)
    );
    text + &match survey.damaged.len() as u64 {
        0 => format!("{looked} read, all sound; `sledge verify` checks the index as well\n"),
        count => format!("{looked} read, {} damaged places; nothing was changed\n", number(count)),
    }
}

fn mended(config: &Config, report: &RepairReport) -> String {
    let mut lines = Vec::new();
    if let Some(generation) = &report.current_mended {
        lines.push(format!("CURRENT was written again and names {generation}"));
    }
    if report.header_mended {
        lines.push("the header of the event log was written again".to_owned());
    }
    if let Some(reason) = &report.index_rebuilt {
        lines.push(format!("the index was built again: {reason}"));
    }
    if report.replaced_again > 0 {
        lines.push(format!("{} taken out, since newer versions are there", count_of_events(report.replaced_again)));
    }
    if let Some(sizes) = &report.rewritten {
        let (before, after) = (size(sizes.bytes_before), size(sizes.bytes_after));
        lines.push(format!("the event log was written again without what is damaged: {before} before, {after} now"));
    }
    if let Some(kept) = &report.kept {
        lines.push(format!("the damaged log is kept as {}", kept.display()));
    }
    lines.extend(report.saved.iter().map(|id| format!("event {id} was read out of a damaged record and saved")));
    lines.extend(report.lost.iter().map(|stretch| format!("lost: {stretch}")));
    lines.extend(report.problems.iter().map(|problem| format!("still wrong: {problem}")));
    let state = if report.problems.is_empty() { "all is well" } else { "not all is well" };
    lines.push(format!("{}: {}, {state}", config.store_dir().display(), count_of_events(report.events)));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    fn said(config: &Config, dry_run: bool, json: bool) -> (String, ExitCode) {
        let mut out = Vec::new();
        let code = run(&RepairArgs { dry_run, keep: false, json }, config, &mut out).unwrap();
        (String::from_utf8(out).unwrap(), code)
    }

    /// A look names the event and changes nothing, the repair names it once more as lost, and then all is well.
    #[test]
    fn a_damaged_event_is_named_and_the_rest_kept() {
        let folder = tempfile::tempdir().unwrap();
        let notes: Vec<_> = (0..3).map(|n| testing::note(n, &format!("content {n}"))).collect();
        let config = testing::store_with(folder.path(), notes.clone());
        let path = folder.path().join("gen-000001/events.log");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(9).position(|part| part == b"content 1").unwrap();
        bytes[at] = b'C';
        std::fs::write(&path, &bytes).unwrap();
        let id = notes[1].id.to_hex();
        let (text, code) = said(&config, true, false);
        assert!(text.contains(&id) && text.contains("nothing was changed") && code == ExitCode::FAILURE, "{text}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let (text, code) = said(&config, false, true);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&json["lost"][0]["events"][0], &json["events"]), (&id.into(), &2.into()));
        assert_eq!(code, ExitCode::FAILURE);
        let (text, code) = said(&config, false, false);
        assert!(text.contains("2 events, all is well") && code == ExitCode::SUCCESS, "{text}");
        assert_eq!(testing::dates(&config), [2, 0]);
    }
}
