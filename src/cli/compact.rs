//! `sledge compact`.

use clap::Args;

/// Rewrite the store without what was deleted or replaced
///
/// Writes a new generation of the store that holds live events only, then switches to it. Needs free disk space for
/// the live events and says how much before it starts; an interrupted run leaves the old generation in force.
/// The store must not be in use by `sledge serve`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge --store sledge-data compact")]
pub struct CompactArgs {}
