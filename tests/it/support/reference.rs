//! The rules of the NIPs, written down as plainly as possible and as slowly as they like: what the stores are
//! compared with. Shares no code with `protocol::supersede`.

use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, EventId, Kind, PublicKey};
use sledge::store::Wanted;

/// A store as a list. A deletion request or request to vanish is in force as long as it is in the list.
#[derive(Default)]
pub struct Reference {
    stored: Vec<Event>,
    /// Versions that were deleted by id. What they replaced, or would have, stays away.
    deleted: Vec<Event>,
}

impl Reference {
    pub fn new() -> Reference {
        Reference::default()
    }

    /// Judges and stores one event.
    pub fn apply(&mut self, event: &Event, now: u64) -> Verdict {
        let verdict = self.judge(event, now);
        if verdict == Verdict::Deleted && self.stored.iter().any(|request| deletes_by_id(request, event)) {
            self.deleted.push(event.clone());
            self.stored.retain(|old| !same_slot(old, event) || wins(old, event));
        }
        if verdict == Verdict::Store {
            self.deleted.extend(self.stored.iter().filter(|old| deletes_by_id(event, old)).cloned());
            self.stored.retain(|old| !same_slot(old, event) && !reaches(event, old));
            self.stored.push(event.clone());
        }
        verdict
    }

    fn judge(&self, event: &Event, now: u64) -> Verdict {
        let reached_by = |kind| self.stored.iter().any(|request| request.kind == kind && reaches(request, event));
        if self.stored.iter().any(|old| old.id == event.id) {
            Verdict::Duplicate
        } else if reached_by(Kind::VANISH) {
            Verdict::Vanished
        } else if reached_by(Kind::DELETION)
            || self.deleted.iter().any(|old| same_slot(old, event) && !wins(event, old))
        {
            Verdict::Deleted
        } else if expires(event).is_some_and(|at| at <= now) {
            Verdict::Expired
        } else if self.stored.iter().any(|old| same_slot(old, event) && wins(old, event)) {
            Verdict::Superseded
        } else {
            Verdict::Store
        }
    }

    /// Takes out by id, as an operator does; how many were there.
    pub fn remove(&mut self, ids: &[EventId]) -> u64 {
        let before = self.stored.len();
        self.stored.retain(|event| !ids.contains(&event.id));
        (before - self.stored.len()) as u64
    }

    /// Takes out what has expired; how many those were.
    pub fn sweep(&mut self, now: u64) -> usize {
        let before = self.stored.len();
        self.stored.retain(|event| expires(event).is_none_or(|at| at > now));
        before - self.stored.len()
    }

    /// What can be read, newest first, then by id.
    pub fn visible(&self, now: u64) -> Vec<&Event> {
        let mut events: Vec<&Event> =
            self.stored.iter().filter(|event| expires(event).is_none_or(|at| at > now)).collect();
        events.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id)));
        events
    }

    /// What the union of `wanted` gives: of each its newest `limit`, together newest first, without repeats.
    pub fn query(&self, wanted: &[Wanted], now: u64) -> Vec<&Event> {
        let visible = self.visible(now);
        let mut chosen = Vec::new();
        // The second at which a limit of the relay's ends the answer.
        let mut ends_at = 0;
        for Wanted { filter, limit, whole_seconds } in wanted {
            let matching: Vec<&Event> = visible.iter().copied().filter(|event| filter.matches(*event)).collect();
            let (newest, rest) = matching.split_at(matching.len().min(*limit));
            chosen.extend(newest.iter().map(|event| event.id));
            if let (true, Some(last)) = (whole_seconds, newest.last()) {
                let same_second = rest.iter().take_while(|event| event.created_at == last.created_at);
                let same_second: Vec<_> = same_second.map(|event| event.id).collect();
                if same_second.len() < rest.len() {
                    ends_at = ends_at.max(last.created_at);
                }
                chosen.extend(same_second);
            }
        }
        visible.into_iter().filter(|event| chosen.contains(&event.id) && event.created_at >= ends_at).collect()
    }

    /// All that match any of `wanted`, limits aside, newest first.
    pub fn matching(&self, wanted: &[Wanted], now: u64) -> Vec<&Event> {
        let matches = |event: &&Event| wanted.iter().any(|wanted| wanted.filter.matches(*event));
        self.visible(now).into_iter().filter(matches).collect()
    }
}

/// Is `request` a deletion request or a request to vanish that reaches `event`? Requests to vanish are bookkeeping and
/// stay (NIP-62); one that names another relay does not get as far as a store.
fn reaches(request: &Event, event: &Event) -> bool {
    if request.kind != Kind::DELETION && request.kind != Kind::VANISH {
        return false;
    }
    let by_author = request.pubkey == event.pubkey;
    let by_recipient = event.kind == Kind::GIFT_WRAP && names(event, &request.pubkey);
    if request.kind == Kind::VANISH {
        let covered = event.created_at <= request.created_at && (by_author || by_recipient);
        return covered && event.kind != Kind::VANISH;
    }
    if event.kind == Kind::DELETION || event.kind == Kind::VANISH {
        return false;
    }
    let by_address = by_author
        && event.created_at <= request.created_at
        && slot(event).is_some_and(|slot| tag_values(request, "a").any(|named| named == slot));
    deletes_by_id(request, event) || by_address
}

/// Is `request` a deletion request that reaches `event` by its id?
fn deletes_by_id(request: &Event, event: &Event) -> bool {
    let deletable = event.kind != Kind::DELETION && event.kind != Kind::VANISH;
    let by_author = request.pubkey == event.pubkey;
    let by_recipient = event.kind == Kind::GIFT_WRAP && names(event, &request.pubkey);
    let id = event.id.to_hex();
    let named = tag_values(request, "e").any(|named| named == id);
    request.kind == Kind::DELETION && deletable && (by_author || by_recipient) && named
}

fn names(event: &Event, key: &PublicKey) -> bool {
    tag_values(event, "p").any(|named| named == key.to_hex())
}

/// The address as an `a` tag writes it.
fn slot(event: &Event) -> Option<String> {
    match event.kind.0 {
        0 | 3 | 10_000..=19_999 => Some(format!("{}:{}:", event.kind, event.pubkey)),
        30_000..=39_999 => {
            let first = event.tags.iter().find(|tag| tag.name() == "d");
            let d = first.and_then(|tag| tag.value()).unwrap_or_default();
            Some(format!("{}:{}:{d}", event.kind, event.pubkey))
        }
        _ => None,
    }
}

fn same_slot(a: &Event, b: &Event) -> bool {
    slot(a).is_some() && slot(a) == slot(b)
}

fn wins(a: &Event, b: &Event) -> bool {
    a.created_at > b.created_at || (a.created_at == b.created_at && a.id < b.id)
}

fn expires(event: &Event) -> Option<u64> {
    tag_values(event, "expiration").find_map(|value| value.parse().ok())
}

fn tag_values<'e>(event: &'e Event, name: &'e str) -> impl Iterator<Item = &'e str> {
    event.tags.iter().filter(move |tag| tag.name() == name).filter_map(|tag| tag.value())
}
