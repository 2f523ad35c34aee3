//! What became of each line of an import: one word a line, counted; bad lines named as they come.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::cli::progress::number;
use crate::protocol::supersede::Verdict;
use crate::relay::ingest::Rejection;

/// What became of one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Stored.
    Imported,
    /// Was there before.
    AlreadyStored,
    /// A newer version is stored (NIP-01).
    Superseded,
    /// Its author deleted it (NIP-09).
    Deleted,
    /// Its author asked to vanish (NIP-62).
    Vanished,
    /// Its expiration has come (NIP-40).
    Expired,
    /// Of a kind that is never stored (NIP-01).
    Ephemeral,
    /// No event at all.
    Unreadable,
    /// Its id or signature does not hold.
    Invalid,
    /// Larger than the settings allow.
    TooLarge,
    /// Against the rules of the relay.
    Refused,
}

impl Outcome {
    const ALL: [Outcome; 11] = [
        Outcome::Imported,
        Outcome::AlreadyStored,
        Outcome::Superseded,
        Outcome::Deleted,
        Outcome::Vanished,
        Outcome::Expired,
        Outcome::Ephemeral,
        Outcome::Unreadable,
        Outcome::Invalid,
        Outcome::TooLarge,
        Outcome::Refused,
    ];

    /// For people.
    fn label(self) -> &'static str {
        match self {
            Outcome::Imported => "imported",
            Outcome::AlreadyStored => "already stored",
            Outcome::Superseded => "superseded",
            Outcome::Deleted => "deleted by their authors",
            Outcome::Vanished => "of authors who asked to vanish",
            Outcome::Expired => "expired",
            Outcome::Ephemeral => "ephemeral (not stored)",
            Outcome::Unreadable => "unreadable",
            Outcome::Invalid => "invalid",
            Outcome::TooLarge => "too large",
            Outcome::Refused => "refused",
        }
    }

    /// For programs; does not change.
    fn key(self) -> &'static str {
        match self {
            Outcome::Imported => "imported",
            Outcome::AlreadyStored => "already_stored",
            Outcome::Superseded => "superseded",
            Outcome::Deleted => "deleted",
            Outcome::Vanished => "vanished",
            Outcome::Expired => "expired",
            Outcome::Ephemeral => "ephemeral",
            Outcome::Unreadable => "unreadable",
            Outcome::Invalid => "invalid",
            Outcome::TooLarge => "too_large",
            Outcome::Refused => "refused",
        }
    }

    /// Whether the line is to be named with its reason: somebody may want to look at it.
    pub fn is_bad(self) -> bool {
        matches!(self, Outcome::Unreadable | Outcome::Invalid | Outcome::TooLarge | Outcome::Refused)
    }
}

impl From<Verdict> for Outcome {
    fn from(verdict: Verdict) -> Outcome {
        match verdict {
            Verdict::Store | Verdict::StoreFormer => Outcome::Imported,
            Verdict::Duplicate => Outcome::AlreadyStored,
            Verdict::Superseded => Outcome::Superseded,
            Verdict::Deleted => Outcome::Deleted,
            Verdict::Vanished => Outcome::Vanished,
            Verdict::Expired => Outcome::Expired,
        }
    }
}

impl From<&Rejection> for Outcome {
    fn from(rejection: &Rejection) -> Outcome {
        match rejection {
            Rejection::Duplicate => Outcome::AlreadyStored,
            Rejection::Invalid(_) => Outcome::Invalid,
            Rejection::TooManyTags { .. } | Rejection::ContentTooLong { .. } | Rejection::TooLarge { .. } => {
                Outcome::TooLarge
            }
            Rejection::Expired => Outcome::Expired,
            // Whatever the relay has against it: its policy, the NIPs on who may publish, want of room.
            _ => Outcome::Refused,
        }
    }
}

/// How many lines had which outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally([u64; Outcome::ALL.len()]);

impl Tally {
    /// Counts one line.
    pub fn add(&mut self, outcome: Outcome) {
        self.0[outcome as usize] += 1;
    }

