//! `sledge outbox`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{MIB, ProfileArgs, failed, json_line, store_failed};
use crate::cli::progress::size;
use crate::client::cache::CacheSize;
use crate::client::profile::Exported;
use crate::client::status::Status;
use crate::client::{Client, ClientError};
use crate::config::Config;
use crate::error::Error;
use crate::sync::outbox::Seq;

/// Arguments of `outbox`.
#[derive(Debug, Args)]
pub struct OutboxArgs {
    #[command(flatten)]
    profile: ProfileArgs,
    #[command(subcommand)]
    command: OutboxCommand,
}

/// What to do with the outbox.
#[derive(Debug, Subcommand)]
pub enum OutboxCommand {
    /// Say how much waits to be sent
    ///
    /// Prints how much waits, how much of it is not signed yet, what was refused, and what each relay is owed. Asks no
    /// relay.
    #[command(after_help = "Examples:\n  sledge outbox status\n  sledge outbox status --json")]
    Status,
    /// List what waits
    ///
    /// Prints every entry: its number, what it is, and where it stands with each relay. Asks no relay.
    #[command(after_help = "Examples:\n  sledge outbox list\n  sledge outbox list --json | jq .seq")]
    List,
    /// List what relays refused
    ///
    /// Prints what relays refused for good, with their reasons. It stays until you retry or discard it. Asks no relay.
    #[command(after_help = "Examples:\n  sledge outbox dead\n  sledge outbox dead --json")]
    Dead,
    /// Try again what relays refused
    ///
    /// Owes it to these relays again, all or one number of `sledge outbox dead`, and visits them.
    #[command(after_help = "Examples:\n  sledge outbox retry\n  sledge outbox retry 17")]
    Retry {
        /// The number
        seq: Option<u64>,
    },
    /// Take something out of the outbox
    ///
    /// Forgets one entry, sent or not. What was signed stays among the events of this device.
    #[command(after_help = "Examples:\n  sledge outbox discard 17")]
    Discard {
        /// The number, as `sledge outbox list` prints it
        seq: u64,
    },
    /// Write everything to a file
    ///
    /// Writes all events of this device, each as a line of JSON that `sledge import` reads, and then what is not signed
    /// yet as `{\"draft\":…}` in the clear. Asks no relay and changes nothing: what was owed stays owed.
    #[command(
        after_help = "Examples:\n  sledge outbox export everything.jsonl\n  sledge outbox export - | gzip > everything.jsonl.gz"
    )]
    Export {
        /// The file, which must not exist; - is standard output
        file: PathBuf,
    },
    /// Send what waits
    ///
    /// Visits all relays, fetches what is new, sends what waits. Exits with 1 if something is left, and says what.
    #[command(after_help = "Examples:\n  sledge outbox flush\n  sledge outbox flush --json")]
    Flush,
}

