//! `sledge delete`.

use std::io::{BufWriter, Write};
use std::process::ExitCode;

use clap::Args;

use super::progress::count_of_events;
use super::{filter, store};
use crate::config::Config;
use crate::error::Error;
use crate::protocol::event::CREATED_AT_MAX;
use crate::protocol::{EventId, Filter};
use crate::store::{Query, Removal, Store};

/// Delete the stored events that match a filter
///
/// Deletes every stored event that matches any of the filters, expired ones too, erases their bytes, and prints how
/// many there were. Try it with --dry-run first: a deletion cannot be taken back, though the same events may be
/// imported or published again. The disk space is free after `sledge compact`. The store must not be in use by
/// `sledge serve`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge delete '{\"kinds\":[1984]}' --dry-run
  sledge delete '{\"authors\":[\"npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg\"]}'")]
pub struct DeleteArgs {
    /// Filters (NIP-01), each a JSON object
    #[arg(value_name = "FILTER", required = true)]
    pub filters: Vec<String>,
    /// Delete nothing; print the ids of the events that would be deleted, and how many there are
    #[arg(long)]
    pub dry_run: bool,
    /// Accept a filter that matches every event
    #[arg(long)]
    pub all: bool,
}

/// Events that one durable write removes.
const BATCH_EVENTS_MAX: usize = 1_000;

/// Deletes, or says what would be deleted.
pub fn run(args: &DeleteArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let filters: Vec<Filter> = filter::read_all(&args.filters)?.into_iter().map(|asked| asked.filter).collect();
    if !args.all && filters.iter().any(is_for_everything) {
        return Err(Error::Usage("this filter matches every event; say --all if that is what you want".to_owned()));
    }
    // Time 0, at which nothing has expired: what is hidden but still on disk goes too.
    let query = store::query(filters, 0);
    let mut out = BufWriter::new(out);
    store::with_existing(config, |opened| {
        if args.dry_run {
            list(config, &**opened, query, &mut out)
        } else {
            let removed = remove(config, &**opened, query)?;
            super::print(&mut out, &format!("deleted {}\n", count_of_events(removed)))
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn is_for_everything(filter: &Filter) -> bool {
    let any_time = filter.since.unwrap_or(0) == 0 && filter.until.is_none_or(|until| until >= CREATED_AT_MAX);
    any_time && Filter { since: None, until: None, ..filter.clone() } == Filter::default()
}

fn list(config: &Config, store: &dyn Store, query: Query, out: &mut impl Write) -> Result<(), Error> {
    let mut count = 0;
    store::for_each_row(config, store, query, |row| {
        count += 1;
        super::print_line(out, row.id.to_hex().as_bytes())
    })?;
    super::print(out, &format!("{} would be deleted; nothing was changed\n", count_of_events(count)))
}

fn remove(config: &Config, store: &dyn Store, query: Query) -> Result<u64, Error> {
    let mut removed = 0;
    let mut batch: Vec<EventId> = Vec::with_capacity(BATCH_EVENTS_MAX);
    let mut flush = |batch: &mut Vec<EventId>| {
        removed += store.remove(batch, Removal::Operator).map_err(|error| store::failed(config, error))?;
        batch.clear();
        Ok::<(), Error>(())
    };
    store::for_each_row(config, store, query, |row| {
        batch.push(row.id);
        if batch.len() == BATCH_EVENTS_MAX { flush(&mut batch) } else { Ok(()) }
    })?;
    flush(&mut batch)?;
    Ok(removed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    /// A filter that lets everything through must be meant; a limit or any condition is enough.
    #[test]
    fn a_filter_for_everything_must_be_meant() {
        let everything = |json: &str| is_for_everything(&Filter::from_json(json).unwrap());
        assert!(everything("{}") && everything(r#"{"since":0,"until":18446744073709551615}"#));
        for json in [r#"{"limit":5}"#, r#"{"kinds":[]}"#, r#"{"since":1}"#, r#"{"until":5}"#, r##"{"#t":["x"]}"##] {
            assert!(!everything(json), "{json}");
        }
        let args = DeleteArgs { filters: vec!["{}".to_owned()], dry_run: false, all: false };
        assert_eq!(run(&args, &Config::default(), &mut Vec::new()).unwrap_err().exit_code(), 2);
    }

    /// A dry run names what the real one takes, expired events too, and takes nothing itself.
    #[test]
    fn a_dry_run_names_what_the_real_one_takes() {
        let folder = tempfile::tempdir().unwrap();
        let config = testing::store_with(folder.path(), (0..2_500).map(|n| testing::note(n, "")));
        let delete = |dry_run| {
            let args = DeleteArgs { filters: vec![r#"{"since":100,"until":2200}"#.to_owned()], dry_run, all: false };
            let mut out = Vec::new();
            run(&args, &config, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let named = delete(true);
        assert!(named.ends_with("2,101 events would be deleted; nothing was changed\n"), "{named}");
        assert_eq!(named.lines().count(), 2_102);
        assert_eq!(named, delete(true));
        assert_eq!(delete(false), "deleted 2,101 events\n");
        assert!(delete(true).starts_with("0 events would"));
        assert_eq!(testing::dates(&config).len(), 399);
    }
}
