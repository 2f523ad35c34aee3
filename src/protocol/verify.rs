//! From a claim to a fact: the id is the hash of the event, and the signature signs the id under the author's key.
//!
//! [`Verified`] is what the store accepts, and only this module makes one. The two steps are apart because a relay
//! asks between them whether it has the event already: hashing costs 1 µs, a signature 25 µs.

use std::ops::Deref;

use secp256k1::XOnlyPublicKey;
use secp256k1::schnorr::Signature as SchnorrSignature;
use sha2::{Digest, Sha256};

use super::event::{Canonical, push_string};
use super::{Event, EventId};

/// Why an event is not what it claims to be. `Display` is the `OK` text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The id is not the SHA-256 of the canonical form.
    #[error("invalid: the id is not the hash of the event")]
    Id,
    /// The key is no point on the curve.
    #[error("invalid: the pubkey is not a valid key")]
    Pubkey,
    /// The signature does not sign this id under this key.
    #[error("invalid: the signature does not verify")]
    Signature,
}

/// An event whose id was found to be its hash, with its canonical JSON.
#[derive(Clone, Debug)]
pub struct Hashed {
    event: Event,
    canonical: Canonical,
}

/// A value whose id and signature were checked (NIP-01).
#[derive(Clone, Debug)]
pub struct Verified<T> {
    value: T,
    canonical: Canonical,
}

impl Hashed {
    /// Checks that the event's id is the hash of its canonical form.
    ///
    /// NIP-01 has control characters other than its seven escapes hashed verbatim; most JSON libraries, and so most
    /// clients, hash them as `\u00xx`. No two events share a form under either reading, so both are accepted.
    ///
    /// # Errors
    /// [`Invalid::Id`].
    pub fn check(event: Event) -> Result<Self, Invalid> {
        let canonical = event.canonical();
        let claimed = event.id;
        let holds =
            escaped_hash(&canonical) == claimed || (has_rare_controls(&canonical) && verbatim_hash(&event) == claimed);
        if holds { Ok(Hashed { event, canonical }) } else { Err(Invalid::Id) }
    }

    /// The event.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Checks the signature.
    ///
    /// # Errors
    /// [`Invalid::Pubkey`] or [`Invalid::Signature`].
    pub fn verify(self) -> Result<Verified<Event>, Invalid> {
        let key = XOnlyPublicKey::from_byte_array(self.event.pubkey.0).map_err(|_| Invalid::Pubkey)?;
        let signature = SchnorrSignature::from_byte_array(self.event.sig.0);
        secp256k1::schnorr::verify(&signature, &self.event.id.0, &key).map_err(|_| Invalid::Signature)?;
        Ok(Verified { value: self.event, canonical: self.canonical })
    }
}

impl Hashed {
    /// The event of a store's row. Its signature was verified when the store took it, which takes nothing else, so that to
    /// do it again would only cost time: most of what it costs to read the row.
    pub fn from_store(self) -> Verified<Event> {
        Verified { value: self.event, canonical: self.canonical }
    }
}

impl Verified<Event> {
    /// Both checks in a row.
    ///
    /// # Errors
    /// What [`Hashed::check`] and [`Hashed::verify`] find.
    pub fn check(event: Event) -> Result<Self, Invalid> {
        Hashed::check(event)?.verify()
    }

    /// The canonical JSON, ready for the wire.
    pub fn canonical(&self) -> &Canonical {
        &self.canonical
    }
}

impl<T> Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// The id that NIP-01 gives an event, whatever its `id` field says (control characters as `\u00xx`).
pub fn event_id(event: &Event) -> EventId {
    escaped_hash(&event.canonical())
}

/// The `[0,pubkey,created_at,kind,tags,content]` form, assembled from stretches of the canonical JSON.
fn escaped_hash(canonical: &Canonical) -> EventId {
    // The JSON reads {"id":"<64>","pubkey":"<64>","created_at":<n>,"kind":<n>,"tags":…
    const PUBKEY: std::ops::Range<usize> = 83..147;
    const CREATED_AT_START: usize = 162;
    let json = &canonical.json;
    let tags_key = b",\"tags\":".len();
    let numbers_end = canonical.tags_json().as_ptr() as usize - json.as_ptr() as usize - tags_key;
    let numbers = &json[CREATED_AT_START..numbers_end];
    let kind_key = b",\"kind\":";
    let comma = memchr::memchr(b',', numbers).expect("the canonical form has a kind after created_at");
    let mut hash = Sha256::new();
    hash.update(b"[0,\"");
    hash.update(&json[PUBKEY]);
    hash.update(b"\",");
    hash.update(&numbers[..comma]);
    hash.update(b",");
    hash.update(&numbers[comma + kind_key.len()..]);
    hash.update(b",");
    hash.update(canonical.tags_json());
    hash.update(b",");
    hash.update(canonical.content_json());
    hash.update(b"]");
    EventId(hash.finalize().into())
}

