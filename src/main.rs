//! The `sledge` command: reads the arguments, runs the command, reports how it went.
//!
//! Exit codes: 0 done, 1 failed, 2 asked wrongly (arguments or settings).

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use sledge::cli::{self, Cli};
use sledge::error::Error;

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(code) => code,
        Err(Error::OutputClosed) => ExitCode::SUCCESS,
        Err(error) => {
            // Not `eprintln!`, which panics where standard error is closed.
            let _ = writeln!(std::io::stderr(), "sledge: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
