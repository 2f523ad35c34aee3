//! `sledge export`.
//!
//! Newest first is the order of the store. For oldest first the matches are walked once to find where windows of some
//! thousand events begin; then the windows are read from the oldest on, each turned round in memory.

use std::io::{BufWriter, Write};
use std::process::ExitCode;

use clap::Args;
use indicatif::ProgressBar;

use super::time::When;
use super::{filter, progress, store};
use crate::config::Config;
use crate::error::Error;
use crate::protocol::Filter;
use crate::relay::Clock;
use crate::store::{Row, Store};

/// Write stored events to standard output
///
/// Writes one event (a JSON object) a line to standard output, newest first. The output is what `import` reads.
/// Expired events are left out. The store must not be in use by `sledge serve`; while it is, `sledge query` can ask the
/// relay.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge export > all.jsonl
  sledge export --since 7d --filter '{\"kinds\":[1]}' | gzip > week.jsonl.gz
  sledge export --since 2026-01-01 --until 2026-01-31T23:59:59Z --reverse")]
pub struct ExportArgs {
    /// Only events that match this filter (NIP-01); its limit means the newest so many
    #[arg(long, value_name = "JSON")]
    pub filter: Option<String>,
    /// Only events dated at or after this: unix seconds, a UTC date, or 7d, 12h, 30m ago
    #[arg(long, value_name = "TIME")]
    pub since: Option<When>,
    /// Only events dated at or before this; written as for --since
    #[arg(long, value_name = "TIME")]
    pub until: Option<When>,
    /// Oldest first: the same lines in the opposite order
    #[arg(long)]
    pub reverse: bool,
}

/// Events of one window of `--reverse`, unless more share a second.
const WINDOW_EVENTS: usize = 10_000;

/// Exports.
pub fn run(args: &ExportArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let now = Clock::system().now();
    let filter = chosen(args, now)?;
    let mut out = BufWriter::with_capacity(64 * 1024, out);
    store::with_existing(config, |opened| {
        let everything = filter == Filter::default();
        // A bar among lines that go to the terminal would only disturb.
        let visible = !std::io::IsTerminal::is_terminal(&std::io::stdout());
        let bar = match visible {
            true => progress::events("exporting", everything.then(|| opened.stats().events)),
            false => ProgressBar::hidden(),
        };
        let write = |row: &Row| {
            bar.inc(1);
            super::print_line(&mut out, &row.json)
        };
        let export = Export { config, store: &**opened, now };
        if args.reverse {
            export.oldest_first(filter, WINDOW_EVENTS, write)
        } else {
            export.newest_first(filter, write)
        }
    })?;
    out.flush().map_err(Error::output)?;
    Ok(ExitCode::SUCCESS)
}

/// The filter, narrowed by `--since` and `--until`.
fn chosen(args: &ExportArgs, now: u64) -> Result<Filter, Error> {
    let mut chosen = match &args.filter {
        Some(text) => filter::read(text)?.filter,
        None => Filter::default(),
    };
    if let Some(since) = args.since.map(|when| when.resolve(now)) {
        chosen.since = chosen.since.max(Some(since));
    }
    if let Some(until) = args.until.map(|when| when.resolve(now)) {
        chosen.until = Some(chosen.until.map_or(until, |narrower| narrower.min(until)));
    }
    Ok(chosen)
}

/// A stretch of time with the number of its events that are wanted: its newest so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    since: u64,
    until: u64,
    events: usize,
}

struct Export<'a> {
    config: &'a Config,
    store: &'a dyn Store,
    now: u64,
}

