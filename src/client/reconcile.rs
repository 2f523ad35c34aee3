//! The client's side of a reconciliation (NIP-77): which events only this device has, and which only the relay.
//!
//! In: what a filter matches here, and the relay's messages. Out: the messages to be sent, then the [`Difference`].
//! Pure: whoever has the link sends and receives, and may do other things in between.

use std::fmt::Display;

use crate::protocol::item::Item;
use crate::protocol::relay_message::{RelayMessage, prefix};
use crate::protocol::{EventId, Filter, SubscriptionId, message};
use crate::sync::reconcile::{self, Exchange, Failure, Set, Side, Step};

/// Bytes of one message in either direction; in hex it is twice as long.
const FRAME_BYTES_MAX: usize = 250_000;
/// Messages of one reconciliation. A set of a million differs from another in less than ten.
const ROUNDS_MAX: usize = 1_000;

/// What two sides have of a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Only this side has these.
    pub have: Vec<Item>,
    /// Only the other side has these.
    pub need: Vec<EventId>,
}

/// Why there is no difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The relay has too many events for that; a part of the time may do.
    TooMany(String),
    /// The relay cannot, or will not.
    Unwilling(String),
    /// The keys must be proven first.
    AuthRequired,
    /// What it says makes no sense.
    Malformed(String),
}

/// What follows from a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Send this, and wait.
    Say(String),
    /// It is over; send the first, which ends it at the relay.
    Done(String, Difference),
    /// It is over.
    Refused(Refused),
}

/// A reconciliation under way.
#[derive(Debug)]
pub struct Negotiation<S = Vec<Item>> {
    id: SubscriptionId,
    set: S,
    difference: Difference,
    rounds: usize,
}

impl<S: Set<Error: Display>> Negotiation<S> {
    /// Begins one; the message opens it at the relay. `set` is all that the filter matches here.
    ///
    /// # Errors
    /// When the set cannot be read.
    pub fn open(id: SubscriptionId, filter: &Filter, mut set: S) -> Result<(Negotiation<S>, String), S::Error> {
        let first = reconcile::begin(&mut set)?;
        let asked = Filter { limit: None, ..filter.clone() }.to_json();
        let message = message::neg_open(&id, &asked, &first);
        Ok((Negotiation { id, set, difference: Difference::default(), rounds: 0 }, message))
    }

    /// A second in the middle of the own events, where there are enough to have one.
    ///
    /// # Errors
    /// When the set cannot be read.
    pub fn middle(&mut self) -> Result<Option<u64>, S::Error> {
        let mut cuts = Vec::new();
        if self.set.sum(&Item::FIRST, &Item::END)?.count >= 4 {
            self.set.cuts(&Item::FIRST, &Item::END, 2, &mut cuts)?;
        }
        Ok(cuts.first().map(|cut| cut.item().created_at))
    }

    /// Takes what the relay says; `None` if it is about something else.
    pub fn take(&mut self, said: &RelayMessage) -> Option<Turn> {
        let own = self.id.as_str();
        match said {
            RelayMessage::NegMsg { id, hex } if id == own => Some(self.answer(hex)),
            RelayMessage::NegErr { id, text } if id == own => Some(Turn::Refused(refusal(text))),
            RelayMessage::Closed { id, text } if id == own => Some(Turn::Refused(refusal(text))),
            // Relays that do not know the verb say so in a notice, which names no subscription.
            RelayMessage::Notice(text) if self.rounds == 0 && is_about_negotiation(text) => {
                Some(Turn::Refused(Refused::Unwilling(text.clone())))
            }
            _ => None,
        }
    }

    fn answer(&mut self, hex: &str) -> Turn {
        self.rounds += 1;
        if self.rounds > ROUNDS_MAX {
            return malformed("it never comes to an end");
        }
        match self.exchange(hex) {
            Ok(Some(answer)) => Turn::Say(message::neg_msg(&self.id, &answer)),
            Ok(None) => {
                let close = message::neg_close(&self.id);
                let mut difference = std::mem::take(&mut self.difference);
                difference.have.sort_unstable();
                difference.have.dedup();
                difference.need.sort_unstable();
                difference.need.dedup();
                Turn::Done(close, difference)
            }
            Err(problem) => malformed(&problem),
        }
    }

    /// The answer to a message; none when there is nothing left to ask.
    fn exchange(&mut self, hex: &str) -> Result<Option<Vec<u8>>, String> {
        let mut message = vec![0; hex.len() / 2];
        faster_hex::hex_decode(hex.as_bytes(), &mut message).map_err(|error| error.to_string())?;
        let exchange = Exchange::new(Side::Initiator, message, FRAME_BYTES_MAX);
        let mut exchange = exchange.map_err(|malformed| format!("{malformed:?}"))?;
        loop {
            match exchange.step(&mut self.set) {
                Ok(Step::More) => {}
                Ok(Step::Done) => break,
                Err(Failure::Malformed(malformed)) => return Err(format!("{malformed:?}")),
                Err(Failure::Set(error)) => return Err(error.to_string()),
            }
        }
        self.difference.have.append(&mut exchange.have);
        self.difference.need.append(&mut exchange.need);
        Ok((!exchange.is_settled()).then(|| exchange.into_answer()))
    }
}

fn malformed(problem: &str) -> Turn {
    Turn::Refused(Refused::Malformed(problem.to_owned()))
}

fn refusal(text: &str) -> Refused {
    match prefix(text) {
        "blocked" => Refused::TooMany(text.to_owned()),
        "auth-required" => Refused::AuthRequired,
        _ => Refused::Unwilling(text.to_owned()),
    }
}

