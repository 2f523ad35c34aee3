//! Training data: texts that people give, what others think of them, and what became of them.
//!
//! In: verified events of kinds 1, 1985 and 30383 with our label, and deletion requests. Out: contributions with their
//! ratings and status. All of it is a growing set of facts and withdrawals, so the order of arrival plays no part.

mod op;
mod read;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use op::TrainingOp;

use super::chat::{HeadView, Message};

use super::draft::{Deletion, Draft, Op};
use super::shape::{AGGREGATE, CONTRIBUTION, LABEL};
use super::slots::Deletions;
use crate::protocol::supersede::Version;
use crate::protocol::{Event, EventId, Kind, PublicKey};

/// The label namespace of ratings and statuses.
pub const REPUTATION: &str = "onyx.reputation";
/// The `t` tag of contributions.
pub const TOPIC: &str = "training";

/// How good a text is: 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Quality(u8);

impl Quality {
    /// From 70 on a rating is labelled high, from 40 on medium, below that low.
    const HIGH: u8 = 70;
    const MEDIUM: u8 = 40;

    /// A number from 0 to 100.
    pub fn new(percent: u8) -> Option<Self> {
        (percent <= 100).then_some(Quality(percent))
    }

    /// The number.
    pub fn percent(self) -> u8 {
        self.0
    }

    fn label(self) -> &'static str {
        match self.0 {
            Self::HIGH.. => "quality-high",
            Self::MEDIUM.. => "quality-medium",
            _ => "quality-low",
        }
    }
}

impl TryFrom<u8> for Quality {
    type Error = &'static str;

    fn try_from(percent: u8) -> Result<Self, Self::Error> {
        Quality::new(percent).ok_or("a quality is a number from 0 to 100")
    }
}

impl From<Quality> for u8 {
    fn from(quality: Quality) -> u8 {
        quality.0
    }
}

/// What became of a contribution. Only ever goes up: of several marks the highest counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Nobody has decided.
    #[default]
    Pending,
    /// Not wanted.
    Rejected,
    /// Taken.
    Approved,
    /// Taken and paid for.
    Rewarded,
}

impl Status {
    const ALL: [Status; 4] = [Status::Pending, Status::Rejected, Status::Approved, Status::Rewarded];

    fn label(self) -> &'static str {
        match self {
            Status::Pending => "status-pending",
            Status::Rejected => "status-rejected",
            Status::Approved => "status-approved",
            Status::Rewarded => "status-rewarded",
        }
    }

    fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.label() == label)
    }
}

/// The consent of a person to give one text away, by the text itself: it serves for no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consent([u8; 32]);

impl Consent {
    /// The person was shown this text and agreed.
    pub fn to(text: &str) -> Self {
        Consent(sha256(text))
    }
}

/// Why a text is not given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotContributed {
    /// The consent is for another text.
    #[error("the consent is for another text")]
    OtherText,
    /// The chat's owner has not allowed it.
    #[error("the chat is not opened for training data (trainingOptIn)")]
    NoOptIn,
    /// The same text was given before.
    #[error("the same text was given before")]
    Repeated,
}

/// What goes with a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// The giver's own rating.
    pub quality: Option<Quality>,
    /// Under which license it may be used, as SPDX writes it.
    pub license: String,
    /// Who may read it.
    pub curators: Vec<PublicKey>,
}

fn sha256(text: &str) -> [u8; 32] {
    Sha256::digest(text).into()
}

/// A text that somebody gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contribution {
    /// Its event.
    pub id: EventId,
    /// Who gave it.
    pub author: PublicKey,
    /// Seconds since 1970.
    pub created_at: u64,
    /// The text.
    pub content: String,
    /// What goes with it.
    pub terms: Terms,
}

/// What one rater thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rating {
    version: Version,
    rater: PublicKey,
    quality: Quality,
}

/// What ratings come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aggregate {
    /// The mean.
    pub rank: Quality,
    /// How many ratings there are.
    pub ratings: u64,
}

/// All that is known about training data.
#[derive(Clone, Debug, Default)]
pub struct Training {
    contributions: BTreeMap<EventId, Contribution>,
    /// By target, then by the rating's id.
    ratings: BTreeMap<EventId, BTreeMap<EventId, Rating>>,
    /// By target: who marked it how. Kept by key, since who the operator is may be learnt later.
    marks: BTreeMap<EventId, BTreeMap<PublicKey, Status>>,
    /// By author and target.
    aggregates: BTreeMap<(PublicKey, EventId), (Version, Aggregate)>,
    deletions: Deletions,
}

