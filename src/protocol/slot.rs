//! The settings slot: versions of an app's settings on kind 10001, beside the pinned notes of NIP-51 that have the same
//! kind.
//!
//! An event of kind 10001 with our label is a *version*. It replaces nothing by being newer: it names in `prev` tags the
//! versions that its writer had merged into it. Those that no kept version names are the *heads*, of which there is more
//! than one when devices wrote without knowing of each other; the others are *former* ones. No order of arrival makes a
//! difference, and nothing is refused for being late.
//!
//! Versions are apart from everything else of that kind: a pinned-notes list neither replaces them nor is replaced, and
//! only a filter that names our label, or ids, sees them. Pure; stores keep to it.

use std::collections::HashSet;

use super::event::Fields;
use super::label;
use super::tag::TagLetter;
use super::{Event, EventId, Filter, Kind};

/// The kind of settings.
pub const KIND: Kind = Kind(10_001);

/// Heads that are kept; more devices than that hardly write before they read.
pub const HEADS_MAX: usize = 16;
/// Former versions that are kept.
pub const FORMER_MAX: usize = 32;
/// How long former versions are kept, by their own date.
pub const FORMER_SECS_MAX: u64 = 30 * 24 * 60 * 60;
/// `prev` tags that count in one version: more heads are never kept.
const PREV_MAX: usize = 4 * HEADS_MAX;

/// Whether an event is a version of settings.
pub fn is_version(event: &impl Fields) -> bool {
    event.kind() == KIND && label::is_labelled(event)
}

/// Whether a filter asks for settings: it names our label, or ids. Every other filter is NIP-51's.
pub fn is_asked_for(filter: &Filter) -> bool {
    let mut of_label = filter.tags.iter().filter(|condition| condition.letter == TagLetter::LABEL_NAMESPACE);
    filter.ids.is_some() || of_label.any(|condition| condition.values.iter().any(|value| **value == *label::NAMESPACE))
}

/// One kept version of an author's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The event.
    pub id: EventId,
    /// When its author says it was made.
    pub created_at: u64,
    /// The versions that it has taken in.
    prev: Vec<EventId>,
}

impl Version {
    /// The version that an event is.
    pub fn of(event: &Event) -> Version {
        let prev = event.tags.values("prev").filter_map(EventId::from_hex).take(PREV_MAX).collect();
        Version { id: event.id, created_at: event.created_at, prev }
    }
}

/// Where a version stands that comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// No kept version names it.
    Head,
    /// A kept version has taken it in.
    Former,
    /// There are enough newer ones of its sort: it is not kept.
    Surplus,
}

/// All versions of one author's settings.
#[derive(Clone, Debug, Default)]
pub struct Slot(Vec<Version>);

impl Slot {
    /// The slot with these versions, in any order.
    pub fn new(versions: Vec<Version>) -> Slot {
        Slot(versions)
    }

    /// The versions that another one names.
    pub fn former(&self) -> HashSet<EventId> {
        let named: HashSet<EventId> = self.0.iter().flat_map(|version| version.prev.iter().copied()).collect();
        self.0.iter().map(|version| version.id).filter(|id| named.contains(id)).collect()
    }

    /// Where `version` stands once it is among these, and which versions are not kept then.
    pub fn with(mut self, version: Version, now: u64) -> (Rank, HashSet<EventId>) {
        let id = version.id;
        self.0.push(version);
        let former = self.former();
        let gone = self.surplus(&former, now);
        let rank = match (gone.contains(&id), former.contains(&id)) {
            (true, _) => Rank::Surplus,
            (false, true) => Rank::Former,
            (false, false) => Rank::Head,
        };
        (rank, gone)
    }

