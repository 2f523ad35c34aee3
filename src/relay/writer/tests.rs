#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::Config;
use crate::protocol::testing::{Author, NOW};
use crate::protocol::{Filter, Visibility};
use crate::relay::outbox::tests::next;
use crate::store::memory::MemoryStore;
use std::sync::atomic::AtomicU64;

struct Room {
    store: MemoryStore,
    fanout: Arc<Fanout>,
    writer: Writer,
    outbox: Arc<Outbox>,
}

fn room(change: impl FnOnce(&mut Storage)) -> Room {
    let mut settings = Config::default().storage;
    change(&mut settings);
    let store = MemoryStore::new();
    let fanout = Arc::new(Fanout::new(Position(0), Arc::default()));
    let clock = Clock::manual(Arc::new(AtomicU64::new(NOW)));
    let shared: Arc<dyn Store> = Arc::new(store.clone());
    let policy = Arc::new(Policy::open(Arc::new(Config::default()), shared.clone()).unwrap());
    let writer = Writer::start(shared, fanout.clone(), clock, policy, &settings).unwrap();
    Room { store, fanout, writer, outbox: Outbox::new(1, 1 << 20) }
}

impl Room {
    fn submit(&self, event: Event) {
        let event = Verified::check(event).unwrap();
        let mut slot = Some(Box::new(Submission { event, reply: self.outbox.clone(), sender: Sender::import() }));
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(self.writer.poll_submit(&mut cx, &mut slot), Poll::Ready(()));
    }

    fn answer(&self) -> String {
        match next(&self.outbox) {
            Outgoing::Answer(text) => text,
            other => panic!("unexpected {other:?}"),
        }
    }
}

const NO_TAGS: &[Vec<&str>] = &[];

/// Answered is stored; ephemeral is passed on, answered and never stored (T32); expired ephemerals are refused.
#[test]
fn t32_stored_and_ephemeral_take_the_same_way() {
    let room = room(|_| {});
    let listener = Outbox::new(2, 1 << 20);
    room.fanout.subscribe(&listener, 5, &[Filter::default()], Visibility::everything());
    let author = Author::new(1);
    room.submit(author.event(1, NOW, NO_TAGS, "kept"));
    assert!(room.answer().ends_with(",true,\"\"]"));
    assert_eq!(room.store.stats().events, 1);
    room.submit(author.event(20_001, NOW, NO_TAGS, "passing"));
    assert!(room.answer().ends_with(",true,\"\"]"));
    room.submit(author.event(20_001, NOW, &[vec!["expiration", "5"]], "late"));
    assert!(room.answer().ends_with(",false,\"invalid: the event has expired\"]"));
    room.submit(author.event(1, NOW, NO_TAGS, "kept"));
    assert!(room.answer().contains(",true,\"duplicate: "));
    assert!(room.writer.stop(Instant::now() + Duration::from_secs(60)));
    assert_eq!(room.store.stats().events, 1);
    for content in ["kept", "passing"] {
        match next(&listener) {
            Outgoing::Live { serial: 5, event } => {
                assert!(std::str::from_utf8(&event.json).unwrap().contains(content));
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// A stopped writer has written what it took, and answers what comes later.
#[test]
fn stopping_writes_what_was_taken() {
    let room = room(|settings| settings.batch_events_max = 3);
    let author = Author::new(1);
    (0..20).for_each(|number| room.submit(author.event(1, NOW + number, NO_TAGS, "")));
    assert!(room.writer.stop(Instant::now() + Duration::from_secs(60)));
    assert_eq!(room.store.stats().events, 20);
    (0..20).for_each(|_| assert!(room.answer().contains(",true,")));
    room.submit(author.event(1, NOW + 99, NO_TAGS, ""));
    assert!(room.answer().contains(",false,\"error: the relay is stopping\""));
}

/// A sweep on demand removes what has expired.
#[test]
fn a_sweep_removes_expired_events() {
    let room = room(|_| {});
    let event = Author::new(1).event(1, NOW - 9, &[vec!["expiration".to_owned(), NOW.to_string()]], "");
    room.store.apply(&[Verified::check(event).unwrap()], NOW - 5).unwrap();
    assert_eq!(room.store.stats().events, 1);
    room.writer.sweep();
    room.submit(Author::new(2).event(1, NOW, NO_TAGS, ""));
    room.answer();
    assert!(room.writer.stop(Instant::now() + Duration::from_secs(60)));
    assert_eq!(room.store.stats().events, 1, "the expired one is gone, the new one there");
}
