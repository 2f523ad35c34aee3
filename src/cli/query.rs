//! `sledge query`.

use clap::Args;

/// Print the stored events that match a filter
///
/// Prints the stored events that match, one JSON object a line, newest first, as a REQ would. With several filters an
/// event is printed once if any of them matches.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge query '{\"kinds\":[1],\"limit\":10}'
  sledge query '{\"#t\":[\"nostr\"]}' '{\"kinds\":[0],\"limit\":5}'")]
pub struct QueryArgs {
    /// Filters (NIP-01), each a JSON object
    #[arg(value_name = "FILTER", required = true)]
    pub filters: Vec<String>,
}
