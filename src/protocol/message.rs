//! The messages of NIP-01, 42, 45 and 77, both ways.
//!
//! Reading never fails into silence: what cannot be read becomes the [`Refusal`] that the client is owed, with the
//! id that it waits for where one can be made out.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::event::push_string;
use super::filter::{Filter, FilterError, ReadFilter};
use super::{Event, EventId, SubscriptionId};

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientMessage {
    /// Publish this.
    Event(Box<Event>),
    /// Send what matches, stored and live.
    Req(SubscriptionId, Vec<Filter>),
    /// Say how many match (NIP-45).
    Count(SubscriptionId, Vec<Filter>),
    /// End a subscription.
    Close(SubscriptionId),
    /// Answer to an authentication challenge (NIP-42).
    Auth(Box<Event>),
    /// Reconcile what matches (NIP-77), beginning with this message.
    NegOpen(SubscriptionId, Filter, Vec<u8>),
    /// Go on with a reconciliation.
    NegMsg(SubscriptionId, Vec<u8>),
    /// End a reconciliation.
    NegClose(SubscriptionId),
}

/// The answer to a message that cannot be acted upon. `text` starts with a prefix of NIP-01.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `["OK", id, false, text]`, the id as the client wrote it.
    Ok {
        /// The event's id as written.
        id: String,
        /// Reason, prefix first.
        text: String,
    },
    /// `["CLOSED", id, text]`.
    Closed {
        /// The subscription id as written.
        id: String,
        /// Reason, prefix first.
        text: String,
    },
    /// `["NEG-ERR", id, text]`.
    NegErr {
        /// The reconciliation's id as written.
        id: String,
        /// Reason, prefix first.
        text: String,
    },
    /// `["NOTICE", text]`: there is no id to answer to.
    Notice(String),
}

impl Refusal {
    /// The message as JSON.
    pub fn to_json(&self) -> String {
        match self {
            Refusal::Ok { id, text } => array("OK", &[Part::Text(id), Part::Raw("false"), Part::Text(text)]),
            Refusal::Closed { id, text } => array("CLOSED", &[Part::Text(id), Part::Text(text)]),
            Refusal::NegErr { id, text } => array("NEG-ERR", &[Part::Text(id), Part::Text(text)]),
            Refusal::Notice(text) => notice(text),
        }
    }
}

/// What an EOSE tells about the rest (NIP-67).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EoseHint {
    /// Every stored match was sent.
    Finish,
    /// There are more, all of them older than what was sent.
    More,
    /// The answer ends inside a second, or nobody looked further.
    Unknown,
}

/// `["OK", id, accepted, text]`.
pub fn ok(id: &EventId, accepted: bool, text: &str) -> String {
    let accepted = if accepted { "true" } else { "false" };
    array("OK", &[Part::Text(&id.to_hex()), Part::Raw(accepted), Part::Text(text)])
}

/// `["EOSE", id]`, with NIP-67's hint where there is one.
pub fn eose(id: &SubscriptionId, hint: EoseHint) -> String {
    let id = Part::Text(id.as_str());
    match hint {
        EoseHint::Finish => array("EOSE", &[id, Part::Raw("[\"finish\"]")]),
        EoseHint::More => array("EOSE", &[id, Part::Raw("[\"more\"]")]),
        EoseHint::Unknown => array("EOSE", &[id]),
    }
}

/// `["CLOSED", id, text]`.
pub fn closed(id: &SubscriptionId, text: &str) -> String {
    array("CLOSED", &[Part::Text(id.as_str()), Part::Text(text)])
}

/// `["AUTH", challenge]` (NIP-42).
pub fn auth(challenge: &str) -> String {
    array("AUTH", &[Part::Text(challenge)])
}

/// `["NOTICE", text]`.
pub fn notice(text: &str) -> String {
    array("NOTICE", &[Part::Text(text)])
}

