//! `sledge chat import`.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::super::{ProfileArgs, failed, json_line, store_failed};
use crate::cli::import::lines::{Chunk, Lines, Text, unpacked};
use crate::cli::import::{JSON_BYTES_A_BYTE, input_name, open_input};
use crate::cli::progress::{self, number};
use crate::client::outbox::OutboxError;
use crate::client::{Client, ClientError};
use crate::config::Config;
use crate::error::Error;
use crate::protocol::nip19::{self, Form};
use crate::protocol::supersede::Version;
use crate::protocol::{Event, Verified};
use crate::sync::import::{OldChat, Tally, from_sqlite_json, may_hold_chat};

/// Bytes of old chats that are held in memory. A user's chats are far less; what is more is imported in several runs.
const BYTES_MAX: usize = 256 << 20;
/// Messages after which a portion is made durable. A chat is never cut.
const PORTION_MESSAGES: usize = 256;
/// Bad lines that are named one by one.
const NAMED_MAX: usize = 20;

/// Take over the chats of an older app
///
/// Reads chats of the older shape and makes each message one of its own, dated as it was: events that hold a whole chat
/// (kind 30001), in the clear or encrypted, one a line as `sledge export` and other tools print them; or the rows that
/// `sqlite3 -json` prints of the Onyx app's table. Which of the two it is, the first character tells. Gzip is recognised
/// by its content. Of several versions of a chat the newest counts. With --from-relays no file is needed: the old chats are
/// taken from your relays. The old events stay where they are.
///
/// Importing again, after a crash or on another device, adds nothing, and a message that you deleted stays deleted. Events
/// are imported with the key that wrote them; `sledge key import --older` makes the older app's key of its words.
///
/// Exit code 0: everything was read, even if single lines, rows or messages were not fit to be imported; the tally counts
/// them. 1: it could not be read, held no chat of this key, or not everything could be kept; the same command goes on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge chat import events.jsonl.gz --key old.nsec
  sqlite3 -json onyx.db 'SELECT id, messages FROM chats' | sledge chat import -
  sledge chat import --from-relays --json")]
pub struct ImportArgs {
    /// Old chats, plain or gzip; - reads standard input
    #[arg(value_name = "FILE|-", required_unless_present = "from_relays", conflicts_with = "from_relays")]
    file: Option<PathBuf>,
    /// Take the old chats that your relays have
    #[arg(long)]
    from_relays: bool,
}

/// What there was and what became of it.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Chats of the older shape.
    chats: usize,
    #[serde(flatten)]
    messages: Tally,
    /// Lines and rows that could not be read.
    unreadable: usize,
    /// Events of other keys that may hold chats.
    other_keys: usize,
    /// Other events.
    other_events: usize,
}

/// What a file holds.
#[derive(Debug, Default)]
struct Found {
    /// Events that may hold chats, with their lines.
    events: Vec<(u64, Event)>,
    rows: Vec<OldChat>,
    /// Bytes of lines kept.
    bytes: usize,
    report: Report,
}

/// Imports, and tells what came of it.
pub(super) fn run(
    args: &ImportArgs,
    profile: &ProfileArgs,
    config: &Config,
    out: &mut impl Write,
) -> Result<ExitCode, Error> {
    let found = args.file.as_deref().map(|file| read_file(file, config)).transpose()?;
    let (report, ended) = profile.exchange(config, |client| match found {
        Some(found) => take_found(client, found),
        None => {
            let chats = client.profile().old_chats().map_err(store_failed)?;
            take(client, &chats, Report::default())
        }
    })?;
    crate::cli::print(out, &if profile.json { json_line(&serde_json::json!(report)) } else { report.for_people() })?;
    ended.map(|()| ExitCode::SUCCESS)
}

impl Report {
    fn for_people(&self) -> String {
        let count = |count: usize| number(super::super::usize_to_u64(count));
        let mut text = format!(
            "chats      {}\nimported   {} messages\nknown      {}\ntoo long   {}\n",
            count(self.chats),
            count(self.messages.imported),
            count(self.messages.known),
            count(self.messages.too_long.len()),
        );
        for one in &self.messages.too_long {
            text += &format!("           {} in chat {}\n", one.message, one.chat);
        }
        if self.unreadable > 0 {
            text += &format!("unreadable {}\n", count(self.unreadable));
        }
        text
    }

    fn refuse(&mut self, what: &str) {
        self.unreadable += 1;
        if self.unreadable <= NAMED_MAX {
            crate::cli::say(what);
        }
    }
}

