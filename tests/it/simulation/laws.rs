//! The ten laws, and three more that the engine promises, checked on a world that has come to rest.

use std::collections::BTreeMap;

use sledge::protocol::supersede::{self, Address, Target as Named};
use sledge::protocol::{Event, Kind, Verified};
use sledge::sync::clock::{Clock, Device};
use sledge::sync::nip44::Nip44;
use sledge::sync::{Absorbed, Collections};

use super::book::{Does, Target, Write, chat_key, value, write_of};
use super::broken::LastArrival;
use super::chance::Chance;
use super::device::{SimDevice, person};
use super::rules::{Rule, Rules};
use super::world::World;

/// Two writes this far apart have an order that no rounding of a clock changes.
const CLEARLY_LATER_MS: u64 = 30_000;

/// A law that does not hold, by its number (above ten: what the engine promises besides), and how it was seen.
#[derive(Debug)]
pub struct Broken(pub u32, pub String);

type Check = Result<(), Broken>;

fn law(number: u32, holds: bool, what: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(Broken(number, what())) }
}

/// Runs a world and checks everything.
pub fn check(world: &mut World, steps: usize) -> Check {
    let silent = world.run(steps);
    law_13_one_event_a_draft(world)?;
    law_7_validity(world)?;
    law_8_silence(world, silent)?;
    law_1_order(world)?;
    law_2_and_3_merge(world)?;
    law_11_everybody_sees_the_same(world)?;
    law_10_presence(world)?;
    law_9_causality(world)?;
    law_5_deletions(world)?;
    law_4_winners(world)?;
    law_6_eviction(world)?;
    law_12_last_write(world)
}

/// All that an app can see, as text.
pub fn digest(state: &Collections, with_settings: bool) -> String {
    let view = state.chat_view([]);
    let mut all = String::new();
    for head in view.list() {
        all += &format!("{} {}\n", head.chat.id, serde_json::to_string(&head.fields).unwrap());
        for shown in view.messages(&head.chat) {
            let message = &shown.message;
            all += &format!(" {} {} {} {:?}\n", message.id, message.content, shown.branch, message.parents);
        }
    }
    if with_settings {
        all += &serde_json::to_string(state.settings.fields()).unwrap();
    }
    let given: Vec<&str> = state.training.contributions().map(|given| given.content.as_str()).collect();
    all + &format!("\n{given:?}")
}

fn state_of<'e>(events: impl IntoIterator<Item = &'e Verified<Event>>, cipher: &Nip44) -> Collections {
    let mut state = Collections::new(person().pubkey());
    let mut clock = Clock::new(Device(99));
    for event in events {
        state.absorb(event, cipher, &mut clock);
    }
    state
}

fn some_device(world: &World) -> &SimDevice {
    world.alive().next().expect("two devices always stay")
}

fn state(device: &SimDevice) -> &Collections {
    &device.memory.as_ref().expect("it runs").state
}

/// 1: state does not depend on arrival order or duplicates.
fn law_1_order(world: &mut World) -> Check {
    let events = world.book.events.clone();
    let mut mixed = events.clone();
    mixed.extend(events.iter().filter(|_| world.chance.percent(30)).cloned());
    world.chance.shuffle(&mut mixed);
    let cipher = &some_device(world).cipher;
    let (in_order, shuffled) = if world.rules.hold(Rule::OrderPlaysNoPart) {
        (digest(&state_of(&events, cipher), true), digest(&state_of(&mixed, cipher), true))
    } else {
        let naive = |events: &[Verified<Event>]| {
            let mut state = LastArrival::default();
            events.iter().for_each(|event| state.absorb(event, cipher));
            state.digest()
        };
        (naive(&events), naive(&mixed))
    };
    law(1, in_order == shuffled, || format!("in order:\n{in_order}\nshuffled:\n{shuffled}"))
}

/// 2: merging is commutative, associative, idempotent. 3: it is the state of all events together.
fn law_2_and_3_merge(world: &mut World) -> Check {
    let events = world.book.events.clone();
    let mut parts: [Vec<Verified<Event>>; 3] = Default::default();
    for event in &events {
        // Some events reach several of the three.
        let first = world.chance.below(3);
        parts[first].push(event.clone());
        if world.chance.percent(20) {
            parts[(first + 1) % 3].push(event.clone());
        }
    }
    let cipher = &some_device(world).cipher;
    if !world.rules.hold(Rule::OrderPlaysNoPart) {
        let naive = parts.map(|part| {
            let mut state = LastArrival::default();
            part.iter().for_each(|event| state.absorb(event, cipher));
            state
        });
        let merged = |a: usize, b: usize| {
            let mut both = naive[a].clone();
            both.merge(naive[b].clone());
            both.digest()
        };
        return law(2, merged(0, 1) == merged(1, 0), || "the naive state depends on who merges".to_owned());
    }
    let states = parts.map(|part| state_of(&part, cipher));
    let merged = |order: &[usize]| {
        let mut all = Collections::new(person().pubkey());
        order.iter().for_each(|part| all.merge(states[*part].clone()));
        all
    };
    let right_first = {
        let mut left = states[0].clone();
        left.merge(merged(&[1, 2]));
        left
    };
    let one = digest(&merged(&[0, 1, 2]), true);
    for (how, other) in [
        ("commutative", digest(&merged(&[2, 0, 1]), true)),
        ("associative", digest(&right_first, true)),
        ("idempotent", digest(&merged(&[0, 1, 2, 1, 0, 2]), true)),
    ] {
        law(2, one == other, || format!("not {how}:\n{one}\nagainst\n{other}"))?;
    }
    let together = digest(&state_of(&events, cipher), true);
    law(3, one == together, || format!("merged:\n{one}\ntogether:\n{together}"))
}

