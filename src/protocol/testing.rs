//! What the unit tests share: authors who sign.
#![allow(clippy::unwrap_used)]

use secp256k1::{Keypair, SecretKey};

use super::{Event, EventId, Kind, PublicKey, Signature, Tags, Verified, verify};

/// The time at which tests take place.
pub const NOW: u64 = 1_700_000_000;

/// Somebody who signs events.
pub struct Author(Keypair);

impl Author {
    /// The same key for the same number; not 0.
    pub fn new(number: u8) -> Self {
        Author(Keypair::from_secret_key(&SecretKey::from_secret_bytes([number; 32]).unwrap()))
    }

    /// A signed event.
    pub fn event<T: AsRef<str>>(&self, kind: u16, created_at: u64, tags: &[Vec<T>], content: &str) -> Event {
        let mut event = Event {
            id: EventId([0; 32]),
            pubkey: PublicKey(self.0.x_only_public_key().0.to_byte_array()),
            created_at,
            kind: Kind(kind),
            tags: Tags::from_lists(tags.iter().map(|tag| tag.iter())),
            content: content.to_owned(),
            sig: Signature([0; 64]),
        };
        event.id = verify::event_id(&event);
        event.sig = Signature(secp256k1::schnorr::sign_no_aux_rand(&event.id.0, &self.0).to_byte_array());
        event
    }

    /// A signed note of kind 1, verified.
    pub fn note(&self, created_at: u64, content: &str) -> Verified<Event> {
        Verified::check(self.event(1, created_at, &[] as &[Vec<&str>], content)).unwrap()
    }
}

/// A signed event by the author of this number, verified.
pub fn sign(author: u8, kind: u16, created_at: u64, tags: &[&[&str]], content: &str) -> Verified<Event> {
    let tags: Vec<Vec<&str>> = tags.iter().map(|tag| tag.to_vec()).collect();
    Verified::check(Author::new(author).event(kind, created_at, &tags, content)).unwrap()
}