/// Reading events.
impl Training {
    /// Takes a contribution, rating, mark or aggregate.
    ///
    /// # Errors
    /// What is wrong with the event, judged from the event alone.
    pub fn take(&mut self, event: &Event) -> Result<(), &'static str> {
        match event.kind {
            CONTRIBUTION => {
                let contribution = read::contribution(event)?;
                if !self.deletions.cover_event(event) {
                    self.contributions.insert(event.id, contribution);
                }
            }
            LABEL => self.take_label(event)?,
            AGGREGATE => self.take_aggregate(event)?,
            _ => return Err("training data is of kind 1, 1985 or 30383"),
        }
        Ok(())
    }

    fn take_label(&mut self, event: &Event) -> Result<(), &'static str> {
        let target = read::target(event)?;
        match read::label(event)? {
            read::Labelled::Status(status) => self.mark(target, event.pubkey, status),
            read::Labelled::Quality(quality) => {
                if !self.deletions.cover_event(event) {
                    let rating = Rating { version: Version::of(event), rater: event.pubkey, quality };
                    self.ratings.entry(target).or_default().insert(event.id, rating);
                }
            }
        }
        Ok(())
    }

    fn mark(&mut self, target: EventId, by: PublicKey, status: Status) {
        let mark = self.marks.entry(target).or_default().entry(by).or_default();
        *mark = status.max(*mark);
    }

    fn take_aggregate(&mut self, event: &Event) -> Result<(), &'static str> {
        let (target, aggregate) = read::aggregate(event)?;
        self.put_aggregate((event.pubkey, target), Version::of(event), aggregate);
        Ok(())
    }

    fn put_aggregate(&mut self, key: (PublicKey, EventId), version: Version, aggregate: Aggregate) {
        let have = self.aggregates.entry(key).or_insert((version, aggregate));
        if version.replaces(&have.0) {
            *have = (version, aggregate);
        }
    }

    /// Takes a deletion request. Whether it says anything new. What the operator marked is not undone by it.
    pub fn take_deletion(&mut self, request: &Event) -> bool {
        let news = self.deletions.take(request);
        if news.vanished {
            self.obey_all();
        }
        for id in &news.ids {
            self.obey(id);
        }
        !news.is_empty()
    }

    /// What this id names goes, if it was deleted by its author.
    fn obey(&mut self, id: &EventId) {
        let deletions = &self.deletions;
        if self.contributions.get(id).is_some_and(|given| deletions.covers(&given.author, id)) {
            self.contributions.remove(id);
        }
        self.ratings.retain(|_, ratings| {
            if ratings.get(id).is_some_and(|rating| deletions.covers(&rating.rater, id)) {
                ratings.remove(id);
            }
            !ratings.is_empty()
        });
    }

    fn obey_all(&mut self) {
        let deletions = &self.deletions;
        self.contributions.retain(|id, given| !deletions.cover(&given.author, id, given.created_at));
        for ratings in self.ratings.values_mut() {
            ratings.retain(|id, rating| !deletions.cover(&rating.rater, id, rating.version.created_at));
        }
        self.ratings.retain(|_, ratings| !ratings.is_empty());
    }

    /// Takes everything of another state, made from other events.
    pub fn merge(&mut self, other: Training) {
        self.deletions.merge(other.deletions);
        self.contributions.extend(other.contributions);
        for (target, ratings) in other.ratings {
            self.ratings.entry(target).or_default().extend(ratings);
        }
        for (target, marks) in other.marks {
            marks.into_iter().for_each(|(by, status)| self.mark(target, by, status));
        }
        for (key, (version, aggregate)) in other.aggregates {
            self.put_aggregate(key, version, aggregate);
        }
        self.obey_all();
    }
}

/// What there is to see.
impl Training {
    /// All contributions that were not withdrawn, by id.
    pub fn contributions(&self) -> impl Iterator<Item = &Contribution> {
        self.contributions.values()
    }

    /// One contribution.
    pub fn contribution(&self, id: &EventId) -> Option<&Contribution> {
        self.contributions.get(id)
    }

    /// What raters think of a contribution: the latest rating of each, then the one of the lowest id. What its author
    /// thinks does not count.
    pub fn ratings(&self, target: &EventId) -> BTreeMap<PublicKey, Quality> {
        let mut latest: BTreeMap<PublicKey, Rating> = BTreeMap::new();
        let author = self.contributions.get(target).map(|given| given.author);
        let all = self.ratings.get(target).into_iter().flat_map(BTreeMap::values);
        for rating in all.filter(|rating| Some(rating.rater) != author) {
            let have = latest.entry(rating.rater).or_insert(*rating);
            if rating.version.replaces(&have.version) {
                *have = *rating;
            }
        }
        latest.into_iter().map(|(rater, rating)| (rater, rating.quality)).collect()
    }