impl Export<'_> {
    fn newest_first(&self, filter: Filter, write: impl FnMut(&Row) -> Result<(), Error>) -> Result<(), Error> {
        store::for_each_row(self.config, self.store, store::query([filter], self.now), write)
    }

    fn oldest_first(
        &self,
        filter: Filter,
        window_events: usize,
        mut write: impl FnMut(&Row) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut rows = Vec::new();
        for window in self.windows(&filter, window_events)?.iter().rev() {
            let limit = Some(window.events as u64);
            let part = Filter { since: Some(window.since), until: Some(window.until), limit, ..filter.clone() };
            self.newest_first(part, |row| {
                rows.push(row.clone());
                Ok(())
            })?;
            rows.iter().rev().try_for_each(&mut write)?;
            rows.clear();
        }
        Ok(())
    }

    /// Windows that hold all matches, newest first, none dividing a second.
    fn windows(&self, filter: &Filter, window_events: usize) -> Result<Vec<Window>, Error> {
        let mut windows: Vec<Window> = Vec::new();
        self.newest_first(filter.clone(), |row| {
            match windows.last_mut() {
                Some(last) if last.events < window_events || last.since == row.created_at => {
                    last.since = row.created_at;
                    last.events += 1;
                }
                _ => windows.push(Window { since: row.created_at, until: row.created_at, events: 1 }),
            }
            Ok(())
        })?;
        Ok(windows)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    const ALL: ExportArgs = ExportArgs { filter: None, since: None, until: None, reverse: false };

    fn lines(args: &ExportArgs, config: &Config) -> Vec<String> {
        let mut out = Vec::new();
        run(args, config, &mut out).unwrap();
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    /// The filter's own bounds and the flags both hold.
    #[test]
    fn bounds_of_filter_and_flags_both_hold() {
        let bounds = |filter: &str, since: Option<When>, until: Option<When>| {
            let chosen = chosen(&ExportArgs { filter: Some(filter.to_owned()), since, until, reverse: false }, 1_000);
            let chosen = chosen.unwrap();
            (chosen.since, chosen.until)
        };
        let narrow = r#"{"since":10,"until":20}"#;
        assert_eq!(bounds("{}", None, None), (None, None));
        assert_eq!(bounds("{}", Some(When::Ago(900)), Some(When::At(500))), (Some(100), Some(500)));
        assert_eq!(bounds(narrow, Some(When::At(5)), Some(When::At(30))), (Some(10), Some(20)));
        assert_eq!(bounds(narrow, Some(When::At(12)), Some(When::At(18))), (Some(12), Some(18)));
    }

    /// Oldest first is newest first read backwards, whatever the windows: also with many events in one second, with
    /// a limit that ends inside a second, and with nothing at all.
    #[test]
    fn oldest_first_is_newest_first_backwards() {
        let folder = tempfile::tempdir().unwrap();
        let dates = [1, 1, 2, 3, 3, 3, 3, 3, 4, 7, 7, 9];
        let notes = dates.iter().enumerate().map(|(n, date)| testing::note(*date, &n.to_string()));
        let config = testing::store_with(folder.path(), notes);
        store::with_existing(&config, |opened| {
            let export = Export { config: &config, store: &**opened, now: 0 };
            for filter in ["{}", r#"{"limit":6}"#, r#"{"since":2,"until":7}"#, r#"{"kinds":[5]}"#, r#"{"limit":0}"#] {
                let filter = Filter::from_json(filter).unwrap();
                let mut forward = Vec::new();
                export.newest_first(filter.clone(), |row| {
                    forward.push(row.id);
                    Ok(())
                })?;
                forward.reverse();
                for window_events in [1, 2, 3, 5, 100] {
                    let mut backward = Vec::new();
                    export.oldest_first(filter.clone(), window_events, |row| {
                        backward.push(row.id);
                        Ok(())
                    })?;
                    assert_eq!(backward, forward, "{filter:?}, windows of {window_events}");
                }
            }
            Ok(())
        })
        .unwrap();
    }

    /// A window is closed once it is full, but not inside a second.
    #[test]
    fn windows_do_not_divide_a_second() {
        let folder = tempfile::tempdir().unwrap();
        let notes = [1, 2, 3, 3, 3, 4].iter().enumerate().map(|(n, date)| testing::note(*date, &n.to_string()));
        let config = testing::store_with(folder.path(), notes);
        let windows = store::with_existing(&config, |opened| {
            Export { config: &config, store: &**opened, now: 0 }.windows(&Filter::default(), 2)
        });
        let window = |since, until, events| Window { since, until, events };
        assert_eq!(windows.unwrap(), [window(3, 4, 4), window(1, 2, 2)]);
    }

    /// What comes out is what went in, line by line, expired events excepted.
    #[test]
    fn expired_events_are_not_exported() {
        let folder = tempfile::tempdir().unwrap();
        let expired = testing::event(1, 5, &[["expiration", "10"]], "");
        let kept = testing::event(1, 4, &[["expiration", "soon"]], "a\nb");
        let config = testing::store_with(folder.path(), [expired, kept.clone()]);
        assert_eq!(lines(&ALL, &config), [testing::json(&kept)]);
        assert_eq!(lines(&ExportArgs { reverse: true, ..ALL }, &config), [testing::json(&kept)]);
    }
}