fn is_about_negotiation(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    ["neg-open", "negentropy", "unknown", "unsupported", "invalid message", "bad msg"]
        .iter()
        .any(|word| text.contains(word))
}

/// A time span in two: for a relay that has too many events to compare at once. `None` when it is a second or less.
/// `end` stands for a span without an end. It is cut at `wanted` where that lies within: where half of the own events are,
/// which is likelier to be the middle of the relay's too than the middle of all time.
pub fn halves(filter: &Filter, end: u64, wanted: Option<u64>) -> Option<[Filter; 2]> {
    let (since, until) = (filter.since.unwrap_or(0), filter.until.unwrap_or(end));
    let middle = since + until.checked_sub(since).filter(|span| *span > 0)? / 2;
    let middle = wanted.filter(|wanted| (since..until).contains(wanted)).unwrap_or(middle);
    let older = Filter { until: Some(middle), ..filter.clone() };
    let newer = Filter { since: Some(middle + 1), ..filter.clone() };
    Some([older, newer])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use sha2::{Digest, Sha256};

    use super::*;

    /// Ids as hashes, as they are: sums of plainer numbers would be equal by chance.
    fn item(number: u16) -> Item {
        let id = Sha256::digest(number.to_be_bytes());
        Item { created_at: u64::from(number / 3), id: EventId(id.into()) }
    }

    fn set(numbers: impl Iterator<Item = u16>) -> Vec<Item> {
        let mut items: Vec<Item> = numbers.map(item).collect();
        items.sort_unstable();
        items
    }

    fn answer(theirs: &mut Vec<Item>, message: &str) -> RelayMessage {
        let parts: Vec<serde_json::Value> = serde_json::from_str(message).unwrap();
        let hex = parts.last().unwrap().as_str().unwrap();
        let mut bytes = vec![0; hex.len() / 2];
        faster_hex::hex_decode(hex.as_bytes(), &mut bytes).unwrap();
        let mut exchange = Exchange::new(Side::Responder, bytes, 4_096).unwrap();
        while exchange.step(theirs).unwrap() == Step::More {}
        RelayMessage::NegMsg { id: "n".to_owned(), hex: faster_hex::hex_string(&exchange.into_answer()) }
    }

    /// Both sides' differences are found, through a relay with the smallest frames.
    #[test]
    fn the_difference_is_found() {
        let ours = set((0..3_000).filter(|number| number % 7 != 0));
        let mut theirs = set((0..3_000).filter(|number| number % 11 != 0));
        let id = SubscriptionId::new("n").unwrap();
        let (mut negotiation, mut message) = Negotiation::open(id, &Filter::default(), ours.clone()).unwrap();
        let difference = loop {
            match negotiation.take(&answer(&mut theirs, &message)).unwrap() {
                Turn::Say(next) => message = next,
                Turn::Done(close, difference) => {
                    assert_eq!(close, r#"["NEG-CLOSE","n"]"#);
                    break difference;
                }
                Turn::Refused(refused) => panic!("{refused:?}"),
            }
        };
        let only = |of: &[Item], without: &[Item]| {
            of.iter().filter(|item| without.binary_search(item).is_err()).copied().collect::<Vec<_>>()
        };
        assert_eq!(difference.have, only(&ours, &theirs));
        let mut need: Vec<EventId> = only(&theirs, &ours).iter().map(|item| item.id).collect();
        need.sort_unstable();
        assert_eq!(difference.need, need);
    }

    /// Refusals are told apart, other subscriptions' messages are left alone, garbage ends it.
    #[test]
    fn t40_refusals_and_garbage() {
        let begin = || Negotiation::open(SubscriptionId::new("n").unwrap(), &Filter::default(), Vec::new()).unwrap().0;
        let err = |text: &str| RelayMessage::NegErr { id: "n".to_owned(), text: text.to_owned() };
        for (said, expected) in [
            (err("blocked: 500000"), Refused::TooMany("blocked: 500000".to_owned())),
            (err("auth-required: who?"), Refused::AuthRequired),
            (err("error: no"), Refused::Unwilling("error: no".to_owned())),
            (
                RelayMessage::Notice("ERROR: unknown cmd".to_owned()),
                Refused::Unwilling("ERROR: unknown cmd".to_owned()),
            ),
        ] {
            assert_eq!(begin().take(&said), Some(Turn::Refused(expected)));
        }
        for hex in ["", "zz", "6", "60", "61ff", "6101"] {
            let said = RelayMessage::NegMsg { id: "n".to_owned(), hex: hex.to_owned() };
            assert!(matches!(begin().take(&said), Some(Turn::Refused(Refused::Malformed(_)))), "{hex}");
        }
        assert_eq!(begin().take(&RelayMessage::NegMsg { id: "m".to_owned(), hex: String::new() }), None);
        assert_eq!(begin().take(&RelayMessage::Notice("hello".to_owned())), None);
    }

    /// Halves meet without a gap or an overlap, down to the second.
    #[test]
    fn a_span_is_cut_in_two() {
        let all = Filter::default();
        let [older, newer] = halves(&all, 100, None).unwrap();
        assert_eq!((older.since, older.until, newer.since, newer.until), (None, Some(50), Some(51), None));
        let second = Filter { since: Some(5), until: Some(6), ..Filter::default() };
        let [older, newer] = halves(&second, 100, Some(6)).unwrap();
        assert_eq!((older.since, older.until, newer.since, newer.until), (Some(5), Some(5), Some(6), Some(6)));
        assert_eq!(halves(&older, 100, None), None);
        assert_eq!(halves(&Filter { since: Some(200), ..Filter::default() }, 100, None), None);
        let [older, newer] = halves(&all, 100, Some(90)).unwrap();
        assert_eq!((older.until, newer.since), (Some(90), Some(91)));
    }
}
