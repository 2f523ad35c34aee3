//! What one relay gave, for the others that are to have it: soon, and not only when a link comes up the next time.
//!
//! In: the user's own events as relays give them. Out: those that this relay may lack. Only what was new on this device is
//! carried, so each event goes once and nothing circles; and only after a short while, since as a rule its writer has sent
//! it to every relay and it arrives from there too. Bounded: of too many nothing is carried, and both sides are compared
//! instead.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::broadcast::{self, Receiver, Sender};
use tokio::time::Instant;

use crate::protocol::item::Item;
use crate::sync::outbox::RelayUrl;

/// Events that wait at one link, some 100 bytes each.
pub const CARRIED_MAX: usize = 4_096;
/// How long an event may take from its writer to all relays before somebody else carries it.
const GRACE: Duration = Duration::from_secs(2);

/// An own event that a relay gave and that was new here.
#[derive(Clone, Debug)]
pub struct Carried {
    /// Where it came from.
    pub from: RelayUrl,
    /// The event.
    pub item: Item,
}

/// A channel to all links.
pub fn channel() -> Sender<Carried> {
    broadcast::channel(CARRIED_MAX).0
}

/// What is due.
#[derive(Debug, PartialEq, Eq)]
pub enum Due {
    /// The relay may lack these.
    Items(Vec<Item>),
    /// More than could be remembered.
    TooMany,
}

/// The end of the channel at one relay's link.
#[derive(Debug)]
pub struct Carry {
    relay: RelayUrl,
    given: Receiver<Carried>,
    grace: Duration,
    waiting: VecDeque<(Instant, Item)>,
}

impl Carry {
    /// For what other relays than this one give from now on.
    pub fn new(relay: RelayUrl, sender: &Sender<Carried>) -> Carry {
        Carry { relay, given: sender.subscribe(), grace: GRACE, waiting: VecDeque::new() }
    }

    /// Waits until something is due. Can be cancelled without losing anything.
    pub async fn due(&mut self) -> Due {
        loop {
            let next = self.waiting.front().map(|(due, _)| *due);
            tokio::select! {
                given = self.given.recv() => match given {
                    Ok(carried) if carried.from == self.relay => {}
                    Ok(carried) if self.waiting.len() < CARRIED_MAX => {
                        self.waiting.push_back((Instant::now() + self.grace, carried.item));
                    }
                    Ok(_) | Err(RecvError::Lagged(_)) => {
                        self.waiting.clear();
                        return Due::TooMany;
                    }
                    Err(RecvError::Closed) => std::future::pending().await,
                },
                () = sleep_until(next) => return Due::Items(self.take_due()),
            }
        }
    }

    fn take_due(&mut self) -> Vec<Item> {
        let now = Instant::now();
        let due = self.waiting.partition_point(|(due, _)| *due <= now);
        self.waiting.drain(..due).map(|(_, item)| item).collect()
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::EventId;

    fn item(number: u64) -> Item {
        Item { created_at: number, id: EventId([1; 32]) }
    }

    /// A link whose others get no time to be quicker.
    fn at_once(sender: &Sender<Carried>) -> Carry {
        Carry { grace: Duration::ZERO, ..Carry::new(RelayUrl::new("ws://here"), sender) }
    }

    fn give(sender: &Sender<Carried>, from: &str, number: u64) {
        sender.send(Carried { from: RelayUrl::new(from), item: item(number) }).unwrap();
    }

    async fn due(carry: &mut Carry, count: usize) -> Vec<Item> {
        let mut items = Vec::new();
        while items.len() < count {
            let Due::Items(more) = carry.due().await else { panic!("it is not too much") };
            items.extend(more);
        }
        items
    }

    /// What another relay gave is due in its order; what this one gave never is.
    #[tokio::test]
    async fn what_others_gave_is_due() {
        let sender = channel();
        let mut carry = at_once(&sender);
        for (from, number) in [("ws://there", 1), ("ws://here", 2), ("ws://there", 3)] {
            give(&sender, from, number);
        }
        assert_eq!(due(&mut carry, 2).await, [item(1), item(3)]);
    }

    /// A link that does not come to carry, or that would have to carry very much, compares instead, and then goes on.
    #[tokio::test]
    async fn of_too_much_nothing_is_carried() {
        let sender = channel();
        let mut carry = at_once(&sender);
        (0..=CARRIED_MAX as u64).for_each(|number| give(&sender, "ws://there", number));
        assert_eq!(carry.due().await, Due::TooMany);
        assert_eq!(due(&mut carry, CARRIED_MAX).await.len(), CARRIED_MAX);
        carry.grace = GRACE;
        (0..CARRIED_MAX as u64).for_each(|number| give(&sender, "ws://there", number));
        carry.waiting.push_back((Instant::now() + GRACE, item(0)));
        assert_eq!(carry.due().await, Due::TooMany);
        assert!(carry.waiting.is_empty());
    }
}
