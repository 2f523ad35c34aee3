//! A Bloom filter over event ids: "this event is certainly not stored", without a read.
//!
//! An id is a SHA-256, so its own bits serve as hashes. They are taken from its
//! end: ids with proof of work (NIP-13) all begin with zeros.
//!
//! It grows by layers. Each holds twice the ids of the one before and spends one
//! more bit an id, so that the chance of a false positive, summed over however
//! many layers, stays below 1 %. Nothing is ever taken out; a filter full of
//! removed ids is only less sharp, and a rebuild makes a new one.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Ids in the first layer of [`Bloom::new`]: 96 KiB.
pub const FIRST_LAYER_IDS: u64 = 65_536;
/// Bits an id in the first layer; each further layer has one more.
pub const BITS_PER_ID: u64 = 12;
/// Most layers: with doubling, more than any disk holds.
const LAYERS_MAX: usize = 24;
/// Most ids in a first layer. Keeps the size of every layer within 64 bits.
const FIRST_LAYER_IDS_MAX: u64 = 1 << 32;
/// First bytes of the saved form; the last one is its version.
const MAGIC: [u8; 8] = *b"sl-blom\x01";

/// Why saved bytes are no filter. The answer is always to build it again from the log.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BloomError {
    /// Not a saved filter, or one of another version.
    #[error("not a saved Bloom filter of this version")]
    Format,
    /// The checksum over the bytes does not match.
    #[error("the saved Bloom filter is damaged")]
    Checksum,
}

/// A set of event ids that may say yes wrongly (below 1 %) but never no.
///
/// One thread inserts while any number ask, without a lock. Who learns of an id
/// through a channel or lock after its insertion also finds it here.
#[derive(Debug)]
pub struct Bloom {
    first_layer_ids: u64,
    layers: [OnceLock<Layer>; LAYERS_MAX],
}

#[derive(Debug)]
struct Layer {
    ids: AtomicU64,
    ids_max: u64,
    hashes: u64,
    words: Box<[AtomicU64]>,
}

impl Default for Bloom {
    fn default() -> Bloom {
        Bloom::new()
    }
}

impl Bloom {
    /// An empty filter of [`FIRST_LAYER_IDS`].
    #[must_use]
    pub fn new() -> Bloom {
        Bloom::with_capacity(FIRST_LAYER_IDS)
    }

    /// An empty filter whose first layer holds this many ids: one layer is smaller and
    /// faster than several, so a rebuild that knows the number says it.
    #[must_use]
    pub fn with_capacity(ids: u64) -> Bloom {
        let first_layer_ids = ids.clamp(FIRST_LAYER_IDS, FIRST_LAYER_IDS_MAX);
        Bloom { first_layer_ids, layers: [const { OnceLock::new() }; LAYERS_MAX] }
    }

    /// False: this id was never inserted. True: it was, or one in more than a hundred times it was not.
    #[must_use]
    pub fn contains(&self, id: &[u8; 32]) -> bool {
        self.made().any(|layer| layer.contains(id))
    }

    /// Adds an id. An id that the filter already answers with yes changes nothing.
    /// To be called by one thread at a time.
    pub fn insert(&self, id: &[u8; 32]) {
        if !self.contains(id) {
            self.layer_with_room().insert(id);
        }
    }

