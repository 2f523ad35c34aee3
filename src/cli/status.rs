//! `sledge status`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::progress::{number, size};
use super::store::Access;
use super::{filter, remote, store};
use crate::config::Config;
use crate::error::Error;
use crate::store::{Store, StoreStats, log, schema};

/// Describe the store: events, bytes, generation
///
/// Prints how many events the store holds, how much disk it takes, and how much of that a compaction would free. While
/// `sledge serve` has the store, prints where it runs and how many events it has.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge status
  sledge status --json")]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A store that nobody else has.
#[derive(Debug, Serialize)]
struct Status {
    path: String,
    #[serde(flatten)]
    stats: StoreStats,
    log_format: u32,
    index_schema: u32,
}

/// A store that a relay has.
#[derive(Debug, Serialize)]
struct Served {
    path: String,
    relay: String,
    events: u64,
}

/// Prints the figures.
pub fn run(args: &StatusArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    store::must_exist(config)?;
    let path = config.store_dir().display().to_string();
    let text = match store::open_or_reach(config)? {
        Access::Own(opened) => {
            let stats = store::with_open(config, &opened, |opened| Ok::<_, Error>(opened.stats()))?;
            let status = Status { path, stats, log_format: log::FORMAT_VERSION, index_schema: schema::SCHEMA_VERSION };
            if args.json { json(&status) } else { status.for_people() }
        }
        Access::Relay(relay) => {
            let events = remote::count(&relay, &[filter::read("{}")?])?;
            let served = Served { path, relay, events };
            if args.json { json(&served) } else { served.for_people() }
        }
    };
    super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn json(status: &impl Serialize) -> String {
    serde_json::to_string(status).expect("made of texts and numbers") + "\n"
}

impl Status {
    fn for_people(&self) -> String {
        let stats = &self.stats;
        let rows = [
            ("store", self.path.clone()),
            ("events", number(stats.events)),
            ("event log", format!("{} (format {})", size(stats.log_bytes), self.log_format)),
            ("to be freed", format!("{} by `sledge compact`", size(stats.dead_bytes))),
            ("index", format!("{} (schema {})", size(stats.index_bytes), self.index_schema)),
            ("not yet indexed", format!("{} entries", number(stats.buffered_entries))),
        ];
        table(&rows)
    }
}

impl Served {
    fn for_people(&self) -> String {
        let rows = [
            ("store", self.path.clone()),
            ("in use by", format!("the relay on {}", self.relay)),
            ("events", number(self.events)),
        ];
        table(&rows)
    }
}

fn table(rows: &[(&str, String)]) -> String {
    rows.iter().map(|(name, value)| format!("{name:<17}{value}\n")).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    /// People get units, programs get plain numbers under stable names.
    #[test]
    fn figures_for_people_and_for_programs() {
        let folder = tempfile::tempdir().unwrap();
        let config = testing::store_with(folder.path(), (0..3).map(|n| testing::note(n, "")));
        let status = |json| {
            let mut out = Vec::new();
            run(&StatusArgs { json }, &config, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let told = status(false);
        assert!(told.contains("events           3\n") && told.contains(" KiB (format 1)"), "{told}");
        let json: serde_json::Value = serde_json::from_str(&status(true)).unwrap();
        assert_eq!(json["events"], 3);
        assert_eq!(json["path"], folder.path().to_str().unwrap());
        for key in ["log_bytes", "dead_bytes", "index_bytes", "buffered_entries", "log_format", "index_schema"] {
            assert!(json[key].is_u64(), "{key}");
        }
    }
}
