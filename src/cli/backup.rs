//! `sledge backup`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::progress::{self, number, size};
use super::store;
use crate::config::Config;
use crate::error::Error;
use crate::store::StoreError;
use crate::store::backup::{BackupCheck, BackupReport, backup, check_backup};

/// Copy the store to another folder, also while `sledge serve` runs
///
/// Copies the event log up to what is stored now. Into a folder that holds a backup already only what is new is
/// copied, and what was deleted in the store since is erased in the backup as well; after a compaction the copy is made
/// anew beside the old one, which needs room for both. An interrupted run leaves the last backup good. `sledge restore`
/// makes a store of it. Exit code 1 also where the store has damage: what can be read is in the backup, and `sledge
/// repair` is due.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge backup /mnt/disk/sledge-backup
  sledge backup --verify /mnt/disk/sledge-backup")]
pub struct BackupArgs {
    /// Folder of the backup; it is made where there is none
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Copy nothing; read the backup and check every record of it
    #[arg(long)]
    pub verify: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Copies or checks, and says what came of it.
pub fn run(args: &BackupArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    if args.verify {
        return verify(args, out);
    }
    store::check_is_directory(config)?;
    store::must_exist(config)?;
    let bar = progress::bytes("copying", None);
    let report = backup(config.store_dir(), &args.folder, &|done, total| progress::step(&bar, done, total));
    bar.finish_and_clear();
    let report = report.map_err(|error| failed(&args.folder, error))?;
    for (offset, len) in &report.damaged {
        super::say(&format!(
            "{len} bytes at byte {offset} of the event log are damaged, and so in the backup; run `sledge repair`"
        ));
    }
    let text = if args.json { super::json(&report) } else { summary(&args.folder, &report) };
    super::print(out, &text)?;
    Ok(if report.damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn summary(folder: &Path, report: &BackupReport) -> String {
    let mut text = format!(
        "{}: {} records, {}, of which {} were copied now",
        folder.display(),
        number(report.records),
        size(report.log_bytes),
        size(report.bytes_copied)
    );
    if report.erased > 0 {
        text += &format!("; {} removed events were erased", number(report.erased));
    }
    if let Some(reason) = &report.begun_anew {
        text += &format!("; it is a whole copy, since {reason}");
    }
    text + "\n"
}

fn verify(args: &BackupArgs, out: &mut impl Write) -> Result<ExitCode, Error> {
    let bar = progress::bytes("checking", None);
    let check = check_backup(&args.folder, &|done, total| progress::step(&bar, done, total));
    bar.finish_and_clear();
    let check = check.map_err(|error| failed(&args.folder, error))?;
    let text = if args.json { super::json(&check) } else { findings(&args.folder, &check) };
    super::print(out, &text)?;
    Ok(if check.problem_count == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What a check found, for people.
pub fn findings(folder: &Path, check: &BackupCheck) -> String {
    let mut text: String = check.problems.iter().map(|problem| format!("{problem}\n")).collect();
    let untold = check.problem_count - check.problems.len() as u64;
    if untold > 0 {
        text += &format!("… and {} more\n", number(untold));
    }
    for stretch in &check.damaged_in_store {
        text += &format!("damaged in the store already: {stretch}\n");
    }
    let checked = format!("{}: {} records, {}", folder.display(), number(check.records), size(check.log_bytes));
    text + &match check.problem_count {
        0 => format!("{checked} checked, all is well\n"),
        count => format!("{checked} checked, {} problems found\n", number(count)),
    }
}

/// An error of reading or writing a backup, as the user's.
pub fn failed(folder: &Path, error: StoreError) -> Error {
    let folder = folder.display();
    Error::Failed(match &error {
        StoreError::DiskFull => {
            format!(
                "the disk that holds {folder} is full; what was there before is still good; free some space and try again"
            )
        }
        StoreError::NoRoom { needed_bytes, free_bytes } => format!(
            "this needs {} on the disk that holds {folder}, and {} are free; make room and try again",
            size(*needed_bytes),
            size(*free_bytes)
        ),
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            format!("{error}; run as the user who owns {folder} and may read the store")
        }
        _ => error.to_string(),
    })
}
