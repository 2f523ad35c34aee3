//! `sledge top`: a running relay, looked at once a second.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use console::Term;

use super::interrupt::Interrupt;
use super::progress::{number, size};
use super::status::duration;
use super::store;
use crate::config::Config;
use crate::error::Error;
use crate::relay::counters::REASONS;
use crate::server::control::{Answer, Request, Status};

/// Watch a running relay
///
/// Shows connections, rates, queues, disk and the slowest queries of the relay that has the store, again every second,
/// until Ctrl-C. Where standard output is no terminal, each look is printed below the last.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge top
  sledge top --every 5
  sledge top --once")]
pub struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub every: u64,
    /// Look twice, print what happened in between, and end
    #[arg(long)]
    pub once: bool,
}

/// Clears from the top of the screen; nothing else of the terminal is touched, so there is nothing to restore.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Columns and lines where the terminal does not say.
const USUAL_SIZE: (usize, usize) = (100, 40);

/// What is between two looks when somebody wants to stop.
const NAP: Duration = Duration::from_millis(50);

/// Shows the relay until somebody stops it.
pub fn run(args: &TopArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    store::must_exist(config)?;
    let interrupt = Interrupt::watch()?;
    let is_terminal = std::io::stdout().is_terminal();
    let mut before = look(config)?;
    loop {
        let wake = before.at + Duration::from_secs(args.every);
        while Instant::now() < wake && !interrupt.is_set() {
            std::thread::sleep(NAP.min(wake.saturating_duration_since(Instant::now())));
        }
        if interrupt.is_set() {
            return Ok(ExitCode::SUCCESS);
        }
        let now = look(config)?;
        let size = if is_terminal { Term::stdout().size_checked() } else { None };
        let (columns, lines) = size.map_or(USUAL_SIZE, |(lines, columns)| (columns.into(), lines.into()));
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let frame = frame(&before.status, &now.status, seconds, columns, lines);
        super::print(out, &if is_terminal && !args.once { format!("{CLEAR}{frame}") } else { frame })?;
        if args.once {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

struct Look {
    at: Instant,
    status: Box<Status>,
}

fn look(config: &Config) -> Result<Look, Error> {
    match super::control::ask(config, Request::Status, &|_, _| {})? {
        Answer::Status(status) => Ok(Look { at: Instant::now(), status }),
        other => Err(super::control::strange(&other)),
    }
}

/// What is shown: rates from two looks that lie `seconds` apart, cut to the size of the screen.
fn frame(before: &Status, now: &Status, seconds: f64, columns: usize, lines: usize) -> String {
    let mut rows = figures(before, now, seconds);
    if !now.queries.slow.is_empty() {
        rows.push(String::new());
        rows.push("slow queries, newest first".to_owned());
        rows.extend(now.queries.slow.iter().map(|query| {
            format!("{:>7} ms {:>7} rows  {}  {}", number(query.millis), number(query.rows), query.plan, query.filters)
        }));
    }
    rows.truncate(lines.saturating_sub(1).max(1));
    rows.into_iter().map(|row| row.chars().take(columns).collect::<String>() + "\n").collect()
}

fn figures(before: &Status, now: &Status, seconds: f64) -> Vec<String> {
    let rate = |value: fn(&Status) -> u64| {
        let grown = value(now).saturating_sub(value(before));
        if seconds > 0.0 { grown as f64 / seconds } else { 0.0 }
    };
    let health = now.problem.as_deref().map_or_else(|| "well".to_owned(), |problem| format!("NOT WELL: {problem}"));
    let cores = rate(|status| status.queries.micros) / 1e6;
    let disk = now.queues.disk_free_bytes.map_or_else(String::new, |free| format!(", {} free", size(free)));
    let refused = refusals(before, now);
    vec![
        format!("up for {}, {health}", duration(now.uptime_secs)),
        format!(
            "clients   {} connections, {} subscriptions, {} addresses shut out",
            number(now.connections as u64),
            number(now.subscriptions as u64),
            number(now.banned as u64)
        ),
        format!(
            "events    {:.1}/s stored, {:.1}/s duplicate, {:.1}/s refused{refused}",
            rate(|status| status.figures.stored),
            rate(|status| status.figures.duplicate),
            rate(|status| status.figures.refused.iter().sum())
        ),
        format!(
            "live      {:.1}/s deliveries, {} closed as too slow",
            rate(|status| status.figures.deliveries),
            number(now.figures.too_slow)
        ),
        format!(
            "queries   {:.1}/s, {:.1}/s rows, {cores:.2} cores, {} wait",
            rate(|status| status.queries.finished),
            rate(|status| status.queries.rows),
            number(now.queries.waiting)
        ),
        format!(
            "traffic   {}/s in, {}/s out",
            size(rate(|status| status.figures.message_bytes) as u64),
            size(rate(|status| status.figures.sent_bytes) as u64)
        ),
        format!(
            "writer    {} events wait ({}), {} index entries in memory",
            number(now.queues.writer_events as u64),
            size(now.queues.writer_bytes as u64),
            number(now.stats.buffered_entries)
        ),
        format!(
            "disk      {} events, log {} ({} dead), index {}{disk}",
            number(now.stats.events),
            size(now.stats.log_bytes),
            size(now.stats.dead_bytes),
            size(now.stats.index_bytes)
        ),
    ]
}

/// Why events were refused between the two looks, in brackets.
fn refusals(before: &Status, now: &Status) -> String {
    let grown = now.figures.refused.iter().zip(before.figures.refused).map(|(now, before)| now.saturating_sub(before));
    let grown = REASONS.iter().zip(grown).filter(|(_, count)| *count > 0);
    let named: Vec<String> = grown.map(|(reason, count)| format!("{reason} {}", number(count))).collect();
    if named.is_empty() { String::new() } else { format!(" ({})", named.join(", ")) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::relay::querylog::SlowQuery;

    fn status() -> Status {
        serde_json::from_str(
            "{\"uptime_secs\":61,\"connections\":3,\"subscriptions\":5,\"events\":9,\"log_bytes\":2048,\"dead_bytes\":0,\
             \"index_bytes\":0,\"buffered_entries\":7}",
        )
        .unwrap()
    }

    /// Rates are differences over the time between, and everything fits the screen.
    #[test]
    fn a_frame_tells_what_happened_in_between() {
        let (before, mut now) = (status(), status());
        now.figures.stored = 20;
        now.figures.refused[2] = 4;
        now.queries.micros = 500_000;
        now.queues.disk_free_bytes = Some(1 << 30);
        let slow =
            SlowQuery { asked_at: 1, millis: 1_234, rows: 5, filters: "{}".repeat(200), plan: "by time".to_owned() };
        now.queries.slow = vec![slow; 50];
        let shown = frame(&before, &now, 2.0, 80, 24);
        assert!(shown.starts_with("up for 1 min 1 s, well\n"), "{shown}");
        for part in ["10.0/s stored", "2.0/s refused (invalid 4)", "0.25 cores", "1.0 GiB free", "  1,234 ms"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert_eq!(shown.lines().count(), 23);
        assert!(shown.lines().all(|line| line.chars().count() <= 80));
        now.problem = Some("error: the disk is full".to_owned());
        assert!(frame(&before, &now, 0.0, 80, 2).contains("NOT WELL: error: the disk is full"));
    }
}
