//! Filters (NIP-01): strict reading, and [`Filter::matches`], the reference meaning that every index is tested against.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::bytes::decode_lower_hex;
use super::event::Fields;
use super::{EventId, Kind, PublicKey, TagLetter};

/// What a client asks for; every condition that is present must hold.
///
/// Lists are sorted and free of repeats. An empty list matches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Event ids.
    pub ids: Option<Vec<EventId>>,
    /// Authors.
    pub authors: Option<Vec<PublicKey>>,
    /// Kinds.
    pub kinds: Option<Vec<Kind>>,
    /// Tag conditions by letter: the event has a tag of that name whose first value is in the list.
    pub tags: Vec<TagCondition>,
    /// Earliest `created_at`, inclusive.
    pub since: Option<u64>,
    /// Latest `created_at`, inclusive.
    pub until: Option<u64>,
    /// How many stored events are wanted at most; says nothing about live ones.
    pub limit: Option<u64>,
}

/// One `#x` key of a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagCondition {
    /// The tag's name.
    pub letter: TagLetter,
    /// Accepted first values.
    pub values: Vec<Box<str>>,
}

/// Why a filter is refused. `Display` is the `CLOSED` text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// A known key has a value of the wrong form.
    #[error("invalid: {key} must be {expected}")]
    Malformed {
        /// The key as the client wrote it.
        key: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// A key that this relay gives no meaning to; guessing would answer another question.
    #[error("unsupported: this relay does not know the filter key {0}")]
    UnknownKey(String),
    /// A key stands twice; readers differ on which counts.
    #[error("invalid: the filter key {0} is repeated")]
    Repeated(String),
    /// Not a JSON object.
    #[error("invalid: a filter must be a JSON object")]
    NotAnObject,
}

const HEX_LIST: &str = "a list of 64-digit lower-case hex strings";
const KIND_LIST: &str = "a list of integers from 0 to 65535";
const STRING_LIST: &str = "a list of strings";
const INTEGER: &str = "an integer from 0 to 18446744073709551615";
/// How much of an unknown key is repeated to the client.
const KEY_ECHO_CHARS_MAX: usize = 32;

impl Filter {
    /// Reads a filter object.
    ///
    /// # Errors
    /// Any key that is unknown, repeated or has a value of the wrong form: a condition is never read as absent.
    pub fn from_value(value: Value) -> Result<Self, FilterError> {
        match value {
            Value::Object(fields) => Self::from_fields(fields),
            _ => Err(FilterError::NotAnObject),
        }
    }

    fn from_fields(fields: impl IntoIterator<Item = (String, Value)>) -> Result<Self, FilterError> {
        let mut filter = Filter::default();
        let mut seen = HashSet::new();
        for (key, value) in fields {
            let fail = |expected| FilterError::Malformed { key: key.clone(), expected };
            match key.as_str() {
                "ids" => filter.ids = Some(list(&value, |v| hex(v).map(EventId)).ok_or_else(|| fail(HEX_LIST))?),
                "authors" => {
                    filter.authors = Some(list(&value, |v| hex(v).map(PublicKey)).ok_or_else(|| fail(HEX_LIST))?);
                }
                "kinds" => filter.kinds = Some(list(&value, kind).ok_or_else(|| fail(KIND_LIST))?),
                "since" => filter.since = Some(value.as_u64().ok_or_else(|| fail(INTEGER))?),
                "until" => filter.until = Some(value.as_u64().ok_or_else(|| fail(INTEGER))?),
                "limit" => filter.limit = Some(value.as_u64().ok_or_else(|| fail(INTEGER))?),
                _ => filter.tags.push(tag_condition(&key, &value)?),
            }
            if let Some(repeated) = seen.replace(key) {
                return Err(FilterError::Repeated(repeated));
            }
        }
        Ok(filter)
    }

    /// Reads a filter from JSON text, as the command line does.
    ///
    /// # Errors
    /// As [`Filter::from_value`]; text that is no JSON counts as no object.
    pub fn from_json(json: &str) -> Result<Self, FilterError> {
        serde_json::from_str::<ReadFilter>(json).map_err(|_| FilterError::NotAnObject)?.0
    }

