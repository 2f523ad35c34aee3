//! The machine against itself, against the `negentropy` crate on either side, and against a plain difference of sets.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use negentropy::{Id, Negentropy, NegentropyStorageVector};
use proptest::prelude::*;
use secp256k1::rand::rngs::StdRng;
use secp256k1::rand::{Rng, SeedableRng};

use super::*;

/// A side that is the crate's.
struct Crate {
    storage: NegentropyStorageVector,
    frame: u64,
}

impl Crate {
    fn new(items: &[Item], frame: usize) -> Crate {
        let mut storage = NegentropyStorageVector::new();
        items.iter().for_each(|item| storage.insert(item.created_at, Id::from_byte_array(item.id.0)).unwrap());
        storage.seal().unwrap();
        Crate { storage, frame: frame as u64 }
    }

    fn answer(&self, message: &[u8]) -> Vec<u8> {
        Negentropy::borrowed(&self.storage, self.frame).unwrap().reconcile(message).unwrap()
    }
}

/// What a reconciliation found, and what it took.
#[derive(Debug, Default)]
struct Found {
    have: BTreeSet<EventId>,
    need: BTreeSet<EventId>,
    rounds: usize,
    largest: usize,
}

fn answer(side: Side, set: &mut Vec<Item>, message: Vec<u8>, frame: usize) -> Result<Exchange, Failure<()>> {
    let mut exchange = Exchange::new(side, message, frame)?;
    while exchange.step(set).map_err(|failure| match failure {
        Failure::Malformed(malformed) => Failure::Malformed(malformed),
        Failure::Set(never) => match never {},
    })? == Step::More
    {}
    Ok(exchange)
}

/// Our initiator against any responder.
fn initiate(ours: &[Item], frame: usize, mut respond: impl FnMut(&[u8]) -> Vec<u8>) -> Found {
    let mut ours = ours.to_vec();
    let mut message = begin(&mut ours).unwrap();
    let mut found = Found::default();
    loop {
        found.rounds += 1;
        assert!(found.rounds < 3_000, "no end");
        let reply = respond(&message);
        found.largest = found.largest.max(message.len()).max(reply.len());
        let exchange = answer(Side::Initiator, &mut ours, reply, frame).unwrap();
        found.have.extend(exchange.have.iter().map(|item| item.id));
        found.need.extend(exchange.need.iter().copied());
        if exchange.is_settled() {
            return found;
        }
        message = exchange.into_answer();
    }
}

fn ours_with_ours(ours: &[Item], theirs: &[Item], frames: [usize; 2]) -> Found {
    let mut theirs = theirs.to_vec();
    initiate(ours, frames[0], |message| {
        answer(Side::Responder, &mut theirs, message.to_vec(), frames[1]).unwrap().into_answer()
    })
}

fn ours_with_crate(ours: &[Item], theirs: &[Item], frames: [usize; 2]) -> Found {
    let other = Crate::new(theirs, frames[1]);
    initiate(ours, frames[0], |message| other.answer(message))
}

/// The crate's initiator against our responder.
fn crate_with_ours(ours: &[Item], theirs: &[Item], frames: [usize; 2]) -> Found {
    let storage = Crate::new(ours, frames[0]);
    let mut theirs = theirs.to_vec();
    let mut initiator = Negentropy::borrowed(&storage.storage, storage.frame).unwrap();
    let mut message = initiator.initiate().unwrap();
    let mut found = Found::default();
    loop {
        found.rounds += 1;
        let reply = answer(Side::Responder, &mut theirs, message, frames[1]).unwrap().into_answer();
        found.largest = found.largest.max(reply.len());
        let (mut have, mut need) = (Vec::new(), Vec::new());
        let next = initiator.reconcile_with_ids(&reply, &mut have, &mut need).unwrap();
        found.have.extend(have.iter().map(|id| EventId(id.to_bytes())));
        found.need.extend(need.iter().map(|id| EventId(id.to_bytes())));
        match next {
            Some(next) => message = next,
            None => return found,
        }
    }
}

/// A party's events: `shared` of both, and some of its own; `seconds` of time for all of them.
fn sets(seed: u64, shared: usize, only: [usize; 2], seconds: u64) -> [Vec<Item>; 2] {
    let mut random = StdRng::seed_from_u64(seed);
    let mut draw = |count: usize| -> Vec<Item> {
        let item = |_| Item { created_at: random.random_range(0..seconds), id: EventId(random.random()) };
        (0..count).map(item).collect()
    };
    let common = draw(shared);
    only.map(|count| {
        let mut items = common.clone();
        items.extend(draw(count));
        items.sort_unstable();
        items
    })
}

fn difference(a: &[Item], b: &[Item]) -> BTreeSet<EventId> {
    let b: BTreeSet<EventId> = b.iter().map(|item| item.id).collect();
    a.iter().map(|item| item.id).filter(|id| !b.contains(id)).collect()
}

