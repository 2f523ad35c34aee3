//! What is said about training data, as events.

use serde::{Deserialize, Serialize};

use super::{Quality, REPUTATION, Status, TOPIC, Terms, sha256};
use crate::protocol::{EventId, PublicKey};
use crate::sync::clock::Hlc;
use crate::sync::shape::{AGGREGATE, CONTRIBUTION, LABEL, Schema, Unsigned, tag};

/// Something to say about training data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrainingOp {
    /// Give a text.
    Contribute {
        /// The text.
        content: String,
        /// What goes with it.
        terms: Terms,
    },
    /// Rate a contribution.
    Rate {
        /// The contribution.
        target: EventId,
        /// Who gave it.
        author: PublicKey,
        /// The rating.
        quality: Quality,
        /// The `created_at` of the rater's earlier rating, which this one replaces.
        after: Option<u64>,
    },
    /// Mark what became of a contribution; counts only by the operator's key.
    Mark {
        /// The contribution.
        target: EventId,
        /// Who gave it.
        author: PublicKey,
        /// What became of it.
        status: Status,
    },
    /// Publish what the ratings come to.
    Aggregate {
        /// The contribution.
        target: EventId,
        /// Who gave it.
        author: PublicKey,
        /// The mean of the ratings.
        rank: Quality,
        /// How many there are.
        ratings: u64,
        /// The `created_at` of the aggregate before it.
        after: Option<u64>,
    },
}

impl TrainingOp {
    /// The event, dated `stamp`.
    pub fn build(&self, stamp: Hlc) -> Unsigned {
        let later = |after: &Option<u64>| after.map_or(0, |seen| seen.saturating_add(1)).max(stamp.second());
        let (kind, created_at, content, mut tags) = match self {
            TrainingOp::Contribute { content, terms } => {
                (CONTRIBUTION, stamp.second(), content.clone(), contribution_tags(content, terms))
            }
            TrainingOp::Rate { target, author, quality, after } => {
                let mut tags = label_tags(quality.label(), target, author);
                tags.push(tag(["quality", &quality.percent().to_string()]));
                (LABEL, later(after), String::new(), tags)
            }
            TrainingOp::Mark { target, author, status } => {
                (LABEL, stamp.second(), String::new(), label_tags(status.label(), target, author))
            }
            TrainingOp::Aggregate { target, author, rank, ratings, after } => {
                let tags = vec![
                    tag(["d", &target.to_hex()]),
                    tag(["rank", &rank.percent().to_string()]),
                    tag(["rating_cnt", &ratings.to_string()]),
                    tag(["p", &author.to_hex()]),
                ];
                (AGGREGATE, later(after), String::new(), tags)
            }
        };
        tags.extend(Schema::Training.tags());
        Unsigned { kind, created_at, tags, content }
    }
}

fn contribution_tags(content: &str, terms: &Terms) -> Vec<Vec<String>> {
    let mut tags = vec![tag(["t", TOPIC]), tag(["license", &terms.license])];
    tags.extend(terms.quality.map(|quality| tag(["quality", &quality.percent().to_string()])));
    tags.push(tag(["x", &faster_hex::hex_string(&sha256(content))]));
    tags.extend(terms.curators.iter().map(|curator| tag(["p", &curator.to_hex()])));
    tags
}

fn label_tags(label: &str, target: &EventId, author: &PublicKey) -> Vec<Vec<String>> {
    vec![
        tag(["L", REPUTATION]),
        tag(["l", label, REPUTATION]),
        tag(["e", &target.to_hex()]),
        tag(["p", &author.to_hex()]),
        tag(["k", &CONTRIBUTION.to_string()]),
    ]
}
