//! `sledge explain`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;

use super::progress::{number, size};
use super::store::{self, Access};
use super::{filter, json};
use crate::config::Config;
use crate::error::Error;
use crate::protocol::Filter;
use crate::relay::Clock;
use crate::relay::explain::{Measured, measure};
use crate::server::control::{Answer, Request};

/// Show how a filter is looked up and what it costs
///
/// Prints, for each filter, which index the store goes by, how many stretches of it are merged, how many events the answer
/// has, and how long it took. While `sledge serve` has the store, the relay is asked, beside its other work.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge explain '{\"kinds\":[1],\"limit\":100}'
  sledge explain --json '{\"#t\":[\"nostr\"]}'")]
pub struct ExplainArgs {
    /// Filters (NIP-01), each a JSON object
    #[arg(value_name = "FILTER", required = true)]
    pub filters: Vec<String>,
    /// Print JSON, one object a filter
    #[arg(long)]
    pub json: bool,
}

/// Prints the plans.
pub fn run(args: &ExplainArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let filters: Vec<Filter> = filter::read_all(&args.filters)?.into_iter().map(|asked| asked.filter).collect();
    store::must_exist(config)?;
    let measured = match store::open_or_reach(config)? {
        Access::Own(opened) => store::with_open(config, &opened, |opened| {
            let measure = |filter| measure(&**opened, filter, &config.limits, Clock::system().now());
            filters.iter().map(measure).collect::<Result<_, _>>().map_err(|error| store::failed(config, error))
        })?,
        Access::Relay(_) => {
            let texts = filters.iter().map(Filter::to_json).collect();
            match super::control::ask(config, Request::Explain { filters: texts }, &|_, _| {})? {
                Answer::Explained(measured) => measured,
                other => return Err(super::control::strange(&other)),
            }
        }
    };
    let text: String = match args.json {
        true => measured.iter().map(json).collect(),
        false => measured.iter().map(for_people).collect(),
    };
    super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn for_people(measured: &Measured) -> String {
    let end = if measured.complete { "" } else { ", and was not done when the time for a query was over" };
    format!(
        "{}: {} events ({}) in {:.1} ms{end}\n",
        measured.plan,
        number(measured.rows),
        size(measured.bytes),
        measured.time().as_secs_f64() * 1e3
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    /// From the store itself, for people and for programs.
    #[test]
    fn plans_are_printed() {
        let folder = tempfile::tempdir().unwrap();
        let config = testing::store_with(folder.path(), (0..3).map(|n| testing::note(n, "")));
        let explain = |json| {
            let mut out = Vec::new();
            let filters = vec!["{\"kinds\":[1,2]}".to_owned(), "{\"limit\":2}".to_owned()];
            run(&ExplainArgs { filters, json }, &config, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let text = explain(false);
        assert!(text.starts_with("by kind, 2 stretches merged: 3 events (") && text.contains("\nby time, "), "{text}");
        let line: serde_json::Value = serde_json::from_str(explain(true).lines().next().unwrap()).unwrap();
        assert_eq!((line["plan"]["index"].as_str(), line["rows"].as_u64()), (Some("kind"), Some(3)));
    }
}
