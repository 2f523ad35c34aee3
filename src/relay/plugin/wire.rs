//! The lines that go to a plugin and come from it: the protocol of strfry's write policy plugins.
//!
//! Out goes, in one line, `{"type":"new","event":…,"receivedAt":…,"sourceType":…,"sourceInfo":…,"authed":…}`; `authed` only where
//! the sender has authenticated. Back comes `{"id":…,"action":"accept"|"reject"|"shadowReject","msg":…}`, in any order.

use std::io::{BufRead, Read};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::protocol::{Event, EventId, Verified};
use crate::relay::ingest::{Sender, Source};

/// Bytes of a plugin's line; the rest of a longer one is dropped.
const LINE_BYTES_MAX: u64 = 64 * 1024;
/// Characters of `msg` that reach the client.
const MESSAGE_CHARS_MAX: usize = 500;
/// What an `OK` text may start with (NIP-01, NIP-42).
const PREFIXES: [&str; 9] =
    ["duplicate", "pow", "blocked", "rate-limited", "invalid", "restricted", "mute", "error", "auth-required"];

/// What becomes of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Accept,
    /// It is refused with this text.
    Reject(String),
    /// It is dropped, and its sender told that it was taken.
    ShadowReject,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'r> {
    r#type: &'static str,
    event: &'r RawValue,
    received_at: u64,
    source_type: &'static str,
    source_info: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    authed: Option<String>,
}

/// The line for an event, with its line feed.
pub fn request(event: &Verified<Event>, sender: &Sender, received_at: u64) -> Vec<u8> {
    let json = std::str::from_utf8(&event.canonical().json).expect("canonical JSON is text");
    let event_json: &RawValue = serde_json::from_str(json).expect("canonical JSON is JSON");
    let (source_type, source_info) = match (&sender.upstream, sender.source, sender.ip) {
        (Some(relay), _, _) => (if relay.is_mirror { "Stream" } else { "Sync" }, relay.url.clone()),
        (None, Source::Client, Some(ip)) => (if ip.is_ipv4() { "IP4" } else { "IP6" }, ip.to_string()),
        _ => ("Import", String::new()),
    };
    // The protocol knows one key: the author's where it is among several.
    let authed = sender.keys.iter().find(|key| **key == event.pubkey).or(sender.keys.last());
    let request = Request {
        r#type: "new",
        event: event_json,
        received_at,
        source_type,
        source_info,
        authed: authed.map(|key| key.to_hex()),
    };
    let mut line = serde_json::to_vec(&request).expect("made of texts and numbers");
    line.push(b'\n');
    line
}

/// Reads a plugin's line: for which event, and what. `Ok` with no verdict is an action that nobody knows.
///
/// # Errors
/// What is wrong with it.
pub fn answer(line: &[u8]) -> Result<(EventId, Option<Verdict>), serde_json::Error> {
    #[derive(Deserialize)]
    struct Answer {
        id: EventId,
        action: String,
        #[serde(default)]
        msg: Option<String>,
    }
    let Answer { id, action, msg } = serde_json::from_slice(line)?;
    let verdict = match action.as_str() {
        "accept" => Some(Verdict::Accept),
        "reject" => Some(Verdict::Reject(told(msg.as_deref().unwrap_or_default()))),
        "shadowReject" => Some(Verdict::ShadowReject),
        _ => None,
    };
    Ok((id, verdict))
}

/// A plugin's message as `OK` text: one line, with a prefix that clients know.
fn told(msg: &str) -> String {
    let text: String =
        msg.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(MESSAGE_CHARS_MAX).collect();
    match text.split_once(": ") {
        Some((prefix, _)) if PREFIXES.contains(&prefix) => text,
        _ if text.is_empty() => "blocked: refused by this relay's policy".to_owned(),
        _ => format!("blocked: {text}"),
    }
}

/// Reads the next line without its line feed into `line`; false at the end. Of a line that is too long the beginning is
/// kept, which then is no answer.
///
/// # Errors
/// When reading fails.
pub fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    line.clear();
    if input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', line)? == 0 {
        return Ok(false);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else {
        skip_line(input)?;
    }
    Ok(true)
}

