//! `sledge status`.

use clap::Args;

/// Describe the store: events, bytes, generation
///
/// Prints how many events the store holds, how much disk it takes, and how much of that a compaction would free.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge status
  sledge status --json")]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
