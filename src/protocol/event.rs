//! Events (NIP-01): strict reading of their JSON, and the one canonical JSON that is hashed, stored and sent.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::bytes::push_hex;
use super::{EventId, Kind, PublicKey, Signature, TagLetter, Tags};

/// Largest `created_at`: what a signed 64-bit column holds. Larger numbers are refused, not clamped.
pub const CREATED_AT_MAX: u64 = i64::MAX as u64;

/// A signed event as it came, not yet checked: see [`super::verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Claimed SHA-256 of the canonical form.
    pub id: EventId,
    /// The author's key.
    pub pubkey: PublicKey,
    /// Seconds since 1970 UTC, chosen by the author.
    pub created_at: u64,
    /// What the event is about.
    pub kind: Kind,
    /// The tags in their order.
    pub tags: Tags,
    /// Arbitrary text.
    pub content: String,
    /// Claimed signature over `id`.
    pub sig: Signature,
}

/// What a filter asks of an event, whether it was just received or lies in the store.
pub trait Fields {
    /// The event id.
    fn id(&self) -> &EventId;
    /// The author's key.
    fn pubkey(&self) -> &PublicKey;
    /// Seconds since 1970 UTC.
    fn created_at(&self) -> u64;
    /// The kind.
    fn kind(&self) -> Kind;
    /// Whether a tag named `letter` has a first value for which `wanted` holds.
    fn has_tag(&self, letter: TagLetter, wanted: &mut dyn FnMut(&str) -> bool) -> bool;
}

impl Fields for Event {
    fn id(&self) -> &EventId {
        &self.id
    }

    fn pubkey(&self) -> &PublicKey {
        &self.pubkey
    }

    fn created_at(&self) -> u64 {
        self.created_at
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn has_tag(&self, letter: TagLetter, wanted: &mut dyn FnMut(&str) -> bool) -> bool {
        self.tags.iter().filter_map(|tag| tag.indexed()).any(|(name, value)| name == letter && wanted(value))
    }
}

/// Where an indexed tag value lies in the canonical JSON, so that matching a stored event parses nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagSpan {
    /// The tag's name.
    pub letter: TagLetter,
    /// First byte of the value, after the quote.
    pub start: u32,
    /// Bytes of the value as it stands in the JSON.
    pub len: u32,
    /// Whether those bytes hold JSON escapes.
    pub escaped: bool,
}

/// An event's one JSON form: keys in NIP-01's order, no white space, minimal escapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canonical {
    /// The JSON object, as it goes over the wire.
    pub json: Bytes,
    /// The indexed tag values in it, in order.
    pub tag_spans: Vec<TagSpan>,
    tags: Range<usize>,
    content: Range<usize>,
}

impl Canonical {
    /// The tags, as a JSON array.
    pub fn tags_json(&self) -> &[u8] {
        &self.json[self.tags.clone()]
    }

    /// The content, as a JSON string with its quotes.
    pub fn content_json(&self) -> &[u8] {
        &self.json[self.content.clone()]
    }
}

/// The author of an event, from its canonical JSON, in which the first keys stand in fixed places.
pub fn author_in(canonical_json: &[u8]) -> Option<PublicKey> {
    const PUBKEY_START: usize = "{\"id\":\"".len() + 64 + "\",\"pubkey\":\"".len();
    let hex = canonical_json.get(PUBKEY_START..PUBKEY_START + 64)?;
    PublicKey::from_hex(std::str::from_utf8(hex).ok()?)
}

