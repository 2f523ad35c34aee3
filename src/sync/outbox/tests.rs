//! The outbox rules, one after the other, and at random with crashes between.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::protocol::testing::{Author, NOW};
use crate::sync::clock::{Clock, Device};
use crate::sync::draft::{Op, Plain};

const MS: u64 = NOW * 1000;

fn relay(name: &str) -> RelayUrl {
    RelayUrl::new(&format!("wss://{name}.example.com"))
}

fn draft(clock: &mut Clock, text: &str) -> Content {
    let op = Op::Plain(Plain { kind: 1, tags: Vec::new(), content: text.to_owned() });
    Content::Draft(Box::new(Draft { written: clock.write(MS), op }))
}

fn signed(text: &str) -> Event {
    Author::new(1).event(1, NOW, &[] as &[Vec<&str>], text)
}

fn content(event: &Event) -> Content {
    Content::Event(String::from_utf8(event.canonical().json.to_vec()).unwrap())
}

/// An outbox with these notes owed to one relay whose link is up.
fn with_notes(texts: &[&str]) -> (Outbox, RelayUrl, Vec<Event>) {
    let (mut outbox, to) = (Outbox::default(), relay("a"));
    let events: Vec<Event> = texts.iter().map(|text| signed(text)).collect();
    for event in &events {
        outbox.queue(content(event), vec![to.clone()]);
    }
    outbox.link_up(&to);
    (outbox, to, events)
}

#[track_caller]
fn assert_sends(outbox: &mut Outbox, to: &RelayUrl, now_ms: u64, event: &Event) {
    match outbox.next(to, now_ms) {
        Step::Send { event: json, .. } => assert_eq!(Event::from_json(&json).unwrap().id, event.id),
        other => panic!("{other:?}"),
    }
}

/// Nothing goes out while the link is down; then the oldest first; what is settled is gone.
#[test]
fn oldest_first_until_settled() {
    let (mut outbox, to, events) = with_notes(&["a", "b"]);
    outbox.link_down(&to);
    assert_eq!(outbox.next(&to, MS), Step::Wait(None));
    outbox.link_up(&to);
    assert_sends(&mut outbox, &to, MS, &events[0]);
    assert_sends(&mut outbox, &to, MS, &events[1]);
    assert_eq!(outbox.next(&to, MS), Step::Wait(None));
    for event in &events {
        assert_eq!(outbox.answer(&to, &event.id, true, "", MS, 0).len(), 1);
        assert!(outbox.answer(&to, &event.id, true, "", MS, 0).is_empty(), "a second answer says nothing new");
    }
    assert_eq!(outbox.status(), Status::default());
}

/// A closed link owes again what was on its way.
#[test]
fn a_lost_link_loses_no_debt() {
    let (mut outbox, to, events) = with_notes(&["a"]);
    assert_sends(&mut outbox, &to, MS, &events[0]);
    outbox.link_down(&to);
    outbox.link_up(&to);
    assert_sends(&mut outbox, &to, MS, &events[0]);
}

/// A draft is asked for once, and the same bytes go to every relay and after every failure.
#[test]
fn a_draft_is_frozen_once() {
    let (mut outbox, mut clock) = (Outbox::default(), Clock::new(Device(1)));
    let relays = vec![relay("a"), relay("b")];
    let (seq, _) = outbox.queue(draft(&mut clock, "x"), relays.clone());
    relays.iter().for_each(|to| outbox.link_up(to));
    assert_eq!(outbox.next(&relays[0], MS), Step::Sign(seq));
    let event = signed("x");
    outbox.freeze(seq, &event);
    assert!(outbox.drafts().next().is_none());
    for to in &relays {
        assert_sends(&mut outbox, to, MS, &event);
    }
    outbox.answer(&relays[0], &event.id, false, "error: disk", MS, 0);
    assert_sends(&mut outbox, &relays[0], MS + 500, &event);
    // A second freezing is not heard: the first bytes may be on their way.
    outbox.freeze(seq, &signed("y"));
    assert_eq!(outbox.entry(seq).unwrap().id, Some(event.id));
    outbox.answer(&relays[0], &event.id, true, "", MS, 0);
    assert_eq!(outbox.status().entries, 1, "acknowledgements are per relay");
    outbox.answer(&relays[1], &event.id, false, "replaced: have newer", MS, 0);
    assert_eq!(outbox.status().entries, 0);
}

/// `auth-required:` asks for the proof, then sends the same bytes; when that does not help, the event waits.
#[test]
fn auth_then_the_same_bytes() {
    let (mut outbox, to, events) = with_notes(&["a"]);
    assert_sends(&mut outbox, &to, MS, &events[0]);
    outbox.answer(&to, &events[0].id, false, "auth-required: who?", MS, 0);
    assert_eq!(outbox.next(&to, MS), Step::Authenticate);
    outbox.authenticated(&to);
    assert_sends(&mut outbox, &to, MS, &events[0]);
    outbox.answer(&to, &events[0].id, false, "auth-required: who?", MS, 0);
    assert_eq!(outbox.next(&to, MS), Step::Wait(Some(MS + 500)));
}

