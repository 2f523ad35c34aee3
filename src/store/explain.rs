//! How a filter would be looked up, in words: for the log of slow queries and `sledge explain`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::estimate::Estimate;
use super::plan::{Plan, plan};
use crate::protocol::Filter;

/// How a store would look a filter's matches up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What the chosen index goes by; empty where the store does not say.
    pub index: String,
    /// Stretches of that index that are merged, each by a cursor of its own.
    pub stretches: usize,
    /// The indexes that were in question, the chosen one first, where a sample had to decide.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compared: Vec<Compared>,
}

/// An index that was in question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// What it goes by.
    pub index: String,
    /// Its stretches.
    pub stretches: usize,
    /// What a look-up in it is expected to take, microseconds; roughly.
    pub micros: u64,
}

impl Explanation {
    /// The plan, which is the same for every store that keeps something.
    pub fn of(filter: &Filter) -> Explanation {
        match plan(filter) {
            Plan::Nothing => Explanation { index: "nothing".to_owned(), ..Explanation::default() },
            Plan::Ids(ids) => Explanation { index: "id".to_owned(), stretches: ids.len(), ..Explanation::default() },
            Plan::Ranges(ranges) => Explanation {
                index: ranges.first().map_or("nothing", |range| range.index()).to_owned(),
                stretches: ranges.len(),
                compared: Vec::new(),
            },
        }
    }

    /// The plan where a sample has decided, if it had to.
    pub fn estimated(filter: &Filter, estimates: &[Estimate<'_>]) -> Explanation {
        let compared = estimates.iter().map(|estimate| Compared {
            index: estimate.stretches.first().map_or("nothing", |stretch| stretch.index()).to_owned(),
            stretches: estimate.stretches.len(),
            micros: estimate.micros as u64,
        });
        let compared: Vec<Compared> = compared.collect();
        match compared.first() {
            None => Explanation::of(filter),
            Some(chosen) => Explanation { index: chosen.index.clone(), stretches: chosen.stretches, compared },
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.index.as_str(), self.stretches) {
            ("", _) => f.write_str("this store does not say"),
            ("nothing", _) => f.write_str("nothing can match"),
            (index, 1) => write!(f, "by {index}, in one stretch"),
            (index, stretches) => write!(f, "by {index}, {stretches} stretches merged"),
        }?;
        for (at, Compared { index, stretches, micros }) in self.compared.iter().enumerate() {
            match at {
                0 => write!(f, " (estimated {micros} µs")?,
                _ => write!(f, "; by {index}, {stretches} stretches: {micros} µs")?,
            }
        }
        if self.compared.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line an index.
    #[test]
    fn plans_are_told_in_words() {
        let hex = "ab".repeat(32);
        for (filter, expected) in [
            ("{}".to_owned(), "by time, in one stretch"),
            ("{\"kinds\":[]}".to_owned(), "nothing can match"),
            ("{\"kinds\":[1,2]}".to_owned(), "by kind, 2 stretches merged"),
            (format!("{{\"ids\":[\"{hex}\"]}}"), "by id, in one stretch"),
            (format!("{{\"authors\":[\"{hex}\"]}}"), "by author, in one stretch"),
            (format!("{{\"authors\":[\"{hex}\"],\"kinds\":[1,3]}}"), "by author and kind, 2 stretches merged"),
            ("{\"#t\":[\"x\"]}".to_owned(), "by tag, in one stretch"),
        ] {
            let filter = Filter::from_json(&filter).expect("good");
            assert_eq!(Explanation::of(&filter).to_string(), expected);
        }
        assert_eq!(Explanation::default().to_string(), "this store does not say");
    }

    /// Where a sample has decided, the others and their price are told.
    #[test]
    fn what_was_compared_is_told() {
        use crate::protocol::Kind;
        use crate::store::plan::Stretch;
        let filter = Filter::from_json("{\"kinds\":[1],\"#t\":[\"x\",\"y\"]}").expect("good");
        let estimates = [(vec![Stretch::Kind(Kind(1))], 80.5), (vec![Stretch::Time; 2], 900.0)];
        let estimates = estimates.map(|(stretches, micros)| Estimate { stretches, micros });
        let told = Explanation::estimated(&filter, &estimates).to_string();
        assert_eq!(told, "by kind, in one stretch (estimated 80 µs; by time, 2 stretches: 900 µs)");
        assert_eq!(Explanation::estimated(&filter, &[]), Explanation::of(&filter));
    }
}
