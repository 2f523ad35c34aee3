//! A user's key pair: it signs what the user publishes. The secret is never printed.

use std::fmt;
use std::path::Path;

use secp256k1::{Keypair, SecretKey};

use crate::protocol::nip19::{self, KeyError};
use crate::protocol::verify::event_id;
use crate::protocol::{Event, EventId, Kind, PublicKey, Signature, Tags, Verified};

/// Bytes of a key file that are looked at; a key has some hundred.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// Who the user is. Clones are the same key.
#[derive(Clone)]
pub struct Keys {
    pair: Keypair,
    pubkey: PublicKey,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The system did not give the file.
    #[error("cannot read the key file: {0}")]
    Unreadable(#[from] std::io::Error),
    /// Its first line is no secret key.
    #[error("the key file holds no secret key: {0}")]
    NoKey(#[from] KeyError),
    /// Zero, or beyond the order of the curve.
    #[error("these 32 bytes are no secret key of secp256k1")]
    OutOfRange,
}

impl Keys {
    /// The key pair of these secret bytes.
    ///
    /// # Errors
    /// [`KeyFileError::OutOfRange`].
    pub fn from_secret_bytes(secret: [u8; 32]) -> Result<Keys, KeyFileError> {
        let secret = SecretKey::from_secret_bytes(secret).map_err(|_| KeyFileError::OutOfRange)?;
        let pair = Keypair::from_secret_key(&secret);
        let pubkey = PublicKey(pair.x_only_public_key().0.to_byte_array());
        Ok(Keys { pair, pubkey })
    }

    /// Reads an nsec or 64 hex digits.
    ///
    /// # Errors
    /// [`KeyFileError`], without repeating the text.
    pub fn parse(text: &str) -> Result<Keys, KeyFileError> {
        Keys::from_secret_bytes(nip19::parse_secret_key(text.trim())?)
    }

    /// Reads the first line of a file, such as `sledge key generate --out FILE` makes.
    ///
    /// # Errors
    /// [`KeyFileError`].
    pub fn read(file: &Path) -> Result<Keys, KeyFileError> {
        let mut text = String::new();
        std::io::Read::read_to_string(
            &mut std::io::Read::take(std::fs::File::open(file)?, KEY_FILE_BYTES_MAX),
            &mut text,
        )?;
        Keys::parse(text.lines().next().unwrap_or_default())
    }

    /// The public key.
    pub fn pubkey(&self) -> PublicKey {
        self.pubkey
    }

    /// The secret bytes, for ciphers.
    pub fn secret_bytes(&self) -> [u8; 32] {
        self.pair.to_secret_bytes()
    }

    /// A signed event of this author.
    pub fn sign(&self, kind: Kind, created_at: u64, tags: Tags, content: String) -> Verified<Event> {
        let no_id = EventId([0; 32]);
        let no_sig = Signature([0; 64]);
        let mut event = Event { id: no_id, pubkey: self.pubkey, created_at, kind, tags, content, sig: no_sig };
        event.id = event_id(&event);
        let signature = secp256k1::schnorr::sign_no_aux_rand(&event.id.0, &self.pair);
        event.sig = Signature(signature.to_byte_array());
        Verified::check(event).expect("an event is valid that was signed a moment ago with a valid key")
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.pubkey)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const NSEC: &str = "nsec1vl029mgpspedva04g90vltkh6fvh240zqtv9k0t9af8935ke9laqsnlfe5";

    /// The key of NIP-19's example, from a file as `key generate` writes it; what it signs is valid.
    #[test]
    fn a_key_file_gives_the_key_that_signs() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("my.nsec");
        std::fs::write(&file, format!("{NSEC}\n")).unwrap();
        let keys = Keys::read(&file).unwrap();
        assert_eq!(keys.pubkey().to_hex(), "7e7e9c42a91bfef19fa929e5fda1b72e0ebc1a4c1141673e2794234d86addf4e");
        let event = keys.sign(Kind(1), 5, Tags::from_lists([["t", "x"]]), "hi".to_owned());
        assert_eq!((event.pubkey, event.created_at), (keys.pubkey(), 5));
    }

    /// Neither an error nor the debug form repeats a secret.
    #[test]
    fn secrets_are_not_repeated() {
        let broken = &NSEC[..50];
        let error = Keys::parse(broken).unwrap_err().to_string();
        assert!(!error.contains(broken), "{error}");
        let keys = Keys::parse(NSEC).unwrap();
        assert!(!format!("{keys:?}").contains(&faster_hex::hex_string(&keys.secret_bytes())));
        assert!(matches!(Keys::from_secret_bytes([0; 32]), Err(KeyFileError::OutOfRange)));
    }
}