/// `rate-limited:` pauses the link and halves the window, once for the refusals of one window; settling widens it.
#[test]
fn rate_limits_halve_the_window() {
    let texts: Vec<String> = (0..70).map(|n| n.to_string()).collect();
    let (mut outbox, to, events) = with_notes(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    for event in &events[..WINDOW_MAX] {
        assert_sends(&mut outbox, &to, MS, event);
    }
    assert_eq!(outbox.next(&to, MS), Step::Wait(None), "the window is full");
    for event in &events[..2] {
        outbox.answer(&to, &event.id, false, "rate-limited: slow down", MS, 0);
    }
    assert_eq!(outbox.link_status(&to).window, 32);
    outbox.link_down(&to);
    outbox.link_up(&to);
    assert_eq!(outbox.next(&to, MS), Step::Wait(Some(MS + 500)), "a new link does not end the pause");
    assert_sends(&mut outbox, &to, MS + 500, &events[0]);
    outbox.answer(&to, &events[0].id, true, "", MS + 500, 0);
    assert_eq!(outbox.link_status(&to).window, 33);
}

/// Without an answer in time the event is owed again.
#[test]
fn silence_is_a_refusal() {
    let (mut outbox, to, events) = with_notes(&["a"]);
    assert_sends(&mut outbox, &to, MS, &events[0]);
    outbox.time_out(&to, MS, MS, 0);
    assert_eq!(outbox.link_status(&to).in_flight, 1);
    outbox.time_out(&to, MS + 1, MS + 10_000, 0);
    assert_eq!(outbox.next(&to, MS + 10_000), Step::Wait(Some(MS + 10_500)));
    assert_sends(&mut outbox, &to, MS + 10_500, &events[0]);
}

/// What is refused for good is a dead letter, does not stand in the way, and can be revived or discarded.
#[test]
fn dead_letters_are_seen() {
    let (mut outbox, to, events) = with_notes(&["a", "b"]);
    assert_sends(&mut outbox, &to, MS, &events[0]);
    outbox.answer(&to, &events[0].id, false, "invalid: no", MS, 0);
    assert_eq!(outbox.dead_letters().collect::<Vec<_>>(), [(Seq(0), &to, "invalid: no")]);
    assert_sends(&mut outbox, &to, MS, &events[1]);
    assert!(outbox.revive(Seq(1), &to).is_none(), "it is alive");
    assert!(outbox.revive(Seq(0), &to).is_some());
    assert_sends(&mut outbox, &to, MS, &events[0]);
    outbox.answer(&to, &events[0].id, false, "invalid: no", MS, 0);
    assert!(outbox.withdraw(Seq(0)).is_some() && outbox.withdraw(Seq(0)).is_none());
    assert_eq!(outbox.dead_letters().count(), 0);
}

/// What a relay is not to get is settled without being sent.
#[test]
fn unsuited_entries_are_settled() {
    let (mut outbox, to, events) = with_notes(&["a", "b"]);
    let changes = outbox.settle_unsuited(&to, |entry| entry.id == Some(events[1].id));
    assert_eq!(changes, [Change::Settled { seq: Seq(0), relay: to.clone(), how: Settlement::NotForThisRelay }]);
    assert_sends(&mut outbox, &to, MS, &events[1]);
}

/// One step of a random story. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Act {
    Queue {
        relays: u8,
        draft: bool,
    },
    Send {
        relay: u8,
    },
    Answer {
        relay: u8,
        text: u8,
    },
    Drop {
        relay: u8,
    },
    Wait(u16),
    /// All of memory is lost; only the log is left, perhaps with its last change written twice.
    Crash {
        twice: bool,
    },
    /// The log is replaced by a snapshot.
    Compact,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1..4u8, any::<bool>()).prop_map(|(relays, draft)| Act::Queue { relays, draft }),
        8 => (0..2u8).prop_map(|relay| Act::Send { relay }),
        6 => (0..2u8, 0..6u8).prop_map(|(relay, text)| Act::Answer { relay, text }),
        1 => (0..2u8).prop_map(|relay| Act::Drop { relay }),
        2 => any::<u16>().prop_map(Act::Wait),
        1 => any::<bool>().prop_map(|twice| Act::Crash { twice }),
        1 => Just(Act::Compact),
    ]
}

/// A driver with a log, two relays, and the book of what each relay was told.
struct Story {
    outbox: Outbox,
    log: Vec<Change>,
    clock: Clock,
    relays: [RelayUrl; 2],
    now_ms: u64,
    /// What was queued, for whom.
    owed: Vec<(Seq, RelayUrl)>,
    /// Events that each relay has stored.
    stored: BTreeSet<(RelayUrl, EventId)>,
    /// Which event was ever sent for an entry.
    sent: HashMap<Seq, EventId>,
    waiting: Vec<(RelayUrl, Seq, EventId)>,
}

