//! `sledge chat`.

mod import;

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{ProfileArgs, date, failed, json_line, text_or_stdin};
use crate::client::Client;
use crate::config::Config;
use crate::error::Error;
use crate::protocol::{PublicKey, nip19};
use crate::sync::chat::{ChatKey, HeadView, MessageView};

/// Arguments of `chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    profile: ProfileArgs,
    #[command(subcommand)]
    command: ChatCommand,
}

/// What to do with chats. The help of `import` stands with its arguments.
#[allow(missing_docs)]
#[derive(Debug, Subcommand)]
pub enum ChatCommand {
    /// Begin a chat
    ///
    /// Prints the new chat's id. Nobody but you can read its title and messages.
    #[command(after_help = "Examples:\n  sledge chat new 'A week in Lisbon' --key my.nsec")]
    New {
        /// The title
        title: String,
    },
    /// Write a message
    ///
    /// Puts a message at the end of a chat and prints its id. It is kept here at once and goes to your relays as soon as
    /// they can be reached, now or with any later command.
    #[command(after_help = "Examples:
  sledge chat send 'A week in Lisbon' 'Where shall we stay?'
  sledge chat send 4f0c - --role assistant --offline < answer.txt")]
    Send {
        /// The chat: its id, the beginning of its id, or its title
        chat: String,
        /// The text; - reads it from standard input
        text: String,
        /// Who speaks: user, assistant, system or tool
        #[arg(long, default_value = "user")]
        role: String,
    },
    /// List chats
    ///
    /// Prints id, title and number of messages of each chat, with a `*` where something was not sent yet.
    #[command(after_help = "Examples:\n  sledge chat list\n  sledge chat list --offline --json | jq .title")]
    List,
    /// Show the messages of a chat
    ///
    /// Prints the messages in their order. `|` marks one that was written without knowledge of the one before it, on
    /// another device; `*` one that was not sent yet.
    #[command(after_help = "Examples:\n  sledge chat show 'A week in Lisbon'\n  sledge chat show 4f0c --json")]
    Show {
        /// The chat: its id, the beginning of its id, or its title
        chat: String,
    },
    /// Change a message
    ///
    /// Gives a message of yours another text. On all devices the later change counts.
    #[command(after_help = "Examples:\n  sledge chat edit 'A week in Lisbon' 7c1d 'Where shall we eat?'")]
    Edit {
        /// The chat: its id, the beginning of its id, or its title
        chat: String,
        /// The message: its id or the beginning of it
        message: String,
        /// The new text; - reads it from standard input
        text: String,
    },
    /// Delete a message or a chat
    ///
    /// Deletes a message of yours, or without MESSAGE the whole chat with your messages in it, on all devices and relays.
    #[command(after_help = "Examples:\n  sledge chat delete 'A week in Lisbon' 7c1d\n  sledge chat delete 4f0c")]
    Delete {
        /// The chat: its id, the beginning of its id, or its title
        chat: String,
        /// The message: its id or the beginning of it
        message: Option<String>,
    },
    /// Change what a chat is
    ///
    /// Sets the title, puts a chat away, shares it with others or opens it for training data. Whoever is named with
    /// --share can read what is written from now on; --share without a key ends that for what is written later.
    #[command(after_help = "Examples:
  sledge chat set 4f0c --title 'Ten days in Lisbon' --archived true
  sledge chat set 4f0c --share npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg --training true")]
    Set {
        /// The chat: its id, the beginning of its id, or its title
        chat: String,
        /// A new title
        #[arg(long)]
        title: Option<String>,
        /// Whether it is put away
        #[arg(long, value_name = "BOOL")]
        archived: Option<bool>,
        /// Who takes part besides you, npub or hex
        #[arg(long, value_name = "PUBKEY", num_args = 0..)]
        share: Option<Vec<String>>,
        /// Whether its messages may be given as training data
        #[arg(long, value_name = "BOOL")]
        training: Option<bool>,
    },
    Import(import::ImportArgs),
}