/// Reads a file before anything else is done, so that a wrong one costs no visit to relays.
fn read_file(file: &Path, config: &Config) -> Result<Found, Error> {
    let (name, (input, bytes)) = (input_name(file), open_input(file)?);
    let bar = progress::bytes("reading", bytes);
    let cannot_read = |error: io::Error| Error::Failed(format!("{name} cannot be read to its end: {error}"));
    let mut text = unpacked(bar.wrap_read(input)).map_err(cannot_read)?;
    let mut found = Found::default();
    let all = if first_byte(&mut text).map_err(cannot_read)? == Some(b'[') {
        found.read_rows(text, &name, cannot_read)?
    } else {
        let line_bytes_max = config.limits.frame_bytes_max.saturating_mul(JSON_BYTES_A_BYTE);
        found.read_lines(Lines::of(text, line_bytes_max), &name, cannot_read)?
    };
    bar.finish_and_clear();
    if all > 0 && found.report.unreadable == all {
        return Err(Error::Failed(format!(
            "{name} holds nothing that can be imported; it should hold one event, a JSON object, a line, or what \
             `sqlite3 -json` prints"
        )));
    }
    Ok(found)
}

/// The first byte that is no space; nothing in an empty text.
fn first_byte(text: &mut Text) -> io::Result<Option<u8>> {
    loop {
        let buffer = text.fill_buf()?;
        match buffer.iter().position(|byte| !byte.is_ascii_whitespace()) {
            Some(at) => return Ok(Some(buffer[at])),
            None if buffer.is_empty() => return Ok(None),
            None => {
                let blank = buffer.len();
                text.consume(blank);
            }
        }
    }
}

fn too_large(name: &str) -> Error {
    let mib = BYTES_MAX >> 20;
    Error::Failed(format!("{name} holds more than {mib} MiB of chats; import it in parts"))
}

impl Found {
    /// Reads rows; how many there were.
    fn read_rows(&mut self, text: Text, name: &str, cannot_read: impl Fn(io::Error) -> Error) -> Result<usize, Error> {
        let mut whole = String::new();
        text.take(BYTES_MAX as u64 + 1).read_to_string(&mut whole).map_err(cannot_read)?;
        if whole.len() > BYTES_MAX {
            return Err(too_large(name));
        }
        let rows = from_sqlite_json(&whole)
            .map_err(|why| Error::Failed(format!("{name} is not what `sqlite3 -json` prints: {why}")))?;
        let all = rows.len();
        for (row, chat) in rows.into_iter().enumerate() {
            match chat {
                Ok(chat) => self.rows.push(chat),
                Err(why) => self.report.refuse(&format!("row {}: {why}", row + 1)),
            }
        }
        Ok(all)
    }

    /// Reads lines; how many there were.
    fn read_lines(
        &mut self,
        mut lines: Lines,
        name: &str,
        cannot_read: impl Fn(io::Error) -> Error,
    ) -> Result<usize, Error> {
        let mut all = 0;
        while let Some(chunk) = lines.next_chunk().map_err(&cannot_read)? {
            all += self.read_chunk(&chunk);
            if self.bytes > BYTES_MAX {
                return Err(too_large(name));
            }
        }
        Ok(all)
    }

    fn read_chunk(&mut self, chunk: &Chunk) -> usize {
        let mut all = 0;
        for (line, text) in chunk.lines() {
            all += 1;
            let event = text
                .map_err(|_| "longer than any event".to_owned())
                .and_then(|bytes| std::str::from_utf8(bytes).map_err(|error| error.to_string()))
                .and_then(|json| Event::from_json(json).map(|event| (json.len(), event)).map_err(|e| e.to_string()));
            match event {
                Ok((bytes, event)) if may_hold_chat(&event) => {
                    self.bytes += bytes;
                    self.events.push((line, event));
                }
                Ok(_) => self.report.other_events += 1,
                Err(why) => self.report.refuse(&format!("line {line}: {why}")),
            }
        }
        all
    }

    /// The user's old chats, of several versions the newest.
    fn chats(&mut self, client: &Client) -> Vec<OldChat> {
        let me = client.pubkey();
        let mut newest: BTreeMap<String, (Version, OldChat)> = BTreeMap::new();
        for (line, event) in std::mem::take(&mut self.events) {
            if event.pubkey != me {
                self.report.other_keys += 1;
                continue;
            }
            let version = Version::of(&event);
            let event = match Verified::check(event) {
                Ok(event) => event,
                Err(why) => {
                    self.report.refuse(&format!("line {line}: {why}"));
                    continue;
                }
            };
            let Some(chat) = client.profile().old_chat(&event) else {
                self.report.other_events += 1;
                continue;
            };
            if newest.get(&chat.id).is_none_or(|(held, _)| version.replaces(held)) {
                newest.insert(chat.id.clone(), (version, chat));
            }
        }
        let of_events = newest.into_values().map(|(_, chat)| chat);
        of_events.chain(std::mem::take(&mut self.rows)).collect()
    }
}