    /// Ids inserted, without those that were already answered with yes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.made().map(|layer| layer.ids.load(Ordering::Relaxed)).sum()
    }

    /// Whether nothing was ever inserted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory the layers take.
    #[must_use]
    pub fn bytes_in_memory(&self) -> u64 {
        self.made().map(|layer| layer.words.len() as u64 * 8).sum()
    }

    /// The saved form: magic · ids of the first layer 8 · layers 8 · per layer (ids 8 ·
    /// words) · CRC-32 4, all little-endian. Insertions must rest meanwhile.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&self.first_layer_ids.to_le_bytes());
        bytes.extend_from_slice(&(self.made().count() as u64).to_le_bytes());
        for layer in self.made() {
            bytes.extend_from_slice(&layer.ids.load(Ordering::Relaxed).to_le_bytes());
            bytes.extend(layer.words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()));
        }
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Reads what [`Bloom::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`BloomError`] on anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Bloom, BloomError> {
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(BloomError::Format)?;
        let body_after_magic = body.strip_prefix(&MAGIC).ok_or(BloomError::Format)?;
        if crc32fast::hash(body) != u32::from_le_bytes(*checksum) {
            return Err(BloomError::Checksum);
        }
        let mut words = body_after_magic
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("chunks_exact gives 8 bytes")));
        let mut next = || words.next().ok_or(BloomError::Format);

        let first_layer_ids = next()?;
        let layers = next()?;
        if !(FIRST_LAYER_IDS..=FIRST_LAYER_IDS_MAX).contains(&first_layer_ids) || layers > LAYERS_MAX as u64 {
            return Err(BloomError::Format);
        }
        let numbers: u64 = (0..layers as usize).map(|number| 1 + layer_words(first_layer_ids, number)).sum();
        if body_after_magic.len() as u64 != 8 * (2 + numbers) {
            return Err(BloomError::Format);
        }
        let bloom = Bloom::with_capacity(first_layer_ids);
        for number in 0..layers as usize {
            let ids = next()?;
            let layer = bloom.layers[number].get_or_init(|| Layer::new(first_layer_ids, number));
            layer.ids.store(ids, Ordering::Relaxed);
            for word in &layer.words {
                word.store(next()?, Ordering::Relaxed);
            }
        }
        Ok(bloom)
    }

    fn made(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().map_while(OnceLock::get)
    }

    /// The last layer stays in use when it is full: less sharp, still right.
    fn layer_with_room(&self) -> &Layer {
        let number = self.made().take_while(|layer| layer.is_full()).count().min(LAYERS_MAX - 1);
        self.layers[number].get_or_init(|| Layer::new(self.first_layer_ids, number))
    }
}

fn layer_words(first_layer_ids: u64, number: usize) -> u64 {
    ((first_layer_ids << number) * bits_per_id(number)).div_ceil(64)
}

fn bits_per_id(number: usize) -> u64 {
    BITS_PER_ID + number as u64
}

impl Layer {
    fn new(first_layer_ids: u64, number: usize) -> Layer {
        Layer {
            ids: AtomicU64::new(0),
            ids_max: first_layer_ids << number,
            // ln 2 of the bits an id has is where a Bloom filter is sharpest.
            hashes: bits_per_id(number) * 69 / 100,
            words: (0..layer_words(first_layer_ids, number)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn is_full(&self) -> bool {
        self.ids.load(Ordering::Relaxed) >= self.ids_max
    }

    /// Bit positions of an id, by double hashing (Kirsch and Mitzenmacher 2006).
    fn bits(&self, id: &[u8; 32]) -> impl Iterator<Item = (usize, u64)> {
        let number = |at: usize| u64::from_le_bytes(*id[at..].first_chunk().expect("an id has 32 bytes"));
        let (start, step) = (number(16), number(24) | 1);
        let bits = self.words.len() as u128 * 64;
        (0..self.hashes).map(move |n| {
            let hash = start.wrapping_add(step.wrapping_mul(n));
            let bit = ((u128::from(hash) * bits) >> 64) as u64;
            ((bit / 64) as usize, 1 << (bit % 64))
        })
    }

    fn contains(&self, id: &[u8; 32]) -> bool {
        self.bits(id).all(|(word, mask)| self.words[word].load(Ordering::Relaxed) & mask != 0)
    }

    fn insert(&self, id: &[u8; 32]) {
        for (word, mask) in self.bits(id) {
            self.words[word].fetch_or(mask, Ordering::Relaxed);
        }
        self.ids.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use sha2::{Digest, Sha256};

    fn id(number: u64) -> [u8; 32] {
        Sha256::digest(number.to_le_bytes()).into()
    }

    fn filled(ids: u64) -> Bloom {
        let bloom = Bloom::new();
        (0..ids).for_each(|number| bloom.insert(&id(number)));
        bloom
    }

    fn false_positives(bloom: &Bloom, asked: u64) -> u64 {
        let start = 1 << 40;
        (start..start + asked).filter(|number| bloom.contains(&id(*number))).count() as u64
    }

    /// Three full layers: every id is found, fewer than 1 % of others are.
    #[test]
    fn no_false_negative_and_few_false_positives() {
        let ids = FIRST_LAYER_IDS * 7;
        let bloom = filled(ids);
        assert!((0..ids).all(|number| bloom.contains(&id(number))));
        // Falsely known ids were not counted.
        assert!(bloom.len() > ids * 99 / 100 && bloom.len() <= ids);
        let false_positives = false_positives(&bloom, 100_000);
        assert!(false_positives < 1_000, "{false_positives} of 100,000");
    }

    /// Ids with proof of work share their first bytes; the filter must not depend on those.
    #[test]
    fn ids_that_begin_with_zeros_are_spread_as_well() {
        let mined = |number| {
            let mut id = id(number);
            id[..8].fill(0);
            id
        };
        let bloom = Bloom::new();
        (0..FIRST_LAYER_IDS).for_each(|number| bloom.insert(&mined(number)));
        let strangers = (1 << 40)..(1 << 40) + 20_000;
        assert!(strangers.filter(|number| bloom.contains(&mined(*number))).count() < 200);
    }

    /// What was known stays known over saving and loading, and the filter goes on growing.
    #[test]
    fn saved_and_loaded() {
        let bloom = Bloom::from_bytes(&filled(70_000).to_bytes()).unwrap();
        (70_000..80_000).for_each(|number| bloom.insert(&id(number)));
        assert!((0..80_000).all(|number| bloom.contains(&id(number))));
        assert!(Bloom::from_bytes(&Bloom::new().to_bytes()).unwrap().is_empty());
    }

    /// Any flipped byte and any cut is noticed.
    #[test]
    fn damaged_bytes_are_refused() {
        let saved = filled(10).to_bytes();
        for at in (0..saved.len()).step_by(1_009).chain(saved.len() - 4..saved.len()) {
            let mut damaged = saved.clone();
            damaged[at] ^= 0x10;
            assert!(Bloom::from_bytes(&damaged).is_err(), "byte {at}");
            assert!(Bloom::from_bytes(&saved[..at]).is_err(), "cut at {at}");
        }
    }

    /// Bytes with a right checksum and a wrong shape are refused before memory is taken for them.
    #[test]
    fn impossible_sizes_are_refused() {
        for (first_layer_ids, layers) in [(u64::MAX, 1), (FIRST_LAYER_IDS, 1 << 30), (0, 1)] {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&first_layer_ids.to_le_bytes());
            bytes.extend_from_slice(&u64::to_le_bytes(layers));
            bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
            assert_eq!(Bloom::from_bytes(&bytes).unwrap_err(), BloomError::Format);
        }
    }

    /// A reader on another thread sees every id that the writer has announced.
    #[test]
    fn readers_see_announced_ids() {
        let bloom = Bloom::new();
        let announced = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..100_000 {
                    bloom.insert(&id(number));
                    announced.store(number + 1, Ordering::Release);
                }
            });
            let mut seen = 0;
            while seen < 100_000 {
                let now = announced.load(Ordering::Acquire);
                assert!((seen..now).all(|number| bloom.contains(&id(number))));
                seen = now;
            }
        });
    }
}
