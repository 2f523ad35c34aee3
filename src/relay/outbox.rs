//! What waits to be sent to one connection.
//!
//! Any thread puts messages in and never waits; the connection alone takes them out, a bounded portion at a time.
//! Answers and pages are bounded by what the connection may have under way; live events are bounded here by their
//! bytes: a reader that is too slow for them is told to go, and nobody else notices.
//!
//! Not a channel of tokio's, because an idle one keeps its first block allocated (a kilobyte and more a connection) and
//! none counts bytes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::task::AtomicWaker;

use super::lock;
use super::negotiation::Negotiated;
use super::query::Page;

/// Names a subscription or a count within one connection; never used twice there.
pub type Serial = u64;

/// Something for one connection.
#[derive(Debug)]
pub enum Outgoing {
    /// The `OK` for one of its EVENTs.
    Answer(String),
    /// The next rows, or the end, of one of its queries.
    Page(Box<Page>),
    /// The answer to a message of one of its reconciliations.
    Negotiated(Box<Negotiated>),
    /// A live event for one of its subscriptions.
    Live {
        /// The subscription.
        serial: Serial,
        /// The event, one copy for all receivers.
        event: Arc<LiveEvent>,
    },
}

/// A live event, shared by the outboxes of all its receivers.
#[derive(Debug)]
pub struct LiveEvent {
    /// Its JSON.
    pub json: Bytes,
    /// The same in the form that the first receiver needed whose connection packs its messages.
    packed: OnceLock<Box<[u8]>>,
}

impl LiveEvent {
    /// Not packed yet.
    pub fn new(json: Bytes) -> Arc<Self> {
        Arc::new(LiveEvent { json, packed: OnceLock::new() })
    }

    /// The packed form; `pack` makes it from the JSON, once for all receivers.
    pub fn packed(&self, pack: impl FnOnce(&[u8]) -> Box<[u8]>) -> &[u8] {
        self.packed.get_or_init(|| pack(&self.json))
    }
}

/// What [`Outbox::poll_take`] finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// Something was taken.
    Some,
    /// Live events came faster than they were taken: the connection must be closed.
    Overflow,
    /// The relay is stopping: answer what was accepted, then close.
    Stop,
    /// The client's address was blocked: the connection must be closed.
    Expelled,
}

/// Queue of one connection.
#[derive(Debug)]
pub struct Outbox {
    /// Told apart from every other connection of this process.
    pub connection: u64,
    live_bytes_max: usize,
    /// Microseconds of query threads that nobody has asked for yet.
    queried_micros: AtomicU64,
    queue: Mutex<Queue>,
    taker: AtomicWaker,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Outgoing>,
    live_bytes: usize,
    overflow: bool,
    closed: bool,
    stop: bool,
    expelled: bool,
}

/// Memory of a queued live event beside its JSON, which is shared.
const LIVE_OVERHEAD_BYTES: usize = std::mem::size_of::<Outgoing>();

/// Message slots that an empty queue keeps.
const IDLE_SLOTS_MAX: usize = 16;

impl Outbox {
    /// An empty outbox that holds live events of up to `live_bytes_max` bytes.
    pub fn new(connection: u64, live_bytes_max: usize) -> Arc<Self> {
        Arc::new(Outbox {
            connection,
            live_bytes_max,
            queried_micros: AtomicU64::new(0),
            queue: Mutex::default(),
            taker: AtomicWaker::new(),
        })
    }

    /// Notes that a query thread has worked for this connection.
    pub fn add_query_time(&self, worked: Duration) {
        let micros = u64::try_from(worked.as_micros()).unwrap_or(u64::MAX);
        self.queried_micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// For how long query threads have worked for this connection since this was asked last.
    pub fn take_query_time(&self) -> Duration {
        Duration::from_micros(self.queried_micros.swap(0, Ordering::Relaxed))
    }

    /// Queues a message. After [`Outbox::close`] or an overflow it is dropped.
    pub fn push(&self, message: Outgoing) {
        let mut queue = lock(&self.queue);
        if queue.closed || queue.overflow {
            return;
        }
        queue.live_bytes += message.live_bytes();
        if queue.live_bytes > self.live_bytes_max {
            queue.overflow = true;
            queue.messages = VecDeque::new();
        } else {
            queue.messages.push_back(message);
        }
        drop(queue);
        self.taker.wake();
    }

    /// Tells the connection that the relay is stopping.
    pub fn stop(&self) {
        lock(&self.queue).stop = true;
        self.taker.wake();
    }

    /// Has the connection closed at once: its address was blocked.
    pub fn expel(&self) {
        lock(&self.queue).expelled = true;
        self.taker.wake();
    }

    /// Drops what is queued and all that is still to come.
    pub fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.closed = true;
        queue.messages = VecDeque::new();
    }

