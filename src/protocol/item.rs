//! Events as reconciliation sees them (NIP-77): their place in time and their id, and sums over many of them.

use sha2::{Digest, Sha256};

use super::EventId;

/// What of an event takes part in reconciliation. The order is NIP-77's: by time, then by id, both ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Item {
    /// Seconds since 1970 UTC. [`u64::MAX`] stands for infinity in NIP-77, so no event dated then takes part.
    pub created_at: u64,
    /// The event id.
    pub id: EventId,
}

impl Item {
    /// Before every event.
    pub const FIRST: Item = Item { created_at: 0, id: EventId([0; 32]) };
    /// Behind every event that takes part.
    pub const END: Item = Item { created_at: u64::MAX, id: EventId([0; 32]) };

    /// The first item of a second.
    pub fn at(created_at: u64) -> Item {
        Item { created_at, id: EventId([0; 32]) }
    }
}

/// How many ids, and their sum as little-endian numbers modulo 2^256. Sums form a group: what was added can be taken
/// away again, in any order, so a sum kept for a stretch of time follows every change of the stretch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// How many.
    pub count: u64,
    limbs: [u64; 4],
}

impl Sum {
    /// Adds an id.
    pub fn add(&mut self, id: &EventId) {
        self.plus(&Sum::of(id));
    }

    /// Takes an id away that was added.
    pub fn take(&mut self, id: &EventId) {
        self.minus(&Sum::of(id));
    }

    /// Adds another sum.
    pub fn plus(&mut self, other: &Sum) {
        self.count = self.count.wrapping_add(other.count);
        let mut carry = false;
        for (limb, more) in self.limbs.iter_mut().zip(other.limbs) {
            let (sum, over) = limb.overflowing_add(more);
            let (sum, over_again) = sum.overflowing_add(u64::from(carry));
            (*limb, carry) = (sum, over || over_again);
        }
    }

    /// Takes another sum away.
    pub fn minus(&mut self, other: &Sum) {
        self.count = self.count.wrapping_sub(other.count);
        let mut borrow = false;
        for (limb, less) in self.limbs.iter_mut().zip(other.limbs) {
            let (rest, under) = limb.overflowing_sub(less);
            let (rest, under_again) = rest.overflowing_sub(u64::from(borrow));
            (*limb, borrow) = (rest, under || under_again);
        }
    }

    /// NIP-77's digest of a range with this sum.
    pub fn fingerprint(&self) -> [u8; 16] {
        let mut hash = Sha256::new();
        self.limbs.iter().for_each(|limb| hash.update(limb.to_le_bytes()));
        let mut count = Vec::with_capacity(10);
        push_varint(&mut count, self.count);
        hash.update(&count);
        let hash: [u8; 32] = hash.finalize().into();
        hash[..16].try_into().expect("16 of 32 bytes")
    }

    fn of(id: &EventId) -> Sum {
        let limb = |at: usize| u64::from_le_bytes(id.0[at..at + 8].try_into().expect("8 bytes"));
        Sum { count: 1, limbs: [limb(0), limb(8), limb(16), limb(24)] }
    }
}

impl<'a> FromIterator<&'a Item> for Sum {
    fn from_iter<I: IntoIterator<Item = &'a Item>>(items: I) -> Sum {
        items.into_iter().fold(Sum::default(), |mut sum, item| {
            sum.add(&item.id);
            sum
        })
    }
}

/// Appends a number in NIP-77's form: base 128, most significant digit first, bit 7 set on all but the last.
pub fn push_varint(out: &mut Vec<u8>, number: u64) {
    let digits = (u64::BITS - number.leading_zeros()).div_ceil(7).max(1);
    for place in (0..digits).rev() {
        let digit = (number >> (7 * place)) as u8 & 0x7f;
        out.push(if place == 0 { digit } else { digit | 0x80 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Carries run through all limbs and off the end; what is taken away again leaves nothing.
    #[test]
    fn sums_form_a_group() {
        let ids = [EventId([0xff; 32]), EventId([1; 32]), EventId([0x80; 32]), EventId([0xff; 32])];
        let mut sum = Sum::default();
        ids.iter().for_each(|id| sum.add(id));
        let mut backwards = Sum::default();
        ids.iter().rev().for_each(|id| backwards.add(id));
        assert_eq!((sum, sum.count), (backwards, 4));
        let mut rest = sum;
        rest.minus(&backwards);
        assert_eq!(rest, Sum::default());
        ids.iter().for_each(|id| sum.take(id));
        assert_eq!(sum, Sum::default());
        let mut one = Sum::of(&EventId([0xff; 32]));
        let mut lowest = EventId([0; 32]);
        lowest.0[0] = 1;
        one.add(&lowest);
        assert_eq!(one, Sum { count: 2, limbs: [0; 4] });
    }

    /// The shortest form, at the edges of each length.
    #[test]
    fn varints_are_as_short_as_can_be() {
        for (number, expected) in [
            (0, vec![0]),
            (127, vec![0x7f]),
            (128, vec![0x81, 0]),
            (16_383, vec![0xff, 0x7f]),
            (16_384, vec![0x81, 0x80, 0]),
            (u64::MAX, vec![0x81, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        ] {
            let mut out = Vec::new();
            push_varint(&mut out, number);
            assert_eq!(out, expected, "{number}");
        }
    }
}