type Taken = (Report, Result<(), Error>);

fn take_found(client: &Client, mut found: Found) -> Result<Taken, Error> {
    let chats = found.chats(client);
    if chats.is_empty() && found.report.other_keys > 0 {
        let npub = nip19::encode(Form::Npub, &client.pubkey().0);
        return Err(Error::Failed(format!(
            "there is no chat of {npub}, but {} events of other keys that may hold chats; name the file of the key that \
             wrote them with --key",
            found.report.other_keys
        )));
    }
    take(client, &chats, found.report)
}

/// Takes chats in portions. Where the outbox has no more room, what was taken goes to the relays all the same, which makes
/// room for the next run.
fn take(client: &Client, chats: &[OldChat], mut report: Report) -> Result<Taken, Error> {
    report.chats = chats.len();
    let bar = progress::events("importing chats", Some(super::super::usize_to_u64(chats.len())));
    let mut rest = chats;
    while !rest.is_empty() {
        let (portion, later) = rest.split_at(portion_len(rest));
        match client.chats().import(portion) {
            Ok(tally) => report.messages.add(tally),
            Err(ClientError::Outbox(full @ OutboxError::Full { .. })) => {
                let why = format!("{full}; the same command goes on with the chats that are left");
                return Ok((report, Err(Error::Failed(why))));
            }
            Err(error) => return Err(failed(error)),
        }
        bar.inc(super::super::usize_to_u64(portion.len()));
        rest = later;
    }
    bar.finish_and_clear();
    Ok((report, Ok(())))
}

/// How many of these chats are made durable together: at least one.
fn portion_len(chats: &[OldChat]) -> usize {
    let mut messages = 0;
    let is_full = |chat: &OldChat| {
        messages += chat.messages.len();
        messages >= PORTION_MESSAGES
    };
    chats.iter().position(is_full).map_or(chats.len(), |last| last + 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::Map;

    use super::*;
    use crate::protocol::testing::{NOW, sign};

    fn read(text: impl AsRef<[u8]>) -> Result<Found, Error> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("old");
        std::fs::write(&file, text).unwrap();
        read_file(&file, &Config::default())
    }

    fn line(kind: u16, tags: &[&[&str]]) -> String {
        String::from_utf8(sign(1, kind, NOW, tags, "x").canonical().json.to_vec()).unwrap()
    }

    /// The first character tells lines from rows, behind any blanks. What may hold a chat is kept, what is no event is
    /// counted, and an empty file is no failure.
    #[test]
    fn lines_and_rows_are_told_apart() {
        let (old, note) = (line(30_001, &[&["d", "a"]]), line(1, &[]));
        let ours = line(30_001, &[&["d", "a"], &["L", crate::protocol::label::NAMESPACE]]);
        let counts = |text: &str| {
            let found = read(text).unwrap();
            (found.events.len(), found.rows.len(), found.report.unreadable, found.report.other_events)
        };
        assert_eq!(counts(&format!("\n {old}\n\n{note}\nno event\n{ours}")), (1, 0, 1, 2));
        assert_eq!(counts(" \n [{\"id\":\"a\",\"messages\":\"[]\"},\n{\"id\":[]}]\n"), (0, 1, 1, 0));
        assert_eq!(counts(&format!("{}{old}", " ".repeat(1 << 20))), (1, 0, 0, 0));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"[{\"id\":\"a\",\"messages\":null}]").unwrap();
        assert_eq!(read(gzip.finish().unwrap()).unwrap().rows.len(), 1);
        for empty in ["", " \n\n", "[]"] {
            assert_eq!(counts(empty), (0, 0, 0, 0));
        }
        for wrong in ["no event", "{}\n{}", "[1]", "[{\"id\":[]}]", "[", "\u{feff}[]"] {
            assert_eq!(read(wrong).unwrap_err().exit_code(), 1, "{wrong}");
        }
    }

    /// Chats are made durable some hundred messages at a time, and none is cut.
    #[test]
    fn portions_are_whole_chats() {
        let chats = |sizes: &[usize]| -> Vec<OldChat> {
            let chat = |size: &usize| OldChat { id: String::new(), title: None, messages: vec![Map::new(); *size] };
            sizes.iter().map(chat).collect()
        };
        for (sizes, expected) in [
            (&[1, 2, 3][..], 3),
            (&[PORTION_MESSAGES, 1], 1),
            (&[1, 3 * PORTION_MESSAGES, 1], 2),
            (&[PORTION_MESSAGES - 1, 1, 1], 2),
        ] {
            assert_eq!(portion_len(&chats(sizes)), expected, "{sizes:?}");
        }
    }
}