impl Story {
    fn new() -> Self {
        let mut story = Story {
            outbox: Outbox::default(),
            log: Vec::new(),
            clock: Clock::new(Device(1)),
            relays: [relay("a"), relay("b")],
            now_ms: MS,
            owed: Vec::new(),
            stored: BTreeSet::new(),
            sent: HashMap::new(),
            waiting: Vec::new(),
        };
        story.links_up();
        story
    }

    fn links_up(&mut self) {
        self.relays.iter().for_each(|relay| self.outbox.link_up(relay));
    }

    fn run(&mut self, act: &Act) {
        match act {
            Act::Queue { relays, draft } => self.queue(*relays, *draft),
            Act::Send { relay } => self.send(usize::from(*relay)),
            Act::Answer { relay, text } => self.answer(usize::from(*relay), *text),
            Act::Drop { relay } => {
                let relay = self.relays[usize::from(*relay)].clone();
                self.outbox.link_down(&relay);
                self.outbox.link_up(&relay);
                self.waiting.retain(|(to, ..)| *to != relay);
            }
            Act::Wait(ms) => self.now_ms += u64::from(*ms),
            Act::Crash { twice } => {
                if let Some(last) = self.log.last().cloned().filter(|_| *twice) {
                    self.log.push(last);
                }
                self.outbox = Outbox::replay(&self.log);
                assert_eq!(Outbox::replay(&self.outbox.snapshot()).snapshot(), self.outbox.snapshot());
                self.waiting.clear();
                self.links_up();
            }
            Act::Compact => self.log = self.outbox.snapshot(),
        }
    }

    fn queue(&mut self, relays: u8, as_draft: bool) {
        let text = format!("note {}", self.owed.len());
        let to: Vec<RelayUrl> =
            self.relays.iter().enumerate().filter(|(n, _)| relays >> n & 1 == 1).map(|(_, to)| to.clone()).collect();
        let what = if as_draft { draft(&mut self.clock, &text) } else { content(&signed(&text)) };
        let (seq, change) = self.outbox.queue(what, to.clone());
        self.log.push(change);
        self.owed.extend(to.into_iter().map(|relay| (seq, relay)));
    }

    fn send(&mut self, relay: usize) {
        let relay = self.relays[relay].clone();
        match self.outbox.next(&relay, self.now_ms) {
            Step::Sign(seq) => {
                let event = signed(&format!("draft {}", seq.0));
                let change = self.outbox.freeze(seq, &event);
                self.log.push(change);
            }
            Step::Send { seq, event } => {
                let id = Event::from_json(&event).unwrap().id;
                assert_eq!(*self.sent.entry(seq).or_insert(id), id, "two events for one entry");
                self.waiting.push((relay, seq, id));
            }
            Step::Authenticate => self.outbox.authenticated(&relay),
            Step::Wait(until) => assert!(until.is_none_or(|until| until > self.now_ms)),
        }
    }

    fn answer(&mut self, relay: usize, text: u8) {
        let relay = self.relays[relay].clone();
        let Some(at) = self.waiting.iter().position(|(to, ..)| *to == relay) else { return };
        let (_, _, id) = self.waiting.remove(at);
        let (accepted, text) = [
            (true, ""),
            (true, "duplicate: have it"),
            (false, "rate-limited: x"),
            (false, "error: x"),
            (false, "auth-required: x"),
            // The last one is lost after the relay stored the event.
            (true, "lost"),
        ][usize::from(text)];
        if accepted {
            self.stored.insert((relay.clone(), id));
        }
        if text == "lost" {
            self.outbox.time_out(&relay, u64::MAX, self.now_ms, 77);
            self.waiting.retain(|(to, ..)| *to != relay);
        } else {
            self.log.extend(self.outbox.answer(&relay, &id, accepted, text, self.now_ms, 77));
        }
    }

    /// Answers everything with `true` until nothing is owed.
    fn heal(&mut self) {
        self.links_up();
        self.waiting.clear();
        for _ in 0..20_000 {
            for relay in [0, 1] {
                self.send(relay);
                self.answer(relay, 0);
            }
            self.now_ms += 1_000;
            if self.outbox.status().entries == 0 {
                return;
            }
        }
        panic!("the outbox does not empty: {:?}", self.outbox.status());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is lost in between: in the end every relay has every event that it was owed, and no entry was ever told
    /// by two different events.
    #[test]
    fn nothing_owed_is_lost(acts in prop::collection::vec(act(), 0..120)) {
        let mut story = Story::new();
        acts.iter().for_each(|act| story.run(act));
        story.heal();
        for (seq, relay) in &story.owed {
            let id = story.sent.get(seq).copied();
            prop_assert!(id.is_some_and(|id| story.stored.contains(&(relay.clone(), id))), "{seq:?} {relay}");
        }
        prop_assert_eq!(story.outbox.entries().count(), 0);
    }
}
