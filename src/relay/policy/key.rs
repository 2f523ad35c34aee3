//! The relay's own key pair: with it the relay signs its list of members (NIP-43). NIP-11 tells it as `self`.

use std::path::Path;

use secp256k1::{Keypair, SecretKey};

use super::PolicyError;
use crate::protocol::nip19::{self, Form};
use crate::protocol::verify::event_id;
use crate::protocol::{Event, EventId, Kind, PublicKey, Signature, Tags, Verified};
use crate::store::Store;

/// Name of the blob that holds a key which the relay made itself.
pub const BLOB: &str = "relay-key";

/// Bytes of a key file at most: an nsec and white space.
const FILE_BYTES_MAX: usize = 1_024;

/// The relay's own key pair. `Debug` shows the public half only.
pub struct RelayKey(Keypair);

impl std::fmt::Debug for RelayKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RelayKey({})", self.public())
    }
}

impl RelayKey {
    /// The key of `file`, or without one the key that is kept with the data, which is made when there is none.
    ///
    /// # Errors
    /// When it cannot be read, is no key, or cannot be kept.
    pub fn open(file: &str, store: &dyn Store) -> Result<RelayKey, PolicyError> {
        let wrong =
            |place: &str, problem: &str| PolicyError::Key { place: place.to_owned(), problem: problem.to_owned() };
        if !file.is_empty() {
            let text = read_file(Path::new(file)).map_err(|problem| wrong(file, &problem))?;
            return RelayKey::read(&text).map_err(|problem| wrong(file, &problem));
        }
        if let Some(blob) = store.load_state(BLOB)? {
            let text = String::from_utf8_lossy(&blob);
            return RelayKey::read(&text).map_err(|problem| wrong("the key kept with the data", &problem));
        }
        let pair = Keypair::new(&mut secp256k1::rand::rng());
        let nsec = nip19::encode(Form::Nsec, &pair.to_secret_bytes());
        store.save_state(BLOB, format!("{nsec}\n").as_bytes())?;
        Ok(RelayKey(pair))
    }

    fn read(text: &str) -> Result<RelayKey, String> {
        let secret = nip19::parse_secret_key(text.trim()).map_err(|error| error.to_string())?;
        let secret = SecretKey::from_secret_bytes(secret).map_err(|_| "no secret key of secp256k1".to_owned())?;
        Ok(RelayKey(Keypair::from_secret_key(&secret)))
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.x_only_public_key().0.to_byte_array())
    }

    /// An event signed by the relay.
    pub fn sign(&self, kind: Kind, created_at: u64, tags: Tags) -> Verified<Event> {
        let mut event = Event {
            id: EventId([0; 32]),
            pubkey: self.public(),
            created_at,
            kind,
            tags,
            content: String::new(),
            sig: Signature([0; 64]),
        };
        event.id = event_id(&event);
        event.sig = Signature(secp256k1::schnorr::sign_no_aux_rand(&event.id.0, &self.0).to_byte_array());
        Verified::check(event).expect("it was just signed")
    }
}

fn read_file(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    if text.len() > FILE_BYTES_MAX { Err("too long for a key".to_owned()) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::store::memory::MemoryStore;

    /// A key that was made is the same at the next start; one in a file goes before it; a wrong file stops the start and
    /// its text is not repeated.
    #[test]
    fn the_key_is_kept() {
        let store = MemoryStore::new();
        let made = RelayKey::open("", &store).unwrap().public();
        assert_eq!(RelayKey::open("", &store).unwrap().public(), made);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.nsec");
        std::fs::write(&file, format!("{}\n", "01".repeat(32))).unwrap();
        let own = RelayKey::open(file.to_str().unwrap(), &store).unwrap();
        assert_ne!(own.public(), made);
        assert_eq!(own.sign(Kind(13534), 5, Tags::default()).pubkey, own.public());
        std::fs::write(&file, "nsec1secret").unwrap();
        let error = RelayKey::open(file.to_str().unwrap(), &store).unwrap_err().to_string();
        assert!(error.contains("relay.nsec") && !error.contains("nsec1secret"), "{error}");
    }
}
