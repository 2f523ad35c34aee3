//! `sledge export`.

use clap::Args;

use super::time::When;

/// Write stored events to standard output
///
/// Writes one event (a JSON object) a line to standard output, newest first. The output is what `import` reads.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge export > all.jsonl
  sledge export --since 7d --filter '{\"kinds\":[1]}' | gzip > week.jsonl.gz
  sledge export --since 2026-01-01 --until 2026-01-31T23:59:59Z --reverse")]
pub struct ExportArgs {
    /// Only events that match this filter (NIP-01)
    #[arg(long, value_name = "JSON")]
    pub filter: Option<String>,
    /// Only events dated at or after this: unix seconds, a UTC date, or 7d, 12h, 30m ago
    #[arg(long, value_name = "TIME")]
    pub since: Option<When>,
    /// Only events dated at or before this; written as for --since
    #[arg(long, value_name = "TIME")]
    pub until: Option<When>,
    /// Oldest first
    #[arg(long)]
    pub reverse: bool,
}
