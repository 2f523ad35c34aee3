//! Fixed-width byte strings that travel as lower-case hex (NIP-01).

use std::cmp::Ordering;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{Serialize, Serializer};

macro_rules! hex_bytes {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Reads exactly the lower-case hex that NIP-01 asks for; `None` for anything else.
            pub fn from_hex(hex: &str) -> Option<Self> {
                decode_lower_hex(hex).map(Self)
            }

            /// Lower-case hex.
            pub fn to_hex(&self) -> String {
                faster_hex::hex_string(&self.0)
            }

            /// The raw bytes.
            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        /// The order of the bytes. The first eight nearly always tell, and looking at those takes no call: filters look
        /// keys up in sorted lists, event by event.
        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                head(&self.0).cmp(&head(&other.0)).then_with(|| self.0.cmp(&other.0))
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.to_hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.to_hex())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(HexVisitor::<$len>).map(Self)
            }
        }
    };
}

hex_bytes! {
    /// SHA-256 of an event's canonical form (NIP-01 `id`).
    EventId, 32
}
hex_bytes! {
    /// X-only secp256k1 public key (BIP-340; NIP-01 `pubkey`).
    PublicKey, 32
}
hex_bytes! {
    /// BIP-340 Schnorr signature over the event id (NIP-01 `sig`).
    Signature, 64
}

/// The first eight bytes, as a number of the same order.
fn head<const N: usize>(bytes: &[u8; N]) -> u64 {
    bytes.first_chunk().map_or(0, |head| u64::from_be_bytes(*head))
}

/// Bytes of `2 * N` lower-case hex digits; `None` for any other length, case or character.
pub fn decode_lower_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if hex.len() != 2 * N || hex.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    faster_hex::hex_decode(hex.as_bytes(), &mut bytes).ok()?;
    Some(bytes)
}

/// Appends `bytes` as lower-case hex.
pub fn push_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    let start = out.len();
    out.resize(start + 2 * bytes.len(), 0);
    faster_hex::hex_encode(bytes, &mut out[start..]).expect("the target has two bytes for each byte of input");
}

struct HexVisitor<const N: usize>;

impl<const N: usize> Visitor<'_> for HexVisitor<N> {
    type Value = [u8; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lower-case hex digits", 2 * N)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        decode_lower_hex(text).ok_or_else(|| E::custom(format_args!("expected {} lower-case hex digits", 2 * N)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the exact length in lower case is read; everything else is refused.
    #[test]
    fn hex_is_strict() {
        let good = "00ff".repeat(16);
        assert_eq!(EventId::from_hex(&good).map(|id| id.to_hex()), Some(good.clone()));
        for bad in [good.to_uppercase(), good[1..].to_owned(), format!("{good}0"), "zz".repeat(32), String::new()] {
            assert_eq!(EventId::from_hex(&bad), None, "{bad}");
        }
    }
    /// Keys are ordered like their bytes, wherever the first difference lies.
    #[test]
    fn order_is_byte_order() {
        let with = |at: usize, byte| PublicKey(std::array::from_fn(|index| if index == at { byte } else { 7 }));
        for at in 0..32 {
            let keys = [with(at, 0), with(at, 6), with(at, 7), with(at, 8), with(at, 0xff)];
            for (one, other) in keys.iter().flat_map(|one| keys.iter().map(move |other| (one, other))) {
                assert_eq!(one.cmp(other), one.0.cmp(&other.0), "{one} {other}");
                assert_eq!(one == other, one.cmp(other) == Ordering::Equal);
            }
        }
    }
}
