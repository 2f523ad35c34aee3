//! The older shapes of chats: one event with a `messages` array, and the Onyx app's SQLite table `chats`.
//!
//! In: such chats. Out: drafts of one message each, dated by what the old chat says. Every id and stamp follows from the
//! old content alone, so importing twice, or on two devices, adds nothing. What is known or waits already is passed over,
//! what was deleted does not come back.
//!
//! The table is read as `sqlite3 -json onyx.db "SELECT id, messages FROM chats"` prints it: a user has that tool or
//! gets it in a minute, while a SQLite library would add more to the binary than the whole sync engine.

mod dates;

use std::collections::{BTreeSet, HashMap};

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::chat::{ChatKey, Chats, MessageDraft, TITLE, message};
use super::cipher::{self, Cipher, PLAINTEXT_BYTES_MAX};
use super::clock::{Device, Hlc, Written};
use super::draft::{Draft, Op};
use super::fields::Fields;
use super::shape::CHAT;
use crate::protocol::{Event, PublicKey, label};
use dates::time_ms;

/// The time of messages without one: they come first, in their order. 2020-01-01.
const UNDATED_MS: u64 = 1_577_836_800_000;
/// How far a date may lie ahead: as far as relays take it. One beyond that is wrong, and would push every later write of
/// the user into the future too, since a write is dated after all that its writer has seen.
const AHEAD_MS_MAX: u64 = 900_000;

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
    /// The messages, counted.
    pub tally: Tally,
}

/// What became of the messages of old chats.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Messages that are new here.
    pub imported: usize,
    /// Messages that are here already, or were deleted.
    pub known: usize,
    /// Messages that one event cannot hold.
    pub too_long: Vec<TooLong>,
}

/// A message that one event cannot hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TooLong {
    /// Its chat.
    pub chat: String,
    /// Its id in the old chat; where it has none, the one that it would get.
    pub message: String,
}

impl Tally {
    /// Counts other messages too.
    pub fn add(&mut self, other: Tally) {
        self.imported += other.imported;
        self.known += other.known;
        self.too_long.extend(other.too_long);
    }
}

/// The secret key that the older app made of a mnemonic: the SHA-256 of its text. NIP-06 makes another one.
pub fn old_secret_key(mnemonic: &str) -> [u8; 32] {
    Sha256::digest(mnemonic).into()
}

/// Whether an event could hold a chat of the older shape: kind 30001 without our label. Lists of bookmarks could too.
pub fn may_hold_chat(event: &Event) -> bool {
    event.kind == CHAT && !label::is_labelled(event)
}

/// Reads a chat of the older shape from an event of the cipher's own key: `{"messages":[…]}` or the bare array, in the
/// clear or sealed for oneself. `None` for any other event, such as a list of bookmarks.
pub fn from_event(event: &Event, cipher: &dyn Cipher) -> Option<OldChat> {
    if !may_hold_chat(event) || event.pubkey != cipher.pubkey() {
        return None;
    }
    let id = event.tags.find("d").and_then(|tag| tag.value())?;
    let read = |text: &str| serde_json::from_str::<Value>(text).ok();
    let body =
        read(&event.content).or_else(|| read(&cipher::open(cipher, &event.pubkey, &event.tags, &event.content)?))?;
    let title = event.tags.find("title").and_then(|tag| tag.value()).map(str::to_owned);
    let in_body = body.get("title").and_then(Value::as_str).map(str::to_owned);
    let messages = objects(body.get("messages").unwrap_or(&body))?;
    // An empty array is what an empty list of bookmarks seals.
    (!messages.is_empty() || body.is_object()).then(|| OldChat {
        id: id.to_owned(),
        title: title.or(in_body),
        messages,
    })
}

/// Reads what `sqlite3 -json` prints of the table `chats`: rows of `id` and `messages`, the latter JSON in a string. Of
/// a row that holds no chat comes what is wrong with it.
///
/// # Errors
/// When the text is no list of rows at all.
pub fn from_sqlite_json(text: &str) -> Result<Vec<Result<OldChat, String>>, String> {
    if text.trim().is_empty() {
        // What sqlite3 prints of an empty table.
        return Ok(Vec::new());
    }
    let rows: Vec<Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    Ok(rows.into_iter().map(from_row).collect())
}

