//! A write that is not an event yet: dated for now, neither encrypted nor signed.

use serde::{Deserialize, Serialize};

use super::clock::Written;

/// A dated command, as it waits in the outbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Draft {
    /// When it was written.
    pub written: Written,
    /// What is to be said.
    pub op: Op,
}

impl Draft {
    /// Drafts of the same key are told by one event that says them all.
    pub fn merge_key(&self) -> Option<String> {
        match &self.op {
            Op::Plain(_) => None,
        }
    }
}

/// What is to be said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Any event that is none of ours.
    Plain(Plain),
}

/// An event of any kind, in the clear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plain {
    /// Its kind.
    pub kind: u16,
    /// Its tags.
    pub tags: Vec<Vec<String>>,
    /// Its content.
    pub content: String,
}