/// `["COUNT", id, {"count": n}]`, marked when it is a lower bound, with HyperLogLog registers where there are any (NIP-45).
pub fn count(id: &SubscriptionId, count: u64, approximate: bool, hll: Option<&str>) -> String {
    let mut body = format!("{{\"count\":{count}");
    if approximate {
        body.push_str(",\"approximate\":true");
    }
    if let Some(registers) = hll {
        body.push_str(&format!(",\"hll\":\"{registers}\""));
    }
    body.push('}');
    array("COUNT", &[Part::Text(id.as_str()), Part::Raw(&body)])
}

/// `["EVENT", id,` as it stands before each event of a subscription; `]` follows the event.
pub fn event_prefix(id: &SubscriptionId) -> String {
    let mut prefix = array("EVENT", &[Part::Text(id.as_str())]);
    prefix.pop();
    prefix.push(',');
    prefix
}

/// `["NEG-MSG", id, message in hex]` (NIP-77).
pub fn neg_msg(id: &SubscriptionId, message: &[u8]) -> String {
    array("NEG-MSG", &[Part::Text(id.as_str()), Part::Text(&faster_hex::hex_string(message))])
}

/// `["NEG-ERR", id, text]`, with the number of records that would be accepted where too many is the reason (NIP-77).
pub fn neg_err(id: &SubscriptionId, text: &str, records_max: Option<usize>) -> String {
    let (id, text) = (Part::Text(id.as_str()), Part::Text(text));
    match records_max {
        Some(records_max) => array("NEG-ERR", &[id, text, Part::Raw(&records_max.to_string())]),
        None => array("NEG-ERR", &[id, text]),
    }
}

/// `["NEG-OPEN", id, filter, message in hex]`, as a client begins (NIP-77).
pub fn neg_open(id: &SubscriptionId, filter_json: &str, message: &[u8]) -> String {
    let message = faster_hex::hex_string(message);
    array("NEG-OPEN", &[Part::Text(id.as_str()), Part::Raw(filter_json), Part::Text(&message)])
}

/// `["NEG-CLOSE", id]`, as a client ends (NIP-77).
pub fn neg_close(id: &SubscriptionId) -> String {
    array("NEG-CLOSE", &[Part::Text(id.as_str())])
}

/// `["EVENT", event]`, as a client publishes.
pub fn publish(event_json: &str) -> String {
    array("EVENT", &[Part::Raw(event_json)])
}

/// `["AUTH", event]`, as a client answers a challenge (NIP-42).
pub fn auth_answer(event_json: &str) -> String {
    array("AUTH", &[Part::Raw(event_json)])
}

/// `["REQ", id, filter…]`, as a client subscribes.
pub fn req(id: &SubscriptionId, filters: &[Filter]) -> String {
    let filters: Vec<String> = filters.iter().map(Filter::to_json).collect();
    let parts: Vec<Part> =
        std::iter::once(Part::Text(id.as_str())).chain(filters.iter().map(|filter| Part::Raw(filter))).collect();
    array("REQ", &parts)
}

/// `["CLOSE", id]`, as a client ends a subscription.
pub fn close(id: &SubscriptionId) -> String {
    array("CLOSE", &[Part::Text(id.as_str())])
}

enum Part<'a> {
    Text(&'a str),
    Raw(&'a str),
}

fn array(verb: &str, parts: &[Part]) -> String {
    let mut out = format!("[\"{verb}\"").into_bytes();
    for part in parts {
        out.push(b',');
        match part {
            Part::Text(text) => push_string(&mut out, text),
            Part::Raw(json) => out.extend_from_slice(json.as_bytes()),
        }
    }
    out.push(b']');
    String::from_utf8(out).expect("made of strings")
}

impl ClientMessage {
    /// Reads one message.
    ///
    /// # Errors
    /// The answer that the client is owed instead.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        match serde_json::from_str(text) {
            Ok(Parsed(answer)) => answer,
            Err(error) => Err(refuse(text, &error)),
        }
    }
}

/// A whole message: either understood or refused by its content. JSON errors stay with the parser.
struct Parsed(Result<ClientMessage, Refusal>);

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(MessageVisitor).map(Parsed)
    }
}

struct MessageVisitor;

