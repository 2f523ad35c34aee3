//! How a filter would be looked up, in words: for the log of slow queries and `sledge explain`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::plan::{Plan, plan};
use crate::protocol::Filter;

/// How a store would look a filter's matches up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What the chosen index goes by; empty where the store does not say.
    pub index: String,
    /// Stretches of that index that are merged, each by a cursor of its own.
    pub stretches: usize,
}

impl Explanation {
    /// The plan, which is the same for every store that keeps something.
    pub fn of(filter: &Filter) -> Explanation {
        match plan(filter) {
            Plan::Nothing => Explanation { index: "nothing".to_owned(), stretches: 0 },
            Plan::Ids(ids) => Explanation { index: "id".to_owned(), stretches: ids.len() },
            Plan::Ranges(ranges) => Explanation {
                index: ranges.first().map_or("nothing", |range| range.index()).to_owned(),
                stretches: ranges.len(),
            },
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
        }
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
}
