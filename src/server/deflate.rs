//! Compressed WebSocket messages (RFC 7692, permessage-deflate): what is agreed on, and the work itself.
//!
//! No connection holds a compressor. Each worker thread has one of either kind and lends it out:
//!
//! - **To the client**, messages that are written in one go (a page of stored events) share a context if the client can
//!   follow; the next go begins anew. A client that keeps its window is not disturbed by that: a sender may always refer
//!   to less than it could.
//! - A **live event** is compressed once for all its receivers: what stands before it, which differs from one
//!   subscription to the next, goes as a stored block, and whole blocks can be put together.
//! - **From the client**, every message stands for itself: the relay's answer asks for that, as RFC 7692 lets it.
//!
//! So compression costs memory by threads and not by clients, and a silent client nothing.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use hyper::header::{HeaderMap, HeaderValue, SEC_WEBSOCKET_EXTENSIONS};

/// Messages shorter than this are sent as they are: compressing one would save nothing.
pub const COMPRESS_BYTES_MIN: usize = 200;

/// The first level that fits its code to the text: of 2,600 real events it leaves 48 % where they share a context and 61 %
/// where each stands for itself. Level 1 leaves 64 % and 87 % for three quarters of the time; those above save nothing more.
const LEVEL: u32 = 2;

/// What a flush ends with, and what RFC 7692 has cut off a message.
const FLUSH_TAIL: [u8; 4] = [0x00, 0x00, 0xff, 0xff];

/// Bytes that are inflated between two looks at the limit.
const INFLATE_STEP_BYTES: usize = 16 * 1024;

/// What was agreed on with a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Whether a message may refer to those before it.
    pub takeover: bool,
}

/// Finds an offer that can be accepted; what it means, and the answer to it. `None`: messages go as they are.
pub fn negotiate(headers: &HeaderMap) -> Option<(Agreed, HeaderValue)> {
    let values = headers.get_all(SEC_WEBSOCKET_EXTENSIONS).into_iter().filter_map(|value| value.to_str().ok());
    let agreed = values.flat_map(|value| value.split(',')).find_map(accept)?;
    let answer = match agreed.takeover {
        true => "permessage-deflate; client_no_context_takeover",
        false => "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
    };
    Some((agreed, HeaderValue::from_static(answer)))
}

/// Accepts one offer. One with a parameter that is unknown, repeated or cannot be met is passed over, as RFC 7692 says: a
/// smaller window than the usual is not offered by any browser.
fn accept(offer: &str) -> Option<Agreed> {
    let mut parts = offer.split(';').map(str::trim);
    if parts.next() != Some("permessage-deflate") {
        return None;
    }
    let mut takeover = true;
    let mut seen = Vec::new();
    for part in parts {
        let (name, value) =
            part.split_once('=').map_or((part, None), |(name, value)| (name.trim(), Some(value.trim())));
        let value = value.map(|value| value.trim_matches('"'));
        match (name, value) {
            _ if seen.contains(&name) => return None,
            ("server_no_context_takeover", None) => takeover = false,
            ("client_no_context_takeover", None) | ("client_max_window_bits", None) => {}
            ("client_max_window_bits", Some(bits)) if is_window(bits) => {}
            ("server_max_window_bits", Some("15")) => {}
            _ => return None,
        }
        seen.push(name);
    }
    Some(Agreed { takeover })
}

/// 8 to 15, without leading zeros.
fn is_window(bits: &str) -> bool {
    matches!(bits, "8" | "9" | "10" | "11" | "12" | "13" | "14" | "15")
}

thread_local! {
    static PACKER: RefCell<Packer> = RefCell::new(Packer {
        compress: Compress::new(Compression::new(LEVEL), false),
        batch: Batch(0),
        out: Vec::new(),
    });
    static UNPACKER: RefCell<Decompress> = RefCell::new(Decompress::new(false));
}

/// A thread's compressor.
struct Packer {
    compress: Compress,
    /// Whose messages are in its window.
    batch: Batch,
    out: Vec<u8>,
}

/// Messages that are written to one client in one go, by one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch(u64);

impl Batch {
    /// Told apart from every other of this process.
    pub fn begin() -> Batch {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Batch(1 + LAST.fetch_add(1, Ordering::Relaxed))
    }
}

