//! `sledge settings`.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{ProfileArgs, failed, json_line};
use crate::config::Config;
use crate::error::Error;
use crate::sync::fields::Field;
use crate::sync::settings::Conflict;

/// Arguments of `settings`.
#[derive(Debug, Args)]
pub struct SettingsArgs {
    #[command(flatten)]
    profile: ProfileArgs,
    #[command(subcommand)]
    command: SettingsCommand,
}

/// What to do with settings.
#[derive(Debug, Subcommand)]
pub enum SettingsCommand {
    /// Write a setting
    ///
    /// Writes one setting, on all your devices. What two devices write without knowing of each other is merged setting by
    /// setting; of the same one the later counts. Names that begin with `device.` stay on this device, and so do names
    /// that begin with `secret.` unless you say --secret.
    #[command(after_help = "Examples:
  sledge settings set theme dark
  sledge settings set editor.tabs '{\"width\":4}' --offline
  sledge settings set theme --remove")]
    Set {
        /// The setting's name
        name: String,
        /// Its value: JSON, or a text as it stands
        #[arg(required_unless_present = "remove")]
        value: Option<String>,
        /// Let a setting under `secret.` go to relays, encrypted
        #[arg(long)]
        secret: bool,
        /// Remove the setting
        #[arg(long, conflicts_with = "value")]
        remove: bool,
    },
    /// Read a setting
    ///
    /// Prints the value: a text as it stands, anything else as JSON. Exits with 1 if there is none.
    #[command(
        after_help = "Examples:\n  sledge settings get theme\n  sledge settings get editor.tabs --offline --json"
    )]
    Get {
        /// The setting's name
        name: String,
    },
    /// List all settings
    ///
    /// Prints name and value of each, those that stay on this device included.
    #[command(after_help = "Examples:\n  sledge settings list\n  sledge settings list --json | jq .theme")]
    List,
    /// Show what devices disagree on
    ///
    /// Prints each setting that two devices wrote without knowing of each other: the value that counts everywhere, and the
    /// others. It stays listed until a device publishes a version that takes all of them in: by itself where none says
    /// everything yet, else with the next setting that is written.
    #[command(after_help = "Examples:\n  sledge settings conflicts\n  sledge settings conflicts --offline --json")]
    Conflicts,
}

/// Runs `settings`.
pub fn run(args: &SettingsArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let (profile, as_json) = (&args.profile, args.profile.json);
    let text = match &args.command {
        SettingsCommand::Set { name, value, secret, .. } => {
            let value = value.as_deref().map_or(Value::Null, read_value);
            profile.write(config, |client| client.settings().set(name, value, *secret).map_err(failed))?;
            String::new()
        }
        SettingsCommand::Get { name } => {
            let value = profile.read(config, |client| client.settings().get(name).map_err(failed))?;
            let Some(value) = value else {
                return Err(Error::Failed(format!("there is no setting `{name}`")));
            };
            if as_json { json_line(&value) } else { format!("{}\n", shown(&value)) }
        }
        SettingsCommand::List => {
            let all = profile.read(config, |client| client.settings().all().map_err(failed))?;
            if as_json {
                json_line(&json!(all))
            } else {
                all.iter().map(|(name, value)| format!("{name} = {}\n", shown(value))).collect()
            }
        }
        SettingsCommand::Conflicts => {
            let conflicts = profile.read(config, |client| client.settings().conflicts().map_err(failed))?;
            conflicts.iter().map(|conflict| conflict_line(conflict, as_json)).collect()
        }
    };
    super::super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// JSON, or a text as it stands.
fn read_value(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::from(text))
}

fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn conflict_line(conflict: &Conflict, as_json: bool) -> String {
    let value = |field: &Field| field.0.clone();
    let others: Vec<Value> = conflict.others.iter().map(value).collect();
    if as_json {
        return json_line(&json!({"name": conflict.name, "value": value(&conflict.winner), "others": others}));
    }
    let others: Vec<String> = others.iter().map(shown).collect();
    format!("{} = {} (elsewhere: {})\n", conflict.name, shown(&value(&conflict.winner)), others.join(", "))
}
