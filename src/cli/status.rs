//! `sledge status`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::progress::{number, size};
use super::store::{self, Access};
use crate::config::Config;
use crate::error::Error;
use crate::server::control::{self, Answer, Request};
use crate::store::{RetentionStats, StoreStats, log, schema};

/// Describe the store: events, bytes, generation
///
/// Prints how many events the store holds, how much disk it takes, and how much of that a compaction would free. While
/// `sledge serve` has the store, asks the relay, and also prints how long it runs and how many clients it has.
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
    #[serde(flatten)]
    formats: Option<Formats>,
}

/// Versions of what lies in a directory.
#[derive(Debug, Serialize)]
struct Formats {
    log_format: u32,
    index_schema: u32,
}

/// A store that a relay has.
#[derive(Debug, Serialize)]
struct Served {
    path: String,
    relay: String,
    #[serde(flatten)]
    status: Box<control::Status>,
}

/// Prints the figures.
pub fn run(args: &StatusArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    store::must_exist(config)?;
    let path = store::shown(config);
    let text = match store::reach_or_open(config)? {
        Access::Own(opened) => {
            let stats = store::with_open(config, &opened, |opened| Ok::<_, Error>(opened.stats()))?;
            let formats = Formats { log_format: log::FORMAT_VERSION, index_schema: schema::SCHEMA_VERSION };
            let status = Status { path, stats, formats: opened.in_directory().map(|_| formats) };
            if args.json { json(&status) } else { status.for_people() }
        }
        Access::Relay(relay) => match super::control::ask(config, Request::Status, &|_, _| {})? {
            Answer::Status(status) => {
                let served = Served { path, relay, status };
                if args.json { json(&served) } else { served.for_people() }
            }
            other => return Err(super::control::strange(&other)),
        },
    };
    super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn json(status: &impl Serialize) -> String {
    serde_json::to_string(status).expect("made of texts and numbers") + "\n"
}

impl Status {
    fn for_people(&self) -> String {
        let mut rows = vec![("store", self.path.clone())];
        rows.extend(store_rows(&self.stats));
        if let Some(Formats { log_format, index_schema }) = self.formats {
            rows.push(("formats", format!("log {log_format}, index schema {index_schema}")));
        }
        table(&rows)
    }
}

fn store_rows(stats: &StoreStats) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("events", number(stats.events)),
        ("event log", size(stats.log_bytes)),
        ("to be freed", format!("{} by `sledge compact`", size(stats.dead_bytes))),
        ("index", size(stats.index_bytes)),
        ("not yet indexed", format!("{} entries", number(stats.buffered_entries))),
    ];
    rows.extend(stats.retention.iter().flat_map(retention_rows));
    rows
}

fn retention_rows(retention: &RetentionStats) -> Vec<(&'static str, String)> {
    let mut rows = vec![("evicted", format!("{} events since the start", number(retention.evicted_events)))];
    if retention.evicted_up_to > 0 {
        rows.push(("refused up to", format!("created_at {} (evicted)", retention.evicted_up_to)));
    }
    if retention.named_evicted_up_to > 0 {
        let up_to = retention.named_evicted_up_to;
        rows.push(("", format!("created_at {up_to} for kinds that rules name (evicted first)")));
    }
    if retention.quota_bytes > 0 {
        let full = if retention.used_up { ", USED UP: writes are refused" } else { "" };
        rows.push(("quota", format!("{} of {}{full}", size(retention.used_bytes), size(retention.quota_bytes))));
    }
    rows
}

impl Served {
    fn for_people(&self) -> String {
        let mut rows = vec![
            ("store", self.path.clone()),
            ("in use by", format!("the relay on {}", self.relay)),
            ("up for", duration(self.status.uptime_secs)),
            (
                "takes writes",
                self.status.problem.as_deref().map_or("yes".to_owned(), |problem| format!("NO: {problem}")),
            ),
            ("connections", number(self.status.connections as u64)),
            ("subscriptions", number(self.status.subscriptions as u64)),
            ("shut out", format!("{} addresses", number(self.status.banned as u64))),
            ("queries", format!("{} since the start", number(self.status.queries.finished))),
        ];
        rows.extend(store_rows(&self.status.stats));
        table(&rows)
    }
}

/// Seconds as people say them, in the two largest units.
pub fn duration(secs: u64) -> String {
    let (minutes, hours, days) = (secs / 60, secs / 3_600, secs / 86_400);
    match secs {
        0..60 => format!("{secs} s"),
        60..3_600 => format!("{minutes} min {} s", secs % 60),
        3_600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{} d {} h", number(days), hours % 24),
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

    /// The two largest units, and no others.
    #[test]
    fn durations_are_readable() {
        for (secs, expected) in
            [(59, "59 s"), (61, "1 min 1 s"), (3_599, "59 min 59 s"), (7_260, "2 h 1 min"), (90_061, "1 d 1 h")]
        {
            assert_eq!(duration(secs), expected);
        }
    }

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
        assert!(told.contains("events           3\n") && told.contains("log 1, index schema "), "{told}");
        let json: serde_json::Value = serde_json::from_str(&status(true)).unwrap();
        assert_eq!(json["events"], 3);
        assert_eq!(json["path"], folder.path().to_str().unwrap());
        for key in ["log_bytes", "dead_bytes", "index_bytes", "buffered_entries", "log_format", "index_schema"] {
            assert!(json[key].is_u64(), "{key}");
        }
    }
}