    /// Whether nobody takes messages any more.
    pub fn is_closed(&self) -> bool {
        lock(&self.queue).closed
    }

    /// Moves messages into `batch` until they have `bytes_max` bytes; `Pending` when there are none. At least one is
    /// moved, unless `bytes_max` is 0: that only looks for signals. [`Taken::Stop`] is reported once.
    pub fn poll_take(&self, cx: &mut Context<'_>, bytes_max: usize, batch: &mut Vec<Outgoing>) -> Poll<Taken> {
        self.taker.register(cx.waker());
        let mut queue = lock(&self.queue);
        if queue.expelled {
            return Poll::Ready(Taken::Expelled);
        }
        if queue.overflow {
            return Poll::Ready(Taken::Overflow);
        }
        if std::mem::take(&mut queue.stop) {
            return Poll::Ready(Taken::Stop);
        }
        if queue.messages.is_empty() || bytes_max == 0 {
            return Poll::Pending;
        }
        let mut bytes = 0;
        while let Some(message) = queue.messages.pop_front() {
            bytes += message.bytes();
            queue.live_bytes -= message.live_bytes();
            batch.push(message);
            if bytes >= bytes_max {
                break;
            }
        }
        if queue.messages.is_empty() && queue.messages.capacity() > IDLE_SLOTS_MAX {
            queue.messages = VecDeque::new();
        }
        Poll::Ready(Taken::Some)
    }
}

impl Outgoing {
    /// About how many bytes this puts on the wire.
    fn bytes(&self) -> usize {
        match self {
            Outgoing::Answer(text) => text.len(),
            Outgoing::Page(page) => page.rows.iter().map(|row| row.json.len()).sum(),
            Outgoing::Negotiated(negotiated) => negotiated.bytes(),
            Outgoing::Live { event, .. } => event.json.len(),
        }
    }

    /// What counts towards the bound on live events.
    fn live_bytes(&self) -> usize {
        match self {
            Outgoing::Live { event, .. } => event.json.len() + LIVE_OVERHEAD_BYTES,
            Outgoing::Answer(_) | Outgoing::Page(_) | Outgoing::Negotiated(_) => 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::task::Waker;

    use super::*;

    /// Takes all that is there now.
    pub(crate) fn drain(outbox: &Outbox) -> Vec<Outgoing> {
        let mut batch = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        let _ = outbox.poll_take(&mut cx, usize::MAX, &mut batch);
        batch
    }

    /// The next message, waiting for it as long as it takes.
    pub(crate) fn next(outbox: &Outbox) -> Outgoing {
        struct Unpark(std::thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut batch = Vec::new();
        while outbox.poll_take(&mut Context::from_waker(&waker), 1, &mut batch).is_pending() {
            std::thread::park();
        }
        batch.pop().expect("something was taken")
    }

    fn live(bytes: usize) -> Outgoing {
        Outgoing::Live { serial: 1, event: LiveEvent::new(vec![b'x'; bytes].into()) }
    }

    /// Live events beyond the bound end the connection and free the memory at once; answers do not count.
    #[test]
    fn a_slow_reader_overflows_by_live_bytes_only() {
        let outbox = Outbox::new(1, 1_000);
        let mut batch = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        outbox.push(Outgoing::Answer("x".repeat(5_000)));
        outbox.push(live(400));
        assert_eq!(outbox.poll_take(&mut cx, 10_000, &mut batch), Poll::Ready(Taken::Some));
        outbox.push(live(800));
        outbox.push(live(800));
        assert_eq!(outbox.poll_take(&mut cx, 10_000, &mut batch), Poll::Ready(Taken::Overflow));
        assert!(lock(&outbox.queue).messages.is_empty());
    }

    /// A portion leaves the rest in order and its bytes counted.
    #[test]
    fn portions_keep_order_and_account() {
        let outbox = Outbox::new(1, 1 << 20);
        (0..5).for_each(|serial| {
            outbox.push(Outgoing::Live { serial, event: LiveEvent::new(Bytes::from_static(b"{}")) })
        });
        let mut batch = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(outbox.poll_take(&mut cx, 3, &mut batch), Poll::Ready(Taken::Some));
        assert_eq!(lock(&outbox.queue).live_bytes, 3 * (2 + LIVE_OVERHEAD_BYTES));
        assert_eq!(outbox.poll_take(&mut cx, 99, &mut batch), Poll::Ready(Taken::Some));
        let serials: Vec<u64> = batch
            .iter()
            .map(|message| match message {
                Outgoing::Live { serial, .. } => *serial,
                other => panic!("unexpected {other:?}"),
            })
            .collect();
        assert_eq!(serials, [0, 1, 2, 3, 4]);
        assert_eq!(outbox.poll_take(&mut cx, 99, &mut batch), Poll::Pending);
    }
}
