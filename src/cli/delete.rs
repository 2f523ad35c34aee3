//! `sledge delete`.

use clap::Args;

/// Delete the stored events that match a filter
///
/// Deletes every stored event that matches any of the filters and prints how many there were. Try it with --dry-run
/// first: a deletion cannot be taken back. The disk space is free after `sledge compact`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge delete '{\"kinds\":[1984]}' --dry-run")]
pub struct DeleteArgs {
    /// Filters (NIP-01), each a JSON object
    #[arg(value_name = "FILTER", required = true)]
    pub filters: Vec<String>,
    /// Only print how many events would be deleted
    #[arg(long)]
    pub dry_run: bool,
}
