//! Secret keys from words (NIP-06): a mnemonic of BIP-39 and the path `m/44'/1237'/<account>'/0/0` of BIP-32.
//!
//! In: the words. Out: the 32 bytes of the key. English words only, and no passphrase, as Nostr's wallets have it. The
//! list of words is BIP-39's, one a line; a library would bring it as 2,048 slices, six times as large, and the rest is
//! HMAC. Never prints or keeps a word: an error names a word by its place.

use hmac::{Hmac, KeyInit, Mac};
use secp256k1::{PublicKey, Scalar, SecretKey};
use sha2::{Digest, Sha256, Sha512};

/// The words of BIP-39 in their order, which is alphabetical.
const ENGLISH: &str = include_str!("nip06/english.txt");
/// How often BIP-39 stretches a mnemonic.
const ROUNDS: usize = 2_048;
/// What BIP-32 adds to a number of a path to derive from the secret key.
const HARDENED: u32 = 1 << 31;
/// Nostr's number in SLIP-44.
const NOSTR: u32 = 1_237;

/// Why words are no mnemonic. None of them is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MnemonicError {
    /// There are mnemonics of five lengths.
    #[error("a mnemonic has 12, 15, 18, 21 or 24 words, not {0}")]
    Count(usize),
    /// It is not in the list.
    #[error("word {0} is not in the English list of BIP-39")]
    Word(usize),
    /// The words are in the list and do not fit each other.
    #[error("the words do not fit each other: one of them is wrong, or two changed places")]
    Checksum,
    /// Accounts have 31 bits.
    #[error("an account is a number below 2147483648")]
    Account,
}

/// The secret key of an account of a mnemonic; most people have only account 0.
///
/// # Errors
/// [`MnemonicError`].
pub fn secret_key(mnemonic: &str, account: u32) -> Result<[u8; 32], MnemonicError> {
    if account >= HARDENED {
        return Err(MnemonicError::Account);
    }
    let words = check(mnemonic)?;
    let mut node = master(&seed(&words.join(" ")));
    for number in [44 + HARDENED, NOSTR + HARDENED, account + HARDENED, 0, 0] {
        node = child(&node, number);
    }
    Ok(node.key.to_secret_bytes())
}

/// Reads the words, in any case and with any space between them: 11 bits each, of which the last few are a checksum.
///
/// # Errors
/// [`MnemonicError`].
pub fn check(mnemonic: &str) -> Result<Vec<String>, MnemonicError> {
    let words: Vec<String> = mnemonic.split_whitespace().map(str::to_lowercase).collect();
    if !matches!(words.len(), 12 | 15 | 18 | 21 | 24) {
        return Err(MnemonicError::Count(words.len()));
    }
    let list: Vec<&str> = ENGLISH.lines().collect();
    let mut bits = Vec::with_capacity(words.len() * 11);
    for (place, word) in words.iter().enumerate() {
        let number = list.binary_search(&word.as_str()).map_err(|_| MnemonicError::Word(place + 1))?;
        bits.extend((0..11).rev().map(|bit| (number >> bit) & 1 == 1));
    }
    let checksum_bits = words.len() / 3;
    let (entropy, checksum) = bits.split_at(bits.len() - checksum_bits);
    let byte = |bits: &[bool]| bits.iter().fold(0_u8, |byte, bit| (byte << 1) | u8::from(*bit));
    let entropy: Vec<u8> = entropy.chunks(8).map(byte).collect();
    let expected = Sha256::digest(&entropy)[0] >> (8 - checksum_bits);
    if byte(checksum) == expected { Ok(words) } else { Err(MnemonicError::Checksum) }
}

/// PBKDF2 with HMAC-SHA512 of one block, which is all that a seed of 64 bytes needs.
fn seed(mnemonic: &str) -> [u8; 64] {
    let keyed = keyed(mnemonic.as_bytes());
    let round = |data: &[u8]| -> [u8; 64] { keyed.clone().chain_update(data).finalize().into_bytes().into() };
    let mut last = round(b"mnemonic\0\0\0\x01");
    let mut seed = last;
    for _ in 1..ROUNDS {
        last = round(&last);
        seed.iter_mut().zip(last).for_each(|(byte, more)| *byte ^= more);
    }
    seed
}

