//! The older shapes of chats: one event with a `messages` array, and the Onyx app's SQLite table `chats`.
//!
//! In: such a chat. Out: drafts of one message each, dated by what the old chat says. Every id and stamp follows from the
//! old content alone, so importing twice, or on two devices, adds nothing.
//!
//! The table is read as `sqlite3 -json onyx.db "SELECT id, messages FROM chats"` prints it: a user has that tool or
//! gets it in a minute, while a SQLite library would add more to the binary than the whole sync engine.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::chat::{ChatKey, Chats, MessageDraft, TITLE, message};
use super::cipher::{self, Cipher, PLAINTEXT_BYTES_MAX};
use super::clock::{Device, Hlc, Written};
use super::draft::{Draft, Op};
use super::fields::Fields;
use crate::protocol::{Event, PublicKey};

/// The time of messages without one: they come first, in their order. 2020-01-01.
const UNDATED_MS: u64 = 1_577_836_800_000;
/// Numbers below this are seconds, above it milliseconds: the year 1973 in the one, 5138 in the other.
const SECONDS_BELOW: u64 = 100_000_000_000;

/// A chat in an older shape.
#[derive(Clone, Debug, PartialEq)]
pub struct OldChat {
    /// Its id.
    pub id: String,
    /// Its title, if it has one.
    pub title: Option<String>,
    /// Its messages, as JSON objects.
    pub messages: Vec<Map<String, Value>>,
}

/// What an import comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imported {
    /// What is to be put into the outbox.
    pub drafts: Vec<Draft>,
    /// Messages that are there already, or were deleted.
    pub known: usize,
    /// Ids of messages that one event cannot hold.
    pub too_long: Vec<String>,
}

/// The secret key that the older app made of a mnemonic: the SHA-256 of its text. NIP-06 makes another one.
pub fn old_secret_key(mnemonic: &str) -> [u8; 32] {
    Sha256::digest(mnemonic).into()
}

/// Reads a chat of the older shape from an event: `{"messages":[…]}` or the bare array, in the clear or sealed for
/// oneself. `None` for any other event.
pub fn from_event(event: &Event, cipher: &dyn Cipher) -> Option<OldChat> {
    let id = event.tags.find("d").and_then(|tag| tag.value())?;
    let read = |text: &str| serde_json::from_str::<Value>(text).ok();
    let body =
        read(&event.content).or_else(|| read(&cipher::open(cipher, &event.pubkey, &event.tags, &event.content)?))?;
    let title = event.tags.find("title").and_then(|tag| tag.value()).map(str::to_owned);
    let in_body = body.get("title").and_then(Value::as_str).map(str::to_owned);
    let messages = body.get("messages").unwrap_or(&body);
    Some(OldChat { id: id.to_owned(), title: title.or(in_body), messages: objects(messages)? })
}

/// Reads what `sqlite3 -json` prints of the table `chats`: rows of `id` and `messages`, the latter JSON in a string.
///
/// # Errors
/// The row, counted from 1, and what is wrong with it; 0 when the text is no list of rows at all.
pub fn from_sqlite_json(text: &str) -> Result<Vec<OldChat>, (usize, String)> {
    #[derive(Deserialize)]
    struct Row {
        id: String,
        messages: Option<String>,
        title: Option<String>,
    }
    if text.trim().is_empty() {
        // What sqlite3 prints of an empty table.
        return Ok(Vec::new());
    }
    let rows: Vec<Value> = serde_json::from_str(text).map_err(|error| (0, error.to_string()))?;
    let read = |(number, row): (usize, Value)| {
        let row: Row = serde_json::from_value(row).map_err(|error| (number + 1, error.to_string()))?;
        let messages = row.messages.as_deref().unwrap_or("[]");
        let messages: Value = serde_json::from_str(messages).map_err(|error| (number + 1, error.to_string()))?;
        let messages = objects(&messages).ok_or_else(|| (number + 1, "messages is no list of objects".to_owned()))?;
        Ok(OldChat { id: row.id, title: row.title, messages })
    };
    rows.into_iter().enumerate().map(read).collect()
}

fn objects(list: &Value) -> Option<Vec<Map<String, Value>>> {
    list.as_array()?.iter().map(|item| item.as_object().cloned()).collect()
}

