//! The rules of the NIPs, written down as plainly as possible and as slowly as they like: what the stores are
//! compared with. Shares no code with `protocol::supersede`.

use sledge::protocol::supersede::Verdict;
use sledge::protocol::{Event, Filter, Kind, PublicKey};

/// A store as a list.
#[derive(Default)]
pub struct Reference {
    service_url: String,
    stored: Vec<Event>,
    /// Every deletion request and request to vanish that was ever accepted: they stay in force.
    requests: Vec<Event>,
}

impl Reference {
    pub fn new(service_url: &str) -> Reference {
        Reference { service_url: service_url.to_owned(), ..Reference::default() }
    }

    /// Judges and stores one event.
    pub fn apply(&mut self, event: &Event, now: u64) -> Verdict {
        let verdict = self.judge(event, now);
        if verdict == Verdict::Store {
            self.stored.retain(|old| !same_slot(old, event) && !self_deletes(event, old, &self.service_url));
            self.stored.push(event.clone());
            if event.kind == Kind::DELETION || event.kind == Kind::VANISH {
                self.requests.push(event.clone());
            }
        }
        verdict
    }

    fn judge(&self, event: &Event, now: u64) -> Verdict {
        let vanished = |request: &Event| request.kind == Kind::VANISH && reaches(request, event, &self.service_url);
        let deleted = |request: &Event| request.kind == Kind::DELETION && reaches(request, event, &self.service_url);
        if self.stored.iter().any(|old| old.id == event.id) {
            Verdict::Duplicate
        } else if self.requests.iter().any(vanished) {
            Verdict::Vanished
        } else if self.requests.iter().any(deleted) {
            Verdict::Deleted
        } else if expires(event).is_some_and(|at| at <= now) {
            Verdict::Expired
        } else if self.stored.iter().any(|old| same_slot(old, event) && wins(old, event)) {
            Verdict::Superseded
        } else {
            Verdict::Store
        }
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

    /// What the union of `filters` gives: of each its newest `limit`, together newest first, without repeats.
    pub fn query(&self, filters: &[(Filter, usize)], now: u64) -> Vec<&Event> {
        let visible = self.visible(now);
        let newest = |(filter, limit): &(Filter, usize)| {
            let matching = visible.iter().copied().filter(|event| filter.matches(*event));
            matching.take(*limit).map(|event| event.id).collect::<Vec<_>>()
        };
        let wanted: Vec<_> = filters.iter().flat_map(newest).collect();
        visible.into_iter().filter(|event| wanted.contains(&event.id)).collect()
    }

    /// How many match any of `filters`.
    pub fn count(&self, filters: &[(Filter, usize)], now: u64) -> u64 {
        let matches = |event: &&Event| filters.iter().any(|(filter, _)| filter.matches(*event));
        self.visible(now).into_iter().filter(matches).count() as u64
    }
}

/// Does `old` leave because `new` was stored?
fn self_deletes(new: &Event, old: &Event, service_url: &str) -> bool {
    (new.kind == Kind::DELETION || new.kind == Kind::VANISH) && reaches(new, old, service_url)
}

/// Does a deletion request or a request to vanish reach `event`?
fn reaches(request: &Event, event: &Event, service_url: &str) -> bool {
    let by_author = request.pubkey == event.pubkey;
    let by_recipient = event.kind == Kind::GIFT_WRAP && names(event, &request.pubkey);
    if request.kind == Kind::VANISH {
        let here = tag_values(request, "relay").any(|url| url == "ALL_RELAYS" || url == service_url);
        return here && event.kind != Kind::VANISH && event.created_at <= request.created_at && (by_author || by_recipient);
    }
    if event.kind == Kind::DELETION || event.kind == Kind::VANISH {
        return false;
    }
    let id = event.id.to_hex();
    let by_id = (by_author || by_recipient) && tag_values(request, "e").any(|named| named == id);
    let by_address = by_author
        && event.created_at <= request.created_at
        && slot(event).is_some_and(|slot| tag_values(request, "a").any(|named| named == slot));
    by_id || by_address
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
