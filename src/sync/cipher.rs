//! Who can read a content: sealed for its author alone, or for its author and the readers that `p` tags name.
//!
//! The algorithm is NIP-44 behind the [`Cipher`] trait, so that tests can do without it. Here is only the envelope: for
//! the author alone the content is a NIP-44 payload from the author to itself. For several readers it is encrypted once,
//! under a key of its own, and that key is sealed for each reader in a `["key", pubkey, payload]` tag.

use crate::protocol::bytes::decode_lower_hex;
use crate::protocol::{PublicKey, Tags};

/// Longest text that is sealed, in bytes: what NIP-44 implementations agree on.
pub const PLAINTEXT_BYTES_MAX: usize = 65_408;
/// Most keys that a content is sealed for besides its author.
pub const READERS_MAX: usize = 64;
/// The name of the tags that carry the content's key.
pub const KEY_TAG: &str = "key";

/// Why a content cannot be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// NIP-44 cannot hold it.
    #[error("the text is {bytes} bytes long; {PLAINTEXT_BYTES_MAX} can be encrypted in one event")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Every reader costs a tag.
    #[error("{count} readers; a content can be sealed for {READERS_MAX}")]
    TooManyReaders {
        /// How many there were.
        count: usize,
    },
    /// A reader's key is no point on the curve.
    #[error("a reader's public key is not valid")]
    BadKey,
}

/// NIP-44, and the chance that it needs.
pub trait Cipher {
    /// Whose secret key seals and opens.
    fn pubkey(&self) -> PublicKey;

    /// Encrypts so that the owner of the secret key and `to` can read.
    ///
    /// # Errors
    /// [`SealError::TooLong`] or [`SealError::BadKey`].
    fn seal(&self, to: &PublicKey, plain: &str) -> Result<String, SealError>;

    /// What `from` sealed for us; `None` if it is not readable.
    fn open(&self, from: &PublicKey, payload: &str) -> Option<String>;

    /// Encrypts under a key that the readers get by other means.
    ///
    /// # Errors
    /// [`SealError::TooLong`].
    fn seal_with(&self, key: &[u8; 32], plain: &str) -> Result<String, SealError>;

    /// What was sealed under a key; `None` if it is not readable.
    fn open_with(&self, key: &[u8; 32], payload: &str) -> Option<String>;

    /// A new random key.
    fn fresh_key(&self) -> [u8; 32];
}

/// A sealed content and the tags that let its readers open it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The event's content.
    pub content: String,
    /// `p` and `key` tags.
    pub tags: Vec<Vec<String>>,
}

/// Seals a text for its author and `readers`.
///
/// # Errors
/// See [`SealError`].
pub fn seal_for(cipher: &dyn Cipher, readers: &[PublicKey], plain: &str) -> Result<Sealed, SealError> {
    let author = cipher.pubkey();
    let others: Vec<&PublicKey> = readers.iter().filter(|reader| **reader != author).collect();
    if others.is_empty() {
        return Ok(Sealed { content: cipher.seal(&author, plain)?, tags: Vec::new() });
    }
    if others.len() > READERS_MAX {
        return Err(SealError::TooManyReaders { count: others.len() });
    }
    let key = cipher.fresh_key();
    let key_hex = faster_hex::hex_string(&key);
    let mut tags: Vec<Vec<String>> = others.iter().map(|reader| vec!["p".to_owned(), reader.to_hex()]).collect();
    for reader in std::iter::once(&author).chain(others) {
        tags.push(vec![KEY_TAG.to_owned(), reader.to_hex(), cipher.seal(reader, &key_hex)?]);
    }
    Ok(Sealed { content: cipher.seal_with(&key, plain)?, tags })
}

/// Opens a content by `author`; `None` if it is not for us.
pub fn open(cipher: &dyn Cipher, author: &PublicKey, tags: &Tags, content: &str) -> Option<String> {
    let own = cipher.pubkey().to_hex();
    let wrapped = tags.iter().find(|tag| tag.name() == KEY_TAG && tag.value() == Some(&own));
    match wrapped.and_then(|tag| tag.get(2)) {
        Some(wrapped) => cipher.open_with(&decode_lower_hex(&cipher.open(author, wrapped)?)?, content),
        None => cipher.open(author, content),
    }
}