    /// The filter as a client sends it: [`Filter::from_json`] gives it back.
    pub fn to_json(&self) -> String {
        let mut fields = serde_json::Map::new();
        let hex = |bytes: &[u8; 32]| Value::from(faster_hex::hex_string(bytes));
        if let Some(ids) = &self.ids {
            fields.insert("ids".to_owned(), ids.iter().map(|id| hex(&id.0)).collect());
        }
        if let Some(authors) = &self.authors {
            fields.insert("authors".to_owned(), authors.iter().map(|author| hex(&author.0)).collect());
        }
        if let Some(kinds) = &self.kinds {
            fields.insert("kinds".to_owned(), kinds.iter().map(|kind| Value::from(kind.0)).collect());
        }
        for condition in &self.tags {
            let values = condition.values.iter().map(|value| Value::from(&**value)).collect();
            fields.insert(format!("#{}", condition.letter), values);
        }
        for (key, number) in [("since", self.since), ("until", self.until), ("limit", self.limit)] {
            if let Some(number) = number {
                fields.insert(key.to_owned(), number.into());
            }
        }
        Value::Object(fields).to_string()
    }

    /// The meaning of a filter (NIP-01); `limit` plays no part.
    pub fn matches(&self, event: &impl Fields) -> bool {
        self.matches_time(event.created_at())
            && contains(&self.kinds, &event.kind())
            && contains(&self.ids, event.id())
            && contains(&self.authors, event.pubkey())
            && self.tags.iter().all(|condition| condition.matches(event))
    }

    /// Whether a `created_at` lies between `since` and `until`, both included.
    pub fn matches_time(&self, created_at: u64) -> bool {
        self.since.is_none_or(|since| since <= created_at) && self.until.is_none_or(|until| created_at <= until)
    }

    /// Whether no event at all can match: an empty list, or `since` after `until`.
    pub fn matches_nothing(&self) -> bool {
        let empty = |len: Option<usize>| len == Some(0);
        empty(self.ids.as_ref().map(Vec::len))
            || empty(self.authors.as_ref().map(Vec::len))
            || empty(self.kinds.as_ref().map(Vec::len))
            || self.tags.iter().any(|condition| condition.values.is_empty())
            || self.since.zip(self.until).is_some_and(|(since, until)| since > until)
    }

    /// How many list items the filter has in all: what it costs to hold.
    pub fn item_count(&self) -> usize {
        let len = |len: Option<usize>| len.unwrap_or(0);
        len(self.ids.as_ref().map(Vec::len))
            + len(self.authors.as_ref().map(Vec::len))
            + len(self.kinds.as_ref().map(Vec::len))
            + self.tags.iter().map(|condition| condition.values.len()).sum::<usize>()
    }
}

impl TagCondition {
    /// Whether the event has such a tag with one of the values.
    pub fn matches(&self, event: &impl Fields) -> bool {
        event.has_tag(self.letter, &mut |value| self.values.binary_search_by(|have| (**have).cmp(value)).is_ok())
    }
}

/// A filter as it stands in a message: understood, or refused by its content. Only what is no JSON is an error.
pub(super) struct ReadFilter(pub(super) Result<Filter, FilterError>);

impl<'de> Deserialize<'de> for ReadFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Ok(fields) = deserializer.deserialize_any(FieldsVisitor)? else {
            return Ok(ReadFilter(Err(FilterError::NotAnObject)));
        };
        Ok(ReadFilter(Filter::from_fields(fields)))
    }
}

/// Reads the fields of an object, repeated ones too; anything else is passed over.
struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Result<Vec<(String, Value)>, ()>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a filter object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Ok(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Err(()))
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
        Ok(Err(()))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Err(()))
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Err(()))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Err(()))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Err(()))
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(Err(()))
    }
}

fn tag_condition(key: &str, value: &Value) -> Result<TagCondition, FilterError> {
    let letter = key.strip_prefix('#').and_then(TagLetter::from_name);
    let Some(letter) = letter else {
        return Err(FilterError::UnknownKey(key.chars().take(KEY_ECHO_CHARS_MAX).collect()));
    };
    let needs_hex = matches!(letter.as_byte(), b'e' | b'p');
    let read = |item: &Value| {
        let text = item.as_str()?;
        (!needs_hex || decode_lower_hex::<32>(text).is_some()).then(|| Box::from(text))
    };
    let expected = if needs_hex { HEX_LIST } else { STRING_LIST };
    let values = list(value, read).ok_or_else(|| FilterError::Malformed { key: key.to_owned(), expected })?;
    Ok(TagCondition { letter, values })
}

/// A sorted list without repeats, if `value` is an array and each item is readable.
fn list<T: Ord>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    let mut items = value.as_array()?.iter().map(read).collect::<Option<Vec<T>>>()?;
    items.sort_unstable();
    items.dedup();
    Some(items)
}

fn hex(value: &Value) -> Option<[u8; 32]> {
    decode_lower_hex(value.as_str()?)
}

fn kind(value: &Value) -> Option<Kind> {
    Some(Kind(u16::try_from(value.as_u64()?).ok()?))
}

