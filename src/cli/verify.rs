//! `sledge verify`.

use clap::Args;

/// Check every stored event and the index
///
/// Reads the whole store and checks each record's checksum, each event's id and signature, and that the index agrees
/// with the event log. Changes nothing. Exit code 0: all is well, 1: damage was found and named.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sledge --store sledge-data verify")]
pub struct VerifyArgs {}