    /// What is beyond the bounds, the oldest first, and with it what only that had taken in: a former version must not
    /// become a head again because the one that named it is gone.
    fn surplus(&mut self, former: &HashSet<EventId>, now: u64) -> HashSet<EventId> {
        self.0.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
        let (old, heads): (Vec<&Version>, Vec<&Version>) =
            self.0.iter().partition(|version| former.contains(&version.id));
        let outdated = |version: &&&Version| version.created_at < now.saturating_sub(FORMER_SECS_MAX);
        let beyond = heads.iter().skip(HEADS_MAX).chain(old.iter().skip(FORMER_MAX)).chain(old.iter().filter(outdated));
        let mut gone: HashSet<EventId> = beyond.map(|version| version.id).collect();
        loop {
            let kept = self.0.iter().filter(|version| !gone.contains(&version.id));
            let named: HashSet<EventId> = kept.flat_map(|version| version.prev.iter().copied()).collect();
            let before = gone.len();
            gone.extend(former.iter().filter(|id| !named.contains(id)));
            if gone.len() == before {
                return gone;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::testing::Author;

    fn version(id: u8, created_at: u64, prev: &[u8]) -> Version {
        Version { id: EventId([id; 32]), created_at, prev: prev.iter().map(|id| EventId([*id; 32])).collect() }
    }

    fn add(versions: &[Version], version: Version) -> (Rank, Vec<u8>) {
        let (rank, gone) = Slot::new(versions.to_vec()).with(version, FORMER_SECS_MAX + 1_000);
        let mut gone: Vec<u8> = gone.into_iter().map(|id| id.0[0]).collect();
        gone.sort_unstable();
        (rank, gone)
    }

    /// A version is a head until another one names it, whichever comes first.
    #[test]
    fn who_is_named_is_former() {
        let (first, second) = (version(1, 1_010, &[]), version(2, 1_020, &[1]));
        assert_eq!(add(&[], first.clone()), (Rank::Head, vec![]));
        assert_eq!(add(std::slice::from_ref(&first), second.clone()), (Rank::Head, vec![]));
        assert_eq!(add(std::slice::from_ref(&second), first.clone()), (Rank::Former, vec![]));
        assert_eq!(
            add(std::slice::from_ref(&first), version(3, 1_020, &[])),
            (Rank::Head, vec![]),
            "a conflict: two heads"
        );
        let all = Slot::new(vec![first, second, version(3, 1_030, &[])]);
        assert_eq!(all.former(), HashSet::from([EventId([1; 32])]));
    }

    /// The oldest head beyond sixteen goes, also if it is the one that comes in; so do former versions beyond 32 and 30
    /// days.
    #[test]
    fn bounds() {
        let heads: Vec<Version> = (1..=16).map(|id| version(id, 1_000 + u64::from(id), &[])).collect();
        assert_eq!(add(&heads, version(99, 2_000, &[])), (Rank::Head, vec![1]));
        assert_eq!(add(&heads, version(99, 1_000, &[])), (Rank::Surplus, vec![99]));
        assert_eq!(add(&heads, version(99, 2_000, &[1, 2, 3])), (Rank::Head, vec![]));
        let chain: Vec<Version> = (1..=33).map(|id| version(id, 1_000 + u64::from(id), &[id - 1])).collect();
        assert_eq!(add(&chain, version(99, 2_000, &[33])), (Rank::Head, vec![1]));
        let old = [version(1, 999, &[]), version(2, 1_000, &[1])];
        assert_eq!(add(&old, version(3, 2_000, &[2])), (Rank::Head, vec![1]));
    }

    /// What goes takes along what only it had taken in, so that nothing former comes back.
    #[test]
    fn nothing_former_becomes_a_head_again() {
        // 2 is dated before 1, which it had taken in; it is the one beyond 30 days.
        let kept = [version(1, 1_500, &[]), version(2, 900, &[1])];
        assert_eq!(add(&kept, version(3, 2_000, &[2])), (Rank::Head, vec![1, 2]));
        assert_eq!(add(&kept, version(3, 2_000, &[1, 2])), (Rank::Head, vec![2]));
    }

    /// Our label makes the version; the label, or ids, make the question.
    #[test]
    fn versions_and_questions_are_told_by_the_label() {
        let author = Author::new(1);
        let labelled = [vec!["L", label::NAMESPACE]];
        assert!(is_version(&author.event(10_001, 1, &labelled, "")));
        assert!(!is_version(&author.event(10_001, 1, &[vec!["L", "other"]], "")));
        assert!(!is_version(&author.event(10_002, 1, &labelled, "")));
        let id = "ab".repeat(32);
        for (filter, expected) in [
            ("{}".to_owned(), false),
            (r#"{"kinds":[10001]}"#.to_owned(), false),
            (r##"{"#L":["other"]}"##.to_owned(), false),
            (format!(r##"{{"#L":["other","{}"]}}"##, label::NAMESPACE), true),
            (format!(r##"{{"#l":["{}"]}}"##, label::NAMESPACE), false),
            (format!(r#"{{"ids":["{id}"]}}"#), true),
        ] {
            assert_eq!(is_asked_for(&Filter::from_json(&filter).expect("good")), expected, "{filter}");
        }
    }
}