/// What is new of an old chat, each message following the one before it. `drafts` are those that wait already.
pub fn explode<'d>(
    chats: &Chats,
    me: PublicKey,
    old: &OldChat,
    drafts: impl IntoIterator<Item = &'d Draft>,
) -> Imported {
    let chat = ChatKey { owner: me, id: old.id.clone() };
    let waiting: BTreeSet<String> = drafts.into_iter().filter_map(Draft::merge_key).collect();
    let mut imported = Imported::default();
    let mut parents: Vec<String> = Vec::new();
    let mut at_ms = UNDATED_MS;
    for (number, fields) in old.messages.iter().enumerate() {
        let created_at = fields.get("createdAt").unwrap_or(&Value::Null);
        // Without a time of its own a message follows the one before it.
        at_ms = time_ms(created_at).unwrap_or(at_ms + 1);
        let counter = u16::try_from(number).unwrap_or(u16::MAX);
        let stamp = Hlc { counter, ..Hlc::at(at_ms, Device::IMPORT) };
        let draft = exploded(me, &chat, fields, stamp, &parents);
        let Op::Message(message) = &draft.op else { continue };
        parents = vec![message.id.clone()];
        let address = message::address(me, &chat.id, &message.id);
        let too_long = message.content.len() + message.meta.to_string().len() > PLAINTEXT_BYTES_MAX / 2;
        if chats.knows(&address) || draft.merge_key().is_some_and(|key| waiting.contains(&key)) {
            imported.known += 1;
        } else if too_long && sealed_length(message) > PLAINTEXT_BYTES_MAX {
            imported.too_long.push(message.id.clone());
        } else {
            imported.drafts.push(draft);
        }
    }
    imported
        .drafts
        .extend(title(chats, &chat, old).filter(|draft| draft.merge_key().is_none_or(|key| !waiting.contains(&key))));
    imported
}

/// A bound of what a message takes as JSON.
fn sealed_length(message: &MessageDraft) -> usize {
    serde_json::to_string(message).map_or(usize::MAX, |json| json.len())
}

/// The old title, so old that any other wins over it.
fn title(chats: &Chats, chat: &ChatKey, old: &OldChat) -> Option<Draft> {
    let title = old.title.as_ref().filter(|title| !title.is_empty())?;
    let has_title = chats.head(chat).is_some_and(|head| head.field(TITLE).is_some());
    if has_title || chats.knows(&chat.head_address()) {
        return None;
    }
    let fields = [(TITLE.to_owned(), Value::from(title.as_str()))].into();
    Some(dated(
        Op::Head { chat: chat.id.clone(), fields, known: Fields::default() },
        Hlc::at(UNDATED_MS, Device::IMPORT),
    ))
}

fn exploded(me: PublicKey, chat: &ChatKey, fields: &Map<String, Value>, stamp: Hlc, parents: &[String]) -> Draft {
    let text = |name: &str| fields.get(name).map(text_of).unwrap_or_default();
    let role = text("role");
    let id = old_message_id(&me, &chat.id, &text("id"), &text("createdAt"), &role);
    let mut meta = fields.clone();
    for name in ["id", "role", "content", "createdAt"] {
        meta.remove(name);
    }
    let op = Op::Message(MessageDraft {
        chat: chat.clone(),
        id,
        role,
        content: fields.get("content").map(content_of).unwrap_or_default(),
        first: Some((stamp.wall_ms, stamp)),
        parents: parents.to_vec(),
        meta: if meta.is_empty() { Value::Null } else { Value::Object(meta) },
        readers: Vec::new(),
        after: None,
    });
    dated(op, stamp)
}

fn dated(op: Op, stamp: Hlc) -> Draft {
    Draft { written: Written { local_ms: stamp.wall_ms, floor: Hlc::ZERO, stamp, is_final: true }, op }
}

/// The id of an exploded message: the first 16 bytes of SHA-256(`pubkey|chat|id|createdAt|role`), as a UUID is written.
pub fn old_message_id(author: &PublicKey, chat: &str, id: &str, created_at: &str, role: &str) -> String {
    let hash = Sha256::digest(format!("{author}|{chat}|{id}|{created_at}|{role}"));
    let hex = faster_hex::hex_string(&hash[..16]);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// A value as it stands in the id: strings without quotes, nothing for null.
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// The text of a content: a string, or a list of parts whose texts are joined.
fn content_of(value: &Value) -> String {
    match value {
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| part.get("text").unwrap_or(part).as_str());
            texts.collect::<Vec<_>>().join("\n")
        }
        other => text_of(other),
    }
}

/// A time as JavaScript writes it: a number of seconds or milliseconds, or `2024-12-05T10:20:30.123Z`.
fn time_ms(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => {
            let number = number.as_u64().or_else(|| number.as_f64().filter(|n| *n > 0.0).map(|n| n as u64))?;
            Some(if number < SECONDS_BELOW { number.checked_mul(1000)? } else { number })
        }
        Value::String(text) => iso_ms(text).or_else(|| time_ms(&Value::from(text.parse::<u64>().ok()?))),
        _ => None,
    }
}

