//! Keys from a number, and events signed with them: the same in every run.

use secp256k1::Keypair;
use sha2::{Digest, Sha256};
use sledge::protocol::verify::event_id;
use sledge::protocol::{Event, EventId, Kind, PublicKey, Signature, Tags, Verified};

/// What every test's clock shows at the start. In the past of the real clock, so that events of the tests can also
/// pass through the binary.
pub const NOW: u64 = 1_700_000_000;

/// A key pair that follows from a number.
#[derive(Clone)]
pub struct Keys {
    pair: Keypair,
}

impl Keys {
    pub fn new(seed: u64) -> Keys {
        let secret = Sha256::digest(format!("test key {seed}"));
        Keys { pair: Keypair::from_secret_bytes(secret.into()).expect("a hash is a valid secret key") }
    }

    /// The key pair of these secret bytes.
    pub fn of_secret(secret: [u8; 32]) -> Keys {
        Keys { pair: Keypair::from_secret_bytes(secret).expect("a valid secret key") }
    }

    pub fn pubkey(&self) -> PublicKey {
        PublicKey(self.pair.x_only_public_key().0.to_byte_array())
    }

    pub fn hex(&self) -> String {
        self.pubkey().to_hex()
    }

    /// An unsigned event of `kind` in second `created_at`.
    pub fn draft(&self, kind: u16, created_at: u64) -> Draft {
        Draft { keys: self.clone(), kind, created_at, tags: Vec::new(), content: String::new() }
    }

    /// A signed text note.
    pub fn note(&self, created_at: u64, content: &str) -> Event {
        self.draft(1, created_at).content(content).sign()
    }

    /// A signed deletion request with these `e` and `a` tags.
    pub fn deletion(&self, created_at: u64, targets: &[(&str, &str)]) -> Event {
        let request = self.draft(5, created_at);
        targets.iter().fold(request, |draft, (name, value)| draft.tag([*name, *value])).sign()
    }

    /// A signed answer to a challenge (NIP-42).
    pub fn auth(&self, challenge: &str, relay: &str, created_at: u64) -> Event {
        self.draft(22_242, created_at).tag(["relay", relay]).tag(["challenge", challenge]).sign()
    }

    /// `kind:pubkey:d`, as `a` tags name an address of this key.
    pub fn address(&self, kind: u16, d: &str) -> String {
        format!("{kind}:{}:{d}", self.hex())
    }

    /// Gives `event` this key's pubkey, id and signature.
    pub fn seal(&self, mut event: Event) -> Event {
        event.pubkey = self.pubkey();
        event.id = event_id(&event);
        event.sig = self.sign_id(&event.id);
        event
    }

    /// This key's signature over an id, whatever that id is the hash of.
    pub fn sign_id(&self, id: &EventId) -> Signature {
        Signature(secp256k1::schnorr::sign_no_aux_rand(&id.0, &self.pair).to_byte_array())
    }
}

/// An event on its way to a signature.
pub struct Draft {
    keys: Keys,
    kind: u16,
    created_at: u64,
    tags: Vec<Vec<String>>,
    content: String,
}

impl Draft {
    pub fn tag<T: Into<String>>(mut self, items: impl IntoIterator<Item = T>) -> Self {
        self.tags.push(items.into_iter().map(Into::into).collect());
        self
    }

    pub fn content(mut self, content: impl Into<String>) -> Self {
        self.content = content.into();
        self
    }

    pub fn sign(self) -> Event {
        self.keys.seal(Event {
            id: EventId([0; 32]),
            pubkey: self.keys.pubkey(),
            created_at: self.created_at,
            kind: Kind(self.kind),
            tags: Tags::from_lists(self.tags),
            content: self.content,
            sig: Signature([0; 64]),
        })
    }
}

/// The event's canonical JSON.
pub fn json_of(event: &Event) -> String {
    String::from_utf8(event.canonical().json.to_vec()).expect("JSON is text")
}

/// The event with its proof, as stores take it.
pub fn verified(event: &Event) -> Verified<Event> {
    Verified::check(event.clone()).expect("made by this signer")
}

/// Ids in hex, in the order given.
pub fn ids<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<String> {
    events.into_iter().map(|event| event.id.to_hex()).collect()
}