fn has_rare_controls(canonical: &Canonical) -> bool {
    memchr::memmem::find(&canonical.json, b"\\u00").is_some()
}

/// NIP-01 to the letter: control characters without an escape of their own stand verbatim.
fn verbatim_hash(event: &Event) -> EventId {
    let mut form = format!("[0,\"{}\",{},{},[", event.pubkey, event.created_at, event.kind).into_bytes();
    for (tag_index, tag) in event.tags.iter().enumerate() {
        form.extend_from_slice(if tag_index == 0 { b"[" } else { b",[" });
        for (item_index, item) in tag.items().enumerate() {
            if item_index > 0 {
                form.push(b',');
            }
            push_verbatim(&mut form, item);
        }
        form.push(b']');
    }
    form.extend_from_slice(b"],");
    push_verbatim(&mut form, &event.content);
    form.push(b']');
    EventId(Sha256::digest(&form).into())
}

fn push_verbatim(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    for piece in text.split_inclusive(is_rare_control) {
        let (plain, control) = match piece.chars().next_back() {
            Some(last) if is_rare_control(last) => piece.split_at(piece.len() - 1),
            _ => (piece, ""),
        };
        let start = out.len();
        push_string(out, plain);
        out.remove(start);
        out.pop();
        out.extend_from_slice(control.as_bytes());
    }
    out.push(b'"');
}

fn is_rare_control(character: char) -> bool {
    character < ' ' && !matches!(character, '\n' | '\r' | '\t' | '\u{8}' | '\u{c}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Kind, PublicKey, Signature, Tags};

    fn unsigned(content: &str) -> Event {
        Event {
            id: EventId([0; 32]),
            pubkey: PublicKey([0x11; 32]),
            created_at: 1_700_000_000,
            kind: Kind(1),
            tags: Tags::from_lists([["t", content], ["alt", "\u{2028}\u{7f}/\u{ffff}"]]),
            content: content.to_owned(),
            sig: Signature([0; 64]),
        }
    }

    /// The pieces of the canonical JSON hash to the same as the form written out in full (oracle: serde_json).
    #[test]
    fn t28_id_is_the_hash_of_the_written_form() {
        for content in ["", "a\"b\\c\n\r\t\u{8}\u{c}", "\u{2028}\u{7f}/\u{ffff}😀", "\u{0}\u{1f}\u{1}"] {
            let event = unsigned(content);
            let tags: Vec<Vec<&str>> = event.tags.iter().map(|tag| tag.items().collect()).collect();
            let form = serde_json::json!([0, event.pubkey.to_hex(), event.created_at, event.kind.0, tags, content]);
            assert_eq!(event_id(&event).0[..], Sha256::digest(form.to_string())[..], "{content:?}");
        }
    }

    /// Control characters are accepted in NIP-01's verbatim form and in the `\u00xx` form of JSON libraries.
    #[test]
    fn t28_control_characters_hash_either_way() {
        let mut event = unsigned("a\u{1}b\u{0}\n\u{1f}");
        let form = format!(
            "[0,\"{}\",{},1,[[\"t\",\"a\u{1}b\u{0}\\n\u{1f}\"],[\"alt\",\"\u{2028}\u{7f}/\u{ffff}\"]],\"a\u{1}b\u{0}\\n\u{1f}\"]",
            event.pubkey, event.created_at
        );
        event.id = EventId(Sha256::digest(form).into());
        assert!(Hashed::check(event.clone()).is_ok());
        event.id = event_id(&event);
        assert!(Hashed::check(event.clone()).is_ok());
        event.id.0[0] ^= 1;
        assert_eq!(Hashed::check(event).err(), Some(Invalid::Id));
    }

    /// A key that is no point and a signature of zeros are refused, each by its name.
    #[test]
    fn bad_keys_and_signatures_are_told_apart() {
        let mut event = unsigned("x");
        event.pubkey = PublicKey([0xff; 32]);
        event.id = event_id(&event);
        assert_eq!(Verified::check(event.clone()).err(), Some(Invalid::Pubkey));
        let generator = "79be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798";
        event.pubkey = PublicKey::from_hex(generator).expect("hex");
        event.id = event_id(&event);
        assert_eq!(Verified::check(event).err(), Some(Invalid::Signature));
    }
}