fn from_row(row: Value) -> Result<OldChat, String> {
    let id = row.get("id").filter(|id| id.is_string() || id.is_number()).ok_or("it has no `id`")?;
    let messages = match row.get("messages") {
        Some(Value::String(json)) => serde_json::from_str(json).map_err(|error| format!("`messages`: {error}"))?,
        // A chat that nothing was said in yet.
        None | Some(Value::Null) => Value::Array(Vec::new()),
        Some(other) => other.clone(),
    };
    let messages = objects(&messages).ok_or("`messages` is no list of objects")?;
    let title = row.get("title").and_then(Value::as_str).map(str::to_owned);
    Ok(OldChat { id: text_of(id), title, messages })
}

fn objects(list: &Value) -> Option<Vec<Map<String, Value>>> {
    list.as_array()?.iter().map(|item| item.as_object().cloned()).collect()
}

/// What is new of old chats, each message following the one before it. `waits` says of a [`Draft::merge_key`] whether a
/// draft of that key waits already; `now_ms` is the time.
pub fn explode<'o>(
    chats: &Chats,
    me: PublicKey,
    old: impl IntoIterator<Item = &'o OldChat>,
    waits: impl Fn(&str) -> bool,
    now_ms: u64,
) -> Imported {
    let mut made = BTreeSet::new();
    let mut is_new = |draft: &Draft| draft.merge_key().is_some_and(|key| !waits(&key) && made.insert(key));
    let mut imported = Imported::default();
    for old in old {
        let chat = ChatKey { owner: me, id: old.id.clone() };
        explode_messages(chats, &chat, old, &mut is_new, now_ms, &mut imported);
        imported.drafts.extend(title(chats, &chat, old).filter(&mut is_new));
    }
    imported
}

fn explode_messages(
    chats: &Chats,
    chat: &ChatKey,
    old: &OldChat,
    is_new: &mut impl FnMut(&Draft) -> bool,
    now_ms: u64,
    imported: &mut Imported,
) {
    let mut seen: HashMap<String, &Map<String, Value>> = HashMap::new();
    let mut before: Option<String> = None;
    let mut at_ms = UNDATED_MS;
    for (place, fields) in old.messages.iter().enumerate() {
        let id = message_id(chat, fields, place, &seen);
        if seen.insert(id.clone(), fields).is_some() {
            imported.tally.known += 1;
            continue;
        }
        let date_ms = fields.get("createdAt").and_then(time_ms).filter(|ms| *ms <= now_ms.saturating_add(AHEAD_MS_MAX));
        // Without a time of its own a message follows the one before it.
        at_ms = date_ms.unwrap_or(at_ms + 1);
        let counter = u16::try_from(place).unwrap_or(u16::MAX);
        let stamp = Hlc { counter, ..Hlc::at(at_ms, Device::IMPORT) };
        let message = exploded(chat, &id, fields, stamp, before.clone());
        let is_known = chats.knows(&message::address(chat.owner, &chat.id, &id));
        let is_too_long = sealed_length(&message) > PLAINTEXT_BYTES_MAX;
        if !is_too_long {
            before = Some(id.clone());
        }
        let draft = dated(Op::Message(message), stamp);
        if is_known {
            imported.tally.known += 1;
        } else if is_too_long {
            let message = fields.get("id").map(text_of).filter(|id| !id.is_empty()).unwrap_or(id);
            imported.tally.too_long.push(TooLong { chat: chat.id.clone(), message });
        } else if is_new(&draft) {
            imported.tally.imported += 1;
            imported.drafts.push(draft);
        } else {
            imported.tally.known += 1;
        }
    }
}

/// The id of a message by the documented rule. Another message of the chat may have it already, mostly where the old app
/// gave neither ids nor times: then the place in the chat tells the two apart. A message that is there twice, word for
/// word and with an id, is one.
fn message_id(
    chat: &ChatKey,
    fields: &Map<String, Value>,
    place: usize,
    seen: &HashMap<String, &Map<String, Value>>,
) -> String {
    let text = |name: &str| fields.get(name).map(text_of).unwrap_or_default();
    let (old_id, created_at, role) = (text("id"), text("createdAt"), text("role"));
    let id = old_message_id(&chat.owner, &chat.id, &old_id, &created_at, &role);
    match seen.get(&id) {
        None => id,
        Some(same) if !old_id.is_empty() && *same == fields => id,
        Some(_) => old_message_id(&chat.owner, &chat.id, &format!("{old_id}#{place}"), &created_at, &role),
    }
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
    let op = Op::Head { chat: chat.id.clone(), fields, known: Fields::default() };
    Some(dated(op, Hlc::at(UNDATED_MS, Device::IMPORT)))
}

