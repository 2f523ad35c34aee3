//! `sledge import`.

use std::path::PathBuf;

use clap::Args;

/// Read events from a file into the store
///
/// Reads one event (a JSON object) a line, checks id and signature of each, and stores what the rules of the NIPs let
/// stand. Gzip is recognised by its content. A bad line is named with its number and the run goes on; the summary at
/// the end counts what was stored and why the rest was not. Importing the same file again adds nothing.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge import events.jsonl.gz
  sledge --store old export | sledge --store new import -")]
pub struct ImportArgs {
    /// File with one event a line, plain or gzip; - reads standard input
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
}

impl ImportArgs {
    /// Whether the events come from standard input.
    pub fn reads_stdin(&self) -> bool {
        self.file.as_os_str() == "-"
    }
}
