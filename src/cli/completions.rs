//! `sledge completions`.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::error::Error;

/// Print a completion script for a shell
///
/// Prints a script that completes commands and flags; your shell's manual says where it looks for such scripts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge completions bash > ~/.local/share/bash-completion/completions/sledge
  sledge completions fish > ~/.config/fish/completions/sledge.fish")]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// Writes the script.
pub fn run(args: CompletionsArgs, out: &mut impl Write) -> Result<ExitCode, Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "sledge", &mut script);
    out.write_all(&script).and_then(|()| out.flush()).map_err(Error::output)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::ValueEnum;

    use super::*;

    /// Each shell gets a script that knows the commands.
    #[test]
    fn every_shell_gets_a_script() {
        for shell in Shell::value_variants() {
            let mut out = Vec::new();
            run(CompletionsArgs { shell: *shell }, &mut out).unwrap();
            let script = String::from_utf8(out).unwrap();
            assert!(script.contains("import") && script.contains("listen"), "{shell}: {script}");
        }
    }
}