/// 4: the relay's winner is the client's winner.
fn law_4_winners(world: &World) -> Check {
    let chats = &state(some_device(world)).chats;
    for (number, relay) in world.relays.iter().enumerate() {
        for event in relay.store.events().filter(|event| event.kind == sledge::sync::shape::CHAT) {
            let address = Address::of(event).expect("an addressable kind");
            let ours = match address.d.strip_prefix("oa:c:") {
                Some(chat) => chats.head_version(&chat_key(chat)),
                None => chats.message_version(&address),
            };
            let theirs = relay.store.winner(&address);
            law(4, ours == theirs, || format!("{} at relay {number}: {theirs:?}, here {ours:?}", address.d))?;
        }
    }
    Ok(())
}

/// 5: a deletion wins at equal time, whichever comes first: what it covers is nowhere.
fn law_5_deletions(world: &World) -> Check {
    let requests = world.book.events.iter().filter(|event| event.kind == Kind::DELETION);
    for request in requests.filter(|request| world.relays.iter().any(|r| r.store.get(&request.id).is_some())) {
        for target in supersede::deletion_targets(request) {
            let Named::Address(address) = target else { continue };
            let here = state(some_device(world)).chats.message_version(&address);
            let there = world.relays.iter().map(|relay| relay.store.winner(&address));
            for version in there.chain([here]).flatten() {
                let gone = version.created_at <= request.created_at;
                law(5, !gone, || {
                    format!("{} of {} lives after {}", address.d, version.created_at, request.created_at)
                })?;
            }
        }
    }
    Ok(())
}

/// 6: what a relay has left, replaced versions gone, gives the state of all events.
fn law_6_eviction(world: &World) -> Check {
    let device = some_device(world);
    for (number, relay) in world.relays.iter().enumerate() {
        let left = digest(&state_of(relay.store.events(), &device.cipher), relay.slots);
        let here = digest(state(device), relay.slots);
        law(6, left == here, || format!("relay {number} alone:\n{left}\na device:\n{here}"))?;
    }
    Ok(())
}

/// 7: validity is a function of the event alone: no two devices judge an event differently.
fn law_7_validity(world: &World) -> Check {
    for (id, judgements) in &world.book.judgements {
        law(7, judgements[..] == [Absorbed::Taken], || format!("{id}: {judgements:?}"))?;
    }
    Ok(())
}

/// 8: at the fixpoint nobody publishes, nothing is owed, and nothing was refused for good.
fn law_8_silence(world: &World, silent: bool) -> Check {
    for device in world.alive() {
        let memory = device.memory.as_ref().expect("it runs");
        let dead: Vec<String> = memory.outbox.dead_letters().map(|(_, _, reason)| reason.to_owned()).collect();
        law(8, dead.is_empty(), || format!("refused for good: {dead:?}"))?;
        let status = memory.outbox.status();
        law(8, status.entries == 0 || !silent, || format!("still owed: {status:?}"))?;
    }
    law(8, silent, || "the world does not fall silent".to_owned())
}

/// 9: a write made after seeing w never loses to w.
fn law_9_causality(world: &World) -> Check {
    let finals = Finals::of(world);
    for write in world.book.writes.iter().filter(|write| finals.counts(world, write)) {
        let Some(seen) = write.seen else { continue };
        let lost = finals.value(&write.target) == Some(seen);
        law(9, !lost, || format!("{write:?} lost to what it had seen: {:?}", world.book.writes[seen]))?;
    }
    Ok(())
}

