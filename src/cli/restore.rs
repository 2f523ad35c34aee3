//! `sledge restore`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::progress::{self, count_of_events, number, size};
use super::{backup, store};
use crate::config::Config;
use crate::error::Error;
use crate::store::backup::{BackupCheck, restore};
use crate::store::verify::verify;

/// Make a store of a backup
///
/// Checks every record of the backup on the way into the data directory, which must be empty or not be there yet,
/// builds the index, and checks the store. A damaged backup is refused, and nothing is left behind then.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge --store sledge-data-new restore /mnt/disk/sledge-backup")]
pub struct RestoreArgs {
    /// Folder of the backup
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Restore what is sound of a damaged backup
    #[arg(long)]
    pub accept_damage: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Restored {
    store: String,
    events: u64,
    backup: BackupCheck,
    problems: Vec<String>,
}

/// Restores, opens and checks.
pub fn run(args: &RestoreArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    store::check_is_directory(config)?;
    let bar = progress::bytes("restoring", None);
    let dir = config.store_dir();
    let check = restore(&args.folder, dir, args.accept_damage, &|done, total| progress::step(&bar, done, total));
    bar.finish_and_clear();
    let backup = check.map_err(|error| backup::failed(if_full(args, config, &error), error))?;
    let report = store::with_existing(config, |opened| {
        let bar = progress::bytes("checking", None);
        verify(opened.embedded()?, &|done, total| progress::step(&bar, done, total))
            .map_err(|error| store::failed(config, error))
    })?;
    let dir = dir.display().to_string();
    let restored = Restored { store: dir, events: report.events, backup, problems: report.problems };
    let text = if args.json { super::json(&restored) } else { restored.for_people(args) };
    super::print(out, &text)?;
    Ok(if restored.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The folder that an error speaks of: room is missing where something is written.
fn if_full<'c>(args: &'c RestoreArgs, config: &'c Config, error: &crate::store::StoreError) -> &'c std::path::Path {
    use crate::store::StoreError::{DiskFull, NoRoom};
    if matches!(error, DiskFull | NoRoom { .. }) { config.store_dir() } else { &args.folder }
}

impl Restored {
    fn for_people(&self, args: &RestoreArgs) -> String {
        let mut text = String::new();
        if self.backup.problem_count > 0 || !self.backup.damaged_in_store.is_empty() {
            text += &backup::findings(&args.folder, &self.backup);
        }
        text += &self.problems.iter().map(|problem| format!("{problem}\n")).collect::<String>();
        text += &format!(
            "{}: {} from {} records, {}",
            self.store,
            count_of_events(self.events),
            number(self.backup.records),
            size(self.backup.log_bytes)
        );
        text + if self.problems.is_empty() { "; checked, all is well\n" } else { "; `sledge repair` is due\n" }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::backup::BackupArgs;
    use crate::cli::testing;

    /// There and back again: what was stored is stored, and the figures are told to people and programs.
    #[test]
    fn a_backup_is_made_checked_and_restored() {
        let folder = tempfile::tempdir().unwrap();
        let config = testing::store_with(&folder.path().join("store"), (0..5).map(|n| testing::note(n, "content")));
        let dest = folder.path().join("backup");
        let backup = |verify, json| {
            let mut out = Vec::new();
            let args = BackupArgs { folder: dest.clone(), verify, json };
            assert_eq!(backup::run(&args, &config, &mut out).unwrap(), ExitCode::SUCCESS);
            String::from_utf8(out).unwrap()
        };
        let said = backup(false, false);
        assert!(said.contains("5 records") && said.contains("no backup in"), "{said}");
        let json: serde_json::Value = serde_json::from_str(&backup(false, true)).unwrap();
        assert_eq!((&json["records"], &json["bytes_copied"]), (&5.into(), &0.into()));
        assert!(backup(true, false).contains("all is well"));
        let new = testing::config_for(&folder.path().join("new"));
        let mut out = Vec::new();
        let args = RestoreArgs { folder: dest, accept_damage: false, json: false };
        assert_eq!(run(&args, &new, &mut out).unwrap(), ExitCode::SUCCESS);
        let said = String::from_utf8(out).unwrap();
        assert!(said.contains("5 events from 5 records") && said.contains("all is well"), "{said}");
        assert_eq!(testing::dates(&new), [4, 3, 2, 1, 0]);
        assert!(run(&args, &new, &mut Vec::new()).unwrap_err().to_string().contains("is not empty"));
    }
}
