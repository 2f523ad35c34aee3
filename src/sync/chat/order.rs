//! The order of a chat's messages: each after those it follows; what does not follow one another by stamp and id.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use super::message::Message;
use crate::sync::clock::Hlc;

/// A message in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed<'m> {
    /// The message.
    pub message: &'m Message,
    /// It does not follow the message before it: the two were written without knowing of each other. Both are kept.
    pub branch: bool,
}

/// Orders messages topologically over the parents that are present, ties by (stamp, id). The same for the same set of
/// messages. Parents in a circle, which only a broken writer makes, are cut at the earliest stamp.
pub fn order<'m>(messages: impl IntoIterator<Item = &'m Message>) -> Vec<Placed<'m>> {
    let by_id: BTreeMap<&str, &Message> = messages.into_iter().map(|message| (message.id.as_str(), message)).collect();
    let mut waits_for: BTreeMap<&str, usize> = BTreeMap::new();
    let mut children: BTreeMap<&str, Vec<&Message>> = BTreeMap::new();
    for message in by_id.values() {
        let parents = present_parents(message, &by_id);
        waits_for.insert(&message.id, parents.len());
        parents.into_iter().for_each(|parent| children.entry(parent).or_default().push(message));
    }
    let key = |message: &'m Message| Reverse((message.stamp, message.id.as_str()));
    let mut ready: BinaryHeap<Reverse<(Hlc, &str)>> = BinaryHeap::new();
    ready.extend(by_id.values().filter(|message| waits_for[message.id.as_str()] == 0).map(|message| key(message)));
    // Those that wait, by stamp, for when only circles are left.
    let mut left: BTreeSet<(Hlc, &str)> = by_id.values().map(|message| (message.stamp, message.id.as_str())).collect();
    let mut placed: Vec<Placed> = Vec::with_capacity(by_id.len());
    while let Some(first) = left.first().copied() {
        let Reverse(next) = ready.pop().unwrap_or(Reverse(first));
        if !left.remove(&next) {
            // Cut out of a circle before; its turn has been.
            continue;
        }
        let message = by_id[next.1];
        placed.push(Placed { message, branch: is_branch(message, placed.last(), &by_id) });
        for child in children.get(next.1).into_iter().flatten() {
            let waits = waits_for.get_mut(child.id.as_str()).expect("every message has its count");
            *waits = waits.saturating_sub(1);
            if *waits == 0 {
                ready.push(key(child));
            }
        }
    }
    placed
}

/// The ids that nothing follows yet: the parents of the next message.
pub fn tips<'m>(messages: impl IntoIterator<Item = &'m Message>) -> Vec<String> {
    let messages: Vec<&Message> = messages.into_iter().collect();
    let followed: BTreeSet<&str> =
        messages.iter().flat_map(|message| message.parents.iter().map(String::as_str)).collect();
    let tips = messages.iter().filter(|message| !followed.contains(message.id.as_str()));
    let mut tips: Vec<(Hlc, &str)> = tips.map(|message| (message.stamp, message.id.as_str())).collect();
    // The latest, if there are too many to name: what they follow is not lost, only the join of old branches.
    tips.sort_by(|a, b| b.cmp(a));
    tips.truncate(super::message::PARENTS_MAX);
    tips.into_iter().map(|(_, id)| id.to_owned()).collect()
}

fn present_parents<'m>(message: &'m Message, by_id: &BTreeMap<&'m str, &'m Message>) -> BTreeSet<&'m str> {
    let parents = message.parents.iter().map(String::as_str);
    parents.filter(|parent| *parent != message.id && by_id.contains_key(parent)).collect()
}

/// A message whose parents were all deleted follows on as well as can be told.
fn is_branch(message: &Message, before: Option<&Placed>, by_id: &BTreeMap<&str, &Message>) -> bool {
    let Some(before) = before else { return false };
    let parents = present_parents(message, by_id);
    match (message.parents.is_empty(), parents.is_empty()) {
        (true, _) => true,
        (false, true) => false,
        (false, false) => !parents.contains(before.message.id.as_str()),
    }
}
