//! `sledge query`.

use std::io::{BufWriter, Write};
use std::process::ExitCode;

use clap::Args;

use super::remote::Door;
use super::store::Access;
use super::{filter, remote, store};
use crate::config::Config;
use crate::error::Error;
use crate::relay::Clock;

/// Print the stored events that match a filter
///
/// Prints the stored events that match, one JSON object a line, newest first; all of them, if the filter has no limit.
/// With several filters an event is printed once if any of them matches. Keys and ids may be written as npub, nprofile,
/// note or nevent. While `sledge serve` has the store, the relay is asked.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge query '{\"kinds\":[1],\"limit\":10}'
  sledge query '{\"#t\":[\"nostr\"]}' '{\"kinds\":[0],\"limit\":5}'
  sledge query '{\"authors\":[\"npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg\"]}'")]
pub struct QueryArgs {
    /// Filters (NIP-01), each a JSON object
    #[arg(value_name = "FILTER", required = true)]
    pub filters: Vec<String>,
}

/// Prints what matches, from the store itself or from the relay that has it.
pub fn run(args: &QueryArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let asked = filter::read_all(&args.filters)?;
    store::must_exist(config)?;
    let mut out = BufWriter::new(out);
    match store::open_or_reach(config)? {
        Access::Own(opened) => {
            let query = store::query(asked.into_iter().map(|asked| asked.filter), Clock::system().now());
            store::with_open(config, &opened, |opened| {
                store::for_each_row(config, &**opened, query, |row| super::print_line(&mut out, &row.json))
            })?;
        }
        Access::Relay(url) => {
            let door = Door::of_operator(config, url);
            remote::query(&door, asked, |json| super::print_line(&mut out, json.as_bytes()))?;
        }
    }
    out.flush().map_err(Error::output)?;
    Ok(ExitCode::SUCCESS)
}