    /// What the ratings come to; none without ratings.
    pub fn aggregate(&self, target: &EventId) -> Option<Aggregate> {
        let ratings = self.ratings(target);
        let sum: u64 = ratings.values().map(|quality| u64::from(quality.percent())).sum();
        let count = ratings.len() as u64;
        let mean = (sum + count / 2).checked_div(count)?;
        Some(Aggregate { rank: Quality::new(u8::try_from(mean).ok()?)?, ratings: count })
    }

    /// What `by` has published about a contribution's ratings.
    pub fn published_aggregate(&self, by: &PublicKey, target: &EventId) -> Option<Aggregate> {
        self.aggregates.get(&(*by, *target)).map(|(_, aggregate)| *aggregate)
    }

    /// What became of a contribution, as the operator marked it.
    pub fn status(&self, operator: &PublicKey, target: &EventId) -> Status {
        self.marks.get(target).and_then(|marks| marks.get(operator)).copied().unwrap_or_default()
    }
}

/// Commands. Each gives what is to be dated and put into the outbox.
impl Training {
    /// Gives a text. `drafts` are those that wait already.
    ///
    /// # Errors
    /// [`NotContributed`].
    pub fn contribute<'d>(
        &self,
        me: &PublicKey,
        text: &str,
        terms: Terms,
        consent: Consent,
        drafts: impl IntoIterator<Item = &'d Draft>,
    ) -> Result<Op, NotContributed> {
        if consent != Consent::to(text) {
            return Err(NotContributed::OtherText);
        }
        let waits = |draft: &Draft| match &draft.op {
            Op::Training(TrainingOp::Contribute { content, .. }) => content == text,
            _ => false,
        };
        let given = self.contributions.values().any(|given| given.author == *me && given.content == text);
        if given || drafts.into_iter().any(waits) {
            return Err(NotContributed::Repeated);
        }
        Ok(Op::Training(TrainingOp::Contribute { content: text.to_owned(), terms }))
    }

    /// Gives a message of a chat. The chat must be opened for it, and the consent must be for this very text.
    ///
    /// # Errors
    /// [`NotContributed`].
    pub fn contribute_message<'d>(
        &self,
        head: &HeadView,
        message: &Message,
        terms: Terms,
        consent: Consent,
        drafts: impl IntoIterator<Item = &'d Draft>,
    ) -> Result<Op, NotContributed> {
        if !head.has_training_opt_in() {
            return Err(NotContributed::NoOptIn);
        }
        self.contribute(&message.author, &message.content, terms, consent, drafts)
    }

    /// Rates a contribution; `None` if it is not known or one's own.
    pub fn rate(&self, me: &PublicKey, target: &EventId, quality: Quality) -> Option<Op> {
        let given = self.contributions.get(target).filter(|given| given.author != *me)?;
        let before = self.ratings.get(target).into_iter().flat_map(BTreeMap::values).filter(|old| old.rater == *me);
        let after = before.map(|old| old.version.created_at).max();
        Some(Op::Training(TrainingOp::Rate { target: *target, author: given.author, quality, after }))
    }

    /// Marks what became of a contribution; `None` if it is not known or marked so high already.
    pub fn mark_as(&self, me: &PublicKey, target: &EventId, status: Status) -> Option<Op> {
        let given = self.contributions.get(target)?;
        let higher = status > self.status(me, target);
        higher.then_some(Op::Training(TrainingOp::Mark { target: *target, author: given.author, status }))
    }

    /// Publishes what the ratings of a contribution come to; `None` if there are none or it is published already.
    pub fn publish_aggregate(&self, me: &PublicKey, target: &EventId) -> Option<Op> {
        let (given, aggregate) = (self.contributions.get(target)?, self.aggregate(target)?);
        let published = self.aggregates.get(&(*me, *target));
        if published.is_some_and(|(_, old)| *old == aggregate) {
            return None;
        }
        let after = published.map(|(version, _)| version.created_at);
        let Aggregate { rank, ratings } = aggregate;
        Some(Op::Training(TrainingOp::Aggregate { target: *target, author: given.author, rank, ratings, after }))
    }

    /// Withdraws an own contribution; `None` if there is none.
    pub fn withdraw(&self, me: &PublicKey, target: &EventId) -> Option<Op> {
        let given = self.contributions.get(target).filter(|given| given.author == *me)?;
        Some(Op::Delete(Deletion {
            training: true,
            addresses: Vec::new(),
            ids: vec![*target],
            not_before: given.created_at,
            readers: given.terms.curators.clone(),
        }))
    }
}

/// Whether an event is of a kind that training data has.
pub(super) fn is_training_kind(kind: Kind) -> bool {
    kind == CONTRIBUTION || kind == LABEL || kind == AGGREGATE
}