impl<'de> Visitor<'de> for MessageVisitor {
    type Value = Result<ClientMessage, Refusal>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array that starts with EVENT, REQ, COUNT, CLOSE, AUTH or NEG-OPEN")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let verb: String = need(&mut seq, "the message is empty")?;
        match verb.as_str() {
            "EVENT" => {
                let event = need(&mut seq, "EVENT needs an event")?;
                end(seq)?;
                Ok(Ok(ClientMessage::Event(Box::new(event))))
            }
            "AUTH" => {
                let event = need(&mut seq, "AUTH needs an event")?;
                end(seq)?;
                Ok(Ok(ClientMessage::Auth(Box::new(event))))
            }
            "REQ" => subscription(seq, ClientMessage::Req),
            "COUNT" => subscription(seq, ClientMessage::Count),
            "CLOSE" => {
                let id: String = need(&mut seq, "CLOSE needs a subscription id")?;
                end(seq)?;
                let Some(id) = SubscriptionId::new(&id) else {
                    return Ok(Err(Refusal::Notice(BAD_SUBSCRIPTION_ID.to_owned())));
                };
                Ok(Ok(ClientMessage::Close(id)))
            }
            "NEG-OPEN" => neg_open_of(seq),
            "NEG-MSG" => {
                let (id, message): (String, String) = (need(&mut seq, NO_ID)?, need(&mut seq, NO_MESSAGE)?);
                end(seq)?;
                Ok(neg_id(&id).and_then(|neg| Ok(ClientMessage::NegMsg(neg, from_hex(&id, &message)?))))
            }
            "NEG-CLOSE" => {
                let id: String = need(&mut seq, NO_ID)?;
                end(seq)?;
                Ok(neg_id(&id).map(ClientMessage::NegClose))
            }
            _ => Err(A::Error::custom("unknown verb")),
        }
    }
}

const NO_ID: &str = "an id is needed";
const NO_MESSAGE: &str = "a message in hex is needed";

fn neg_open_of<'de, A: SeqAccess<'de>>(mut seq: A) -> Result<Result<ClientMessage, Refusal>, A::Error> {
    let id: String = need(&mut seq, NO_ID)?;
    let ReadFilter(filter) = need(&mut seq, "a filter is needed")?;
    let message: String = need(&mut seq, NO_MESSAGE)?;
    end(seq)?;
    Ok(neg_id(&id).and_then(|neg| {
        let filter = filter.map_err(|error| neg_refusal(&id, &error.to_string()))?;
        Ok(ClientMessage::NegOpen(neg, filter, from_hex(&id, &message)?))
    }))
}

fn neg_id(id: &str) -> Result<SubscriptionId, Refusal> {
    SubscriptionId::new(id).ok_or_else(|| neg_refusal(id, BAD_SUBSCRIPTION_ID))
}

fn neg_refusal(id: &str, text: &str) -> Refusal {
    Refusal::NegErr { id: id.to_owned(), text: text.to_owned() }
}

fn from_hex(id: &str, hex: &str) -> Result<Vec<u8>, Refusal> {
    let mut bytes = vec![0; hex.len() / 2];
    let read = hex.len().is_multiple_of(2) && faster_hex::hex_decode(hex.as_bytes(), &mut bytes).is_ok();
    if read { Ok(bytes) } else { Err(neg_refusal(id, "invalid: the message is not hex")) }
}

const BAD_SUBSCRIPTION_ID: &str = "invalid: a subscription id has 1 to 64 characters";

fn subscription<'de, A: SeqAccess<'de>>(
    mut seq: A,
    make: fn(SubscriptionId, Vec<Filter>) -> ClientMessage,
) -> Result<Result<ClientMessage, Refusal>, A::Error> {
    let text: String = need(&mut seq, "a subscription id is needed")?;
    let mut filters = Vec::new();
    let mut error: Option<FilterError> = None;
    while let Some(ReadFilter(filter)) = seq.next_element()? {
        match filter {
            Ok(filter) => filters.push(filter),
            Err(found) => error = error.or(Some(found)),
        }
    }
    let closed = |reason: &str| Ok(Err(Refusal::Closed { id: text.clone(), text: reason.to_owned() }));
    let Some(id) = SubscriptionId::new(&text) else {
        return closed(BAD_SUBSCRIPTION_ID);
    };
    match error {
        Some(error) => closed(&error.to_string()),
        None if filters.is_empty() => closed("invalid: at least one filter is needed"),
        None => Ok(Ok(make(id, filters))),
    }
}

