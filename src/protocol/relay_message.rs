//! What a relay says to its client (NIP-01, 42, 45, 67, 77): the reading side of a client.
//!
//! A relay is a stranger too: whatever cannot be read becomes [`RelayMessage::Unreadable`], never an error that ends
//! anything. Events are read strictly, and are not verified here.

use serde_json::Value;
use serde_json::value::RawValue;

use super::message::EoseHint;
use super::{Event, EventId};

/// One message of a relay. Ids of subscriptions are as the relay wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayMessage {
    /// `["EVENT", id, event]`.
    Event {
        /// The subscription that it answers.
        id: String,
        /// The event, not yet verified.
        event: Box<Event>,
    },
    /// `["OK", id, accepted, text]`.
    Ok {
        /// The event that was sent.
        id: EventId,
        /// Whether the relay has it now.
        accepted: bool,
        /// Why, with NIP-01's prefix; may be empty.
        text: String,
    },
    /// `["EOSE", id, hint?]`: all stored events were sent that the relay gives.
    Eose {
        /// The subscription.
        id: String,
        /// Whether there are more (NIP-67).
        hint: EoseHint,
    },
    /// `["CLOSED", id, text]`.
    Closed {
        /// The subscription, count or negotiation.
        id: String,
        /// Why, with NIP-01's prefix.
        text: String,
    },
    /// `["COUNT", id, {"count": n, …}]`.
    Count {
        /// The question.
        id: String,
        /// How many there are.
        count: u64,
        /// There are at least so many.
        approximate: bool,
    },
    /// `["AUTH", challenge]`.
    Auth(String),
    /// `["NOTICE", text]`.
    Notice(String),
    /// `["NEG-MSG", id, hex]`.
    NegMsg {
        /// The negotiation.
        id: String,
        /// The message, hex as it came.
        hex: String,
    },
    /// `["NEG-ERR", id, text]`.
    NegErr {
        /// The negotiation.
        id: String,
        /// Why, with NIP-77's prefix.
        text: String,
    },
    /// Anything else.
    Unreadable,
}

impl RelayMessage {
    /// Reads a message.
    pub fn from_json(text: &str) -> RelayMessage {
        let parts: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_default();
        read(&parts).unwrap_or(RelayMessage::Unreadable)
    }
}

fn read(parts: &[&RawValue]) -> Option<RelayMessage> {
    let verb = text_at(parts, 0)?;
    let first = || text_at(parts, 1);
    Some(match verb.as_str() {
        "EVENT" => {
            let event = Event::from_json(parts.get(2)?.get()).ok()?;
            RelayMessage::Event { id: first()?, event: Box::new(event) }
        }
        "OK" => RelayMessage::Ok {
            id: EventId::from_hex(&first()?)?,
            accepted: serde_json::from_str(parts.get(2)?.get()).ok()?,
            text: text_at(parts, 3).unwrap_or_default(),
        },
        "EOSE" => RelayMessage::Eose { id: first()?, hint: parts.get(2).map_or(EoseHint::Unknown, |part| hint(part)) },
        "CLOSED" => RelayMessage::Closed { id: first()?, text: text_at(parts, 2).unwrap_or_default() },
        "COUNT" => {
            let body: Value = serde_json::from_str(parts.get(2)?.get()).ok()?;
            let count = body["count"].as_u64()?;
            RelayMessage::Count { id: first()?, count, approximate: body["approximate"] == true }
        }
        "AUTH" => RelayMessage::Auth(first()?),
        "NOTICE" => RelayMessage::Notice(first()?),
        "NEG-MSG" => RelayMessage::NegMsg { id: first()?, hex: text_at(parts, 2)? },
        "NEG-ERR" => RelayMessage::NegErr { id: first()?, text: text_at(parts, 2).unwrap_or_default() },
        _ => return None,
    })
}

fn text_at(parts: &[&RawValue], index: usize) -> Option<String> {
    serde_json::from_str(parts.get(index)?.get()).ok()
}

fn hint(part: &RawValue) -> EoseHint {
    let hints: Value = serde_json::from_str(part.get()).unwrap_or_default();
    match hints[0].as_str() {
        Some("finish") => EoseHint::Finish,
        Some("more") => EoseHint::More,
        _ => EoseHint::Unknown,
    }
}

/// The part of a refusal before its colon (`rate-limited`), by which NIP-01 says what to do about it; empty if there is
/// none.
pub fn prefix(text: &str) -> &str {
    let prefix = text.split_once(':').map_or("", |(prefix, _)| prefix);
    if prefix.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-') { prefix } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::testing::{Author, NOW};
    use crate::protocol::{SubscriptionId, message};

    /// What our own relay writes is read as what it is.
    #[test]
    fn what_a_relay_writes_is_read() {
        let id = SubscriptionId::new("s").expect("short");
        let note = Author::new(1).note(NOW, "hello \"you\"");
        let json = String::from_utf8(note.canonical().json.to_vec()).expect("text");
        let of = RelayMessage::from_json;
        let event = of(&format!("{}{json}]", message::event_prefix(&id)));
        assert_eq!(event, RelayMessage::Event { id: "s".to_owned(), event: Box::new((*note).clone()) });
        let ok = RelayMessage::Ok { id: note.id, accepted: false, text: "blocked: x".to_owned() };
        assert_eq!(of(&message::ok(&note.id, false, "blocked: x")), ok);
        for hint in [EoseHint::Finish, EoseHint::More, EoseHint::Unknown] {
            assert_eq!(of(&message::eose(&id, hint)), RelayMessage::Eose { id: "s".to_owned(), hint });
        }
        let closed = RelayMessage::Closed { id: "s".to_owned(), text: "error: x".to_owned() };
        assert_eq!(of(&message::closed(&id, "error: x")), closed);
        let count = RelayMessage::Count { id: "s".to_owned(), count: 7, approximate: true };
        assert_eq!(of(&message::count(&id, 7, true, None)), count);
        assert_eq!(of(&message::notice("x")), RelayMessage::Notice("x".to_owned()));
        assert_eq!(of(r#"["AUTH","abc"]"#), RelayMessage::Auth("abc".to_owned()));
        let neg = RelayMessage::NegErr { id: "n".to_owned(), text: "blocked: 500000".to_owned() };
        assert_eq!(of(r#"["NEG-ERR","n","blocked: 500000"]"#), neg);
    }

    /// A hostile or broken relay gives unreadable messages and nothing worse.
    #[test]
    fn what_cannot_be_read_is_told_apart() {
        let deep = "[".repeat(100_000);
        for text in [
            "",
            "{}",
            "[]",
            "[1]",
            r#"["EVENT","s",{}]"#,
            r#"["OK","zz",true,""]"#,
            r#"["OK"]"#,
            r#"["COUNT","a",{}]"#,
            r#"["EOSE"]"#,
            r#"["NEG-MSG","a"]"#,
            "\u{0}",
            &deep,
        ] {
            assert_eq!(RelayMessage::from_json(text), RelayMessage::Unreadable, "{text:.20}");
        }
    }

    /// The word before the colon, if it is one of NIP-01's manner.
    #[test]
    fn prefixes_are_words_before_a_colon() {
        for (text, expected) in [("rate-limited: slow", "rate-limited"), ("", ""), ("no colon", ""), ("See x: y", "")] {
            assert_eq!(prefix(text), expected, "{text}");
        }
    }
}