fn exploded(chat: &ChatKey, id: &str, fields: &Map<String, Value>, stamp: Hlc, before: Option<String>) -> MessageDraft {
    let mut meta = fields.clone();
    for name in ["id", "role", "content", "createdAt"] {
        meta.remove(name);
    }
    MessageDraft {
        chat: chat.clone(),
        id: id.to_owned(),
        role: fields.get("role").map(text_of).unwrap_or_default(),
        content: fields.get("content").map(content_of).unwrap_or_default(),
        first: Some((stamp.wall_ms, stamp)),
        parents: before.into_iter().collect(),
        meta: if meta.is_empty() { Value::Null } else { Value::Object(meta) },
        readers: Vec::new(),
        after: None,
    }
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
        OldChat { title: Some("Old".to_owned()), ..from_sqlite_json(&rows).unwrap().remove(0).unwrap() }
    }

    /// When the tests import: after the dates of [`OLD`].
    const TODAY_MS: u64 = 1_800_000_000_000;

    /// What `old` comes to at a desk where drafts of `waiting` wait.
    fn exploded_at(desk: &Desk, old: &OldChat, waiting: &[Draft]) -> Imported {
        let waiting: BTreeSet<String> = waiting.iter().filter_map(Draft::merge_key).collect();
        explode(&desk.state.chats, desk.state.me(), [old], |key| waiting.contains(key), TODAY_MS)
    }

    fn import_of(desk: &mut Desk, old: &OldChat) -> Imported {
        let imported = exploded_at(desk, old, &[]);
        for draft in &imported.drafts {
            let event = desk.build(&[draft]).unwrap();
            desk.take(&event);
        }
        imported
    }

    fn import(desk: &mut Desk) -> Imported {
        import_of(desk, &old_chat())
    }

    fn messages_of(desk: &Desk) -> Vec<crate::sync::chat::Message> {
        let chat = ChatKey { owner: desk.state.me(), id: "chat1".to_owned() };
        desk.state.chat_view([]).messages(&chat).into_iter().map(|view| view.message).collect()
    }

    fn chat_of(messages: Value) -> OldChat {
        OldChat { id: "chat1".to_owned(), title: None, messages: objects(&messages).unwrap() }
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
        let ids = |desk: &Desk| messages_of(desk).into_iter().map(|message| message.id).collect::<Vec<_>>();
        assert_eq!(ids(&a), ids(&b));
        let id = ids(&a)[0].clone();
        let deletion = a.state.chat_view([]).delete(&chat, &id).unwrap();
        a.say(deletion, NOW_MS);
        let again = import(&mut a);
        assert_eq!((again.drafts.len(), again.tally.known), (0, 3));
        let waiting = exploded_at(&Desk::new(1, 3), &old_chat(), &first.drafts);
        assert_eq!((waiting.drafts.len(), waiting.tally.known), (0, 3));
        let twice = [&old_chat(), &old_chat()];
        let twice = explode(&Desk::new(1, 4).state.chats, a.state.me(), twice, |_| false, TODAY_MS);
        assert_eq!((twice.drafts, twice.tally.known), (first.drafts, 3));
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
        let empty = r#"{"messages":[],"title":"Old"}"#;
        let nothing = OldChat { messages: Vec::new(), ..old_chat() };
        assert_eq!(from_event(&event(empty), &desk.cipher), Some(nothing));
        let labelled = [vec!["d", "chat1"], vec!["L", label::NAMESPACE]];
        assert_eq!(from_event(&desk.author.event(30_001, 1, &labelled, OLD), &desk.cipher), None);
        assert_eq!(from_event(&desk.author.event(30_003, 1, &[vec!["d", "chat1"]], OLD), &desk.cipher), None);
        assert_eq!(from_event(&event(OLD), &Desk::new(2, 1).cipher), None);
    }

    /// Of a table each row is read by itself.
    #[test]
    fn from_rows() {
        let read = |text: &str| {
            let rows = from_sqlite_json(text)?;
            Ok::<_, String>(rows.into_iter().map(|row| row.map_or(usize::MAX, |chat| chat.messages.len())).collect())
        };
        let bad = usize::MAX;
        assert_eq!(read(""), Ok(vec![]));
        assert!(read("x").is_err() && read("{}").is_err());
        let rows = [
            r#"{"id":"a","messages":null}"#,
            r#"{"id":{}}"#,
            "1",
            r#"{"messages":"[]"}"#,
            r#"{"id":"a","messages":"{"}"#,
            r#"{"id":1,"messages":[{},{}]}"#,
            r#"{"id":"a","messages":"[1]"}"#,
            r#"{"id":"b","title":null,"messages":"[{}]"}"#,
        ];
        assert_eq!(read(&format!("[{}]", rows.join(","))), Ok(vec![0, bad, bad, bad, bad, 2, bad, 1]));
    }

    /// Messages that the rule gives one id are all kept, unless they are one message word for word; again, nothing is
    /// added.
    #[test]
    fn messages_without_ids_are_all_kept() {
        let old = chat_of(json!([
            {"role": "user", "content": "yes"}, {"role": "user", "content": "no"}, {"role": "user", "content": "yes"},
            {"id": "a", "content": "one"}, {"id": "a", "content": "one"}, {"id": "a", "content": "two"},
        ]));
        let mut desk = Desk::new(1, 1);
        let tally = import_of(&mut desk, &old).tally;
        assert_eq!((tally.imported, tally.known), (5, 1));
        let contents: Vec<String> = messages_of(&desk).into_iter().map(|message| message.content).collect();
        assert_eq!(contents, ["yes", "no", "yes", "one", "two"]);
        let again = import_of(&mut desk, &old);
        assert_eq!((again.drafts.len(), again.tally.known), (0, 6));
    }

    /// A date that is still to come does not date the message, and so none of what the user writes later.
    #[test]
    fn dates_to_come_do_not_spoil_the_clock() {
        let (early, late) = (TODAY_MS - 5_000, TODAY_MS + AHEAD_MS_MAX + 1);
        let old = chat_of(json!([{"id": "a", "createdAt": early}, {"id": "b", "createdAt": late},
            {"id": "c", "createdAt": u64::MAX}, {"id": "d", "createdAt": "9999-01-01T00:00:00Z"}]));
        let mut desk = Desk::new(1, 1);
        assert_eq!(import_of(&mut desk, &old).tally.imported, 4);
        let dates: Vec<u64> = messages_of(&desk).iter().map(|message| message.created_at_ms).collect();
        assert_eq!(dates, [early, early + 1, early + 2, early + 3]);
        assert_eq!(desk.clock.write(TODAY_MS).stamp.wall_ms, TODAY_MS);
    }

    /// What one event cannot hold is named by its old id, however its length comes about; the others are imported.
    #[test]
    fn messages_that_are_too_long_are_named() {
        let long = |text: &str| text.repeat(PLAINTEXT_BYTES_MAX / text.len());
        let old = chat_of(json!([
            {"id": "plain", "content": long("x")}, {"id": "escaped", "content": "\u{1}".repeat(20_000)},
            {"id": "meta", "other": long("x")}, {"content": long("ä")}, {"id": "fits", "content": "x".repeat(64_000)},
            {"id": "again", "content": long("x")}, {"id": "end", "content": "short"},
        ]));
        let mut desk = Desk::new(1, 1);
        let imported = import_of(&mut desk, &old);
        let there = messages_of(&desk);
        assert_eq!((imported.tally.imported, there[0].content.len()), (2, 64_000));
        assert_eq!(there[1].parents, [there[0].id.as_str()], "it follows what is there");
        let named: Vec<&str> = imported.tally.too_long.iter().map(|one| one.message.as_str()).collect();
        let without = old_message_id(&desk.state.me(), "chat1", "", "", "");
        assert_eq!(named, ["plain", "escaped", "meta", &without, "again"]);
    }

    /// Ids are those that any other importer of the documented rule makes.
    #[test]
    fn ids_follow_the_documented_rule() {
        let id = old_message_id(&PublicKey([0; 32]), "chat1", "a", "1", "user");
        let hash = Sha256::digest(format!("{}|chat1|a|1|user", "0".repeat(64)));
        assert_eq!(id.replace('-', ""), faster_hex::hex_string(&hash[..16]));
        assert_eq!(id.len(), 36);
        assert_eq!(faster_hex::hex_string(&old_secret_key("abc"))[..16], *"ba7816bf8f01cfea");
    }
}
