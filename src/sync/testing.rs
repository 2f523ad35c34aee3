//! What the unit tests share: devices of a person that write events at given times.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, Ordering};

use super::clock::{Clock, Device, Hlc, Written};
use super::collections::{Absorbed, Collections};
use super::draft::{Draft, Op};
use super::nip44::Nip44;
use super::shape::Unsigned;
use crate::protocol::testing::{Author, NOW};
use crate::protocol::{Event, Verified};

/// The time at which tests take place, in milliseconds.
pub const NOW_MS: u64 = NOW * 1000;

/// One device.
pub struct Desk {
    pub author: Author,
    pub cipher: Nip44,
    pub clock: Clock,
    pub state: Collections,
}

impl Desk {
    /// Device `device` of person `person`.
    pub fn new(person: u8, device: u64) -> Desk {
        let next = AtomicU64::new(device << 32);
        let chance = move || {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&next.fetch_add(1, Ordering::Relaxed).to_be_bytes());
            bytes
        };
        let cipher = Nip44::new(&[person; 32], chance).unwrap();
        let me = Author::new(person).note(NOW, "").pubkey;
        Desk { author: Author::new(person), cipher, clock: Clock::new(Device(device)), state: Collections::new(me) }
    }

    /// Dates a command.
    pub fn draft(&mut self, op: Op, at_ms: u64) -> Draft {
        Draft { written: self.clock.write(at_ms), op }
    }

    /// A draft of exactly this stamp.
    pub fn draft_at(op: Op, stamp: Hlc) -> Draft {
        Draft { written: Written { local_ms: stamp.wall_ms, floor: Hlc::ZERO, stamp, is_final: false }, op }
    }

    /// Signs an event as it stands.
    pub fn sign(&self, unsigned: &Unsigned) -> Verified<Event> {
        let event = self.author.event(unsigned.kind.0, unsigned.created_at, &unsigned.tags, &unsigned.content);
        Verified::check(event).unwrap()
    }

    /// The event that tells drafts, not taken by the device itself.
    pub fn build(&self, drafts: &[&Draft]) -> Option<Verified<Event>> {
        let unsigned = self.state.build(drafts, self.clock.device(), &self.cipher).unwrap();
        unsigned.map(|unsigned| self.sign(&unsigned))
    }

    /// Writes a command at once as an event and takes it.
    pub fn say(&mut self, op: Op, at_ms: u64) -> Verified<Event> {
        let draft = self.draft(op, at_ms);
        let event = self.build(&[&draft]).unwrap();
        assert_eq!(self.take(&event), Absorbed::Taken);
        event
    }

    /// Takes an event from elsewhere.
    pub fn take(&mut self, event: &Verified<Event>) -> Absorbed {
        self.state.absorb(event, &self.cipher, &mut self.clock)
    }

    /// Takes events in the order given.
    pub fn take_all<'e>(&mut self, events: impl IntoIterator<Item = &'e Verified<Event>>) {
        events.into_iter().for_each(|event| assert_ne!(self.take(event), Absorbed::NotOurs));
    }
}
