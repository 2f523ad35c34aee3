//! `sledge admin`: the methods of the management API (NIP-86) on the command line.

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use clap::Args;
use serde_json::Value;

use super::control;
use super::store::{self, Access};
use crate::config::Config;
use crate::error::Error;
use crate::relay::Clock;
use crate::relay::policy::Policy;
use crate::relay::policy::admin::{self, Answer, Call, Desk};
use crate::relay::policy::methods::{Caller, METHODS};
use crate::server::control::{Answer as ControlAnswer, Request};
use crate::store::Store;

/// Decide who may write: bans, members, kinds, addresses
///
/// Calls a method of the relay management API (NIP-86). While `sledge serve` has the store, the relay does it, at once for
/// all connections; else it is done on the store itself. Decisions are kept with the data and go before the lists of the
/// settings. Keys may be npub, nprofile or hex, events note, nevent or hex. `sledge admin --help` lists the methods.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge admin banpubkey npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg 'spam'
  sledge admin listeventsneedingmoderation --json
  sledge admin blockip 203.0.113.0/24
  sledge admin invite 5 30")]
pub struct AdminArgs {
    /// What to do
    #[arg(long_help = list_of_methods())]
    pub method: String,
    /// Keys, ids, numbers or texts, as the method takes them
    #[arg(allow_negative_numbers = true)]
    pub params: Vec<String>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Each method with its parameters.
fn list_of_methods() -> String {
    let line = |method: &crate::relay::policy::methods::Method| {
        format!("- {} {}: {}\n", method.name, method.params, method.about).replace(" :", ":")
    };
    let of = |members: bool| METHODS.iter().filter(move |method| method.for_members == members).map(line);
    format!(
        "What to do:\n{}\nWhere [members] is enabled also:\n{}\n`invite` is short for createinvite.",
        of(false).collect::<String>(),
        of(true).collect::<String>()
    )
}

/// Calls the method, and prints what it gives.
pub fn run(args: AdminArgs, config: Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    store::must_exist(&config)?;
    let method = if args.method == "invite" { "createinvite".to_owned() } else { args.method };
    let params = args.params.into_iter().map(Value::String).collect();
    let result = match store::reach_or_open(&config)? {
        Access::Own(opened) => {
            let config = Arc::new(config);
            let call = Call { caller: Caller::Operator, method, params };
            store::with_open(&config, &opened, |opened| on_store(&config, opened.store(), call))?
        }
        Access::Relay(_) => match control::ask(&config, Request::Manage { method, params }, &|_, _| {})? {
            ControlAnswer::Result(result) => result,
            other => return Err(control::strange(&other)),
        },
    };
    let text = if args.json { super::json(&result) } else { for_people(&result) };
    super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// Carries out a call on a store that no relay has.
fn on_store(config: &Arc<Config>, store: Arc<dyn Store>, call: Call) -> Result<Value, Error> {
    let policy = Policy::open(config.clone(), store.clone()).map_err(|error| Error::Failed(error.to_string()))?;
    let (tell, told) = mpsc::channel();
    let mut chore = admin::chore(Arc::new(policy), call, move |answer| drop(tell.send(answer)));
    let clock = Clock::system();
    while chore(&Desk { store: &*store, fanout: None, now: clock.now() }) {}
    match told.try_recv() {
        Ok(Answer { result: Ok(result), .. }) => Ok(result),
        Ok(Answer { result: Err(problem), .. }) => Err(Error::Failed(problem)),
        Err(_) => Err(Error::Failed("the call has no answer".to_owned())),
    }
}

/// A result in lines: one for each entry of a list.
fn for_people(result: &Value) -> String {
    match result {
        Value::Bool(true) => "done\n".to_owned(),
        Value::Array(entries) => entries.iter().map(|entry| line(entry) + "\n").collect(),
        other => line(other) + "\n",
    }
}

/// One entry: its values side by side, named where they would not explain themselves.
fn line(entry: &Value) -> String {
    match entry {
        Value::String(text) => text.clone(),
        Value::Object(fields) => {
            let plain = ["pubkey", "id", "ip", "claim", "reason"];
            let shown = fields.iter().map(|(name, value)| match value {
                Value::String(text) if plain.contains(&name.as_str()) => text.clone(),
                other => format!("{name}: {}", line(other)),
            });
            shown.collect::<Vec<_>>().join("  ")
        }
        Value::Array(entries) => entries.iter().map(line).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::testing;

    fn call(config: &Config, line: &str, json: bool) -> Result<String, Error> {
        let mut words = line.split(' ').map(str::to_owned);
        let args = AdminArgs { method: words.next().unwrap(), params: words.collect(), json };
        let mut out = Vec::new();
        run(args, config.clone(), &mut out).map(|_| String::from_utf8(out).unwrap())
    }

    /// On a store that nobody has, decisions are kept and followed at once, also by the next import.
    #[test]
    fn decisions_on_the_store_itself() {
        let folder = tempfile::tempdir().unwrap();
        let note = testing::note(10, "spam");
        let config = testing::store_with(folder.path(), [note.clone()]);
        let key = note.pubkey.to_hex();
        assert_eq!(call(&config, &format!("banpubkey {key} spam"), false).unwrap(), "done\n");
        assert_eq!(testing::dates(&config), [0; 0]);
        assert_eq!(call(&config, "listbannedpubkeys", false).unwrap(), format!("{key}  spam\n"));
        let json = call(&config, "listbannedpubkeys", true).unwrap();
        assert_eq!(json, format!("[{{\"pubkey\":\"{key}\",\"reason\":\"spam\"}}]\n"));
        assert_eq!(call(&config, "disallowkind 7", false).unwrap(), "done\n");
        assert_eq!(call(&config, "listdisallowedkinds", false).unwrap(), "7\n");
        let error = call(&config, "createinvite", false).unwrap_err();
        assert!(error.to_string().contains("does not know the method"), "{error}");
        assert!(call(&config, "banpubkey nonsense", false).unwrap_err().to_string().contains("no public key"));
    }

    /// Where there are members, invitations are made and listed, with all that they are.
    #[test]
    fn invitations() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = testing::store_with(folder.path(), []);
        config.members.enabled = true;
        let invited = call(&config, "invite 5 30", false).unwrap();
        assert!(invited.contains("uses: 5") && invited.contains("expires: "), "{invited}");
        assert_eq!(call(&config, "listinvites", true).unwrap().matches("\"uses\":5").count(), 1);
    }

    /// The help names every method.
    #[test]
    fn the_help_names_every_method() {
        let help = list_of_methods();
        assert!(METHODS.iter().all(|method| help.contains(&format!("- {}", method.name))), "{help}");
    }
}