fn skip_line(input: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffered = input.fill_buf()?;
        let end = memchr::memchr(b'\n', buffered);
        let (used, done) = (end.map_or(buffered.len(), |end| end + 1), end.is_some() || buffered.is_empty());
        input.consume(used);
        if done {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::protocol::testing::{Author, NOW};
    use crate::relay::ingest::Upstream;

    /// The fields of the documented protocol, in one line, for each kind of source.
    #[test]
    fn requests_have_the_documented_fields() {
        let note = Author::new(1).note(NOW, "a\nb");
        let line = |sender: &Sender| {
            let line = request(&note, sender, 7);
            assert_eq!(memchr::memchr(b'\n', &line), Some(line.len() - 1));
            serde_json::from_slice::<Value>(&line).unwrap()
        };
        let anonymous = line(&Sender::client("2001:db8::1".parse().unwrap(), Arc::default()));
        let event: Value = serde_json::from_slice(&note.canonical().json).unwrap();
        let expected = json!({
            "type": "new", "event": event, "receivedAt": 7, "sourceType": "IP6", "sourceInfo": "2001:db8::1",
        });
        assert_eq!(anonymous, expected);
        let others = [Author::new(2), Author::new(1), Author::new(3)].map(|author| author.note(NOW, "").pubkey);
        let proven = line(&Sender::client([192, 0, 2, 1].into(), others.into()));
        assert_eq!((&proven["sourceType"], &proven["authed"]), (&json!("IP4"), &json!(note.pubkey)));
        for (is_mirror, name) in [(true, "Stream"), (false, "Sync")] {
            let upstream = Upstream { url: "wss://relay.example.com/".to_owned(), is_mirror };
            let relay = line(&Sender::relay(upstream, false));
            assert_eq!(
                (&relay["sourceType"], &relay["sourceInfo"]),
                (&json!(name), &json!("wss://relay.example.com/"))
            );
        }
        let import = line(&Sender::import());
        assert_eq!(
            (&import["sourceType"], &import["sourceInfo"], import.get("authed")),
            (&json!("Import"), &json!(""), None)
        );
    }

    /// Every action; a message gets a prefix where it has none; anything else is no answer.
    #[test]
    fn answers_are_read() {
        let id = EventId([7; 32]);
        let read = |rest: &str| answer(format!("{{\"id\":\"{id}\",{rest}}}").as_bytes()).unwrap().1;
        let reject = |text: &str| Some(Verdict::Reject(text.to_owned()));
        assert_eq!(read(r#""action":"accept","msg":"""#), Some(Verdict::Accept));
        assert_eq!(read(r#""action":"shadowReject""#), Some(Verdict::ShadowReject));
        assert_eq!(read(r#""action":"reject","msg":"rate-limited: slow down""#), reject("rate-limited: slow down"));
        assert_eq!(read(r#""action":"reject","msg":"not: on\nlist""#), reject("blocked: not: on list"));
        assert_eq!(read(r#""action":"reject""#), reject("blocked: refused by this relay's policy"));
        assert_eq!(read(r#""action":"reject","msg":null"#), reject("blocked: refused by this relay's policy"));
        assert_eq!(read(r#""action":"explode""#), None);
        for line in ["", "hello", "{}", "[]", "{\"id\":\"x\",\"action\":\"accept\"}", "\u{fffd}"] {
            assert!(answer(line.as_bytes()).is_err(), "{line}");
        }
    }

    /// Lines of any length, with and without an end; what is too long costs no memory.
    #[test]
    fn lines_are_bounded() {
        let text = [b"one\n".as_slice(), &vec![b'x'; 1 << 20], b"\n\ntwo"].concat();
        let (mut input, mut line, mut lens) = (std::io::Cursor::new(text), Vec::new(), Vec::new());
        while read_line(&mut input, &mut line).unwrap() {
            lens.push(line.len());
        }
        assert_eq!(lens, [3, LINE_BYTES_MAX as usize, 0, 3]);
    }
}