impl Event {
    /// Reads one event object.
    ///
    /// # Errors
    /// Anything that is not exactly an event: a missing or repeated field, a wrong type, upper-case hex, a lone
    /// surrogate, an empty tag, bytes after the object. Unknown fields are dropped.
    pub fn from_json(json: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// Writes the canonical JSON.
    pub fn canonical(&self) -> Canonical {
        let mut out = Vec::with_capacity(400 + self.content.len() + self.content.len() / 16 + 80 * self.tags.len());
        out.extend_from_slice(b"{\"id\":\"");
        push_hex(&mut out, &self.id.0);
        out.extend_from_slice(b"\",\"pubkey\":\"");
        push_hex(&mut out, &self.pubkey.0);
        out.extend_from_slice(b"\",\"created_at\":");
        push_number(&mut out, self.created_at);
        out.extend_from_slice(b",\"kind\":");
        push_number(&mut out, u64::from(self.kind.0));
        out.extend_from_slice(b",\"tags\":");
        let tags_start = out.len();
        let tag_spans = push_tags(&mut out, &self.tags);
        let tags = tags_start..out.len();
        out.extend_from_slice(b",\"content\":");
        let content_start = out.len();
        push_string(&mut out, &self.content);
        let content = content_start..out.len();
        out.extend_from_slice(b",\"sig\":\"");
        push_hex(&mut out, &self.sig.0);
        out.extend_from_slice(b"\"}");
        Canonical { json: out.into(), tag_spans, tags, content }
    }

    /// When the event stops being valid (NIP-40), if it says so readably; the first such tag counts. The largest number
    /// there is means never, as stores have it.
    pub fn expiration(&self) -> Option<u64> {
        self.tags.values("expiration").find_map(|value| value.parse().ok()).filter(|at| *at != u64::MAX)
    }

    /// Whether only its author may publish it (NIP-70 `["-"]`).
    pub fn is_protected(&self) -> bool {
        self.tags.find("-").is_some()
    }
}

fn push_tags(out: &mut Vec<u8>, tags: &Tags) -> Vec<TagSpan> {
    let mut spans = Vec::new();
    out.push(b'[');
    for (tag_index, tag) in tags.iter().enumerate() {
        out.extend_from_slice(if tag_index == 0 { b"[" } else { b",[" });
        let letter = TagLetter::from_name(tag.name());
        for (item_index, item) in tag.items().enumerate() {
            if item_index > 0 {
                out.push(b',');
            }
            let start = out.len() + 1;
            push_string(out, item);
            if let (Some(letter), 1) = (letter, item_index) {
                let len = out.len() - 1 - start;
                spans.push(TagSpan { letter, start: start as u32, len: len as u32, escaped: len != item.len() });
            }
        }
        out.push(b']');
    }
    out.push(b']');
    spans
}

fn push_number(out: &mut Vec<u8>, number: u64) {
    serde_json::to_writer(out, &number).expect("writing to memory does not fail");
}

/// Appends a JSON string: NIP-01's seven escapes, `\u00xx` for the other control characters, all else verbatim.
pub(crate) fn push_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("writing to memory does not fail");
}

/// The text that a stretch of canonical JSON string stands for.
pub(crate) fn unescape(json: &[u8], escaped: bool) -> Option<Cow<'_, str>> {
    if !escaped {
        return std::str::from_utf8(json).ok().map(Cow::Borrowed);
    }
    let quoted = [b"\"", json, b"\""].concat();
    serde_json::from_slice::<String>(&quoted).ok().map(Cow::Owned)
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EventVisitor)
    }
}

#[derive(Clone, Copy)]
enum Field {
    Id,
    Pubkey,
    CreatedAt,
    Kind,
    Tags,
    Content,
    Sig,
    Unknown,
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_identifier(FieldVisitor)
    }
}

struct FieldVisitor;

impl Visitor<'_> for FieldVisitor {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Field, E> {
        Ok(match name {
            "id" => Field::Id,
            "pubkey" => Field::Pubkey,
            "created_at" => Field::CreatedAt,
            "kind" => Field::Kind,
            "tags" => Field::Tags,
            "content" => Field::Content,
            "sig" => Field::Sig,
            _ => Field::Unknown,
        })
    }
}

struct EventVisitor;