fn check(ours: &[Item], theirs: &[Item], frames: [usize; 2]) {
    let (have, need) = (difference(ours, theirs), difference(theirs, ours));
    for run in [ours_with_ours, ours_with_crate, crate_with_ours] {
        let found = run(ours, theirs, frames);
        assert_eq!((&found.have, &found.need), (&have, &need));
        assert!(found.largest <= frames[0].max(frames[1]), "{} bytes", found.largest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the sets, the frame limits of both sides and the crowding of seconds: exactly the difference is found,
    /// by our machine on both sides and with the crate on either.
    #[test]
    fn the_difference_is_found(
        seed in any::<u64>(),
        shared in 0_usize..3_000,
        ours in 0_usize..600,
        theirs in 0_usize..600,
        seconds in prop_oneof![Just(1_u64), Just(7), 1_u64..100_000],
        frames in (4_096_usize..40_000, 4_096_usize..40_000),
    ) {
        let [a, b] = sets(seed, shared, [ours, theirs], seconds);
        check(&a, &b, [frames.0, frames.1]);
    }

    /// No bytes make the machine panic, and none make it answer with more than the frame.
    #[test]
    fn t40_garbage_is_refused_or_answered(message in prop::collection::vec(any::<u8>(), 0..300), versioned in any::<bool>()) {
        let mut message = message;
        if versioned {
            message.insert(0, VERSION);
        }
        let [mut set, _] = sets(1, 500, [0, 0], 9);
        for side in [Side::Responder, Side::Initiator] {
            if let Ok(exchange) = answer(side, &mut set, message.clone(), FRAME_BYTES_MIN) {
                prop_assert!(exchange.into_answer().len() <= FRAME_BYTES_MIN);
            }
        }
    }
}

/// What a reconciliation costs, in messages of the initiator and bytes of both: sets that are equal, a device that was away
/// for a month, and differences all over the place, where nearly every id must be told.
#[test]
fn a_reconciliation_costs_little() {
    let (month, year) = (30 * 86_400, 365 * 86_400);
    for (shared, only, since, rounds_max, bytes_max) in [
        (1_000_000, [0, 0], 0, 1, 1_000),
        (100_000, [10_000, 3_000], year - month, 5, 600_000),
        (100_000, [10_000, 10_000], 0, 16, 5_000_000),
    ] {
        let [mut ours, mut theirs] = sets(11, shared, [0, 0], year);
        for (seed, set, count) in [(12, &mut ours, only[0]), (13, &mut theirs, only[1])] {
            let [new, _] = sets(seed, count, [0, 0], year - since);
            set.extend(new.iter().map(|item| Item { created_at: item.created_at + since, ..*item }));
            set.sort_unstable();
        }
        let mut bytes = 0;
        let found = initiate(&ours, 250_000, |message| {
            let answer = answer(Side::Responder, &mut theirs, message.to_vec(), 500_000).unwrap().into_answer();
            bytes += message.len() + answer.len();
            answer
        });
        assert_eq!((found.have.len(), found.need.len()), (only[0], only[1]));
        println!("{shared} shared, {only:?} beside: {} rounds, {bytes} bytes", found.rounds);
        assert!(found.rounds <= rounds_max && bytes <= bytes_max, "{} rounds, {bytes} bytes", found.rounds);
    }
}

/// Sets that are equal, empty, one empty, all in one second; and answers that are the crate's, byte for byte.
#[test]
fn edges_and_the_same_bytes() {
    let [equal, _] = sets(5, 2_000, [0, 0], 50);
    let [one_second, other] = sets(6, 10_000, [100, 3_000], 1);
    for (a, b) in [(&equal, &equal), (&equal, &Vec::new()), (&Vec::new(), &equal), (&Vec::new(), &Vec::new())] {
        check(a, b, [4_096, 60_000]);
    }
    check(&one_second, &other, [4_096, 4_096]);
    check(&one_second, &other, [500_000, 4_096]);
    assert_eq!(ours_with_ours(&equal, &equal, [4_096; 2]).rounds, 1);
    let [mut a, b] = sets(7, 800, [40, 50], 300);
    let crate_side = Crate::new(&a, 60_000);
    let begun = Negentropy::borrowed(&Crate::new(&b, 60_000).storage, 60_000).unwrap().initiate().unwrap();
    assert_eq!(begun, begin(&mut b.clone()).unwrap());
    let ours = answer(Side::Responder, &mut a, begun.clone(), 60_000).unwrap().into_answer();
    assert_eq!(ours, crate_side.answer(&begun));
}

/// Other versions are answered with ours; what is no version, ends early, runs backwards or promises more than it holds
/// is refused (T40).
#[test]
fn t40_versions_and_malformed_messages() {
    let [mut set, _] = sets(8, 100, [0, 0], 9);
    let mut respond =
        |message: &[u8]| answer(Side::Responder, &mut set, message.to_vec(), 4_096).map(Exchange::into_answer);
    assert_eq!(respond(&[0x62, 1, 2, 3]), Ok(vec![VERSION]));
    assert_eq!(respond(&[VERSION]), Ok(vec![VERSION]));
    let refused = |malformed| Err(Failure::Malformed(malformed));
    assert_eq!(respond(&[]), refused(Malformed::Empty));
    assert_eq!(respond(&[0x15]), refused(Malformed::Version(0x15)));
    assert_eq!(respond(&[VERSION, 0]), refused(Malformed::Short));
    assert_eq!(respond(&[VERSION, 0, 0, 3]), refused(Malformed::Mode(3)));
    assert_eq!(respond(&[VERSION, 0, 33]), refused(Malformed::Prefix(33)));
    assert_eq!(respond(&[VERSION, 0, 0, 1, 7]), refused(Malformed::Short));
    let promised = [VERSION, 0, 0, 2, 0xc0, 0x80, 0x80, 0x80, 0];
    assert_eq!(respond(&promised), refused(Malformed::Short));
    assert_eq!(respond(&[[VERSION].as_slice(), &[0xff; 11]].concat()), refused(Malformed::Number));
    assert_eq!(respond(&[VERSION, 5, 1, 9, 0, 1, 1, 8, 0]), refused(Malformed::Order));
}
