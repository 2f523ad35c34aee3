//! Filters on the command line: NIP-01's JSON, with keys and ids in any spelling (NIP-19).

use serde_json::{Map, Value};

use crate::error::Error;
use crate::protocol::Filter;
use crate::protocol::nip19::{self, KeyError};

/// A filter that the user wrote.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What it means.
    pub filter: Filter,
    /// The same as JSON, keys and ids as hex: what a relay understands.
    pub json: Map<String, Value>,
}

impl Asked {
    /// The filter for uses where a limit plays no part.
    pub fn without_limit(self) -> Filter {
        Filter { limit: None, ..self.filter }
    }
}

/// Reads the filters of a command line.
///
/// # Errors
/// [`Error::Usage`], saying what is wrong. The text is not repeated: it may hold a secret key by mistake.
pub fn read_all(texts: &[String]) -> Result<Vec<Asked>, Error> {
    texts.iter().map(|text| read(text)).collect()
}

/// Reads one filter.
///
/// # Errors
/// As [`read_all`].
pub fn read(text: &str) -> Result<Asked, Error> {
    let refuse = |problem: &dyn std::fmt::Display| {
        Error::Usage(format!(
            "the filter cannot be used: {problem}; a filter looks like '{{\"kinds\":[1],\"limit\":10}}'"
        ))
    };
    let mut json: Map<String, Value> = serde_json::from_str(text).map_err(|error| refuse(&error))?;
    for (key, value) in &mut json {
        rewrite(key, value).map_err(|(at, error)| refuse(&format!("{key}[{at}]: {error}")))?;
    }
    let filter = Filter::from_value(Value::Object(json.clone())).map_err(|error| {
        let text = error.to_string();
        // "invalid: " and the like are for programs.
        refuse(&text.split_once(": ").map_or(text.as_str(), |(_, reason)| reason))
    })?;
    Ok(Asked { filter, json })
}

/// Turns the keys or ids in a list into hex. What is no list of strings is left to the filter's own checks.
fn rewrite(key: &str, value: &mut Value) -> Result<(), (usize, KeyError)> {
    type Parse = fn(&str) -> Result<[u8; 32], KeyError>;
    // Where the protocol allows other values too, what is neither key nor id stays as it is.
    let (parse, must_be_one): (Parse, bool) = match key {
        "authors" | "#p" => (nip19::parse_pubkey, true),
        "ids" | "#e" => (nip19::parse_id, true),
        "#P" => (nip19::parse_pubkey, false),
        "#E" | "#q" => (nip19::parse_id, false),
        _ => return Ok(()),
    };
    for (at, item) in value.as_array_mut().into_iter().flatten().enumerate() {
        let Value::String(text) = item else { continue };
        match parse(text) {
            Ok(bytes) => *text = faster_hex::hex_string(&bytes),
            Err(KeyError::Unrecognised { .. }) if !must_be_one => {}
            Err(error) => return Err((at, error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const NPUB: &str = "npub10elfcs4fr0l0r8af98jlmgdh9c8tcxjvz9qkw038js35mp4dma8qzvjptg";
    const HEX: &str = "7e7e9c42a91bfef19fa929e5fda1b72e0ebc1a4c1141673e2794234d86addf4e";

    /// The example of NIP-19.
    const NPROFILE: &str = "nprofile1qqsrhuxx8l9ex335q7he0f09aej04zpazpl0ne2cgukyawd24mayt8gpp4mhxue69uhhytnc9e3k7mgpz4mhxue69uhkg6nzv9ejuumpv34kytnrdaksjlyr9p";
    const NPROFILE_HEX: &str = "3bf0c63fcb93463407af97a5e5ee64fa883d107ef9e558472c4eb9aaaefa459d";

    /// Every spelling of a key or id becomes hex where a key or id is meant, and only there.
    #[test]
    fn keys_and_ids_become_hex() {
        let bytes = nip19::parse_pubkey(HEX).unwrap();
        let note = nip19::encode(nip19::Form::Note, &bytes);
        for (written, expected) in [
            (format!(r#"{{"authors":["{NPUB}"]}}"#), format!(r#"{{"authors":["{HEX}"]}}"#)),
            (format!(r##"{{"#p":["{NPUB}","{HEX}"]}}"##), format!(r##"{{"#p":["{HEX}"]}}"##)),
            (format!(r#"{{"ids":["{note}"]}}"#), format!(r#"{{"ids":["{HEX}"]}}"#)),
            (format!(r##"{{"#e":["{}"]}}"##, HEX.to_uppercase()), format!(r##"{{"#e":["{HEX}"]}}"##)),
            (format!(r#"{{"authors":["{NPROFILE}"]}}"#), format!(r#"{{"authors":["{NPROFILE_HEX}"]}}"#)),
            (format!(r##"{{"#P":["{NPUB}"]}}"##), format!(r##"{{"#P":["{HEX}"]}}"##)),
            (format!(r##"{{"#q":["{note}","30023:{HEX}:x"]}}"##), format!(r##"{{"#q":["{HEX}","30023:{HEX}:x"]}}"##)),
            (format!(r##"{{"#t":["{NPUB}"]}}"##), format!(r##"{{"#t":["{NPUB}"]}}"##)),
        ] {
            let asked = read(&written).unwrap();
            assert_eq!(asked.filter, Filter::from_json(&expected).unwrap(), "{written}");
            assert_eq!(Filter::from_value(Value::Object(asked.json)).unwrap(), asked.filter);
        }
    }

    /// What is wrong is said in the user's terms, with exit code 2, and a secret key is not repeated.
    #[test]
    fn wrong_filters_are_usage_errors() {
        let nsec = nip19::encode(nip19::Form::Nsec, &[1; 32]);
        for (text, expected) in [
            ("{", "EOF"),
            ("[]", "expected a map"),
            ("kinds=1", "expected value"),
            (r#"{"kinds":["1"]}"#, "kinds must be a list of integers"),
            (r#"{"search":"x"}"#, "filter key search"),
            (r#"{"authors":["abc"]}"#, "authors[0]: neither 64 hex digits"),
            (r#"{"authors":"abc"}"#, "authors must be a list"),
            (&format!(r#"{{"ids":["{HEX}","{NPUB}"]}}"#), "ids[1]: starts with npub1"),
            (&format!(r#"{{"authors":["{nsec}"]}}"#), "secret key"),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let said = error.to_string();
            assert!(said.contains(expected) && !said.contains(&nsec), "{text}: {said}");
        }
    }
}