    /// Lines with this outcome.
    pub fn of(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize]
    }

    /// Lines in all.
    pub fn lines(&self) -> u64 {
        self.0.iter().sum()
    }

    /// `imported 2,520 · already stored 12 · invalid 3`.
    pub fn for_people(&self) -> String {
        let mut text = format!("imported {}", number(self.of(Outcome::Imported)));
        for outcome in &Outcome::ALL[1..] {
            if self.of(*outcome) > 0 {
                // Writing to a string cannot fail.
                let _ = write!(text, " · {} {}", outcome.label(), number(self.of(*outcome)));
            }
        }
        text
    }

    /// Every outcome with its number, and `lines`.
    pub fn to_json(&self) -> String {
        let counts = Outcome::ALL.iter().map(|outcome| (outcome.key().to_owned(), Value::from(self.of(*outcome))));
        let mut object: Map<String, Value> = counts.collect();
        object.insert("lines".to_owned(), self.lines().into());
        Value::Object(object).to_string()
    }
}

/// Bad lines that are described one by one; further ones are only counted.
const COMPLAINTS_MAX: u64 = 20;

/// The tally, and the voice that names bad lines.
pub struct Report<'a> {
    /// So far.
    pub tally: Tally,
    say: &'a mut dyn FnMut(&str),
    complaints: u64,
}

impl<'a> Report<'a> {
    /// Nothing counted yet; `say` gets what a person should read, a line at a time.
    pub fn new(say: &'a mut dyn FnMut(&str)) -> Report<'a> {
        Report { tally: Tally::default(), say, complaints: 0 }
    }

    /// Counts a line, and names it if it is a bad one.
    pub fn add(&mut self, line: u64, outcome: Outcome, reason: &str) {
        self.tally.add(outcome);
        if !outcome.is_bad() {
            return;
        }
        self.complaints += 1;
        if self.complaints <= COMPLAINTS_MAX {
            (self.say)(&format!("line {line}: {reason}"));
        } else if self.complaints == COMPLAINTS_MAX + 1 {
            (self.say)("further bad lines are only counted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each outcome has its own place, name and key.
    #[test]
    fn every_outcome_is_counted_under_its_own_name() {
        let mut tally = Tally::default();
        for (at, outcome) in Outcome::ALL.iter().enumerate() {
            (0..=at).for_each(|_| tally.add(*outcome));
        }
        assert_eq!(
            tally.for_people(),
            "imported 1 · already stored 2 · superseded 3 · deleted by their authors 4 · of authors who asked to \
             vanish 5 · expired 6 · ephemeral (not stored) 7 · unreadable 8 · invalid 9 · too large 10 · refused 11"
        );
        let json: Value = serde_json::from_str(&tally.to_json()).expect("valid JSON");
        assert_eq!((&json["already_stored"], &json["refused"], &json["lines"]), (&2.into(), &11.into(), &66.into()));
        assert_eq!(json.as_object().map(Map::len), Some(12));
    }

    /// Outcomes that did not happen are left out, but the number of imported events is always told.
    #[test]
    fn what_did_not_happen_is_left_out() {
        let mut tally = Tally::default();
        assert_eq!(tally.for_people(), "imported 0");
        (0..2_520).for_each(|_| tally.add(Outcome::Superseded));
        assert_eq!(tally.for_people(), "imported 0 · superseded 2,520");
    }

    /// Twenty bad lines are named, then it is said that no more will be; good ones never are.
    #[test]
    fn bad_lines_are_named_up_to_a_bound() {
        let mut said = Vec::new();
        let mut say = |text: &str| said.push(text.to_owned());
        let mut report = Report::new(&mut say);
        for line in 1..=60 {
            report.add(line, if line % 2 == 0 { Outcome::Invalid } else { Outcome::Deleted }, "why");
        }
        assert_eq!(report.tally.lines(), 60);
        assert_eq!(said.len(), 21);
        assert_eq!((said[0].as_str(), said[19].as_str()), ("line 2: why", "line 40: why"));
    }
}
