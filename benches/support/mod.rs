//! Seeded events for the benches: same seed, same bytes.

#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use secp256k1::Keypair;
use secp256k1::rand::rngs::StdRng;
use secp256k1::rand::{Rng, SeedableRng};
use sledge::protocol::verify::event_id;
use sledge::protocol::{Event, EventId, Kind, PublicKey, Signature, Tags, Verified};

/// A day in 2026; events follow one another by a few seconds.
pub const START: u64 = 1_767_225_600;
pub const AUTHORS: usize = 500;

pub fn author(number: usize) -> Keypair {
    let mut secret = [1; 32];
    secret[..8].copy_from_slice(&(number as u64 + 1).to_be_bytes());
    Keypair::from_secret_bytes(secret).unwrap()
}

pub fn pubkey(keypair: &Keypair) -> PublicKey {
    PublicKey(keypair.x_only_public_key().0.to_byte_array())
}

/// Notes, replies, reactions and the odd profile, about 700 bytes each, by [`AUTHORS`] authors.
pub fn events(count: usize) -> Vec<Verified<Event>> {
    let mut random = StdRng::seed_from_u64(1);
    let authors: Vec<Keypair> = (0..AUTHORS).map(author).collect();
    let mut ids: Vec<(EventId, PublicKey)> = Vec::with_capacity(count);
    let mut all = Vec::with_capacity(count);
    for number in 0..count {
        // Few authors write much: the square makes the low numbers likely.
        let keypair = &authors[(random.random::<f64>().powi(2) * AUTHORS as f64) as usize];
        let (kind, tags) = match random.random_range(0..100) {
            0..3 => (0, vec![]),
            3..40 if number > 0 => (7, reference(&mut random, &ids)),
            40..70 if number > 0 => (1, reference(&mut random, &ids)),
            _ => (1, vec![vec!["t".to_owned(), format!("topic{}", random.random_range(0..200))]]),
        };
        let length = random.random_range(20..600);
        let content = (0..length).map(|_| char::from(random.random_range(b' '..b'~'))).collect();
        let event = sign(keypair, kind, START + number as u64 * 3, &tags, content);
        ids.push((event.id, event.pubkey));
        all.push(event);
    }
    all
}

/// Notes that read like people's, so that they compress like them: words of which some are frequent.
pub fn wordy_events(count: usize) -> Vec<Verified<Event>> {
    let mut random = StdRng::seed_from_u64(2);
    let syllables = ["ka", "no", "stra", "mi", "ter", "lo", "wen", "a", "ri", "da", "sho", "pe", "gul", "in", "e"];
    let word = |random: &mut StdRng| -> String {
        (0..random.random_range(1..5)).map(|_| syllables[random.random_range(0..syllables.len())]).collect()
    };
    let words: Vec<String> = (0..4_000).map(|_| word(&mut random)).collect();
    let authors: Vec<Keypair> = (0..AUTHORS).map(author).collect();
    let mut ids: Vec<(EventId, PublicKey)> = Vec::with_capacity(count);
    let mut all = Vec::with_capacity(count);
    for number in 0..count {
        let keypair = &authors[random.random_range(0..AUTHORS)];
        let tags = if number > 0 { reference(&mut random, &ids) } else { vec![] };
        let length = random.random_range(5..120);
        let content: Vec<&str> =
            (0..length).map(|_| &*words[(random.random::<f64>().powi(3) * words.len() as f64) as usize]).collect();
        let event = sign(keypair, 1, START + number as u64 * 3, &tags, content.join(" "));
        ids.push((event.id, event.pubkey));
        all.push(event);
    }
    all
}

fn reference(random: &mut StdRng, ids: &[(EventId, PublicKey)]) -> Vec<Vec<String>> {
    let (id, pubkey) = ids[random.random_range(0..ids.len())];
    vec![vec!["e".to_owned(), id.to_hex()], vec!["p".to_owned(), pubkey.to_hex()]]
}

pub fn sign(keypair: &Keypair, kind: u16, created_at: u64, tags: &[Vec<String>], content: String) -> Verified<Event> {
    let mut event = Event {
        id: EventId([0; 32]),
        pubkey: pubkey(keypair),
        created_at,
        kind: Kind(kind),
        tags: Tags::from_lists(tags.iter().map(|tag| tag.iter())),
        content,
        sig: Signature([0; 64]),
    };
    event.id = event_id(&event);
    event.sig = Signature(keypair.sign_schnorr_no_aux_rand(&event.id.0).to_byte_array());
    Verified::check(event).unwrap()
}