/// A key of BIP-32's tree, and what its children are derived with.
struct Node {
    key: SecretKey,
    chain_code: [u8; 32],
}

fn master(seed: &[u8; 64]) -> Node {
    let (key, chain_code) = halves(keyed(b"Bitcoin seed").chain_update(seed));
    let key = SecretKey::from_secret_bytes(key).expect(UNLIKELY);
    Node { key, chain_code }
}

fn child(parent: &Node, number: u32) -> Node {
    let mut mac = keyed(&parent.chain_code);
    if number >= HARDENED {
        mac.update(&[0]);
        mac.update(&parent.key.to_secret_bytes());
    } else {
        mac.update(&PublicKey::from_secret_key(&parent.key).serialize());
    }
    mac.update(&number.to_be_bytes());
    let (tweak, chain_code) = halves(mac);
    let key = parent.key.add_tweak(&Scalar::from_be_bytes(tweak).expect(UNLIKELY)).expect(UNLIKELY);
    Node { key, chain_code }
}

const UNLIKELY: &str = "a hash is zero or beyond the curve's order once in 2^127 mnemonics";

fn keyed(key: &[u8]) -> Hmac<Sha512> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

fn halves(mac: Hmac<Sha512>) -> ([u8; 32], [u8; 32]) {
    let bytes: [u8; 64] = mac.finalize().into_bytes().into();
    let (mut left, mut right) = ([0; 32], [0; 32]);
    left.copy_from_slice(&bytes[..32]);
    right.copy_from_slice(&bytes[32..]);
    (left, right)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SHORT: &str = "leader monkey parrot ring guide accident before fence cannon height naive bean";
    const LONG: &str = "what bleak badge arrange retreat wolf trade produce cricket blur garlic valid proud rude strong \
                        choose busy staff weather area salt hollow arm fade";

    fn hex(mnemonic: &str, account: u32) -> String {
        faster_hex::hex_string(&secret_key(mnemonic, account).unwrap())
    }

    /// NIP-06's own examples, also as people type them; another account is another key.
    #[test]
    fn the_nips_examples() {
        let expected = "7f7ff03d123792d6ac594bfa67bf6d0c0ab55b6b1fdb6249303fe861f1ccba9a";
        assert_eq!(hex(SHORT, 0), expected);
        assert_eq!(hex(&format!("  {}\n", SHORT.to_uppercase().replace(' ', "\t ")), 0), expected);
        assert_eq!(hex(LONG, 0), "c15d739894c81a2fcfd3a2df85a0d2c0dbc47a280d092799f144d73d7ae78add");
        assert_ne!(hex(SHORT, 1), expected);
        assert_eq!(secret_key(SHORT, HARDENED), Err(MnemonicError::Account));
    }

    /// BIP-39's own example of a mnemonic and its seed, here with the empty passphrase that NIP-06 has: the list is whole
    /// and in order.
    #[test]
    fn the_list_is_bip_39s() {
        let digest = faster_hex::hex_string(&Sha256::digest(ENGLISH));
        assert_eq!(digest, "2f5eed53a4727b4bf8880d8f3f199efc90e58503646d9ff8eff3a2ed3b24dbda");
        let words: Vec<&str> = ENGLISH.lines().collect();
        assert!(words.len() == 2_048 && words.is_sorted());
        let abandon = "abandon ".repeat(11) + "about";
        assert!(
            faster_hex::hex_string(&seed(&abandon)).starts_with("5eb00bbddcf069084889a8ab9155568165f5c453ccb85e70")
        );
    }

    /// What is no mnemonic is refused by its place and never repeated.
    #[test]
    fn slips_of_the_pen() {
        let swapped = SHORT.replace("leader monkey", "monkey leader");
        for (text, expected) in [
            ("", MnemonicError::Count(0)),
            (&SHORT[7..], MnemonicError::Count(11)),
            (&SHORT.replace("ring", "rnig"), MnemonicError::Word(4)),
            (&swapped, MnemonicError::Checksum),
        ] {
            assert_eq!(secret_key(text, 0), Err(expected), "{text}");
        }
    }
}
