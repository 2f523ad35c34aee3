//! `sledge count`.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::remote::Door;
use super::store::Access;
use super::{filter, remote, store};
use crate::config::Config;
use crate::error::Error;
use crate::relay::Clock;
use crate::store::{Progress, Query, Store, StoreError};

/// Print how many stored events match a filter
///
/// Prints one number: how many stored events match, each counted once even if several filters match it. A limit in a
/// filter plays no part. While `sledge serve` has the store, the relay is asked.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge count '{\"kinds\":[0]}'")]
pub struct CountArgs {
    /// Filters (NIP-01), each a JSON object
    #[arg(value_name = "FILTER", required = true)]
    pub filters: Vec<String>,
}

/// Prints the number, from the store itself or from the relay that has it.
pub fn run(args: &CountArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let asked = filter::read_all(&args.filters)?;
    store::must_exist(config)?;
    let count = match store::open_or_reach(config)? {
        Access::Own(opened) => {
            let query = store::query(asked.into_iter().map(|asked| asked.without_limit()), Clock::system().now());
            store::with_open(config, &opened, |opened| {
                count(&**opened, query).map_err(|error| store::failed(config, error))
            })?
        }
        Access::Relay(url) => remote::count(&Door::of_operator(config, url), &asked)?,
    };
    super::print(out, &format!("{count}\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn count(store: &dyn Store, query: Query) -> Result<u64, StoreError> {
    let mut scan = store.scan(query)?;
    let mut count = 0;
    loop {
        let (more, progress) = scan.count(Instant::now() + Duration::from_secs(60))?;
        count += more;
        if progress != Progress::Paused {
            return Ok(count);
        }
    }
}
