//! [`Cipher`] by the `nostr` crate's NIP-44; chance is the caller's.

use nostr::base64::Engine;
use nostr::base64::engine::general_purpose::STANDARD as BASE64;
use nostr::nips::nip44::v2::{ConversationKey, decrypt_to_bytes, encrypt_to_bytes_with_rng};
use nostr::secp256k1::rand::{Error as RngError, RngCore};

use super::cipher::{Cipher, PLAINTEXT_BYTES_MAX, SealError};
use crate::protocol::PublicKey;

/// A secret key that seals and opens.
pub struct Nip44 {
    secret: nostr::SecretKey,
    pubkey: PublicKey,
    /// Shared by every content that the author keeps for itself: deriving it costs a multiplication on the curve.
    to_self: ConversationKey,
    chance: Box<dyn Fn() -> [u8; 32] + Send + Sync>,
}

impl Nip44 {
    /// A cipher for a secret key; `chance` gives 32 random bytes, new ones each time. `None` if the bytes are no key.
    pub fn new(secret: &[u8; 32], chance: impl Fn() -> [u8; 32] + Send + Sync + 'static) -> Option<Self> {
        // Not by `nostr::Keys`: that would bring the multiplication tables of its own curve library into the binary.
        let (own, _) = secp256k1::Keypair::from_secret_bytes(*secret).ok()?.x_only_public_key();
        let pubkey = PublicKey(own.to_byte_array());
        let secret = nostr::SecretKey::from_slice(secret).ok()?;
        let to_self = ConversationKey::derive(&secret, &nostr::PublicKey::from_byte_array(pubkey.0)).ok()?;
        Some(Nip44 { secret, pubkey, to_self, chance: Box::new(chance) })
    }

    fn conversation(&self, with: &PublicKey) -> Option<ConversationKey> {
        if *with == self.pubkey {
            return Some(self.to_self);
        }
        ConversationKey::derive(&self.secret, &nostr::PublicKey::from_byte_array(with.0)).ok()
    }

    fn encrypt(&self, key: &ConversationKey, plain: &str) -> Result<String, SealError> {
        let too_long = SealError::TooLong { bytes: plain.len() };
        if plain.len() > PLAINTEXT_BYTES_MAX {
            return Err(too_long);
        }
        let payload = encrypt_to_bytes_with_rng(&mut Nonce((self.chance)()), key, plain.as_bytes());
        payload.map(|payload| BASE64.encode(payload)).map_err(|_| too_long)
    }
}

fn decrypt(key: &ConversationKey, payload: &str) -> Option<String> {
    let payload = BASE64.decode(payload).ok()?;
    // The first byte is the version; there is one so far.
    if payload.first() != Some(&2) {
        return None;
    }
    String::from_utf8(decrypt_to_bytes(key, &payload).ok()?).ok()
}

impl Cipher for Nip44 {
    fn pubkey(&self) -> PublicKey {
        self.pubkey
    }

    fn seal(&self, to: &PublicKey, plain: &str) -> Result<String, SealError> {
        self.encrypt(&self.conversation(to).ok_or(SealError::BadKey)?, plain)
    }

    fn open(&self, from: &PublicKey, payload: &str) -> Option<String> {
        decrypt(&self.conversation(from)?, payload)
    }

    fn seal_with(&self, key: &[u8; 32], plain: &str) -> Result<String, SealError> {
        self.encrypt(&ConversationKey::new(*key), plain)
    }

    fn open_with(&self, key: &[u8; 32], payload: &str) -> Option<String> {
        decrypt(&ConversationKey::new(*key), payload)
    }

    fn fresh_key(&self) -> [u8; 32] {
        (self.chance)()
    }
}

/// Hands out the nonce that was drawn beforehand.
struct Nonce([u8; 32]);

impl RngCore for Nonce {
    fn next_u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.fill_bytes(&mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn next_u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.fill_bytes(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn fill_bytes(&mut self, dest: &mut [u8]) {
        // NIP-44 asks once, for the 32 bytes of its nonce.
        dest.iter_mut().zip(self.0.iter().cycle()).for_each(|(byte, from)| *byte = *from);
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), RngError> {
        self.fill_bytes(dest);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;
    use crate::protocol::Tags;
    use crate::sync::cipher::{open, seal_for};

    fn cipher(secret: u8) -> Nip44 {
        let next = AtomicU8::new(0);
        Nip44::new(&[secret; 32], move || [next.fetch_add(1, Ordering::Relaxed); 32]).expect("a valid key")
    }

    /// The first vector of NIP-44's own test file: secret keys 1 and 2, nonce 1, plaintext "a".
    #[test]
    fn nip44_vector() {
        let secret = |number| std::array::from_fn(|at| if at == 31 { number } else { 0 });
        let cipher = Nip44::new(&secret(1), move || secret(1)).expect("a valid key");
        let other = Nip44::new(&secret(2), || [0; 32]).expect("a valid key");
        let payload = "AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABee0G5VSK0/9YypIObAtDKfYEAjD35uVkHyB0F4DwrcNaCXlCWZKaArsGrY6M9wnuTMxWfp1RTN9Xga8no+kF5Vsb";
        assert_eq!(cipher.seal(&other.pubkey(), "a").as_deref(), Ok(payload));
        assert_eq!(other.open(&cipher.pubkey(), payload).as_deref(), Some("a"));
    }

    /// Sealed for oneself and for readers; a stranger, a changed payload and one that is too long are told.
    #[test]
    fn readers_can_and_strangers_cannot() {
        let (author, reader, stranger) = (cipher(1), cipher(2), cipher(3));
        for readers in [vec![], vec![author.pubkey()], vec![reader.pubkey()]] {
            let sealed = seal_for(&author, &readers, "text").expect("short");
            let tags = Tags::from_lists(&sealed.tags);
            let read = |who: &Nip44| open(who, &author.pubkey(), &tags, &sealed.content);
            assert_eq!(read(&author).as_deref(), Some("text"));
            assert_eq!(read(&reader).is_some(), readers.contains(&reader.pubkey()));
            assert_eq!(read(&stranger), None);
            let broken = sealed.content.replacen('A', "B", 1);
            assert_eq!(open(&author, &author.pubkey(), &tags, &broken), None);
        }
        let long = "x".repeat(PLAINTEXT_BYTES_MAX + 1);
        assert_eq!(seal_for(&author, &[], &long), Err(SealError::TooLong { bytes: long.len() }));
        assert!(seal_for(&author, &[], &long[1..]).is_ok());
        assert_eq!(seal_for(&author, &[PublicKey([0xff; 32])], ""), Err(SealError::BadKey));
        for garbage in ["", "x", "AgAA", "#notbase64"] {
            assert_eq!(author.open(&author.pubkey(), garbage), None);
        }
    }
}
