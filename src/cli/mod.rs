//! The command line: its grammar, and one file a command.
//!
//! Standard output carries data only, so that every command can stand in a pipe; logs, progress and complaints go to
//! standard error.

mod arenas;
mod completions;
mod config;
mod control;
mod filter;
mod interrupt;
mod key;
mod logging;
mod operate;
mod progress;
mod remote;
mod store;
mod systemd;
mod takeover;
#[cfg(test)]
mod testing;

pub mod admin;
pub mod backup;
pub mod client;
pub mod compact;
pub mod count;
pub mod delete;
pub mod explain;
pub mod export;
pub mod import;
pub mod query;
pub mod repair;
pub mod restore;
pub mod serve;
pub mod status;
pub mod sync;
pub mod time;
pub mod top;
pub mod verify;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::builder::NonEmptyStringValueParser;
use clap::{Parser, Subcommand};

use crate::config::Config;
use crate::error::Error;
use crate::protocol::nip19;
use crate::relay::policy::settings::Settings;
use crate::store::quota::Rules;

/// A Nostr relay in one binary: serves, imports, exports and queries events.
#[derive(Debug, Parser)]
#[command(name = "sledge", version, propagate_version = true, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    /// Settings file [default: $SLEDGE_CONFIG, ./sync.toml, /etc/sledge/sync.toml, built-in]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Data directory, or URL of a database [default: `store` in the settings, else sledge-data]
    #[arg(long, global = true, value_name = "STORE", value_parser = NonEmptyStringValueParser::new())]
    pub store: Option<String>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  sledge serve
  sledge import events.jsonl.gz
  sledge query '{\"kinds\":[1],\"limit\":10}'

Exit codes: 0 done, 1 failed, 2 wrong arguments or settings.
Environment: SLEDGE_CONFIG names the settings file, SLEDGE_LOG the log level (such as info,sledge=debug).";

/// What to do. The help of a command stands with its arguments; a text here would replace it.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum Command {
    Serve(serve::ServeArgs),
    Import(import::ImportArgs),
    Export(export::ExportArgs),
    Migrate(import::migrate::MigrateArgs),
    Compact(compact::CompactArgs),
    Backup(backup::BackupArgs),
    Restore(restore::RestoreArgs),
    Query(query::QueryArgs),
    Count(count::CountArgs),
    Delete(delete::DeleteArgs),
    Sync(sync::SyncArgs),
    Verify(verify::VerifyArgs),
    Repair(repair::RepairArgs),
    Status(status::StatusArgs),
    /// Chats on all your devices
    Chat(client::chat::ChatArgs),
    /// Settings on all your devices
    Settings(client::settings::SettingsArgs),
    /// Give, rate and follow training data
    Training(client::training::TrainingArgs),
    /// See and send what waits for relays
    Outbox(client::outbox::OutboxArgs),
    Admin(admin::AdminArgs),
    Top(top::TopArgs),
    Explain(explain::ExplainArgs),
    /// Make or show keys
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Show or check the settings
    #[command(subcommand)]
    Config(config::ConfigCommand),
    Completions(completions::CompletionsArgs),
}

impl Command {
    /// Whether it works with many threads for long, and has not begun to.
    fn uses_many_threads(&self) -> bool {
        use Command::{Compact, Import, Migrate, Repair, Restore, Serve};
        matches!(self, Serve(_) | Import(_) | Migrate(_) | Compact(_) | Repair(_) | Restore(_))
    }
}

/// Runs a parsed command line.
///
/// # Errors
/// [`Error`], whose text says what happened, to which thing and what to do next.
pub fn run(cli: Cli) -> Result<ExitCode, Error> {
    let out = &mut std::io::stdout().lock();
    // These need no settings, so a broken sync.toml in the working directory does not stand in their way.
    let command = match cli.command {
        Command::Key(command) => return key::run(command, &mut std::io::stdin().lock(), out),
        Command::Completions(args) => return completions::run(args, out),
        Command::Config(command) if command.shows_defaults() => return config::print_defaults(out),
        command => command,
    };
    let config = load_config(cli.config.as_deref(), cli.store.clone())?;
    logging::start(&config)?;
    if command.uses_many_threads() {
        arenas::limit(&config);
    }
    match command {
        Command::Config(command) => config::run(command, &config, out),
        Command::Serve(args) => serve::run(&args, config, cli.config, cli.store),
        Command::Import(args) => import::run(&args, &Arc::new(config), out),
        Command::Export(args) => export::run(&args, &config, out),
        Command::Migrate(args) => import::migrate::run(&args, &config, out),
        Command::Compact(_) => compact::run(&config, out),
        Command::Backup(args) => backup::run(&args, &config, out),
        Command::Restore(args) => restore::run(&args, &config, out),
        Command::Query(args) => query::run(&args, &config, out),
        Command::Count(args) => count::run(&args, &config, out),
        Command::Delete(args) => delete::run(&args, &config, out),
        Command::Sync(args) => sync::run(&args, config, out),
        Command::Verify(_) => verify::run(&config, out),
        Command::Repair(args) => repair::run(&args, &config, out),
        Command::Status(args) => status::run(&args, &config, out),
        Command::Chat(args) => client::chat::run(&args, &config, out),
        Command::Settings(args) => client::settings::run(&args, &config, out),
        Command::Training(args) => client::training::run(&args, &config, out),
        Command::Outbox(args) => client::outbox::run(&args, &config, out),
        Command::Admin(args) => admin::run(args, config, out),
        Command::Top(args) => top::run(&args, &config, out),
        Command::Explain(args) => explain::run(&args, &config, out),
        Command::Key(_) | Command::Completions(_) => unreachable!("run before the settings were read"),
    }
}