/// Runs `chat`.
pub fn run(args: &ChatArgs, config: &Config, out: &mut impl Write) -> Result<ExitCode, Error> {
    let (profile, json) = (&args.profile, args.profile.json);
    let text = match &args.command {
        ChatCommand::New { title } => {
            let chat = profile.write(config, |client| client.chats().create(title).map_err(failed))?;
            if json { json_line(&json!({"chat": chat.id})) } else { format!("{}\n", chat.id) }
        }
        ChatCommand::Send { chat, text, role } => {
            let text = text_or_stdin(text)?;
            let id = profile.write(config, |client| {
                let chat = find_chat(client, chat)?;
                client.chats().send(&chat, role, &text, Value::Null).map_err(failed)
            })?;
            if json { json_line(&json!({"message": id})) } else { format!("{id}\n") }
        }
        ChatCommand::List => profile.read(config, |client| list(client, json))?,
        ChatCommand::Show { chat } => profile.read(config, |client| {
            let chat = find_chat(client, chat)?;
            let messages = client.chats().messages(&chat).map_err(failed)?;
            Ok(messages.iter().map(|shown| message_line(client, shown, json)).collect())
        })?,
        ChatCommand::Edit { chat, message, text } => {
            let text = text_or_stdin(text)?;
            profile.write(config, |client| {
                let (chat, message) = find_message(client, chat, message)?;
                client.chats().edit(&chat, &message, &text).map_err(failed)
            })?;
            String::new()
        }
        ChatCommand::Delete { chat, message } => {
            profile.write(config, |client| delete(client, chat, message.as_deref()))?;
            String::new()
        }
        ChatCommand::Set { chat, .. } => {
            let fields = fields_of(&args.command)?;
            profile.write(config, |client| {
                let chat = find_chat(client, chat)?;
                fields.into_iter().try_for_each(|(name, value)| client.chats().set(&chat, name, value).map_err(failed))
            })?;
            String::new()
        }
        ChatCommand::Import(args) => return import::run(args, profile, config, out),
    };
    super::super::print(out, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn delete(client: &Client, chat: &str, message: Option<&str>) -> Result<(), Error> {
    match message {
        Some(message) => {
            let (chat, message) = find_message(client, chat, message)?;
            client.chats().delete(&chat, &message).map_err(failed)
        }
        None => client.chats().delete_chat(&find_chat(client, chat)?).map_err(failed),
    }
}

/// The fields of `chat set`, at least one.
fn fields_of(command: &ChatCommand) -> Result<Vec<(&'static str, Value)>, Error> {
    let ChatCommand::Set { title, archived, share, training, .. } = command else { return Ok(Vec::new()) };
    let mut fields = Vec::new();
    fields.extend(title.as_ref().map(|title| ("title", json!(title))));
    fields.extend(archived.map(|archived| ("archived", json!(archived))));
    fields.extend(training.map(|training| ("trainingOptIn", json!(training))));
    if let Some(share) = share {
        let keys: Vec<String> =
            share.iter().map(|key| public_key(key).map(|key| key.to_hex())).collect::<Result<_, _>>()?;
        fields.push(("share", json!(keys)));
    }
    if fields.is_empty() {
        return Err(Error::Usage("nothing to change; name --title, --archived, --share or --training".to_owned()));
    }
    Ok(fields)
}

/// An npub or hex.
pub(super) fn public_key(text: &str) -> Result<PublicKey, Error> {
    let key = nip19::parse_pubkey(text).map_err(|error| Error::Usage(format!("`{text}`: {error}")))?;
    Ok(PublicKey(key))
}

fn list(client: &Client, json: bool) -> Result<String, Error> {
    let mut text = String::new();
    for head in client.chats().list().map_err(failed)? {
        let messages = client.chats().messages(&head.chat).map_err(failed)?;
        let pending = head.pending || messages.iter().any(|message| message.pending);
        if json {
            text += &json_line(&json!({
                "chat": head.chat.id,
                "owner": head.chat.owner.to_hex(),
                "title": head.title(),
                "archived": head.is_archived(),
                "training": head.has_training_opt_in(),
                "share": head.shared_with().iter().map(PublicKey::to_hex).collect::<Vec<_>>(),
                "messages": messages.len(),
                "pending": pending,
            }));
        } else {
            let mark = if pending { '*' } else { ' ' };
            let away = if head.is_archived() { " (archived)" } else { "" };
            text += &format!("{mark} {}  {:>5}  {}{away}\n", head.chat.id, messages.len(), head.title().unwrap_or("-"));
        }
    }
    Ok(text)
}

fn message_line(client: &Client, shown: &MessageView, json: bool) -> String {
    let message = &shown.message;
    if json {
        return json_line(&json!({
            "message": message.id,
            "author": message.author.to_hex(),
            "role": message.role,
            "content": message.content,
            "created_at_ms": message.created_at_ms,
            "parents": message.parents,
            "meta": message.meta,
            "branch": shown.branch,
            "pending": shown.pending,
        }));
    }
    let mark = match (shown.pending, shown.branch) {
        (true, _) => '*',
        (false, true) => '|',
        (false, false) => ' ',
    };
    let own = message.author == client.pubkey();
    let who = if own { message.role.clone() } else { message.author.to_hex()[..8].to_owned() };
    let id = message.id.get(..8).unwrap_or(&message.id);
    format!("{mark} {id}  {}  {who}: {}\n", date(message.created_at_ms / 1000), message.content)
}

/// A chat by its id, the beginning of its id, or its title.
fn find_chat(client: &Client, wanted: &str) -> Result<ChatKey, Error> {
    let all = client.chats().list().map_err(failed)?;
    let by_id = all.iter().filter(|head| head.chat.id == wanted);
    let found: Vec<&HeadView> = by_id.collect();
    let found = if found.is_empty() {
        all.iter().filter(|head| head.title() == Some(wanted) || head.chat.id.starts_with(wanted)).collect()
    } else {
        found
    };
    match found.as_slice() {
        [one] => Ok(one.chat.clone()),
        [] => Err(Error::Usage(format!("there is no chat `{wanted}`; `sledge chat list` lists them"))),
        _ => Err(Error::Usage(format!("{} chats are called `{wanted}`; name one by its id", found.len()))),
    }
}

/// A chat and one of its messages by the id or its beginning.
fn find_message(client: &Client, chat: &str, wanted: &str) -> Result<(ChatKey, String), Error> {
    let chat = find_chat(client, chat)?;
    let messages = client.chats().messages(&chat).map_err(failed)?;
    let mut found = messages.iter().filter(|shown| shown.message.id.starts_with(wanted));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok((chat, one.message.id.clone())),
        (None, _) => Err(Error::Usage(format!("there is no message `{wanted}` in this chat"))),
        _ => Err(Error::Usage(format!("several messages begin with `{wanted}`; write more of the id"))),
    }
}