fn iso_ms(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut clock = clock.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let millis: u64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    let ranges = (1970..10_000).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !ranges || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some((((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second) * 1000 + millis)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    let is_leap = leap_days(year) != leap_days(year - 1);
    const BEFORE_MONTH: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let in_year = BEFORE_MONTH[month as usize - 1] + u64::from(is_leap && month > 2) + day - 1;
    (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969) + in_year
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sync::testing::{Desk, NOW_MS};

    const OLD: &str = r#"[{"id":"a","role":"user","content":"Hi","createdAt":"2024-12-05T10:20:30.123Z"},
        {"id":"b","role":"assistant","content":[{"type":"text","text":"Hello"},{"type":"text","text":"you"}],"model":"x"},
        {"id":"c","role":"user","content":"Bye","createdAt":1733394100}]"#;

    fn old_chat() -> OldChat {
        let rows = json!([{"id": "chat1", "messages": OLD}]).to_string();
        OldChat { title: Some("Old".to_owned()), ..from_sqlite_json(&rows).unwrap().remove(0) }
    }

    fn import(desk: &mut Desk) -> Imported {
        let imported = explode(&desk.state.chats, desk.state.me(), &old_chat(), []);
        for draft in &imported.drafts {
            let event = desk.build(&[draft]).unwrap();
            desk.take(&event);
        }
        imported
    }

    /// Every message once, in its order, dated as it was; what the old shape knew besides stays in `meta`.
    #[test]
    fn an_old_chat_is_exploded() {
        let mut desk = Desk::new(1, 1);
        assert_eq!(import(&mut desk).drafts.len(), 4);
        let view = desk.state.chat_view([]);
        let chat = ChatKey { owner: desk.state.me(), id: "chat1".to_owned() };
        assert_eq!(view.head(&chat).title(), Some("Old"));
        let messages = view.messages(&chat);
        let seen: Vec<(&str, &str, u64, bool)> = messages
            .iter()
            .map(|view| (&*view.message.role, &*view.message.content, view.message.created_at_ms, view.branch))
            .collect();
        assert_eq!(
            seen,
            [
                ("user", "Hi", 1_733_394_030_123, false),
                ("assistant", "Hello\nyou", 1_733_394_030_124, false),
                ("user", "Bye", 1_733_394_100_000, false),
            ]
        );
        assert_eq!(messages[1].message.meta, json!({"model": "x"}));
    }

    /// A second import adds nothing, on the same device or another, also after a message was edited or deleted.
    #[test]
    fn importing_twice_adds_nothing() {
        let (mut a, mut b) = (Desk::new(1, 1), Desk::new(1, 2));
        let first = import(&mut a);
        assert_eq!(import(&mut b).drafts.len(), 4);
        let chat = ChatKey { owner: a.state.me(), id: "chat1".to_owned() };
        let ids = |desk: &Desk| {
            desk.state.chat_view([]).messages(&chat).into_iter().map(|view| view.message.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(&a), ids(&b));
        let id = ids(&a)[0].clone();
        let deletion = a.state.chat_view([]).delete(&chat, &id).unwrap();
        a.say(deletion, NOW_MS);
        let again = import(&mut a);
        assert_eq!((again.drafts.len(), again.known), (0, 3));
        let waiting = explode(&Desk::new(1, 3).state.chats, a.state.me(), &old_chat(), &first.drafts);
        assert_eq!((waiting.drafts.len(), waiting.known), (0, 3));
    }

    /// From an event, in the clear and sealed; other events are not taken for chats.
    #[test]
    fn from_events() {
        let desk = Desk::new(1, 1);
        let event = |content: &str| desk.author.event(30_001, 1, &[vec!["d", "chat1"], vec!["title", "Old"]], content);
        let clear = format!("{{\"messages\":{OLD}}}");
        let sealed = desk.cipher.seal(&desk.state.me(), &clear).unwrap();
        for content in [OLD, &clear, &sealed] {
            assert_eq!(from_event(&event(content), &desk.cipher), Some(old_chat()));
        }
        for content in ["", "{}", "[1]", "text", r#"{"messages":1}"#] {
            assert_eq!(from_event(&event(content), &desk.cipher), None, "{content}");
        }
        let row = |row: &str| from_sqlite_json(row).map_err(|(number, _)| number);
        assert_eq!(row(""), Ok(vec![]));
        assert_eq!(row("x"), Err(0));
        assert_eq!(row(r#"[{"id":"a","messages":null},{"id":1}]"#), Err(2));
        assert_eq!(row(r#"[{"id":"a","messages":"{"}]"#), Err(1));
    }

    /// Ids and times are those that any other importer of the documented rule makes.
    #[test]
    fn ids_and_times() {
        let id = old_message_id(&PublicKey([0; 32]), "chat1", "a", "1", "user");
        let hash = Sha256::digest(format!("{}|chat1|a|1|user", "0".repeat(64)));
        assert_eq!(id.replace('-', ""), faster_hex::hex_string(&hash[..16]));
        assert_eq!(id.len(), 36);
        for (time, expected) in [
            (json!("1970-01-01T00:00:00Z"), Some(0)),
            (json!("2000-02-29T23:59:59.5Z"), Some(951_868_799_500)),
            (json!("2023-03-01T00:00:00.000Z"), Some(1_677_628_800_000)),
            (json!(1_700_000_000), Some(1_700_000_000_000)),
            (json!(1_700_000_000_123_u64), Some(1_700_000_000_123)),
            (json!("1700000000"), Some(1_700_000_000_000)),
            (json!("yesterday"), None),
            (json!("2023-13-01T00:00:00Z"), None),
            (json!(-5), None),
            (json!(null), None),
        ] {
            assert_eq!(time_ms(&time), expected, "{time}");
        }
        assert_eq!(faster_hex::hex_string(&old_secret_key("abc"))[..16], *"ba7816bf8f01cfea");
    }
}