/// The settings in force: file or defaults, then the flags; the operator's key as hex.
fn load_config(file: Option<&std::path::Path>, store: Option<String>) -> Result<Config, Error> {
    let mut config = Config::load(file)?;
    if !config.info.pubkey.is_empty() {
        let key = nip19::parse_pubkey(&config.info.pubkey)
            .map_err(|error| config.refuse("info.pubkey", error.to_string()))?;
        config.info.pubkey = faster_hex::hex_string(&key);
    }
    for at in 0..config.rate.exempt_keys.len() {
        let key = nip19::parse_pubkey(&config.rate.exempt_keys[at])
            .map_err(|error| config.refuse("rate.exempt_keys", error.to_string()))?;
        config.rate.exempt_keys[at] = faster_hex::hex_string(&key);
    }
    Rules::new(&config.retention)
        .map_err(|(key, error)| config.refuse("retention.keep", format!("`{key}`: {error}")))?;
    Settings::new(&config).map_err(|wrong| config.refuse(wrong.setting, wrong.to_string()))?;
    if let Some(store) = store {
        config.store = store;
    }
    Ok(config)
}

/// Writes a line without flushing.
fn print_line(out: &mut impl Write, line: &[u8]) -> Result<(), Error> {
    out.write_all(line).and_then(|()| out.write_all(b"\n")).map_err(Error::output)
}

/// Tells a person something, on standard error. Not `eprintln!`, which panics where standard error is closed.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A line of JSON for scripts.
fn json(report: &impl serde::Serialize) -> String {
    serde_json::to_string(report).expect("made of texts and numbers") + "\n"
}

/// Writes a text and flushes it, so that a full disk or a closed pipe is noticed here and not lost at exit.
fn print(out: &mut impl Write, text: &str) -> Result<(), Error> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::output)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::CommandFactory;

    use super::*;

    /// clap's own check of the whole grammar.
    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Every command says more than a line about itself and shows how it is used.
    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command) {
            let name = command.get_name();
            if command.has_subcommands() {
                command.get_subcommands().for_each(check);
            } else {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.split_whitespace().any(|word| word == name), "{name} is in none of: {help}");
                assert!(command.get_long_about().is_some(), "{name} has no description");
            }
        }
        check(&Cli::command());
    }

    /// Each example in the help is a command line that the grammar accepts, so the help stays true.
    #[test]
    fn the_examples_in_the_help_parse() {
        fn collect(command: &clap::Command, lines: &mut Vec<String>) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            lines.extend(help.lines().filter_map(|line| line.strip_prefix("  ")).map(str::to_owned));
            command.get_subcommands().for_each(|command| collect(command, lines));
        }
        let mut lines = Vec::new();
        collect(&Cli::command(), &mut lines);
        assert!(lines.len() > 12, "{lines:?}");
        for line in lines {
            let call = line.split(" | ").find(|part| part.starts_with("sledge ")).unwrap();
            let words = words_of(call.split(['<', '>']).next().unwrap());
            Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{line}\n{error}"));
        }
    }

    /// Splits at spaces outside single quotes, as a shell does.
    fn words_of(line: &str) -> Vec<String> {
        let mut words = Vec::new();
        for (at, part) in line.split('\'').enumerate() {
            if at % 2 == 1 {
                words.push(part.to_owned());
            } else {
                words.extend(part.split_whitespace().map(str::to_owned));
            }
        }
        words
    }

    /// The flags may stand before or behind the command.
    #[test]
    fn global_flags_stand_anywhere() {
        for line in ["sledge --config a.toml --store d status", "sledge status --store d --config a.toml"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.config, Some(PathBuf::from("a.toml")));
            assert_eq!(cli.store.as_deref(), Some("d"));
        }
    }

    /// The operator's key may be an npub; NIP-11 gets hex. A wrong one is named with its place.
    #[test]
    fn the_operators_key_is_read_in_any_spelling() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("my.toml");
        let npub = "npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg";
        std::fs::write(&file, format!("[info]\npubkey = \"{npub}\"\n")).unwrap();
        let config = load_config(Some(&file), Some("elsewhere".to_owned())).unwrap();
        assert_eq!(config.info.pubkey, "7e7e9c42a91bfef19fa929e5fda1b72e0ebc1a4c1141673e2794234d86addf4e");
        assert_eq!(config.store, "elsewhere");

        std::fs::write(&file, "[info]\npubkey = \"npub1xyz\"\n").unwrap();
        let error = load_config(Some(&file), None).unwrap_err();
        assert!(error.to_string().contains("my.toml:2: info.pubkey: "), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
