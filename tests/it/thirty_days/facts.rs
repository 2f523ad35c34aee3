//! What is true at the end, by the book: every write that was acknowledged, and which of several counts.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// One acknowledged write: what it is about, when it was made by the true clock, and the value; none for a deletion.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fact(pub String, pub u64, pub Option<String>);

impl Fact {
    pub fn message(chat: &str, message: &str, at_ms: u64, text: Option<&str>) -> Fact {
        Fact(format!("message {chat}/{message}"), at_ms, text.map(str::to_owned))
    }

    pub fn title(chat: &str, at_ms: u64, title: Option<&str>) -> Fact {
        Fact(format!("title {chat}"), at_ms, title.map(str::to_owned))
    }

    pub fn setting(name: &str, at_ms: u64, value: &str) -> Fact {
        Fact(format!("setting {name}"), at_ms, Some(value.to_owned()))
    }

    pub fn training(text: &str, at_ms: u64) -> Fact {
        Fact(format!("training {text}"), at_ms, Some(String::new()))
    }

    pub fn note(text: &str, at_ms: u64) -> Fact {
        Fact(format!("note {text}"), at_ms, Some(String::new()))
    }
}

/// What a device shows, or is to show: a value a thing.
pub type Shown = BTreeMap<String, String>;

/// The latest write of each thing counts, whichever device made it.
pub fn shown(facts: impl IntoIterator<Item = Fact>) -> Shown {
    let mut latest: BTreeMap<String, (u64, Option<String>)> = BTreeMap::new();
    for Fact(what, at_ms, value) in facts {
        let known = latest.entry(what).or_default();
        if at_ms >= known.0 {
            *known = (at_ms, value);
        }
    }
    latest.into_iter().filter_map(|(what, (_, value))| Some((what, value?))).collect()
}

/// The facts in a file, one a line.
pub fn read(file: &Path) -> Vec<Fact> {
    let text = std::fs::read_to_string(file).expect("a readable file");
    text.lines().map(|line| serde_json::from_str(line).expect("a fact a line")).collect()
}

/// Facts as lines of a file.
pub fn lines(facts: &[Fact]) -> String {
    facts.iter().map(|fact| serde_json::to_string(fact).expect("strings and numbers") + "\n").collect()
}
