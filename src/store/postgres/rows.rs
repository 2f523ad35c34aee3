//! Events as rows, and back.

use memchr::{memchr2, memmem};
use sha2::{Digest, Sha256};

use crate::protocol::event::{Fields, unescape};
use crate::protocol::supersede::Address;
use crate::protocol::{Event, EventId, Kind, PublicKey, TagLetter, Verified};
use crate::store::StoreError;
use crate::store::schema::address_hash;

/// A tag value as the tables name it. Values that share a term are told apart by the event itself.
pub(super) fn term(letter: TagLetter, value: &str) -> i64 {
    let mut hash = Sha256::new();
    hash.update([letter.as_byte()]);
    hash.update(value);
    let bytes: [u8; 32] = hash.finalize().into();
    i64::from_be_bytes(bytes[..8].try_into().expect("8 bytes"))
}

/// The terms of an event's tags, each once.
fn terms(event: &Event) -> Vec<i64> {
    let indexed = event.tags.iter().filter_map(|tag| tag.indexed());
    let mut terms: Vec<i64> = indexed.map(|(letter, value)| term(letter, value)).collect();
    terms.sort_unstable();
    terms.dedup();
    terms
}

/// The hash of an event's address, if it has one.
pub(super) fn address(event: &Event) -> Option<[u8; 16]> {
    Address::of(event).map(|address| address_hash(&address))
}

/// A number of seconds as a column holds it. Events are not dated later (see `CREATED_AT_MAX`); a bound that is, means
/// the same.
pub(super) fn seconds(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

/// New rows, a column each, as one statement takes them.
#[derive(Default)]
pub(super) struct Columns {
    pub(super) ids: Vec<Vec<u8>>,
    pub(super) pubkeys: Vec<Vec<u8>>,
    pub(super) created_at: Vec<i64>,
    pub(super) kinds: Vec<i32>,
    pub(super) expires_at: Vec<Option<i64>>,
    pub(super) addresses: Vec<Option<Vec<u8>>>,
    /// Array literals: an array of arrays of different lengths is none.
    pub(super) terms: Vec<String>,
    pub(super) json: Vec<String>,
    /// Whether those who listen are to get it.
    pub(super) news: Vec<bool>,
}

impl Columns {
    pub(super) fn push(&mut self, event: &Verified<Event>, is_news: bool) {
        let list: Vec<String> = terms(event).iter().map(ToString::to_string).collect();
        self.ids.push(event.id.0.to_vec());
        self.pubkeys.push(event.pubkey.0.to_vec());
        self.created_at.push(seconds(event.created_at));
        self.kinds.push(i32::from(event.kind.0));
        // An expiration beyond what a column holds is never reached.
        self.expires_at.push(event.expiration().and_then(|at| i64::try_from(at).ok()));
        self.addresses.push(address(event).map(Vec::from));
        self.terms.push(format!("{{{}}}", list.join(",")));
        self.json.push(json_text(event));
        self.news.push(is_news);
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }
}

/// The canonical JSON as text.
pub(super) fn json_text(event: &Verified<Event>) -> String {
    String::from_utf8(event.canonical().json.to_vec()).expect("canonical JSON is text")
}

/// Reads an event that the database gave back.
pub(super) fn event(json: &str) -> Result<Event, StoreError> {
    Event::from_json(json).map_err(|error| StoreError::Damaged(format!("an event in the database: {error}")))
}

/// An event as the database gave it back, for filters: its tags are looked for in the canonical JSON, and nothing else of
/// that is read. Parsing it took most of a query's time.
pub(super) struct Stored<'r> {
    pub(super) id: EventId,
    pub(super) pubkey: PublicKey,
    pub(super) created_at: u64,
    pub(super) kind: Kind,
    pub(super) json: &'r str,
}

impl Fields for Stored<'_> {
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

    /// Within a string every quote is escaped, and only tags are arrays of strings: so `["p","` begins a tag.
    fn has_tag(&self, letter: TagLetter, wanted: &mut dyn FnMut(&str) -> bool) -> bool {
        let json = self.json.as_bytes();
        let beginning = [b'[', b'"', letter.as_byte(), b'"', b',', b'"'];
        memmem::find_iter(json, &beginning).any(|at| {
            let (value, escaped) = string_at(&json[at + beginning.len()..]);
            unescape(value, escaped).is_some_and(|value| wanted(&value))
        })
    }
}

/// The string that ends with the first quote of its own, and whether it holds escapes.
fn string_at(json: &[u8]) -> (&[u8], bool) {
    let (mut end, mut escaped) = (0, false);
    while let Some(at) = memchr2(b'"', b'\\', &json[end..]) {
        end += at;
        if json[end] == b'"' {
            return (&json[..end], escaped);
        }
        escaped = true;
        end = (end + 2).min(json.len());
    }
    (json, escaped)
}

/// An id from a column.
pub(super) fn id(bytes: &[u8]) -> Result<EventId, StoreError> {
    key(bytes).map(EventId)
}

/// A key from a column.
pub(super) fn pubkey(bytes: &[u8]) -> Result<PublicKey, StoreError> {
    key(bytes).map(PublicKey)
}

/// Fixed-width bytes from a column.
pub(super) fn key<const N: usize>(bytes: &[u8]) -> Result<[u8; N], StoreError> {
    bytes.try_into().map_err(|_| StoreError::Damaged(format!("{} bytes in the database instead of {N}", bytes.len())))
}

/// Kinds as a column holds them.
pub(super) fn kinds(kinds: &[Kind]) -> Vec<i32> {
    kinds.iter().map(|kind| i32::from(kind.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::testing::{Author, NOW};

    /// What is found in the canonical JSON is what the parsed event has, whatever stands in values and content.
    #[test]
    fn tags_are_found_in_the_json() {
        let tags = [
            vec!["p", "a\"],[\"e\",\"x"],
            vec!["e", "back\\slash\\"],
            vec!["t", ""],
            vec!["t"],
            vec!["tt", "no"],
            vec!["r", "[\"t\",\"no\"]\u{1}\u{2028}", "t"],
            vec!["x", "p", "[\"p\",\"no\"]"],
        ];
        let event = Author::new(1).event(1, NOW, &tags, "[[\"t\",\"no\"]]\\\"");
        let json = String::from_utf8(event.canonical().json.to_vec()).expect("text");
        let Event { id, pubkey, created_at, kind, .. } = event;
        let stored = Stored { id, pubkey, created_at, kind, json: &json };
        let values = |event: &dyn Fields, letter| {
            let mut found = Vec::new();
            event.has_tag(TagLetter::from_byte(letter).expect("a letter"), &mut |value| {
                found.push(value.to_owned());
                false
            });
            found
        };
        for letter in b'a'..=b'z' {
            assert_eq!(values(&stored, letter), values(&event, letter));
        }
        assert_eq!(values(&stored, b't'), [""]);
    }

    /// Letters and values are told apart; a tag that stands twice is one term; long values are as short as others (T30).
    #[test]
    fn t30_terms_are_short_and_distinct() {
        let long = "x".repeat(100_000);
        let tags =
            [vec!["t", "a"], vec!["t", "a"], vec!["r", "a"], vec!["r", long.as_str()], vec!["tt", "a"], vec!["t"]];
        let event = Author::new(1).event(1, NOW, &tags, "");
        assert_eq!(terms(&event).len(), 3);
        let mut columns = Columns::default();
        columns.push(&Verified::check(event).expect("signed"), true);
        assert!(columns.terms[0].len() < 70, "{}", columns.terms[0]);
    }
}