/// Compresses a message that comes in parts and gives the result to `take`. Messages of one `batch` refer to each other;
/// without one the message stands for itself.
pub fn deflate<T>(parts: &[&[u8]], batch: Option<Batch>, take: impl FnOnce(&[u8]) -> T) -> T {
    PACKER.with_borrow_mut(|packer| {
        if batch != Some(packer.batch) {
            packer.compress.reset();
        }
        packer.batch = batch.unwrap_or(Batch(0));
        packer.out.clear();
        for (at, part) in parts.iter().enumerate() {
            let flush = if at + 1 == parts.len() { FlushCompress::Sync } else { FlushCompress::None };
            packer.run(part, flush);
        }
        let len = packer.out.len() - if packer.out.ends_with(&FLUSH_TAIL) { FLUSH_TAIL.len() } else { 0 };
        let taken = take(&packer.out[..len]);
        packer.out.shrink_to(INFLATE_STEP_BYTES * 4);
        taken
    })
}

impl Packer {
    fn run(&mut self, mut input: &[u8], flush: FlushCompress) {
        loop {
            self.out.reserve(input.len() / 2 + 64);
            let before = self.compress.total_in();
            // An error cannot be: the compressor is in order, and there is room.
            let Ok(_) = self.compress.compress_vec(input, &mut self.out, flush) else { return };
            let taken = usize::try_from(self.compress.total_in() - before).unwrap_or(usize::MAX);
            input = input.get(taken..).unwrap_or_default();
            // All is out once it was all taken and there is room to spare.
            if input.is_empty() && self.out.len() < self.out.capacity() {
                return;
            }
        }
    }
}

/// A part of a compressed message that goes as it is, and that whole blocks may follow. At most 65,535 bytes.
pub fn stored_block(part: &[u8]) -> Option<[u8; 5]> {
    let len = u16::try_from(part.len()).ok()?;
    let [low, high] = len.to_le_bytes();
    Some([0, low, high, !low, !high])
}

/// What became of a compressed message.
#[derive(Debug, PartialEq, Eq)]
pub enum Inflated {
    /// All of it.
    Whole(Vec<u8>),
    /// It has more bytes than it may.
    TooLarge,
    /// It cannot be read.
    Broken,
}