/// 10: what a surviving relay stored is there at rest, or something newer is in its place.
fn law_10_presence(world: &World) -> Check {
    let finals = Finals::of(world);
    let deletions: Vec<&Verified<Event>> =
        world.book.events.iter().filter(|event| event.kind == Kind::DELETION).collect();
    for write in &world.book.writes {
        let Some((stamp, event)) = write.told else { continue };
        let kept = world.relays.iter().any(|relay| !relay.forgetful && relay.stored_ever.contains(&event));
        // The fields of a head that nobody saw in time go with the device that wrote them: the relay's one version of
        // the head may be another device's. All other writes outlive their device.
        let lost_with_device = matches!(write.target, Target::Head(..)) && world.devices[write.device].dead;
        if !kept || lost_with_device || write.does == Does::Remove {
            continue;
        }
        let deleted = write.target.address().is_some_and(|address| {
            let mut targets = deletions.iter().flat_map(|request| supersede::deletion_targets(request));
            targets.any(|target| target == Named::Address(address.clone()))
        });
        let there = finals.has(write, stamp);
        law(10, there || deleted, || format!("{write:?} is gone"))?;
    }
    Ok(())
}

/// 11: all devices that live see the same.
fn law_11_everybody_sees_the_same(world: &World) -> Check {
    let mut digests = world.alive().map(|device| digest(state(device), true));
    let first = digests.next().expect("two devices always stay");
    digests.try_for_each(|other| law(11, first == other, || format!("{first}\nagainst\n{other}")))
}

/// 12: of two writes of a field, made clearly one after the other, the later stays, whatever the clocks showed.
fn law_12_last_write(world: &World) -> Check {
    let finals = Finals::of(world);
    for write in world.book.writes.iter().filter(|write| finals.counts(world, write)) {
        if !matches!(write.target, Target::Setting(_)) {
            continue;
        }
        let Some(stays) = finals.value(&write.target).map(|number| &world.book.writes[number]) else { continue };
        let overtaken = write.true_ms > stays.true_ms + CLEARLY_LATER_MS;
        law(12, !overtaken, || format!("{write:?} lost to the earlier {stays:?}"))?;
    }
    Ok(())
}

/// 13: no two events tell one entry of an outbox.
fn law_13_one_event_a_draft(world: &World) -> Check {
    for (entry, events) in &world.book.told {
        law(13, events.len() == 1, || format!("{entry:?}: {events:?}"))?;
    }
    let known = |id| world.book.events.iter().any(|event| event.id == id);
    world
        .book
        .sent
        .keys()
        .try_for_each(|id| law(13, known(*id), || format!("{id} was sent and never signed by the book")))
}

/// What is seen at the end: the write whose value each target has.
struct Finals<'w> {
    state: &'w Collections,
    messages: BTreeMap<(String, String), usize>,
}

impl<'w> Finals<'w> {
    fn of(world: &'w World) -> Self {
        let state = state(some_device(world));
        let view = state.chat_view([]);
        let mut messages = BTreeMap::new();
        for head in view.list() {
            for shown in view.messages(&head.chat) {
                let write = write_of(&shown.message.content).expect("the app writes numbers");
                messages.insert((head.chat.id.clone(), shown.message.id), write);
            }
        }
        Finals { state, messages }
    }

    fn value(&self, target: &Target) -> Option<usize> {
        let text = |value: &serde_json::Value| value.as_str().and_then(write_of);
        match target {
            Target::Setting(name) => self.state.settings.fields().get(name).and_then(text),
            Target::Head(chat, field) => self.state.chats.head(&chat_key(chat))?.get(field).and_then(text),
            Target::Message(chat, id) => self.messages.get(&((*chat).to_owned(), id.clone())).copied(),
            Target::Contribution(_) => None,
        }
    }

    /// Whether a write, or a later one in its place, is there.
    fn has(&self, write: &Write, stamp: sledge::sync::clock::Hlc) -> bool {
        let later = |fields: &sledge::sync::fields::Fields, name: &str| {
            fields.field(name).is_some_and(|field| field.stamp() >= stamp)
        };
        match &write.target {
            Target::Setting(name) => later(self.state.settings.fields(), name),
            Target::Head(chat, field) => self.state.chats.head(&chat_key(chat)).is_some_and(|head| later(head, field)),
            Target::Message(..) => self.value(&write.target).is_some(),
            Target::Contribution(text) => self.state.training.contributions().any(|given| given.content == *text),
        }
    }

    /// Whether the event that tells a write is known at the end, so that the write takes part.
    fn counts(&self, world: &World, write: &Write) -> bool {
        let Some((_, event)) = write.told else { return false };
        let living = !world.devices[write.device].dead;
        let kept = world.relays.iter().any(|relay| !relay.forgetful && relay.stored_ever.contains(&event));
        let head_of_the_dead = matches!(write.target, Target::Head(..)) && !living;
        (living || kept) && !head_of_the_dead
    }
}

/// A run of a seed under rules; what it breaks.
pub fn run(seed: u64, rules: Rules) -> Result<(), (Broken, String)> {
    let mut world = World::new(seed, rules);
    let steps = 60 + Chance::new(seed ^ 0xabcd).below(120);
    check(&mut world, steps).map_err(|broken| (broken, world.describe()))
}

/// So that the value of a write is what the book says.
#[test]
fn values_name_their_writes() {
    assert_eq!(write_of(&value(17)), Some(17));
    assert_eq!(write_of("x17"), None);
}
