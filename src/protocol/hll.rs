//! HyperLogLog registers of a COUNT (NIP-45): how many different authors there are, in a form that clients can merge with
//! what other relays answer.
//!
//! The registers are exactly those of NIP-45, so that all relays agree on them; estimating from them is the client's.
//!
//! <https://github.com/nostr-protocol/nips/blob/master/45.md>

use sha2::{Digest, Sha256};

use super::bytes::decode_lower_hex;
use super::{Filter, Kind, PublicKey};

const REGISTERS: usize = 256;

/// What the hexadecimal digit of the filter is added to: the first bytes of a key may have been chosen for their looks.
const OFFSET_MIN: usize = 8;

/// 256 registers over the authors of the counted events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hll {
    /// Which byte of a key names its register; those behind it are what is measured.
    offset: usize,
    registers: [u8; REGISTERS],
}

impl Hll {
    /// Empty registers for a COUNT of these filters, if NIP-45 says which byte to look at: for one filter with one tag
    /// attribute of one value. For others the first of several would count, and clients do not agree on an order.
    pub fn for_question(filters: &[Filter]) -> Option<Self> {
        let [filter] = filters else { return None };
        let [condition] = &filter.tags[..] else { return None };
        let [value] = &condition.values[..] else { return None };
        Some(Hll { offset: offset_of(value), registers: [0; REGISTERS] })
    }

    /// Counts an event's author in.
    pub fn add(&mut self, author: &PublicKey) {
        let (register, measured) = (usize::from(author.0[self.offset]), &author.0[self.offset + 1..]);
        let zero_bytes = measured.iter().take_while(|byte| **byte == 0).count();
        let zero_bits = 8 * zero_bytes as u32 + measured.get(zero_bytes).map_or(0, |byte| byte.leading_zeros());
        // At most 22 bytes follow the register's.
        self.registers[register] = self.registers[register].max(zero_bits as u8 + 1);
    }

    /// The registers one after the other, 512 hex digits.
    pub fn to_hex(&self) -> String {
        faster_hex::hex_string(&self.registers)
    }
}

/// From the tag value of the filter to the byte of the key, as NIP-45 sets it down.
fn offset_of(value: &str) -> usize {
    let bytes = decode_lower_hex::<32>(value).or_else(|| author_of_address(value));
    let bytes = bytes.unwrap_or_else(|| Sha256::digest(value).into());
    // The digit at position 32 is the upper half of byte 16.
    OFFSET_MIN + usize::from(bytes[16] >> 4)
}

fn author_of_address(value: &str) -> Option<[u8; 32]> {
    let mut parts = value.splitn(3, ':');
    let (_kind, author) = (Kind(parts.next()?.parse().ok()?), parts.next()?);
    parts.next()?;
    decode_lower_hex(author)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const ID: &str = "7e7e9c42a91bfef19fa929e5fda1b72e0ebc1a4c1141673e2794234d86addf4e";

    fn question(json: &[&str]) -> Option<Hll> {
        Hll::for_question(&json.iter().map(|json| Filter::from_json(json).unwrap()).collect::<Vec<_>>())
    }

    fn hashed(text: &str) -> [u8; 32] {
        Sha256::digest(text).into()
    }

    /// Offsets and registers as another implementation (nostr-tools 2.x) has them (T39).
    #[test]
    fn t39_agrees_with_another_implementation() {
        for (value, offset) in [
            (ID, 8),
            (&format!("30023:{ID}:slug"), 8),
            (&format!("30023:{ID}:"), 8),
            ("nostr", 12),
            ("", 10),
            (&ID.to_uppercase(), 14),
            ("https://example.com/a", 14),
        ] {
            assert_eq!(offset_of(value), offset, "{value}");
        }
        let mut hll = question(&[&format!(r##"{{"kinds":[3],"#p":["{ID}"]}}"##)]).unwrap();
        (0..5_000).for_each(|number| hll.add(&PublicKey(hashed(&format!("hll key {number}")))));
        assert!(hll.to_hex().starts_with("07070908050504050907080404050504060a09050a03090a0305090504070604"));
        let digest = "100487d68e8e9158ce5d14191790cf9a43f5aa6f6bbd25cf5c657c3274d42640";
        assert_eq!(faster_hex::hex_string(&Sha256::digest(hll.registers)), digest);
    }

    /// NIP-45's steps one by one, over the key as text: the slow way gives the same (T39).
    #[test]
    fn t39_agrees_with_the_text_of_the_nip() {
        for target in 0..40 {
            let target = faster_hex::hex_string(&hashed(&format!("target {target}")));
            let offset = 8 + usize::from_str_radix(&target[32..33], 16).unwrap();
            let mut hll = question(&[&format!(r##"{{"#e":["{target}"]}}"##)]).unwrap();
            let mut expected = [0u8; 256];
            for number in 0..300 {
                let key = hashed(&format!("author {number} of {target}"));
                hll.add(&PublicKey(key));
                let bits: String = key[offset + 1..].iter().map(|byte| format!("{byte:08b}")).collect();
                let leading = bits.find('1').unwrap_or(bits.len()) as u8 + 1;
                let register = usize::from(key[offset]);
                expected[register] = expected[register].max(leading);
            }
            assert_eq!(hll.registers, expected, "{target}");
        }
    }

    /// The common filters of NIP-45 have registers; several filters, tags or values, and none, have not. A key of zeros
    /// does no harm.
    #[test]
    fn t39_which_questions_have_registers() {
        for has in [
            format!(r##"{{"#e":["{ID}"],"kinds":[7]}}"##),
            format!(r##"{{"#q":["{ID}"],"kinds":[1,1111]}}"##),
            format!(r##"{{"#E":["{ID}"],"kinds":[1111]}}"##),
            format!(r##"{{"#p":["{ID}"],"kinds":[3]}}"##),
            r##"{"#t":["nostr"],"since":5}"##.to_owned(),
        ] {
            let mut hll = question(&[&has]).unwrap();
            assert_eq!(hll.to_hex(), "0".repeat(512));
            hll.add(&PublicKey([0; 32]));
            assert_eq!(u32::from(hll.registers[0]), 8 * (31 - hll.offset as u32) + 1);
        }
        let one = r##"{"#t":["a"]}"##;
        for has_none in
            [&[r#"{"kinds":[1]}"#][..], &[one, one], &[r##"{"#t":["a","b"]}"##], &[r##"{"#t":["a"],"#r":["b"]}"##]]
        {
            assert_eq!(question(has_none), None, "{has_none:?}");
        }
    }
}