/// Inflates a message that stands for itself and has at most `bytes_max` bytes.
pub fn inflate(bytes: &[u8], bytes_max: usize) -> Inflated {
    UNPACKER.with_borrow_mut(|unpacker| {
        unpacker.reset(false);
        let mut out = Vec::new();
        for part in [bytes, &FLUSH_TAIL] {
            let mut input = part;
            loop {
                out.reserve(INFLATE_STEP_BYTES.min(bytes_max + 1 - out.len().min(bytes_max)));
                let before = unpacker.total_in();
                let Ok(status) = unpacker.decompress_vec(input, &mut out, FlushDecompress::Sync) else {
                    return Inflated::Broken;
                };
                if out.len() > bytes_max {
                    return Inflated::TooLarge;
                }
                let taken = usize::try_from(unpacker.total_in() - before).unwrap_or(usize::MAX);
                input = input.get(taken..).unwrap_or_default();
                let is_done = input.is_empty() && out.len() < out.capacity();
                // A stream that ends itself has nothing behind its end but what RFC 7692 adds.
                if status == Status::StreamEnd || is_done {
                    break;
                }
                if taken == 0 && status == Status::BufError && out.len() < out.capacity() {
                    return Inflated::Broken;
                }
            }
        }
        Inflated::Whole(out)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// A message as a client sends it, without the tail.
    pub(crate) fn deflated(bytes: &[u8]) -> Vec<u8> {
        deflate(&[bytes], None, <[u8]>::to_vec)
    }

    fn negotiated(offers: &str) -> Option<(bool, String)> {
        let mut headers = HeaderMap::new();
        headers.insert(SEC_WEBSOCKET_EXTENSIONS, offers.parse().unwrap());
        negotiate(&headers).map(|(agreed, answer)| (agreed.takeover, answer.to_str().unwrap().to_owned()))
    }

    /// What browsers and libraries offer is accepted; the first offer that can be met counts, as RFC 7692 says.
    #[test]
    fn offers_are_answered() {
        let with = Some((true, "permessage-deflate; client_no_context_takeover".to_owned()));
        let without =
            Some((false, "permessage-deflate; server_no_context_takeover; client_no_context_takeover".to_owned()));
        for (offers, expected) in [
            ("permessage-deflate; client_max_window_bits", &with),
            ("permessage-deflate", &with),
            ("permessage-deflate;client_max_window_bits=\"10\" ; server_max_window_bits=15", &with),
            ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", &without),
            ("permessage-deflate; server_max_window_bits=10, permessage-deflate; server_no_context_takeover", &without),
            ("x-webkit-deflate-frame, permessage-deflate", &with),
            ("permessage-deflate; server_max_window_bits=10", &None),
            ("permessage-deflate; client_max_window_bits=16", &None),
            ("permessage-deflate; client_max_window_bits=08", &None),
            ("permessage-deflate; client_max_window_bits; client_max_window_bits", &None),
            ("permessage-deflate; server_no_context_takeover=1", &None),
            ("permessage-deflate; unknown", &None),
            ("permessage-bzip2", &None),
            ("", &None),
        ] {
            assert_eq!(negotiated(offers), *expected, "{offers}");
        }
        assert_eq!(negotiate(&HeaderMap::new()), None);
    }

    /// Inflates messages one after the other, as a client that keeps its window does.
    fn follow(messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut window = Decompress::new(false);
        let inflate = |message: &Vec<u8>| {
            let mut out = Vec::with_capacity(1 << 20);
            let bytes = [message.as_slice(), &FLUSH_TAIL].concat();
            window.decompress_vec(&bytes, &mut out, FlushDecompress::Sync).unwrap();
            out
        };
        messages.iter().map(inflate).collect()
    }

    /// Messages of a batch get shorter by what came before; the client follows from batch to batch, and from one thread
    /// to another.
    #[test]
    fn batches_share_a_context_and_clients_follow() {
        let text = br#"{"content":"hello","created_at":1700000000,"kind":1,"pubkey":"0123456789abcdef"}"#.to_vec();
        let pack = |batch| deflate(&[&text[..9], &text[9..]], Some(batch), <[u8]>::to_vec);
        let (one, two) = (Batch::begin(), Batch::begin());
        let mut messages = vec![pack(one), pack(one), pack(two), pack(one)];
        messages.push(std::thread::spawn(move || deflate(&[b"elsewhere"], Some(two), <[u8]>::to_vec)).join().unwrap());
        assert!(messages[1].len() * 3 < messages[0].len(), "{} {}", messages[1].len(), messages[0].len());
        assert_eq!(messages[2], messages[0], "a batch begins anew");
        assert_eq!(messages[3], messages[0], "and so does one that was interrupted");
        let mut expected = vec![text; 4];
        expected.push(b"elsewhere".to_vec());
        assert_eq!(follow(&messages), expected);
    }

    proptest! {
        /// Anything comes back, in any parts; a stored block may stand in front; a bound is kept to the byte.
        #[test]
        fn what_is_packed_is_unpacked(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3_000), 1..4),
            repeat in 1usize..20,
            prefix in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let parts: Vec<Vec<u8>> = parts.into_iter().map(|part| part.repeat(repeat)).collect();
            let whole = parts.concat();
            let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let packed = deflate(&slices, None, <[u8]>::to_vec);
            prop_assert_eq!(inflate(&packed, whole.len()), Inflated::Whole(whole.clone()));
            if !whole.is_empty() {
                prop_assert_eq!(inflate(&packed, whole.len() - 1), Inflated::TooLarge);
            }
            let joined = [&stored_block(&prefix).unwrap()[..], &prefix, &packed].concat();
            prop_assert_eq!(inflate(&joined, 1 << 20), Inflated::Whole([prefix, whole].concat()));
        }

        /// Garbage ends, and within the bound.
        #[test]
        fn garbage_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            if let Inflated::Whole(out) = inflate(&bytes, 1_000) {
                prop_assert!(out.len() <= 1_000);
            }
        }
    }
}