fn contains<T: Ord>(list: &Option<Vec<T>>, item: &T) -> bool {
    list.as_ref().is_none_or(|list| list.binary_search(item).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Event, Signature, Tags};

    fn event() -> Event {
        Event {
            id: EventId([1; 32]),
            pubkey: PublicKey([2; 32]),
            created_at: 100,
            kind: Kind(7),
            tags: Tags::from_lists([vec!["t", "a", "z"], vec!["t", "b"], vec!["T", "c"], vec!["tt", "d"], vec!["r"]]),
            content: String::new(),
            sig: Signature([0; 64]),
        }
    }

    #[track_caller]
    fn check(json: &str, expected: bool) {
        assert_eq!(Filter::from_json(json).expect(json).matches(&event()), expected, "{json}");
    }

    /// Each condition by itself, alone and against a near miss.
    #[test]
    fn matches_means_what_nip01_says() {
        check("{}", true);
        check(&format!(r#"{{"ids":["{}"]}}"#, "01".repeat(32)), true);
        check(&format!(r#"{{"ids":["{}"]}}"#, "02".repeat(32)), false);
        check(&format!(r#"{{"authors":["{}","{}"]}}"#, "ff".repeat(32), "02".repeat(32)), true);
        check(r#"{"kinds":[9,7,7]}"#, true);
        check(r#"{"kinds":[1],"since":0}"#, false);
        check(r##"{"#t":["b"]}"##, true);
        check(r##"{"#t":["z"]}"##, false);
        check(r##"{"#t":["c"]}"##, false);
        check(r##"{"#T":["c"],"#t":["a"]}"##, true);
        check(r##"{"#r":[""]}"##, false);
    }

    /// Empty lists match nothing (T16); bounds are inclusive and any 64-bit number is one (T22).
    #[test]
    fn t16_t22_empty_lists_and_bounds() {
        for empty in [r#"{"ids":[]}"#, r#"{"authors":[]}"#, r#"{"kinds":[]}"#, r##"{"#t":[]}"##] {
            check(empty, false);
            assert!(Filter::from_json(empty).expect(empty).matches_nothing());
        }
        check(r#"{"since":100,"until":100}"#, true);
        check(r#"{"since":101}"#, false);
        check(r#"{"until":99}"#, false);
        check(r#"{"since":0,"until":18446744073709551615}"#, true);
        assert!(Filter::from_json(r#"{"since":2,"until":1}"#).expect("good").matches_nothing());
    }

    /// What is written is read back as the same filter, empty lists and quotes included.
    #[test]
    fn filters_are_written_as_they_are_read() {
        let ids = format!(r#"{{"ids":["{}"],"authors":[],"limit":0}}"#, "0a".repeat(32));
        for text in
            ["{}", &ids, r##"{"kinds":[0,65535],"#L":["x"],"#t":["a\"b","z"],"since":1,"until":18446744073709551615}"##]
        {
            let filter = Filter::from_json(text).expect(text);
            assert_eq!(Filter::from_json(&filter.to_json()), Ok(filter), "{text}");
        }
    }

    /// Malformed values and unknown keys are refused by name, never dropped (T15, T17).
    #[test]
    fn t15_t17_refusals_name_the_key() {
        let short = r#"{"ids":["abcd"]}"#.to_owned();
        let upper = format!(r##"{{"#e":["{}"]}}"##, "AB".repeat(32));
        for bad in [
            r#"{"kinds":["1"]}"#,
            r#"{"kinds":[65536]}"#,
            r#"{"kinds":[1.0]}"#,
            r#"{"kinds":1}"#,
            r#"{"limit":-1}"#,
            r#"{"since":1.5}"#,
            r#"{"since":1e3}"#,
            r#"{"until":18446744073709551616}"#,
            r#"{"until":null}"#,
            r##"{"#p":["npub1"]}"##,
            r##"{"#t":"x"}"##,
            r##"{"#t":[1]}"##,
            "[]",
            "null",
            "1",
            r#"{"kinds":[1],"kinds":[2]}"#,
            r#"{"kinds":["1"],"kinds":[2]}"#,
            r#"{"limit":1,"\u006cimit":1}"#,
            r##"{"#t":["a"],"#t":["b"]}"##,
            &short,
            &upper,
        ] {
            let error = Filter::from_json(bad).expect_err(bad);
            assert!(error.to_string().starts_with("invalid: "), "{bad}: {error}");
        }
        for (unknown, key) in
            [(r#"{"search":"x"}"#, "search"), (r##"{"#tt":["x"]}"##, "#tt"), (r##"{"#":["x"]}"##, "#")]
        {
            let error = Filter::from_json(unknown).expect_err(unknown).to_string();
            assert!(error.starts_with("unsupported: ") && error.ends_with(key), "{error}");
        }
    }
}