fn need<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A, missing: &'static str) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| A::Error::custom(missing))
}

/// Further elements are allowed and dropped: NIPs add them.
fn end<'de, A: SeqAccess<'de>>(mut seq: A) -> Result<(), A::Error> {
    while seq.next_element::<IgnoredAny>()?.is_some() {}
    Ok(())
}

/// Makes the best answer to a message that is not what it should be. Only bad input pays for this second look.
fn refuse(text: &str, error: &serde_json::Error) -> Refusal {
    let reason = format!("invalid: {}", plain(error));
    // Raw values are read no closer than their JSON grammar, so a string that is no text does not hide the id.
    let parts: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_default();
    let Some(verb) = parts.first().and_then(|verb| serde_json::from_str::<String>(verb.get()).ok()) else {
        return Refusal::Notice(reason);
    };
    let subject = parts.get(1).map_or("", |subject| subject.get());
    match verb.as_str() {
        "EVENT" | "AUTH" => match serde_json::from_str::<Identified>(subject) {
            Ok(Identified { id }) => Refusal::Ok { id, text: reason },
            Err(_) => Refusal::Notice(reason),
        },
        "REQ" | "COUNT" => match serde_json::from_str::<String>(subject) {
            Ok(id) => Refusal::Closed { id, text: reason },
            Err(_) => Refusal::Notice(reason),
        },
        "NEG-OPEN" | "NEG-MSG" => match serde_json::from_str::<String>(subject) {
            Ok(id) => Refusal::NegErr { id, text: reason },
            Err(_) => Refusal::Notice(reason),
        },
        "CLOSE" | "NEG-CLOSE" => Refusal::Notice(reason),
        _ => Refusal::Notice(format!("unsupported: this relay does not know the message {verb:.16}")),
    }
}

/// What is left of an event that cannot be read.
#[derive(serde::Deserialize)]
struct Identified {
    id: String,
}