impl<'de> Visitor<'de> for EventVisitor {
    type Value = Event;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an event object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Event, A::Error> {
        let (mut id, mut pubkey, mut created_at, mut kind) = (None, None, None, None);
        let (mut tags, mut content, mut sig) = (None, None, None);
        while let Some(field) = map.next_key()? {
            match field {
                Field::Id => once(&mut id, "id", &mut map)?,
                Field::Pubkey => once(&mut pubkey, "pubkey", &mut map)?,
                Field::CreatedAt => once(&mut created_at, "created_at", &mut map)?,
                Field::Kind => once(&mut kind, "kind", &mut map)?,
                Field::Tags => once(&mut tags, "tags", &mut map)?,
                Field::Content => once(&mut content, "content", &mut map)?,
                Field::Sig => once(&mut sig, "sig", &mut map)?,
                Field::Unknown => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let created_at = need(created_at, "created_at")?;
        if created_at > CREATED_AT_MAX {
            return Err(A::Error::custom("created_at is above 2^63 - 1"));
        }
        Ok(Event {
            id: need(id, "id")?,
            pubkey: need(pubkey, "pubkey")?,
            created_at,
            kind: need(kind, "kind")?,
            tags: need(tags, "tags")?,
            content: need(content, "content")?,
            sig: need(sig, "sig")?,
        })
    }
}

/// Reads a value into its slot; a second one for the same field is an error, since readers differ on which counts.
fn once<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    slot: &mut Option<T>,
    name: &'static str,
    map: &mut A,
) -> Result<(), A::Error> {
    if slot.is_some() {
        return Err(A::Error::duplicate_field(name));
    }
    let value = map.next_value().map_err(|e| A::Error::custom(format_args!("{name}: {e}")))?;
    *slot = Some(value);
    Ok(())
}

fn need<T, E: Error>(slot: Option<T>, name: &'static str) -> Result<T, E> {
    slot.ok_or_else(|| E::missing_field(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json_with(field: &str, value: &str) -> String {
        let mut fields = vec![
            ("id", format!("\"{}\"", "a".repeat(64))),
            ("pubkey", format!("\"{}\"", "b".repeat(64))),
            ("created_at", "1".to_owned()),
            ("kind", "1".to_owned()),
            ("tags", "[]".to_owned()),
            ("content", "\"\"".to_owned()),
            ("sig", format!("\"{}\"", "c".repeat(128))),
        ];
        match fields.iter_mut().find(|(name, _)| *name == field) {
            Some((_, slot)) => *slot = value.to_owned(),
            None => fields.push((field, value.to_owned())),
        }
        let body: Vec<String> = fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        format!("{{{}}}", body.join(","))
    }

    /// Types and ranges are exact: nothing is converted, clamped or guessed (T28, T29).
    #[test]
    fn t29_strict_fields() {
        let hex = |digit: &str| format!("\"{}\"", digit.repeat(64));
        for (field, good) in [("kind", "65535"), ("created_at", "9223372036854775807"), ("extra", "{\"a\":[1]}")] {
            assert!(Event::from_json(&json_with(field, good)).is_ok(), "{field} {good}");
        }
        for (field, bad) in [
            ("kind", "65536"),
            ("kind", "-1"),
            ("kind", "1.0"),
            ("kind", "\"1\""),
            ("created_at", "1.0"),
            ("created_at", "1e3"),
            ("created_at", "-1"),
            ("created_at", "9223372036854775808"),
            ("created_at", "18446744073709551616"),
            ("id", &hex("A")),
            ("pubkey", &hex("B")),
            ("sig", &hex("c")),
            ("content", "null"),
            ("content", "\"\\ud800\""),
            ("content", "\"\\udc00\\ud800\""),
            ("content", "\"\n\""),
            ("tags", "[[]]"),
            ("tags", "null"),
        ] {
            assert!(Event::from_json(&json_with(field, bad)).is_err(), "{field} {bad}");
        }
    }

    /// Repeated keys, missing keys, trailing bytes and a byte order mark are refused; escaped key names are read.
    #[test]
    fn t28_strict_object() {
        let good = json_with("kind", "1");
        assert!(Event::from_json(&format!(" {good}\n")).is_ok());
        assert!(Event::from_json(&good.replacen("\"kind\"", "\"\\u006bind\"", 1)).is_ok());
        for bad in [
            good.replacen("\"kind\":1", "\"kind\":1,\"kind\":1", 1),
            good.replacen("\"kind\":1", "\"kind\":1,\"\\u006bind\":1", 1),
            good.replacen("\"kind\":1,", "", 1),
            format!("{good}x"),
            format!("\u{feff}{good}"),
            good[..good.len() - 1].to_owned(),
            format!("[{good}]"),
        ] {
            assert!(Event::from_json(&bad).is_err(), "{bad}");
        }
        let deep = json_with("extra", &format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)));
        let _ = Event::from_json(&deep); // either answer is fine; what counts is that the stack holds
    }

    /// The spans of indexed tags point at their values, escaped or not.
    #[test]
    fn tag_spans_point_at_values() {
        let mut event = Event::from_json(&json_with("kind", "1")).expect("good");
        event.tags = Tags::from_lists([vec!["e", "aa", "x"], vec!["client", "no"], vec!["t", "q\"\u{1}"], vec!["d"]]);
        let canonical = event.canonical();
        let values: Vec<_> = canonical
            .tag_spans
            .iter()
            .map(|span| {
                let raw = &canonical.json[span.start as usize..][..span.len as usize];
                (span.letter.as_byte(), unescape(raw, span.escaped).expect("valid").into_owned())
            })
            .collect();
        assert_eq!(values, [(b'e', "aa".to_owned()), (b't', "q\"\u{1}".to_owned())]);
        let text = std::str::from_utf8(&canonical.json).expect("utf-8");
        assert_eq!(Event::from_json(text).expect("canonical JSON is an event"), event);
    }
}
