//! `sledge config show` and `sledge config check`.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::config::{Config, DEFAULTS};
use crate::error::Error;

/// What to do with the settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the settings in force
    ///
    /// Prints every setting with the value that is in force: the file's where it names the key, else the default, with
    /// --store applied. The output is itself a valid settings file.
    #[command(after_help = "Examples:\n  sledge config show\n  sledge config show --defaults > sync.toml")]
    Show(ShowArgs),
    /// Check the settings and say which file they come from
    ///
    /// Reads the settings as `serve` would and stops at the first thing that does not hold, naming file, line and key.
    /// Exit code 0: valid, 2: not.
    #[command(after_help = "Example:\n  sledge --config new.toml config check")]
    Check,
}

/// Arguments of `config show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Print JSON instead of TOML
    #[arg(long)]
    pub json: bool,
    /// Print the built-in settings file with its comments, and read no other: a start for a file of your own
    #[arg(long, conflicts_with = "json")]
    pub defaults: bool,
}

impl ConfigCommand {
    /// Whether this works without reading the user's settings, which may be what is broken.
    pub fn shows_defaults(&self) -> bool {
        matches!(self, ConfigCommand::Show(ShowArgs { defaults: true, .. }))
    }
}

/// Prints the built-in file as it is.
pub fn print_defaults(out: &mut impl Write) -> Result<ExitCode, Error> {
    super::print(out, DEFAULTS)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `config show` or `config check` on settings that were read already.
pub fn run(command: ConfigCommand, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let text = match command {
        ConfigCommand::Show(args) => show(config, args.json),
        ConfigCommand::Check => format!("{}: valid\n", source_of(config)),
    };
    super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn show(config: &Config, json: bool) -> String {
    if json {
        let text = serde_json::to_string_pretty(config).expect("settings are strings, numbers and lists");
        return text + "\n";
    }
    let text = toml::to_string(config).expect("settings are strings, numbers and lists");
    format!("# from {}\n{text}", source_of(config))
}

fn source_of(config: &Config) -> String {
    match &config.origin.file {
        Some(file) => file.display().to_string(),
        None => "built-in settings".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::*;

    fn output_of(command: ConfigCommand, config: &Config) -> String {
        let mut out = Vec::new();
        run(command, config, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// What is shown names its file and can be read back as settings.
    #[test]
    fn shown_settings_name_their_file_and_read_back() {
        let config = Config::parse("limits.limit_max = 900", Some(Path::new("my.toml"))).unwrap();
        let shown = output_of(ConfigCommand::Show(ShowArgs { json: false, defaults: false }), &config);
        assert!(shown.starts_with("# from my.toml\n"), "{shown}");
        assert_eq!(Config::parse(&shown, None).unwrap().limits, config.limits);

        let json = output_of(ConfigCommand::Show(ShowArgs { json: true, defaults: false }), &config);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["limits"]["limit_max"], 900);
        assert_eq!(value["listen"], "127.0.0.1:7777");
    }

    /// A check says what it looked at.
    #[test]
    fn a_check_names_what_it_read() {
        assert_eq!(output_of(ConfigCommand::Check, &Config::default()), "built-in settings: valid\n");
    }
}
