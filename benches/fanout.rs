//! Live fan-out: from a stored event to the outboxes of everybody who wants it.
//!
//! Limit: 1 µs a delivery, and no cost for subscriptions that the event does not concern.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::sync::Arc;
use std::task::{Context, Waker};

use divan::counter::ItemsCount;
use sledge::protocol::{Event, Filter, Verified, Visibility};
use sledge::relay::fanout::Fanout;
use sledge::relay::outbox::Outbox;
use sledge::store::Position;

fn main() {
    divan::main();
}

/// Each subscriber follows 20 of the authors.
struct Audience {
    fanout: Fanout,
    outboxes: Vec<Arc<Outbox>>,
}

fn feed(number: usize) -> Filter {
    let keys = (0..20).map(|n| support::pubkey(&support::author((number * 7 + n * 13) % support::AUTHORS)).to_hex());
    let keys: Vec<String> = keys.collect();
    Filter::from_json(&serde_json::json!({"authors": keys, "kinds": [0, 1, 7]}).to_string()).unwrap()
}

fn audience(subscribers: usize) -> Audience {
    let fanout = Fanout::new(Position(0), Arc::default());
    let outboxes: Vec<_> = (0..subscribers).map(|number| Outbox::new(number as u64, 1 << 20)).collect();
    for (number, outbox) in outboxes.iter().enumerate() {
        fanout.subscribe(outbox, 1, &[feed(number)], Visibility::everything());
    }
    Audience { fanout, outboxes }
}

impl Audience {
    /// Dispatches all events and empties the outboxes; returns the deliveries.
    fn dispatch(&self, events: &[Verified<Event>]) -> usize {
        let epoch = self.fanout.begin_batch(None);
        let delivered = events.iter().map(|event| self.fanout.dispatch(epoch, event)).sum();
        let (mut cx, mut taken) = (Context::from_waker(Waker::noop()), Vec::new());
        for outbox in &self.outboxes {
            let _ = outbox.poll_take(&mut cx, usize::MAX, &mut taken);
            taken.clear();
        }
        delivered
    }
}

#[divan::bench(args = [100, 1_000, 5_000])]
fn deliveries_to(bencher: divan::Bencher, subscribers: usize) {
    let (audience, events) = (audience(subscribers), support::events(20));
    let deliveries = audience.dispatch(&events);
    assert!(deliveries > subscribers / 10, "{deliveries} deliveries are too few to measure");
    bencher.counter(ItemsCount::new(deliveries)).bench(|| audience.dispatch(&events));
}

/// Nobody listens for these: what an event costs beside 5,000 subscriptions that it does not concern.
#[divan::bench]
fn events_for_nobody(bencher: divan::Bencher) {
    let audience = audience(5_000);
    let stranger = support::author(support::AUTHORS + 1);
    let event = support::sign(&stranger, 1, support::START, &[], "for nobody".to_owned());
    let epoch = audience.fanout.begin_batch(None);
    bencher.bench(|| audience.fanout.dispatch(epoch, &event));
}

#[divan::bench]
fn subscribe_and_unsubscribe(bencher: divan::Bencher) {
    let audience = audience(5_000);
    let outbox = Outbox::new(1 << 40, 1 << 20);
    let filter = feed(3);
    bencher.bench(|| {
        audience.fanout.subscribe(&outbox, 1, std::slice::from_ref(&filter), Visibility::everything());
        audience.fanout.unsubscribe(&outbox, 1);
    });
}
