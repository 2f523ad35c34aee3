//! Events that people have reported (NIP-56) and nobody has decided about yet.
//!
//! The queue is not kept: it is what the stored reports of kind 1984 name, less what was allowed, banned or is gone.
//! Nothing is done by itself, as NIP-56 advises: reports are easily gamed.

use std::collections::HashMap;

use super::decisions::Decisions;
use crate::protocol::{Event, EventId, Filter, Kind, PublicKey};
use crate::store::{Store, StoreError, for_each_match};

/// Reports that are looked at, the newest.
const REPORTS_MAX: u64 = 5_000;
/// Events that are listed.
const LISTED_MAX: usize = 1_000;
/// Characters of what somebody wrote that are repeated.
const ECHO_CHARS_MAX: usize = 200;

/// An event that waits for a decision.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Reported {
    /// Its id.
    pub id: EventId,
    /// What it is said to be, by how many, and what the last of them wrote.
    pub reason: String,
}

/// What one report says.
struct Report {
    what: String,
    by: PublicKey,
    text: String,
}

/// The reported events, the one reported last first. A report of a whole profile stands for itself, so that it can be decided
/// about as an event.
///
/// # Errors
/// When the store cannot be read.
pub fn queue(store: &dyn Store, decided: &Decisions) -> Result<Vec<Reported>, StoreError> {
    let filter = Filter { kinds: Some(vec![Kind::REPORT]), limit: Some(REPORTS_MAX), ..Filter::default() };
    let mut order = Vec::new();
    let mut reports: HashMap<EventId, Vec<Report>> = HashMap::new();
    for_each_match(store, vec![filter], |row| {
        let Some(event) = std::str::from_utf8(&row.json).ok().and_then(|json| Event::from_json(json).ok()) else {
            return Ok::<(), StoreError>(());
        };
        for (id, what) in targets(&event) {
            let known = reports.entry(id).or_insert_with(|| {
                order.push(id);
                Vec::new()
            });
            if !known.iter().any(|report| report.by == event.pubkey) {
                known.push(Report { what, by: event.pubkey, text: short(&event.content) });
            }
        }
        Ok(())
    })?;
    let mut queue = Vec::new();
    for id in order {
        let is_decided = decided.allowed_events.contains_key(&id) || decided.banned_events.contains_key(&id);
        if !is_decided && store.contains(&id)? {
            queue.push(Reported { id, reason: reason(&reports[&id]) });
        }
        if queue.len() == LISTED_MAX {
            break;
        }
    }
    Ok(queue)
}

/// The events that a report is about, each with what it is said to be.
fn targets(report: &Event) -> Vec<(EventId, String)> {
    let tags = |name: &'static str| report.tags.iter().filter(move |tag| tag.name() == name);
    let said = |tag: &crate::protocol::Tag<'_>| tag.get(2).map(short).filter(|what| !what.is_empty());
    let by_default = tags("p").chain(tags("x")).find_map(|tag| said(&tag));
    let events = tags("e").filter_map(|tag| Some((EventId::from_hex(tag.value()?)?, said(&tag))));
    let mut named: Vec<(EventId, String)> = events
        .map(|(id, what)| (id, what.or_else(|| by_default.clone()).unwrap_or_else(|| "other".to_owned())))
        .collect();
    if named.is_empty()
        && let Some(accused) = report.tags.values("p").find_map(PublicKey::from_hex)
    {
        let what = by_default.unwrap_or_else(|| "other".to_owned());
        named.push((report.id, format!("a report of the key {accused}: {what}")));
    }
    named
}

fn reason(reports: &[Report]) -> String {
    let mut kinds: Vec<&str> = reports.iter().map(|report| report.what.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds.truncate(5);
    let mut text = format!("{} (reported by {})", kinds.join(", "), reports.len());
    if let Some(said) = reports.iter().find(|report| !report.text.is_empty()) {
        text += &format!(": {}", said.text);
    }
    text
}

/// The beginning of a text, in one line.
fn short(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(ECHO_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::{NOW, sign};
    use crate::store::memory::MemoryStore;

    /// Reports add up by event, once for each who reports; what is decided or gone is no longer listed.
    #[test]
    fn reports_add_up_to_a_queue() {
        let store = MemoryStore::new();
        let (spam, gone) = (sign(1, 1, NOW, &[], "spam"), sign(1, 1, NOW, &[], "gone"));
        let (id, accused) = (spam.id.to_hex(), spam.pubkey.to_hex());
        let of_event: &[&[&str]] = &[&["e", &id, "spam"], &["p", &accused]];
        let reports = [
            sign(2, 1984, NOW, of_event, "look\nat this"),
            sign(2, 1984, NOW + 1, of_event, "again"),
            sign(3, 1984, NOW + 2, &[&["e", &id], &["p", &accused, "illegal"]], ""),
            sign(3, 1984, NOW + 3, &[&["e", &gone.id.to_hex(), "spam"]], ""),
            sign(3, 1984, NOW + 4, &[&["p", &accused, "impersonation"]], ""),
            sign(3, 1984, NOW + 5, &[&["e", "nonsense", "spam"]], ""),
        ];
        store.apply(std::slice::from_ref(&spam), NOW).unwrap();
        store.apply(&reports, NOW).unwrap();
        let mut decided = Decisions::default();
        let listed = queue(&store, &decided).unwrap();
        assert_eq!(listed.iter().map(|one| one.id).collect::<Vec<_>>(), [reports[4].id, spam.id]);
        assert_eq!(listed[1].reason, "illegal, spam (reported by 2): again");
        assert!(listed[0].reason.contains(&accused) && listed[0].reason.contains("impersonation"));
        decided.allowed_events.insert(spam.id, String::new());
        decided.banned_events.insert(reports[4].id, String::new());
        assert_eq!(queue(&store, &decided).unwrap(), []);
    }
}
