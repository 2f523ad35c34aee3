//! Proof of work (NIP-13): leading zero bits of the event id.
//!
//! <https://github.com/nostr-protocol/nips/blob/master/13.md>

use super::{Event, EventId};

/// Leading zero bits of an id.
pub fn difficulty(id: &EventId) -> u32 {
    let zeros = id.0.iter().take_while(|byte| **byte == 0).count();
    let next = id.0.get(zeros).map_or(0, |byte| byte.leading_zeros());
    8 * zeros as u32 + next
}

/// The difficulty that its author set out to reach, if the `nonce` tag says so readably.
pub fn target(event: &Event) -> Option<u32> {
    event.tags.find("nonce")?.get(2)?.parse().ok()
}

/// The work that an event proves: its difficulty, but no more than its target. Whoever aims low and is lucky has not done
/// the work. Without a target the difficulty counts, which NIP-13 leaves open.
pub fn proven(event: &Event) -> u32 {
    let difficulty = difficulty(&event.id);
    target(event).map_or(difficulty, |target| difficulty.min(target))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::protocol::testing::Author;

    /// NIP-13's own ids and note.
    #[test]
    fn the_examples_of_nip_13() {
        let id = |start: &str| EventId::from_hex(&format!("{start:0<64}")).unwrap();
        let given = id("000000000e9d97a1ab09fc381030b346cdd7a142ad57e6df0b46dc9bef6c7e2d");
        assert_eq!(difficulty(&given), 36);
        assert_eq!(difficulty(&id("002f")), 10);
        assert_eq!(difficulty(&id("8")), 0);
        assert_eq!(difficulty(&EventId([0; 32])), 256);
        let note = r#"{"id":"000006d8c378af1779d2feebc7603a125d99eca0ccf1085959b307f64e5dd358",
            "pubkey":"a48380f4cfcc1ad5378294fcac36439770f9c878dd880ffa94bb74ea54a6f243","created_at":1651794653,"kind":1,
            "tags":[["nonce","776797","20"]],"content":"It's just me mining my own business",
            "sig":"284622fc0a3f4f1303455d5175f7ba962a3300d136085b9566801bc2e0699de0c7e31e44c81fb40ad9049173742e904713c3594a1da0fc5d2382a25c11aba977"}"#;
        let note = Event::from_json(note).unwrap();
        assert_eq!((difficulty(&note.id), target(&note), proven(&note)), (21, Some(20), 20));
    }

    /// The target bounds what luck brings; an unreadable one is none.
    #[test]
    fn a_low_target_counts_as_low() {
        let with = |tags: &[Vec<&str>]| {
            let mut event = Author::new(1).event(1, 1, tags, "");
            event.id = EventId([0; 32]);
            proven(&event)
        };
        assert_eq!(with(&[vec!["nonce", "1", "10"]]), 10);
        for unclear in [vec!["nonce", "1"], vec!["nonce", "1", "-3"], vec!["nonce"], vec!["nonces", "1", "10"]] {
            assert_eq!(with(&[unclear]), 256);
        }
    }
}