/// serde_json's message without its "at line 1 column 7": a message has one line, and the column is of no help there.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.find(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, expected: &str) {
        let answer = ClientMessage::parse(text).expect_err(text).to_json();
        assert!(answer.starts_with(expected), "{text}\n  gave {answer}\n  not  {expected}");
    }

    /// Every refusal is the message that the client waits for, with a standard prefix (T15, T23, T24, T41).
    #[test]
    fn t41_malformed_messages_get_the_right_answer() {
        refused("", "[\"NOTICE\",\"invalid: ");
        refused("hello", "[\"NOTICE\",\"invalid: ");
        refused("{}", "[\"NOTICE\",\"invalid: ");
        refused("[]", "[\"NOTICE\",\"");
        refused("[1]", "[\"NOTICE\",\"");
        refused("[\"HELLO\",1]", "[\"NOTICE\",\"unsupported: ");
        refused("[\"EVENT\"]", "[\"NOTICE\",\"invalid: ");
        refused("[\"EVENT\",{}]", "[\"NOTICE\",\"invalid: missing field");
        refused("[\"EVENT\",{\"id\":\"AB\"}]", "[\"OK\",\"AB\",false,\"invalid: id: ");
        refused("[\"EVENT\",{\"id\":\"AB\",\"content\":\"\\ud800\"}]", "[\"OK\",\"AB\",false,\"invalid: ");
        refused("[\"REQ\"]", "[\"NOTICE\",\"invalid: ");
        refused("[\"REQ\",1,{}]", "[\"NOTICE\",\"invalid: ");
        refused("[\"REQ\",\"s\"]", "[\"CLOSED\",\"s\",\"invalid: ");
        refused("[\"REQ\",\"\",{}]", "[\"CLOSED\",\"\",\"invalid: ");
        refused("[\"REQ\",\"s\",[]]", "[\"CLOSED\",\"s\",\"invalid: ");
        refused("[\"REQ\",\"s\",{},{\"kinds\":[\"1\"]}]", "[\"CLOSED\",\"s\",\"invalid: kinds must be ");
        refused("[\"COUNT\",\"s\",{\"search\":\"x\"}]", "[\"CLOSED\",\"s\",\"unsupported: ");
        refused("[\"CLOSE\"]", "[\"NOTICE\",\"invalid: ");
        refused("[\"NEG-CLOSE\"]", "[\"NOTICE\",\"invalid: ");
        refused("[\"NEG-OPEN\",1,{},\"61\"]", "[\"NOTICE\",\"invalid: ");
        refused("[\"NEG-OPEN\",\"n\",{}]", "[\"NEG-ERR\",\"n\",\"invalid: ");
        refused("[\"CLOSE\",\"\"]", "[\"NOTICE\",\"invalid: ");
        refused("[\"REQ\",\"s\",{}]x", "[\"NOTICE\",\"invalid: ");
        refused(&"[".repeat(100_000), "[\"NOTICE\",\"invalid: ");
    }

    /// Odd hex, no hex, bad filters and ids are answered with NEG-ERR (T40); good ones are read, upper-case hex too.
    #[test]
    fn t40_reconciliation_messages() {
        refused("[\"NEG-OPEN\",\"n\",{},\"610\"]", "[\"NEG-ERR\",\"n\",\"invalid: the message is not hex\"]");
        refused("[\"NEG-MSG\",\"n\",\"6x\"]", "[\"NEG-ERR\",\"n\",\"invalid: the message is not hex\"]");
        refused("[\"NEG-OPEN\",\"n\",{\"kinds\":[\"1\"]},\"61\"]", "[\"NEG-ERR\",\"n\",\"invalid: kinds must be ");
        refused("[\"NEG-OPEN\",\"\",{},\"61\"]", "[\"NEG-ERR\",\"\",\"invalid: ");
        let id = SubscriptionId::new("n").expect("short");
        let open = ClientMessage::NegOpen(id.clone(), Filter::default(), vec![0x61, 0xab]);
        assert_eq!(ClientMessage::parse(&neg_open(&id, "{}", &[0x61, 0xab])), Ok(open));
        let next = ClientMessage::NegMsg(id.clone(), vec![0xab]);
        assert_eq!(ClientMessage::parse("[\"NEG-MSG\",\"n\",\"AB\",1]"), Ok(next));
        assert_eq!(ClientMessage::parse(&neg_close(&id)), Ok(ClientMessage::NegClose(id.clone())));
        assert_eq!(neg_err(&id, "blocked: x", Some(7)), r#"["NEG-ERR","n","blocked: x",7]"#);
    }

    /// Good messages are understood; further elements are ignored where NIPs may add some.
    #[test]
    fn messages_are_read() {
        let id = SubscriptionId::new("s").expect("short");
        let filter = Filter { limit: Some(0), ..Filter::default() };
        assert_eq!(
            ClientMessage::parse(" [\"REQ\",\"s\",{\"limit\":0},{}]"),
            Ok(ClientMessage::Req(id.clone(), vec![filter, Filter::default()]))
        );
        assert_eq!(ClientMessage::parse("[\"CLOSE\",\"s\",1]"), Ok(ClientMessage::Close(id)));
    }

    /// Ids are escaped, never pasted; hints are NIP-67's.
    #[test]
    fn answers_are_json() {
        let id = SubscriptionId::new("a\"]").expect("short");
        assert_eq!(eose(&id, EoseHint::More), r#"["EOSE","a\"]",["more"]]"#);
        assert_eq!(eose(&id, EoseHint::Unknown), r#"["EOSE","a\"]"]"#);
        assert_eq!(event_prefix(&id), r#"["EVENT","a\"]","#);
        assert_eq!(count(&id, 7, true, None), r#"["COUNT","a\"]",{"count":7,"approximate":true}]"#);
        assert_eq!(count(&id, 7, false, Some("0f")), r#"["COUNT","a\"]",{"count":7,"hll":"0f"}]"#);
        assert_eq!(closed(&id, "error: x"), r#"["CLOSED","a\"]","error: x"]"#);
    }
}
