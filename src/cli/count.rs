//! `sledge count`.

use clap::Args;

/// Print how many stored events match a filter
///
/// Prints one number: how many stored events match, each counted once even if several filters match it.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge count '{\"kinds\":[0]}'")]
pub struct CountArgs {
    /// Filters (NIP-01), each a JSON object
    #[arg(value_name = "FILTER", required = true)]
    pub filters: Vec<String>,
}