/// Runs `outbox`.
pub fn run(args: &OutboxArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let (profile, as_json) = (&args.profile, args.profile.json);
    let text = match &args.command {
        OutboxCommand::Status => profile.here(config, |client| {
            let cache = (client.profile().cache().size(), config.client.cache_mb_warn.saturating_mul(MIB));
            Ok(status_text(&status(client), Some(cache), as_json))
        })?,
        OutboxCommand::List => profile.here(config, |client| {
            Ok(client.profile().outbox_entries().iter().map(|entry| entry_line(entry, as_json)).collect())
        })?,
        OutboxCommand::Dead => profile.here(config, |client| Ok(dead_text(client, as_json)))?,
        OutboxCommand::Retry { seq } => {
            let revived = profile.write(config, |client| {
                client.profile().revive(seq.map(Seq)).map_err(|error| failed(ClientError::Store(error)))
            })?;
            if as_json { json_line(&json!({"retried": revived})) } else { format!("{revived} to be tried again\n") }
        }
        OutboxCommand::Discard { seq } => {
            let found = profile.here(config, |client| client.profile().discard(Seq(*seq)).map_err(store_failed))?;
            if !found {
                return Err(Error::Usage(format!("there is no number {seq} in the outbox")));
            }
            String::new()
        }
        OutboxCommand::Export { file } => return export(args, config, file, out),
        OutboxCommand::Flush => return flush(args, config, out),
    };
    super::super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn status(client: &Client) -> Status {
    client.status().borrow().clone()
}

/// `cache`: what the local copy takes, and from how many bytes on that is much.
fn status_text(status: &Status, cache: Option<(CacheSize, u64)>, as_json: bool) -> String {
    if as_json {
        let mut all = serde_json::to_value(status).expect("made of numbers and texts");
        if let Some((cache, _)) = cache {
            all["cache"] = json!(cache);
        }
        return json_line(&all);
    }
    let mut text = format!(
        "waiting   {} ({} not signed yet)\nrefused   {}\non disk   {}\n",
        status.waiting,
        status.drafts,
        status.dead,
        size(status.outbox_bytes)
    );
    if let Some(oldest_ms) = status.oldest_draft_ms {
        text += &format!("oldest    {}\n", super::date(oldest_ms / 1000));
    }
    if status.damaged_bytes > 0 {
        text += &format!("damaged   {}, kept beside the journal\n", size(status.damaged_bytes));
    }
    if let Some((cache, warn_bytes)) = cache {
        text += &format!("events    {} here, {}\n", cache.events, size(cache.bytes));
        if cache.bytes > warn_bytes {
            text += "          more than client.cache_mb_warn: delete chats that nobody needs, or give the profile a larger disk\n";
        }
    }
    for (relay, state) in &status.relays {
        text += &format!("{relay}  owed {}\n", state.owed);
    }
    text
}

fn entry_line(entry: &Value, as_json: bool) -> String {
    if as_json {
        return json_line(entry);
    }
    let what = match (&entry["event"], &entry["draft"]) {
        (Value::Null, draft) => {
            let op = draft["op"].as_object().and_then(|op| op.keys().next().cloned()).unwrap_or_default();
            format!("{op}, not signed yet")
        }
        (event, _) => format!("event {} of kind {}", event["id"].as_str().unwrap_or("?"), event["kind"]),
    };
    let relays = entry["relays"].as_object().into_iter().flatten();
    let stand: Vec<String> = relays.map(|(relay, stand)| format!("{relay} {stand}")).collect();
    format!("{:>6}  {what}: {}\n", entry["seq"], stand.join(", "))
}

fn dead_text(client: &Client, as_json: bool) -> String {
    let letters = client.profile().dead_letters();
    let line = |letter: &crate::client::profile::DeadLetter| {
        if as_json {
            return json_line(&serde_json::to_value(letter).expect("made of numbers and texts"));
        }
        format!("{:>6}  {}  {}\n", letter.seq, letter.relay, letter.reason)
    };
    letters.iter().map(line).collect()
}

fn export(args: &OutboxArgs, config: &Config, file: &std::path::Path, out: &mut impl Write) -> Result<ExitCode, Error> {
    let exported: Exported = args.profile.here(config, |client| {
        if file.as_os_str() == "-" {
            return client.profile().export(&mut BufWriter::new(out)).map_err(Error::output);
        }
        let created = File::options().write(true).create_new(true).open(file);
        let created = created.map_err(Error::io("create the file", file))?;
        let written = client.profile().export(&mut BufWriter::new(&created));
        let exported = written.map_err(Error::io("write the file", file))?;
        created.sync_all().map_err(Error::io("write the file", file))?;
        Ok(exported)
    })?;
    let Exported { events, drafts } = exported;
    super::super::say(&format!("{events} events and {drafts} drafts were written"));
    Ok(ExitCode::SUCCESS)
}

fn flush(args: &OutboxArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    if args.profile.offline {
        return Err(Error::Usage("--offline sends nothing".to_owned()));
    }
    let client = args.profile.open(config)?;
    let (settled, status) = super::super::remote::block_on(async {
        let settled = super::visit(&client, config).await;
        let status = status(&client);
        client.close(super::CLOSE_TIME_MAX).await.map_err(store_failed)?;
        Ok((settled, status))
    })?;
    super::super::print(out, &status_text(&status, None, args.profile.json))?;
    if settled && status.waiting == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Error::Failed(format!("{} wait for the next time, {} are refused", status.waiting, status.dead)))
}
