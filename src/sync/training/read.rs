//! Reading the events of training data: what is not exactly as written is no fact.

use super::{Aggregate, Contribution, Quality, REPUTATION, Status, TOPIC, Terms, sha256};
use crate::protocol::bytes::decode_lower_hex;
use crate::protocol::{Event, EventId, PublicKey};

/// What a label says.
pub(super) enum Labelled {
    Quality(Quality),
    Status(Status),
}

pub(super) fn contribution(event: &Event) -> Result<Contribution, &'static str> {
    if !event.tags.values("t").any(|topic| topic == TOPIC) {
        return Err("a contribution has the t tag training");
    }
    let hash = event.tags.find("x").and_then(|tag| tag.value()).and_then(decode_lower_hex::<32>);
    if hash != Some(sha256(&event.content)) {
        return Err("the x tag is not the hash of the text");
    }
    let quality = match event.tags.find("quality") {
        Some(_) => Some(quality(event)?),
        None => None,
    };
    let license = event.tags.find("license").and_then(|tag| tag.value()).ok_or("a contribution names its license")?;
    Ok(Contribution {
        id: event.id,
        author: event.pubkey,
        created_at: event.created_at,
        content: event.content.clone(),
        terms: Terms {
            quality,
            license: license.to_owned(),
            curators: event.tags.values("p").filter_map(PublicKey::from_hex).collect(),
        },
    })
}

pub(super) fn target(event: &Event) -> Result<EventId, &'static str> {
    event.tags.values("e").find_map(EventId::from_hex).ok_or("a label names its target in an e tag")
}

pub(super) fn label(event: &Event) -> Result<Labelled, &'static str> {
    let of_ours = event.tags.iter().filter(|tag| tag.name() == "l" && tag.get(2) == Some(REPUTATION));
    let label = of_ours.filter_map(|tag| tag.value()).next().ok_or("a label of onyx.reputation is missing")?;
    match Status::from_label(label) {
        Some(status) => Ok(Labelled::Status(status)),
        None => {
            let quality = quality(event)?;
            // A label that says other than the number would be counted one way here and another way elsewhere.
            if quality.label() == label { Ok(Labelled::Quality(quality)) } else { Err("label and quality disagree") }
        }
    }
}

pub(super) fn aggregate(event: &Event) -> Result<(EventId, Aggregate), &'static str> {
    let value = |name| event.tags.find(name).and_then(|tag| tag.value());
    let target = value("d").and_then(EventId::from_hex).ok_or("an aggregate names its target in its d tag")?;
    let rank = value("rank").and_then(|rank| Quality::new(rank.parse().ok()?)).ok_or("an aggregate has a rank")?;
    let ratings = value("rating_cnt").and_then(|count| count.parse().ok()).ok_or("an aggregate has a rating_cnt")?;
    Ok((target, Aggregate { rank, ratings }))
}

fn quality(event: &Event) -> Result<Quality, &'static str> {
    let value = event.tags.find("quality").and_then(|tag| tag.value());
    value.and_then(|percent| Quality::new(percent.parse().ok()?)).ok_or("a quality is a number from 0 to 100")
}
